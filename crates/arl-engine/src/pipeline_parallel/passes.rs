//! The gradients of a step's micro-batches as a stage computes them.

use arl_model::Result;

use super::passing::{Passed, Passing};
use super::schedule::{Action, schedule};
use crate::backend::{Backend, Buffer};
use crate::batch::{Inputs, MicroBatch};
use crate::blocks::{LowRankDropout, Run};
use crate::engine::Engine;
use crate::mesh::Axis;
use crate::options::Recompute;
use crate::statistics::{Figures, MicroBatchStats};
use crate::step::Step;
use crate::token_slice::{Sliced, Slicing};

/// The micro-batches of a step.
pub(crate) struct Rounds<'a> {
    /// Those of this rank, one a round; the last round may have none.
    pub(crate) own: &'a [MicroBatch],
    /// This rank's slices of them.
    pub(crate) slicing: Slicing,
    /// Of the slices of all micro-batches of the step.
    pub(crate) stats: &'a [MicroBatchStats],
    pub(crate) figures: Figures,
    /// Of all targets.
    pub(crate) weight: f64,
    /// Most tokens of a slice.
    pub(crate) tokens: usize,
    /// The number of the step.
    pub(crate) step: u64,
    pub(crate) sums: Buffer,
}

impl<B: Backend + ?Sized> Engine<B> {
    /// Queues the gradients of all rounds, which are added to `sums`.
    pub(crate) fn accumulate_in_stages(&mut self, rounds: &Rounds<'_>) -> Result<()> {
        let place = self.model.place;
        let (stages, stage) = (place.size(Axis::Pipeline), place.index(Axis::Pipeline));
        let passing = Passing::take(&mut self.arena, &self.model, rounds.tokens);
        let count = rounds.stats.len().div_ceil(place.stage());
        for action in schedule(stages, stage, count) {
            match action {
                Action::Forward(round) => self.forward_of(rounds, &passing, round)?,
                Action::Backward(round) => self.backward_of(rounds, &passing, round)?,
                Action::Before { gives, takes } => {
                    let gives = self.passed(rounds, &passing, gives).map(|passed| passed.link);
                    let takes = self.passed(rounds, &passing, takes).and_then(|passed| passed.input);
                    self.parts().pass(stage - 1, gives, takes)?;
                }
                Action::Behind { gives, takes } => {
                    let [gives, takes] =
                        [gives, takes].map(|round| self.passed(rounds, &passing, round).map(|passed| passed.link));
                    self.parts().pass(stage + 1, gives, takes)?;
                }
            }
        }
        Ok(())
    }

    /// This rank's slice of the micro-batch of a round; none: it has none, or one without targets.
    fn batch_of<'a>(&self, rounds: &Rounds<'a>, round: usize) -> Option<Sliced<'a>> {
        let batch = rounds.own.get(round).filter(|batch| batch.has_targets())?;
        Some(Sliced { batch, slicing: rounds.slicing })
    }

    /// What is passed of the micro-batch of a round.
    fn passed(&self, rounds: &Rounds<'_>, passing: &Passing, round: Option<usize>) -> Option<Passed> {
        let batch = self.batch_of(rounds, round?)?;
        Some(passing.of(&self.model, round?, batch.padded().len()))
    }

    /// Begins a pass over the micro-batch of a round.
    fn begin_of(
        &mut self,
        rounds: &Rounds<'_>,
        passing: &Passing,
        round: usize,
        keep: Option<Recompute>,
    ) -> Option<(Run, Figures)> {
        let batch = self.batch_of(rounds, round)?;
        let m = round * self.model.place.stage() + self.model.place.index(Axis::Stage);
        let own = rounds.figures.of(m, rounds.stats.len());
        let mut run = self.begin(batch, keep, own);
        (run.loss_scale, run.first) = (self.gradient_scale, true);
        run.dropout = self.model.dropout(rounds.step, m / rounds.slicing.count, batch.first());
        run.passed = Some(passing.of(&self.model, round, batch.padded().len()));
        Some((run, own))
    }

    fn forward_of(&mut self, rounds: &Rounds<'_>, passing: &Passing, round: usize) -> Result<()> {
        let bottom = self.arena.mark();
        self.begin_round(round, rounds.stats);
        match self.begin_of(rounds, passing, round, None) {
            Some((run, _)) => self.parts().forward_alone(&run)?,
            None => self.serve_forward()?,
        }
        self.arena.release(bottom);
        Ok(())
    }

    fn backward_of(&mut self, rounds: &Rounds<'_>, passing: &Passing, round: usize) -> Result<()> {
        let (bottom, keep) = (self.arena.mark(), Some(self.model.recompute));
        self.begin_round(round, rounds.stats);
        match self.begin_of(rounds, passing, round, keep).zip(self.batch_of(rounds, round)) {
            Some(((run, own), batch)) => {
                self.parts().train(&run, rounds.weight)?;
                if self.model.place.is_last_stage() {
                    self.parts().sum_sequences(batch, &run, own.sequence_losses);
                }
                self.arena.release(bottom);
            }
            None => self.take_part()?,
        }
        self.add_whole_round(rounds.sums)
    }
}

