//! The gated delta rule: one projection to queries, keys, values, output gates and what gates of the state are computed from; a
//! causal convolution over queries, keys and values; the rule within each sequence; a norm with the output gate; and the
//! output projection. `C` are the columns of queries, keys and values together, `V` those of all value heads. Where ranks divide
//! heads, they are those of this rank's, and `T` are the tokens that these ranks have together, of which the residual stream has
//! this one's.

use arl_model::{Block, DeltaConfig, ModelConfig, Projection, Role};

use super::cache::{CachedState, NewTokens};
use super::context::{Context, Run, Take};
use super::linear::{Linear, packed};
use super::low_rank::Adapters;
use super::tensor_parallel::{all_tokens, gathered_len};
use crate::backend::{Backend, Buffer, CausalConv, DType, DeltaHeads, GatedDelta, GatedNorm, Rows};
use crate::options::Recompute;
use crate::placement::{Param, Placement};

/// Its parameters and sizes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Delta {
    pub(super) heads: DeltaHeads,
    hidden: usize,
    /// Ranks that divide heads.
    ranks: usize,
    /// Taps of the convolution.
    pub(super) taps: usize,
    epsilon: f32,
    /// `[C + V + 2 value heads, hidden]`: queries, keys, values; output gates; strengths of writes; decays.
    input: Linear,
    /// `[C, taps]`.
    pub(super) conv: Param,
    /// `[value heads]` each.
    pub(super) a_log: Param,
    pub(super) dt_bias: Param,
    /// `[value_dim]`.
    norm: Param,
    /// `[hidden, V]`.
    output: Linear,
}

/// What it computes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Buffers {
    /// `[T, H]`: the normed input of all tokens, where ranks divide heads; else empty.
    input: Buffer,
    /// `[T, C + V + 2 value heads]`: what the projection gives.
    pub(super) projected: Buffer,
    /// `[T, C]`: queries, keys and values behind the convolution; under context parallelism of the heads and tokens that are
    /// exchanged.
    pub(super) qkv: Buffer,
    /// `[T, V]`: what the rule gives.
    pub(super) out: Buffer,
    /// `[T, V]`: normed, through the output gate.
    gated: Buffer,
    /// What the adapters of both products leave for the backward pass.
    low: [Buffer; 2],
}

impl Delta {
    /// `ranks` divide heads.
    pub(super) fn new(
        config: &ModelConfig,
        placement: &Placement,
        layer: usize,
        delta: &DeltaConfig,
        ranks: usize,
    ) -> Self {
        let block = Block::Delta(layer);
        let adapter = |projection, columns| (placement.adapter(block, projection), columns);
        let all = DeltaHeads::from(delta);
        let own = DeltaHeads { key: all.key / ranks, value: all.value / ranks, ..all };
        Delta {
            heads: own,
            hidden: config.hidden_size,
            ranks,
            taps: delta.linear_conv_kernel_dim,
            epsilon: config.rms_norm_eps as f32,
            input: Linear {
                adapters: Adapters::new(&[
                    adapter(Projection::InProjQkv, own.channels()),
                    adapter(Projection::InProjZ, own.value_columns()),
                    adapter(Projection::InProjB, own.value),
                    adapter(Projection::InProjA, own.value),
                ]),
                ..Linear::new(placement.span(block, Role::InProjQkv, Role::InProjA).unwrap_or_default())
            },
            conv: placement.one(block, Role::Conv1d),
            a_log: placement.one(block, Role::ALog),
            dt_bias: placement.one(block, Role::DtBias),
            norm: placement.one(block, Role::Norm),
            output: Linear {
                adapters: Adapters::new(&[adapter(Projection::OutProj, config.hidden_size)]),
                ..Linear::new(placement.one(block, Role::OutProj))
            },
        }
    }

    /// Parameters whose gradients a step's first micro-batch assigns.
    pub(super) fn assigned(&self) -> Vec<Param> {
        self.input.assigned().chain(self.output.assigned()).collect()
    }

    /// Columns of the projection.
    fn width(&self) -> usize {
        self.heads.channels() + self.heads.value_columns() + 2 * self.heads.value
    }

