//! One row as a record: its conversation checked, and the weight of each reply decided.

use super::json::{Json, parse};
use super::shape::{Columns, Shape, keys};
use crate::note::Notes;
use crate::options::TextOptions;
use crate::problem::{Refusal, reason};

type Checked<T> = std::result::Result<T, Refusal>;

/// The options that decide which replies are trained.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Standing {
    minimal: Option<f64>,
    drop_zero: bool,
    skip_non_positive: bool,
}

impl From<&TextOptions> for Standing {
    fn from(options: &TextOptions) -> Self {
        Self {
            minimal: options.minimal_advantage,
            drop_zero: options.drop_zero_advantage,
            skip_non_positive: options.skip_non_positive_advantage,
        }
    }
}

/// The names of a reply's reasoning; the first is the one that chat templates read.
pub(crate) const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// A conversation and what of it is trained.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    pub(crate) messages: Vec<Json>,
    pub(crate) tools: Option<Json>,
    /// `chat_template_kwargs`: more variables for the template.
    pub(crate) variables: Option<Json>,
    /// One for each message: 0 where it is not trained.
    pub(crate) weights: Vec<f32>,
    pub(crate) record_id: Option<String>,
    /// What a user should know of the row all the same.
    pub(crate) notes: Notes,
}

/// A row of any shape.
#[derive(Clone, Debug)]
pub(crate) enum Row {
    Chat(Record),
    Text {
        text: String,
        record_id: Option<String>,
    },
    /// `trained[i]`: token i is a target.
    Tokens {
        ids: Vec<u32>,
        trained: Vec<bool>,
        record_id: Option<String>,
    },
}

/// The role of a message; every message of a record has one.
pub(crate) fn role(message: &Json) -> &str {
    message.get("role").and_then(Json::as_str).unwrap_or_default()
}

/// The message is the assistant's.
pub(crate) fn is_reply(message: &Json) -> bool {
    role(message) == "assistant"
}

impl Row {
    /// Reads a row. `shape`: what the source's rows look like; absent: this row's own.
    pub(crate) fn read(bytes: &[u8], shape: Option<&Shape>, columns: &Columns, standing: Standing) -> Checked<Self> {
        let mut row = parse(bytes)?;
        if !matches!(row, Json::Object(_)) {
            return Err(Refusal::new(reason::SHAPE, format!("the row is {}, not an object", row.kind())));
        }
        let found = Shape::of(&row, columns);
        let shape = match (shape, found) {
            (None, Some(found)) => found,
            (Some(shape), Some(found)) if *shape == found => found,
            // A row may have several of the columns; what counts is that it has those of its source.
            (Some(Shape::Messages), None) => {
                return Err(Refusal::new(reason::NO_MESSAGES, format!("no messages: the row has {}", keys(&row))));
            }
            (Some(shape), Some(found)) => {
                return Err(Refusal::new(
                    reason::SHAPE,
                    format!("the row looks like `{}`, the rows before it like `{}`", found.name(), shape.name()),
                ));
            }
            (Some(shape), None) => {
                return Err(Refusal::new(
                    reason::SHAPE,
                    format!("the rows look like `{}`, this one has {}", shape.name(), keys(&row)),
                ));
            }
            (None, None) => {
                return Err(Refusal::new(reason::NO_MESSAGES, format!("no messages: the row has {}", keys(&row))));
            }
        };
        let record_id = record_id(&row, columns)?;
        match shape {
            Shape::Text => match row.remove(columns.of("text")) {
                Some(Json::Str(text)) => Ok(Self::Text { text, record_id }),
                other => Err(wrong_kind("text", other.as_ref(), "a string")),
            },
            Shape::Tokens => tokens(&row, columns, record_id),
            Shape::Messages => {
                let messages = match row.remove(columns.of("messages")) {
                    Some(Json::Array(messages)) => messages,
                    other => return Err(wrong_kind("messages", other.as_ref(), "an array")),
                };
                chat(row, messages, columns, standing, record_id)
            }
            Shape::Conversations => {
                let turns = match row.remove(columns.of("conversations")) {
                    Some(Json::Array(turns)) => turns,
                    other => return Err(wrong_kind("conversations", other.as_ref(), "an array")),
                };
                let mut messages = system(&row, columns)?;
                for (i, turn) in turns.into_iter().enumerate() {
                    messages.push(sharegpt(turn, i)?);
                }
                chat(row, messages, columns, standing, record_id)
            }
            Shape::Pair { prompt, completion } => {
                let messages = pair(&mut row, columns, &prompt, &completion)?;
                chat(row, messages, columns, standing, record_id)
            }
        }
    }
}

fn wrong_kind(field: &str, found: Option<&Json>, wanted: &str) -> Refusal {
    let found = found.map_or("missing", Json::kind);
    Refusal::new(reason::BAD_FIELD, format!("`{field}` is {found}, not {wanted}"))
}

