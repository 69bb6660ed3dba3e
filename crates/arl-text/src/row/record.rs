//! One row as a record: its conversation checked, and the weight of each reply decided.

use std::collections::HashSet;
use std::fmt;

use arl_model::Result;

use super::advantages::{self, AdvantageFilter};
use super::image::ImageRef;
use super::message::{is_reply, role};
use super::pair;
use super::shape::{Columns, Shape, unknown_row};
use super::{
    Checked, Json, calls, is_nothing, is_python, media, message, parse, parts, preference, sharegpt, unread, wrong_kind,
};
use crate::note::{NoteKind, Notes};
use crate::options::{Images, TextOptions};
use crate::problem::{Refusal, reason};
use crate::vision::VisionTokens;

/// A conversation and what of it is trained.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    pub(crate) messages: Vec<Json>,
    pub(crate) tools: Option<Json>,
    /// `chat_template_kwargs`: more variables for the template.
    pub(crate) variables: Option<Json>,
    /// One for each message: 0 where it is not trained.
    pub(crate) weights: Vec<f32>,
    /// Images that are trained, in the order of their places.
    pub(crate) images: Vec<ImageRef>,
    pub(crate) record_id: Option<String>,
    /// What a user should know of the row all the same.
    pub(crate) notes: Notes,
    /// Why the conversation can be a prompt and not a sample.
    untrainable: Option<Refusal>,
}

impl Record {
    /// The conversation can be trained: it ends with a reply, and no trained reply is blank.
    ///
    /// # Errors
    /// Why it cannot.
    pub(crate) fn check_trainable(&self) -> Checked<()> {
        self.untrainable.clone().map_or(Ok(()), Err)
    }
}

/// A row of any shape.
#[derive(Clone, Debug)]
pub(crate) enum Row {
    Chat(Record),
    /// `texts`: what is before, between and behind the images; one more than there are images.
    Text {
        texts: Vec<String>,
        images: Vec<ImageRef>,
        record_id: Option<String>,
        notes: Notes,
    },
    /// `trained[i]`: token i is a target.
    Tokens {
        ids: Vec<u32>,
        trained: Vec<bool>,
        record_id: Option<String>,
        notes: Notes,
    },
}

/// A message's place in its row, for people: `messages[3]`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub(super) column: &'static str,
    pub(super) index: usize,
}

impl Place {
    pub(super) const MESSAGES: &'static str = "messages";
    pub(super) const TURNS: &'static str = "conversations";
}

impl fmt::Display for Place {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}[{}]", self.column, self.index)
    }
}

/// The messages of a row, and where in the row each is.
pub(super) struct Talk {
    pub(super) messages: Vec<Json>,
    column: &'static str,
    /// The index of each message in its column; nothing: it came from elsewhere in the row.
    own: Vec<Option<usize>>,
    /// Entries of the column; several may have become one message.
    count: usize,
}

impl Talk {
    /// Messages as a column has them.
    pub(super) fn new(column: &'static str, messages: Vec<Json>) -> Self {
        let count = messages.len();
        Self { messages, column, own: (0..count).map(Some).collect(), count }
    }

    fn of_turns(turns: Vec<Json>, notes: &mut Notes) -> Checked<Self> {
        let count = turns.len();
        let (messages, own) = sharegpt::messages(turns, Place::TURNS, notes)?;
        Ok(Self { messages, column: Place::TURNS, own: own.into_iter().map(Some).collect(), count })
    }

    /// Puts the row's `system` in front.
    fn begin_with(&mut self, system: Option<String>) -> Checked<()> {
        let Some(text) = system else { return Ok(()) };
        if let Some(first) = self.messages.first().filter(|message| role(message) == "system") {
            if first.get("content").and_then(Json::as_str) == Some(text.as_str()) {
                return Ok(());
            }
            let message = "`system` and the first message, of role system, differ; keep one of them";
            return Err(Refusal::new(reason::BAD_FIELD, message));
        }
        self.messages.insert(0, pair::message("system", text));
        self.own.insert(0, None);
        Ok(())
    }

