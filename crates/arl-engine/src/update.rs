//! The end of an optimizer step: AdamW over all trained parameters. With `optimizer_offload` the next forward pass does it:
//! masters and moments are fetched from host memory a piece at a time and return while layers are computed, and each piece
//! is updated just before the first layer that uses its weights. Some stay on the device (`kept.rs`).

use crate::backend::{AdamW, Backend, Buffer, StochasticRounding, Stream};
use crate::events::{OPTIMIZER_SLOTS, OptimizerPoint};
use crate::kept::{Kept, Pieces, Place};
use crate::options::{Adam, Hyper};
use crate::placement::Run;
use crate::placement::store::{Slot, Slots, Store, TrainingStore};

/// An update of all trained parameters.
#[derive(Clone, Debug)]
pub(crate) struct Update {
    /// What is the same for all parameters; its buffers are the whole arrays.
    adam: AdamW,
    runs: Vec<Run>,
    /// Bias corrections of the vision tower; none: no image was seen, and the tower stays as it is.
    vision: Option<[f32; 2]>,
    /// The gradients are those of this rank's own pieces.
    own_gradients: bool,
}

/// The numbers of an update: the run's, and this step's.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Numbers {
    pub(crate) adam: Adam,
    pub(crate) hyper: Hyper,
    /// Counted from 1.
    pub(crate) step: u64,
    /// Steps that have seen an image, this one included, counted from 1; none: this one has not.
    pub(crate) vision_step: Option<u64>,
    /// What the gradients are to be divided by.
    pub(crate) gradient_scale: f32,
    pub(crate) rounding_seed: u64,
}

impl Update {
    /// `sums`: the gradients where they exist for this rank's own pieces alone.
    pub(crate) fn new(
        store: &Store,
        training: &TrainingStore,
        sums: Option<Buffer>,
        runs: Vec<Run>,
        numbers: Numbers,
    ) -> Self {
        let Numbers { adam, hyper, step, vision_step, gradient_scale, rounding_seed } = numbers;
        let correction_at = |beta: f32, step: u64| (1.0 - f64::from(beta).powf(step as f64)) as f32;
        let correction = |beta: f32| correction_at(beta, step);
        let vision = vision_step.map(|step| [adam.beta1, adam.beta2].map(|beta| correction_at(beta, step)));
        let adam = AdamW {
            weights: store.weights,
            masters: store.masters,
            rounding: StochasticRounding::new(rounding_seed, step),
            gradients: sums.unwrap_or(training.gradients),
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
        Update { adam, runs, vision, own_gradients: sums.is_some() }
    }

    /// The update of a run, of the whole arrays on the device; none: it stays as it is.
    fn of(&self, run: Run) -> Option<AdamW> {
        let whole = [self.adam.bias_correction1, self.adam.bias_correction2];
        let [bias_correction1, bias_correction2] = if run.vision { self.vision? } else { whole };
        let part = |buffer: Buffer| buffer.slice(run.own, run.len);
        let gradient = if self.own_gradients { run.own } else { run.optimizer };
        Some(AdamW {
            bias_correction1,
            bias_correction2,
            weights: Store::of_run(self.adam.weights, run),
            masters: self.adam.masters.filter(|_| !run.wide).map(part),
            rounding: self.adam.rounding.from(run.optimizer),
            gradients: self.adam.gradients.slice(gradient, run.len),
            moment1: part(self.adam.moment1),
            moment2: part(self.adam.moment2),
            weight_decay: if run.decay { self.adam.weight_decay } else { 0.0 },
            ..self.adam
        })
    }

    /// The update where everything is on the device.
    pub(crate) fn run<B: Backend + ?Sized>(&self, backend: &mut B) {
        self.runs.iter().filter_map(|run| self.of(*run)).for_each(|update| backend.adamw(&update));
    }
}

/// An update whose masters and moments are in host memory, a piece at a time.
#[derive(Clone, Debug)]
pub(crate) struct Pending {
    update: Update,
    pieces: Pieces,
    /// The next piece to update; the copies of those that follow it through the slots are queued.
    next: usize,
}

impl Pending {
    /// Queues the copies of the first pieces to the device; where it has not got those that stay yet, of these as well.
    pub(crate) fn begin<B: Backend + ?Sized>(backend: &mut B, update: Update, slots: Slots, kept: &mut Kept) -> Self {
        let AdamW { moment1, moment2, masters, .. } = update.adam;
        let pieces = Pieces::new(Slot { moment1, moment2, masters }, &update.runs, slots, kept.count);
        if kept.count > 0 {
            if !kept.loaded {
                pieces.copy_kept(backend, Stream::FromHost);
            }
            (kept.loaded, kept.changed) = (true, true);
        }
        let pending = Pending { update, pieces, next: 0 };
        for number in 0..OPTIMIZER_SLOTS {
            pending.fetch(backend, number);
        }
        pending
    }

    /// Updates every piece that has a decayed weight before element `end` of the weights' arena, or any other; whether that was
    /// the last one.
    pub(crate) fn advance<B: Backend + ?Sized>(&mut self, backend: &mut B, end: usize) -> bool {
        while let Some(&piece) = self.pieces.get(self.next) {
            if piece.decay && !piece.wide && piece.weights >= end {
                return false;
            }
            let i = self.next;
            let Slot { moment1, moment2, masters } = self.pieces.slot(i);
            let masters = masters.filter(|_| !piece.wide);
            // A piece that stays as it is comes and goes all the same: places do not change from step to step.
            let update = self.update.of(piece).map(|update| AdamW { masters, moment1, moment2, ..update });
            match self.pieces.place(i) {
                Place::Kept(_) => update.iter().for_each(|update| backend.adamw(update)),
                Place::Passing(number) => {
                    backend.wait(Stream::Compute, OptimizerPoint::Fetched.event(number));
                    update.iter().for_each(|update| backend.adamw(update));
                    backend.record(Stream::Compute, OptimizerPoint::Updated.event(number));
                    backend.wait(Stream::ToHost, OptimizerPoint::Updated.event(number));
                    for (host, slot) in self.pieces.pairs(i) {
                        backend.transfer(Stream::ToHost, slot, host);
                    }
                    backend.record(Stream::ToHost, OptimizerPoint::Saved.event(number));
                    self.fetch(backend, number + OPTIMIZER_SLOTS);
                }
            }
            self.next += 1;
        }
        true
    }

    /// Queues the copy of the piece that is number `number` of those that come and go, if there is one, behind what its slot
    /// held before, in this update or the last.
    fn fetch<B: Backend + ?Sized>(&self, backend: &mut B, number: usize) {
        if let Some(i) = self.pieces.passing(number) {
            backend.wait(Stream::FromHost, OptimizerPoint::Saved.event(number));
            for (host, slot) in self.pieces.pairs(i) {
                backend.transfer(Stream::FromHost, host, slot);
            }
            backend.record(Stream::FromHost, OptimizerPoint::Fetched.event(number));
        }
    }
}