    /// Elements that are kept of a sequence that is being generated: inputs of the convolution, and f32 of the state.
    pub(crate) fn kept(&self) -> (usize, usize) {
        ((self.taps - 1) * self.heads.channels(), self.heads.state())
    }

    /// Those of `tokens` of this rank's.
    pub(super) fn buffers(&self, dtype: DType, tokens: usize, take: &mut Take<'_>) -> Buffers {
        use Recompute::{Mlp, Off};
        let own = tokens;
        let tokens = self.ranks * own;
        Buffers {
            input: take(Off, dtype, gathered_len(self.ranks, own * self.hidden)),
            projected: take(Mlp, dtype, tokens * self.width()),
            qkv: take(Off, dtype, tokens * self.heads.channels()),
            out: take(Mlp, dtype, tokens * self.heads.value_columns()),
            gated: take(Off, dtype, tokens * self.heads.value_columns()),
            low: [&self.input, &self.output].map(|linear| take(Mlp, dtype, tokens * linear.kept())),
        }
    }

    /// From the normed input to what the output projection takes.
    pub(super) fn compute<B: Backend + ?Sized>(&self, cx: &mut Context<'_, B>, at: &Buffers, input: Buffer, run: &Run) {
        let input = cx.gather_tokens(input, at.input);
        self.input.forward(cx, input, at.projected, at.low[0], run.inputs.shared.tensor_tokens);
        if run.inputs.shared.contexts() > 1 {
            self.exchanged_rule(cx, at, run);
        } else {
            cx.backend.causal_conv(&self.conv(cx, at, run), at.qkv);
            let scratch = self.forward_scratch(cx, run);
            self.rule(cx, at, run, scratch, |backend, op| backend.gated_delta(op, at.out, None));
        }
        cx.backend.gated_norm(&self.gated_norm(cx, at, run), at.gated);
    }

    /// As [`Delta::compute`], from and to what `cached` keeps of each sequence: the tokens are whole prompts, or one new token of
    /// each sequence.
    pub(super) fn compute_cached<B: Backend + ?Sized>(
        &self,
        cx: &mut Context<'_, B>,
        at: &Buffers,
        input: Buffer,
        run: &Run,
        cached: &CachedState,
        new: &NewTokens,
    ) {
        self.input.forward(cx, input, at.projected, at.low[0], run.size().tokens);
        let conv = self.conv(cx, at, run);
        let (inputs, states) = cached.of(new.first, run.size().sequences);
        if new.one_each {
            cx.backend.causal_conv_step(&conv, inputs, at.qkv);
            let scratch = GatedDelta::step_scratch(cx.backend.kind(), self.heads, run.size().tokens);
            self.rule(cx, at, run, scratch, |backend, op| backend.gated_delta_step(op, states, at.out));
        } else {
            cx.backend.causal_conv(&conv, at.qkv);
            cx.backend.causal_conv_keep(&conv, inputs);
            let scratch = self.forward_scratch(cx, run);
            self.rule(cx, at, run, scratch, |backend, op| backend.gated_delta(op, at.out, Some(states)));
        }
        cx.backend.gated_norm(&self.gated_norm(cx, at, run), at.gated);
    }

    /// What the block adds to the residual stream, into `run.delta`.
    pub(super) fn output<B: Backend + ?Sized>(&self, cx: &mut Context<'_, B>, at: &Buffers, run: &Run) {
        self.output.forward_scattered(cx, at.gated, run.delta, at.low[1], run.inputs.shared.tensor_tokens);
    }

    /// Computes again what was not kept: the same leaves on the same values.
    pub(super) fn recompute<B: Backend + ?Sized>(
        &self,
        cx: &mut Context<'_, B>,
        at: &Buffers,
        input: Buffer,
        run: &Run,
        level: Recompute,
    ) {
        match level {
            Recompute::Block => self.compute(cx, at, input, run),
            _ => {
                cx.gather_tokens(input, at.input);
                // What was exchanged for the convolution is exchanged again in the backward pass.
                if run.inputs.shared.contexts() == 1 {
                    cx.backend.causal_conv(&self.conv(cx, at, run), at.qkv);
                }
                cx.backend.gated_norm(&self.gated_norm(cx, at, run), at.gated);
            }
        }
    }

