//! A mixture of experts: the router, the rows sorted by expert, their products, and back. `W` is an expert's inner width;
//! each token has `top_k` rows.

use std::ops::Range;

use arl_model::{Block, ModelConfig, MoeConfig, Projection, Role};

use super::context::{Context, Run, Take};
use super::expert_adapter::{ExpertAdapter, Sorted};
use super::linear::{Linear, packed};
use super::low_rank::Adapters;
use super::shared_expert::{self, SharedExpert};
use crate::backend::{Backend, Buffer, DType, GroupedMatmul, Layout, Permutation, Router};
use crate::options::Recompute;
use crate::placement::{Param, Placement};

/// Its parameters and sizes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Experts {
    hidden: usize,
    experts: usize,
    top_k: usize,
    width: usize,
    normalise: bool,
    /// Of the balance loss; 0 where none is added.
    coefficient: f32,
    /// Layers that have experts.
    layers: usize,
    /// `[experts, hidden]`.
    router: Linear,
    /// `[experts, 2 W, hidden]`: of each expert gate, then up.
    gate_up: Param,
    /// `[experts, hidden, W]`.
    down: Param,
    /// Of gate and up, and of down.
    adapters: [Option<ExpertAdapter>; 2],
    shared: Option<SharedExpert>,
}

/// What it computes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Buffers {
    /// f32 `[T, experts]`: the router's logits. Kept where everything is.
    pub(super) logits: Buffer,
    /// f32 `[T, experts]`.
    probabilities: Buffer,
    /// i32 `[T, top_k]`.
    chosen: Buffer,
    /// f32 `[T, top_k]`.
    weights: Buffer,
    permutation: Permutation,
    /// `[T top_k, H]`: the input, sorted by expert.
    routed: Buffer,
    /// `[T top_k, H]`: what the experts give.
    out: Buffer,
    /// `[T top_k, 2 W]`.
    gate_up: Buffer,
    /// `[T top_k, W]`: after SwiGLU.
    act: Buffer,
    shared: Option<shared_expert::Buffers>,
    /// What the router's adapter leaves for the backward pass.
    low: Buffer,
}

/// A grouped product's token side, or the experts' weights or gradients one after the other, by rows of `width`.
#[derive(Clone, Copy)]
struct Operand {
    buffer: Buffer,
    width: usize,
}

impl Experts {
    pub(super) fn new(config: &ModelConfig, placement: &Placement, layer: usize, moe: &MoeConfig) -> Self {
        let (block, last) = (Block::Experts(layer), moe.num_experts - 1);
        let span = |first, last| placement.span(block, first, last).unwrap_or_default();
        let layers = config.layers.iter().filter(|layer| matches!(layer.mlp, arl_model::Mlp::Moe(_))).count();
        Experts {
            hidden: config.hidden_size,
            experts: moe.num_experts,
            top_k: moe.num_experts_per_tok,
            width: moe.moe_intermediate_size,
            normalise: moe.norm_topk_prob,
            coefficient: moe.router_aux_loss_coef.unwrap_or(0.0),
            layers,
            router: Linear {
                adapters: Adapters::new(&[(placement.adapter(block, Projection::Router), moe.num_experts)]),
                ..Linear::new(placement.one(block, Role::Router))
            },
            gate_up: span(Role::ExpertGate(0), Role::ExpertUp(last)),
            down: span(Role::ExpertDown(0), Role::ExpertDown(last)),
            adapters: [Projection::ExpertsGateUp, Projection::ExpertsDown]
                .map(|projection| placement.adapter(block, projection).map(ExpertAdapter)),
            shared: moe
                .shared_expert_intermediate_size
                .map(|width| SharedExpert::new(placement, block, config.hidden_size, width)),
        }
    }

    /// Parameters whose gradients a step's first micro-batch assigns: not the experts', as one may have no rows.
    pub(super) fn assigned(&self) -> Vec<Param> {
        let shared = self.shared.iter().flat_map(SharedExpert::assigned);
        self.router.assigned().chain(shared).collect()
    }

    pub(super) fn buffers(&self, dtype: DType, tokens: usize, take: &mut Take<'_>) -> Buffers {
        use Recompute::{Norms, Off};
        let rows = tokens * self.top_k;
        Buffers {
            logits: take(Off, DType::F32, tokens * self.experts),
            probabilities: take(Norms, DType::F32, tokens * self.experts),
            chosen: take(Norms, DType::I32, rows),
            weights: take(Norms, DType::F32, rows),
            permutation: Permutation {
                offsets: take(Norms, DType::I32, self.experts + 1),
                pairs: take(Norms, DType::I32, rows),
                rows: take(Norms, DType::I32, rows),
            },
            routed: take(Off, dtype, rows * self.hidden),
            out: take(Norms, dtype, rows * self.hidden),
            gate_up: take(Norms, dtype, rows * 2 * self.width),
            act: take(Off, dtype, rows * self.width),
            shared: self.shared.map(|shared| shared.buffers(dtype, tokens, take)),
            low: take(Norms, dtype, tokens * self.router.kept()),
        }
    }

