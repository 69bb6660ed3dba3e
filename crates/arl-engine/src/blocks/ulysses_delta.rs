//! Context parallelism of the gated delta rule: the ranks along [`Axis::Context`] exchange tokens for heads before the convolution,
//! and back behind the rule. A rank has the convolution's channels, decays and biases of its heads alone: the gradients of the others
//! are other ranks'.

use super::context::{Context, Run};
use super::delta::{Buffers, Delta};
use super::ulysses::Columns;
use crate::backend::{Backend, Buffer, CausalConv, DType, DeltaHeads, GatedDelta, Rows};
use crate::mesh::Axis;

/// Convolution and rule with this rank's heads of all tokens.
struct Exchanged {
    /// `[W, channels + 2 value heads]`: queries, keys, values, strengths of writes, decays.
    projected: Buffer,
    conv: CausalConv,
    heads: DeltaHeads,
}

impl Delta {
    /// From what the projection gave to what the rule gives.
    pub(super) fn exchanged_rule<B: Backend + ?Sized>(&self, cx: &mut Context<'_, B>, at: &Buffers, run: &Run) {
        let top = cx.arena.mark();
        let exchanged = self.exchanged(cx, at, run);
        let heads = exchanged.heads;
        cx.backend.causal_conv(&exchanged.conv, at.qkv);
        let tokens = exchanged.conv.tokens;
        let out = cx.workspace(cx.dtype, tokens * heads.value_columns());
        let scratch = GatedDelta::forward_scratch(cx.backend.kind(), heads, tokens, run.inputs.most_sequences());
        let scratch = cx.workspace(DType::F32, scratch);
        cx.backend.gated_delta(&self.exchanged_op(cx, at, &exchanged, scratch), out, None);
        cx.heads_for_tokens(out, &[self.values(at.out, run)]);
        cx.arena.release(top);
    }

    /// From `d` `[T, V]`, the gradient of what the rule gave, to that of what the projection gave, in the latter's place, but for the
    /// output gates'. `d_params` are those of `a_log`, `dt_bias` and the convolution.
    pub(super) fn exchanged_backward<B: Backend + ?Sized>(
        &self,
        cx: &mut Context<'_, B>,
        at: &Buffers,
        run: &Run,
        d: Buffer,
        d_params: [Buffer; 3],
    ) {
        let [d_a_log, d_dt_bias, d_conv] = d_params;
        let top = cx.arena.mark();
        let exchanged = self.exchanged(cx, at, run);
        let heads = exchanged.heads;
        cx.backend.causal_conv(&exchanged.conv, at.qkv);
        let tokens = exchanged.conv.tokens;
        let d_out = cx.workspace(cx.dtype, tokens * heads.value_columns());
        cx.tokens_for_heads(&[self.values(d, run)], d_out);
        let scratch = GatedDelta::backward_scratch(cx.backend.kind(), heads, tokens, run.inputs.most_sequences());
        let scratch = cx.workspace(DType::F32, scratch);
        let op = self.exchanged_op(cx, at, &exchanged, scratch);
        let own = |all: Buffer| of_rank(cx, all, heads.value);
        let (d_a_log, d_dt_bias) = (own(d_a_log), own(d_dt_bias));
        cx.backend.gated_delta_backward(&op, d_out, d_a_log, d_dt_bias);
        let d_weight = cx.workspace(DType::F32, exchanged.conv.weight.len);
        cx.backend.zero(d_weight);
        cx.backend.causal_conv_backward(&exchanged.conv, at.qkv, d_weight);
        for (place, part) in self.channels(cx, d_conv, d_weight, heads) {
            cx.backend.add(place, part);
        }
        let parts = self.projected(at, run);
        cx.heads_for_tokens(exchanged.projected, &parts);
        cx.arena.release(top);
    }

    /// Exchanges what the projection gave.
    fn exchanged<B: Backend + ?Sized>(&self, cx: &mut Context<'_, B>, at: &Buffers, run: &Run) -> Exchanged {
        let (shared, ranks) = (run.inputs.shared, run.inputs.shared.contexts());
        let heads = DeltaHeads { key: self.heads.key / ranks, value: self.heads.value / ranks, ..self.heads };
        let stride = heads.channels() + 2 * heads.value;
        let projected = cx.workspace(cx.dtype, shared.tokens * stride);
        cx.tokens_for_heads(&self.projected(at, run), projected);
        let all = cx.store.weight(self.conv);
        let weight = cx.workspace(all.dtype, heads.channels() * self.taps);
        for (place, part) in self.channels(cx, all, weight, heads) {
            cx.backend.copy(place, part);
        }
        let conv = CausalConv {
            sequences: shared.sequences,
            tokens: shared.tokens,
            channels: heads.channels(),
            taps: self.taps,
            x: Rows { buffer: projected, stride },
            weight,
        };
        Exchanged { projected, conv, heads }
    }

    fn exchanged_op<B: Backend + ?Sized>(
        &self,
        cx: &Context<'_, B>,
        at: &Buffers,
        exchanged: &Exchanged,
        scratch: Buffer,
    ) -> GatedDelta {
        let &Exchanged { projected, conv, heads } = exchanged;
        let first = heads.channels();
        GatedDelta {
            heads,
            sequences: conv.sequences,
            tokens: conv.tokens,
            qkv: at.qkv,
            gates: Rows { buffer: projected.slice(first, projected.len - first), stride: conv.x.stride },
            a_log: of_rank(cx, cx.store.weight(self.a_log), heads.value),
            dt_bias: of_rank(cx, cx.store.weight(self.dt_bias), heads.value),
            scratch,
        }
    }

    /// The columns of the projection that are exchanged.
    fn projected(&self, at: &Buffers, run: &Run) -> [Columns; 5] {
        let (keys, values, heads) = (self.heads.key_columns(), self.heads.value_columns(), self.heads.value);
        let gates = self.heads.channels() + values;
        let stride = gates + 2 * heads;
        let rows = Rows { buffer: at.projected, stride };
        [(0, keys), (keys, keys), (2 * keys, values), (gates, heads), (gates + heads, heads)]
            .map(|(first, all)| Columns::new(rows, first, all, run.inputs.shared.contexts()))
    }

    /// All columns of values.
    fn values(&self, buffer: Buffer, run: &Run) -> Columns {
        let all = self.heads.value_columns();
        Columns::new(Rows { buffer, stride: all }, 0, all, run.inputs.shared.contexts())
    }

    /// Of `all` rows of the convolution those of this rank's queries, keys and values, each with its place in `own`.
    fn channels<B: Backend + ?Sized>(
        &self,
        cx: &Context<'_, B>,
        all: Buffer,
        own: Buffer,
        heads: DeltaHeads,
    ) -> [(Buffer, Buffer); 3] {
        let (keys, values) = (heads.key_columns() * self.taps, heads.value_columns() * self.taps);
        let all_keys = self.heads.key_columns() * self.taps;
        let (_, rank) = cx.along(Axis::Context);
        [(0, 0, keys), (all_keys, keys, keys), (2 * all_keys, 2 * keys, values)]
            .map(|(first, place, len)| (all.slice(first + rank * len, len), own.slice(place, len)))
    }
}

/// Of values by value heads, those of this rank's, which are `heads`.
fn of_rank<B: Backend + ?Sized>(cx: &Context<'_, B>, all: Buffer, heads: usize) -> Buffer {
    let (_, rank) = cx.along(Axis::Context);
    all.slice(rank * heads, heads)
}
