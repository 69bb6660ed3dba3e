//! The gradients of a step over all ranks: which micro-batches there are, each rank's own, and the sums in the order of the step.
//! Where ranks have slices of micro-batches, a slice is what is called a micro-batch here: number `m s + i` is slice `i` of the `s`
//! of micro-batch `m`. Then the rank of slice number `n` is `n % size`, as that of a micro-batch is.

use arl_model::{Error, ErrorCode, Result};

use super::experts::tokens;
use super::gather::Turn;
use super::{PART, Ranks, read};
use crate::backend::comm::Part;
use crate::backend::{Backend, Buffer};
use crate::batch::MicroBatch;
use crate::engine::Engine;
use crate::mesh::Axis;
use crate::pipeline_parallel::Rounds;
use crate::statistics::{MicroBatchStats, Statistics, weight_of};
use crate::token_slice::{Sliced, Slicing};

/// What other ranks know of a micro-batch: tokens, sequences, targets, the bits of the targets' weight, and images.
type Counted = [u64; 5];

/// What is known of all micro-batches of a step: their figures, their sequences, and which of those that have targets have images.
type All = (Vec<MicroBatchStats>, Vec<usize>, Vec<bool>);

impl<B: Backend + ?Sized> Engine<B> {
    /// Queues the gradients of a step, of which `own` are this rank's micro-batches, whole. Leaves the ranks together.
    pub(crate) fn accumulate_in_order(&mut self, own: &[MicroBatch], sums: Buffer) -> Result<Statistics> {
        self.check_joined()?;
        let slicing = Slicing::of(&self.model.place);
        let (own_stats, mut largest, positions) = self.count(own, slicing)?;
        let (stats, sequences, seeing) = self.all_stats(own, &own_stats)?;
        if self.model.place.size(Axis::Expert) > 1 {
            // Own experts compute the rows of others' tokens.
            largest.tokens = stats.chunks(slicing.count).map(tokens).max().unwrap_or(0);
        }
        self.make_room(largest, positions, stats.len() / slicing.count)?;
        self.clear_arena();
        let weight = weight_of(&stats)?;
        self.gradient_scale = self.loss_scale.map_or(1.0, |scale| scale.scale());
        let step = self.next_step();
        let figures = self.take_figures(stats.len(), sequences.iter().copied().max().unwrap_or(0));
        let gradients = self.training()?.gradients;
        let bottom = self.arena.mark();
        // It reads gradients, and a rank without a micro-batch has no forward pass that completes it.
        self.complete_pending();
        self.backend.zero(sums);
        self.ranks.begin_together(&mut *self.backend, &self.model);
        if self.model.place.mesh.pp > 1 {
            let tokens = slicing.own(largest.tokens);
            self.accumulate_in_stages(&Rounds { own, stats: &stats, slicing, figures, weight, tokens, step, sums })?;
        } else {
            for round in 0..stats.len().div_ceil(self.ranks.size) {
                let m = round * self.ranks.size + self.ranks.rank;
                self.ranks.round_sees =
                    seeing.iter().skip(round * self.ranks.size).take(self.ranks.size).any(|sees| *sees);
                self.ranks.expect_gathers(&self.model);
                self.begin_round(round, &stats);
                // A slice without targets takes part where others of its micro-batch have some.
                match own.get(round).filter(|batch| batch.has_targets()) {
                    Some(batch) => {
                        let (batch, own) = (Sliced { batch, slicing }, figures.of(m, stats.len()));
                        let mut run = self.begin(batch, Some(self.model.recompute), own);
                        (run.loss_scale, run.first) = (self.gradient_scale, true);
                        run.dropout = self.model.dropout(step, m / slicing.count, batch.first());
                        // Where ranks divide gradients, it adds each layer's as soon as it has them.
                        self.parts().train(&run, weight)?;
                        self.parts().sum_sequences(batch, &run, own.sequence_losses);
                        self.arena.release(bottom);
                    }
                    None => self.take_part()?,
                }
                self.add_whole_round(sums)?;
            }
        }
        if !self.model.divides_gradients() {
            self.gather_sums(gradients, sums)?;
        }
        for buffer in figures.buffers() {
            self.gather_figures(buffer, stats.len())?;
        }
        let sequences = sequences.into_iter().step_by(slicing.count).collect();
        Ok(Statistics { stats, slices: slicing.count, sequences, figures, sees: seeing.contains(&true) })
    }

