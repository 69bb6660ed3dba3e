//! One message of a conversation: its role, content and calls in the forms that templates read, and its weight as a target.

use super::image::RowImages;
use super::record::{Place, Reader};
use super::{Checked, Json, calls, is_nothing, parts, unread};
use crate::note::Notes;
use crate::problem::{Refusal, reason};

/// The names of a reply's reasoning; the first is the one that chat templates read.
pub(crate) const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

/// The role of a message; every message of a record has one.
pub(crate) fn role(message: &Json) -> &str {
    message.get("role").and_then(Json::as_str).unwrap_or_default()
}

/// The message is the assistant's.
pub(crate) fn is_reply(message: &Json) -> bool {
    role(message) == "assistant"
}

/// How many images the content of a message of a record has.
pub(crate) fn image_count(message: &Json) -> usize {
    match message.get("content") {
        Some(Json::Array(parts)) => parts.iter().filter(|part| parts::text(part).is_none()).count(),
        _ => 0,
    }
}

/// Checks a message and brings it into the form that templates read: its content is a string, or a list of texts and bare
/// parts of type image where it has images that are trained. Returns its weight as a target, before advantages.
pub(super) fn read(
    message: &mut Json,
    place: Place,
    reader: &Reader,
    images: &mut RowImages,
    notes: &mut Notes,
) -> Checked<f32> {
    let wrong = |what: String| Refusal::new(reason::BAD_MESSAGE, format!("{place}: {what}"));
    if !matches!(message, Json::Object(_)) {
        return Err(wrong(format!("is {}, not an object", message.kind())));
    }
    let role = read_role(message, place)?;
    let reply = role == "assistant";
    calls::modernize(message, reply, place)?;
    let given = match message.get_mut("content") {
        Some(Json::Array(given)) => Some(std::mem::take(given)),
        Some(Json::Str(text)) if images.are_in(role, text) => Some(vec![parts::text_part(text)]),
        _ => None,
    };
    if let Some(given) = given {
        let content = parts::read(given, place, role, reader, images, notes)?;
        merge(message, content).map_err(wrong)?;
    }
    let calls = match message.get("tool_calls") {
        None | Some(Json::Null) => 0,
        Some(Json::Array(calls)) if reply || calls.is_empty() => calls.len(),
        Some(Json::Array(_)) => return Err(wrong(format!("`tool_calls` in a message of role {role}"))),
        Some(other) => return Err(wrong(format!("`tool_calls` is {}, not an array", other.kind()))),
    };
    if reply {
        name_reasoning(message, place)?;
    }
    match message.get("content") {
        Some(Json::Str(_) | Json::Array(_)) => {}
        None | Some(Json::Null) if reply && calls > 0 => {}
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
                format!("{place}: `train: true` on a message of role {role}; only replies are trained"),
            ));
        }
        Some(other) => return Err(wrong(format!("`train` is {}, not a boolean", other.kind()))),
    };
    let weight = weight(message, reply, place, notes)?;
    unread::of_message(message, place, role, reader, notes);
    Ok(if reply && train { weight } else { 0.0 })
}

/// The role; `function` is what OpenAI called `tool` before.
fn read_role(message: &mut Json, place: Place) -> Checked<&'static str> {
    let given = match message.get("role") {
        Some(Json::Str(role)) => role.as_str(),
        other => {
            let found = other.map_or("missing", Json::kind);
            let turn = if message.get("from").is_some() {
                format!("; turns of `from` and `value` are read with --columns conversations={}", place.column)
            } else {
                String::new()
            };
            return Err(Refusal::new(reason::BAD_MESSAGE, format!("{place}: `role` is {found}{turn}")));
        }
    };
    if given == "function" {
        message.set("role", Json::Str("tool".to_owned()));
        return Ok("tool");
    }
    ROLES
        .into_iter()
        .find(|known| *known == given)
        .ok_or_else(|| Refusal::new(reason::UNKNOWN_ROLE, format!("{place}: unknown role `{given}`")))
}

/// Puts what parts amount to into their message.
fn merge(message: &mut Json, content: parts::Content) -> Result<(), String> {
    let parts::Content { text, reasoning, calls, parts, images } = content;
    message.set("content", if images > 0 { Json::Array(parts) } else { Json::Str(text) });
    if !reasoning.is_empty() {
        if REASONING.iter().any(|name| message.get(name).is_some_and(|value| !is_nothing(value))) {
            return Err("has reasoning in its parts and next to them".to_owned());
        }
        message.set("reasoning_content", Json::Str(reasoning));
    }
    if !calls.is_empty() {
        if message.get("tool_calls").is_some_and(|given| !is_nothing(given)) {
            return Err("has calls in its parts and in `tool_calls`".to_owned());
        }
        message.set("tool_calls", Json::Array(calls));
    }
    Ok(())
}

/// `weight`, or `loss_weight` as LLaMA-Factory's v1 rows call it. On other messages than replies neither has an effect.
fn weight(message: &mut Json, reply: bool, place: Place, notes: &mut Notes) -> Checked<f32> {
    let mut found: Option<f32> = None;
    for name in ["weight", "loss_weight"] {
        let value = match message.remove(name) {
            None | Some(Json::Null) => continue,
            Some(value) => value.as_f64().filter(|weight| *weight >= 0.0 && (*weight as f32).is_finite()),
        };
        let wrong = |what: &str| Err(Refusal::new(reason::BAD_MESSAGE, format!("{place}: {what}")));
        let Some(weight) = value.map(|weight| weight as f32) else {
            return wrong(&format!("`{name}` is not a number of at least 0"));
        };
        if found.is_some_and(|other| other != weight) {
            return wrong("`weight` and `loss_weight` differ");
        }
        if !reply && weight > 0.0 {
            unread::add(&format!("{}[].", place.column), name, notes);
        }
        found = Some(weight);
    }
    Ok(found.unwrap_or(1.0))
}

/// Reasoning goes by three names; templates find it under the two that transformers (5.23) gives them.
fn name_reasoning(message: &mut Json, place: Place) -> Checked<()> {
    for name in REASONING {
        let reasoning = match message.get(name) {
            None | Some(Json::Null) => continue,
            Some(Json::Str(reasoning)) => reasoning.clone(),
            Some(other) => {
                let what = format!("{place}: `{name}` is {}, not a string", other.kind());
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

/// Why a reply has nothing to learn: no text that is more than white space, and no calls.
pub(super) fn blank(message: &Json) -> Option<&'static str> {
    if message.get("tool_calls").is_some_and(|calls| !is_nothing(calls)) {
        return None;
    }
    let content = match message.get("content") {
        Some(Json::Str(text)) => text.clone(),
        Some(Json::Array(parts)) => parts.iter().filter_map(parts::text).collect(),
        _ => String::new(),
    };
    let (thought, answer) = content.rsplit_once("</think>").unwrap_or(("", &content));
    if !answer.trim().is_empty() {
        return None;
    }
    let reasoning = message.get("reasoning_content").and_then(Json::as_str).unwrap_or(thought);
    Some(if reasoning.trim().is_empty() {
        "the reply is blank"
    } else {
        "the reply has reasoning and neither text nor calls after it"
    })
}
