//! The crate's tests. One binary: each of its own would be linked and compiled with its own copy of what is generic.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "tests fail loudly, and report what they skip"
)]

mod bits;
mod common;
mod context_parallel;
mod delta;
mod engine;
mod evaluate;
mod expert_parallel;
mod fp16;
mod frozen;
mod golden;
mod hybrid;
mod invariance;
mod logits_16bit;
mod lora;
mod lora_kinds;
mod mesh_adapters;
mod model_folder;
mod nf4;
mod nf4_ranks;
mod pipeline_parallel;
mod plan;
mod queue;
mod ranks;
mod replicas;
mod state;
mod stochastic_rounding;
mod tensor_parallel;
mod vision;
mod vision_frozen;
mod vision_ranks;
mod zero;
mod zero_state;
