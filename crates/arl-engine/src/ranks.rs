//! Data parallelism: micro-batch `m` of a step is computed by rank `m % size`, in round `m / size`. After each round every
//! rank adds the round's gradients to its piece of their sums, in the order of the ranks: a sum is `((g0 + g1) + g2) + ...` in
//! the order of the step, and has the same bits for any number of ranks. Knows nothing of what moves the bytes.

use arl_comm::{Group, add_parts};
use arl_model::{Error, ErrorCode, Result};

use crate::backend::{Backend, Buffer};
use crate::batch::MicroBatch;
use crate::engine::{Engine, weight_of};
use crate::statistics::{MicroBatchStats, Statistics};

/// Elements of each rank's piece that are exchanged at a time.
const PART: usize = 1 << 20;

/// The ranks of an engine.
pub(crate) struct Ranks {
    /// None: this one alone, or the others have not joined yet.
    group: Option<Box<dyn Group>>,
    /// How many there must be.
    size: usize,
}

impl Ranks {
    /// This rank, before any other has joined it.
    pub(crate) fn alone(size: usize) -> Self {
        Ranks { group: None, size }
    }

    fn rank(&self) -> usize {
        self.group.as_ref().map_or(0, |group| group.rank())
    }

    /// Elements `[start, start + PART)` of a rank's piece of the gradients; the last piece may be shorter than the others.
    fn part(&self, gradients: Buffer, rank: usize, start: usize) -> Buffer {
        let piece = gradients.len.div_ceil(self.size);
        let (first, end) = (rank * piece + start, rank * piece + piece.min(start + PART));
        let (first, end) = (gradients.len.min(first), gradients.len.min(end));
        gradients.slice(first, end - first)
    }

    /// The bytes of every rank, in their order; all give equally many.
    fn gather(&self, bytes: &[u8]) -> Result<Vec<u8>> {
        let Some(group) = &self.group else { return Ok(bytes.to_vec()) };
        let mut all = vec![0; self.size * bytes.len()];
        group.all_gather(bytes, &mut all)?;
        Ok(all)
    }

    /// What every rank has of this one's piece: `of_ranks[r]` is for rank `r`. All are as long as on rank `r` itself.
    fn exchange(&self, of_ranks: Vec<Vec<f32>>) -> Result<Vec<Vec<f32>>> {
        let Some(group) = &self.group else { return Ok(of_ranks) };
        let sends: Vec<&[u8]> = of_ranks.iter().map(|part| bytemuck::cast_slice(part)).collect();
        let mut receives = vec![vec![0u8; sends[group.rank()].len()]; self.size];
        group.exchange(&sends, &mut receives)?;
        Ok(receives.iter().map(|bytes| bytes.chunks_exact(4).map(bytemuck::pod_read_unaligned).collect()).collect())
    }
}

/// What other ranks know of a micro-batch: tokens, sequences, targets and the bits of the targets' weight.
type Counted = [u64; 4];

impl<B: Backend + ?Sized> Engine<B> {
    /// Has the ranks of `group` compute each step together with this one, from [`Engine::submit`] on: each is given its own
    /// micro-batches, in the order of the step, and all return the figures of the whole step. All hold all weights, which
    /// must be equal. The number of ranks is [`EngineOptions::data_parallel`](crate::EngineOptions::data_parallel).
    pub fn join(&mut self, group: Box<dyn Group>) -> Result<()> {
        let planned = self.training()?.sums.map_or(0, |_| self.ranks.size);
        if group.size() != planned {
            let message = format!("{} ranks join an engine that was opened for {planned}", group.size());
            return Err(Error::new(ErrorCode::Internal, message));
        }
        self.ranks.group = Some(group);
        Ok(())
    }

    /// Queues the gradients of a step, of which `own` are this rank's micro-batches.
    pub(crate) fn accumulate_in_order(&mut self, own: &[MicroBatch], sums: Buffer) -> Result<Statistics> {
        if self.ranks.size > 1 && self.ranks.group.is_none() {
            return Err(Error::new(ErrorCode::Internal, "the other ranks have not joined this engine"));
        }
        let (own_stats, largest, positions) = self.count(own)?;
        let (stats, sequences) = self.all_stats(own, &own_stats)?;
        self.make_room(largest, positions, stats.len())?;
        self.clear_arena();
        let weight = weight_of(&stats)?;
        self.gradient_scale = self.loss_scale.map_or(1.0, |scale| scale.scale());
        let step = self.next_step();
        let figures = self.take_figures(stats.len(), sequences.iter().copied().max().unwrap_or(0));
        let gradients = self.training()?.gradients;
        let bottom = self.arena.mark();
        // It reads gradients, and a rank without a micro-batch has no forward pass that completes it.
        self.complete_update();
        self.backend.zero(sums);
        for round in 0..stats.len().div_ceil(self.ranks.size) {
            let m = round * self.ranks.size + self.ranks.rank();
            match own.get(round).filter(|_| stats[m].target_tokens > 0) {
                Some(batch) => {
                    let own = figures.of(m, stats.len());
                    let mut run = self.begin(batch, Some(self.model.recompute), own);
                    (run.loss_scale, run.first) = (self.gradient_scale, true);
                    run.dropout = self.model.dropout(step, m);
                    self.parts().train(&run, weight)?;
                    self.parts().sum_sequences(batch, &run, own.sequence_losses);
                    self.arena.release(bottom);
                }
                None => self.backend.zero(gradients),
            }
            self.add_round(gradients, sums)?;
        }
        self.gather_sums(gradients, sums)?;
        for buffer in figures.buffers() {
            self.gather_figures(buffer, stats.len())?;
        }
        Ok(Statistics { stats, sequences, figures })
    }

