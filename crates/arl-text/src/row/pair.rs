//! A prompt and its completion, each a text or messages, as a conversation of which only the completion is trained.

use super::record::{Place, Talk};
use super::shape::Columns;
use super::{Checked, Json, is_reply, role, sharegpt, wrong_kind};
use crate::note::Notes;
use crate::problem::{Refusal, reason};

/// A message of text.
pub(super) fn message(role: &str, content: String) -> Json {
    Json::Object(vec![("role".to_owned(), Json::Str(role.to_owned())), ("content".to_owned(), Json::Str(content))])
}

/// The text of the column `system`; nothing where it is empty.
pub(super) fn system(row: &mut Json, columns: &Columns) -> Checked<Option<String>> {
    match row.remove(columns.of("system")) {
        None | Some(Json::Null) => Ok(None),
        Some(Json::Str(text)) => Ok(Some(text).filter(|text| !text.is_empty())),
        other => Err(wrong_kind("system", other.as_ref(), "a string")),
    }
}

/// The conversation of a row with the columns `prompt` and `completion`.
pub(super) fn read(
    row: &mut Json,
    columns: &Columns,
    prompt: &str,
    completion: &str,
    notes: &mut Notes,
) -> Checked<Talk> {
    let mut messages: Vec<Json> = system(row, columns)?.map(|text| message("system", text)).into_iter().collect();
    messages.extend(history(row));
    match row.remove(prompt) {
        Some(Json::Str(text)) => {
            // Alpaca: `input` is what the instruction is to be done with.
            match row.remove(columns.of("input")) {
                None | Some(Json::Null) => messages.push(message("user", text)),
                Some(Json::Str(input)) if input.is_empty() => messages.push(message("user", text)),
                Some(Json::Str(input)) => messages.push(message("user", format!("{text}\n\n{input}"))),
                other => return Err(wrong_kind("input", other.as_ref(), "a string")),
            }
        }
        Some(Json::Array(given)) => {
            for mut earlier in sharegpt::messages(given, "prompt", notes)?.0 {
                if is_reply(&earlier) && earlier.get("train").is_none() {
                    earlier.set("train", Json::Bool(false));
                }
                messages.push(earlier);
            }
        }
        other => return Err(wrong_kind(prompt, other.as_ref(), "a string or messages")),
    }
    let answer = match row.remove(completion) {
        Some(Json::Str(text)) => vec![message("assistant", text)],
        Some(Json::Array(given)) => sharegpt::messages(given, "completion", notes)?.0,
        Some(one @ Json::Object(_)) => sharegpt::messages(vec![one], "completion", notes)?.0,
        other => return Err(wrong_kind(completion, other.as_ref(), "a string or messages")),
    };
    let asked = messages.iter().rev().find(|message| role(message) == "user").and_then(|last| last.get("content"));
    if answer.iter().any(|message| role(message) == "user" && message.get("content") == asked) {
        return Err(Refusal::new(
            reason::BAD_FIELD,
            format!(
                "`{completion}` repeats the question of `{prompt}`: it is the whole conversation; read it with --columns \
                 messages={completion}"
            ),
        ));
    }
    messages.extend(answer);
    Ok(Talk::new(Place::MESSAGES, messages))
}

/// LLaMA-Factory's `history`: earlier questions and their answers, which it trains, too. Nothing where it is something else.
fn history(row: &mut Json) -> Vec<Json> {
    let pair = |item: &Json| match item {
        Json::Array(pair) => match pair.as_slice() {
            [Json::Str(question), Json::Str(answer)] => {
                Some([message("user", question.clone()), message("assistant", answer.clone())])
            }
            _ => None,
        },
        _ => None,
    };
    let messages: Option<Vec<[Json; 2]>> = match row.get("history") {
        Some(Json::Array(items)) => items.iter().map(pair).collect(),
        _ => return Vec::new(),
    };
    let Some(messages) = messages else { return Vec::new() };
    row.remove("history");
    messages.into_iter().flatten().collect()
}
