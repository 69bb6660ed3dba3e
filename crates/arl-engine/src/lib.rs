//! The training step: forward, loss, backward and optimizer, written once over a trait of leaf operations.

#![warn(missing_docs)]

// The helpers of the tests in `tests/` name the crate as their users do.
#[cfg(test)]
extern crate self as arl_engine;

mod adapter;
mod attention;
pub mod backend;
mod batch;
mod blocks;
mod engine;
mod evaluate;
mod events;
mod flops;
mod generate;
mod inspect;
mod kept;
mod logits_rows;
mod loss_scale;
mod mesh;
mod mesh_refusals;
mod model;
mod nf4;
mod options;
mod pipeline;
mod pipeline_parallel;
mod placement;
mod plan;
mod queue;
mod ranks;
mod rotary;
mod shape;
mod staging;
mod state;
mod statistics;
mod step;
mod token_slice;
mod update;
mod vision;
mod weights;
mod whole;

pub use batch::{BatchSize, IGNORED, MicroBatch};
pub use engine::Engine;
pub use flops::Flops;
pub use generate::{GenerateOptions, GenerateSize, Prompt};
pub use inspect::Inspection;
pub use logits_rows::with_logits_rows;
pub use loss_scale::LossScaling;
pub use mesh::Mesh;
pub use options::{Adam, AttentionChoice, EngineOptions, Hyper, LoraOptions, Nf4Options, Recompute, Weights};
pub use placement::arena::Category;
pub use plan::{MemoryPlan, plan_memory, plan_memory_of};
pub use queue::Ticket;
pub use ranks::{Traffic, plan_traffic};
pub use statistics::{MicroBatchStats, StepStats};
pub use vision::Images;
pub use weights::Kind;
