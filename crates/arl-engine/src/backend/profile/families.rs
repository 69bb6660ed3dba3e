//! The leaves that some families of models have besides the common ones: gates, the delta rule, vision towers.

use arl_comm::Group;
use arl_model::Result;

use super::{ProfileBackend, all, rows_of};
use crate::backend::comm;
use crate::backend::gates::Gates;
use crate::backend::{
    Backend, Buffer, CausalConv, DeltaRule, GatedDelta, GatedNorm, Gelu, Heads, LayerNorm, Stream, Vision,
};

impl<B: Backend + ?Sized> Gates for ProfileBackend<B> {
    plain! {
        split_gates(heads: Heads, joined: Buffer, qkv: Buffer, gates: Buffer) = all(&[joined, qkv, gates]);
        join_gates(heads: Heads, qkv: Buffer, gates: Buffer, joined: Buffer) = all(&[joined, qkv, gates]);
        gate(x: Buffer, gates: Buffer, out: Buffer) = all(&[x, gates, out]);
        gate_backward(d_out: Buffer, x: Buffer, gates: Buffer) = all(&[d_out, d_out, x, gates, gates]);
        add_gated_rows(x: Buffer, logits: Buffer, width: usize, out: Buffer) = all(&[x, logits, out, out]);
        gated_rows_backward(d_out: Buffer, x: Buffer, logits: Buffer, width: usize, d_x: Buffer) = all(&[d_out, x, logits, logits, d_x]);
    }
}

/// Operations of the delta rule forward, as the recurrence counts them.
fn delta_flops(op: &GatedDelta) -> f64 {
    6.0 * (op.tokens * op.heads.state()) as f64
}

/// Bytes of the rule's gates, read or written so many times, and of their parameters.
fn gate_bytes(op: &GatedDelta, times: f64) -> f64 {
    times * rows_of(op.gates, op.tokens, 2 * op.heads.value) + all(&[op.a_log, op.dt_bias])
}

/// Bytes of the convolution's rows, in and out.
fn conv_bytes(op: &CausalConv, rows: f64) -> f64 {
    rows * rows_of(op.x, op.tokens, op.channels) + all(&[op.weight])
}

impl<B: Backend + ?Sized> DeltaRule for ProfileBackend<B> {
    fn gated_delta(&mut self, op: &GatedDelta, out: Buffer, states: Option<Buffer>) {
        let bytes = all(&[op.qkv, out]) + gate_bytes(op, 1.0) + states.map_or(0.0, |states| all(&[states]));
        self.measure(|| "gated_delta".into(), delta_flops(op), bytes, |inner| inner.gated_delta(op, out, states));
    }

    fn gated_delta_backward(&mut self, op: &GatedDelta, d_out: Buffer, d_a_log: Buffer, d_dt_bias: Buffer) {
        let bytes = all(&[op.qkv, op.qkv, d_out]) + gate_bytes(op, 2.0) + 2.0 * all(&[d_a_log, d_dt_bias]);
        let flops = 2.0 * delta_flops(op);
        let leaf = |inner: &mut B| inner.gated_delta_backward(op, d_out, d_a_log, d_dt_bias);
        self.measure(|| "gated_delta_backward".into(), flops, bytes, leaf);
    }

    plain! {
        causal_conv(op: &CausalConv, out: Buffer) = conv_bytes(op, 1.0) + all(&[out]);
        causal_conv_backward(op: &CausalConv, d_out: Buffer, d_weight: Buffer) = conv_bytes(op, 2.0) + all(&[d_out, d_weight, d_weight]);
        causal_conv_keep(op: &CausalConv, inputs: Buffer) = all(&[inputs, inputs]);
        causal_conv_step(op: &CausalConv, inputs: Buffer, out: Buffer) = all(&[op.weight, inputs, inputs, out]);
        gated_delta_step(op: &GatedDelta, states: Buffer, out: Buffer) = all(&[op.qkv, states, states, out]);
        gated_norm(op: &GatedNorm, out: Buffer) = all(&[op.x, op.x, out]);
        gated_norm_backward(op: &GatedNorm, d: Buffer, d_weight: Buffer) = 2.0 * all(&[op.x, d]) + all(&[op.x, d_weight]);
    }
}

/// Bytes of the rows that a gradient is added to: at most one for each tap, and no more than there are.
fn tapped_bytes(taps: Buffer, width: usize, d_table: Buffer) -> f64 {
    ((taps.len * width).min(d_table.len) * d_table.dtype.bytes()) as f64
}

