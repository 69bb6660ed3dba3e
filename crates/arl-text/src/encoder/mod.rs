//! A row's bytes to a sample: ids, the weight of each token as a target, and where the trained replies are.

mod fingerprint;
mod images;
mod prompt;
mod sample;
mod stop;

use std::path::Path;
use std::sync::RwLock;

use arl_model::{Error, ErrorCode, Result};
use rayon::prelude::*;

use crate::loss_mask::{self, Probed, Reply};
use crate::note::NoteKind;
use crate::options::{Images, TextOptions, Truncation};
use crate::problem::{Refusal, RowProblem, reason};
use crate::row::{Json, Reader, Record, Row, Shape, parse, role};
use crate::template::{Moment, Templates};
use crate::tokenize::Tokens;
use crate::vision::VisionTokens;

use fingerprint::fingerprint;
use images::{Tokenized, with_images};
use sample::{cut, push_run, push_tokens};

pub use images::{MeasuredImage, RowImage, SampleImage};
pub use prompt::Prompt;
pub(crate) use sample::targets_in;
pub use sample::{Encoded, Outcome, Run, Span};

/// What is known of a tokenizer and its template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TextInfo {
    /// One more than the largest id that the tokenizer can produce.
    pub vocab_size: usize,
    /// The tokens that end a reply.
    pub stop_ids: Vec<u32>,
    /// `chat_template.jinja`, `tokenizer_config.json`, the file that was given, or `none`; with the names of several.
    pub template_source: String,
    /// Changes whenever the template, the tokenizer or an option that changes tokens does.
    pub fingerprint: String,
}

