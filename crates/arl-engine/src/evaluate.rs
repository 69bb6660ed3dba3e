//! The loss of held-out rows: forward passes alone, and of each sequence its sums, so that what they add up to does not depend on
//! how the sequences are cut into micro-batches.

use arl_model::Result;

use crate::backend::{Backend, Buffer};
use crate::batch::{BatchSize, MicroBatch};
use crate::engine::Engine;
use crate::statistics::{MicroBatchStats, Statistics};
use crate::token_slice::Slicing;

impl<B: Backend + ?Sized> Engine<B> {
    /// The loss of each micro-batch, with the weights as they are.
    pub fn evaluate(&mut self, batches: &[MicroBatch]) -> Result<Vec<MicroBatchStats>> {
        self.alone("evaluation", |engine| engine.evaluate_alone(batches))
    }

    /// Whether the plan of a step, which is over slices or a part of the model, has room for one whole micro-batch at a time.
    pub(crate) fn evaluates_one_by_one(&self) -> bool {
        self.model.whole.is_some() || Slicing::of(&self.model.place).divides()
    }

    fn evaluate_alone(&mut self, batches: &[MicroBatch]) -> Result<Vec<MicroBatchStats>> {
        if self.evaluates_one_by_one() && batches.len() > 1 {
            let each = batches.iter().map(|batch| self.evaluate_alone(std::slice::from_ref(batch)));
            return Ok(each.collect::<Result<Vec<_>>>()?.concat());
        }
        if batches.is_empty() {
            return Ok(Vec::new());
        }
        let stats = self.prepare(batches)?;
        let figures = self.take_figures(batches.len(), 0);
        let bottom = self.arena.mark();
        for (i, batch) in batches.iter().enumerate() {
            if stats[i].target_tokens > 0 {
                let run = self.begin(batch.whole(), None, figures.of(i, batches.len()));
                let result = self.parts().evaluate(&run);
                self.settle_interrupt(result)?;
                self.arena.release(bottom);
            }
        }
        self.read_statistics(Statistics { stats, slices: 1, sequences: Vec::new(), figures, sees: false })
    }

    /// The loss, the correct targets and the entropy of each sequence of a micro-batch, with the weights as they are, in its
    /// order. Each is the f64 sum over the sequence's targets from the first to the last. `balance_loss`, which belongs to a
    /// micro-batch, is 0. Gives up a step that was submitted and not applied.
    pub fn evaluate_sequences(&mut self, batch: &MicroBatch) -> Result<Vec<MicroBatchStats>> {
        self.alone("evaluation", |engine| engine.sequences_alone(batch))
    }

    fn sequences_alone(&mut self, batch: &MicroBatch) -> Result<Vec<MicroBatchStats>> {
        self.model.check(0, batch)?;
        if !batch.has_targets() {
            return Ok(Targets::default().by_sequence(batch));
        }
        self.make_room_to_evaluate(batch.size(), batch.positions())?;
        self.clear_arena();
        let figures = self.take_figures(1, 0);
        let run = self.begin(batch.whole(), None, figures);
        let result = self.parts().evaluate(&run);
        self.settle_interrupt(result)?;
        let targets = Targets {
            nll: self.read_f32(run.inputs.nll)?,
            correct: self.read_f32(run.inputs.correct)?,
            entropy: self.read_f32(run.inputs.entropy)?,
        };
        Ok(targets.by_sequence(batch))
    }

    /// Makes room for the loss of a micro-batch of `size` and so many positions. Nothing happens where there is room already.
    pub(crate) fn make_room_to_evaluate(&mut self, size: BatchSize, positions: usize) -> Result<()> {
        if self.plan.holds_evaluation(size, positions) {
            return Ok(());
        }
        let plan = self.plan.grown_evaluation(&self.model, size, positions)?;
        self.make_room_for(plan)
    }

    fn read_f32(&mut self, buffer: Buffer) -> Result<Vec<f32>> {
        let mut host = vec![0f32; buffer.len];
        self.backend.read_back(buffer, bytemuck::cast_slice_mut(&mut host))?;
        Ok(host)
    }
}

/// What the classifier pass found for each target of positive weight, in their order.
#[derive(Default)]
struct Targets {
    nll: Vec<f32>,
    correct: Vec<f32>,
    entropy: Vec<f32>,
}

impl Targets {
    fn by_sequence(&self, batch: &MicroBatch) -> Vec<MicroBatchStats> {
        let mut next = 0;
        let sequences = batch.cu_seqlens.windows(2);
        sequences
            .map(|ends| {
                let tokens = ends[0] as usize..ends[1] as usize;
                let mut stats = MicroBatchStats { tokens: tokens.len(), ..MicroBatchStats::default() };
                for weight in tokens.map(|t| batch.weight(t)).filter(|&weight| weight > 0.0) {
                    stats.target_tokens += 1;
                    stats.target_weight += f64::from(weight);
                    stats.loss_sum += f64::from(weight) * f64::from(self.nll[next]);
                    stats.correct += usize::from(self.correct[next] > 0.0);
                    stats.entropy_sum += f64::from(self.entropy[next]);
                    next += 1;
                }
                stats
            })
            .collect()
    }
}
