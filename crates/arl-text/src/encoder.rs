//! A row's bytes to a sample: ids, the weight of each token as a target, and where the trained replies lie.

use std::path::Path;
use std::sync::RwLock;

use arl_model::{Error, ErrorCode, Result};
use rayon::prelude::*;

use crate::note::{NoteKind, Notes};
use crate::options::{TextOptions, Truncation};
use crate::problem::{Refusal, RowProblem, reason};
use crate::row::{Json, Reader, Record, Row, Shape, is_reply, parse, role};
use crate::targets::{self, Reply};
use crate::template::Template;
use crate::tokenize::Tokens;

/// Goes into the fingerprint: change it whenever the same row would give other tokens.
const FORMAT: &str = "arl-text 2";

/// Tokens of equal weight side by side.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Run {
    /// Tokens.
    pub length: u32,
    /// Weight of each as a target; 0 where it is not trained.
    pub weight: f32,
}

/// A trained reply: `ids[first..=last]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Index of its message.
    pub message: usize,
    /// First token.
    pub first: usize,
    /// Last token, in the span itself.
    pub last: usize,
}

/// One row as the model sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct Encoded {
    /// The rendered text; before truncation. Empty for rows that came as tokens.
    pub text: String,
    /// Token ids.
    pub ids: Vec<u32>,
    /// The weights of all tokens; the lengths add up to `ids.len()`.
    pub runs: Vec<Run>,
    /// The trained replies, in order; one that was cut in two by truncation is shorter.
    pub spans: Vec<Span>,
    /// The row's own name.
    pub record_id: Option<String>,
    /// Something was cut off.
    pub truncated: bool,
    /// What a user should know of the row all the same.
    pub notes: Notes,
}

impl Encoded {
    /// Tokens that are scored: trained, and with one before them.
    pub fn target_tokens(&self) -> usize {
        targets_in(&self.runs)
    }

    /// The weight of each token, one by one.
    pub fn weights(&self) -> Vec<f32> {
        self.runs.iter().flat_map(|run| std::iter::repeat_n(run.weight, run.length as usize)).collect()
    }
}

/// What became of a row.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// A sample.
    Sample(Encoded),
    /// Left out because it is longer than `max_length`, as `truncation: drop` asks; with its tokens.
    Dropped(usize),
}

/// What is known of a tokenizer and its template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TextInfo {
    /// One more than the largest id that the tokenizer can produce.
    pub vocab_size: usize,
    /// The tokens that end a reply.
    pub stop_ids: Vec<u32>,
    /// `chat_template.jinja`, `tokenizer_config.json`, the file that was given, or `none`.
    pub template_source: String,
    /// Changes whenever the template, the tokenizer or an option that changes tokens does.
    pub fingerprint: String,
}

/// All ids, and where those of each reply lie: `ids[first..end]`.
type Tokenized = (Vec<u32>, Vec<(usize, usize)>);

/// Rows to tokens.
pub struct TextEncoder {
    template: Result<Template>,
    tokens: Tokens,
    options: TextOptions,
    reader: Reader,
    info: TextInfo,
    shape: RwLock<Option<Shape>>,
    /// Roles whose messages the template leaves out.
    ignored_roles: Vec<&'static str>,
    eos: Option<(String, u32)>,
}

