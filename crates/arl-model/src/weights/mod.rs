//! Weights in and out: a checkpoint's files, checked against the table of parameters; safetensors files of any content;
//! and the folder that transformers loads.

mod checkpoint;
mod file;
mod pieces;
mod save;
mod shards;
mod writer;

pub use checkpoint::Checkpoint;
pub use file::SafetensorsFile;
pub use pieces::SharedModel;
pub use save::{MAX_SHARD_BYTES, save_model, sync_folder};
pub(crate) use shards::{INDEX, SINGLE};
pub(crate) use writer::refused;
pub use writer::{SafetensorsWriter, TensorDecl};
