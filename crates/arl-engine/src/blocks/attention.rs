//! Attention: the fused projection to queries, keys and values, their norms and rotation, attention within each sequence, and
//! the output projection. `Q` and `K` are the columns of all query and key heads. Where ranks divide heads, they are those of this
//! rank's, and `T` are the tokens that these ranks have together, of which the residual stream has this one's.

use arl_model::{Block, ModelConfig, Projection, Role};

use super::cache::{CachedKeys, NewTokens};
use super::context::{Context, Run, Take};
use super::linear::{Linear, packed};
use super::low_rank::Adapters;
use super::tensor_parallel::{all_tokens, gathered_len};
use crate::backend::{self, Backend, Buffer, DType, DeviceKind, Heads, NormRope, Rows, attention_library_scratch};
use crate::batch::Shared;
use crate::options::Recompute;
use crate::placement::{Param, Placement};

/// Its parameters and sizes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Attention {
    pub(crate) heads: Heads,
    hidden: usize,
    /// Ranks that divide heads.
    ranks: usize,
    /// Keys that a query may see, itself included.
    pub(crate) window: Option<usize>,
    /// Elements of a head that are rotated.
    rotary: usize,
    /// `[Q + 2 K, hidden]`; with gates `[2 Q + 2 K, hidden]`.
    qkv: Linear,
    /// Each query head has an output gate.
    gated: bool,
    /// `[dim]` each, of queries and of keys, and their epsilon.
    qk_norm: Option<(Param, Param, f32)>,
    /// `[hidden, Q]`.
    output: Linear,
}

/// What it computes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Buffers {
    /// `[T, H]`: the normed input of all tokens, where ranks divide heads; else empty.
    input: Buffer,
    /// `[T, Q + 2 K]`: queries, keys, values.
    qkv: Buffer,
    /// `[T, Q + K]`: queries and keys, normed and rotated.
    qk: Buffer,
    /// `[T, Q]`: what attention gives.
    attention: Buffer,
    /// f32 `[query heads, T]`; under context parallelism of the heads and tokens that are exchanged.
    log_sum_exp: Buffer,
    gate: Option<GateBuffers>,
    /// What the adapters of both products leave for the backward pass.
    low: [Buffer; 2],
}

/// Those of output gates.
#[derive(Clone, Copy, Debug)]
struct GateBuffers {
    /// `[T, Q]`: before the logistic function.
    gates: Buffer,
    /// `[T, Q]`: what attention gives, through its gates.
    gated: Buffer,
}

impl Buffers {
    /// What the output projection takes.
    fn result(&self) -> Buffer {
        self.gate.map_or(self.attention, |gate| gate.gated)
    }
}

/// Lets what attention gives through its gates, if there are any.
fn apply_gate<B: Backend + ?Sized>(cx: &mut Context<'_, B>, at: &Buffers) {
    if let Some(GateBuffers { gates, gated }) = at.gate {
        cx.backend.gate(at.attention, gates, gated);
    }
}

impl Attention {
    /// `ranks` divide heads.
    pub(super) fn new(
        config: &ModelConfig,
        placement: &Placement,
        layer: usize,
        window: Option<usize>,
        ranks: usize,
    ) -> Self {
        let block = Block::Attention(layer);
        // Which parameters a layer has follows from the configuration, as the table does.
        let span = |first, last| placement.span(block, first, last);
        let norm = |role| placement.span(block, role, role);
        let epsilon = config.rms_norm_eps as f32;
        let heads = Heads {
            query: config.num_attention_heads / ranks,
            key_value: config.num_key_value_heads / ranks,
            dim: config.head_dim,
        };
        let (q, k) = (heads.query_columns(), heads.key_columns());
        let gated = config.attention_gate;
        let adapter = |projection, columns| (placement.adapter(block, projection), columns);
        Attention {
            heads,
            hidden: config.hidden_size,
            ranks,
            window,
            rotary: config.rope.rotary_dim,
            qkv: Linear {
                weight: span(Role::QWeight, Role::VWeight).unwrap_or_default(),
                bias: span(Role::QBias, Role::VBias),
                adapters: Adapters::new(&[
                    adapter(Projection::Query, if gated { 2 * q } else { q }),
                    adapter(Projection::Key, k),
                    adapter(Projection::Value, k),
                ]),
            },
            gated,
            qk_norm: norm(Role::QNorm).zip(norm(Role::KNorm)).map(|(query, key)| (query, key, epsilon)),
            output: Linear {
                weight: placement.one(block, Role::OWeight),
                bias: span(Role::OBias, Role::OBias),
                adapters: Adapters::new(&[adapter(Projection::Output, config.hidden_size)]),
            },
        }
    }

