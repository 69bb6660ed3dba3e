//! Calls of tools and the tools on offer, in the forms that rows have them: OpenAI's, its older one, and JSON texts.

use super::record::Place;
use super::shape::Columns;
use super::{Checked, Json, is_nothing, is_python, parse, wrong_kind};
use crate::problem::{Refusal, reason};

/// A call or a tool as OpenAI's API writes it now: the function with its type around it, where it is not there yet.
pub(super) fn wrap(function: Json) -> Json {
    if matches!(function.get("function"), Some(Json::Object(_))) {
        return function;
    }
    let kind = ("type".to_owned(), Json::Str("function".to_owned()));
    Json::Object(vec![kind, ("function".to_owned(), function)])
}

/// Adds calls to a reply.
pub(super) fn add(message: &mut Json, mut calls: Vec<Json>) {
    match message.get_mut("tool_calls") {
        Some(Json::Array(given)) => given.append(&mut calls),
        _ => message.set("tool_calls", Json::Array(calls)),
    }
}

/// `function_call`, as OpenAI wrote a call before `tool_calls`, becomes one of them; its arguments stay as they are.
pub(super) fn modernize(message: &mut Json, reply: bool, place: Place) -> Checked<()> {
    let wrong = |what: &str| Err(Refusal::new(reason::BAD_MESSAGE, format!("{place}: {what}")));
    let call = match message.remove("function_call") {
        None | Some(Json::Null) => return Ok(()),
        Some(call @ Json::Object(_)) => call,
        Some(other) => return wrong(&format!("`function_call` is {}, not an object", other.kind())),
    };
    if !reply {
        return wrong("`function_call` in a message that is not the assistant's");
    }
    if message.get("tool_calls").is_some_and(|calls| !is_nothing(calls)) {
        return wrong("has both `function_call` and `tool_calls`; keep `tool_calls`");
    }
    check(&call, "`function_call`").or_else(|what| wrong(&what))?;
    message.set("tool_calls", Json::Array(vec![wrap(call)]));
    Ok(())
}

/// A call needs a name, and arguments that are a text or an object.
fn check(call: &Json, what: &str) -> std::result::Result<(), String> {
    if !matches!(call, Json::Object(_)) {
        return Err(format!("{what} is {}, not an object", call.kind()));
    }
    match call.get("name") {
        Some(Json::Str(name)) if !name.is_empty() => {}
        other => return Err(format!("the name in {what} is {}, not a string", other.map_or("missing", Json::kind))),
    }
    match call.get("arguments") {
        Some(Json::Str(_) | Json::Object(_)) => Ok(()),
        other => {
            let found = other.map_or("missing", Json::kind);
            Err(format!("`arguments` in {what} is {found}, not JSON text or an object"))
        }
    }
}

/// The calls in a value that holds one or a list of them, as JSON text or as it is. `what` names the value.
pub(super) fn of_value(value: Json, what: &str) -> std::result::Result<Vec<Json>, String> {
    let value = match value {
        Json::Str(text) => parse(text.as_bytes()).map_err(|error| not_json(&text, what, &error))?,
        value => value,
    };
    let calls = match value {
        Json::Array(calls) => calls,
        call => vec![call],
    };
    if calls.is_empty() {
        return Err(format!("{what} is an empty list"));
    }
    calls
        .into_iter()
        .map(|call| {
            let function = call.get("function").filter(|function| matches!(function, Json::Object(_)));
            check(function.unwrap_or(&call), what).map(|()| wrap(call))
        })
        .collect()
}

/// Why a text is no JSON.
fn not_json(text: &str, what: &str, error: &Refusal) -> String {
    if is_python(text) {
        return format!("{what} is Python's text of a value, not JSON: write it with json.dumps");
    }
    format!("{what} is {}", error.message)
}

/// The tools of a row: `tools`, or `functions` as OpenAI wrote them before.
pub(super) fn tools(row: &mut Json, columns: &Columns) -> Checked<Option<Json>> {
    let tools = list(row.remove(columns.of("tools")), "tools")?;
    let functions = list(row.remove("functions"), "functions")?;
    if functions.is_empty() {
        return Ok(if tools.is_empty() && !tools.given { None } else { Some(Json::Array(tools.items)) });
    }
    let wrapped: Vec<Json> = functions.items.iter().cloned().map(wrap).collect();
    if tools.is_empty() || tools.items == wrapped || tools.items == functions.items {
        return Ok(Some(Json::Array(wrapped)));
    }
    Err(Refusal::new(reason::BAD_FIELD, "the row has both `tools` and `functions`, and they differ; keep `tools`"))
}

/// A list of tools; `given`: the row has one, though it may be empty.
#[derive(Default)]
struct Tools {
    items: Vec<Json>,
    given: bool,
}

impl Tools {
    fn is_empty(&self) -> bool {
        self.items.is_empty()
    }
}

/// A list of objects, in which each and the whole may be JSON text: column formats give every tool the keys of all others,
/// and texts are how files avoid that.
fn list(value: Option<Json>, field: &str) -> Checked<Tools> {
    let bad = |message: String| Refusal::new(reason::BAD_FIELD, message);
    let value = match value {
        Some(Json::Str(text)) if text.trim().is_empty() => None,
        Some(Json::Str(text)) => match parse(text.as_bytes()) {
            // LLaMA-Factory takes the text of one tool, too.
            Ok(tool) if tool.get("name").or(tool.get("function")).is_some() => Some(Json::Array(vec![tool])),
            Ok(value) => Some(value),
            Err(error) => return Err(bad(not_json(&text, &format!("`{field}`"), &error))),
        },
        value => value,
    };
    let given = match value {
        None | Some(Json::Null) => return Ok(Tools::default()),
        Some(Json::Array(given)) => given,
        other => return Err(wrong_kind(field, other.as_ref(), "an array")),
    };
    let mut items = Vec::with_capacity(given.len());
    for (i, item) in given.into_iter().enumerate() {
        let tool = match item {
            Json::Str(text) => parse(text.as_bytes())
                .map_err(|error| bad(not_json(&text, &format!("`{field}[{i}]`"), &error)))
                .and_then(|tool| match tool {
                    Json::Object(_) => Ok(tool),
                    other => Err(bad(format!("`{field}[{i}]` is the JSON text of {}, not of an object", other.kind()))),
                })?,
            tool @ Json::Object(_) => tool,
            other => return Err(wrong_kind(&format!("{field}[{i}]"), Some(&other), "an object")),
        };
        items.push(tool);
    }
    Ok(Tools { items, given: true })
}
