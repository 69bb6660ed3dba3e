//! The forward pass, and the parts of it that the backward pass computes again.

use arl_model::Result;

use super::Step;
use crate::backend::Backend;
use crate::blocks::Run;
use crate::blocks::cache::{Cached, NewTokens};
use crate::options::Recompute;
use crate::placement::shards::Part;

/// What tokens of sequences that are being generated see and join.
#[derive(Clone, Copy)]
pub(crate) struct Generation<'a> {
    /// By blocks; those that do not mix tokens keep nothing.
    pub(crate) caches: &'a [Option<Cached>],
    pub(crate) new: &'a NewTokens,
}

impl<B: Backend + ?Sized> Step<'_, B> {
    /// From ids, and what the tower made of images, to the head's input `run.final_norm`; of a stage of a pipeline, from the stream
    /// that was passed to the one that is passed on.
    pub(crate) fn forward(&mut self, run: &Run, generation: Option<Generation<'_>>) -> Result<()> {
        if let Some(balance) = run.balance {
            self.backend.zero(balance);
        }
        if self.model.place.is_first_stage() {
            self.embed(run)?;
        } else {
            self.take_over(run, self.stages.streams[0]);
        }
        // What a stage passes on it has passed on already where a backward pass follows.
        let passes_on = run.keep.is_none() || self.model.place.is_last_stage();
        for l in self.model.own_layers.clone() {
            self.check_interrupt()?;
            self.update_to(self.model.placement.layer_ends[l]);
            self.need(Part::Layer(l))?;
            for b in self.model.layers[l].clone() {
                self.enter(b, l, run);
                let stage = self.stages.blocks[b];
                let adds = b + 1 < self.model.blocks.len() || passes_on || stage.block.output_is_kept();
                let cx = &mut self.context();
                match &generation {
                    None => stage.block.compute(cx, stage.input, run),
                    Some(Generation { caches, new }) => {
                        stage.block.compute_cached(cx, stage.input, run, caches[b].as_ref(), new);
                    }
                }
                if adds {
                    stage.block.output(cx, run);
                }
            }
            self.check_exchanges()?;
            self.add_seen(l, run, run.delta);
        }
        self.update_to(usize::MAX);
        match self.stages.streams.last() {
            _ if self.model.place.is_last_stage() => self.final_norm(run),
            Some(&before) if run.keep.is_none() => self.pass_on(run, before),
            _ => {}
        }
        Ok(())
    }

    /// The residual stream before the first layer.
    fn embed(&mut self, run: &Run) -> Result<()> {
        let (embedding, stream) = (self.model.embedding, self.stages.streams[0]);
        self.update_to(embedding.offset + embedding.len);
        self.need(Part::Embedding)?;
        let table = self.model.store.weight(embedding);
        self.backend.embedding(run.inputs.ids, table, self.model.shape.hidden, stream);
        if let Some(adapter) = self.model.embedding_adapter {
            self.update_to(adapter.0.b.offset + adapter.0.b.len);
            adapter.forward(&mut self.context(), run.inputs.ids, stream);
        }
        self.embed_images(run, stream);
        Ok(())
    }

    /// The input of block `b` of layer `l`; that of the first one may wait in host memory until the backward pass.
    fn enter(&mut self, b: usize, l: usize, run: &Run) {
        let layers_input = run.keep.is_some() && b == self.model.layers[l].start;
        if layers_input {
            self.claim_input(l);
        }
        if b == 0 {
            self.norm(b);
        } else {
            self.add_and_norm(b, run);
        }
        if layers_input {
            self.save_input(l);
        }
    }

    /// Norms the residual stream before block `b`.
    fn norm(&mut self, b: usize) {
        let (stage, x) = (self.stages.blocks[b], self.stages.streams[b]);
        let weight = self.model.norm(stage.norm);
        self.backend.rms_norm(x, weight, self.model.shape.epsilon, stage.input, stage.inverse_rms);
    }

    /// Completes the residual stream before block `b` with what the block before adds, and norms it.
    fn add_and_norm(&mut self, b: usize, run: &Run) {
        let (stage, before, x) = (self.stages.blocks[b], self.stages.streams[b - 1], self.stages.streams[b]);
        let (weight, epsilon) = (self.model.norm(stage.norm), self.model.shape.epsilon);
        self.backend.add_rms_norm(before, run.delta, x, weight, epsilon, stage.input, stage.inverse_rms);
    }

    /// The head's input; `run.delta` becomes the residual stream after the last layer.
    fn final_norm(&mut self, run: &Run) {
        let weight = self.model.norm(self.model.final_norm);
        let before = self.stages.streams[self.stages.streams.len() - 1];
        let epsilon = self.model.shape.epsilon;
        self.backend.add_rms_norm(before, run.delta, run.delta, weight, epsilon, run.final_norm, run.final_inverse_rms);
    }

    /// Computes again what layer `l` did not keep: the same leaves on the same values.
    pub(super) fn recompute(&mut self, l: usize, run: &Run, level: Recompute) {
        if level == Recompute::Off {
            return;
        }
        let blocks = self.model.layers[l].clone();
        for b in blocks.clone() {
            let stage = self.stages.blocks[b];
            if level < Recompute::Block {
                let weight = self.model.norm(stage.norm);
                self.backend.rms_norm_recompute(self.stages.streams[b], weight, stage.inverse_rms, stage.input);
            } else if b == blocks.start {
                self.norm(b);
            } else {
                self.add_and_norm(b, run);
            }
            let cx = &mut self.context();
            stage.block.recompute(cx, stage.input, run, level);
            if level == Recompute::Block && b + 1 < blocks.end {
                stage.block.output(cx, run);
            }
        }
    }
}
