//! What a Qwen checkpoint is: `config.json` in both of its spellings, the table of parameters, the table of what weights
//! files call them and how they store them, safetensors files in and out, the small files of a model folder, and adapters. Knows
//! nothing of text, devices or training.

#![warn(missing_docs)]

mod config;
mod error;
mod folder;
mod format;
mod freeze;
mod init;
mod lora;
mod nf4;
mod rope;
mod tensors;
mod weights;

pub use config::{
    DeltaConfig, Family, LayerConfig, Mixer, Mlp, ModelConfig, MoeConfig, RopeAxes, RopeConfig, RopeScaling,
    VisionConfig, VisionKind, WeightDtype,
};
pub use error::{Error, ErrorCode, Result};
pub use folder::{ExportOverrides, ModelFiles, Placeholder, unreadable};
pub use format::CheckpointFormat;
pub use freeze::{FreezePart, freeze_patterns};
pub use init::init_f32;
pub use lora::{Adapter, AdapterFile, Lora, LoraBias, LoraConfig, ModuleNames, merge_adapter, save_adapter};
pub use nf4::{NF4_BLOCK, NF4_NESTED_BLOCK, NF4_VALUES, Nf4, Nf4Builder, Nf4Scales, nf4_scale_values};
pub use rope::RopeTable;
pub use safetensors::Dtype;
pub use tensors::{Block, Projection, Role, Shard, Slice, TensorSpec, tensor_table};
pub use weights::{
    Checkpoint, MAX_SHARD_BYTES, SafetensorsFile, SafetensorsWriter, SharedModel, TensorDecl, save_model, sync_folder,
};
