//! Which of the known shapes the rows of a source have. Found out once; every later row must have the same.

use std::collections::BTreeMap;

use arl_model::{Error, ErrorCode, Result};

use super::json::Json;
use super::preference;
use crate::problem::{Refusal, reason};

/// Names of the column `prompt`.
pub(super) const PROMPTS: [&str; 4] = ["prompt", "question", "problem", "instruction"];
/// Names of the column `completion`.
const COMPLETIONS: [&str; 5] = ["completion", "response", "output", "solution", "answer"];

/// Columns that a caller may name.
const KNOWN: [&str; 15] = [
    "messages",
    "conversations",
    "prompt",
    "completion",
    "input",
    "system",
    "text",
    "input_ids",
    "labels",
    "tools",
    "record_id",
    "advantages",
    "images",
    "videos",
    "audios",
];

/// The file's names of the known columns.
#[derive(Clone, Debug, Default)]
pub(crate) struct Columns(BTreeMap<String, String>);

impl Columns {
    /// # Errors
    /// `ARL_CONFIG` for a name that is not a known column's.
    pub(crate) fn new(names: &BTreeMap<String, String>) -> Result<Self> {
        for name in names.keys() {
            if !KNOWN.contains(&name.as_str()) {
                return Err(Error::new(ErrorCode::Config, format!("columns: `{name}` is not known"))
                    .hint(format!("known are {}", KNOWN.join(", "))));
            }
        }
        Ok(Self(names.clone()))
    }

    /// The file's name of a column.
    pub(crate) fn of<'a>(&'a self, name: &'a str) -> &'a str {
        self.0.get(name).map_or(name, String::as_str)
    }

    fn given(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }
}

/// The shapes of rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// `messages` as in OpenAI's API.
    Messages,
    /// ShareGPT: `conversations` of `from` and `value`.
    Conversations,
    /// A question and its answer, in these columns.
    Pair { prompt: String, completion: String },
    /// Token ids.
    Tokens,
    /// Plain text, all of it trained.
    Text,
}

impl Shape {
    /// The shape of one row. Columns that the caller named count before those that go by their usual names.
    pub(crate) fn of(row: &Json, columns: &Columns) -> Option<Self> {
        (!columns.0.is_empty())
            .then(|| Self::among(row, columns, |name| columns.given(name)))
            .flatten()
            .or_else(|| Self::among(row, columns, |_| true))
    }

    fn among(row: &Json, columns: &Columns, counts: impl Fn(&str) -> bool) -> Option<Self> {
        let has = |name: &str| counts(name) && row.get(columns.of(name)).is_some_and(|value| !value.is_null());
        if has("messages") {
            return Some(Self::Messages);
        }
        if has("conversations") {
            return Some(Self::Conversations);
        }
        if counts("prompt") || counts("completion") {
            let pair = (one_of(row, columns, "prompt", &PROMPTS), one_of(row, columns, "completion", &COMPLETIONS));
            if let (Some(prompt), Some(completion)) = pair {
                return Some(Self::Pair { prompt, completion });
            }
        }
        if has("input_ids") {
            return Some(Self::Tokens);
        }
        has("text").then_some(Self::Text)
    }

    /// As reports name it.
    pub(crate) fn name(&self) -> String {
        match self {
            Self::Messages => "messages".to_owned(),
            Self::Conversations => "conversations (ShareGPT)".to_owned(),
            Self::Pair { prompt, completion } => format!("{prompt} -> {completion}"),
            Self::Tokens => "input_ids".to_owned(),
            Self::Text => "text".to_owned(),
        }
    }

    /// Rows of this shape go through the chat template.
    pub(crate) fn needs_template(&self) -> bool {
        !matches!(self, Self::Tokens | Self::Text)
    }
}

/// The row's name of a column: the one that the caller gave, else the first of the usual ones that it has.
fn one_of(row: &Json, columns: &Columns, column: &str, names: &[&str]) -> Option<String> {
    if columns.given(column) {
        return Some(columns.of(column).to_owned()).filter(|name| row.get(name).is_some());
    }
    names.iter().find(|name| row.get(name).is_some()).map(|name| (*name).to_owned())
}

/// Why a row has none of the shapes: what it is instead, or what it lacks.
pub(super) fn unknown_row(row: &Json, columns: &Columns) -> Refusal {
    if let Some(refusal) = preference::of_pair(row, columns) {
        return refusal;
    }
    let lacks = match (one_of(row, columns, "prompt", &PROMPTS), one_of(row, columns, "completion", &COMPLETIONS)) {
        (Some(prompt), None) => Some((prompt, "completion", COMPLETIONS.join(", "))),
        (None, Some(completion)) => Some((completion, "prompt", PROMPTS.join(", "))),
        _ => None,
    };
    let message = if let Some((has, column, names)) = lacks {
        match columns.0.get(column) {
            Some(name) => format!("no messages: the row has `{has}` and no `{name}`, which is named for `{column}`"),
            None => format!("no messages: the row has `{has}` and no {column} with it (none of {names}): "),
        }
    } else {
        "no messages: ".to_owned()
    };
    let separator = if message.ends_with(": ") { "" } else { "; " };
    let like = like_messages(row).map_or(String::new(), |(key, column)| {
        format!("; `{key}` looks like {column}: name it with --columns {column}={key}")
    });
    Refusal::new(reason::NO_MESSAGES, format!("{message}{separator}the row has {}{like}", keys(row)))
}

/// A column under another name that holds what `messages` or `conversations` do.
fn like_messages(row: &Json) -> Option<(&str, &'static str)> {
    let Json::Object(entries) = row else { return None };
    entries.iter().find_map(|(key, value)| match value {
        Json::Array(items) => {
            let first = items.first()?;
            match (first.get("role"), first.get("from")) {
                (Some(Json::Str(_)), _) => Some((key.as_str(), "messages")),
                (_, Some(Json::Str(_))) => Some((key.as_str(), "conversations")),
                _ => None,
            }
        }
        _ => None,
    })
}

/// The keys of a row, for a message.
fn keys(row: &Json) -> String {
    match row {
        Json::Object(entries) if entries.is_empty() => "no keys".to_owned(),
        Json::Object(entries) => {
            let names: Vec<&str> = entries.iter().take(12).map(|(key, _)| key.as_str()).collect();
            format!("the keys {}{}", names.join(", "), if entries.len() > 12 { ", ..." } else { "" })
        }
        other => other.kind().to_owned(),
    }
}
