//! A layer with experts: the router, the rows sorted by expert, their products, and back.

use super::{Run, Step};
use crate::backend::{Backend, Buffer, GroupedMatmul, Layout, Router, Rows};
use crate::params::MlpParams;
use crate::shape::MlpShape;

/// The sizes of a layer with experts.
#[derive(Clone, Copy)]
struct Sizes {
    experts: usize,
    top_k: usize,
    width: usize,
    normalise: bool,
}

impl<B: Backend + ?Sized> Step<'_, B> {
    fn sizes(&self, l: usize) -> Sizes {
        match self.model.shape.layers[l].mlp {
            MlpShape::Experts { experts, top_k, width, normalise } => Sizes { experts, top_k, width, normalise },
            MlpShape::Dense { width } => Sizes { experts: 0, top_k: 0, width, normalise: false },
        }
    }

    fn router_op(&self, l: usize, run: &Run) -> Router {
        let (sizes, moe) = (self.sizes(l), &self.layers[l].moe);
        Router {
            tokens: run.inputs.size.tokens,
            experts: sizes.experts,
            top_k: sizes.top_k,
            normalise: sizes.normalise,
            probabilities: moe.probabilities,
            experts_chosen: moe.chosen,
            weights: moe.weights,
        }
    }

    /// The router's choice, and the rows sorted by it. `balance` counts choices where the forward pass runs first.
    pub(super) fn route(&mut self, l: usize, run: &Run, balance: Option<Buffer>) {
        let layer = self.layers[l];
        if let MlpParams::Experts { router, .. } = self.model.params.layers[l].mlp {
            self.linear(layer.norm2, router, None, layer.moe.logits, run.inputs.size.tokens);
        }
        let op = self.router_op(l, run);
        self.backend.router(&op, layer.moe.logits, balance);
        self.backend.permute(&op, &layer.moe.permutation);
        self.gather_routed(l);
    }

    /// Each chosen pair's input row, sorted by expert.
    pub(super) fn gather_routed(&mut self, l: usize) {
        let (layer, top_k) = (self.layers[l], self.sizes(l).top_k);
        self.backend.gather_rows(
            layer.norm2,
            layer.moe.permutation.pairs,
            top_k,
            self.model.shape.hidden,
            layer.moe.routed,
        );
    }

    /// The experts on their rows.
    pub(super) fn experts(&mut self, l: usize, run: &Run) {
        let (layer, sizes, h) = (self.layers[l], self.sizes(l), self.model.shape.hidden);
        let MlpParams::Experts { gate_up, down, .. } = self.model.params.layers[l].mlp else { return };
        let (gate_up, down) = (self.weight(gate_up), self.weight(down));
        let rows = run.inputs.size.tokens * sizes.top_k;
        self.grouped(l, Layout::Nt, rows, layer.moe.routed, h, gate_up, h, layer.gate_up, 2 * sizes.width);
        self.swiglu(l);
        self.grouped(l, Layout::Nt, rows, layer.act, sizes.width, down, sizes.width, layer.moe.out, h);
    }

    /// The weighted sum of each token's experts, into `run.delta`.
    pub(super) fn combine(&mut self, l: usize, run: &Run) {
        let (moe, top_k, h) = (self.layers[l].moe, self.sizes(l).top_k, self.model.shape.hidden);
        self.backend.combine(moe.out, &moe.permutation, Some(moe.weights), top_k, h, run.delta);
    }

    /// A grouped product; the widths are those of the rows of `a`, `b` and `c`.
    #[allow(clippy::too_many_arguments, reason = "three operands and their widths")]
    pub(super) fn grouped(
        &mut self,
        l: usize,
        layout: Layout,
        rows: usize,
        a: Buffer,
        a_width: usize,
        b: Buffer,
        b_width: usize,
        c: Buffer,
        c_width: usize,
    ) {
        self.backend.grouped_matmul(&GroupedMatmul {
            layout,
            experts: self.sizes(l).experts,
            offsets: self.layers[l].moe.permutation.offsets,
            rows,
            n: c_width,
            k: a_width,
            a: Rows { buffer: a, stride: a_width },
            b: Rows { buffer: b, stride: b_width },
            c: Rows { buffer: c, stride: c_width },
        });
    }

    /// From the gradient of the residual stream `d_x` to that of the layer's `norm2`, with the weights' on the way.
    pub(super) fn experts_backward(&mut self, l: usize, run: &Run, d_x: Buffer, d_norm: Buffer) {
        let (layer, sizes, h) = (self.layers[l], self.sizes(l), self.model.shape.hidden);
        let MlpParams::Experts { router, gate_up, down } = self.model.params.layers[l].mlp else { return };
        let (moe, t) = (layer.moe, run.inputs.size.tokens);
        let rows = t * sizes.top_k;
        let top = self.arena.mark();
        // [T top_k, H]; first of the experts' outputs, then of their inputs
        let d_rows = self.workspace(self.model.dtype, rows * h);
        let d_weights = self.workspace(crate::backend::DType::F32, rows);
        let d_act = self.workspace(self.model.dtype, rows * sizes.width);

        self.backend.combine_backward(d_x, moe.out, &moe.permutation, moe.weights, sizes.top_k, h, d_rows, d_weights);
        let (down_weight, down_gradient) = (self.weight(down), self.gradient(down));
        self.grouped(l, Layout::Nn, rows, d_rows, h, down_weight, sizes.width, d_act, sizes.width);
        self.grouped(l, Layout::Tn, rows, d_rows, h, layer.act, sizes.width, down_gradient, sizes.width);
        self.backend.swiglu_backward(layer.gate_up, sizes.width, d_act);
        let (weight, gradient) = (self.weight(gate_up), self.gradient(gate_up));
        self.grouped(l, Layout::Tn, rows, layer.gate_up, 2 * sizes.width, moe.routed, h, gradient, h);
        self.grouped(l, Layout::Nn, rows, layer.gate_up, 2 * sizes.width, weight, h, d_rows, h);
        self.backend.combine(d_rows, &moe.permutation, None, sizes.top_k, h, d_norm);

        let op = self.router_op(l, run);
        let balance = run.balance.map(|b| (b.slice(0, sizes.experts), self.balance_factor(run)));
        // the logits themselves are not needed any more
        self.backend.router_backward(&op, d_weights, balance, moe.logits);
        self.linear_backward_weight(moe.logits, layer.norm2, router, None, t);
        self.linear_backward_input(moe.logits, router, d_norm, t, true);
        self.arena.release(top);
    }

    /// The balance loss is `coefficient * experts * sum_e (counts_e / N) (probabilities_e / N)` over the `N` rows of
    /// all layers' routers together (`load_balancing_loss_func` of transformers' `modeling_qwen3_moe`); this is its
    /// derivative by a probability, without `counts_e`, times the loss scale.
    fn balance_factor(&self, run: &Run) -> f32 {
        let shape = &self.model.shape;
        let n = (run.inputs.size.tokens * shape.expert_layers()) as f64;
        let factor = f64::from(shape.balance.unwrap_or(0.0)) * f64::from(run.loss_scale);
        (factor * shape.experts() as f64 / (n * n)) as f32
    }
}
