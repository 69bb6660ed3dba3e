//! The backward pass. Gradients of parameters are added to, or assigned in a step's first micro-batch; gradients of
//! activations are assigned, except that of the residual stream, to which each block adds its own.

use arl_model::Result;

use super::Step;
use crate::backend::{Backend, Buffer, DType};
use crate::blocks::Run;
use crate::placement::Param;
use crate::placement::cut::Complete;
use crate::placement::shards::Part;

impl<B: Backend + ?Sized> Step<'_, B> {
    /// From `d_norm` `[T, H]`, the gradient of the head's input, to that of every parameter but the head's, down to the
    /// lowest of the decoder that is trained, and of the tower's rows. `d_x` `[T, H]` is the residual stream's; of a stage of a
    /// pipeline, first the one that was passed back, then the one to pass back.
    pub(super) fn backward(&mut self, run: &Run, d_norm: Buffer, d_x: Buffer) -> Result<()> {
        if self.model.place.is_last_stage() {
            self.backend.zero(d_x);
            self.norm_backward(self.model.final_norm, d_norm, run.delta, run.final_inverse_rms, d_x);
            self.pass_balance(run);
        }
        for l in (self.model.lowest_layer..self.model.own_layers.end).rev() {
            self.check_interrupt()?;
            self.need(Part::Layer(l))?;
            self.await_input(l);
            self.add_seen_backward(l, run, d_x);
            self.clear_added(run, Complete::Layer(l));
            self.recompute(l, run, self.model.recompute);
            let (lowest, ends) = self.model.lowest_block;
            for b in self.model.layers[l].clone().rev().take_while(|b| *b >= lowest) {
                let stage = self.stages.blocks[b];
                if ends && b == lowest {
                    stage.block.backward(&mut self.context(), stage.input, run, d_x, d_norm.slice(0, 0));
                    break;
                }
                stage.block.backward(&mut self.context(), stage.input, run, d_x, d_norm);
                self.norm_backward(stage.norm, d_norm, self.stages.streams[b], stage.inverse_rms, d_x);
            }
            self.fetch_input(l);
            self.check_exchanges()?;
            self.collect(Complete::Layer(l))?;
        }
        self.clear_added(run, Complete::End);
        self.embed_images_backward(run, d_x);
        if self.model.place.is_first_stage() { self.embedding_backward(run, d_x) } else { Ok(()) }
    }

    /// From the gradient of a norm's output to that of its weight, and added to that of the residual stream.
    fn norm_backward(&mut self, norm: Param, d_out: Buffer, x: Buffer, inverse_rms: Buffer, d_x: Buffer) {
        let top = self.arena.mark();
        let (weight, d_weight) = (self.model.norm(norm), self.context().norm_gradient(norm));
        self.backend.rms_norm_backward(d_out, x, weight, inverse_rms, d_x, d_weight);
        self.arena.release(top);
    }

    /// The look-up's part of the embedding's gradient; the padding row, if the model has one, gets none.
    fn embedding_backward(&mut self, run: &Run, d_x: Buffer) -> Result<()> {
        let h = self.model.shape.hidden;
        if let Some(adapter) = self.model.embedding_adapter {
            self.need(Part::Embedding)?;
            let padding = self.model.shape.padding_idx;
            adapter.backward(&mut self.context(), run.inputs.ids, d_x, padding);
        }
        let Some(d_table) = self.model.store.gradient(self.model.embedding) else { return Ok(()) };
        let Some(row) = self.model.shape.padding_idx else {
            self.backend.embedding_backward(run.inputs.ids, d_x, h, d_table);
            return Ok(());
        };
        // A tied head has a part in this row, which stays.
        let top = self.arena.mark();
        let kept = self.context().workspace(DType::F32, h);
        self.backend.copy(d_table.slice(row * h, h), kept);
        self.backend.embedding_backward(run.inputs.ids, d_x, h, d_table);
        self.backend.copy(kept, d_table.slice(row * h, h));
        self.arena.release(top);
        Ok(())
    }
}
