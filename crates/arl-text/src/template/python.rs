//! Text as Python writes it: floats, `str()` and `repr()` of values, and `json.dumps` as transformers calls it.
//! A template's output must be equal to Python's to the byte, or a model is trained on text that it never meets.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::Arc;

use minijinja::value::{Enumerator, Kwargs, Object, ObjectRepr, Value, ValueKind};
use minijinja::{Error, ErrorKind};

use crate::row::Json;

/// An integer that needs more than 128 bits: it can be printed, not computed with.
#[derive(Debug)]
pub(crate) struct BigInt(String);

impl Object for BigInt {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn render(self: &Arc<Self>, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// A dict: keys in the order of the row.
#[derive(Debug)]
pub(crate) struct Dict {
    entries: Vec<(Value, Value)>,
    /// The index of each key; only large dicts have it.
    places: HashMap<String, usize>,
}

impl Dict {
    /// A later entry of the same key replaces an earlier one.
    pub(crate) fn value(entries: impl IntoIterator<Item = (String, Value)>) -> Value {
        let entries: Vec<(String, Value)> = entries.into_iter().collect();
        let places = match entries.len() {
            0..=16 => HashMap::new(),
            _ => entries.iter().enumerate().map(|(i, (key, _))| (key.clone(), i)).collect(),
        };
        let entries = entries.into_iter().map(|(key, value)| (Value::from(key), value)).collect();
        Value::from_object(Self { entries, places })
    }
}

impl Object for Dict {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Map
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.get_value_by_str(key.as_str()?)
    }

    fn get_value_by_str(self: &Arc<Self>, key: &str) -> Option<Value> {
        let found = if self.places.is_empty() {
            self.entries.iter().rposition(|(own, _)| own.as_str() == Some(key))
        } else {
            self.places.get(key).copied()
        };
        found.map(|i| self.entries[i].1.clone())
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Values(self.entries.iter().map(|(key, _)| key.clone()).collect())
    }

    fn enumerator_len(self: &Arc<Self>) -> Option<usize> {
        Some(self.entries.len())
    }
}

/// A template's value of a row's; `text` may change every string, keys included.
pub(crate) fn value_of(json: &Json, text: &impl Fn(&str) -> String) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(value) => Value::from(*value),
        Json::Int(value) => Value::from(*value),
        Json::BigInt(digits) => match (digits.parse::<i128>(), digits.parse::<u128>()) {
            (Ok(value), _) => Value::from(value),
            (_, Ok(value)) => Value::from(value),
            _ => Value::from_object(BigInt(digits.clone())),
        },
        Json::Float(value) => Value::from(*value),
        Json::Str(value) => Value::from(text(value)),
        Json::Array(items) => Value::from(items.iter().map(|item| value_of(item, text)).collect::<Vec<_>>()),
        Json::Object(entries) => Dict::value(entries.iter().map(|(key, value)| (text(key), value_of(value, text)))),
    }
}

/// `repr(float)` of Python: shortest digits that read back equal, an exponent below 1e-4 and from 1e16 on.
pub(crate) fn float(value: f64) -> String {
    if value.is_nan() {
        return "nan".to_owned();
    }
    if value.is_infinite() {
        return if value > 0.0 { "inf" } else { "-inf" }.to_owned();
    }
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if value != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    let plain = value.to_string();
    if plain.contains('.') { plain } else { plain + ".0" }
}

fn number(value: &Value) -> String {
    match f64::try_from(value.clone()) {
        Ok(number) if !value.is_integer() => float(number),
        _ => value.to_string(),
    }
}

/// `str()` of Python, as `{{ value }}` prints it.
pub(crate) fn str(value: &Value) -> Result<String, Error> {
    match value.kind() {
        ValueKind::Number => Ok(number(value)),
        ValueKind::Seq | ValueKind::Map => {
            refuse_parts(value)?;
            let mut out = String::new();
            repr(value, &mut out)?;
            Ok(out)
        }
        ValueKind::Iterable => Err(Error::new(ErrorKind::InvalidOperation, "the template prints an iterator")),
        _ => Ok(value.to_string()),
    }
}

/// A list of content parts where the template expects text: Python would print the list, and a model would learn it.
fn refuse_parts(value: &Value) -> Result<(), Error> {
    if value.kind() != ValueKind::Seq {
        return Ok(());
    }
    for item in value.try_iter()? {
        let kind = item.get_attr("type").ok();
        if item.kind() == ValueKind::Map && kind.is_some_and(|kind| kind.as_str().is_some()) {
            return Err(Error::new(
                ErrorKind::InvalidOperation,
                "the template is for text and was given a list of content parts",
            ));
        }
    }
    Ok(())
}