fn message(role: &str, content: &str) -> Json {
    let entry = |key: &str, value: &str| (key.to_owned(), Json::Str(value.to_owned()));
    Json::Object(vec![entry("role", role), entry("content", content)])
}

fn record_id(row: &Json, columns: &Columns) -> Checked<Option<String>> {
    match row.get(columns.of("record_id")) {
        None | Some(Json::Null) => Ok(None),
        Some(Json::Str(id)) => Ok(Some(id.clone())),
        Some(Json::Int(id)) => Ok(Some(id.to_string())),
        Some(Json::BigInt(id)) => Ok(Some(id.clone())),
        other => Err(wrong_kind("record_id", other, "a string")),
    }
}

fn system(row: &Json, columns: &Columns) -> Checked<Vec<Json>> {
    match row.get(columns.of("system")) {
        None | Some(Json::Null) => Ok(Vec::new()),
        Some(Json::Str(text)) if text.is_empty() => Ok(Vec::new()),
        Some(Json::Str(text)) => Ok(vec![message("system", text)]),
        other => Err(wrong_kind("system", other, "a string")),
    }
}

/// A question and its answer; either may be messages. Only replies of the answer are trained.
fn pair(row: &mut Json, columns: &Columns, prompt: &str, completion: &str) -> Checked<Vec<Json>> {
    let mut messages = system(row, columns)?;
    match row.remove(prompt) {
        Some(Json::Str(text)) => {
            // Alpaca: `input` is what the instruction is to be done with.
            match row.get(columns.of("input")) {
                None | Some(Json::Null) => messages.push(message("user", &text)),
                Some(Json::Str(input)) if input.is_empty() => messages.push(message("user", &text)),
                Some(Json::Str(input)) => messages.push(message("user", &format!("{text}\n\n{input}"))),
                other => return Err(wrong_kind("input", other, "a string")),
            }
        }
        Some(Json::Array(given)) => {
            for mut earlier in given {
                if is_reply(&earlier) && earlier.get("train").is_none() {
                    earlier.set("train", Json::Bool(false));
                }
                messages.push(earlier);
            }
        }
        other => return Err(wrong_kind(prompt, other.as_ref(), "a string or messages")),
    }
    match row.remove(completion) {
        Some(Json::Str(text)) => messages.push(message("assistant", &text)),
        Some(Json::Array(given)) => messages.extend(given),
        other => return Err(wrong_kind(completion, other.as_ref(), "a string or messages")),
    }
    Ok(messages)
}

fn sharegpt(mut turn: Json, index: usize) -> Checked<Json> {
    let wrong = |what: String| Refusal::new(reason::BAD_MESSAGE, format!("conversations[{index}]: {what}"));
    if turn.get("role").is_some() && turn.get("from").is_none() {
        return Ok(turn);
    }
    let from = match turn.remove("from") {
        Some(Json::Str(from)) => from,
        other => return Err(wrong(format!("`from` is {}", other.as_ref().map_or("missing", Json::kind)))),
    };
    let value = match turn.remove("value") {
        Some(value) => value,
        None => return Err(wrong("`value` is missing".to_owned())),
    };
    let role = match from.as_str() {
        "human" | "user" => "user",
        "gpt" | "assistant" | "chatgpt" | "bot" | "model" | "function_call" => "assistant",
        "system" => "system",
        "tool" | "observation" | "function_response" => "tool",
        _ => return Err(Refusal::new(reason::UNKNOWN_ROLE, format!("conversations[{index}]: unknown role `{from}`"))),
    };
    let mut entries = vec![("role".to_owned(), Json::Str(role.to_owned()))];
    if from == "function_call" {
        let text = value.as_str().ok_or_else(|| wrong("`value` of a function call is no string".to_owned()))?;
        let call = parse(text.as_bytes()).map_err(|error| wrong(format!("function call: {}", error.message)))?;
        let calls = match call {
            Json::Array(calls) => calls,
            call => vec![call],
        };
        let wrap = |call| {
            let kind = ("type".to_owned(), Json::Str("function".to_owned()));
            Json::Object(vec![kind, ("function".to_owned(), call)])
        };
        entries.push(("content".to_owned(), Json::Str(String::new())));
        entries.push(("tool_calls".to_owned(), Json::Array(calls.into_iter().map(wrap).collect())));
    } else {
        entries.push(("content".to_owned(), value));
    }
    if let Json::Object(rest) = turn {
        entries.extend(rest);
    }
    Ok(Json::Object(entries))
}

