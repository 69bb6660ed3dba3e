//! A row's bytes become a record: messages, tools, and which replies are trained with what weight.
//! Knows the shapes that rows come in; knows nothing of templates or tokens.

mod advantages;
mod calls;
mod image;
mod json;
mod media;
mod message;
mod pair;
mod parts;
mod preference;
mod record;
mod shape;
mod sharegpt;
mod unread;

pub use image::{ImageRef, ImageSource};
pub use json::MAX_ROW_BYTES;
pub(crate) use json::{Json, parse};
pub(crate) use message::{REASONING, image_count, is_reply, role};
pub(crate) use parts::{image_part, text_part};
pub(crate) use record::{Reader, Record, Row};
pub(crate) use shape::Shape;

use crate::problem::{Refusal, reason};

/// What reading gives, or why the row cannot be used.
type Checked<T> = std::result::Result<T, Refusal>;

/// A column or key whose value has another kind than it must have.
fn wrong_kind(field: &str, found: Option<&Json>, wanted: &str) -> Refusal {
    let found = found.map_or("missing", Json::kind);
    Refusal::new(reason::BAD_FIELD, format!("`{field}` is {found}, not {wanted}"))
}

/// A value that says nothing: null, or empty.
fn is_nothing(value: &Json) -> bool {
    match value {
        Json::Null => true,
        Json::Str(text) => text.is_empty(),
        Json::Array(items) => items.is_empty(),
        Json::Object(entries) => entries.is_empty(),
        Json::Bool(_) | Json::Int(_) | Json::BigInt(_) | Json::Float(_) => false,
    }
}

/// The text of a list or a dict as Python prints it, which texts that should be JSON most often are.
fn is_python(text: &str) -> bool {
    let text = text.trim_start();
    let inner = text.trim_start_matches(|c: char| c == '[' || c == '{' || c.is_whitespace());
    text.starts_with(['[', '{']) && inner.starts_with('\'')
}
