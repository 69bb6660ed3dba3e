//! What a Qwen checkpoint is: `config.json` in both of its spellings, the table of tensor names and shapes,
//! and safetensors files in and out. Knows nothing of text, devices or training.

#![warn(missing_docs)]

mod error;

pub use error::{Error, ErrorCode, Result};
