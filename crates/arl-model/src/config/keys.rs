//! Typed reading of one JSON object, key by key. It records the keys that were read, so that the caller can report the
//! others as unknown. Every error names the file and the key.

use std::collections::HashSet;
use std::path::Path;

use serde_json::{Map, Value};

use crate::{Error, ErrorCode, Result};

/// A JSON object that is being read.
pub(crate) struct Keys<'a> {
    map: &'a Map<String, Value>,
    path: &'a Path,
    /// Precedes a key in messages: empty, or `rope_parameters.`.
    prefix: String,
    asked: HashSet<&'a str>,
}

impl<'a> Keys<'a> {
    pub(crate) fn new(map: &'a Map<String, Value>, path: &'a Path, prefix: impl Into<String>) -> Self {
        Self { map, path, prefix: prefix.into(), asked: HashSet::new() }
    }

    pub(crate) fn path(&self) -> &'a Path {
        self.path
    }

    /// The value of `key`, which counts as known from now on.
    pub(crate) fn get(&mut self, key: &str) -> Option<&'a Value> {
        let (name, value) = self.map.get_key_value(key)?;
        self.asked.insert(name);
        Some(value)
    }

    /// Marks `key` as known where it has this value.
    pub(crate) fn get_equal(&mut self, key: &str, value: &Value) {
        if self.map.get(key) == Some(value) {
            self.get(key);
        }
    }

    /// The value of `key`; null is the same as absent.
    pub(crate) fn get_non_null(&mut self, key: &str) -> Option<&'a Value> {
        self.get(key).filter(|value| !value.is_null())
    }

    /// The keys that were never read, with their prefix, in the order of the file.
    pub(crate) fn not_asked(&self) -> Vec<String> {
        self.map
            .keys()
            .filter(|key| !self.asked.contains(key.as_str()))
            .map(|key| format!("{}{key}", self.prefix))
            .collect()
    }

    /// An error about `key`; `what` follows the key's name.
    pub(crate) fn error(&self, key: &str, what: impl std::fmt::Display) -> Error {
        Error::new(ErrorCode::Config, format!("{}: `{}{key}` {what}", self.path.display(), self.prefix))
    }

    /// The error for a value of the wrong kind.
    pub(crate) fn wrong(&self, key: &str, expected: &str, value: &Value) -> Error {
        self.error(key, format_args!("must be {expected}, but is {}", shown(value)))
            .hint(format!("correct `{key}` in {}", self.path.display()))
    }

    /// An integer within `min ..= max`, or `default` where the key is absent.
    pub(crate) fn size(&mut self, key: &str, default: usize, min: usize, max: usize) -> Result<usize> {
        Ok(match self.get(key) {
            None => default,
            Some(value) => self.as_size(key, value, min, max)?,
        })
    }

    /// An integer within `min ..= max`; none where the key is absent or null.
    pub(crate) fn optional_size(&mut self, key: &str, min: usize, max: usize) -> Result<Option<usize>> {
        match self.get_non_null(key) {
            None => Ok(None),
            Some(value) => self.as_size(key, value, min, max).map(Some),
        }
    }

    fn as_size(&self, key: &str, value: &Value, min: usize, max: usize) -> Result<usize> {
        value
            .as_u64()
            .and_then(|number| usize::try_from(number).ok())
            .filter(|number| (min..=max).contains(number))
            .ok_or_else(|| self.wrong(key, &format!("an integer from {min} to {max}"), value))
    }

    /// A finite number, or `default` where the key is absent.
    pub(crate) fn number(&mut self, key: &str, default: f64) -> Result<f64> {
        Ok(match self.get(key) {
            None => default,
            Some(value) => self.as_number(key, value)?,
        })
    }

    /// A finite number; none where the key is absent or null.
    pub(crate) fn optional_number(&mut self, key: &str) -> Result<Option<f64>> {
        match self.get_non_null(key) {
            None => Ok(None),
            Some(value) => self.as_number(key, value).map(Some),
        }
    }

    fn as_number(&self, key: &str, value: &Value) -> Result<f64> {
        value.as_f64().filter(|number| number.is_finite()).ok_or_else(|| self.wrong(key, "a finite number", value))
    }

    /// true or false, or `default` where the key is absent.
    pub(crate) fn flag(&mut self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(value)) => Ok(*value),
            Some(value) => Err(self.wrong(key, "true or false", value)),
        }
    }

    /// A string; none where the key is absent or null.
    pub(crate) fn optional_text(&mut self, key: &str) -> Result<Option<&'a str>> {
        match self.get_non_null(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(value) => Err(self.wrong(key, "a string", value)),
        }
    }

    /// A list; none where the key is absent or null.
    pub(crate) fn optional_list(&mut self, key: &str) -> Result<Option<&'a [Value]>> {
        match self.get_non_null(key) {
            None => Ok(None),
            Some(Value::Array(list)) => Ok(Some(list)),
            Some(value) => Err(self.wrong(key, "a list", value)),
        }
    }

    /// A list of `len` finite numbers; none where the key is absent or null.
    pub(crate) fn optional_numbers(&mut self, key: &str, len: usize) -> Result<Option<Vec<f64>>> {
        let Some(list) = self.optional_list(key)? else { return Ok(None) };
        if list.len() != len {
            return Err(self.error(key, format_args!("must be a list of {len} numbers, but has {}", list.len())));
        }
        list.iter().map(|value| self.as_number(key, value)).collect::<Result<Vec<f64>>>().map(Some)
    }
}

/// A value for a message: its JSON, shortened if it is long.
pub(crate) fn shown(value: &Value) -> String {
    const LONGEST: usize = 60;
    match value {
        Value::Array(list) => format!("a list of {} values", list.len()),
        Value::Object(map) => format!("an object of {} keys", map.len()),
        _ => {
            let text = value.to_string();
            match text.char_indices().nth(LONGEST) {
                None => text,
                Some((end, _)) => format!("{}...", &text[..end]),
            }
        }
    }
}
