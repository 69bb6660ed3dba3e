//! A mixture of experts: the router, the rows sorted by expert, their products, and back. `W` is an expert's inner width;
//! each token has `top_k` rows. Where ranks divide experts, rows travel between these steps (`expert_parallel.rs`).

use std::ops::Range;

use arl_model::{Block, ModelConfig, MoeConfig, Projection, Role};

use super::context::{Context, Run, Take};
use super::expert_adapter::{ExpertAdapter, Sorted, product};
use super::expert_parallel::{Divided, Division};
use super::linear::{Linear, packed};
use super::low_rank::Adapters;
use super::shared_expert::{self, SharedExpert};
use crate::backend::{Backend, Buffer, DType, Layout, Permutation, Router};
use crate::mesh::Place;
use crate::options::Recompute;
use crate::placement::{Param, Placement};

/// Its parameters and sizes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Experts {
    pub(super) hidden: usize,
    pub(super) experts: usize,
    pub(super) top_k: usize,
    pub(super) width: usize,
    normalise: bool,
    /// Of the balance loss; 0 where none is added.
    coefficient: f32,
    /// Layers that have experts.
    layers: usize,
    /// `[experts, hidden]`.
    router: Linear,
    /// `[own experts, 2 W, hidden]`: of each expert of this rank gate, then up.
    gate_up: Param,
    /// `[own experts, hidden, W]`.
    down: Param,
    /// Of gate and up, and of down.
    adapters: [Option<ExpertAdapter>; 2],
    shared: Option<SharedExpert>,
    /// How ranks divide experts; none: this one has all.
    division: Option<Division>,
}

/// What it computes. `R`: rows of this rank's experts, `T top_k` where it has all of them.
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
    pub(super) permutation: Permutation,
    /// `[R, H]`: the input, sorted by expert.
    pub(super) routed: Buffer,
    /// `[T top_k, H]`: what the experts give.
    pub(super) out: Buffer,
    /// `[R, 2 W]`.
    pub(super) gate_up: Buffer,
    /// `[R, W]`: after SwiGLU.
    pub(super) act: Buffer,
    /// Where ranks divide experts.
    pub(super) divided: Option<Divided>,
    shared: Option<shared_expert::Buffers>,
    /// What the router's adapter leaves for the backward pass.
    low: Buffer,
}

/// Rows that this rank's experts compute.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    pub(super) sorted: Sorted,
    /// `[rows, H]`.
    pub(super) routed: Buffer,
    /// `[rows, 2 W]`.
    pub(super) gate_up: Buffer,
    /// `[rows, W]`.
    pub(super) act: Buffer,
}

