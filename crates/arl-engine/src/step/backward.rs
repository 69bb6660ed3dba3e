//! The backward pass. Gradients of parameters are added to; gradients of activations are assigned, except that of the
//! residual stream, to which each part of a layer adds its own.

use arl_model::Result;

use super::{Run, Step};
use crate::arena::Category;
use crate::backend::{Backend, Buffer, DType, Rows};
use crate::params::MlpParams;
use crate::shape::MlpShape;

impl<B: Backend + ?Sized> Step<'_, B> {
    /// From `d_norm` `[T, H]`, the gradient of the head's input, to that of every parameter but the head's.
    /// `d_x` `[T, H]` is the residual stream's.
    pub(super) fn backward(&mut self, run: &Run, d_norm: Buffer, d_x: Buffer) -> Result<()> {
        let params = &self.model.params;
        let (weight, d_weight) = (self.weight(params.final_norm), self.gradient(params.final_norm));
        self.backend.zero(d_x);
        self.backend.rms_norm_backward(d_norm, run.delta, weight, run.final_inverse_rms, d_x, d_weight);
        for l in (0..self.layers.len()).rev() {
            self.check_interrupt()?;
            self.await_input(l);
            self.recompute(l, run, self.model.recompute);
            self.mlp_backward(l, run, d_norm, d_x);
            self.attention_backward(l, run, d_norm, d_x);
            self.fetch_input(l);
        }
        self.embedding_backward(run, d_x);
        Ok(())
    }

    /// The look-up's part of the embedding's gradient; the padding row, if the model has one, gets none.
    fn embedding_backward(&mut self, run: &Run, d_x: Buffer) {
        let h = self.model.shape.hidden;
        let d_table = self.gradient(self.model.params.embedding);
        let Some(row) = self.model.shape.padding_idx else {
            return self.backend.embedding_backward(run.inputs.ids, d_x, h, d_table);
        };
        // A tied head has a part in this row, which stays.
        let top = self.arena.mark();
        let kept = self.workspace(DType::F32, h);
        self.backend.copy(d_table.slice(row * h, h), kept);
        self.backend.embedding_backward(run.inputs.ids, d_x, h, d_table);
        self.backend.copy(kept, d_table.slice(row * h, h));
        self.arena.release(top);
    }

    pub(super) fn workspace(&mut self, dtype: DType, len: usize) -> Buffer {
        self.take(Category::Workspace, dtype, len)
    }

    /// The feed-forward part and its norm.
    fn mlp_backward(&mut self, l: usize, run: &Run, d_norm: Buffer, d_x: Buffer) {
        let (layer, params, t) = (self.layers[l], &self.model.params.layers[l], run.inputs.size.tokens);
        match (params.mlp, self.model.shape.layers[l].mlp) {
            (MlpParams::Dense { gate_up, down }, MlpShape::Dense { width }) => {
                let top = self.arena.mark();
                // [T, W]
                let d_act = self.workspace(self.model.dtype, t * width);
                self.linear_backward_input(d_x, down, d_act, t, false);
                self.linear_backward_weight(d_x, layer.act, down, None, t);
                self.backend.swiglu_backward(layer.gate_up, width, d_act);
                self.linear_backward_weight(layer.gate_up, layer.norm2, gate_up, None, t);
                self.linear_backward_input(layer.gate_up, gate_up, d_norm, t, false);
                self.arena.release(top);
            }
            _ => self.experts_backward(l, run, d_x, d_norm),
        }
        let (weight, d_weight) = (self.weight(params.post_norm), self.gradient(params.post_norm));
        self.backend.rms_norm_backward(d_norm, layer.x_mid, weight, layer.inverse_rms2, d_x, d_weight);
    }

    /// Attention, its projections and its norm.
    fn attention_backward(&mut self, l: usize, run: &Run, d_norm: Buffer, d_x: Buffer) {
        let (layer, params, t) = (self.layers[l], &self.model.params.layers[l], run.inputs.size.tokens);
        let shape = &self.model.shape;
        let top = self.arena.mark();
        // [T, Q], [T, Q + 2 K], [query heads, T] or what a library takes
        let d_attention = self.workspace(self.model.dtype, t * shape.q());
        let d_qkv = self.workspace(self.model.dtype, t * shape.qkv());
        let scratch = self.workspace(DType::F32, self.model.attention_scratch(run.inputs.size));

        self.linear_backward_weight(d_x, layer.attention, params.output, params.output_bias, t);
        self.linear_backward_input(d_x, params.output, d_attention, t, false);
        let op = self.attention_op(l, &run.inputs);
        self.backend.attention_backward(&op, Rows { buffer: d_attention, stride: shape.q() }, d_qkv, scratch);
        let op = self.norm_rope_op(l, &run.inputs);
        let d_norms = params.qk_norm.map(|(q, k)| (self.gradient(q), self.gradient(k)));
        self.backend.norm_rope_backward(&op, layer.qkv, d_qkv, d_norms);
        self.linear_backward_weight(d_qkv, layer.norm1, params.qkv, params.qkv_bias, t);
        self.linear_backward_input(d_qkv, params.qkv, d_norm, t, false);
        self.arena.release(top);
        let (weight, d_weight) = (self.weight(params.input_norm), self.gradient(params.input_norm));
        self.backend.rms_norm_backward(d_norm, layer.x, weight, layer.inverse_rms1, d_x, d_weight);
    }
}