    /// What is known of all micro-batches of a step, in their order, and their sequences; of this rank's own it is `own_stats`.
    fn all_stats(
        &self,
        own: &[MicroBatch],
        own_stats: &[MicroBatchStats],
    ) -> Result<(Vec<MicroBatchStats>, Vec<usize>)> {
        let counts: Vec<u64> = read(&self.ranks.gather(&(own.len() as u64).to_ne_bytes())?);
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
                let sequences = batch.size().sequences as u64;
                [stat.tokens as u64, sequences, stat.target_tokens as u64, stat.target_weight.to_bits()]
            })
            .collect();
        counted.resize(most, Counted::default());
        let all: Vec<Counted> = read(&self.ranks.gather(bytemuck::cast_slice(&counted))?);
        let place = |m: usize| all[m % self.ranks.size * most + m / self.ranks.size];
        let stat = |[tokens, _, target_tokens, weight]: Counted| MicroBatchStats {
            tokens: tokens as usize,
            target_tokens: target_tokens as usize,
            target_weight: f64::from_bits(weight),
            ..MicroBatchStats::default()
        };
        Ok((0..total).map(|m| (stat(place(m)), place(m)[1] as usize)).unzip())
    }

    /// Adds the gradients of all ranks to this one's piece of their sums.
    fn add_round(&mut self, gradients: Buffer, sums: Buffer) -> Result<()> {
        for start in (0..sums.len).step_by(PART) {
            let parts = (0..self.ranks.size)
                .map(|rank| read_f32(&mut *self.backend, self.ranks.part(gradients, rank, start)))
                .collect::<Result<Vec<_>>>()?;
            let parts = self.ranks.exchange(parts)?;
            let parts: Vec<&[f32]> = parts.iter().map(Vec::as_slice).collect();
            let place = sums.slice(start, parts[0].len());
            let mut sum = read_f32(&mut *self.backend, place)?;
            add_parts(&mut sum, &parts);
            self.backend.upload(bytemuck::cast_slice(&sum), place);
        }
        Ok(())
    }

    /// Makes the gradients the sums of all ranks.
    fn gather_sums(&mut self, gradients: Buffer, sums: Buffer) -> Result<()> {
        for start in (0..sums.len).step_by(PART) {
            // The last rank's piece may be shorter: all give equally many, and what is beyond the end is left out.
            let part = read_f32(&mut *self.backend, sums.slice(start, PART.min(sums.len - start)))?;
            let all = self.ranks.gather(bytemuck::cast_slice(&part))?;
            for (rank, bytes) in all.chunks_exact(size_of_val(part.as_slice())).enumerate() {
                let place = self.ranks.part(gradients, rank, start);
                self.backend.upload(&bytes[..place.bytes()], place);
            }
        }
        Ok(())
    }

    /// Gives every rank the figures of all `count` micro-batches: each has computed those of its own.
    fn gather_figures(&mut self, figures: Buffer, count: usize) -> Result<()> {
        let mut own = vec![0; figures.bytes()];
        self.backend.read_back(figures, &mut own)?;
        let all = self.ranks.gather(&own)?;
        let of_one = own.len() / count;
        let of = |m: usize| &all[m % self.ranks.size * own.len() + m * of_one..][..of_one];
        let merged: Vec<u8> = (0..count).flat_map(of).copied().collect();
        self.backend.upload(&merged, figures);
        Ok(())
    }

    /// A hash of weights, masters, moments, step count and loss scale: ranks that train together have the same.
    pub fn fingerprint(&mut self) -> Result<String> {
        self.settle();
        self.complete_update();
        let (store, training) = (self.model.store, self.training()?);
        let mut hash = blake3::Hasher::new();
        for array in [Some(store.weights), store.masters, Some(training.moment1), Some(training.moment2)] {
            let Some(array) = array else { continue };
            for start in (0..array.len).step_by(PART) {
                let piece = array.slice(start, PART.min(array.len - start));
                let mut bytes = vec![0; piece.bytes()];
                self.backend.read_back(piece, &mut bytes)?;
                hash.update(&bytes);
            }
        }
        let scale = self.loss_scale.map(|scale| scale.scale());
        hash.update(format!("{} {scale:?}", self.steps).as_bytes());
        Ok(hash.finalize().to_hex().to_string())
    }
}

/// Values of bytes that need not be aligned.
fn read<T: bytemuck::AnyBitPattern>(bytes: &[u8]) -> Vec<T> {
    bytes.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect()
}

fn read_f32<B: Backend + ?Sized>(backend: &mut B, buffer: Buffer) -> Result<Vec<f32>> {
    let mut values = vec![0f32; buffer.len];
    backend.read_back(buffer, bytemuck::cast_slice_mut(&mut values))?;
    Ok(values)
}
