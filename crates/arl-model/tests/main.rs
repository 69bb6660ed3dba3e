//! The crate's tests. One binary: each of its own would be linked and compiled with its own copy of what is generic.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "tests fail loudly, and report what they skip"
)]

mod adapter_base;
mod checkpoint;
mod common;
mod config;
mod folder;
mod format;
mod golden;
mod hybrid;
#[path = "../../arl-text/tests/common/property.rs"]
mod property;
mod refusals;
mod rope;
mod rope_axes;
mod safetensors_file;
mod save;
mod seeing;
mod shards;
mod tensors;
mod vision;
mod vision_files;
