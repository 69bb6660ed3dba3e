//! Bytes that ranks send: as they are counted, and as formulas have them, for a plan.

use arl_model::{ModelConfig, Result};

use crate::backend::DeviceKind;
use crate::mesh::Axis;
use crate::model::Model;
use crate::options::EngineOptions;
use crate::placement::cut::{Bucket, Cut};
use crate::plan::exchanged_bytes;

/// Bytes that a rank sends to others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Gradients, to those that sum them: after each round of one micro-batch a rank; and once a step those of a tied embedding, from
    /// the first to the last stage and back.
    pub gradients: u64,
    /// Sums of gradients, to all: once a step, with zero 0 and 1.
    pub sums: u64,
    /// Updated weights, to all: once a step, with zero 1 and 2. With zero 3 weights, to all, in every pass over a layer.
    pub weights: u64,
    /// Updated weights, to those that keep the same ones in other replicas: once a step, where there are several.
    pub replicas: u64,
    /// Activations and their gradients, to those that have other slices of a micro-batch, other heads or other experts.
    pub tokens: u64,
    /// Losses, sums of squares, and other figures.
    pub figures: u64,
}

/// Bytes of tensors that rank [`EngineOptions::rank`] sends in a step of `rounds` micro-batches a rank, in each of which some have
/// images if [`EngineOptions::max_batch`] has; nothing but figures
/// comes on top, a few hundred bytes a micro-batch and 8 for each 16,384 parameters.
pub fn plan_traffic(config: &ModelConfig, options: &EngineOptions, kind: DeviceKind, rounds: u64) -> Result<Traffic> {
    let model = Model::new(config, options, kind)?;
    let (Some(_), Some(training)) = (options.data_parallel, model.store.training) else {
        return Ok(Traffic::default());
    };
    let ranks = model.place.stage();
    let others = (ranks - 1) as u64;
    let len = model.placement.optimizer;
    let width = model.weight_bytes() as u64;
    let sums = training.sums.map_or(0, |sums| sums.bytes() as u64);
    // All but what this rank sums itself.
    let contiguous = |rank: usize| {
        let piece = len.div_ceil(ranks);
        ((rank + 1) * piece).min(len) - (rank * piece).min(len)
    };
    let own_of = |cut: &Cut| cut.buckets.iter().map(|bucket| cut.own_piece(bucket).len()).sum::<usize>();
    let updated = |cut: &Cut| {
        let sent = |bucket: &Bucket| (cut.ranks(bucket) - 1) * cut.piece_len(bucket);
        cut.buckets.iter().map(sent).sum::<usize>() as u64
    };
    let own = match model.cut.as_deref() {
        Some(cut) if cut.gradients => own_of(cut),
        _ => contiguous(model.place.index(Axis::Stage)),
    };
    Ok(Traffic {
        gradients: 4 * (rounds * (len - own) as u64 + model.tied_elements() as u64),
        sums: if model.divides_gradients() { 0 } else { others * sums },
        weights: match (&model.cut, model.shards()) {
            (_, Some(_)) => model.gathered_bytes(rounds, options.max_batch.patches > 0),
            (cut, None) => cut.as_ref().map_or(0, |cut| width * updated(cut)),
        },
        replicas: model.replicated_bytes(),
        tokens: rounds * exchanged_bytes(&model, options.max_batch)?,
        figures: 0,
    })
}
