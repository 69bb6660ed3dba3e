//! Pipeline parallelism: ranks divide layers. A stage has neighbouring layers, the first one also the embedding, the last one also
//! the final norm and the head; the micro-batches of a step pass through all of them. Between two stages the same places are
//! neighbours ([`Axis::Pipeline`](crate::mesh::Axis)), and within a stage ranks divide as without a pipeline.
//!
//! A stage keeps of a micro-batch that is on its way only its input `[T, H]`, and computes its forward pass again before the backward
//! pass: one forward pass more on all stages but the last, which does both at once. For the step's memory is one stack, in which the
//! activations of several micro-batches, taken and given back in turns, would have no place, and the inputs are small.

mod division;
mod passes;
mod passing;
mod schedule;

pub(crate) use division::layers_of_stage;
pub(crate) use passes::Rounds;
pub(crate) use passing::{Passed, Passing};
