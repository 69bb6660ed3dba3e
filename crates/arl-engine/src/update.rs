//! The end of an optimizer step: AdamW over all parameters, and, with `optimizer_offload`, the way of masters and moments
//! from host memory and back, a piece at a time, beside the update of the piece before.

use crate::arena::{Arena, Category};
use crate::backend::{AdamW, Backend, Buffer, DType, Event, Stream};
use crate::engine::Hyper;
use crate::params::{Store, TrainingStore};
use crate::step::OFFLOAD_EVENTS;

/// Pieces on the device at a time: one comes, one is updated, one goes.
const SLOTS: usize = 3;

/// Parameters of a piece.
const PIECE: usize = 8 << 20;

/// A slot's events.
#[derive(Clone, Copy)]
enum Point {
    /// The piece is on the device.
    Fetched,
    /// It is updated.
    Updated,
    /// It is in host memory again.
    Saved,
}

fn event(piece: usize, point: Point) -> Event {
    Event(OFFLOAD_EVENTS + 3 * (piece % SLOTS) as u32 + point as u32)
}

/// What an update needs besides the arrays.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Update {
    /// What is the same for all parameters; its buffers stand for the whole arrays.
    pub(crate) adam: AdamW,
    /// The first so many parameters are decayed.
    pub(crate) decayed: usize,
}

impl Update {
    pub(crate) fn new(
        store: &Store,
        training: &TrainingStore,
        adam: crate::engine::Adam,
        decayed: usize,
        hyper: Hyper,
        step: u64,
    ) -> Self {
        let correction = |beta: f32| (1.0 - f64::from(beta).powf(step as f64)) as f32;
        let adam = AdamW {
            weights: store.weights,
            masters: store.masters,
            rounding: None,
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
            gradient_scale: 1.0,
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
                rounding: self.adam.rounding.map(|rounding| rounding.from(start)),
                gradients: part(self.adam.gradients),
                moment1: part(self.adam.moment1),
                moment2: part(self.adam.moment2),
                weight_decay,
                ..self.adam
            });
        }
    }

    /// The update where moments, and masters beside weights of 16 bits, are in host memory.
    pub(crate) fn run_offloaded<B: Backend + ?Sized>(&self, backend: &mut B, slots: &Slots) {
        let pieces: Vec<(usize, usize, f32)> = self
            .runs()
            .into_iter()
            .flat_map(|(start, end, decay)| {
                (start..end).step_by(slots.piece).map(move |at| (at, slots.piece.min(end - at), decay))
            })
            .collect();
        // What the step computed is in the memory of the slots.
        for slot in 0..SLOTS.min(pieces.len()) {
            backend.record(Stream::Compute, event(slot, Point::Updated));
            backend.wait(Stream::FromHost, event(slot, Point::Updated));
        }
        let fetch = |backend: &mut B, i: usize| {
            let Some(&(start, len, _)) = pieces.get(i) else { return };
            if i >= SLOTS {
                backend.wait(Stream::FromHost, event(i, Point::Saved));
            }
            for (host, slot) in self.pairs(slots, i, start, len) {
                backend.transfer(Stream::FromHost, host, slot);
            }
            backend.record(Stream::FromHost, event(i, Point::Fetched));
        };
        for i in 0..SLOTS - 1 {
            fetch(backend, i);
        }
        for (i, &(start, len, weight_decay)) in pieces.iter().enumerate() {
            fetch(backend, i + SLOTS - 1);
            backend.wait(Stream::Compute, event(i, Point::Fetched));
            let slot = &slots.places[i % SLOTS];
            backend.adamw(&AdamW {
                weights: self.adam.weights.slice(start, len),
                masters: slot.masters.map(|masters| masters.slice(0, len)),
                rounding: self.adam.rounding.map(|rounding| rounding.from(start)),
                gradients: self.adam.gradients.slice(start, len),
                moment1: slot.moment1.slice(0, len),
                moment2: slot.moment2.slice(0, len),
                weight_decay,
                ..self.adam
            });
            backend.record(Stream::Compute, event(i, Point::Updated));
            backend.wait(Stream::ToHost, event(i, Point::Updated));
            for (host, slot) in self.pairs(slots, i, start, len) {
                backend.transfer(Stream::ToHost, slot, host);
            }
            backend.record(Stream::ToHost, event(i, Point::Saved));
        }
        // The next step computes in the memory of the slots.
        for slot in 0..SLOTS.min(pieces.len()) {
            backend.wait(Stream::Compute, event(slot, Point::Saved));
        }
    }

    /// The parts of piece `i` in host memory, and their places on the device.
    fn pairs(&self, slots: &Slots, i: usize, start: usize, len: usize) -> impl Iterator<Item = (Buffer, Buffer)> {
        let slot = slots.places[i % SLOTS];
        let pair = move |host: Buffer, slot: Buffer| (host.slice(start, len), slot.slice(0, len));
        let masters = self.adam.masters.zip(slot.masters).map(|(host, slot)| pair(host, slot));
        [pair(self.adam.moment1, slot.moment1), pair(self.adam.moment2, slot.moment2)].into_iter().chain(masters)
    }
}

/// Where a piece lies on the device.
#[derive(Clone, Copy, Debug)]
struct Slot {
    moment1: Buffer,
    moment2: Buffer,
    masters: Option<Buffer>,
}

/// The places of the pieces that are on the device.
#[derive(Clone, Debug)]
pub(crate) struct Slots {
    places: [Slot; SLOTS],
    /// Parameters of a piece.
    piece: usize,
}

impl Slots {
    /// Takes the slots from the step's memory, which is free between micro-batches.
    pub(crate) fn take(arena: &mut Arena, store: &Store) -> Self {
        // A small model has several pieces too, so that its tests are about the same thing.
        let piece = PIECE.min(store.weights.len.div_ceil(5).next_multiple_of(64));
        let mut take = |dtype| arena.take(Category::Workspace, dtype, piece);
        let mut slot = || Slot {
            moment1: take(DType::F32),
            moment2: take(DType::F32),
            masters: store.masters.map(|masters| take(masters.dtype)),
        };
        Slots { places: [slot(), slot(), slot()], piece }
    }
}
