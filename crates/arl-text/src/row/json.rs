//! JSON as rows hold it: key order, the difference between 1 and 1.0, and integers of any size survive.
//! A parser of its own, because what a template prints depends on exactly these.

use std::collections::HashMap;

use crate::problem::{Refusal, reason};

/// How deep arrays and objects may nest; parsing and dropping recurse.
const MAX_DEPTH: usize = 256;

/// A longer row is refused, by whatever reads or writes rows: the tokenizer needs some 50 bytes of memory for a byte of text.
pub const MAX_ROW_BYTES: usize = 32 << 20;

/// One JSON value.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Json {
    Null,
    Bool(bool),
    Int(i64),
    /// Digits of an integer outside of `i64`.
    BigInt(String),
    Float(f64),
    Str(String),
    Array(Vec<Json>),
    /// In the order of the text; a repeated key keeps its first place and its last value, as in Python.
    Object(Vec<(String, Json)>),
}

impl Json {
    /// The value of a key of an object.
    pub(crate) fn get(&self, key: &str) -> Option<&Json> {
        match self {
            Json::Object(entries) => entries.iter().find(|(k, _)| k == key).map(|(_, v)| v),
            _ => None,
        }
    }

    pub(crate) fn as_str(&self) -> Option<&str> {
        match self {
            Json::Str(text) => Some(text),
            _ => None,
        }
    }

    pub(crate) fn as_f64(&self) -> Option<f64> {
        match self {
            Json::Int(value) => Some(*value as f64),
            Json::Float(value) => Some(*value),
            Json::BigInt(digits) => digits.parse().ok(),
            _ => None,
        }
    }

    pub(crate) fn is_null(&self) -> bool {
        matches!(self, Json::Null)
    }

    /// Replaces or adds a key of an object; nothing on other kinds.
    pub(crate) fn set(&mut self, key: &str, value: Json) {
        if let Json::Object(entries) = self {
            match entries.iter_mut().find(|(k, _)| k == key) {
                Some((_, old)) => *old = value,
                None => entries.push((key.to_owned(), value)),
            }
        }
    }

    /// The value of a key of an object, to be changed.
    pub(crate) fn get_mut(&mut self, key: &str) -> Option<&mut Json> {
        match self {
            Json::Object(entries) => entries.iter_mut().find(|(k, _)| k == key).map(|(_, v)| v),
            _ => None,
        }
    }

    /// Takes a key out of an object.
    pub(crate) fn remove(&mut self, key: &str) -> Option<Json> {
        match self {
            Json::Object(entries) => {
                let at = entries.iter().position(|(k, _)| k == key)?;
                Some(entries.remove(at).1)
            }
            _ => None,
        }
    }

    /// What a message calls this kind of value.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Json::Null => "null",
            Json::Bool(_) => "a boolean",
            Json::Int(_) | Json::BigInt(_) | Json::Float(_) => "a number",
            Json::Str(_) => "a string",
            Json::Array(_) => "an array",
            Json::Object(_) => "an object",
        }
    }

    /// Calls `see` on every string in the value, keys included.
    pub(crate) fn strings(&self, see: &mut impl FnMut(&str)) {
        match self {
            Json::Str(text) => see(text),
            Json::Array(items) => items.iter().for_each(|item| item.strings(see)),
            Json::Object(entries) => entries.iter().for_each(|(key, value)| {
                see(key);
                value.strings(see);
            }),
            _ => {}
        }
    }
}

/// Parses one row.
pub(crate) fn parse(bytes: &[u8]) -> Result<Json, Refusal> {
    if bytes.len() > MAX_ROW_BYTES {
        return Err(Refusal::new(
            reason::TOO_LARGE,
            format!("the row has {} MiB; a row may have {} MiB", bytes.len() >> 20, MAX_ROW_BYTES >> 20),
        ));
    }
    if bytes.starts_with(&[0xFF, 0xFE]) || bytes.starts_with(&[0xFE, 0xFF]) || looks_like_utf16(bytes) {
        return Err(Refusal::new(reason::ENCODING, "the text is UTF-16; save the file as UTF-8"));
    }
    let text = std::str::from_utf8(bytes).map_err(|error| {
        Refusal::new(reason::ENCODING, format!("not valid UTF-8 at byte {} of the row", error.valid_up_to()))
    })?;
    let text = text.strip_prefix('\u{FEFF}').unwrap_or(text);
    if text.trim().is_empty() {
        return Err(Refusal::new(reason::EMPTY, "the row is empty"));
    }
    let mut parser = Parser { text, bytes: text.as_bytes(), at: 0 };
    let value = parser.value(0)?;
    parser.space();
    if parser.at < parser.bytes.len() {
        return Err(parser.wrong("something follows the value"));
    }
    Ok(value)
}

