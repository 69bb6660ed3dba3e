//! The forward pass, and the parts of it that the backward pass computes anew.

use arl_model::Result;

use super::{Run, Step};
use crate::backend::Backend;
use crate::options::Recompute;
use crate::params::{MlpParams, Param};
use crate::shape::MlpShape;

impl<B: Backend + ?Sized> Step<'_, B> {
    /// From ids to the head's input `run.final_norm`.
    pub(crate) fn forward(&mut self, run: &Run) -> Result<()> {
        if let Some(balance) = run.balance {
            self.backend.zero(balance);
        }
        let Param { offset, len } = self.model.params.embedding;
        self.update_to(offset + len);
        self.embed(run);
        for l in 0..self.layers.len() {
            self.check_interrupt()?;
            self.update_to(self.model.params.layer_ends[l]);
            self.enter_layer(l, run);
            if run.keep.is_some() {
                self.save_input(l);
            }
            self.qkv(l, run);
            self.attend(l, run);
            self.leave_attention(l, run);
            self.mlp(l, run);
        }
        self.update_to(usize::MAX);
        self.final_norm(run);
        Ok(())
    }

    /// The residual stream before the first layer.
    pub(crate) fn embed(&mut self, run: &Run) {
        let table = self.weight(self.model.params.embedding);
        self.backend.embedding(run.inputs.ids, table, self.model.shape.hidden, self.layers[0].x);
    }

    /// Completes the residual stream with what the layer before adds, and norms it.
    pub(crate) fn enter_layer(&mut self, l: usize, run: &Run) {
        let weight = self.weight(self.model.params.layers[l].input_norm);
        let (layer, epsilon) = (self.layers[l], self.model.shape.epsilon);
        if l == 0 {
            self.backend.rms_norm(layer.x, weight, epsilon, layer.norm1, layer.inverse_rms1);
        } else {
            if run.keep.is_some() {
                self.claim_input(l);
            }
            let x_mid = self.layers[l - 1].x_mid;
            self.backend.add_rms_norm(x_mid, run.delta, layer.x, weight, epsilon, layer.norm1, layer.inverse_rms1);
        }
    }

    /// Queries, keys and values, and the rotation of the first two.
    pub(crate) fn qkv(&mut self, l: usize, run: &Run) {
        let (layer, params) = (self.layers[l], &self.model.params.layers[l]);
        self.linear(layer.norm1, params.qkv, params.qkv_bias, layer.qkv, run.inputs.size.tokens);
        let op = self.norm_rope_op(l, &run.inputs);
        self.backend.norm_rope(&op, layer.qkv, layer.qk);
    }

    /// Attention within each sequence.
    pub(crate) fn attend(&mut self, l: usize, run: &Run) {
        let op = self.attention_op(l, &run.inputs);
        self.backend.attention(&op);
    }

    /// Adds attention's part to the residual stream, and norms it. `run.delta` is scratch.
    pub(crate) fn leave_attention(&mut self, l: usize, run: &Run) {
        let (layer, params) = (self.layers[l], &self.model.params.layers[l]);
        self.linear(layer.attention, params.output, params.output_bias, run.delta, run.inputs.size.tokens);
        let weight = self.weight(params.post_norm);
        let epsilon = self.model.shape.epsilon;
        self.backend.add_rms_norm(layer.x, run.delta, layer.x_mid, weight, epsilon, layer.norm2, layer.inverse_rms2);
    }

    /// The feed-forward part, into `run.delta`.
    pub(crate) fn mlp(&mut self, l: usize, run: &Run) {
        let (layer, t) = (self.layers[l], run.inputs.size.tokens);
        match self.model.params.layers[l].mlp {
            MlpParams::Dense { down, .. } => {
                self.gate_up(l, run);
                self.linear(layer.act, down, None, run.delta, t);
            }
            MlpParams::Experts { .. } => {
                self.route(l, run, run.balance);
                self.experts(l, run);
                self.combine(l, run);
            }
        }
    }

    /// The feed-forward part of a dense layer up to its last product.
    fn gate_up(&mut self, l: usize, run: &Run) {
        let layer = self.layers[l];
        if let MlpParams::Dense { gate_up, .. } = self.model.params.layers[l].mlp {
            self.linear(layer.norm2, gate_up, None, layer.gate_up, run.inputs.size.tokens);
        }
        self.swiglu(l);
    }

    pub(super) fn swiglu(&mut self, l: usize) {
        let layer = self.layers[l];
        let (MlpShape::Dense { width } | MlpShape::Experts { width, .. }) = self.model.shape.layers[l].mlp;
        self.backend.swiglu(layer.gate_up, width, layer.act);
    }

    /// The head's input; `run.delta` becomes the residual stream after the last layer.
    pub(crate) fn final_norm(&mut self, run: &Run) {
        let weight = self.weight(self.model.params.final_norm);
        let x_mid = self.layers[self.layers.len() - 1].x_mid;
        let epsilon = self.model.shape.epsilon;
        self.backend.add_rms_norm(x_mid, run.delta, run.delta, weight, epsilon, run.final_norm, run.final_inverse_rms);
    }

    /// Computes anew what layer `l` did not keep: the same leaves on the same values.
    pub(super) fn recompute(&mut self, l: usize, run: &Run, level: Recompute) {
        if level == Recompute::Off {
            return;
        }
        let (layer, params) = (self.layers[l], &self.model.params.layers[l]);
        let (input_norm, post_norm) = (self.weight(params.input_norm), self.weight(params.post_norm));
        if level == Recompute::Block {
            let epsilon = self.model.shape.epsilon;
            self.backend.rms_norm(layer.x, input_norm, epsilon, layer.norm1, layer.inverse_rms1);
            self.qkv(l, run);
            self.attend(l, run);
            self.leave_attention(l, run);
        } else {
            self.backend.rms_norm_again(layer.x, input_norm, layer.inverse_rms1, layer.norm1);
            let op = self.norm_rope_op(l, &run.inputs);
            self.backend.norm_rope(&op, layer.qkv, layer.qk);
            self.backend.rms_norm_again(layer.x_mid, post_norm, layer.inverse_rms2, layer.norm2);
        }
        match (self.model.shape.layers[l].mlp, level) {
            (MlpShape::Dense { .. }, Recompute::Norms) => self.swiglu(l),
            (MlpShape::Dense { .. }, _) => self.gate_up(l, run),
            (MlpShape::Experts { .. }, Recompute::Norms) => {
                self.gather_routed(l);
                self.swiglu(l);
            }
            (MlpShape::Experts { .. }, _) => {
                self.route(l, run, None);
                self.experts(l, run);
            }
        }
    }
}
