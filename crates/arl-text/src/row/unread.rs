//! Keys with a value that nothing reads. What a key could mean is its author's; here it is only counted by its path.

use super::record::{Place, Reader};
use super::{Json, is_nothing};
use crate::note::{MORE, NoteKind, Notes};

/// Columns that say where a row comes from or how it fared; none of them can change what is trained.
const PROVENANCE: [&str; 13] = [
    "record_id",
    "reward",
    "step",
    "split",
    "scores",
    "advantages",
    "created_at_step",
    "logprobs",
    "id",
    "_id",
    "uuid",
    "_dataset_name",
    "__index_level_0__",
];

/// Paths of one row that are counted apart; the rest is counted under [`MORE`].
const MOST_PATHS: usize = 64;
/// Characters of a key that a report shows.
const LONGEST_KEY: usize = 80;

/// Notes what is left of a row after all that is read was taken out.
pub(super) fn of_row(row: &Json, notes: &mut Notes) {
    let Json::Object(entries) = row else { return };
    for (key, value) in entries {
        if !is_nothing(value) && !PROVENANCE.contains(&key.as_str()) {
            add("", key, notes);
        }
    }
}

/// Notes the keys of a message of `role` that neither this program nor the template reads.
pub(super) fn of_message(message: &Json, place: Place, role: &str, reader: &Reader, notes: &mut Notes) {
    let Json::Object(entries) = message else { return };
    for (key, value) in entries {
        let read = match key.as_str() {
            "role" | "content" | "tool_calls" | "tool_call_id" | "id" | "index" => true,
            "reasoning_content" | "thinking" | "reasoning" => role == "assistant",
            // Whether the template writes it is found out by rendering.
            "name" => true,
            _ => false,
        };
        if !read && !is_nothing(value) && !reader.template_reads(key) {
            add(&format!("{}[].", place.column), key, notes);
        }
    }
}

/// Notes what is left of a part of a message's content.
pub(super) fn of_part(rest: &[(String, Json)], column: &str, notes: &mut Notes) {
    for (key, value) in rest {
        if !is_nothing(value) {
            add(&format!("{column}[].content[]."), key, notes);
        }
    }
}

/// Notes one key.
pub(super) fn add(prefix: &str, key: &str, notes: &mut Notes) {
    let mut path = prefix.to_owned();
    path.extend(key.chars().take(LONGEST_KEY));
    if key.chars().nth(LONGEST_KEY).is_some() {
        path.push_str(MORE);
    }
    notes.add_at_most(MOST_PATHS, NoteKind::UnreadKey, &path, MORE);
}
