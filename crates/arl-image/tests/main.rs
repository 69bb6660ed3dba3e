//! The crate's tests. One binary: each of its own would be linked and compiled with its own copy of what is generic.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "tests fail loudly, and report what they skip"
)]

mod bad;
mod common;
mod config;
mod formats;
mod golden;
