//! What stages of a pipeline do of a step's sums as ranks: rounds without a micro-batch, and the figures, which the last stage has.

use arl_model::Result;

use crate::backend::{Backend, Buffer};
use crate::engine::Engine;

impl<B: Backend + ?Sized> Engine<B> {
    /// Takes part in a round without a micro-batch, with gradients that are zero.
    pub(crate) fn take_part(&mut self) -> Result<()> {
        let gradients = self.training()?.gradients;
        self.ranks.claim_all_gradients(&mut *self.backend);
        self.backend.zero(gradients);
        self.take_turns()
    }

    /// Adds the gradients of a round to `sums`, where the passes have not done so part by part.
    pub(crate) fn add_whole_round(&mut self, sums: Buffer) -> Result<()> {
        if self.model.divides_gradients() {
            return Ok(());
        }
        let gradients = self.training()?.gradients;
        self.ranks.add_round(&mut *self.backend, gradients, sums.len, sums)
    }

    /// Gives every rank the figures of all `count` micro-batches: each rank of the last stage has computed those of its own. All
    /// ranks gather at once, because connections over TCP lead to rank 0 alone.
    pub(super) fn gather_figures(&mut self, figures: Buffer, count: usize) -> Result<()> {
        let mut own = vec![0; figures.bytes()];
        self.backend.read_back(figures, &mut own)?;
        let all = self.ranks.gather(&own, |sent| &mut sent.figures)?;
        let (size, place, of_one) = (self.ranks.size, self.model.place, own.len() / count);
        let last_stage = place.world() - place.stage();
        let of = |m: usize| &all[(last_stage + m % size) * own.len() + m * of_one..][..of_one];
        let merged: Vec<u8> = (0..count).flat_map(of).copied().collect();
        self.backend.upload(&merged, figures);
        Ok(())
    }
}