impl<B: Backend + ?Sized> Step<'_, B> {
    /// What a dry run does of a round besides the pass that the backward pass follows.
    pub(crate) fn pass_round(
        &mut self,
        inputs: Inputs,
        figures: Figures,
        passed: Passed,
        dropout: Option<LowRankDropout>,
    ) -> Result<()> {
        let (place, bottom) = (self.model.place, self.arena.mark());
        let stage = place.index(Axis::Pipeline);
        if !place.is_last_stage() {
            let mut run = self.begin(inputs, None, figures);
            (run.passed, run.dropout) = (Some(passed), dropout);
            self.forward_alone(&run)?;
            self.arena.release(bottom);
            self.pass(stage + 1, Some(passed.link), None)?;
        }
        if !place.is_first_stage() {
            self.pass(stage - 1, Some(passed.link), None)?;
        }
        Ok(())
    }

    /// The forward pass whose output is passed on, and of which nothing else is left.
    pub(crate) fn forward_alone(&mut self, run: &Run) -> Result<()> {
        let top = self.arena.mark();
        self.use_dropout(run);
        self.see(run)?;
        self.take_scratch(run);
        self.forward(run, None)?;
        self.arena.release(top);
        self.check_exchanges()
    }

    /// The residual stream before a stage's first layer, which the stage before has passed.
    pub(crate) fn take_over(&mut self, run: &Run, stream: Buffer) {
        let Some(input) = run.passed.and_then(|passed| passed.input) else { return };
        self.backend.copy(input.stream, stream);
        if let (Some(before), Some(balance)) = (input.balance, run.balance) {
            self.backend.copy(before, balance);
        }
    }

    /// Passes the residual stream behind a stage's last layer on; `before` is the stream to which that adds `run.delta`.
    pub(crate) fn pass_on(&mut self, run: &Run, before: Buffer) {
        let Some(link) = run.passed.map(|passed| passed.link) else { return };
        self.backend.copy(before, link.stream);
        self.backend.add(link.stream, run.delta);
        self.pass_balance(run);
    }

    /// Passes on what is known of the experts' balance.
    pub(crate) fn pass_balance(&mut self, run: &Run) {
        if let (Some(all), Some(link)) = (run.balance, run.passed.and_then(|passed| passed.link.balance)) {
            self.backend.copy(all, link);
        }
    }

    /// Before the backward pass: the balance of all layers, where the stages behind know it alone.
    pub(crate) fn take_balance(&mut self, run: &Run) {
        if let (Some(all), Some(link)) = (run.balance, run.passed.and_then(|passed| passed.link.balance)) {
            self.backend.copy(link, all);
        }
    }
}