    fn place(&self, message: usize) -> Place {
        Place { column: self.column, index: self.own.get(message).copied().flatten().unwrap_or(0) }
    }

    /// The message that entry `index` of the column became, or a part of.
    pub(super) fn find(&self, index: usize) -> Option<usize> {
        if index >= self.count {
            return None;
        }
        self.own.iter().rposition(|own| own.is_some_and(|own| own <= index))
    }

    /// Entries of the column.
    pub(super) fn own_count(&self) -> usize {
        self.count
    }
}

/// How rows are read.
#[derive(Default)]
pub(crate) struct Reader {
    pub(super) columns: Columns,
    pub(super) advantage_filter: AdvantageFilter,
    pub(super) images: Images,
    /// The model has a tower for images.
    sees: bool,
    /// The words of the chat templates.
    words: HashSet<String>,
}

impl Reader {
    /// `templates`: the texts of the chat templates.
    ///
    /// # Errors
    /// `ARL_CONFIG` for the name of a column that is not known.
    pub(crate) fn new<'a>(options: &TextOptions, templates: impl Iterator<Item = &'a str>) -> Result<Self> {
        let words = templates.flat_map(|text| text.split(|c: char| !c.is_alphanumeric() && c != '_'));
        Ok(Self {
            columns: Columns::new(&options.columns)?,
            advantage_filter: AdvantageFilter::from(options),
            images: options.images,
            // Where they are trained, what is wrong with the file is reported there.
            sees: options.vision.is_some()
                || VisionTokens::from_dir(&options.model_dir).is_ok_and(|found| found.is_some()),
            words: words.filter(|word| !word.is_empty()).map(str::to_owned).collect(),
        })
    }

    /// A template may look at this key of a message: its text has the word.
    pub(super) fn template_reads(&self, key: &str) -> bool {
        self.words.contains(key)
    }

    /// Why a medium that is not trained is refused.
    pub(super) fn why_refused(&self) -> &'static str {
        match self.images {
            Images::Train => "text and images are trained; videos and sounds are not built",
            _ if !self.sees => "this model reads text only",
            Images::Refuse => "text alone is trained (images error)",
            Images::Drop => "text alone is trained (images drop)",
        }
    }

    /// Whether a row of this text may have images; where not, it has none.
    pub(crate) fn may_have_images(&self, text: &str) -> bool {
        let names = ["images", "image"].map(|name| self.columns.of(name));
        // Letters may be spelt `\u0069`, some signs with a backslash alone.
        let is_plain = |name: &&str| !name.contains(['"', '\\', '/']);
        !names.iter().all(is_plain) || ["image", "\\u"].iter().chain(&names).any(|word| text.contains(word))
    }

    /// The shape of one row, if it is a known one.
    pub(crate) fn shape_of(&self, row: &Json) -> Option<Shape> {
        Shape::of(row, &self.columns)
    }

    /// What a row without a known shape lacks.
    pub(crate) fn unknown(&self, row: &Json) -> Refusal {
        unknown_row(row, &self.columns)
    }

    /// Reads a row. `shape`: what the source's rows look like; absent: this row's own.
    ///
    /// # Errors
    /// Why the row cannot be used.
    pub(crate) fn read(&self, bytes: &[u8], shape: Option<&Shape>) -> Checked<Row> {
        let columns = &self.columns;
        let mut row = parse(bytes)?;
        if !matches!(row, Json::Object(_)) {
            return Err(Refusal::new(reason::SHAPE, format!("the row is {}, not an object", row.kind())));
        }
        let shape = self.same_shape(&row, shape)?;
        let record_id = record_id(&mut row, columns)?;
        let mut notes = Notes::default();
        let pair = preference::of_pair(&row, columns);
        let talk = match shape {
            Shape::Text => return self.text(row, record_id, notes),
            Shape::Tokens => {
                let images = ["images", "image"].map(|name| columns.of(name));
                if self.images == Images::Train
                    && images.iter().any(|name| row.get(name).is_some_and(|v| !is_nothing(v)))
                {
                    let what = "a row of `input_ids` cannot have images: its tokens are not known to be theirs";
                    return Err(Refusal::new(reason::IMAGE, what));
                }
                return tokens(row, columns, record_id, notes);
            }
            Shape::Messages => {
                let mut talk = Talk::new(Place::MESSAGES, list(&mut row, columns, Place::MESSAGES)?);
                talk.begin_with(pair::system(&mut row, columns)?)?;
                talk
            }
            Shape::Conversations => {
                let mut talk = Talk::of_turns(list(&mut row, columns, Place::TURNS)?, &mut notes)?;
                talk.begin_with(pair::system(&mut row, columns)?)?;
                talk
            }
            Shape::Pair { prompt, completion } => pair::read(&mut row, columns, &prompt, &completion, &mut notes)?,
        };
        self.chat(row, talk, pair, record_id, notes)
    }

    fn same_shape(&self, row: &Json, shape: Option<&Shape>) -> Checked<Shape> {
        match (shape, self.shape_of(row)) {
            (None, Some(found)) => Ok(found),
            (Some(shape), Some(found)) if *shape == found => Ok(found),
            // A row may have several of the columns; what counts is that it has those of its source.
            (Some(shape), Some(found)) => Err(Refusal::new(
                reason::SHAPE,
                format!("the row looks like `{}`, the rows before it like `{}`", found.name(), shape.name()),
            )),
            (None | Some(Shape::Messages), None) => Err(self.unknown(row)),
            (Some(shape), None) => {
                let Refusal { reason, message } = self.unknown(row);
                let reason = if reason == reason::NO_MESSAGES { reason::SHAPE } else { reason };
                Err(Refusal::new(reason, format!("the rows before it look like `{}`; {message}", shape.name())))
            }
        }
    }

    /// Checks a conversation, and decides which replies are trained. `pair`: what its row is as preference data.
    fn chat(
        &self,
        mut row: Json,
        mut talk: Talk,
        pair: Option<Refusal>,
        record_id: Option<String>,
        mut notes: Notes,
    ) -> Checked<Row> {
        if talk.messages.is_empty() {
            return Err(Refusal::new(reason::NO_MESSAGES, "no messages: the list is empty"));
        }
        preference::check_verdict(&mut row)?;
        let mut images = media::place(&mut row, &mut talk, self, &mut notes)?;
        let tools = calls::tools(&mut row, &self.columns)?;
        let mut weights = Vec::with_capacity(talk.messages.len());
        let mut follows_reply = false;
        for i in 0..talk.messages.len() {
            let place = talk.place(i);
            let message = &mut talk.messages[i];
            weights.push(message::read(message, place, self, &mut images, &mut notes)?);
            let reply = is_reply(message);
            notes.add(NoteKind::ConsecutiveReplies, "", u32::from(follows_reply && reply));
            follows_reply = reply;
        }
        advantages::apply(&mut row, &talk, self, &mut weights)?;
        let variables = match row.remove("chat_template_kwargs") {
            None | Some(Json::Null) => None,
            Some(Json::Object(entries)) => Some(Json::Object(entries)),
            other => return Err(wrong_kind("chat_template_kwargs", other.as_ref(), "an object")),
        };
        unread::of_row(&row, &mut notes);
        let untrainable = untrainable(&talk, &weights, pair);
        let (messages, images) = (talk.messages, images.placed);
        Ok(Row::Chat(Record { messages, tools, variables, weights, images, record_id, notes, untrainable }))
    }

    fn text(&self, mut row: Json, record_id: Option<String>, mut notes: Notes) -> Checked<Row> {
        let text = match row.remove(self.columns.of("text")) {
            Some(Json::Str(text)) => text,
            other => return Err(wrong_kind("text", other.as_ref(), "a string")),
        };
        // Images have their places in it as in a message.
        let mut talk = Talk::new("text", vec![pair::message("user", text)]);
        let mut images = media::place(&mut row, &mut talk, self, &mut notes)?;
        unread::of_row(&row, &mut notes);
        let texts = match talk.messages.pop().and_then(|mut message| message.remove("content")) {
            Some(Json::Str(text)) if images.are_in("user", &text) => {
                let (place, parts) = (talk.place(0), vec![parts::text_part(&text)]);
                parts::around_images(&parts::read(parts, place, "user", self, &mut images, &mut notes)?.parts)
            }
            Some(Json::Str(text)) => vec![text],
            other => return Err(wrong_kind("text", other.as_ref(), "a string")),
        };
        Ok(Row::Text { texts, images: images.placed, record_id, notes })
    }
}

