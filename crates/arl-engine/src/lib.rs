//! The training step: forward, loss, backward and optimizer, written once over a trait of leaf operations.

#![warn(missing_docs)]

pub mod backend;
