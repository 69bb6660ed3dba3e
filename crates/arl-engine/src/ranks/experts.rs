//! Rows of tokens between ranks that divide experts, and a rank's part in a round in which it has no tokens itself.

use arl_model::Result;

use super::gather::Turn;
use crate::backend::{Backend, Buffer};
use crate::blocks::Context;
use crate::engine::Engine;
use crate::mesh::Axis;
use crate::placement::cut::Complete;
use crate::placement::shards::Part;
use crate::statistics::MicroBatchStats;

impl<B: Backend + ?Sized> Context<'_, B> {
    /// [`Context::exchange`] of several buffers for each rank, which are as many and as long on both sides.
    pub(crate) fn exchange_parts(&mut self, axis: Axis, sends: &[Vec<Buffer>], receives: &[Vec<Buffer>]) {
        let own = self.place.index(axis);
        let others = sends.iter().enumerate().filter(|(rank, _)| *rank != own);
        let bytes = others.flat_map(|(_, parts)| parts).map(|part| part.bytes()).sum();
        self.exchanging(bytes, |backend, ranks| backend.exchange(&ranks.part_of(axis)?, sends, receives));
    }
}

/// Of all slices of a micro-batch.
pub(super) fn tokens(slices: &[MicroBatchStats]) -> usize {
    slices.iter().map(|slice| slice.tokens).sum()
}

impl<B: Backend + ?Sized> Engine<B> {
    /// Counts the tokens that the ranks which divide experts with this one have together in a round, and forgets the last one's rows; `stats` are those of all
    /// micro-batches of the step.
    pub(crate) fn begin_round(&mut self, round: usize, stats: &[MicroBatchStats]) {
        self.ranks.routes.clear();
        let (size, slices) = (self.ranks.size, self.model.place.mesh.slices());
        let of = |rank: usize| {
            // Slices of a micro-batch are equally long.
            let first = round * size + rank % size / slices * slices;
            stats.get(first..first + slices).map_or(0, tokens).div_ceil(slices)
        };
        self.ranks.round_tokens = self.model.place.members(Axis::Expert).into_iter().map(of).sum();
    }

    /// The forward pass of a rank without a micro-batch, whose experts others have rows for.
    pub(crate) fn serve_forward(&mut self) -> Result<()> {
        let layers = self.model.layers.len();
        if self.model.place.size(Axis::Expert) == 1 {
            return Ok(());
        }
        self.ranks.settle_exchanges(&mut *self.backend);
        let mut step = self.parts();
        step.begin_serving(None);
        (0..layers).try_for_each(|l| step.serve(l))
    }

    /// Takes part in a round without a micro-batch: has own experts compute the rows of others, and what ranks ask of all. Gradients are
    /// zero.
    pub(super) fn serve_experts(&mut self) -> Result<()> {
        let turns = self.model.turns(self.ranks.sees(false));
        let (bottom, keep) = (self.arena.mark(), Some(self.model.recompute));
        let mut step = self.parts();
        step.begin_serving(keep);
        let mut behind_loss = false;
        for turn in turns {
            match turn {
                Turn::Gather(part) => {
                    step.need(part)?;
                    match part {
                        Part::Layer(l) if behind_loss => step.serve_backward(l)?,
                        Part::Layer(l) => step.serve(l)?,
                        _ => {}
                    }
                }
                Turn::Collect(point) => {
                    if point == Complete::End {
                        // Layers had its place, and this rank has no gradients of an embedding.
                        step.clear_buckets(point);
                    }
                    step.collect(point)?;
                    behind_loss |= point == Complete::Loss;
                }
            }
        }
        self.arena.release(bottom);
        Ok(())
    }
}