/// Every second of the first bytes is zero: UTF-16 without a mark.
fn looks_like_utf16(bytes: &[u8]) -> bool {
    let head = &bytes[..bytes.len().min(8)];
    head.len() >= 4 && [0, 1].iter().any(|&odd| head.iter().skip(odd).step_by(2).all(|&byte| byte == 0))
}

struct Parser<'a> {
    text: &'a str,
    bytes: &'a [u8],
    at: usize,
}

impl Parser<'_> {
    fn wrong(&self, what: &str) -> Refusal {
        let before = &self.bytes[..self.at.min(self.bytes.len())];
        let line = before.iter().filter(|&&byte| byte == b'\n').count();
        let place = if line > 0 { format!(", line {} of the row", line + 1) } else { String::new() };
        Refusal::new(reason::NOT_JSON, format!("not JSON: {what} at byte {}{place}", self.at))
    }

    fn space(&mut self) {
        while matches!(self.bytes.get(self.at), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    fn value(&mut self, depth: usize) -> Result<Json, Refusal> {
        self.space();
        match self.peek() {
            None => Err(self.wrong("the text ends early")),
            Some(b'"') => Ok(Json::Str(self.string()?)),
            Some(b'{' | b'[') if depth >= MAX_DEPTH => {
                Err(Refusal::new(reason::TOO_DEEP, format!("arrays and objects are nested more than {MAX_DEPTH} deep")))
            }
            Some(b'{') => self.object(depth),
            Some(b'[') => self.array(depth),
            Some(b'-' | b'0'..=b'9') => self.number(),
            Some(_) => {
                for (word, value) in [("true", Json::Bool(true)), ("false", Json::Bool(false)), ("null", Json::Null)] {
                    if self.bytes[self.at..].starts_with(word.as_bytes()) {
                        self.at += word.len();
                        return Ok(value);
                    }
                }
                Err(self.wrong("no value"))
            }
        }
    }

    fn array(&mut self, depth: usize) -> Result<Json, Refusal> {
        self.at += 1;
        let mut items = Vec::new();
        self.space();
        if self.peek() == Some(b']') {
            self.at += 1;
            return Ok(Json::Array(items));
        }
        loop {
            items.push(self.value(depth + 1)?);
            self.space();
            match self.peek() {
                Some(b',') => self.at += 1,
                Some(b']') => {
                    self.at += 1;
                    return Ok(Json::Array(items));
                }
                _ => return Err(self.wrong("no `,` or `]`")),
            }
        }
    }

    fn object(&mut self, depth: usize) -> Result<Json, Refusal> {
        self.at += 1;
        let mut entries: Vec<(String, Json)> = Vec::new();
        // Only large objects pay for an index; it keeps a row with many keys from quadratic time.
        let mut places: HashMap<String, usize> = HashMap::new();
        self.space();
        if self.peek() == Some(b'}') {
            self.at += 1;
            return Ok(Json::Object(entries));
        }
        loop {
            self.space();
            if self.peek() != Some(b'"') {
                return Err(self.wrong("no key"));
            }
            let key = self.string()?;
            self.space();
            if self.peek() != Some(b':') {
                return Err(self.wrong("no `:`"));
            }
            self.at += 1;
            let value = self.value(depth + 1)?;
            let place = if entries.len() < 16 {
                entries.iter().position(|(k, _)| *k == key)
            } else {
                if places.is_empty() {
                    places = entries.iter().enumerate().map(|(i, (k, _))| (k.clone(), i)).collect();
                }
                places.get(&key).copied()
            };
            match place {
                Some(i) => entries[i].1 = value,
                None => {
                    if !places.is_empty() {
                        places.insert(key.clone(), entries.len());
                    }
                    entries.push((key, value));
                }
            }
            self.space();
            match self.peek() {
                Some(b',') => self.at += 1,
                Some(b'}') => {
                    self.at += 1;
                    return Ok(Json::Object(entries));
                }
                _ => return Err(self.wrong("no `,` or `}`")),
            }
        }
    }

    fn digits(&mut self) -> usize {
        let start = self.at;
        while matches!(self.peek(), Some(b'0'..=b'9')) {
            self.at += 1;
        }
        self.at - start
    }

    fn number(&mut self) -> Result<Json, Refusal> {
        let start = self.at;
        if self.peek() == Some(b'-') {
            self.at += 1;
        }
        let first = self.peek();
        match self.digits() {
            0 => return Err(self.wrong("no digit")),
            n if n > 1 && first == Some(b'0') => return Err(self.wrong("a number begins with 0")),
            _ => {}
        }
        let mut float = false;
        if self.peek() == Some(b'.') {
            self.at += 1;
            float = true;
            if self.digits() == 0 {
                return Err(self.wrong("no digit"));
            }
        }
        if matches!(self.peek(), Some(b'e' | b'E')) {
            self.at += 1;
            float = true;
            if matches!(self.peek(), Some(b'+' | b'-')) {
                self.at += 1;
            }
            if self.digits() == 0 {
                return Err(self.wrong("no digit"));
            }
        }
        let text = &self.text[start..self.at];
        if float {
            return match text.parse::<f64>() {
                Ok(value) if value.is_finite() => Ok(Json::Float(value)),
                _ => Err(self.wrong("a number is out of range")),
            };
        }
        match text.parse::<i64>() {
            Ok(value) => Ok(Json::Int(value)),
            Err(_) => Ok(Json::BigInt(text.to_owned())),
        }
    }

    fn string(&mut self) -> Result<String, Refusal> {
        self.at += 1;
        let mut out = String::new();
        loop {
            let start = self.at;
            while !matches!(self.peek(), None | Some(b'"' | b'\\' | 0..=0x1F)) {
                self.at += 1;
            }
            out.push_str(&self.text[start..self.at]);
            match self.peek() {
                Some(b'"') => {
                    self.at += 1;
                    return Ok(out);
                }
                Some(b'\\') => {
                    self.at += 1;
                    out.push(self.escape()?);
                }
                Some(_) => return Err(self.wrong("a control character in a string")),
                None => return Err(self.wrong("a string does not end")),
            }
        }
    }

    fn escape(&mut self) -> Result<char, Refusal> {
        let byte = self.peek();
        self.at += 1;
        Ok(match byte {
            Some(b'"') => '"',
            Some(b'\\') => '\\',
            Some(b'/') => '/',
            Some(b'b') => '\u{8}',
            Some(b'f') => '\u{C}',
            Some(b'n') => '\n',
            Some(b'r') => '\r',
            Some(b't') => '\t',
            Some(b'u') => {
                let high = self.hex()?;
                let code = if (0xD800..0xDC00).contains(&high) && self.bytes[self.at..].starts_with(b"\\u") {
                    self.at += 2;
                    let low = self.hex()?;
                    if (0xDC00..0xE000).contains(&low) {
                        0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00)
                    } else {
                        high
                    }
                } else {
                    high
                };
                char::from_u32(code).ok_or_else(|| {
                    Refusal::new(
                        reason::SURROGATE,
                        format!("\\u{high:04x} near byte {} is half of a surrogate pair: no character", self.at),
                    )
                })?
            }
            _ => return Err(self.wrong("an escape that JSON does not have")),
        })
    }

    fn hex(&mut self) -> Result<u32, Refusal> {
        let digits = self.bytes.get(self.at..self.at + 4).filter(|d| d.iter().all(u8::is_ascii_hexdigit));
        let Some(digits) = digits else { return Err(self.wrong("no four hexadecimal digits")) };
        self.at += 4;
        Ok(digits.iter().fold(0, |code, &digit| code * 16 + (digit as char).to_digit(16).unwrap_or(0)))
    }
}
