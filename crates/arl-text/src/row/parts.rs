//! The parts of a message's content: OpenAI's, which have a `text`, and those of LLaMA-Factory's v1 rows, which have a `value`.

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
}

/// Reads the parts of a message at `place`.
pub(super) fn read(
    parts: Vec<Json>,
    place: Place,
    reply: bool,
    reader: &Reader,
    notes: &mut Notes,
) -> Checked<Content> {
    let mut content = Content::default();
    let (mut images, mut kept) = (0, 0);
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
                if content.text.is_empty() { content.text = text } else { content.text.push_str(&text) }
            }
            "reasoning" if reply => {
                let text = text_of(&mut part).map_err(wrong)?;
                if !content.calls.is_empty() || !content.text.trim().is_empty() {
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
                images += 1;
                continue;
            }
            "image_url" | "image" | "input_image" | "video" | "video_url" | "audio" | "audio_url" | "input_audio" => {
                return Err(Refusal::new(
                    reason::IMAGE,
                    format!("{place}.content[{i}]: a part of type {kind}; this model reads text only"),
                ));
            }
            _ => return Err(wrong(format!("unknown type `{kind}`"))),
        }
        kept += 1;
        if let Json::Object(rest) = &part {
            unread::of_part(rest, place.column, notes);
        }
    }
    notes.add(NoteKind::DroppedImages, "", images);
    notes.add(NoteKind::EmptiedMessages, "", u32::from(images > 0 && kept == 0));
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

/// How many parts of a message are of this type and hold nothing: a column of the row has what belongs there.
pub(super) fn bare(message: &Json, kind: &str) -> usize {
    let empty = |part: &&Json| match part {
        Json::Object(entries) => {
            is(part, kind) && entries.iter().all(|(key, value)| key == "type" || is_nothing(value))
        }
        _ => false,
    };
    match message.get("content") {
        Some(Json::Array(parts)) => parts.iter().filter(empty).count(),
        _ => 0,
    }
}

fn is(part: &Json, kind: &str) -> bool {
    part.get("type").and_then(Json::as_str) == Some(kind)
}
