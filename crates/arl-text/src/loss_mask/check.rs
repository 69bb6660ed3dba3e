//! Whether everything that a row says is in its rendered text. Texts are searched for in their order, each where its message
//! must be; a text that the template could have written by itself is looked for by its marker instead.

use std::ops::Range;

use crate::row::{Json, REASONING, is_reply};
use crate::template::python;

use super::Reply;
use super::calls::{function_of, value_of};
use super::probe::{Probed, Replies};
use super::sentinels::{Sentinels, tracked_text};
use super::thinking::{self, Part};

/// A piece of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum What {
    Content,
    Reasoning,
    /// The name of a call.
    Call,
    /// The arguments of this call.
    Arguments(usize),
}

/// What is not in the text, and of which message.
pub(super) type Lost = Vec<(What, usize)>;

/// Longer texts are no accident: where the template writes one by itself, it says what the row says.
const SHORT: usize = 24;
/// Beginnings of a text that are tried one by one.
const TRIES: usize = 64;

/// What a search of the text found.
pub(super) struct Found {
    pub(super) lost: Lost,
    /// What may have been found where the template wrote the same by itself.
    pub(super) doubtful: Lost,
}

impl Found {
    /// Where sentinels cannot settle a doubt.
    pub(super) fn lost_or_doubtful(mut self) -> Lost {
        self.lost.append(&mut self.doubtful);
        self.lost
    }
}

/// Searches the text for everything that the messages say. `inlined`: the sentinels again, where reasoning was written into
/// contents.
pub(super) fn search(
    probed: &Probed,
    messages: &[Json],
    (sentinels, inlined): (Sentinels, Option<Sentinels>),
    text: &str,
    replies: &[Reply],
) -> Found {
    let literals = &probed.template.literals;
    let image = Some(sentinels.image());
    let mut search = Search { text, literals, inlined, image, range: 0..0, lost: Vec::new(), doubtful: Vec::new() };
    let mut next = replies.iter().peekable();
    for (i, message) in messages.iter().enumerate() {
        if !is_reply(message) {
            search.range.end = next.peek().map_or(text.len(), |reply| reply.start);
            search.text_of((What::Content, i), content(message));
            continue;
        }
        // Generation tags may leave a part of a reply out; elsewhere all of a reply is trained.
        if let Some(reply) = next.peek().filter(|_| !matches!(probed.replies, Replies::Marked)) {
            search.range.start = search.range.start.max(reply.start);
        }
        while let Some(reply) = next.next_if(|reply| reply.message <= i) {
            search.range.end = reply.end;
        }
        search.reply(message, i);
        search.range.start = search.range.end;
    }
    Found { lost: search.lost, doubtful: search.doubtful }
}

/// Whether every tool's name, description and parameters are in the text.
pub(super) fn has_tools(text: &str, tools: &Json) -> bool {
    let Json::Array(tools) = tools else { return true };
    let mut search = Search {
        text,
        literals: "",
        inlined: None,
        image: None,
        range: 0..text.len(),
        lost: Vec::new(),
        doubtful: Vec::new(),
    };
    for tool in tools {
        let function = function_of(tool);
        for key in ["name", "description"] {
            search.text_of((What::Content, 0), function.get(key).and_then(Json::as_str).unwrap_or_default());
        }
        if let Some(Json::Object(parameters)) = function.get("parameters").and_then(|p| p.get("properties")) {
            let found = |key: &String| text[search.range.clone()].contains(key.as_str());
            if !parameters.iter().all(|(key, _)| found(key)) {
                return false;
            }
        }
    }
    search.lost.is_empty()
}

fn content(message: &Json) -> &str {
    message.get("content").and_then(Json::as_str).unwrap_or_default()
}

struct Search<'a> {
    text: &'a str,
    literals: &'a str,
    inlined: Option<Sentinels>,
    /// What stands for an image in contents.
    image: Option<char>,
    /// Where the next piece may be.
    range: Range<usize>,
    lost: Lost,
    doubtful: Lost,
}