    /// From the normed input `[T, H]` to what the experts give. Choices are counted in `balance`.
    pub(super) fn compute<B: Backend + ?Sized>(
        &self,
        cx: &mut Context<'_, B>,
        at: &Buffers,
        input: Buffer,
        run: &Run,
        balance: Option<Buffer>,
    ) {
        self.router.forward(cx, input, at.logits, at.low, run.size().tokens);
        let op = self.router_op(at, run);
        for (tokens, counted) in self.counted(run) {
            let logits = at.logits.slice(tokens.start * self.experts, tokens.len() * self.experts);
            cx.backend.router(&op.part(tokens), logits, balance.filter(|_| counted));
        }
        cx.backend.permute(&op, &at.permutation);
        self.gather(cx, at, input);
        let (gate_up, down) = (cx.store.weight(self.gate_up), cx.store.weight(self.down));
        let [gate_up_adapter, down_adapter] = self.adapters;
        self.product(cx, at, Layout::Nt, self.routed(at.routed), self.routed(gate_up), self.inner(at.gate_up, 2));
        if let Some(adapter) = gate_up_adapter {
            adapter.forward(cx, self.sorted(at), at.routed, at.gate_up);
        }
        cx.backend.swiglu(at.gate_up, self.width, at.act);
        self.product(cx, at, Layout::Nt, self.inner(at.act, 1), self.inner(down, 1), self.routed(at.out));
        if let Some(adapter) = down_adapter {
            adapter.forward(cx, self.sorted(at), at.act, at.out);
        }
        if let Some((shared, at)) = self.shared(at) {
            shared.compute(cx, at, input, run);
        }
    }