    /// Takes part in a round without a micro-batch, with gradients that are zero.
    pub(super) fn take_turns(&mut self) -> Result<()> {
        if self.model.place.size(Axis::Expert) > 1 {
            return self.serve_experts();
        }
        self.model.turns(self.ranks.sees(false)).into_iter().try_for_each(|turn| match turn {
            Turn::Gather(part) => self.ranks.need(&mut *self.backend, &self.model, part),
            Turn::Collect(point) => self.ranks.collect(&mut *self.backend, &self.model, point),
        })
    }

    /// What is known of all micro-batches of a step, in their order, and their sequences; of this rank's own it is `own_stats`.
    fn all_stats(&mut self, own: &[MicroBatch], own_stats: &[MicroBatchStats]) -> Result<All> {
        let counts: Vec<u64> = read(&self.ranks.figures(&(own.len() as u64).to_ne_bytes())?);
        let (total, most) = (counts.iter().sum::<u64>() as usize, counts.iter().copied().max().unwrap_or(0) as usize);
        let dealt = |rank: usize| (total + self.ranks.size - 1 - rank) / self.ranks.size;
        if let Some(rank) = (0..self.ranks.size).find(|&rank| counts[rank] as usize != dealt(rank)) {
            let message = format!("rank {rank} has {} of {total} micro-batches, not {}", counts[rank], dealt(rank));
            return Err(Error::new(ErrorCode::Internal, message));
        }
        let mut counted: Vec<Counted> = own
            .iter()
            .zip(own_stats)
            .map(|(batch, stat)| {
                let (size, weight) = (batch.size(), stat.target_weight.to_bits());
                let [tokens, sequences, targets, images] =
                    [stat.tokens, size.sequences, stat.target_tokens, size.images].map(|count| count as u64);
                [tokens, sequences, targets, weight, images]
            })
            .collect();
        counted.resize(most, Counted::default());
        let all: Vec<Counted> = read(&self.ranks.figures(bytemuck::cast_slice(&counted))?);
        let place = |m: usize| all[m % self.ranks.size * most + m / self.ranks.size];
        let stat = |[tokens, _, target_tokens, weight, _]: Counted| MicroBatchStats {
            tokens: tokens as usize,
            target_tokens: target_tokens as usize,
            target_weight: f64::from_bits(weight),
            ..MicroBatchStats::default()
        };
        let seeing = (0..total).map(place).map(|[_, _, targets, _, images]| targets > 0 && images > 0).collect();
        let (stats, sequences) = (0..total).map(|m| (stat(place(m)), place(m)[1] as usize)).unzip();
        Ok((stats, sequences, seeing))
    }

    /// Makes the gradients the sums of all ranks. Comes behind the exchanges of all rounds, and leaves that follow wait for it with those.
    fn gather_sums(&mut self, gradients: Buffer, sums: Buffer) -> Result<()> {
        for start in (0..sums.len).step_by(PART) {
            // The last rank's piece may be shorter: all give equally many, and what is beyond the end is left out.
            let own = Part { buffer: sums.slice(start, PART.min(sums.len - start)), at: 0 };
            let of = |rank| vec![Part { buffer: self.ranks.part(gradients, sums.len, rank, start), at: 0 }];
            let all: Vec<_> = (0..self.ranks.size).map(of).collect();
            let bytes = own.buffer.bytes();
            let (axis, backend) = (Axis::Stage, &mut *self.backend);
            self.ranks.gather_parts_along(axis, backend, bytes, &[own], &all, |sent| &mut sent.sums)?;
        }
        Ok(())
    }
}

impl Ranks {
    /// The figures of every rank of the stage.
    pub(super) fn figures(&mut self, own: &[u8]) -> Result<Vec<u8>> {
        self.gather_in_stage(own, |sent| &mut sent.figures)
    }
}
