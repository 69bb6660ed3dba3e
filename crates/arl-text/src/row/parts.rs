//! The parts of a message's content: OpenAI's, which have a `text`, and those of LLaMA-Factory's v1 rows, which have a `value`.

use super::image::{self, IMAGE_WORD, ImageRef, RowImages};
use super::record::{Place, Reader};
use super::{Checked, Json, calls, is_nothing, unread};
use crate::note::{NoteKind, Notes};
use crate::options::Images;
use crate::problem::{Refusal, reason};

/// What the parts of one message amount to.
#[derive(Default)]
pub(super) struct Content {
    /// The texts with nothing between them: every template takes a string, and those that take parts write them so.
    pub(super) text: String,
    pub(super) reasoning: String,
    pub(super) calls: Vec<Json>,
    /// The same texts, and a bare part for each image that is trained; without such images nobody needs them.
    pub(super) parts: Vec<Json>,
    /// Images among the parts.
    pub(super) images: usize,
}

impl Content {
    fn add_text(&mut self, text: &str) {
        self.text.push_str(text);
        match self.parts.last_mut().and_then(text_mut) {
            Some(last) => last.push_str(text),
            None if text.is_empty() => {}
            None => self.parts.push(text_part(text)),
        }
    }

    fn add_image(&mut self) {
        self.images += 1;
        self.parts.push(image_part());
    }

    /// The same for the next image of a column; nothing where there is none.
    fn add_next(&mut self, images: &mut RowImages) -> Option<()> {
        images.placed.push(images.queue.pop_front()?);
        self.add_image();
        Some(())
    }

    /// Adds text with images where their words are.
    fn add_text_and_images(&mut self, text: &str, images: &mut RowImages) {
        if !images.where_words_are {
            return self.add_text(text);
        }
        let mut rest = text;
        while let Some((before, behind)) = rest.split_once(IMAGE_WORD) {
            self.add_text(before);
            // There are as many as places.
            self.add_next(images);
            rest = behind;
        }
        self.add_text(rest);
    }
}

/// A part of text.
pub(crate) fn text_part(text: &str) -> Json {
    Json::Object(vec![
        ("type".to_owned(), Json::Str("text".to_owned())),
        ("text".to_owned(), Json::Str(text.to_owned())),
    ])
}

/// A part that says that an image is here.
pub(crate) fn image_part() -> Json {
    Json::Object(vec![("type".to_owned(), Json::Str("image".to_owned()))])
}

