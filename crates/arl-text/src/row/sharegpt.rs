//! ShareGPT's turns of `from` and `value` as messages. Text and the calls that follow it are one turn of the assistant.

use super::record::Place;
use super::{Checked, Json, calls, unread};
use crate::note::Notes;
use crate::problem::{Refusal, reason};

/// Keys that decide what is trained of a message.
const TRAINING: [&str; 3] = ["train", "weight", "loss_weight"];

/// The messages of `turns`, and for each the index of its first turn.
pub(super) fn messages(turns: Vec<Json>, column: &'static str, notes: &mut Notes) -> Checked<(Vec<Json>, Vec<usize>)> {
    let mut messages: Vec<Json> = Vec::with_capacity(turns.len());
    let mut places = Vec::with_capacity(turns.len());
    // Whether the last message is a turn of the assistant that calls may be added to.
    let mut open = false;
    for (index, turn) in turns.into_iter().enumerate() {
        let place = Place { column, index };
        // What is no turn of ShareGPT's is a message, or is refused where messages are read.
        if turn.get("from").is_none() && (turn.get("role").is_some() || column != Place::TURNS) {
            open = false;
            messages.push(turn);
            places.push(index);
            continue;
        }
        let (message, is_call) = read(turn, place)?;
        match messages.last_mut().filter(|_| open && is_call) {
            Some(last) => append(last, message, place, notes)?,
            None => {
                open = super::is_reply(&message);
                messages.push(message);
                places.push(index);
            }
        }
    }
    Ok((messages, places))
}

/// One turn as a message, and whether it is a call.
fn read(mut turn: Json, place: Place) -> Checked<(Json, bool)> {
    let wrong = |what: String| Refusal::new(reason::BAD_MESSAGE, format!("{place}: {what}"));
    if !matches!(turn, Json::Object(_)) {
        return Err(wrong(format!("is {}, not an object", turn.kind())));
    }
    let from = match turn.remove("from") {
        Some(Json::Str(from)) => from,
        other => return Err(wrong(format!("`from` is {}", other.as_ref().map_or("missing", Json::kind)))),
    };
    let Some(value) = turn.remove("value") else { return Err(wrong("`value` is missing".to_owned())) };
    let role = match from.as_str() {
        "human" | "user" => "user",
        "gpt" | "assistant" | "chatgpt" | "bot" | "model" | "function_call" => "assistant",
        "system" => "system",
        "tool" | "observation" | "function_response" => "tool",
        _ => return Err(Refusal::new(reason::UNKNOWN_ROLE, format!("{place}: unknown role `{from}`"))),
    };
    let is_call = from == "function_call";
    let mut entries = vec![("role".to_owned(), Json::Str(role.to_owned()))];
    if is_call {
        let calls = calls::of_value(value, "the function call in `value`").map_err(wrong)?;
        entries.push(("content".to_owned(), Json::Str(String::new())));
        entries.push(("tool_calls".to_owned(), Json::Array(calls)));
    } else {
        entries.push(("content".to_owned(), value));
    }
    if let Json::Object(rest) = turn {
        entries.extend(rest.into_iter().filter(|(key, _)| key != "role" && !(is_call && key == "tool_calls")));
    }
    Ok((Json::Object(entries), is_call))
}

/// Adds the calls of a turn to the turn of the assistant before it.
fn append(last: &mut Json, mut message: Json, place: Place, notes: &mut Notes) -> Checked<()> {
    for key in TRAINING {
        let value = |message: &Json| message.get(key).filter(|value| !value.is_null()).cloned();
        if value(last) != value(&message) {
            return Err(Refusal::new(
                reason::BAD_MESSAGE,
                format!("{place}: a call is one turn with the text before it, and their `{key}` differ"),
            ));
        }
    }
    if let Some(Json::Array(calls)) = message.remove("tool_calls") {
        calls::add(last, calls);
    }
    let Json::Object(entries) = message else { return Ok(()) };
    for (key, value) in entries {
        match last.get(&key) {
            None => last.set(&key, value),
            Some(given) if *given == value || matches!(key.as_str(), "role" | "content") => {}
            Some(_) => unread::add(&format!("{}[].", place.column), &key, notes),
        }
    }
    Ok(())
}