impl<B: Backend + ?Sized> Vision for ProfileBackend<B> {
    plain! {
        layer_norm(op: &LayerNorm) = all(&[op.x, op.weight, op.bias, op.out, op.statistics]);
        layer_norm_backward(op: &LayerNorm, d_out: Buffer, d_x: Buffer, d_weight: Buffer, d_bias: Buffer) = all(&[op.x, op.weight, op.statistics, d_out, d_x, d_x]) + 2.0 * all(&[d_weight, d_bias]);
        gelu(kind: Gelu, x: Buffer, out: Buffer) = all(&[x, out]);
        gelu_backward(kind: Gelu, x: Buffer, d_x: Buffer) = all(&[x, d_x, d_x]);
        interpolate(table: Buffer, taps: Buffer, weights: Buffer, width: usize, out: Buffer) = all(&[taps, weights, out, out]) + tapped_bytes(taps, width, table);
        interpolate_backward(d_out: Buffer, taps: Buffer, weights: Buffer, width: usize, d_table: Buffer) = all(&[d_out, taps, weights]) + 2.0 * tapped_bytes(taps, width, d_table);
        add_rows(x: Buffer, rows: Buffer, width: usize, out: Buffer) = all(&[x, x, x, rows]);
        zero_rows(rows: Buffer, width: usize, x: Buffer) = all(&[rows]) + (rows.len * width * x.dtype.bytes()) as f64;
    }
}

impl<B: Backend + ?Sized> comm::Collectives for ProfileBackend<B> {
    fn join_ranks(&mut self, group: &dyn Group) -> Result<()> {
        self.inner.join_ranks(group)
    }

    fn join_groups(&mut self, group: &dyn Group, groups: &[Vec<usize>]) -> Result<()> {
        self.inner.join_groups(group, groups)
    }

    fn exchange_sum(&mut self, group: &dyn Group, parts: &[Buffer], sum: Buffer) -> Result<()> {
        let (mut result, bytes) = (Ok(()), all(&[sum, sum]) + (group.size() * sum.bytes()) as f64);
        self.measure(|| "exchange_sum".into(), 0.0, bytes, |inner| result = inner.exchange_sum(group, parts, sum));
        result
    }

    fn all_gather(
        &mut self,
        group: &dyn Group,
        bytes: usize,
        own: &[comm::Part],
        parts: &[Vec<comm::Part>],
    ) -> Result<()> {
        let (mut result, moved) = (Ok(()), 2.0 * (group.size() * bytes) as f64);
        self.measure(
            || "all_gather".into(),
            0.0,
            moved,
            |inner| {
                result = inner.all_gather(group, bytes, own, parts);
            },
        );
        result
    }

    fn gather(&mut self, group: &dyn Group, own: Buffer, every: Buffer) -> Result<()> {
        let (mut result, bytes) = (Ok(()), all(&[own, every]));
        self.measure(|| "gather".into(), 0.0, bytes, |inner| result = inner.gather(group, own, every));
        result
    }

    fn exchange(&mut self, group: &dyn Group, sends: &[Vec<Buffer>], receives: &[Vec<Buffer>]) -> Result<()> {
        let (mut result, bytes) = (Ok(()), all(&sends.concat()) + all(&receives.concat()));
        self.measure(|| "exchange".into(), 0.0, bytes, |inner| result = inner.exchange(group, sends, receives));
        result
    }

    fn start_exchange_sum(&mut self, group: &dyn Group, parts: &[Buffer], sum: Buffer) -> Result<()> {
        let (of_others, bytes) = ((group.size() - 1) * sum.bytes(), (group.size() + 2) * sum.bytes());
        self.started("exchange_sum", of_others, bytes, |inner| inner.start_exchange_sum(group, parts, sum))
    }

    fn start_all_gather(
        &mut self,
        group: &dyn Group,
        bytes: usize,
        own: &[comm::Part],
        parts: &[Vec<comm::Part>],
    ) -> Result<()> {
        let of_others = (group.size() - 1) * bytes;
        let leaf = |inner: &mut B| inner.start_all_gather(group, bytes, own, parts);
        self.started("all_gather", of_others, 2 * group.size() * bytes, leaf)
    }

    fn start_gather(&mut self, group: &dyn Group, own: Buffer, every: Buffer) -> Result<()> {
        let of_others = every.bytes() - own.bytes();
        self.started("gather", of_others, own.bytes() + every.bytes(), |inner| inner.start_gather(group, own, every))
    }

    fn block_squares(&mut self, a: Buffer, tail: &[f32]) -> Result<Vec<f64>> {
        let mut result = Ok(Vec::new());
        self.measure(|| "block_squares".into(), 0.0, all(&[a]), |inner| result = inner.block_squares(a, tail));
        result
    }
}

impl<B: Backend + ?Sized> ProfileBackend<B> {
    /// What runs concurrently with the leaves, and brings so many bytes of other ranks: two timestamps among those of the leaves would
    /// not measure it.
    fn started(
        &mut self,
        name: &str,
        of_others: usize,
        bytes: usize,
        leaf: impl FnOnce(&mut B) -> Result<()>,
    ) -> Result<()> {
        if let Some(timeline) = &mut self.timeline {
            timeline.transfer(Stream::Comm, of_others as f64);
        }
        if self.clocked {
            if self.enabled {
                self.count(name, 0.0, bytes as f64);
            }
            return leaf(&mut self.inner);
        }
        let mut result = Ok(());
        self.timed(|| name.into(), 0.0, bytes as f64, |inner| result = leaf(inner));
        result
    }
}