    /// The shared expert and its buffers.
    fn shared<'a>(&'a self, at: &'a Buffers) -> Option<(&'a SharedExpert, &'a shared_expert::Buffers)> {
        self.shared.as_ref().zip(at.shared.as_ref())
    }

    /// Each chosen pair's input row, sorted by expert.
    fn gather<B: Backend + ?Sized>(&self, cx: &mut Context<'_, B>, at: &Buffers, input: Buffer) {
        cx.backend.gather_rows(input, at.permutation.pairs, self.top_k, self.hidden, at.routed);
    }

    /// What the block adds to the residual stream, into `run.delta`: the weighted sum of each token's experts, and
    /// the shared one's.
    pub(super) fn output<B: Backend + ?Sized>(&self, cx: &mut Context<'_, B>, at: &Buffers, run: &Run) {
        cx.backend.combine(at.out, &at.permutation, Some(at.weights), self.top_k, self.hidden, run.delta);
        if let Some((shared, at)) = self.shared(at) {
            shared.output(cx, at, run);
        }
    }

    /// Computes again what was not kept: the same leaves on the same values. Choices are not counted twice.
    pub(super) fn recompute<B: Backend + ?Sized>(
        &self,
        cx: &mut Context<'_, B>,
        at: &Buffers,
        input: Buffer,
        run: &Run,
        level: Recompute,
    ) {
        match level {
            Recompute::Norms => {
                self.gather(cx, at, input);
                cx.backend.swiglu(at.gate_up, self.width, at.act);
                if let Some((shared, at)) = self.shared(at) {
                    shared.activate(cx, at);
                }
            }
            _ => self.compute(cx, at, input, run, None),
        }
    }

    /// From `d_x`, the residual stream's gradient, to `d_input`, that of the normed input.
    pub(super) fn backward<B: Backend + ?Sized>(
        &self,
        cx: &mut Context<'_, B>,
        at: &Buffers,
        input: Buffer,
        run: &Run,
        d_x: Buffer,
        d_input: Buffer,
    ) {
        let (t, h) = (run.size().tokens, self.hidden);
        let rows = t * self.top_k;
        let top = cx.arena.mark();
        // [T top_k, H]; first of the experts' outputs, then of their inputs
        let d_rows = cx.workspace(cx.dtype, rows * h);
        let d_weights = cx.workspace(DType::F32, rows);
        let d_act = cx.workspace(cx.dtype, rows * self.width);

        cx.backend.combine_backward(d_x, at.out, &at.permutation, at.weights, self.top_k, h, d_rows, d_weights);
        let (gate_up, down) = (cx.store.weight(self.gate_up), cx.store.weight(self.down));
        self.product(cx, at, Layout::Nn, self.routed(d_rows), self.inner(down, 1), self.inner(d_act, 1));
        if let Some(d_down) = cx.store.gradient(self.down) {
            self.product(cx, at, Layout::Tn, self.routed(d_rows), self.inner(at.act, 1), self.inner(d_down, 1));
        }
        let [gate_up_adapter, down_adapter] = self.adapters;
        if let Some(adapter) = down_adapter {
            adapter.backward(cx, self.sorted(at), d_rows, at.act, d_act);
        }
        cx.backend.swiglu_backward(at.gate_up, self.width, d_act);
        let d_gate_up = self.inner(at.gate_up, 2);
        if let Some(gradient) = cx.store.gradient(self.gate_up) {
            self.product(cx, at, Layout::Tn, d_gate_up, self.routed(at.routed), self.routed(gradient));
        }
        self.product(cx, at, Layout::Nn, d_gate_up, self.routed(gate_up), self.routed(d_rows));
        if let Some(adapter) = gate_up_adapter {
            adapter.backward(cx, self.sorted(at), at.gate_up, at.routed, d_rows);
        }
        cx.backend.combine(d_rows, &at.permutation, None, self.top_k, h, d_input);

        let balance = run.balance.map(|balance| (balance.slice(0, self.experts), self.balance_factor(run)));
        // The logits are not needed any more.
        let d_logits = at.logits;
        for (tokens, counted) in self.counted(run) {
            let part = |buffer: Buffer, width: usize| buffer.slice(tokens.start * width, tokens.len() * width);
            let (d_weights, d_logits) = (part(d_weights, self.top_k), part(d_logits, self.experts));
            let op = self.router_op(at, run).part(tokens.clone());
            cx.backend.router_backward(&op, d_weights, balance.filter(|_| counted), d_logits);
        }
        self.router.backward_weight(cx, packed(d_logits, t), input, t, !run.first);
        self.router.backward_input(cx, packed(d_logits, t), d_input, t, true);
        self.router.adapters.backward(cx, packed(d_logits, t), input, at.low, d_input, t, !run.first);
        cx.arena.release(top);
        if let Some((shared, at)) = self.shared(at) {
            shared.backward(cx, at, input, run, d_x, d_input);
        }
    }

    /// The balance loss is `coefficient * experts * sum_e (counts_e / N) (probabilities_e / N)` over the `N` rows of
    /// all layers' routers together (`load_balancing_loss_func` of transformers' `modeling_qwen3_moe`); this is its
    /// derivative by a probability, without `counts_e`, times the loss scale.
    fn balance_factor(&self, run: &Run) -> f32 {
        let n = (run.inputs.shared.counted * self.layers) as f64;
        let factor = f64::from(self.coefficient) * f64::from(run.loss_scale);
        (factor * self.experts as f64 / (n * n)) as f32
    }

    /// Tokens, and whether the balance loss counts their choices: not those of tokens that fill a slice up.
    fn counted(&self, run: &Run) -> impl Iterator<Item = (Range<usize>, bool)> + use<> {
        let (counted, tokens) = (run.inputs.counted, run.size().tokens);
        [(0..counted, true), (counted..tokens, false)].into_iter().filter(|(tokens, _)| !tokens.is_empty())
    }

    fn router_op(&self, at: &Buffers, run: &Run) -> Router {
        Router {
            tokens: run.size().tokens,
            experts: self.experts,
            top_k: self.top_k,
            normalise: self.normalise,
            probabilities: at.probabilities,
            experts_chosen: at.chosen,
            weights: at.weights,
        }
    }

    fn sorted(&self, at: &Buffers) -> Sorted {
        let permutation = &at.permutation;
        Sorted { experts: self.experts, offsets: permutation.offsets, rows: permutation.pairs.len }
    }

    /// Rows of the hidden size.
    fn routed(&self, buffer: Buffer) -> Operand {
        Operand { buffer, width: self.hidden }
    }

    /// Rows of so many inner widths.
    fn inner(&self, buffer: Buffer, widths: usize) -> Operand {
        Operand { buffer, width: widths * self.width }
    }

    /// A product over the rows of each expert.
    fn product<B: Backend + ?Sized>(
        &self,
        cx: &mut Context<'_, B>,
        at: &Buffers,
        layout: Layout,
        a: Operand,
        b: Operand,
        c: Operand,
    ) {
        let rows = |operand: Operand| crate::backend::Rows { buffer: operand.buffer, stride: operand.width };
        cx.backend.grouped_matmul(&GroupedMatmul {
            layout,
            experts: self.experts,
            offsets: at.permutation.offsets,
            rows: at.permutation.pairs.len,
            n: c.width,
            k: a.width,
            a: rows(a),
            b: rows(b),
            c: rows(c),
        });
    }
}
