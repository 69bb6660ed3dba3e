//! The golden models, by the code of the engine's own test: what transformers computed with small models.

#[path = "../../../arl-engine/examples/golden.rs"]
#[allow(unreachable_pub, missing_docs, reason = "an example, included for its cases")]
mod cases;

pub(super) use cases::{cases, run_case_on};
