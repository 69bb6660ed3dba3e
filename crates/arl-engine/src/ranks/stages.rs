//! What stages of a pipeline do of a step's sums as ranks: rounds without a micro-batch, and the figures, which the last stage has.

use arl_comm::Group;
use arl_model::Result;

use crate::backend::{Backend, Buffer};
use crate::engine::Engine;
use crate::mesh::Axis;
use crate::statistics::Figures;

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

    /// Gives all stages the figures of the last one.
    pub(super) fn share_figures(&mut self, figures: &Figures) -> Result<()> {
        let place = self.model.place;
        for buffer in figures.buffers() {
            let mut bytes = vec![0; buffer.bytes()];
            self.backend.read_back(buffer, &mut bytes)?;
            self.ranks.part_of(Axis::Pipeline)?.broadcast(place.mesh.pp - 1, &mut bytes)?;
            self.backend.upload(&bytes, buffer);
            let others = if place.is_last_stage() { place.mesh.pp - 1 } else { 0 };
            self.ranks.sent.figures += (others * bytes.len()) as u64;
        }
        Ok(())
    }
}