/// Why a conversation cannot be a sample. `pair`: what its row is as preference data.
fn untrainable(talk: &Talk, weights: &[f32], pair: Option<Refusal>) -> Option<Refusal> {
    if let Some(last) = talk.messages.last().filter(|message| !is_reply(message)) {
        let message = format!("the last message is of role {}, not from the assistant", role(last));
        return Some(pair.unwrap_or(Refusal::new(reason::LAST_MESSAGE, message)));
    }
    let blank = |(i, message): (usize, &Json)| {
        let what = (weights[i] > 0.0).then(|| message::blank(message))??;
        Some(Refusal::new(reason::BLANK_REPLY, format!("{}: {what}", talk.place(i))))
    };
    talk.messages.iter().enumerate().find_map(blank)
}

/// The list in a known column.
fn list(row: &mut Json, columns: &Columns, name: &str) -> Checked<Vec<Json>> {
    match row.remove(columns.of(name)) {
        Some(Json::Array(items)) => Ok(items),
        Some(Json::Str(text)) if is_python(&text) => {
            let message = format!("`{name}` is Python's text of a list, not a list: write it with json.dumps");
            Err(Refusal::new(reason::BAD_FIELD, message))
        }
        other => Err(wrong_kind(name, other.as_ref(), "an array")),
    }
}

