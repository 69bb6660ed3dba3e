//! A faster way to the same tokens, for ASCII text and Qwen's tokenizers: words are split by hand instead of by a
//! regular expression over text that carries its alignment, and the ids of earlier words are cached.
//! Anything else goes to the library; a test in `tokenize.rs` compares the two.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use serde_json::json;
use tokenizers::models::ModelWrapper;
use tokenizers::{Model, Tokenizer};

/// How Qwen2 and Qwen3 cut text into words.
const WORDS: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Longer words are rare, and their number has no bound.
const LONGEST_REMEMBERED: usize = 48;
/// Words remembered by one thread; about 10 MB.
const MOST_REMEMBERED: usize = 100_000;

/// The ids of words, side by side.
#[derive(Default)]
struct Memory {
    places: HashMap<Box<[u8]>, (u32, u32)>,
    ids: Vec<u32>,
}

/// What the fast way needs besides the library's tokenizer.
pub(crate) struct AsciiBpe {
    /// Tokens that are cut out of text before words are, and their ids; the longest first.
    added: Vec<(Vec<u8>, u32)>,
    begins_added: [bool; 128],
    /// How the vocabulary spells a byte.
    spelling: [char; 128],
    /// One for each thread of the pool, so that none waits.
    memories: Vec<Mutex<Memory>>,
}

impl AsciiBpe {
    /// Nothing, where the tokenizer is of another make.
    pub(crate) fn of(tokenizer: &Tokenizer) -> Option<Self> {
        let is = |part: Result<serde_json::Value, serde_json::Error>, known: &[serde_json::Value]| {
            part.is_ok_and(|part| known.contains(&part))
        };
        let byte_level = |trim_offsets: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": trim_offsets, "use_regex": false});
        let split = json!({"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Isolated", "invert": false});
        let words = |trim| json!({"type": "Sequence", "pretokenizers": [split, byte_level(trim)]});
        let plain_bpe = matches!(tokenizer.get_model(), ModelWrapper::BPE(bpe) if bpe.dropout.is_none());
        if !plain_bpe
            || !is(serde_json::to_value(tokenizer.get_normalizer()), &[json!(null), json!({"type": "NFC"})])
            || !is(serde_json::to_value(tokenizer.get_pre_tokenizer()), &[words(false), words(true)])
        {
            return None;
        }
        let mut added = Vec::new();
        let mut begins_added = [false; 128];
        for (id, token) in tokenizer.get_added_tokens_decoder() {
            if token.normalized || token.single_word || token.lstrip || token.rstrip {
                return None;
            }
            match token.content.as_bytes().first() {
                Some(&byte) if byte.is_ascii() => begins_added[byte as usize] = true,
                Some(_) => {}
                None => return None,
            }
            added.push((token.content.into_bytes(), id));
        }
        added.sort_by_key(|(content, id)| (std::cmp::Reverse(content.len()), *id));
        let mut hidden = 0;
        let spelling = std::array::from_fn(|byte| match byte as u8 {
            visible @ b'!'..=b'~' => char::from(visible),
            _ => {
                hidden += 1;
                char::from_u32(255 + hidden).unwrap_or_default()
            }
        });
        let threads = rayon::current_num_threads() + 1;
        let memories = (0..threads).map(|_| Mutex::default()).collect();
        Some(Self { added, begins_added, spelling, memories })
    }

    /// Appends the tokens of ASCII text.
    pub(crate) fn append(&self, tokenizer: &Tokenizer, text: &str, ids: &mut Vec<u32>) -> Result<(), String> {
        let slot = rayon::current_thread_index().map_or(0, |thread| thread + 1) % self.memories.len();
        let mut memory = self.memories[slot].lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = text.as_bytes();
        let (mut start, mut at) = (0, 0);
        while at < bytes.len() {
            let found = if self.begins_added[usize::from(bytes[at] & 127)] {
                self.added.iter().find(|(content, _)| bytes[at..].starts_with(content))
            } else {
                None
            };
            match found {
                None => at += 1,
                Some((content, id)) => {
                    self.words(tokenizer, &bytes[start..at], &mut memory, ids)?;
                    ids.push(*id);
                    at += content.len();
                    start = at;
                }
            }
        }
        self.words(tokenizer, &bytes[start..], &mut memory, ids)
    }

    /// Text without added tokens.
    fn words(
        &self,
        tokenizer: &Tokenizer,
        mut text: &[u8],
        memory: &mut Memory,
        ids: &mut Vec<u32>,
    ) -> Result<(), String> {
        while !text.is_empty() {
            let (word, rest) = text.split_at(word_length(text));
            text = rest;
            if let Some(&(first, count)) = memory.places.get(word) {
                ids.extend_from_slice(&memory.ids[first as usize..(first + count) as usize]);
                continue;
            }
            let spelt: String = word.iter().map(|&byte| self.spelling[usize::from(byte & 127)]).collect();
            let tokens = tokenizer.get_model().tokenize(&spelt).map_err(|error| error.to_string())?;
            ids.extend(tokens.iter().map(|token| token.id));
            if word.len() <= LONGEST_REMEMBERED && memory.places.len() < MOST_REMEMBERED {
                let place = (memory.ids.len() as u32, tokens.len() as u32);
                memory.ids.extend(tokens.iter().map(|token| token.id));
                memory.places.insert(word.into(), place);
            }
        }
        Ok(())
    }
}

fn is_space(byte: u8) -> bool {
    matches!(byte, 9..=13 | b' ')
}

fn is_newline(byte: u8) -> bool {
    matches!(byte, b'\r' | b'\n')
}

/// Neither space nor letter nor digit.
fn is_sign(byte: u8) -> bool {
    !is_space(byte) && !byte.is_ascii_alphanumeric()
}

/// Bytes from `start` on that are `like`.
fn run(text: &[u8], start: usize, like: impl Fn(u8) -> bool) -> usize {
    text.get(start..).unwrap_or_default().iter().take_while(|&&byte| like(byte)).count()
}

/// The length of the first match of [`WORDS`]; its alternatives are tried in its order. `text` is not empty.
fn word_length(text: &[u8]) -> usize {
    let first = text[0];
    let lower = |at: usize| text.get(at).map(u8::to_ascii_lowercase);
    if first == b'\'' {
        match (lower(1), lower(2)) {
            (Some(b's' | b't' | b'm' | b'd'), _) => return 2,
            (Some(b'r' | b'v'), Some(b'e')) | (Some(b'l'), Some(b'l')) => return 3,
            _ => {}
        }
    }
    let letter = |byte: u8| byte.is_ascii_alphabetic();
    if letter(first) {
        return run(text, 0, letter);
    }
    if first.is_ascii_digit() {
        return 1;
    }
    if !is_newline(first) {
        let letters = run(text, 1, letter);
        if letters > 0 {
            return 1 + letters;
        }
    }
    let before = usize::from(first == b' ');
    let signs = run(text, before, is_sign);
    if signs > 0 {
        return before + signs + run(text, before + signs, is_newline);
    }
    let spaces = run(text, 0, is_space);
    if let Some(last) = text[..spaces].iter().rposition(|&byte| is_newline(byte)) {
        return last + 1;
    }
    // The last space of several goes to the word after it.
    if spaces < text.len() && spaces > 1 { spaces - 1 } else { spaces }
}
