//! The passes of a rank that has no tokens in a round, and experts that others have rows for: blocks exchange and compute those alone,
//! in the order of the passes of all others.

use arl_model::Result;

use super::Step;
use crate::backend::Backend;
use crate::batch::{BatchSize, Inputs};
use crate::options::Recompute;
use crate::placement::arena::Arena;
use crate::placement::cut::Complete;
use crate::rotary::Tables;
use crate::statistics::Figures;

impl<B: Backend + ?Sized> Step<'_, B> {
    /// Takes the memory of a micro-batch without tokens; `keep`: what layers keep for the backward pass, if there is one.
    pub(crate) fn begin_serving(&mut self, keep: Option<Recompute>) {
        let (model, nothing) = (self.model, BatchSize::default());
        let tower = model.tower.as_ref();
        let inputs = Inputs::take(self.arena, tower, nothing, 0, 0, Tables::dry(&model.rope));
        let nowhere = Figures::take(&mut Arena::new(usize::MAX), &model.shape, 0, 0);
        let run = self.begin(inputs, keep, nowhere);
        self.take_scratch(&run);
    }

    /// The forward pass of layer `l`.
    pub(crate) fn serve(&mut self, l: usize) -> Result<()> {
        self.check_interrupt()?;
        for b in self.model.layers[l].clone() {
            let block = self.stages.blocks[b].block;
            block.serve(&mut self.context());
        }
        self.check_exchanges()
    }

    /// The backward pass of layer `l`.
    pub(crate) fn serve_backward(&mut self, l: usize) -> Result<()> {
        self.check_interrupt()?;
        self.clear_buckets(Complete::Layer(l));
        let (blocks, level) = (self.model.layers[l].clone(), self.model.recompute);
        for b in blocks.clone().filter(|_| level != Recompute::Off) {
            let block = self.stages.blocks[b].block;
            block.serve_again(&mut self.context(), level);
        }
        let (lowest, _) = self.model.lowest_block;
        for b in blocks.rev().take_while(|b| *b >= lowest) {
            let block = self.stages.blocks[b].block;
            block.serve_backward(&mut self.context());
        }
        self.check_exchanges()
    }

    /// Zeroes gradients whose place others had before.
    pub(crate) fn clear_buckets(&mut self, complete: Complete) {
        let (model, training) = (self.model, self.model.store.training);
        let Some((cut, training)) = model.cut.as_ref().filter(|cut| cut.gradients).zip(training) else { return };
        if let Some(ranks) = &mut self.ranks {
            ranks.claim_gradients(self.backend, model, complete);
        }
        for bucket in cut.completed(complete).filter(|bucket| bucket.shared) {
            self.backend.zero(training.gradients.slice(bucket.gradient, bucket.len));
        }
    }
}
