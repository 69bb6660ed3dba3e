//! Files of rows: what their first bytes say, unpacking gzip and zstd, and the places of the rows of a JSON array. Files are
//! read in streams and never held.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::Path;

use arl_model::{Error, ErrorCode, Result};

const BUFFER: usize = 1 << 20;

/// How deep a JSON file may nest before it is refused; a row's own bound is lower.
const MAX_DEPTH: usize = 1 << 16;

/// What the first bytes of a file say that it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Packed with gzip.
    Gzip,
    /// Packed with zstd; some writers (pzstd, seekable zstd) begin with a skippable frame.
    Zstd,
    /// Text in UTF-16.
    Utf16,
    /// Text in UTF-32.
    Utf32,
    /// Anything else: text in UTF-8, or a format that this crate does not know.
    Other,
}

impl Content {
    /// The name by which JavaScript and messages know it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Content::Gzip => "gzip",
            Content::Zstd => "zstd",
            Content::Utf16 => "UTF-16",
            Content::Utf32 => "UTF-32",
            Content::Other => "other",
        }
    }
}

/// How many bytes of text show whether it is UTF-16 or UTF-32.
const TEXT_BYTES: usize = 64;

/// What a file is that begins with `head`. The only place that knows these signatures.
#[must_use]
pub fn sniff(head: &[u8]) -> Content {
    match head {
        [0x1F, 0x8B, ..] => Content::Gzip,
        [0x28, 0xB5, 0x2F, 0xFD, ..] | [0x50..=0x5F, 0x2A, 0x4D, 0x18, ..] => Content::Zstd,
        [0xFF, 0xFE, 0, 0, ..] | [0, 0, 0xFE, 0xFF, ..] => Content::Utf32,
        [0xFF, 0xFE, ..] | [0xFE, 0xFF, ..] => Content::Utf16,
        _ => without_mark(head),
    }
}

/// Text without a byte order mark: in the range of ASCII, UTF-16 has a zero in every second byte and UTF-32 three in four.
/// UTF-8 has none at all.
fn without_mark(head: &[u8]) -> Content {
    let text = &head[..head.len().min(TEXT_BYTES)];
    let zeros = text.iter().filter(|&&byte| byte == 0).count();
    let few = text.len() < 16 && matches!(text, [_, 0, _, 0, ..] | [0, _, 0, _, ..]);
    match zeros {
        _ if zeros * 8 > text.len() * 5 => Content::Utf32,
        8.. => Content::Utf16,
        _ if few => Content::Utf16,
        _ => Content::Other,
    }
}

/// Unpacks `source` into `target` where its first bytes are those of gzip or zstd; returns whether they were.
/// `target` appears when it is complete, never before.
///
/// # Errors
/// `ARL_DATA` for a damaged or cut-off file, `ARL_IO` where a file cannot be read or written.
pub fn decompress(source: &Path, target: &Path) -> Result<bool> {
    let read_error = |error: &io::Error| Error::io(source, error);
    let file = open_file(source)?;
    let mut input = BufReader::with_capacity(BUFFER, file);
    let head: Vec<u8> = input.fill_buf().map_err(|error| read_error(&error))?.iter().take(4).copied().collect();
    let content = sniff(&head);
    if !matches!(content, Content::Gzip | Content::Zstd) {
        return Ok(false);
    }
    let mut name = target.file_name().unwrap_or_default().to_owned();
    name.push(format!(".part-{}", std::process::id()));
    let part = target.with_file_name(name);
    let result = unpack(input, content, source, &part)
        .and_then(|()| std::fs::rename(&part, target).map_err(|error| Error::io(target, &error)));
    if result.is_err() {
        // The error to report is the first one.
        let _ = std::fs::remove_file(&part);
    }
    result.map(|()| true)
}

fn open_file(path: &Path) -> Result<File> {
    let file = File::open(path).map_err(|error| Error::io(path, &error))?;
    let meta = file.metadata().map_err(|error| Error::io(path, &error))?;
    if meta.is_dir() {
        return Err(Error::new(ErrorCode::Io, format!("{} is a directory, not a file", path.display())));
    }
    Ok(file)
}

fn unpack(input: BufReader<File>, content: Content, source: &Path, part: &Path) -> Result<()> {
    let mut output = File::create(part).map_err(|error| Error::io(part, &error))?;
    if content == Content::Gzip {
        copy(flate2::bufread::MultiGzDecoder::new(input), &mut output, source, part, "gzip")?;
    } else {
        let decoder = zstd::stream::read::Decoder::with_buffer(input).map_err(|error| Error::io(source, &error))?;
        copy(decoder, &mut output, source, part, "zstd")?;
    }
    output.sync_all().map_err(|error| Error::io(part, &error))
}

fn copy(mut from: impl Read, to: &mut File, source: &Path, part: &Path, kind: &str) -> Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let n = match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(damaged(source, kind, &error.to_string())),
        };
        to.write_all(&buffer[..n]).map_err(|error| Error::io(part, &error))?;
    }
}

fn damaged(source: &Path, kind: &str, what: &str) -> Error {
    Error::new(ErrorCode::Data, format!("{}: the {kind} data is damaged or cut off: {what}", source.display()))
        .hint("copy or download the file again")
}