/// Rows to tokens.
pub struct TextEncoder {
    templates: Result<Templates<Probed>>,
    tokens: Tokens,
    options: TextOptions,
    reader: Reader,
    /// How images become tokens, where they are trained.
    vision: Option<VisionTokens>,
    info: TextInfo,
    shape: RwLock<Option<Shape>>,
    eos: Option<(String, u32)>,
    /// Tokens of replies without text, in ascending order.
    blank_ids: Vec<u32>,
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
        let day = match &options.chat_template_date {
            None => Moment::today(),
            Some(date) => Moment::of_date(date).ok_or_else(|| {
                Error::new(ErrorCode::Config, format!("chat_template_date: `{date}` is not a date"))
                    .hint("write it as 2024-02-29")
            })?,
        };
        let templates = Templates::find(&options.model_dir, options.chat_template.as_ref(), &config, day)?;
        let sources = templates.iter().flat_map(|templates| templates.sources.values());
        let reader = Reader::new(&options, sources.map(String::as_str))?;
        let tokens = Tokens::open(&options.model_dir)?;
        let vision = (options.images == Images::Train).then(|| images::vision(&options, &tokens)).transpose()?;
        let eos = match config.get("eos_token") {
            Some(Json::Str(text)) => Some(text.clone()),
            Some(token) => token.get("content").and_then(Json::as_str).map(str::to_owned),
            None => None,
        };
        let eos = eos.and_then(|text| tokens.id(&text).map(|id| (text, id)));
        let special = tokens.special();
        let templates = templates.map(|found| found.map(|template| Probed::new(template, &special)));
        let date = templates.iter().flat_map(Templates::all).find_map(|probed| probed.template.date.as_deref());
        let info = TextInfo {
            vocab_size: tokens.vocab_size,
            stop_ids: Vec::new(),
            template_source: templates.as_ref().map_or("none".to_owned(), |templates| templates.origin.clone()),
            fingerprint: fingerprint(&options, templates.as_ref(), date, &tokens, eos.as_ref(), vision.as_ref()),
        };
        let templates = templates.ok_or_else(|| {
            let what = "no chat template in chat_template.jinja or tokenizer_config.json";
            Error::new(ErrorCode::Text, format!("{}: {what}", options.model_dir.display()))
                .hint("give one with --chat_template FILE; the instruct variant of a model has one to copy")
        });
        let (shape, blank_ids) = (RwLock::new(None), Vec::new());
        let mut encoder = Self { templates, tokens, options, reader, vision, info, shape, eos, blank_ids };
        encoder.blank_ids = encoder.find_blank_ids();
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
            && let Err(error) = &self.templates
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
        self.encode_with_images(row, bytes, &[])
    }

    /// Encodes one row with its images, those of [`TextEncoder::image_refs`] in their order.
    ///
    /// # Errors
    /// Why the row cannot be used.
    pub fn encode_with_images(
        &self,
        row: usize,
        bytes: &[u8],
        images: &[RowImage],
    ) -> std::result::Result<Outcome, RowProblem> {
        self.sample(bytes, images).map_err(|refusal| refusal.at(row))
    }

    /// Encodes rows on all cores; `indexes[i]` is the index of `rows[i]` in its source, `images[i]` its images (absent: none).
    pub fn encode_rows(
        &self,
        rows: &[&[u8]],
        indexes: &[u32],
        images: &[&[RowImage]],
    ) -> Vec<std::result::Result<Outcome, RowProblem>> {
        let encode = |(i, (bytes, &row)): (usize, (&&[u8], &u32))| {
            self.encode_with_images(row as usize, bytes, images.get(i).copied().unwrap_or_default())
        };
        rows.par_iter().zip(indexes).enumerate().map(encode).collect()
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
        self.reader.read(bytes, shape.as_ref())
    }

    /// The template of a record, which must write all of its roles.
    fn template_of(&self, record: &Record) -> std::result::Result<&Probed, Refusal> {
        let templates = self.templates.as_ref();
        let probed = templates.map_err(|error| Refusal::new(reason::TEMPLATE, error.message.clone()))?.choose(record);
        let ignored = |message: &Json| probed.ignored_roles.contains(&role(message));
        match record.messages.iter().position(ignored) {
            Some(i) => {
                let role = role(&record.messages[i]);
                let what = format!("messages[{i}]: the chat template leaves out messages of role `{role}`");
                Err(Refusal::new(reason::UNKNOWN_ROLE, what))
            }
            None => Ok(probed),
        }
    }

    fn append(&self, text: &str, whole: bool, ids: &mut Vec<u32>) -> std::result::Result<(), Refusal> {
        let failed = |error| Refusal::new(reason::TOKENS, format!("the tokenizer: {error}"));
        self.tokens.append(text, whole, ids).map_err(failed)
    }

    /// Tokenises text apart at the bounds of replies: generation begins exactly there, so training must too.
    fn cut_and_tokenize(&self, text: &str, replies: &[Reply]) -> std::result::Result<Tokenized, Refusal> {
        let mut tokens = Tokenized { ids: Vec::with_capacity(text.len() / 3), ..Tokenized::default() };
        let mut at = 0;
        for reply in replies {
            self.append(&text[at..reply.start], false, &mut tokens.ids)?;
            let first = tokens.ids.len();
            self.append(&text[reply.start..reply.end], false, &mut tokens.ids)?;
            tokens.replies.push((first, tokens.ids.len()));
            at = reply.end;
        }
        self.append(&text[at..], false, &mut tokens.ids)?;
        Ok(tokens)
    }

    fn sample(&self, bytes: &[u8], given: &[RowImage]) -> std::result::Result<Outcome, Refusal> {
        let mut encoded = match self.read(bytes)? {
            Row::Chat(record) => self.chat(record, given)?,
            Row::Text { texts, images, record_id, notes } => {
                let measured = self.measured(&images, given)?;
                self.check_texts(&texts)?;
                let mut text = with_images(&texts);
                let mut tokens = Tokenized::default();
                if let Some((eos, _)) = self.eos.as_ref().filter(|(eos, _)| !text.ends_with(eos.as_str())) {
                    text.push_str(eos);
                }
                self.append(&text, true, &mut tokens.ids)?;
                let Tokenized { ids, images, .. } = self.expand(tokens, &measured, &[])?;
                let mut runs = Vec::new();
                push_tokens(&mut runs, 0..ids.len(), 1.0, &images);
                Encoded { text, ids, runs, spans: Vec::new(), images, record_id, truncated: false, notes }
            }
            Row::Tokens { ids, trained, record_id, notes } => {
                if let Some(id) = ids.iter().find(|&&id| id as usize >= self.tokens.vocab_size) {
                    return Err(Refusal::new(
                        reason::TOKENS,
                        format!("token {id} is outside of the vocabulary of {}", self.tokens.vocab_size),
                    ));
                }
                if let Some(i) = self.vision.as_ref().and_then(|v| ids.iter().position(|&id| id == v.image_token_id)) {
                    let what = format!("input_ids[{i}] stands for an image, and the row has none");
                    return Err(Refusal::new(reason::IMAGE_TOKEN, what));
                }
                let mut runs = Vec::new();
                for trained in trained {
                    push_run(&mut runs, 1, if trained { 1.0 } else { 0.0 });
                }
                let (text, spans, images) = (String::new(), Vec::new(), Vec::new());
                Encoded { text, ids, runs, spans, images, record_id, truncated: false, notes }
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
                Truncation::Right => cut(&mut encoded, 0, limit)?,
                Truncation::Left => cut(&mut encoded, length - limit, length)?,
            }
            if encoded.target_tokens() == 0 {
                return Err(Refusal::new(
                    reason::NO_TARGET_LEFT,
                    format!("no target left after cutting {length} tokens to {limit}"),
                ));
            }
        }
        let only_ends = self.replies_without_text(&encoded);
        encoded.notes.add(NoteKind::EndTokenOnly, "", only_ends);
        Ok(Outcome::Sample(encoded))
    }

    fn chat(&self, record: Record, given: &[RowImage]) -> std::result::Result<Encoded, Refusal> {
        record.check_trainable()?;
        self.check_record(&record)?;
        let measured = self.measured(&record.images, given)?;
        let rendered = loss_mask::render(self.template_of(&record)?, &record, self.options.thinking, false)?;
        let tokens = self.cut_and_tokenize(&rendered.text, &rendered.replies)?;
        let Tokenized { ids, replies, images } = self.expand(tokens, &measured, &record.messages)?;
        let mut runs = Vec::new();
        let mut spans = Vec::new();
        let mut at = 0;
        for (reply, (first, end)) in rendered.replies.iter().zip(replies) {
            let weight = record.weights[reply.message];
            push_run(&mut runs, first - at, 0.0);
            push_tokens(&mut runs, first..end, weight, &images);
            if weight > 0.0 && end > first {
                spans.push(Span { message: reply.message, first, last: end - 1 });
            }
            at = end;
        }
        push_run(&mut runs, ids.len() - at, 0.0);
        let Record { record_id, mut notes, .. } = record;
        notes.append(rendered.notes);
        let text = rendered.text;
        Ok(Encoded { text, ids, runs, spans, images, record_id, truncated: false, notes })
    }
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
