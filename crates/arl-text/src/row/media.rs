//! Images, videos and sounds that a row has in columns next to its messages, with a word in the text where each is.

use super::message::role;
use super::parts;
use super::record::{Reader, Talk};
use super::{Checked, Json, is_nothing, wrong_kind};
use crate::note::{NoteKind, Notes};
use crate::options::Images;
use crate::problem::{Refusal, reason};

/// What such a column holds.
struct Medium {
    /// The columns; the second is TRL's name for a single one.
    columns: &'static [&'static str],
    placeholder: &'static str,
    /// The type of a part that is filled from the column.
    part: &'static str,
}

const MEDIA: [Medium; 3] = [
    Medium { columns: &["images", "image"], placeholder: "<image>", part: "image" },
    Medium { columns: &["videos"], placeholder: "<video>", part: "video" },
    Medium { columns: &["audios"], placeholder: "<audio>", part: "audio" },
];

/// Puts what the columns hold where the messages say it is, under the rule for image parts.
pub(super) fn place(row: &mut Json, talk: &mut Talk, reader: &Reader, notes: &mut Notes) -> Checked<()> {
    for medium in &MEDIA {
        let mut column = medium.columns[0];
        let mut items = 0;
        for &name in medium.columns {
            let found = count(row.remove(reader.columns.of(name)), name)?;
            if found > 0 {
                column = name;
                items += found;
            }
        }
        if items > 0 {
            place_one(medium, column, items, talk, reader.images, notes)?;
        }
    }
    Ok(())
}

fn place_one(
    medium: &Medium,
    column: &str,
    items: usize,
    talk: &mut Talk,
    images: Images,
    notes: &mut Notes,
) -> Checked<()> {
    let Medium { placeholder, part, .. } = medium;
    let (mut words, mut bare) = (0, 0);
    for message in &talk.messages {
        each_text(message, &mut |text| words += text.matches(placeholder).count());
        bare += parts::bare(message, part);
    }
    let places = words + bare;
    let plural = |count: usize, one: &str| format!("{count} {one}{}", if count == 1 { "" } else { "s" });
    if places > 0 && places != items {
        return Err(Refusal::new(
            reason::BAD_FIELD,
            format!("`{column}` has {}, the messages have {places} `{placeholder}`", plural(items, part)),
        ));
    }
    // As TRL does: what has no place belongs before the first message of the user.
    if places == 0 && !talk.messages.iter().any(|message| role(message) == "user") {
        let message = format!("`{column}` has {}, and no message of the user to put it in", plural(items, part));
        return Err(Refusal::new(reason::BAD_FIELD, message));
    }
    if images == Images::Refuse || *part != "image" {
        return Err(Refusal::new(
            reason::IMAGE,
            format!("`{column}` has {}; this model reads text only", plural(items, part)),
        ));
    }
    // Parts without an image of their own are counted where parts are read.
    notes.add(NoteKind::DroppedImages, "", (items - bare) as u32);
    for message in talk.messages.iter_mut().filter(|_| words > 0) {
        let Some(content) = message.get_mut("content") else { continue };
        match content {
            Json::Str(text) => {
                let dropped = remove(text, placeholder);
                notes.add(NoteKind::EmptiedMessages, "", u32::from(dropped && text.is_empty()));
            }
            Json::Array(items) => {
                for text in items.iter_mut().filter_map(parts::text_mut) {
                    remove(text, placeholder);
                }
            }
            _ => {}
        }
    }
    Ok(())
}

fn remove(text: &mut String, placeholder: &str) -> bool {
    let found = text.contains(placeholder);
    if found {
        *text = text.replace(placeholder, "");
    }
    found
}

/// Calls `see` on the text of a message and of its parts.
fn each_text(message: &Json, see: &mut impl FnMut(&str)) {
    match message.get("content") {
        Some(Json::Str(text)) => see(text),
        Some(Json::Array(items)) => items.iter().filter_map(parts::text).for_each(see),
        _ => {}
    }
}

/// How many a column holds; one alone need not be in a list.
fn count(value: Option<Json>, field: &str) -> Checked<usize> {
    match value {
        None => Ok(0),
        Some(value) if is_nothing(&value) => Ok(0),
        Some(Json::Array(items)) => Ok(items.iter().filter(|item| !is_nothing(item)).count()),
        Some(Json::Str(_) | Json::Object(_)) => Ok(1),
        other => Err(wrong_kind(field, other.as_ref(), "a list")),
    }
}