/// The elements of a JSON array: `ranges` holds the start and the end of each, in bytes, `lines` the line on which each
/// begins, counted from 1.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ArrayRows {
    /// Start, end, start, end, ...
    pub ranges: Vec<u64>,
    /// One for each element.
    pub lines: Vec<u64>,
}

/// Finds the elements of a JSON file whose top level is an array.
/// The elements themselves are not checked beyond their brackets and strings.
///
/// # Errors
/// `ARL_DATA` with the line, where the file is no such array; `ARL_IO` where it cannot be read.
pub fn json_array_rows(file: &Path) -> Result<ArrayRows> {
    let mut input = open_file(file)?;
    let mut scanner = Scanner::default();
    let mut buffer = vec![0; BUFFER];
    let mut first = true;
    loop {
        let n = match input.read(&mut buffer) {
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(Error::io(file, &error)),
        };
        let mut chunk = &buffer[..n];
        if first {
            first = false;
            let content = sniff(chunk);
            if content != Content::Other {
                let what = format!("{}: the file is {}", file.display(), content.as_str());
                return Err(Error::new(ErrorCode::Data, what).hint("unpack it, or save it as UTF-8"));
            }
            if let Some(rest) = chunk.strip_prefix(&[0xEF, 0xBB, 0xBF]) {
                scanner.at = 3;
                chunk = rest;
            }
        }
        let result = if n == 0 { scanner.end() } else { scanner.chunk(chunk) };
        if let Err(what) = result {
            return Err(Error::new(ErrorCode::Data, format!("{}:{}: {what}", file.display(), scanner.line + 1)));
        }
        if n == 0 {
            return Ok(scanner.rows);
        }
    }
}

#[derive(Default, PartialEq, Clone, Copy)]
enum Place {
    /// Before the array.
    #[default]
    Before,
    /// After `[` (an element or the end may follow).
    First,
    /// After a comma (an element must follow).
    Next,
    /// In an element.
    Inside,
    /// After an element that closed itself.
    Done,
    /// After the array.
    After,
}

#[derive(Default)]
struct Scanner {
    place: Place,
    /// Closing brackets that the element still needs.
    open: Vec<u8>,
    in_string: bool,
    escaped: bool,
    at: u64,
    line: u64,
    /// End of the last byte of the element that is no white space.
    end_of_element: u64,
    rows: ArrayRows,
}

impl Scanner {
    fn chunk(&mut self, bytes: &[u8]) -> std::result::Result<(), &'static str> {
        for &byte in bytes {
            self.byte(byte)?;
            self.at += 1;
            self.line += u64::from(byte == b'\n');
        }
        Ok(())
    }

    fn byte(&mut self, byte: u8) -> std::result::Result<(), &'static str> {
        if self.in_string {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                b'"' => {
                    self.in_string = false;
                    self.end_of_element = self.at + 1;
                    if self.open.is_empty() {
                        self.place = Place::Done;
                    }
                }
                b'\n' => return Err("a string does not end on its line"),
                _ => {}
            }
            return Ok(());
        }
        if matches!(byte, b' ' | b'\t' | b'\n' | b'\r') {
            // A bare word or number ends at white space.
            if self.place == Place::Inside && self.open.is_empty() {
                self.place = Place::Done;
            }
            return Ok(());
        }
        match self.place {
            Place::Before if byte == b'[' => {
                self.place = Place::First;
                return Ok(());
            }
            Place::Before => return Err("the file is not a JSON array (one row a line needs the ending .jsonl)"),
            Place::After => return Err("something follows the array"),
            Place::First if byte == b']' => {
                self.place = Place::After;
                return Ok(());
            }
            Place::First | Place::Next => {
                if matches!(byte, b',' | b']' | b'}' | b':') {
                    return Err("an element is missing");
                }
                self.rows.ranges.push(self.at);
                self.rows.lines.push(self.line + 1);
                self.place = Place::Inside;
            }
            Place::Inside | Place::Done if self.open.is_empty() && matches!(byte, b',' | b']') => {
                self.rows.ranges.push(self.end_of_element);
                self.place = if byte == b',' { Place::Next } else { Place::After };
                return Ok(());
            }
            Place::Done => return Err("no `,` or `]` after an element"),
            Place::Inside => {}
        }
        match byte {
            b'"' => self.in_string = true,
            b'{' | b'[' if self.open.len() >= MAX_DEPTH => return Err("arrays and objects nest too deep"),
            b'{' => self.open.push(b'}'),
            b'[' => self.open.push(b']'),
            b'}' | b']' => {
                if self.open.pop() != Some(byte) {
                    return Err("brackets do not match");
                }
                if self.open.is_empty() {
                    self.place = Place::Done;
                }
            }
            _ => {}
        }
        self.end_of_element = self.at + 1;
        Ok(())
    }

    fn end(&self) -> std::result::Result<(), &'static str> {
        match self.place {
            Place::After => Ok(()),
            Place::Before => Err("the file is empty"),
            _ => Err("the file ends within the array"),
        }
    }
}
