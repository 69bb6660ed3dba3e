//! Private-use characters that neither the row nor the template has: they pass the template unseen and show in its text
//! where something of the row came out.

use crate::row::Record;

pub(super) const HEADER: &str = "<|im_start|>assistant";
pub(super) const CLOSE: &str = "<|im_end|>";

const FIRST: u32 = 0xE000;
const LAST: u32 = 0xF8FF;
/// Digits of a piece's index.
const BASE: u32 = 64;
/// Four sentinels with a meaning of their own, the one that begins a piece's marker, the digits, and the one of images.
const COUNT: u32 = 6 + BASE;

/// Sentinels that are free for one row: `COUNT` characters from this one on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sentinels(u32);

/// What the strings of a row have that rendering must know of.
pub(super) struct Seen {
    /// Some string has `|`, without which no special token can be spelt.
    pub(super) bar: bool,
    private: Vec<u32>,
}

impl Seen {
    pub(super) fn in_record(record: &Record) -> Self {
        let mut seen = Self { bar: false, private: Vec::new() };
        let mut see = |text: &str| {
            let mut private = false;
            for &byte in text.as_bytes() {
                seen.bar |= byte == b'|';
                // Their UTF-8 begins with EE or EF; nearly no text has any.
                private |= byte == 0xEE || byte == 0xEF;
            }
            if private {
                seen.private.extend(private_characters(text));
            }
        };
        record.messages.iter().for_each(|message| message.strings(&mut see));
        record.tools.iter().chain(&record.variables).for_each(|value| value.strings(&mut see));
        seen
    }
}

/// The private-use characters of a text.
pub(super) fn private_characters(text: &str) -> impl Iterator<Item = u32> {
    text.chars().map(u32::from).filter(|c| (FIRST..=LAST).contains(c))
}

impl Sentinels {
    /// Nothing where the row and the template, which has the private-use characters `private`, leave no room.
    pub(super) fn unused(seen: &Seen, private: &[u32]) -> Option<Self> {
        let taken = |base: u32| {
            let used = |c: &u32| (base..base + COUNT).contains(c);
            seen.private.iter().any(used) || private.iter().any(used)
        };
        (FIRST..=LAST + 1 - COUNT).step_by(COUNT as usize).find(|&base| !taken(base)).map(Self)
    }

    fn at(self, n: u32) -> char {
        char::from_u32(self.0 + n).unwrap_or('\u{F8FF}')
    }

    /// Stands for `|` of the row.
    pub(super) fn bar(self) -> char {
        self.at(0)
    }

    /// Stands for `<` of reasoning that must pass the template unseen.
    pub(super) fn angle(self) -> char {
        self.at(1)
    }

    /// Before what generation tags enclose.
    pub(super) fn open(self) -> char {
        self.at(2)
    }

    /// Behind what generation tags enclose.
    pub(super) fn close(self) -> char {
        self.at(3)
    }

    /// Stands for an image.
    pub(super) fn image(self) -> char {
        self.at(5 + BASE)
    }

    /// The marker of one piece of the row.
    pub(super) fn piece(self, index: u32) -> String {
        [4, 5 + index / BASE / BASE % BASE, 5 + index / BASE % BASE, 5 + index % BASE]
            .map(|n| self.at(n))
            .iter()
            .collect()
    }

    /// The index of the piece whose marker begins a text, with that marker's length.
    fn read_piece(self, text: &str) -> Option<(u32, usize)> {
        let mut chars = text.chars();
        if chars.next() != Some(self.at(4)) {
            return None;
        }
        let mut index = 0;
        for _ in 0..3 {
            let digit = u32::from(chars.next()?).checked_sub(self.0 + 5).filter(|&digit| digit < BASE)?;
            index = index * BASE + digit;
        }
        Some((index, text.len() - chars.as_str().len()))
    }
}

/// Rendered text without sentinels, and where they were; all places are of that text.
#[derive(Debug, Default)]
pub(super) struct Scan {
    pub(super) text: String,
    /// Between generation tags.
    pub(super) marks: Vec<(usize, usize)>,
    /// Behind each header of a reply in ChatML.
    pub(super) headers: Vec<usize>,
    /// From behind such a header to behind the token that closes it.
    pub(super) blocks: Vec<(usize, usize)>,
    /// The sentinels of pieces.
    pub(super) pieces: Vec<u32>,
}

/// Takes sentinels out of rendered text. ChatML is only looked for where the row cannot have spelt it.
pub(super) fn scan(marked: &str, sentinels: Sentinels) -> Scan {
    let mut out = Scan { text: String::with_capacity(marked.len()), ..Scan::default() };
    let (mut opened, mut header) = (None, None);
    let (mut copied, mut at) = (0, 0);
    let bytes = marked.as_bytes();
    while at < bytes.len() {
        let Some(step) = bytes[at..].iter().position(|&b| b == b'<' || b == 0xEE || b == 0xEF) else { break };
        at += step;
        let rest = &marked[at..];
        if bytes[at] == b'<' {
            let word = [HEADER, CLOSE].into_iter().find(|word| rest.starts_with(word));
            let Some(word) = word else {
                at += 1;
                continue;
            };
            at += word.len();
            out.text.push_str(&marked[copied..at]);
            copied = at;
            if word == HEADER {
                out.headers.push(out.text.len());
                header = Some(out.text.len());
            } else if let Some(start) = header.take() {
                out.blocks.push((start, out.text.len()));
            }
            continue;
        }
        let Some(c) = rest.chars().next() else { break };
        let (replacement, length) = if c == sentinels.bar() {
            ("|", c.len_utf8())
        } else if c == sentinels.angle() {
            ("<", c.len_utf8())
        } else if c == sentinels.open() || c == sentinels.close() {
            ("", c.len_utf8())
        } else if let Some((index, length)) = sentinels.read_piece(rest) {
            out.pieces.push(index);
            ("", length)
        } else {
            at += c.len_utf8();
            continue;
        };
        out.text.push_str(&marked[copied..at]);
        out.text.push_str(replacement);
        at += length;
        copied = at;
        if c == sentinels.open() {
            opened = Some(out.text.len());
        } else if c == sentinels.close()
            && let Some(start) = opened.take()
        {
            out.marks.push((start, out.text.len()));
        }
    }
    out.text.push_str(&marked[copied..]);
    out
}

/// A text with the marker inside of its first and its last words, so that what a template looks for at either end is still
/// there; with how many sentinels that are. Blank text has none.
pub(super) fn tracked_text(text: &str, marker: &str) -> (String, u32) {
    let core = text.trim();
    let Some(first) = core.chars().next() else { return (text.to_owned(), 0) };
    let before = text.len() - text.trim_start().len();
    let start = match core.find('>').filter(|&end| core.starts_with('<') && end < 64) {
        Some(end) => end + 1,
        None => first.len_utf8(),
    };
    let end = match core.rfind('<').filter(|&start| core.ends_with('>') && core.len() - start < 64) {
        Some(start) => start,
        None => core.char_indices().next_back().map_or(0, |(at, _)| at),
    };
    let mut out = String::with_capacity(text.len() + 2 * marker.len());
    out.push_str(&text[..before + start]);
    out.push_str(marker);
    if end > start {
        out.push_str(&text[before + start..before + end]);
        out.push_str(marker);
        out.push_str(&text[before + end..]);
        return (out, 2);
    }
    out.push_str(&text[before + start..]);
    (out, 1)
}