    /// From `d_x`, the residual stream's gradient, to `d_input`, that of the normed input. What the projection and the
    /// convolution gave become their own gradients.
    pub(super) fn backward<B: Backend + ?Sized>(
        &self,
        cx: &mut Context<'_, B>,
        at: &Buffers,
        input: Buffer,
        run: &Run,
        d_x: Buffer,
        d_input: Buffer,
    ) {
        let t = run.inputs.shared.tensor_tokens;
        let top = cx.arena.mark();
        // [T, V]: of what the norm gives, then of what the rule gives.
        let d = cx.workspace(cx.dtype, t * self.heads.value_columns());
        let [d_norm, d_a_log, d_dt_bias, d_conv] =
            [self.norm, self.a_log, self.dt_bias, self.conv].map(|param| cx.norm_gradient(param));

        self.output.backward_gathered(cx, d_x, at.gated, at.low[1], d, t, !run.first);
        cx.backend.gated_norm_backward(&self.gated_norm(cx, at, run), d, d_norm);
        if run.inputs.shared.contexts() > 1 {
            self.exchanged_backward(cx, at, run, d, [d_a_log, d_dt_bias, d_conv]);
        } else {
            let scratch = GatedDelta::backward_scratch(cx.backend.kind(), self.heads, t, run.inputs.most_sequences());
            let scratch = cx.workspace(DType::F32, scratch);
            cx.backend.gated_delta_backward(&self.op(cx, at, run, scratch), d, d_a_log, d_dt_bias);
            cx.backend.causal_conv_backward(&self.conv(cx, at, run), at.qkv, d_conv);
        }
        let (input, d_projected) = (all_tokens(input, at.input), packed(at.projected, t));
        self.input.backward_scattered(cx, d_projected, input, at.low[0], d_input, t, !run.first);
        cx.arena.release(top);
    }

    fn forward_scratch<B: Backend + ?Sized>(&self, cx: &Context<'_, B>, run: &Run) -> usize {
        let tokens = run.inputs.shared.tensor_tokens;
        GatedDelta::forward_scratch(cx.backend.kind(), self.heads, tokens, run.inputs.most_sequences())
    }

    /// Runs a forward leaf of the rule with so many elements of scratch.
    fn rule<B: Backend + ?Sized>(
        &self,
        cx: &mut Context<'_, B>,
        at: &Buffers,
        run: &Run,
        scratch: usize,
        leaf: impl FnOnce(&mut B, &GatedDelta),
    ) {
        let top = cx.arena.mark();
        let scratch = cx.workspace(DType::F32, scratch);
        let op = self.op(cx, at, run, scratch);
        leaf(cx.backend, &op);
        cx.arena.release(top);
    }

    /// Columns of the projection from `first` on.
    fn columns(&self, at: &Buffers, first: usize) -> Rows {
        Rows { buffer: at.projected.slice(first, at.projected.len - first), stride: self.width() }
    }

    fn conv<B: Backend + ?Sized>(&self, cx: &Context<'_, B>, at: &Buffers, run: &Run) -> CausalConv {
        CausalConv {
            sequences: run.inputs.shared.sequences,
            tokens: run.inputs.shared.tensor_tokens,
            channels: self.heads.channels(),
            taps: self.taps,
            x: self.columns(at, 0),
            weight: cx.store.weight(self.conv),
        }
    }

    fn op<B: Backend + ?Sized>(&self, cx: &Context<'_, B>, at: &Buffers, run: &Run, scratch: Buffer) -> GatedDelta {
        GatedDelta {
            heads: self.heads,
            sequences: run.inputs.shared.sequences,
            tokens: run.inputs.shared.tensor_tokens,
            qkv: at.qkv,
            gates: self.columns(at, self.heads.channels() + self.heads.value_columns()),
            a_log: cx.store.weight(self.a_log),
            dt_bias: cx.store.weight(self.dt_bias),
            scratch,
        }
    }

    fn gated_norm<B: Backend + ?Sized>(&self, cx: &Context<'_, B>, at: &Buffers, run: &Run) -> GatedNorm {
        GatedNorm {
            tokens: run.inputs.shared.tensor_tokens,
            heads: self.heads.value,
            x: at.out,
            gate: self.columns(at, self.heads.channels()),
            weight: cx.store.weight(self.norm),
            epsilon: self.epsilon,
        }
    }
}