impl TextEncoder {
    /// Opens a model folder's tokenizer and chat template.
    ///
    /// # Errors
    /// `ARL_TEXT` for a tokenizer or template that cannot be used, `ARL_CONFIG` for options, `ARL_IO` for files.
    /// A folder without any template is an error only when rows need one.
    pub fn open(options: TextOptions) -> Result<Self> {
        if options.max_length == Some(0) {
            return Err(Error::new(ErrorCode::Config, "max_length is 0; a sample has at least two tokens"));
        }
        let config = tokenizer_config(&options.model_dir)?;
        let template = Template::find(&options.model_dir, options.chat_template.as_ref(), &config);
        let template = match template {
            Err(error) if options.chat_template.is_some() || !error.message.contains("no chat template") => {
                return Err(error);
            }
            template => template,
        };
        let reader = Reader::new(&options, template.as_ref().ok().map(|template| template.source.as_str()))?;
        let tokens = Tokens::open(&options.model_dir)?;
        let eos = match config.get("eos_token") {
            Some(Json::Str(text)) => Some(text.clone()),
            Some(token) => token.get("content").and_then(Json::as_str).map(str::to_owned),
            None => None,
        };
        let eos = eos.and_then(|text| tokens.id(&text).map(|id| (text, id)));
        let info = TextInfo {
            vocab_size: tokens.vocab_size,
            stop_ids: Vec::new(),
            template_source: template.as_ref().map_or("none".to_owned(), |template| template.origin.clone()),
            fingerprint: fingerprint(&options, template.as_ref().ok(), &tokens, eos.as_ref()),
        };
        let shape = RwLock::new(None);
        let mut encoder = Self { template, tokens, options, reader, info, shape, ignored_roles: Vec::new(), eos };
        encoder.ignored_roles = encoder.find_ignored_roles();
        encoder.info.stop_ids = encoder.find_stop_ids();
        Ok(encoder)
    }

    /// What is known of the tokenizer and the template.
    pub fn info(&self) -> &TextInfo {
        &self.info
    }

    /// One more than the largest id; the model's embedding must have at least as many rows.
    pub fn vocab_size(&self) -> usize {
        self.tokens.vocab_size
    }

    /// Finds out what shape the rows have; later rows must have the same. Returns it for a report.
    ///
    /// # Errors
    /// `ARL_DATA` where the rows have no known shape or several; `ARL_TEXT` where they need a template and there is none.
    pub fn detect(&self, rows: &[&[u8]]) -> Result<String> {
        let mut found: Option<(usize, Shape)> = None;
        let mut unknown: Option<Error> = None;
        for (i, bytes) in rows.iter().enumerate() {
            let row = match parse(bytes) {
                Ok(row) => row,
                Err(refusal) => {
                    let error = Error::new(ErrorCode::Data, format!("row {i}: {}", refusal.message));
                    unknown.get_or_insert(error);
                    continue;
                }
            };
            match (self.reader.shape_of(&row), &found) {
                (Some(shape), None) => found = Some((i, shape)),
                (Some(shape), Some((first, other))) if shape != *other => {
                    return Err(Error::new(
                        ErrorCode::Data,
                        format!("row {first} looks like `{}`, row {i} like `{}`", other.name(), shape.name()),
                    )
                    .hint("make the rows of a file alike, or name the columns with --columns"));
                }
                (Some(_), Some(_)) => {}
                (None, _) => {
                    let refusal = self.reader.unknown(&row);
                    let hint = if refusal.reason == reason::PREFERENCE {
                        "name the side to train as above; training on both sides (DPO, KTO and their kin) is not built"
                    } else {
                        "rows need messages, conversations, prompt and completion, text or input_ids; name other \
                         columns with --columns"
                    };
                    let error = Error::new(ErrorCode::Data, format!("row {i}: {}", refusal.message)).hint(hint);
                    unknown.get_or_insert(error);
                }
            }
        }
        let Some((_, shape)) = found else {
            return Err(unknown.unwrap_or_else(|| Error::new(ErrorCode::Data, "there are no rows")));
        };
        if shape.needs_template()
            && let Err(error) = &self.template
        {
            return Err(error.clone());
        }
        let name = shape.name();
        match self.shape.write() {
            Ok(mut place) => *place = Some(shape),
            Err(poisoned) => *poisoned.into_inner() = Some(shape),
        }
        Ok(name)
    }

    /// Encodes one row; `row` is its index, for the problem's sake.
    ///
    /// # Errors
    /// Why the row cannot be used.
    pub fn encode(&self, row: usize, bytes: &[u8]) -> std::result::Result<Outcome, RowProblem> {
        self.sample(bytes).map_err(|refusal| refusal.at(row))
    }

    /// Encodes rows on all cores; `indexes[i]` is the index of `rows[i]` in its source.
    pub fn encode_rows(&self, rows: &[&[u8]], indexes: &[u32]) -> Vec<std::result::Result<Outcome, RowProblem>> {
        rows.par_iter().zip(indexes).map(|(bytes, &row)| self.encode(row as usize, bytes)).collect()
    }

