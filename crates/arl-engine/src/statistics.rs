//! What a step reports: sums of its micro-batches, on the device and as the host reads them.

use arl_model::{Error, ErrorCode, Result};

use crate::backend::{Buffer, DType};
use crate::placement::arena::{Arena, Category};
use crate::shape::Shape;

/// The statistics of one micro-batch.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct MicroBatchStats {
    /// Tokens.
    pub tokens: usize,
    /// Targets of positive weight.
    pub target_tokens: usize,
    /// Sum of the targets' weights.
    pub target_weight: f64,
    /// Sum of weight x negative log-likelihood, in nats.
    pub loss_sum: f64,
    /// Targets whose logit was the greatest.
    pub correct: usize,
    /// Sum of the predicted distributions' entropies over the targets, in nats.
    pub entropy_sum: f64,
    /// The router's balance loss times its coefficient; 0 where none is added.
    pub balance_loss: f64,
}

/// The statistics of one optimizer step.
#[derive(Clone, Debug, PartialEq)]
pub struct StepStats {
    /// Sum of all losses over the weight of all targets, plus the micro-batches' balance losses.
    pub loss: f64,
    /// Norm of all gradients before clipping.
    pub grad_norm: f64,
    /// In the order of the micro-batches.
    pub micro_batches: Vec<MicroBatchStats>,
    /// Of each sequence of each micro-batch, the sum of weight x negative log-likelihood, in nats.
    pub sequence_losses: Vec<Vec<f64>>,
    /// With f16, the factor on the loss that gradients were computed with; they are divided by it again.
    pub loss_scale: Option<f32>,
    /// With f16: the loss or a gradient was not finite, nothing was updated, and the loss scale was halved.
    pub skipped: bool,
    /// Wall-clock time from the step's submission, or from the end of the step before it where that came later, until its
    /// figures were on the host. Steps one behind the other therefore add up.
    pub seconds: f64,
}

/// Micro-batches' statistics that the device still computes.
#[derive(Debug)]
pub(crate) struct Statistics {
    /// What is known without the device of them, or of the slices that ranks have of them.
    pub(crate) stats: Vec<MicroBatchStats>,
    /// Slices of a micro-batch, one behind the other.
    pub(crate) slices: usize,
    /// Sequences of each micro-batch; empty: their losses are not asked for.
    pub(crate) sequences: Vec<usize>,
    pub(crate) figures: Figures,
    /// Whether any of those that have targets has images.
    pub(crate) sees: bool,
}

/// What the device computes of micro-batches.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Figures {
    /// f64 `[count, 3]`.
    pub(crate) sums: Buffer,
    /// f64 `[count, sequences]`: the loss of each sequence; `sequences`: of the micro-batch that has most, or 0.
    pub(crate) sequence_losses: Buffer,
    /// f32 `[count, 2, experts]`; of a slice those of its whole micro-batch.
    pub(crate) balances: Option<Buffer>,
}

impl Figures {
    /// Room for those of `count` micro-batches, each of at most `sequences` sequences.
    pub(crate) fn take(arena: &mut Arena, shape: &Shape, count: usize, sequences: usize) -> Self {
        let mut take = |dtype, len| arena.take(Category::Inputs, dtype, len);
        Figures {
            sums: take(DType::F64, 3 * count),
            sequence_losses: take(DType::F64, count * sequences),
            balances: shape.balance.map(|_| take(DType::F32, count * 2 * shape.experts)),
        }
    }

    /// All buffers, in the order in which they are read.
    pub(crate) fn buffers(&self) -> impl Iterator<Item = Buffer> {
        [Some(self.sums), Some(self.sequence_losses), self.balances].into_iter().flatten()
    }

    /// Those of micro-batch `m` of `count`.
    pub(crate) fn of(&self, m: usize, count: usize) -> Self {
        let part = |buffer: Buffer| buffer.slice(m * (buffer.len / count), buffer.len / count);
        Figures {
            sums: part(self.sums),
            sequence_losses: part(self.sequence_losses),
            balances: self.balances.map(part),
        }
    }
}

impl Statistics {
    /// Bytes of all figures.
    pub(crate) fn bytes(&self) -> usize {
        self.figures.buffers().map(Buffer::bytes).sum()
    }

    /// The loss of each sequence, from the bytes of all figures, one behind the other.
    pub(crate) fn sequence_losses(&self, bytes: &[u8]) -> Vec<Vec<f64>> {
        let Figures { sums, sequence_losses, .. } = self.figures;
        let losses = read(&bytes[sums.bytes()..][..sequence_losses.bytes()]);
        let most = sequence_losses.len / self.stats.len().max(1);
        let loss = |m: usize, s: usize| {
            let slices = m * self.slices..(m + 1) * self.slices;
            slices.map(|slice| losses[slice * most + s]).reduce(|sum, loss| sum + loss).unwrap_or(0.0)
        };
        self.sequences.iter().enumerate().map(|(m, &count)| (0..count).map(|s| loss(m, s)).collect()).collect()
    }

    /// Completed with the bytes of all figures, one behind the other; of whole micro-batches.
    pub(crate) fn complete(mut self, shape: &Shape, bytes: &[u8]) -> Vec<MicroBatchStats> {
        let (sums, rest) = bytes.split_at(self.figures.sums.bytes());
        let balances = &rest[self.figures.sequence_losses.bytes()..];
        for (stat, sums) in self.stats.iter_mut().zip(read(sums).chunks_exact(3)) {
            (stat.loss_sum, stat.correct, stat.entropy_sum) = (sums[0], sums[1] as usize, sums[2]);
        }
        let mut stats: Vec<MicroBatchStats> = self.stats.chunks(self.slices).map(merged).collect();
        if self.figures.balances.is_some() {
            let balances: Vec<f32> =
                balances.chunks_exact(size_of::<f32>()).map(bytemuck::pod_read_unaligned).collect();
            let experts = shape.experts;
            let coefficient = f64::from(shape.balance.unwrap_or(0.0));
            let firsts = balances.chunks_exact(2 * experts).step_by(self.slices);
            for (stat, balance) in stats.iter_mut().zip(firsts) {
                let n = (stat.tokens * shape.expert_layers) as f64;
                let (counts, probabilities) = balance.split_at(experts);
                let products = counts.iter().zip(probabilities).map(|(&c, &p)| f64::from(c) * f64::from(p));
                stat.balance_loss = coefficient * experts as f64 * products.sum::<f64>() / (n * n);
            }
        }
        stats
    }
}

/// The statistics of a micro-batch from those of its slices.
fn merged(slices: &[MicroBatchStats]) -> MicroBatchStats {
    let mut whole = slices[0];
    for slice in &slices[1..] {
        whole.tokens += slice.tokens;
        whole.target_tokens += slice.target_tokens;
        whole.target_weight += slice.target_weight;
        whole.loss_sum += slice.loss_sum;
        whole.correct += slice.correct;
        whole.entropy_sum += slice.entropy_sum;
    }
    whole
}

fn read(bytes: &[u8]) -> Vec<f64> {
    bytes.chunks_exact(size_of::<f64>()).map(bytemuck::pod_read_unaligned).collect()
}

/// The weight of all targets of a step. Fails where it is 0.
pub(crate) fn weight_of(stats: &[MicroBatchStats]) -> Result<f64> {
    let weight: f64 = stats.iter().map(|s| s.target_weight).sum();
    if weight == 0.0 {
        return Err(Error::new(
            ErrorCode::Data,
            "no token of this step is trained: every target is ignored or has weight 0",
        )
        .hint("check that the rows have replies, and that truncation does not cut them off"));
    }
    Ok(weight)
}