/// Reads the parts of a message of `role` at `place`; the images that are trained go to `images`.
pub(super) fn read(
    parts: Vec<Json>,
    place: Place,
    role: &str,
    reader: &Reader,
    images: &mut RowImages,
    notes: &mut Notes,
) -> Checked<Content> {
    let reply = role == "assistant";
    let mut content = Content::default();
    if role == "user" && std::mem::take(&mut images.before_user) {
        while content.add_next(images).is_some() {}
    }
    let (mut dropped, mut kept) = (0, 0);
    for (i, mut part) in parts.into_iter().enumerate() {
        let wrong = |what: String| Refusal::new(reason::BAD_MESSAGE, format!("{place}.content[{i}]: {what}"));
        let kind = match part.remove("type") {
            Some(Json::Str(kind)) => kind,
            Some(other) if !other.is_null() => return Err(wrong(format!("`type` is {}, not a string", other.kind()))),
            _ => return Err(wrong("`type` is missing".to_owned())),
        };
        match kind.as_str() {
            "text" => {
                let text = text_of(&mut part).map_err(wrong)?;
                if !content.calls.is_empty() && !text.trim().is_empty() {
                    return Err(wrong("text after a call; a turn is reasoning, then text, then calls".to_owned()));
                }
                content.add_text_and_images(&text, images);
            }
            "reasoning" if reply => {
                let text = text_of(&mut part).map_err(wrong)?;
                if !content.calls.is_empty() || !content.text.trim().is_empty() || content.images > 0 {
                    let what = "reasoning after text or a call; a turn is reasoning, then text, then calls";
                    return Err(wrong(what.to_owned()));
                }
                content.reasoning.push_str(&text);
            }
            "tool_call" if reply => {
                let value = part.remove("value").unwrap_or(Json::Null);
                content.calls.extend(calls::of_value(value, "the call in `value`").map_err(wrong)?);
            }
            "reasoning" | "tool_call" => {
                return Err(wrong(format!("a part of type {kind} in a message that is not the assistant's")));
            }
            "image_url" | "image" if reader.images == Images::Drop => {
                dropped += 1;
                continue;
            }
            "image_url" | "image" | "input_image" if reader.images == Images::Train => {
                if !content.calls.is_empty() {
                    return Err(wrong("an image after a call; a turn is text and images, then calls".to_owned()));
                }
                let prefix = format!("{}[].content[].", place.column);
                let found = image::of_part(&mut part, &prefix, notes).map_err(wrong)?;
                let placed = match found {
                    Some(source) => {
                        images.placed.push(ImageRef { place: format!("{place}.content[{i}]"), source });
                        content.add_image();
                        Some(())
                    }
                    None if kind == "image" && has_nothing(&part) => content.add_next(images),
                    None => None,
                };
                if placed.is_none() {
                    let what = format!("{place}.content[{i}]: a part of type {kind} without an image");
                    return Err(Refusal::new(reason::NO_IMAGE, what));
                }
            }
            "image_url" | "image" | "input_image" | "video" | "video_url" | "audio" | "audio_url" | "input_audio" => {
                let what = format!("{place}.content[{i}]: a part of type {kind}; {}", reader.why_refused());
                return Err(Refusal::new(reason::IMAGE, what));
            }
            _ => return Err(wrong(format!("unknown type `{kind}`"))),
        }
        kept += 1;
        if let Json::Object(rest) = &part {
            unread::of_part(rest, place.column, notes);
        }
    }
    notes.add(NoteKind::DroppedImages, "", dropped);
    notes.add(NoteKind::EmptiedMessages, "", u32::from(dropped > 0 && kept == 0));
    Ok(content)
}

/// Takes the text out of a part that has one.
fn text_of(part: &mut Json) -> Result<String, String> {
    let (name, value) = match part.remove("text") {
        None | Some(Json::Null) => match part.remove("value") {
            None => ("text", None),
            value => ("value", value),
        },
        text => ("text", text),
    };
    match value {
        Some(Json::Str(text)) => Ok(text),
        other => Err(format!("`{name}` is {}, not a string", other.as_ref().map_or("missing", Json::kind))),
    }
}

/// The text of a part that has one.
pub(super) fn text(part: &Json) -> Option<&str> {
    let text = part.get("text").filter(|text| !text.is_null());
    text.or_else(|| part.get("value")).filter(|_| is(part, "text"))?.as_str()
}

/// The same, to be changed.
pub(super) fn text_mut(part: &mut Json) -> Option<&mut String> {
    if !is(part, "text") {
        return None;
    }
    let name = if part.get("text").is_some_and(|text| !text.is_null()) { "text" } else { "value" };
    match part.get_mut(name)? {
        Json::Str(text) => Some(text),
        _ => None,
    }
}

/// The texts before, between and behind the images among parts.
pub(super) fn around_images(parts: &[Json]) -> Vec<String> {
    let mut texts = vec![String::new()];
    for part in parts {
        match (text(part), texts.last_mut()) {
            (Some(text), Some(last)) => last.push_str(text),
            _ => texts.push(String::new()),
        }
    }
    texts
}

/// How many parts of a message are of this type and hold nothing: a column of the row has what belongs there.
pub(super) fn bare(message: &Json, kind: &str) -> usize {
    let empty = |part: &&Json| is(part, kind) && has_nothing(part);
    match message.get("content") {
        Some(Json::Array(parts)) => parts.iter().filter(empty).count(),
        _ => 0,
    }
}

/// Beyond its type a part says nothing.
fn has_nothing(part: &Json) -> bool {
    matches!(part, Json::Object(entries) if entries.iter().all(|(key, value)| key == "type" || is_nothing(value)))
}

fn is(part: &Json, kind: &str) -> bool {
    part.get("type").and_then(Json::as_str) == Some(kind)
}