    /// Tokens of a conversation's messages before `until` and the header of a reply. `until` absent: before the last
    /// message if that is the assistant's, else all messages.
    ///
    /// # Errors
    /// `ARL_DATA` where the row is no conversation, or has no message `until`.
    pub fn prompt(&self, bytes: &[u8], until: Option<usize>) -> Result<Vec<u32>> {
        let failed = |refusal: Refusal| Error::new(ErrorCode::Data, refusal.message);
        let mut record = match self.read(bytes).map_err(failed)? {
            Row::Chat(record) => record,
            Row::Text { text, .. } => {
                let mut ids = Vec::new();
                self.append(&text, true, &mut ids).map_err(failed)?;
                return Ok(ids);
            }
            Row::Tokens { ids, .. } => return Ok(ids),
        };
        let count = record.messages.len();
        let until = until.unwrap_or(count - usize::from(record.messages.last().is_some_and(is_reply)));
        if until == 0 || until > count {
            return Err(Error::new(ErrorCode::Data, format!("prompt until message {until}: the row has {count}")));
        }
        record.messages.truncate(until);
        let template = self.template.as_ref().map_err(Clone::clone)?;
        let rendered = targets::render(template, &record, self.options.thinking, true).map_err(failed)?;
        let (ids, _) = self.cut_and_tokenize(&rendered.text, &rendered.replies).map_err(failed)?;
        Ok(ids)
    }

