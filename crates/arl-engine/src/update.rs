//! The end of an optimizer step: AdamW over all trained parameters. With `optimizer_offload` the next forward pass does it:
//! masters and moments are fetched from host memory a piece at a time and return while layers are computed, and each piece
//! is updated just before the first layer that uses its weights.

use crate::backend::{AdamW, Backend, Buffer, StochasticRounding, Stream};
use crate::events::{OPTIMIZER_SLOTS, OptimizerPoint};
use crate::options::{Adam, Hyper};
use crate::placement::Run;
use crate::placement::store::{Slots, Store, TrainingStore};

/// An update of all trained parameters.
#[derive(Clone, Debug)]
pub(crate) struct Update {
    /// What is the same for all parameters; its buffers are the whole arrays.
    adam: AdamW,
    runs: Vec<Run>,
}

/// The numbers of an update: the run's, and this step's.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Numbers {
    pub(crate) adam: Adam,
    pub(crate) hyper: Hyper,
    /// Counted from 1.
    pub(crate) step: u64,
    /// What the gradients are to be divided by.
    pub(crate) gradient_scale: f32,
    pub(crate) rounding_seed: u64,
}

impl Update {
    pub(crate) fn new(store: &Store, training: &TrainingStore, runs: Vec<Run>, numbers: Numbers) -> Self {
        let Numbers { adam, hyper, step, gradient_scale, rounding_seed } = numbers;
        let correction = |beta: f32| (1.0 - f64::from(beta).powf(step as f64)) as f32;
        let adam = AdamW {
            weights: store.weights,
            masters: store.masters,
            rounding: StochasticRounding::new(rounding_seed, step),
            gradients: training.gradients,
            moment1: training.moment1,
            moment2: training.moment2,
            learning_rate: hyper.learning_rate,
            beta1: adam.beta1,
            beta2: adam.beta2,
            epsilon: adam.epsilon,
            weight_decay: adam.weight_decay,
            bias_correction1: correction(adam.beta1),
            bias_correction2: correction(adam.beta2),
            grad_norm_squared: training.norm_squared,
            gradient_scale,
            max_grad_norm: hyper.max_grad_norm,
        };
        Update { adam, runs }
    }

    /// The update of a run, of the whole arrays on the device.
    fn of(&self, run: Run) -> AdamW {
        let part = |buffer: Buffer| buffer.slice(run.optimizer, run.len);
        AdamW {
            weights: self.adam.weights.slice(run.weights, run.len),
            masters: self.adam.masters.map(part),
            rounding: self.adam.rounding.from(run.optimizer),
            gradients: part(self.adam.gradients),
            moment1: part(self.adam.moment1),
            moment2: part(self.adam.moment2),
            weight_decay: if run.decay { self.adam.weight_decay } else { 0.0 },
            ..self.adam
        }
    }

    /// The update where everything is on the device.
    pub(crate) fn run<B: Backend + ?Sized>(&self, backend: &mut B) {
        self.runs.iter().for_each(|run| backend.adamw(&self.of(*run)));
    }
}

/// An update whose masters and moments are in host memory. Its pieces are parts of runs, in the order in which a forward pass
/// uses them.
#[derive(Clone, Debug)]
pub(crate) struct Pending {
    update: Update,
    slots: Slots,
    pieces: Vec<Run>,
    /// The next piece to update; the copies of those that follow it through the slots are queued.
    next: usize,
}

impl Pending {
    /// Queues the copies of the first pieces to the device.
    pub(crate) fn begin<B: Backend + ?Sized>(backend: &mut B, update: Update, slots: Slots) -> Self {
        // Norms and biases are few, and each layer has some: they come first.
        let (decayed, others): (Vec<&Run>, Vec<&Run>) = update.runs.iter().partition(|run| run.decay);
        let pieces = others.into_iter().chain(decayed).flat_map(|run| {
            (0..run.len).step_by(slots.piece).map(|start| Run {
                weights: run.weights + start,
                optimizer: run.optimizer + start,
                len: slots.piece.min(run.len - start),
                decay: run.decay,
            })
        });
        let pieces = pieces.collect();
        let pending = Pending { update, slots, pieces, next: 0 };
        for i in 0..OPTIMIZER_SLOTS {
            pending.fetch(backend, i);
        }
        pending
    }

    /// Updates every piece that has a decayed weight before element `end` of the weights' arena, or any other; whether that was
    /// the last one.
    pub(crate) fn advance<B: Backend + ?Sized>(&mut self, backend: &mut B, end: usize) -> bool {
        while let Some(&piece) = self.pieces.get(self.next) {
            if piece.decay && piece.weights >= end {
                return false;
            }
            let i = self.next;
            backend.wait(Stream::Compute, OptimizerPoint::Fetched.event(i));
            let slot = &self.slots.places[i % OPTIMIZER_SLOTS];
            backend.adamw(&AdamW {
                masters: slot.masters.map(|masters| masters.slice(0, piece.len)),
                moment1: slot.moment1.slice(0, piece.len),
                moment2: slot.moment2.slice(0, piece.len),
                ..self.update.of(piece)
            });
            backend.record(Stream::Compute, OptimizerPoint::Updated.event(i));
            backend.wait(Stream::ToHost, OptimizerPoint::Updated.event(i));
            for (host, slot) in self.pairs(i) {
                backend.transfer(Stream::ToHost, slot, host);
            }
            backend.record(Stream::ToHost, OptimizerPoint::Saved.event(i));
            self.fetch(backend, i + OPTIMIZER_SLOTS);
            self.next += 1;
        }
        true
    }

    /// Queues the copy of piece `i`, if there is one, behind what its slot held before, in this update or the last.
    fn fetch<B: Backend + ?Sized>(&self, backend: &mut B, i: usize) {
        if i < self.pieces.len() {
            backend.wait(Stream::FromHost, OptimizerPoint::Saved.event(i));
            for (host, slot) in self.pairs(i) {
                backend.transfer(Stream::FromHost, host, slot);
            }
            backend.record(Stream::FromHost, OptimizerPoint::Fetched.event(i));
        }
    }

    /// The parts of piece `i` in host memory, and their places on the device.
    fn pairs(&self, i: usize) -> impl Iterator<Item = (Buffer, Buffer)> + use<> {
        let Run { optimizer, len, .. } = self.pieces[i];
        let (adam, slot) = (&self.update.adam, self.slots.places[i % OPTIMIZER_SLOTS]);
        let pair = move |host: Buffer, slot: Buffer| (host.slice(optimizer, len), slot.slice(0, len));
        let masters = adam.masters.zip(slot.masters).map(|(host, slot)| pair(host, slot));
        [pair(adam.moment1, slot.moment1), pair(adam.moment2, slot.moment2)].into_iter().chain(masters)
    }
}
