//! A row's bytes become a record: messages, tools, and which replies are trained with what weight.
//! Knows the shapes that rows come in; knows nothing of templates or tokens.

mod json;
mod record;
mod shape;

pub use json::MAX_ROW_BYTES;
pub(crate) use json::{Json, parse};
pub(crate) use record::{REASONING, Record, Row, Standing, is_reply, role};
pub(crate) use shape::{Columns, Shape, keys};
