//! What this program notes of the columns of a Parquet file that it writes, for itself when it reads one.

use serde_json::{Value, json};

/// Key of the file's own metadata under which the notes are kept as JSON.
pub(crate) const KEY: &str = "arl.columns";

/// What the columns' types cannot say.
#[derive(Default)]
pub(crate) struct Notes {
    /// Columns whose text is JSON.
    pub(crate) json: Vec<String>,
    /// Columns in which null means that the key is absent.
    pub(crate) absent: Vec<String>,
}

impl Notes {
    pub(crate) fn text(&self) -> String {
        json!({ "json": self.json, "absent": self.absent }).to_string()
    }

    /// A note that cannot be read counts as none.
    pub(crate) fn parse(text: &str) -> Self {
        let notes: Value = serde_json::from_str(text).unwrap_or_default();
        let names = |key: &str| {
            let names = notes[key].as_array().into_iter().flatten();
            names.filter_map(Value::as_str).map(str::to_owned).collect()
        };
        Self { json: names("json"), absent: names("absent") }
    }
}