fn tokens(row: &Json, columns: &Columns, record_id: Option<String>) -> Checked<Row> {
    let wrong = |what: String| Refusal::new(reason::TOKENS, what);
    let list = |name: &str| match row.get(name) {
        None | Some(Json::Null) => Ok(None),
        Some(Json::Array(items)) => Ok(Some(items)),
        other => Err(wrong_kind(name, other, "an array of integers")),
    };
    let (ids_name, labels_name) = (columns.of("input_ids"), columns.of("labels"));
    let Some(items) = list(ids_name)? else { return Err(wrong_kind(ids_name, None, "an array of integers")) };
    let mut ids = Vec::with_capacity(items.len());
    for (i, item) in items.iter().enumerate() {
        match item {
            Json::Int(id) if (0..=i64::from(i32::MAX)).contains(id) => ids.push(*id as u32),
            _ => return Err(wrong(format!("{ids_name}[{i}] is not a token"))),
        }
    }
    let mut trained = vec![true; ids.len()];
    if let Some(labels) = list(labels_name)? {
        if labels.len() != ids.len() {
            return Err(wrong(format!("{} {labels_name} for {} {ids_name}", labels.len(), ids.len())));
        }
        for (i, label) in labels.iter().enumerate() {
            trained[i] = match label {
                Json::Int(-100) => false,
                Json::Int(label) if *label == i64::from(ids[i]) => true,
                _ => {
                    return Err(wrong(format!(
                        "{labels_name}[{i}] is neither -100 nor the token at the same place (labels are not shifted)"
                    )));
                }
            };
        }
    }
    Ok(Row::Tokens { ids, trained, record_id })
}

/// Checks a conversation, and decides which replies are trained.
fn chat(
    mut row: Json,
    mut messages: Vec<Json>,
    columns: &Columns,
    standing: Standing,
    record_id: Option<String>,
) -> Checked<Row> {
    if messages.is_empty() {
        return Err(Refusal::new(reason::NO_MESSAGES, "no messages: the list is empty"));
    }
    let mut weights = Vec::with_capacity(messages.len());
    for (i, message) in messages.iter_mut().enumerate() {
        weights.push(check_message(message, i)?);
    }
    apply_advantages(&row, &messages, columns, standing, &mut weights)?;
    let tools = match row.remove(columns.of("tools")) {
        None | Some(Json::Null) => None,
        Some(Json::Array(tools)) => Some(Json::Array(tools)),
        // Column formats give every tool the keys of all others; a string is how files avoid that.
        Some(Json::Str(text)) if text.trim().is_empty() => None,
        Some(Json::Str(text)) => match parse(text.as_bytes()) {
            Ok(Json::Array(tools)) => Some(Json::Array(tools)),
            Ok(Json::Null) => None,
            Ok(other) => return Err(wrong_kind("tools", Some(&other), "an array")),
            Err(error) => return Err(Refusal::new(reason::BAD_FIELD, format!("`tools`: {}", error.message))),
        },
        other => return Err(wrong_kind("tools", other.as_ref(), "an array")),
    };
    let variables = match row.remove("chat_template_kwargs") {
        None | Some(Json::Null) => None,
        Some(Json::Object(entries)) => Some(Json::Object(entries)),
        other => return Err(wrong_kind("chat_template_kwargs", other.as_ref(), "an object")),
    };
    Ok(Row::Chat(Record { messages, tools, variables, weights, record_id, notes: Notes::default() }))
}

/// The weight of one message as a target, before advantages.
fn check_message(message: &mut Json, index: usize) -> Checked<f32> {
    let wrong = |what: String| Refusal::new(reason::BAD_MESSAGE, format!("messages[{index}]: {what}"));
    if !matches!(message, Json::Object(_)) {
        return Err(wrong(format!("is {}, not an object", message.kind())));
    }
    let role = match message.get("role") {
        Some(Json::Str(role)) => role.clone(),
        other => return Err(wrong(format!("`role` is {}", other.map_or("missing", Json::kind)))),
    };
    if !["system", "developer", "user", "assistant", "tool", "function"].contains(&role.as_str()) {
        return Err(Refusal::new(reason::UNKNOWN_ROLE, format!("messages[{index}]: unknown role `{role}`")));
    }
    let reply = role == "assistant";
    let calls = match message.get("tool_calls") {
        None | Some(Json::Null) => 0,
        Some(Json::Array(calls)) if reply || calls.is_empty() => calls.len(),
        Some(Json::Array(_)) => return Err(wrong(format!("`tool_calls` in a message of role {role}"))),
        Some(other) => return Err(wrong(format!("`tool_calls` is {}, not an array", other.kind()))),
    };
    if reply {
        name_reasoning(message, index)?;
    }
    match message.get("content") {
        Some(Json::Str(_)) => {}
        None | Some(Json::Null) if reply && calls > 0 => {}
        Some(Json::Array(parts)) => {
            // Text parts become one string: every template takes that, and those that take parts write them so.
            let mut joined = String::new();
            for (i, part) in parts.iter().enumerate() {
                joined.push_str(text_of_part(part, index, i)?);
            }
            message.set("content", Json::Str(joined));
        }
        other => {
            let found = other.map_or("missing", Json::kind);
            return Err(wrong(format!("`content` is {found}, not a string or a list of parts")));
        }
    }
    let train = match message.remove("train") {
        None | Some(Json::Null) => true,
        Some(Json::Bool(train)) if reply || !train => train,
        Some(Json::Bool(_)) => {
            return Err(Refusal::new(
                reason::BAD_INDEX,
                format!("messages[{index}]: `train: true` on a message of role {role}; only replies are trained"),
            ));
        }
        Some(other) => return Err(wrong(format!("`train` is {}, not a boolean", other.kind()))),
    };
    let weight = match message.remove("weight") {
        None | Some(Json::Null) => 1.0,
        Some(value) => match value.as_f64() {
            Some(weight) if weight >= 0.0 && (weight as f32).is_finite() => weight as f32,
            _ => return Err(wrong("`weight` is not a number of at least 0".to_owned())),
        },
    };
    Ok(if reply && train { weight } else { 0.0 })
}