impl Search<'_> {
    fn reply(&mut self, message: &Json, i: usize) {
        if let Some(Json::Str(reasoning)) = message.get(REASONING[0]) {
            self.text_of((What::Reasoning, i), reasoning);
        }
        for (part, text) in thinking::parts(content(message), self.inlined) {
            match part {
                Part::Said => self.text_of((What::Content, i), text),
                Part::Thought => self.text_of((What::Reasoning, i), text),
                Part::Tag => {}
            }
        }
        let Some(Json::Array(calls)) = message.get("tool_calls") else { return };
        for (j, call) in calls.iter().enumerate() {
            let function = function_of(call);
            self.text_of((What::Call, i), function.get("name").and_then(Json::as_str).unwrap_or_default());
            match function.get("arguments") {
                Some(Json::Str(text)) => self.text_of((What::Arguments(j), i), text),
                Some(arguments) => self.value((What::Arguments(j), i), arguments),
                None => {}
            }
        }
    }

    /// The arguments of a call: as one JSON text, else each key and value.
    fn value(&mut self, piece: (What, usize), value: &Json) {
        match python::dumps(value).ok().and_then(|json| self.find(&json)) {
            Some(end) => self.range.start = end,
            None => self.leaves(piece, value),
        }
    }

    fn leaves(&mut self, piece: (What, usize), value: &Json) {
        match value {
            Json::Str(text) => self.text_of(piece, text),
            Json::Array(items) => items.iter().for_each(|item| self.leaves(piece, item)),
            Json::Object(entries) => entries.iter().for_each(|(key, value)| {
                // A key is never without its value; what it is named is often in the template too.
                let doubtful = self.doubtful.len();
                self.text_of(piece, key);
                self.doubtful.truncate(doubtful);
                self.leaves(piece, value);
            }),
            scalar => {
                // Numbers, truth and null: as JSON or as Python writes them.
                let value = python::value_of(scalar, &str::to_owned);
                let texts = [python::dumps(scalar).ok(), python::str(&value).ok()];
                match texts.iter().flatten().find_map(|text| self.find(text)) {
                    Some(end) => self.range.start = end,
                    None => self.lost.push(piece),
                }
            }
        }
    }

    fn text_of(&mut self, piece: (What, usize), text: &str) {
        if let Some(image) = self.image.filter(|&image| text.contains(image)) {
            return text.split(image).for_each(|text| self.text_of(piece, text));
        }
        let text = text.trim();
        if text.is_empty() {
            return;
        }
        match self.find(text).or_else(|| self.find_escaped(text)) {
            Some(end) => {
                self.range.start = end;
                if text.len() <= SHORT && self.literals.contains(text) {
                    self.doubtful.push(piece);
                }
            }
            None => self.lost.push(piece),
        }
    }

    fn find_escaped(&self, text: &str) -> Option<usize> {
        if !text.bytes().any(|byte| byte < b' ' || byte == b'"' || byte == b'\\') {
            return None;
        }
        let quoted = python::dumps(&Json::Str(text.to_owned())).ok()?;
        self.find(&quoted[1..quoted.len() - 1])
    }

    /// The end of the first place in the range where the text is.
    fn find(&self, text: &str) -> Option<usize> {
        let range = self.range.start.min(self.range.end)..self.range.end;
        let hay = &self.text[range.clone()];
        // A text mostly begins right here; searching for its beginning spares preparing a search for all of it.
        let head = &text[..(0..=text.len().min(SHORT)).rev().find(|&n| text.is_char_boundary(n)).unwrap_or(0)];
        let mut at = 0;
        for _ in 0..TRIES {
            let place = at + hay[at..].find(head)?;
            if hay[place..].starts_with(text) {
                return Some(range.start + place + text.len());
            }
            at = place + hay[place..].chars().next().map_or(1, char::len_utf8);
        }
        hay[at..].find(text).map(|place| range.start + at + place + text.len())
    }
}

/// Messages whose pieces have sentinels, and how many each.
pub(super) struct Tracked {
    pub(super) messages: Vec<Json>,
    pieces: Vec<(What, usize, u32)>,
}

impl Tracked {
    pub(super) fn new(messages: &[Json], sentinels: Sentinels) -> Self {
        let mut own = Self { messages: messages.to_vec(), pieces: Vec::new() };
        for (i, message) in own.messages.iter_mut().enumerate() {
            let mut tracker = Tracker { pieces: &mut own.pieces, sentinels, message: i };
            if is_reply(message) {
                tracker.reply(message);
            } else if let Some(Json::Str(text)) = value_of(message, "content") {
                *text = tracker.track(What::Content, text);
            }
        }
        own
    }

    /// What has not all of its sentinels among these.
    pub(super) fn lost(&self, found: &[u32]) -> Lost {
        let mut counts = vec![0; self.pieces.len()];
        for &index in found {
            if let Some(count) = counts.get_mut(index as usize) {
                *count += 1;
            }
        }
        let missing = self.pieces.iter().zip(counts).filter(|((_, _, sentinels), count)| count < sentinels);
        missing.map(|(&(what, message, _), _)| (what, message)).collect()
    }
}

struct Tracker<'a> {
    pieces: &'a mut Vec<(What, usize, u32)>,
    sentinels: Sentinels,
    message: usize,
}

impl Tracker<'_> {
    fn track(&mut self, what: What, text: &str) -> String {
        let image = self.sentinels.image();
        if text.contains(image) {
            let texts: Vec<String> = text.split(image).map(|text| self.track(what, text)).collect();
            return texts.join(&image.to_string());
        }
        let (text, count) = tracked_text(text, &self.sentinels.piece(self.pieces.len() as u32));
        self.pieces.push((what, self.message, count));
        text
    }

    fn reply(&mut self, message: &mut Json) {
        if let Some(Json::Str(reasoning)) = message.get(REASONING[0]) {
            let reasoning = self.track(What::Reasoning, &reasoning.clone());
            for name in REASONING {
                if let Some(value @ Json::Str(_)) = value_of(message, name) {
                    *value = Json::Str(reasoning.clone());
                }
            }
        }
        if let Some(Json::Str(text)) = value_of(message, "content") {
            let (content, sentinels) = (text.clone(), self.sentinels);
            let track = |(part, text): (Part, &str)| match part {
                Part::Said => self.track(What::Content, text),
                Part::Thought => self.track(What::Reasoning, text),
                Part::Tag => text.to_owned(),
            };
            *text = thinking::parts(&content, Some(sentinels)).into_iter().map(track).collect();
        }
        let Some(Json::Array(calls)) = value_of(message, "tool_calls") else { return };
        for (j, call) in calls.iter_mut().enumerate() {
            let wrapped = matches!(call.get("function"), Some(Json::Object(_)));
            let Some(function) = (if wrapped { value_of(call, "function") } else { Some(call) }) else { continue };
            if let Some(Json::Str(name)) = value_of(function, "name") {
                *name = self.track(What::Call, name);
            }
            if let Some(arguments) = value_of(function, "arguments") {
                self.strings(What::Arguments(j), arguments);
            }
        }
    }

    /// Every key and string of a value.
    fn strings(&mut self, what: What, value: &mut Json) {
        match value {
            Json::Str(text) => *text = self.track(what, text),
            Json::Array(items) => items.iter_mut().for_each(|item| self.strings(what, item)),
            Json::Object(entries) => entries.iter_mut().for_each(|(key, value)| {
                *key = self.track(what, key);
                self.strings(what, value);
            }),
            _ => {}
        }
    }
}