    /// Text of tokens.
    ///
    /// # Errors
    /// `ARL_TEXT` where the tokenizer fails.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        self.tokens.decode(ids, skip_special_tokens)
    }

    fn read(&self, bytes: &[u8]) -> std::result::Result<Row, Refusal> {
        let shape = match self.shape.read() {
            Ok(shape) => shape.clone(),
            Err(poisoned) => poisoned.into_inner().clone(),
        };
        let row = self.reader.read(bytes, shape.as_ref())?;
        if let Row::Chat(record) = &row {
            for (i, message) in record.messages.iter().enumerate() {
                if self.ignored_roles.contains(&role(message)) {
                    return Err(Refusal::new(
                        reason::UNKNOWN_ROLE,
                        format!("messages[{i}]: the chat template leaves out messages of role `{}`", role(message)),
                    ));
                }
            }
        }
        Ok(row)
    }

    fn append(&self, text: &str, whole: bool, ids: &mut Vec<u32>) -> std::result::Result<(), Refusal> {
        let failed = |error| Refusal::new(reason::TOKENS, format!("the tokenizer: {error}"));
        self.tokens.append(text, whole, ids).map_err(failed)
    }

    /// Tokenises text apart at the bounds of replies: generation begins exactly there, so training must too.
    fn cut_and_tokenize(&self, text: &str, replies: &[Reply]) -> std::result::Result<Tokenized, Refusal> {
        let mut ids = Vec::with_capacity(text.len() / 3);
        let mut places = Vec::with_capacity(replies.len());
        let mut at = 0;
        for reply in replies {
            self.append(&text[at..reply.start], false, &mut ids)?;
            let first = ids.len();
            self.append(&text[reply.start..reply.end], false, &mut ids)?;
            places.push((first, ids.len()));
            at = reply.end;
        }
        self.append(&text[at..], false, &mut ids)?;
        Ok((ids, places))
    }

    fn sample(&self, bytes: &[u8]) -> std::result::Result<Outcome, Refusal> {
        let mut encoded = match self.read(bytes)? {
            Row::Chat(record) => self.chat(record)?,
            Row::Text { mut text, record_id, notes } => {
                let mut ids = Vec::new();
                if let Some((eos, _)) = self.eos.as_ref().filter(|(eos, _)| !text.ends_with(eos.as_str())) {
                    text.push_str(eos);
                }
                self.append(&text, true, &mut ids)?;
                let runs = vec![Run { length: ids.len() as u32, weight: 1.0 }];
                Encoded { text, ids, runs, spans: Vec::new(), record_id, truncated: false, notes }
            }
            Row::Tokens { ids, trained, record_id, notes } => {
                if let Some(id) = ids.iter().find(|&&id| id as usize >= self.tokens.vocab_size) {
                    return Err(Refusal::new(
                        reason::TOKENS,
                        format!("token {id} is outside of the vocabulary of {}", self.tokens.vocab_size),
                    ));
                }
                let mut runs = Vec::new();
                for trained in trained {
                    push_run(&mut runs, 1, if trained { 1.0 } else { 0.0 });
                }
                let (text, spans) = (String::new(), Vec::new());
                Encoded { text, ids, runs, spans, record_id, truncated: false, notes }
            }
        };
        if encoded.target_tokens() == 0 {
            return Err(Refusal::new(reason::NO_TARGET, "no target: nothing in the row is trained"));
        }
        if let Some(limit) = self.options.max_length.filter(|&limit| encoded.ids.len() > limit) {
            let length = encoded.ids.len();
            match self.options.truncation {
                Truncation::Error => {
                    return Err(Refusal::new(
                        reason::TOO_LONG,
                        format!("{length} tokens; max_length is {limit} (truncation: drop, left or right allows it)"),
                    ));
                }
                Truncation::Drop => return Ok(Outcome::Dropped(length)),
                Truncation::Right => cut(&mut encoded, 0, limit),
                Truncation::Left => cut(&mut encoded, length - limit, length),
            }
            if encoded.target_tokens() == 0 {
                return Err(Refusal::new(
                    reason::NO_TARGET_LEFT,
                    format!("no target left after cutting {length} tokens to {limit}"),
                ));
            }
        }
        // The first token of a sample is no target: nothing predicts it.
        let ends =
            |span: &&Span| span.first.max(1) == span.last && self.info.stop_ids.contains(&encoded.ids[span.last]);
        let only_ends = encoded.spans.iter().filter(ends).count();
        encoded.notes.add(NoteKind::EndTokenOnly, "", only_ends as u32);
        Ok(Outcome::Sample(encoded))
    }

    fn chat(&self, record: Record) -> std::result::Result<Encoded, Refusal> {
        record.check_trainable()?;
        let template = self.template.as_ref().map_err(|error| Refusal::new(reason::TEMPLATE, error.message.clone()))?;
        let rendered = targets::render(template, &record, self.options.thinking, false)?;
        let (ids, places) = self.cut_and_tokenize(&rendered.text, &rendered.replies)?;
        let mut runs = Vec::new();
        let mut spans = Vec::new();
        let mut at = 0;
        for (reply, (first, end)) in rendered.replies.iter().zip(places) {
            let weight = record.weights[reply.message];
            push_run(&mut runs, first - at, 0.0);
            push_run(&mut runs, end - first, weight);
            if weight > 0.0 && end > first {
                spans.push(Span { message: reply.message, first, last: end - 1 });
            }
            at = end;
        }
        push_run(&mut runs, ids.len() - at, 0.0);
        let Record { record_id, notes, .. } = record;
        let text = rendered.text;
        Ok(Encoded { text, ids, runs, spans, record_id, truncated: false, notes })
    }

    /// Roles that the template renders without a trace of the message.
    fn find_ignored_roles(&self) -> Vec<&'static str> {
        const PROBE: &str = "qzprobezq";
        let Ok(template) = &self.template else { return Vec::new() };
        let ignored = |role: &&&str| {
            let row = match **role {
                "system" | "developer" => format!(
                    r#"{{"messages":[{{"role":"{role}","content":"{PROBE}"}},{{"role":"user","content":"a"}},{{"role":"assistant","content":"b"}}]}}"#
                ),
                "user" | "assistant" => return false,
                _ => format!(
                    r#"{{"messages":[{{"role":"user","content":"a"}},{{"role":"assistant","content":"b"}},{{"role":"{role}","name":"f","content":"{PROBE}"}},{{"role":"assistant","content":"b"}}]}}"#
                ),
            };
            let record = match Reader::default().read(row.as_bytes(), Some(&Shape::Messages)) {
                Ok(Row::Chat(record)) => record,
                _ => return false,
            };
            targets::render(template, &record, None, false).is_ok_and(|rendered| !rendered.text.contains(PROBE))
        };
        ["system", "developer", "tool"].iter().filter(ignored).copied().collect()
    }

    /// What the template writes at the end of a reply, and what the tokenizer says ends a text.
    fn find_stop_ids(&self) -> Vec<u32> {
        let row = br#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}"#;
        let mut stop = Vec::new();
        if let Ok(Row::Chat(record)) = Reader::default().read(row, Some(&Shape::Messages))
            && let Ok(sample) = self.chat(record)
        {
            // The reply's last special token; what may follow it is a newline.
            let special = |id: &&u32| self.decode(&[**id], true).is_ok_and(|text| text.is_empty());
            let span = sample.spans.last().map_or(0..0, |span| span.first..span.last + 1);
            stop.extend(sample.ids[span].iter().rev().find(special));
        }
        if let Some((_, eos)) = &self.eos
            && !stop.contains(eos)
        {
            stop.push(*eos);
        }
        stop
    }
}

