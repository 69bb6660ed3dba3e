//! Images, videos and sounds that a row has in columns next to its messages, with a word in the text where each is.

use super::image::{self, IMAGE_WORD, ImageRef, RowImages};
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
    Medium { columns: &["images", "image"], placeholder: IMAGE_WORD, part: "image" },
    Medium { columns: &["videos"], placeholder: "<video>", part: "video" },
    Medium { columns: &["audios"], placeholder: "<audio>", part: "audio" },
];

/// Leaves out what the columns hold, or refuses it, under the rule for image parts. Returns the images that are trained,
/// for their places in the messages.
pub(super) fn place(row: &mut Json, talk: &mut Talk, reader: &Reader, notes: &mut Notes) -> Checked<RowImages> {
    let mut images = RowImages::default();
    for medium in &MEDIA {
        let mut column = medium.columns[0];
        let mut items = Vec::new();
        let mut given = false;
        for &name in medium.columns {
            let value = row.remove(reader.columns.of(name));
            given |= value.is_some();
            let found = list(value, name)?;
            if !found.is_empty() {
                column = name;
                items.extend(found);
            }
        }
        let train = reader.images == Images::Train && medium.part == "image";
        if items.is_empty() && !(train && given) {
            let words = if train { count_words(talk, medium.placeholder) } else { 0 };
            notes.add(NoteKind::WordWithoutImage, "", words as u32);
            continue;
        }
        let places = check_places(medium, column, items.len(), talk)?;
        if train {
            images.where_words_are = places > 0;
            images.before_user = places == 0 && !items.is_empty();
            for (place, item) in items {
                let source = image::of_value(item, &format!("{column}[]."), notes)
                    .map_err(|what| Refusal::new(reason::BAD_FIELD, format!("`{place}` {what}")))?;
                images.queue.push_back(ImageRef { place, source });
            }
        } else {
            drop_or_refuse(medium, column, items.len(), talk, reader, notes)?;
        }
    }
    Ok(images)
}

fn plural(count: usize, one: &str) -> String {
    format!("{count} {one}{}", if count == 1 { "" } else { "s" })
}

/// How often the messages have the word.
fn count_words(talk: &Talk, placeholder: &str) -> usize {
    let mut words = 0;
    for message in &talk.messages {
        each_text(message, &mut |text| words += text.matches(placeholder).count());
    }
    words
}

/// Places in the messages, which must be as many as items, or none.
fn check_places(medium: &Medium, column: &str, items: usize, talk: &Talk) -> Checked<usize> {
    let Medium { placeholder, part, .. } = medium;
    let bare: usize = talk.messages.iter().map(|message| parts::bare(message, part)).sum();
    let places = count_words(talk, placeholder) + bare;
    if places > 0 && places != items {
        return Err(Refusal::new(
            reason::BAD_FIELD,
            format!("`{column}` has {}, the messages have {places} `{placeholder}`", plural(items, part)),
        ));
    }
    // As TRL does: what has no place belongs before the first message of the user.
    if places == 0 && items > 0 && !talk.messages.iter().any(|message| role(message) == "user") {
        let message = format!("`{column}` has {}, and no message of the user to put it in", plural(items, part));
        return Err(Refusal::new(reason::BAD_FIELD, message));
    }
    Ok(places)
}

fn drop_or_refuse(
    medium: &Medium,
    column: &str,
    items: usize,
    talk: &mut Talk,
    reader: &Reader,
    notes: &mut Notes,
) -> Checked<()> {
    let Medium { placeholder, part, .. } = medium;
    if reader.images != Images::Drop || *part != "image" {
        let what = format!("`{column}` has {}; {}", plural(items, part), reader.why_refused());
        return Err(Refusal::new(reason::IMAGE, what));
    }
    // Parts without an image of their own are counted where parts are read.
    let bare: usize = talk.messages.iter().map(|message| parts::bare(message, part)).sum();
    notes.add(NoteKind::DroppedImages, "", (items - bare) as u32);
    for message in &mut talk.messages {
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

/// What a column holds, each with its place; one alone need not be in a list.
fn list(value: Option<Json>, field: &str) -> Checked<Vec<(String, Json)>> {
    match value {
        None => Ok(Vec::new()),
        Some(value) if is_nothing(&value) => Ok(Vec::new()),
        Some(Json::Array(items)) => {
            let numbered = items.into_iter().enumerate().filter(|(_, item)| !is_nothing(item));
            Ok(numbered.map(|(i, item)| (format!("{field}[{i}]"), item)).collect())
        }
        Some(value @ (Json::Str(_) | Json::Object(_))) => Ok(vec![(field.to_owned(), value)]),
        other => Err(wrong_kind(field, other.as_ref(), "a list")),
    }
}
