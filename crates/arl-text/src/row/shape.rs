//! Which of the known shapes the rows of a source have. Found out once; every later row must have the same.

use std::collections::BTreeMap;

use arl_model::{Error, ErrorCode, Result};

use super::json::Json;

const PROMPTS: [&str; 4] = ["prompt", "question", "problem", "instruction"];
const COMPLETIONS: [&str; 5] = ["completion", "response", "output", "solution", "answer"];

/// Columns that a caller may name.
const KNOWN: [&str; 12] = [
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
    /// The shape of one row.
    pub(crate) fn of(row: &Json, columns: &Columns) -> Option<Self> {
        let has = |name: &str| row.get(name).is_some_and(|value| !value.is_null());
        if has(columns.of("messages")) {
            return Some(Self::Messages);
        }
        if has(columns.of("conversations")) {
            return Some(Self::Conversations);
        }
        let one_of = |column: &str, names: &[&str]| -> Option<String> {
            if columns.given(column) {
                return Some(columns.of(column).to_owned()).filter(|name| row.get(name).is_some());
            }
            names.iter().find(|name| row.get(name).is_some()).map(|name| (*name).to_owned())
        };
        if let (Some(prompt), Some(completion)) = (one_of("prompt", &PROMPTS), one_of("completion", &COMPLETIONS)) {
            return Some(Self::Pair { prompt, completion });
        }
        if has(columns.of("input_ids")) {
            return Some(Self::Tokens);
        }
        has(columns.of("text")).then_some(Self::Text)
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

/// The keys of a row, for a message.
pub(crate) fn keys(row: &Json) -> String {
    match row {
        Json::Object(entries) if entries.is_empty() => "no keys".to_owned(),
        Json::Object(entries) => {
            let names: Vec<&str> = entries.iter().take(12).map(|(key, _)| key.as_str()).collect();
            format!("the keys {}{}", names.join(", "), if entries.len() > 12 { ", ..." } else { "" })
        }
        other => other.kind().to_owned(),
    }
}