    /// Parameters whose gradients a step's first micro-batch assigns.
    pub(super) fn assigned(&self) -> Vec<Param> {
        self.qkv.assigned().chain(self.output.assigned()).collect()
    }

    /// Those of `tokens` of this rank's.
    pub(super) fn buffers(&self, dtype: DType, tokens: usize, take: &mut Take<'_>) -> Buffers {
        use Recompute::{Mlp, Off};
        let own = tokens;
        let tokens = self.ranks * own;
        Buffers {
            input: take(Off, dtype, gathered_len(self.ranks, own * self.hidden)),
            qkv: take(Mlp, dtype, tokens * self.heads.qkv_columns()),
            qk: take(Off, dtype, tokens * self.heads.qk_columns()),
            attention: take(Mlp, dtype, tokens * self.heads.query_columns()),
            log_sum_exp: take(Mlp, DType::F32, tokens * self.heads.query),
            gate: self.gated.then(|| GateBuffers {
                gates: take(Mlp, dtype, tokens * self.heads.query_columns()),
                gated: take(Off, dtype, tokens * self.heads.query_columns()),
            }),
            // The output is computed again where queries are, for the block behind it.
            low: [&self.qkv, &self.output].map(|linear| take(Mlp, dtype, tokens * linear.kept())),
        }
    }

    /// From the normed input to what attention gives.
    pub(super) fn compute<B: Backend + ?Sized>(&self, cx: &mut Context<'_, B>, at: &Buffers, input: Buffer, run: &Run) {
        let input = cx.gather_tokens(input, at.input);
        self.queries_keys_values(cx, at, input, run);
        cx.context_attention(&self.op(at, run), run);
        apply_gate(cx, at);
    }

    fn queries_keys_values<B: Backend + ?Sized>(
        &self,
        cx: &mut Context<'_, B>,
        at: &Buffers,
        input: Buffer,
        run: &Run,
    ) {
        let (heads, t) = (self.heads, run.inputs.shared.tensor_tokens);
        match at.gate {
            None => self.qkv.forward(cx, input, at.qkv, at.low[0], t),
            Some(gate) => {
                let top = cx.arena.mark();
                let joined = cx.workspace(cx.dtype, t * (heads.qkv_columns() + heads.query_columns()));
                self.qkv.forward(cx, input, joined, at.low[0], t);
                cx.backend.split_gates(heads, joined, at.qkv, gate.gates);
                cx.arena.release(top);
            }
        }
        cx.backend.norm_rope(&self.norm_rope(cx, run), at.qkv, at.qk);
    }

    /// As [`Attention::compute`], and keys and values join `cached`: those of whole prompts, or of one new token a sequence,
    /// which sees the tokens before it.
    pub(super) fn compute_cached<B: Backend + ?Sized>(
        &self,
        cx: &mut Context<'_, B>,
        at: &Buffers,
        input: Buffer,
        run: &Run,
        cached: &CachedKeys,
        new: &NewTokens,
    ) {
        self.queries_keys_values(cx, at, input, run);
        let (heads, width) = (self.heads, self.heads.key_columns());
        for (x, rows, cache) in [(at.qk, new.keys, cached.keys), (at.qkv, new.values, cached.values)] {
            cx.backend.gather_rows(x, rows, 1, heads.dim, new.rows);
            cx.backend.scatter_rows(new.rows, new.slots, width, cache);
        }
        if !new.one_each {
            cx.backend.attention(&self.op(at, run));
            return apply_gate(cx, at);
        }
        let len = run.size().tokens * cached.capacity * width;
        cx.backend.attention_cached(
            heads,
            self.window,
            heads.scale(),
            Rows { buffer: at.qk, stride: heads.qk_columns() },
            cached.keys.slice(0, len),
            cached.values.slice(0, len),
            cached.capacity,
            new.lengths,
            at.attention,
        );
        apply_gate(cx, at);
    }

