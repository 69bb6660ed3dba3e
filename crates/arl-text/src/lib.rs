//! Rows to tokens: a row's JSON bytes become a conversation, the checkpoint's chat template makes text of it, the
//! tokenizer makes tokens of that, and a cache on disk keeps them for training. The cache's file lock serves others too.
//! Of models it knows only which tokens stand for images; nothing of devices or Node. Its errors are `arl_model::Error`, and
//! `RowProblem` for a single row.

mod ascii_bpe;
mod cache;
mod encoder;
mod files;
mod lock;
mod loss_mask;
mod note;
mod options;
mod pack;
mod problem;
#[cfg(test)]
#[path = "../tests/common/property.rs"]
mod property;
mod row;
mod scratch;
mod system;
mod template;
mod tokenize;
mod vision;

pub use cache::{BatchImage, FillReport, MicroBatch, RowState, TokenCache};
pub use encoder::{Encoded, MeasuredImage, Outcome, Prompt, RowImage, Run, SampleImage, Span, TextEncoder, TextInfo};
pub use files::{ArrayRows, Content, decompress, json_array_rows, sniff};
pub use lock::FileLock;
pub use note::{Note, NoteCount, NoteKind, Notes};
pub use options::{Images, TextOptions, Thinking, Truncation};
pub use pack::pack;
pub use problem::RowProblem;
pub use row::{ImageRef, ImageSource, MAX_ROW_BYTES};
pub use scratch::ScratchFolder;
pub use vision::VisionTokens;
