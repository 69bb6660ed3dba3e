//! A step's way: its gradients are submitted, its update is applied, and its figures are waited for, so that a device always
//! has work queued. Knows the order of these, and what becomes of a step when another one fails.

use std::time::Instant;

use arl_model::{Error, ErrorCode, Result};

use crate::backend::{Backend, Rows};
use crate::batch::MicroBatch;
use crate::engine::Engine;
use crate::loss_scale;
use crate::options::Hyper;
use crate::queue::{Queued, Ticket};
use crate::statistics::{MicroBatchStats, StepStats};

impl<B: Backend + ?Sized> Engine<B> {
    /// ONE optimizer step over all micro-batches: gradients of `sum(weight nll) / sum(weight)` over all their targets,
    /// clipping, AdamW. A micro-batch without targets contributes nothing; a step without any is an error, as is a
    /// loss or gradient that is not finite; with f16 such a step is skipped, as long as the loss scale can fall. After an
    /// error weights, moments and step count are as before.
    pub fn step(&mut self, batches: &[MicroBatch], hyper: Hyper) -> Result<StepStats> {
        let ticket = self.submit(batches, hyper)?;
        self.finish(ticket)
    }

    /// Queues the gradients of a step behind the update of the one before, without waiting for the device; with f16 it waits
    /// for the figures of the step before. Weights and moments are not touched until [`Engine::apply`]; until then
    /// whatever else computes gives the step up: another `submit`, `evaluate`, `generate`, `inspect`, `gradients`,
    /// `restore_state`.
    pub fn submit(&mut self, batches: &[MicroBatch], hyper: Hyper) -> Result<Ticket> {
        let result = self.queue_gradients(batches, hyper);
        self.settle_interrupt(result)
    }

    fn queue_gradients(&mut self, batches: &[MicroBatch], hyper: Hyper) -> Result<Ticket> {
        let start = Instant::now();
        let training = self.training()?;
        check_hyper(hyper)?;
        if self.loss_scale.is_some() {
            // What the step before came to decides the scale of this one.
            self.settle();
        }
        let statistics = self.accumulate(batches)?;
        let norm_squared = training.norm_squared;
        self.backend.zero(norm_squared);
        match training.sums {
            None => self.backend.dot(training.gradients, training.gradients, norm_squared),
            Some(sums) if self.model.divides_gradients() => self.norm_of_pieces(sums, norm_squared)?,
            Some(_) => self.norm_of_whole(training.gradients, norm_squared)?,
        }
        let losses = Rows { buffer: statistics.figures.sums, stride: 3 };
        self.backend.guard(losses, statistics.figures.balances, norm_squared);
        self.queue.last += 1;
        let ticket = Ticket(self.queue.last);
        self.queue.submitted = Some(Queued { ticket, start, hyper, statistics });
        Ok(ticket)
    }

    /// Queues the update of a submitted step, which the device leaves out where a loss or gradient is not finite. Waits for
    /// the figures of the step before, if nobody has: where that one failed, this one is given up. To apply a step again,
    /// or one that was given up, changes nothing.
    pub fn apply(&mut self, ticket: Ticket) -> Result<()> {
        let training = self.training()?;
        if self.queue.submitted.as_ref().is_none_or(|step| step.ticket != ticket) {
            return Ok(());
        }
        self.settle();
        let Some(step) = self.queue.submitted.take() else { return Ok(()) };
        self.update(&training, step.hyper, step.statistics.sees)?;
        let read: Vec<_> = step.statistics.figures.buffers().chain([training.norm_squared]).collect();
        self.backend.queue_read(&read);
        self.queue.applied = Some(step);
        Ok(())
    }

    /// Whether [`Engine::finish`] would not wait for the device.
    pub fn arrived(&mut self, ticket: Ticket) -> bool {
        match &self.queue.applied {
            Some(step) if step.ticket == ticket => self.backend.read_arrived(),
            _ => self.queue.submitted.as_ref().is_none_or(|step| step.ticket != ticket),
        }
    }

