//! The crate's tests. One binary: each of its own would be linked and compiled with its own copy of what is generic.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "tests fail loudly, and report what they skip"
)]

mod cache;
mod calls;
mod common;
mod files;
mod golden;
mod golden_images;
mod image_properties;
mod images;
mod left_out;
mod loss_mask;
mod media;
mod named_templates;
mod notes;
mod open;
mod preference;
mod prompt_templates;
mod properties;
mod row_forms;
mod rows;
mod scratch;
mod template;