    /// What the block adds to the residual stream, into `run.delta`.
    pub(super) fn output<B: Backend + ?Sized>(&self, cx: &mut Context<'_, B>, at: &Buffers, run: &Run) {
        self.output.forward_scattered(cx, at.result(), run.delta, at.low[1], run.inputs.shared.tensor_tokens);
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
                cx.backend.norm_rope(&self.norm_rope(cx, run), at.qkv, at.qk);
                apply_gate(cx, at);
            }
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
        let (heads, t) = (self.heads, run.inputs.shared.tensor_tokens);
        let top = cx.arena.mark();
        // [T, Q], [T, Q + 2 K], and what the device takes
        let d_attention = cx.workspace(cx.dtype, t * heads.query_columns());
        let d_qkv = cx.workspace(cx.dtype, t * heads.qkv_columns());
        let scratch = cx.workspace(DType::F32, self.scratch(cx.backend.kind(), cx.attention_library, run));

        self.output.backward_gathered(cx, d_x, at.result(), at.low[1], d_attention, t, !run.first);
        if let Some(GateBuffers { gates, .. }) = at.gate {
            cx.backend.gate_backward(d_attention, at.attention, gates);
        }
        cx.context_attention_backward(&self.op(at, run), packed(d_attention, t), d_qkv, scratch, run);
        let d_norms = self.qk_norm.map(|(query, key, _)| (cx.norm_gradient(query), cx.norm_gradient(key)));
        cx.backend.norm_rope_backward(&self.norm_rope(cx, run), at.qkv, d_qkv, d_norms);
        let d_product = match at.gate {
            None => d_qkv,
            Some(GateBuffers { gates, .. }) => {
                let joined = cx.workspace(cx.dtype, d_qkv.len + gates.len);
                cx.backend.join_gates(heads, d_qkv, gates, joined);
                joined
            }
        };
        let input = all_tokens(input, at.input);
        self.qkv.backward_scattered(cx, packed(d_product, t), input, at.low[0], d_input, t, !run.first);
        cx.arena.release(top);
    }

    /// f32 elements of the scratch of attention's backward pass.
    fn scratch(&self, kind: DeviceKind, library: bool, run: &Run) -> usize {
        let (Shared { tensor_tokens, .. }, ranks) = (run.inputs.shared, run.inputs.shared.contexts());
        // Ranks that exchange tokens for heads.
        let Heads { query, key_value, dim } = self.heads;
        let heads = Heads { query: query / ranks, key_value: key_value / ranks, dim };
        let tokens = ranks * tensor_tokens;
        if library {
            attention_library_scratch(heads, tokens, run.inputs.most_sequences())
        } else {
            kind.attention_scratch(heads, tokens)
        }
    }

    fn norm_rope<B: Backend + ?Sized>(&self, cx: &Context<'_, B>, run: &Run) -> NormRope {
        NormRope {
            heads: self.heads,
            rotary: self.rotary,
            tokens: run.inputs.shared.tensor_tokens,
            norm: self.qk_norm.map(|(query, key, epsilon)| (cx.norm(query), cx.norm(key), epsilon)),
            angles: run.inputs.shared.angles,
        }
    }

    fn op(&self, at: &Buffers, run: &Run) -> backend::Attention {
        let (q, qk) = (self.heads.query_columns(), self.heads.qk_columns());
        backend::Attention {
            heads: self.heads,
            sequences: run.inputs.shared.sequences,
            causal: true,
            window: self.window,
            scale: self.heads.scale(),
            q: Rows { buffer: at.qk, stride: qk },
            k: Rows { buffer: at.qk.slice(q, at.qk.len - q), stride: qk },
            v: Rows { buffer: at.qkv.slice(qk, at.qkv.len - qk), stride: self.heads.qkv_columns() },
            out: Rows { buffer: at.attention, stride: q },
            log_sum_exp: at.log_sum_exp,
        }
    }
}
