//! Weights in and out: a checkpoint's files against the table of tensors, and the writer of a folder that transformers
//! loads.

mod checkpoint;
mod file;

pub use checkpoint::Checkpoint;
pub use file::SafetensorsFile;