impl Experts {
    pub(super) fn new(
        config: &ModelConfig,
        placement: &Placement,
        place: &Place,
        layer: usize,
        moe: &MoeConfig,
    ) -> Self {
        let (block, division) = (Block::Experts(layer), Division::new(place, moe.num_experts));
        let (from, to) = division.map_or((0, moe.num_experts - 1), Division::ends);
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
            gate_up: span(Role::ExpertGate(from), Role::ExpertUp(to)),
            down: span(Role::ExpertDown(from), Role::ExpertDown(to)),
            adapters: [Projection::ExpertsGateUp, Projection::ExpertsDown]
                .map(|projection| placement.adapter(block, projection).map(ExpertAdapter)),
            shared: moe
                .shared_expert_intermediate_size
                .map(|width| SharedExpert::new(placement, block, config.hidden_size, width)),
            division,
        }
    }

    /// Parameters whose gradients a step's first micro-batch assigns: not the experts', as one may have no rows.
    pub(super) fn assigned(&self) -> Vec<Param> {
        let shared = self.shared.iter().flat_map(SharedExpert::assigned);
        self.router.assigned().chain(shared).collect()
    }

    /// For so many tokens of this rank's, and of all ranks together that divide experts.
    pub(super) fn buffers(&self, dtype: DType, tokens: usize, of_all: usize, take: &mut Take<'_>) -> Buffers {
        use Recompute::{Block, Norms, Off};
        let rows = tokens * self.top_k;
        let room = self.division.map(|division| division.room(of_all, self.top_k));
        let own = room.map_or(rows, |room| room.capacity);
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
            routed: take(Off, dtype, own * self.hidden),
            out: take(Norms, dtype, rows * self.hidden),
            gate_up: take(Norms, dtype, own * 2 * self.width),
            act: take(Off, dtype, own * self.width),
            divided: room.map(|room| Divided { room, offsets: take(Block, DType::I32, room.offsets(self.experts)) }),
            shared: self.shared.map(|shared| shared.buffers(dtype, tokens, take)),
            low: take(Norms, dtype, tokens * self.router.kept()),
        }
    }

    /// From the normed input `[T, H]` to what the experts give. Choices are counted in `run.balance`.
    pub(super) fn compute<B: Backend + ?Sized>(&self, cx: &mut Context<'_, B>, at: &Buffers, input: Buffer, run: &Run) {
        self.compute_counting(cx, at, input, run, run.balance, true);
    }

    /// `first`: for the first time in this micro-batch.
    fn compute_counting<B: Backend + ?Sized>(
        &self,
        cx: &mut Context<'_, B>,
        at: &Buffers,
        input: Buffer,
        run: &Run,
        balance: Option<Buffer>,
        first: bool,
    ) {
        self.router.forward(cx, input, at.logits, at.low, run.size().tokens);
        let op = self.router_op(at, run);
        for (tokens, counted) in self.counted(run) {
            let logits = at.logits.slice(tokens.start * self.experts, tokens.len() * self.experts);
            cx.backend.router(&op.part(tokens), logits, balance.filter(|_| counted));
        }
        cx.backend.permute(&op, &at.permutation);
        if let Some(divided) = at.divided {
            self.with_routed(cx, at, input, |cx, routed| self.compute_divided(cx, at, divided, routed, first));
        } else {
            self.gather(cx, at, input, at.routed);
            let rows = self.all_rows(at);
            self.inner_forward(cx, &rows);
            self.outer_forward(cx, &rows, at.out);
        }
        if let Some((shared, at)) = self.shared(at) {
            shared.compute(cx, at, input, run);
        }
    }

    /// The rows of a rank that has all experts.
    fn all_rows(&self, at: &Buffers) -> Rows {
        let Permutation { offsets, pairs, .. } = at.permutation;
        let sorted = Sorted { experts: self.experts, offsets, rows: pairs.len, room: pairs.len };
        Rows { sorted, routed: at.routed, gate_up: at.gate_up, act: at.act }
    }

    /// Gate and up of each row, and SwiGLU.
    pub(super) fn inner_forward<B: Backend + ?Sized>(&self, cx: &mut Context<'_, B>, at: &Rows) {
        let (h, w, weight) = (self.hidden, self.width, cx.store.weight(self.gate_up));
        product(cx, at.sorted, Layout::Nt, (at.routed, h), (weight, h), (at.gate_up, 2 * w));
        if let [Some(adapter), _] = self.adapters {
            adapter.forward(cx, at.sorted, at.routed, at.gate_up);
        }
        cx.backend.swiglu(at.gate_up, w, at.act);
    }

    /// What experts give for each row, into `out` `[rows, H]`.
    pub(super) fn outer_forward<B: Backend + ?Sized>(&self, cx: &mut Context<'_, B>, at: &Rows, out: Buffer) {
        let (h, w, weight) = (self.hidden, self.width, cx.store.weight(self.down));
        product(cx, at.sorted, Layout::Nt, (at.act, w), (weight, w), (out, h));
        if let [_, Some(adapter)] = self.adapters {
            adapter.forward(cx, at.sorted, at.act, out);
        }
    }

    /// From `d_rows` `[rows, H]`, the gradient of what experts give, to that of their inputs, in its place; theirs are added to.
    /// `d_act` `[rows, W]` is workspace, and `at.gate_up` becomes its own gradient.
    pub(super) fn rows_backward<B: Backend + ?Sized>(
        &self,
        cx: &mut Context<'_, B>,
        at: &Rows,
        d_rows: Buffer,
        d_act: Buffer,
    ) {
        let (h, w, sorted) = (self.hidden, self.width, at.sorted);
        let (gate_up, down) = (cx.store.weight(self.gate_up), cx.store.weight(self.down));
        product(cx, sorted, Layout::Nn, (d_rows, h), (down, w), (d_act, w));
        if let Some(d_down) = cx.store.gradient(self.down) {
            product(cx, sorted, Layout::Tn, (d_rows, h), (at.act, w), (d_down, w));
        }
        let [gate_up_adapter, down_adapter] = self.adapters;
        if let Some(adapter) = down_adapter {
            adapter.backward(cx, sorted, d_rows, at.act, d_act);
        }
        cx.backend.swiglu_backward(at.gate_up, w, d_act);
        let d_gate_up = (at.gate_up, 2 * w);
        if let Some(gradient) = cx.store.gradient(self.gate_up) {
            product(cx, sorted, Layout::Tn, d_gate_up, (at.routed, h), (gradient, h));
        }
        product(cx, sorted, Layout::Nn, d_gate_up, (gate_up, h), (d_rows, h));
        if let Some(adapter) = gate_up_adapter {
            adapter.backward(cx, sorted, at.gate_up, at.routed, d_rows);
        }
    }

    /// The shared expert and its buffers.
    fn shared<'a>(&'a self, at: &'a Buffers) -> Option<(&'a SharedExpert, &'a shared_expert::Buffers)> {
        self.shared.as_ref().zip(at.shared.as_ref())
    }

    /// Each chosen pair's input row, sorted by expert, into `routed` `[T top_k, H]`.
    pub(super) fn gather<B: Backend + ?Sized>(
        &self,
        cx: &mut Context<'_, B>,
        at: &Buffers,
        input: Buffer,
        routed: Buffer,
    ) {
        cx.backend.gather_rows(input, at.permutation.pairs, self.top_k, self.hidden, routed);
    }

    /// [`Experts::gather`] into workspace, which `work` has.
    fn with_routed<'c, B: Backend + ?Sized>(
        &self,
        cx: &mut Context<'c, B>,
        at: &Buffers,
        input: Buffer,
        work: impl FnOnce(&mut Context<'c, B>, Buffer),
    ) {
        let top = cx.arena.mark();
        let routed = cx.workspace(cx.dtype, at.out.len);
        self.gather(cx, at, input, routed);
        work(cx, routed);
        cx.arena.release(top);
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
                if let Some(divided) = at.divided {
                    self.with_routed(cx, at, input, |cx, routed| self.receive_again(cx, at, divided, routed));
                } else {
                    self.gather(cx, at, input, at.routed);
                    cx.backend.swiglu(at.gate_up, self.width, at.act);
                }
                if let Some((shared, at)) = self.shared(at) {
                    shared.activate(cx, at);
                }
            }
            _ => self.compute_counting(cx, at, input, run, None, false),
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
        let d_act = cx.workspace(cx.dtype, if at.divided.is_some() { 0 } else { rows * self.width });

        cx.backend.combine_backward(d_x, at.out, &at.permutation, at.weights, self.top_k, h, d_rows, d_weights);
        match at.divided {
            Some(divided) => self.backward_divided(cx, at, divided, input, d_rows),
            None => self.rows_backward(cx, &self.all_rows(at), d_rows, d_act),
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
        let router = Some((&self.router, true));
        self.router.adapters.backward(cx, router, packed(d_logits, t), input, at.low, d_input, t, !run.first);
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
}