fn repr(value: &Value, out: &mut String) -> Result<(), Error> {
    match value.kind() {
        ValueKind::String => repr_string(value.as_str().unwrap_or_default(), out),
        ValueKind::Number => out.push_str(&number(value)),
        ValueKind::Seq => {
            let (open, close) = if value.is_tuple() { ('(', ')') } else { ('[', ']') };
            out.push(open);
            let mut count = 0;
            for item in value.try_iter()? {
                if count > 0 {
                    out.push_str(", ");
                }
                repr(&item, out)?;
                count += 1;
            }
            if count == 1 && value.is_tuple() {
                out.push(',');
            }
            out.push(close);
        }
        ValueKind::Map => {
            out.push('{');
            for (i, key) in value.try_iter()?.enumerate() {
                if i > 0 {
                    out.push_str(", ");
                }
                repr(&key, out)?;
                out.push_str(": ");
                repr(&value.get_item(&key)?, out)?;
            }
            out.push('}');
        }
        _ => out.push_str(&value.to_string()),
    }
    Ok(())
}

fn repr_string(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => {
                out.push('\\');
                out.push(c);
            }
            c if (c as u32) < 0x20 || (0x7F..0xA1).contains(&(c as u32)) => {
                let _ = write!(out, "\\x{:02x}", c as u32);
            }
            c => out.push(c),
        }
    }
    out.push(quote);
}

/// How `json.dumps` writes.
struct Dumps {
    ensure_ascii: bool,
    indent: Option<String>,
    item: String,
    key: String,
    sort_keys: bool,
}

/// The `tojson` filter as transformers defines it: `json.dumps(x, ensure_ascii=False)` and its keywords.
pub(crate) fn tojson(value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent = match options.get::<Option<Value>>("indent")? {
        Some(value) if value.is_none() || value.is_undefined() => None,
        Some(value) if value.as_str().is_some() => value.as_str().map(str::to_owned),
        Some(value) => Some(" ".repeat(usize::try_from(value)?.min(64))),
        None => None,
    };
    let (item, key) = match options.get::<Option<Vec<String>>>("separators")? {
        Some(pair) if pair.len() == 2 => (pair[0].clone(), pair[1].clone()),
        Some(_) => return Err(Error::new(ErrorKind::InvalidOperation, "tojson: separators must be a pair")),
        None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
    };
    let dumps = Dumps {
        ensure_ascii: options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        indent,
        item,
        key,
        sort_keys: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    options.assert_all_used()?;
    let mut out = String::new();
    dumps.value(value, 0, &mut out)?;
    Ok(out)
}

/// `json.dumps(value, ensure_ascii=False)`.
pub(crate) fn dumps(json: &Json) -> Result<String, Error> {
    let (item, key) = (", ".to_owned(), ": ".to_owned());
    let dumps = Dumps { ensure_ascii: false, indent: None, item, key, sort_keys: false };
    let mut out = String::new();
    dumps.value(&value_of(json, &str::to_owned), 0, &mut out)?;
    Ok(out)
}

impl Dumps {
    fn line(&self, depth: usize, out: &mut String) {
        if let Some(indent) = &self.indent {
            out.push('\n');
            for _ in 0..depth {
                out.push_str(indent);
            }
        }
    }

    fn value(&self, value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => {
                let text = number(value);
                out.push_str(match text.as_str() {
                    "nan" => "NaN",
                    "inf" => "Infinity",
                    "-inf" => "-Infinity",
                    text => text,
                });
            }
            ValueKind::String => self.string(value.as_str().unwrap_or_default(), out),
            ValueKind::Seq => {
                let mut empty = true;
                out.push('[');
                for item in value.try_iter()? {
                    if !empty {
                        out.push_str(&self.item);
                    }
                    empty = false;
                    self.line(depth + 1, out);
                    self.value(&item, depth + 1, out)?;
                }
                if !empty {
                    self.line(depth, out);
                }
                out.push(']');
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                out.push('{');
                for (i, key) in keys.iter().enumerate() {
                    if i > 0 {
                        out.push_str(&self.item);
                    }
                    self.line(depth + 1, out);
                    match key.kind() {
                        ValueKind::None => out.push_str("\"null\""),
                        ValueKind::Bool => out.push_str(if key.is_true() { "\"true\"" } else { "\"false\"" }),
                        ValueKind::Number => self.string(&number(key), out),
                        _ => self.string(&key.to_string(), out),
                    }
                    out.push_str(&self.key);
                    self.value(&value.get_item(key)?, depth + 1, out)?;
                }
                if !keys.is_empty() {
                    self.line(depth, out);
                }
                out.push('}');
            }
            _ => match value.downcast_object_ref::<BigInt>() {
                Some(BigInt(digits)) => out.push_str(digits),
                None => {
                    return Err(Error::new(
                        ErrorKind::InvalidOperation,
                        format!("tojson: {} is not JSON serializable", value.kind()),
                    ));
                }
            },
        }
        Ok(())
    }

    fn string(&self, text: &str, out: &mut String) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{C}' => out.push_str("\\f"),
                c if (c as u32) < 0x20 || (self.ensure_ascii && !c.is_ascii()) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        let _ = write!(out, "\\u{unit:04x}");
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_printed_as_python_prints_them() {
        for (value, text) in [
            (1.0, "1.0"),
            (1e-7, "1e-07"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (-0.0, "-0.0"),
            (0.1, "0.1"),
            (123456.789, "123456.789"),
            (5e-324, "5e-324"),
            (1.7976931348623157e308, "1.7976931348623157e+308"),
        ] {
            assert_eq!(float(value), text);
        }
    }
}