fn push_run(runs: &mut Vec<Run>, length: usize, weight: f32) {
    match runs.last_mut() {
        _ if length == 0 => {}
        Some(run) if run.weight == weight => run.length += length as u32,
        _ => runs.push(Run { length: length as u32, weight }),
    }
}

/// Targets of a sample: trained tokens but the first, which nothing predicts.
pub(crate) fn targets_in(runs: &[Run]) -> usize {
    let trained: usize = runs.iter().filter(|run| run.weight > 0.0).map(|run| run.length as usize).sum();
    trained - usize::from(runs.first().is_some_and(|run| run.weight > 0.0))
}

/// Keeps the tokens `start..end`.
fn cut(encoded: &mut Encoded, start: usize, end: usize) {
    encoded.ids = encoded.ids[start..end].to_vec();
    let mut runs = Vec::new();
    let mut at = 0;
    for run in &encoded.runs {
        let next = at + run.length as usize;
        push_run(&mut runs, next.min(end).saturating_sub(at.max(start)), run.weight);
        at = next;
    }
    encoded.runs = runs;
    encoded.spans = encoded
        .spans
        .iter()
        .filter(|span| span.last >= start && span.first < end)
        .map(|span| Span {
            message: span.message,
            first: span.first.max(start) - start,
            last: span.last.min(end - 1) - start,
        })
        .collect();
    encoded.truncated = true;
}

fn tokenizer_config(model_dir: &Path) -> Result<Json> {
    let path = model_dir.join("tokenizer_config.json");
    match std::fs::read(&path) {
        Ok(bytes) => parse(&bytes)
            .map_err(|refusal| Error::new(ErrorCode::Text, format!("{}: {}", path.display(), refusal.message))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Json::Object(Vec::new())),
        Err(error) => Err(Error::io(&path, &error)),
    }
}

/// A hash of everything besides the rows that decides tokens, targets and weights.
fn fingerprint(
    options: &TextOptions,
    template: Option<&Template>,
    tokens: &Tokens,
    eos: Option<&(String, u32)>,
) -> String {
    let mut hash = blake3::Hasher::new();
    let mut add = |part: &str| {
        hash.update(&(part.len() as u64).to_le_bytes());
        hash.update(part.as_bytes());
    };
    add(FORMAT);
    add(template.map_or("", |template| &template.source));
    add(&tokens.hash.to_hex());
    add(&format!("{eos:?}"));
    let TextOptions {
        model_dir: _,
        chat_template: _,
        max_length,
        truncation,
        thinking,
        columns,
        minimal_advantage,
        drop_zero_advantage,
        skip_non_positive_advantage,
        images,
    } = options;
    add(&format!("{max_length:?} {truncation:?} {thinking:?} {images:?} {columns:?}"));
    add(&format!("{minimal_advantage:?} {drop_zero_advantage} {skip_non_positive_advantage}"));
    hash.finalize().to_hex().to_string()
}
