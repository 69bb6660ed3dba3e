//! The end of an optimizer step: AdamW over all parameters. With `optimizer_offload` the next forward pass does it: masters
//! and moments come from host memory a piece at a time and go back beside the layers that are computed, and each piece is
//! updated just before the first layer that it has weights of.

use crate::backend::{AdamW, Backend, Buffer, DType, Event, StochasticRounding, Stream};
use crate::options::{Adam, Hyper};
use crate::params::{Store, TrainingStore};
use crate::step::OFFLOAD_EVENTS;

/// Pieces on the device at a time: one comes, one is updated, one goes.
const SLOTS: usize = 3;

/// Parameters of a piece: those that are on their way come while a layer of a large model is computed.
const PIECE: usize = 16 << 20;

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
        for i in 0..SLOTS {
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
            backend.wait(Stream::Compute, event(i, Point::Fetched));
            let (adam, slot) = (&self.update.adam, &self.slots.places[i % SLOTS]);
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
            backend.record(Stream::Compute, event(i, Point::Updated));
            backend.wait(Stream::ToHost, event(i, Point::Updated));
            for (host, slot) in self.pairs(i) {
                backend.transfer(Stream::ToHost, slot, host);
            }
            backend.record(Stream::ToHost, event(i, Point::Saved));
            self.fetch(backend, i + SLOTS);
            self.next += 1;
        }
        true
    }

    /// Sends piece `i` on its way, if there is one, behind what its slot held before, in this update or the last.
    fn fetch<B: Backend + ?Sized>(&self, backend: &mut B, i: usize) {
        if i < self.pieces.len() {
            backend.wait(Stream::FromHost, event(i, Point::Saved));
            for (host, slot) in self.pairs(i) {
                backend.transfer(Stream::FromHost, host, slot);
            }
            backend.record(Stream::FromHost, event(i, Point::Fetched));
        }
    }

    /// The parts of piece `i` in host memory, and their places on the device.
    fn pairs(&self, i: usize) -> impl Iterator<Item = (Buffer, Buffer)> + use<> {
        let Piece { start, len, .. } = self.pieces[i];
        let (adam, slot) = (&self.update.adam, self.slots.places[i % SLOTS]);
        let pair = move |host: Buffer, slot: Buffer| (host.slice(start, len), slot.slice(0, len));
        let masters = adam.masters.zip(slot.masters).map(|(host, slot)| pair(host, slot));
        [pair(adam.moment1, slot.moment1), pair(adam.moment2, slot.moment2)].into_iter().chain(masters)
    }
}

/// Where a piece lies on the device.
#[derive(Clone, Copy, Debug)]
struct Slot {
    moment1: Buffer,
    moment2: Buffer,
    masters: Option<Buffer>,
}

/// The places of the pieces that are on the device. They are kept from step to step, because the first pieces come while
/// the last layers' gradients are computed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slots {
    places: [Slot; SLOTS],
    /// Parameters of a piece.
    piece: usize,
}

impl Slots {
    /// Takes the slots for `len` parameters, with moments of a type, and masters of a type or none.
    pub(crate) fn take(
        len: usize,
        moments: DType,
        masters: Option<DType>,
        mut take: impl FnMut(DType, usize) -> Buffer,
    ) -> Self {
        // A small model has several pieces too, so that its tests are about the same thing.
        let piece = PIECE.min(len.div_ceil(5).next_multiple_of(64));
        let mut slot = || Slot {
            moment1: take(moments, piece),
            moment2: take(moments, piece),
            masters: masters.map(|dtype| take(dtype, piece)),
        };
        Slots { places: [slot(), slot(), slot()], piece }
    }

    /// Bytes of all of them.
    pub(crate) fn bytes(&self) -> usize {
        let slot = |slot: &Slot| slot.moment1.bytes() + slot.moment2.bytes() + slot.masters.map_or(0, Buffer::bytes);
        self.places.iter().map(slot).sum()
    }
}
