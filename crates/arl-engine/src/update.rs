//! The end of an optimizer step: AdamW over all parameters. With `optimizer_offload` the next forward pass does it: masters
//! and moments come from host memory a piece at a time and go back beside the layers that are computed, and each piece is
//! updated just before the first layer that it has weights of.

use crate::backend::{AdamW, Backend, Buffer, StochasticRounding, Stream};
use crate::events::{OPTIMIZER_SLOTS, OptimizerPoint};
use crate::options::{Adam, Hyper};
use crate::store::{Slots, Store, TrainingStore};

/// What an update needs besides the arrays.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Update {
    /// What is the same for all parameters; its buffers stand for the whole arrays.
    pub(crate) adam: AdamW,
    /// The first so many parameters are decayed.
    pub(crate) decayed: usize,
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
    pub(crate) fn new(store: &Store, training: &TrainingStore, decayed: usize, numbers: Numbers) -> Self {
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
        Update { adam, decayed }
    }

    /// Runs of parameters that are updated alike: first element, end, weight decay.
    fn runs(&self) -> [(usize, usize, f32); 2] {
        [(0, self.decayed, self.adam.weight_decay), (self.decayed, self.adam.weights.len, 0.0)]
    }

    /// The update where everything is on the device.
    pub(crate) fn run<B: Backend + ?Sized>(&self, backend: &mut B) {
        for (start, end, weight_decay) in self.runs() {
            let part = |buffer: Buffer| buffer.slice(start, end - start);
            backend.adamw(&AdamW {
                weights: part(self.adam.weights),
                masters: self.adam.masters.map(part),
                rounding: self.adam.rounding.from(start),
                gradients: part(self.adam.gradients),
                moment1: part(self.adam.moment1),
                moment2: part(self.adam.moment2),
                weight_decay,
                ..self.adam
            });
        }
    }
}

/// A part of the parameters whose masters and moments are on the device at a time.
#[derive(Clone, Copy, Debug)]
struct Piece {
    /// First element.
    start: usize,
    /// Elements.
    len: usize,
    weight_decay: f32,
    /// The piece is to be updated before a parameter behind this element is used.
    due: usize,
}

/// An update whose masters and moments are in host memory. Its pieces are in the order in which a forward pass uses them.
#[derive(Clone, Debug)]
pub(crate) struct Pending {
    update: Update,
    slots: Slots,
    pieces: Vec<Piece>,
    /// The next piece to update; those that are to follow it through the slots are on their way.
    next: usize,
}

impl Pending {
    /// Sends the first pieces on their way to the device.
    pub(crate) fn begin<B: Backend + ?Sized>(backend: &mut B, update: Update, slots: Slots) -> Self {
        let [decayed, others] = update.runs();
        // Norms and biases are few, and each layer has some: they come first.
        let pieces = [others, decayed].into_iter().flat_map(|(start, end, weight_decay)| {
            let due = move |at| if start == 0 { at } else { 0 };
            let piece = move |at| Piece { start: at, len: slots.piece.min(end - at), weight_decay, due: due(at) };
            (start..end).step_by(slots.piece).map(piece)
        });
        let pending = Pending { update, slots, pieces: pieces.collect(), next: 0 };
        for i in 0..OPTIMIZER_SLOTS {
            pending.fetch(backend, i);
        }
        pending
    }

    /// Updates every piece that has a parameter before element `end`; whether that was the last one.
    pub(crate) fn advance<B: Backend + ?Sized>(&mut self, backend: &mut B, end: usize) -> bool {
        while let Some(&Piece { start, len, weight_decay, due }) = self.pieces.get(self.next) {
            if due >= end {
                return false;
            }
            let i = self.next;
            backend.wait(Stream::Compute, OptimizerPoint::Fetched.event(i));
            let (adam, slot) = (&self.update.adam, &self.slots.places[i % OPTIMIZER_SLOTS]);
            backend.adamw(&AdamW {
                weights: adam.weights.slice(start, len),
                masters: slot.masters.map(|masters| masters.slice(0, len)),
                rounding: adam.rounding.from(start),
                gradients: adam.gradients.slice(start, len),
                moment1: slot.moment1.slice(0, len),
                moment2: slot.moment2.slice(0, len),
                weight_decay,
                ..*adam
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

    /// Sends piece `i` on its way, if there is one, behind what its slot held before, in this update or the last.
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
        let Piece { start, len, .. } = self.pieces[i];
        let (adam, slot) = (&self.update.adam, self.slots.places[i % OPTIMIZER_SLOTS]);
        let pair = move |host: Buffer, slot: Buffer| (host.slice(start, len), slot.slice(0, len));
        let masters = adam.masters.zip(slot.masters).map(|(host, slot)| pair(host, slot));
        [pair(adam.moment1, slot.moment1), pair(adam.moment2, slot.moment2)].into_iter().chain(masters)
    }
}