fn record_id(row: &mut Json, columns: &Columns) -> Checked<Option<String>> {
    match row.remove(columns.of("record_id")) {
        None | Some(Json::Null) => Ok(None),
        Some(Json::Str(id)) => Ok(Some(id)),
        Some(Json::Int(id)) => Ok(Some(id.to_string())),
        Some(Json::BigInt(id)) => Ok(Some(id)),
        other => Err(wrong_kind("record_id", other.as_ref(), "a string")),
    }
}

fn tokens(mut row: Json, columns: &Columns, record_id: Option<String>, mut notes: Notes) -> Checked<Row> {
    let wrong = |what: String| Refusal::new(reason::TOKENS, what);
    let (ids_name, labels_name) = (columns.of("input_ids"), columns.of("labels"));
    let mut list = |name: &str| match row.remove(name) {
        None | Some(Json::Null) => Ok(None),
        Some(Json::Array(items)) => Ok(Some(items)),
        other => Err(wrong_kind(name, other.as_ref(), "an array of integers")),
    };
    let Some(items) = list(ids_name)? else { return Err(wrong_kind(ids_name, None, "an array of integers")) };
    let labels = list(labels_name)?;
    // What every tokenizer adds says nothing where all tokens count.
    if matches!(row.get("attention_mask"), Some(Json::Array(mask)) if mask.iter().all(|one| *one == Json::Int(1))) {
        row.remove("attention_mask");
    }
    let mut ids = Vec::with_capacity(items.len());
    for (i, item) in items.iter().enumerate() {
        match item {
            Json::Int(id) if (0..=i64::from(i32::MAX)).contains(id) => ids.push(*id as u32),
            _ => return Err(wrong(format!("{ids_name}[{i}] is not a token"))),
        }
    }
    let mut trained = vec![true; ids.len()];
    if let Some(labels) = labels {
        if labels.len() != ids.len() {
            return Err(wrong(format!("{} {labels_name} for {} {ids_name}", labels.len(), ids.len())));
        }
        for (i, label) in labels.iter().enumerate() {
            trained[i] = match label {
                Json::Int(-100) => false,
                Json::Int(label) if *label == i64::from(ids[i]) => true,
                _ => {
                    return Err(wrong(format!(
                        "{labels_name}[{i}] is neither -100 nor the token at the same place (labels are not shifted)"
                    )));
                }
            };
        }
    }
    unread::of_row(&row, &mut notes);
    Ok(Row::Tokens { ids, trained, record_id, notes })
}