    /// Applies a submitted step where that was not done, and waits for its figures. Fails as [`Engine::step`] does, with
    /// `Interrupted` where the step was given up, and with `Internal` where the ticket was used.
    pub fn finish(&mut self, ticket: Ticket) -> Result<StepStats> {
        self.apply(ticket)?;
        if self.queue.applied.as_ref().is_some_and(|step| step.ticket == ticket) {
            self.settle();
        }
        let outcome = self.queue.outcomes.iter().position(|(other, _)| *other == ticket);
        match outcome {
            Some(i) => self.queue.outcomes.swap_remove(i).1,
            None => Err(Error::new(ErrorCode::Internal, format!("step {} was finished before", ticket.0))),
        }
    }

    /// Gives up the step that was submitted and not applied, if there is one. What was applied stays.
    pub fn discard(&mut self) {
        self.give_up("the step was given up before it was applied".into());
    }

    /// Waits for the figures of the step that was applied, if the host has not got them: then weights, moments and step
    /// count are those of one moment.
    pub(crate) fn settle(&mut self) {
        let Some(step) = self.queue.applied.take() else { return };
        let (ticket, number, sees) = (step.ticket, self.steps + 1, step.statistics.sees);
        let result = self.figures(step);
        match &result {
            Ok(stats) if stats.skipped => {}
            Ok(_) => (self.steps, self.vision_steps) = (number, self.vision_steps + u64::from(sees)),
            Err(_) => self.give_up(format!("the step behind step {number} was not taken, because that one failed")),
        }
        self.queue.end = Some(Instant::now());
        self.queue.outcomes.push((ticket, result));
    }

    /// Gives up the step that was submitted and not applied, because something else needs its memory.
    pub(crate) fn give_up_submitted(&mut self) {
        self.give_up("the step was not taken, because something else was computed before it was applied".into());
    }

    fn give_up(&mut self, message: String) {
        if let Some(step) = self.queue.submitted.take() {
            self.queue.outcomes.push((step.ticket, Err(Error::new(ErrorCode::Interrupted, message))));
        }
    }

    /// Waits for the figures of a step that was applied.
    fn figures(&mut self, step: Queued) -> Result<StepStats> {
        let bytes = step.statistics.bytes();
        let mut host = vec![0; bytes + size_of::<f64>()];
        self.backend.finish_read(&mut host)?;
        let (statistics, norm_squared) = host.split_at(bytes);
        let grad_norm = bytemuck::pod_read_unaligned::<f64>(norm_squared).sqrt() / f64::from(self.gradient_scale);
        let sequence_losses = step.statistics.sequence_losses(statistics);
        let micro_batches = step.statistics.complete(&self.model.shape, statistics);
        let scale = self.loss_scale.map(|scale| scale.scale());
        let outcome = self.check_finite(&micro_batches, grad_norm);
        let skipped = loss_scale::settle(&mut self.loss_scale, outcome)?;
        let sum = |of: fn(&MicroBatchStats) -> f64| micro_batches.iter().map(of).sum::<f64>();
        let loss = sum(|s| s.loss_sum) / sum(|s| s.target_weight) + sum(|s| s.balance_loss);
        let start = self.queue.end.map_or(step.start, |end| end.max(step.start));
        let seconds = start.elapsed().as_secs_f64();
        Ok(StepStats { loss, grad_norm, micro_batches, sequence_losses, loss_scale: scale, skipped, seconds })
    }

    fn check_finite(&self, stats: &[MicroBatchStats], grad_norm: f64) -> Result<()> {
        let step = self.steps + 1;
        let hint = "the learning rate may be too high, or a row or weight damaged; nothing was updated";
        let error = |what: String| Err(Error::new(ErrorCode::NonFinite, format!("step {step}: {what}")).hint(hint));
        for (i, stat) in stats.iter().enumerate() {
            let loss = stat.loss_sum + stat.balance_loss;
            if !loss.is_finite() {
                return error(format!("the loss of micro-batch {i} is {loss}"));
            }
        }
        if !grad_norm.is_finite() {
            return error(format!("the gradient norm is {grad_norm}"));
        }
        Ok(())
    }
}

fn check_hyper(hyper: Hyper) -> Result<()> {
    for (name, value) in [("learning rate", hyper.learning_rate), ("max_grad_norm", hyper.max_grad_norm)] {
        if !(value >= 0.0 && value.is_finite()) {
            return Err(Error::new(
                ErrorCode::Config,
                format!("the {name} is {value}; it must be finite and at least 0"),
            ));
        }
    }
    Ok(())
}