/// Reasoning goes by three names; templates find it under the two that transformers (5.23) gives them.
fn name_reasoning(message: &mut Json, index: usize) -> Checked<()> {
    for name in REASONING {
        let reasoning = match message.get(name) {
            None | Some(Json::Null) => continue,
            Some(Json::Str(reasoning)) => reasoning.clone(),
            Some(other) => {
                let what = format!("messages[{index}]: `{name}` is {}, not a string", other.kind());
                return Err(Refusal::new(reason::BAD_MESSAGE, what));
            }
        };
        if let Json::Object(entries) = message
            && !entries.iter().any(|(key, _)| key == "thinking")
        {
            entries.insert(0, ("thinking".to_owned(), Json::Str(reasoning.clone())));
        }
        message.set("reasoning_content", Json::Str(reasoning));
        break;
    }
    Ok(())
}

fn text_of_part(part: &Json, message: usize, index: usize) -> Checked<&str> {
    let at = format!("messages[{message}].content[{index}]");
    match part.get("type").and_then(Json::as_str) {
        Some("text") => match part.get("text") {
            Some(Json::Str(text)) => Ok(text),
            other => {
                let found = other.map_or("missing", Json::kind);
                Err(Refusal::new(reason::BAD_MESSAGE, format!("{at}: `text` is {found}, not a string")))
            }
        },
        Some(kind @ ("image_url" | "image" | "video" | "video_url" | "audio" | "input_audio")) => {
            Err(Refusal::new(reason::IMAGE, format!("{at}: a part of type {kind}; this model reads text only")))
        }
        Some(kind) => Err(Refusal::new(reason::BAD_MESSAGE, format!("{at}: unknown type `{kind}`"))),
        None => Err(Refusal::new(reason::BAD_MESSAGE, format!("{at}: `type` is missing"))),
    }
}

/// `advantages` names the replies to train; the other maps must at least name replies.
fn apply_advantages(
    row: &Json,
    messages: &[Json],
    columns: &Columns,
    standing: Standing,
    weights: &mut [f32],
) -> Checked<()> {
    let mut chosen: Option<Vec<bool>> = None;
    for field in ["advantages", "scores", "created_at_step", "logprobs"] {
        let entries = match row.get(columns.of(field)) {
            None | Some(Json::Null) => continue,
            Some(Json::Object(entries)) => entries,
            other => return Err(wrong_kind(field, other, "a map from message index to a value")),
        };
        for (key, value) in entries {
            let index = key.trim().parse::<usize>().ok().filter(|&i| messages.get(i).is_some_and(is_reply));
            let Some(index) = index else {
                let what = match key.trim().parse::<usize>().ok().and_then(|i| messages.get(i)) {
                    Some(message) => format!("is of role {}", role(message)),
                    None => format!("does not exist: there are {}", messages.len()),
                };
                return Err(Refusal::new(
                    reason::BAD_INDEX,
                    format!("`{field}` names message {key}, which {what}; only replies of the assistant can be named"),
                ));
            };
            if field != "advantages" {
                continue;
            }
            let Some(advantage) = value.as_f64() else {
                return Err(wrong_kind(&format!("advantages[{key}]"), Some(value), "a number"));
            };
            let removed = standing.minimal.is_some_and(|minimal| advantage < minimal)
                || (standing.drop_zero && advantage == 0.0)
                || (standing.skip_non_positive && advantage <= 0.0);
            chosen.get_or_insert_with(|| vec![false; messages.len()])[index] = !removed;
        }
    }
    if let Some(chosen) = chosen {
        for (weight, chosen) in weights.iter_mut().zip(chosen) {
            if !chosen {
                *weight = 0.0;
            }
        }
    }
    Ok(())
}
