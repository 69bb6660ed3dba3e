//! A wrapper around any backend that sums time, floating-point operations and bytes by leaf. For measurements: each
//! leaf is waited for, which an asynchronous device does not do in training.

use std::collections::BTreeMap;
use std::time::Instant;

use arl_model::Result;

use super::*;

/// What one kind of leaf came to.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LeafTotal {
    /// Calls.
    pub calls: usize,
    /// Seconds.
    pub seconds: f64,
    /// Floating-point operations of matrix products and attention; 0 for the others.
    pub flops: f64,
    /// Bytes of all operands, each once.
    pub bytes: f64,
}

/// Measures the leaves of the backend that it wraps.
#[derive(Debug)]
pub struct ProfileBackend<B> {
    inner: B,
    totals: BTreeMap<String, LeafTotal>,
    enabled: bool,
}

impl<B: Backend> ProfileBackend<B> {
    /// A wrapper that measures nothing until [`ProfileBackend::enable`].
    pub fn new(inner: B) -> Self {
        Self { inner, totals: BTreeMap::new(), enabled: false }
    }

    /// Measures from here on, from zero.
    pub fn enable(&mut self) {
        self.enabled = true;
        self.totals.clear();
    }

    /// The totals by leaf, the slowest first. Matrix products are told apart by their shapes.
    pub fn totals(&self) -> Vec<(String, LeafTotal)> {
        let mut totals: Vec<_> = self.totals.iter().map(|(name, total)| (name.clone(), *total)).collect();
        totals.sort_by(|a, b| b.1.seconds.total_cmp(&a.1.seconds));
        totals
    }

    fn measure<R>(
        &mut self,
        name: impl FnOnce() -> String,
        flops: f64,
        buffers: &[Buffer],
        leaf: impl FnOnce(&mut B) -> R,
    ) -> R {
        if !self.enabled {
            return leaf(&mut self.inner);
        }
        let start = Instant::now();
        let result = leaf(&mut self.inner);
        // An empty read waits for what was queued.
        if let Some(&buffer) = buffers.first() {
            let _ = self.inner.read_back(buffer.slice(0, 0), &mut []);
        }
        let total = self.totals.entry(name()).or_default();
        total.calls += 1;
        total.seconds += start.elapsed().as_secs_f64();
        total.flops += flops;
        total.bytes += buffers.iter().map(|b| b.bytes() as f64).sum::<f64>();
        result
    }
}

/// Leaves whose operands are all plain buffers.
macro_rules! plain {
    ($($name:ident($($arg:ident: $type:ty),*; $($buffer:expr),*);)*) => {
        $(#[allow(clippy::too_many_arguments, reason = "the trait's signature")]
        fn $name(&mut self, $($arg: $type),*) {
            let buffers = [$($buffer),*];
            self.measure(|| stringify!($name).into(), 0.0, &buffers, |inner| inner.$name($($arg),*));
        })*
    };
}

/// Operations of causal attention forward: two products over half of each sequence's square. The sequences' lengths
/// are on the device; all are taken to be as long as the longest.
fn attention_flops(op: &Attention) -> f64 {
    let tokens = op.log_sum_exp.len / op.heads.query;
    2.0 * (tokens * op.sequences.max_len * op.heads.query * op.heads.dim) as f64
}

impl<B: Backend> Backend for ProfileBackend<B> {
    fn name(&self) -> String {
        self.inner.name()
    }

    fn reserve(&mut self, pool: Pool, bytes: usize) -> Result<()> {
        self.inner.reserve(pool, bytes)
    }

    fn read_back(&mut self, source: Buffer, target: &mut [u8]) -> Result<()> {
        self.measure(|| "read_back".into(), 0.0, &[source], |inner| inner.read_back(source, target))
    }

    fn queue_read(&mut self, sources: &[Buffer]) {
        self.measure(|| "queue_read".into(), 0.0, sources, |inner| inner.queue_read(sources));
    }

    fn read_arrived(&mut self) -> bool {
        self.inner.read_arrived()
    }

    fn finish_read(&mut self, target: &mut [u8]) -> Result<()> {
        self.inner.finish_read(target)
    }

    fn kind(&self) -> DeviceKind {
        self.inner.kind()
    }

    fn scratch_bytes(&self, columns: usize, tokens: usize) -> usize {
        self.inner.scratch_bytes(columns, tokens)
    }

    fn use_attention_library(&mut self, asked: &[AttentionLibrary]) -> std::result::Result<(), String> {
        self.inner.use_attention_library(asked)
    }

    fn logits_gradient(&self, activations: DType) -> DType {
        self.inner.logits_gradient(activations)
    }

    fn record(&mut self, stream: Stream, event: Event) {
        self.inner.record(stream, event);
    }

    fn wait(&mut self, stream: Stream, event: Event) {
        self.inner.wait(stream, event);
    }

    fn matmul(&mut self, op: &Matmul) {
        let name = || {
            let add = if op.accumulate { " +=" } else { "" };
            format!("matmul {:?} m={} n={} k={}{add}", op.layout, op.m, op.n, op.k)
        };
        let flops = 2.0 * op.m as f64 * op.n as f64 * op.k as f64;
        self.measure(name, flops, &[op.a.buffer, op.b.buffer, op.c.buffer], |inner| inner.matmul(op));
    }

    fn grouped_matmul(&mut self, op: &GroupedMatmul) {
        let name = || format!("grouped_matmul {:?} rows={} n={} k={}", op.layout, op.rows, op.n, op.k);
        let flops = 2.0 * op.rows as f64 * op.n as f64 * op.k as f64;
        self.measure(name, flops, &[op.a.buffer, op.b.buffer, op.c.buffer], |inner| inner.grouped_matmul(op));
    }

    fn attention(&mut self, op: &Attention) {
        let buffers = [op.q.buffer, op.v.buffer, op.out.buffer];
        self.measure(|| "attention".into(), attention_flops(op), &buffers, |inner| inner.attention(op));
    }

    fn attention_backward(&mut self, op: &Attention, d_out: Rows, d_qkv: Buffer, scratch: Buffer) {
        let buffers = [op.q.buffer, op.v.buffer, op.out.buffer, d_out.buffer, d_qkv];
        let flops = 2.5 * attention_flops(op);
        self.measure(
            || "attention_backward".into(),
            flops,
            &buffers,
            |inner| {
                inner.attention_backward(op, d_out, d_qkv, scratch);
            },
        );
    }

    plain! {
        upload(source: &[u8], target: Buffer; target);
        transfer(stream: Stream, source: Buffer, target: Buffer; source, target);
        zero(target: Buffer; target);
        copy(source: Buffer, target: Buffer; source, target);
        sum_rows(x: Rows, rows: usize, columns: usize, out: Buffer; x.buffer, out);
        embedding(ids: Buffer, table: Buffer, width: usize, out: Buffer; ids, out);
        embedding_backward(ids: Buffer, d_out: Buffer, width: usize, table_gradient: Buffer; ids, d_out);
        rms_norm(x: Buffer, weight: Buffer, epsilon: f32, out: Buffer, inverse_rms: Buffer; x, out);
        add_rms_norm(x: Buffer, delta: Buffer, sum: Buffer, weight: Buffer, epsilon: f32, out: Buffer, inverse_rms: Buffer; x, delta, sum, out);
        rms_norm_again(x: Buffer, weight: Buffer, inverse_rms: Buffer, out: Buffer; x, out);
        rms_norm_backward(d_out: Buffer, x: Buffer, weight: Buffer, inverse_rms: Buffer, d_x: Buffer, d_weight: Buffer; d_out, x, d_x);
        add(x: Buffer, delta: Buffer; x, delta);
        norm_rope(op: &NormRope, qkv: Buffer, qk: Buffer; qkv, qk);
        norm_rope_backward(op: &NormRope, qkv: Buffer, d_qkv: Buffer, d_norm: Option<(Buffer, Buffer)>; qkv, d_qkv);
        attention_cached(heads: Heads, window: Option<usize>, scale: f32, q: Rows, k_cache: Buffer, v_cache: Buffer, capacity: usize, lengths: Buffer, out: Buffer; q.buffer, k_cache, v_cache, out);
        swiglu(gate_up: Buffer, width: usize, out: Buffer; gate_up, out);
        swiglu_backward(gate_up: Buffer, width: usize, d_out: Buffer; gate_up, d_out);
        gather_rows(x: Buffer, rows: Buffer, divisor: usize, width: usize, out: Buffer; rows, out);
        scatter_rows(x: Buffer, rows: Buffer, width: usize, out: Buffer; rows, x);
        cross_entropy(op: &CrossEntropy; op.logits);
        dot(a: Buffer, b: Buffer, out: Buffer; a, b);
        guard(losses: Rows, balances: Option<Buffer>, norm_squared: Buffer; losses.buffer, norm_squared);
        adamw(op: &AdamW; op.weights, op.gradients, op.moment1, op.moment2);
        router(op: &Router, logits: Buffer, balance: Option<Buffer>; logits, op.probabilities);
        router_backward(op: &Router, d_weights: Buffer, balance: Option<(Buffer, f32)>, d_logits: Buffer; d_weights, d_logits);
        permute(op: &Router, permutation: &Permutation; op.experts_chosen, permutation.pairs, permutation.rows);
        combine(x: Buffer, permutation: &Permutation, weights: Option<Buffer>, top_k: usize, width: usize, out: Buffer; x, out);
        combine_backward(d_out: Buffer, x: Buffer, permutation: &Permutation, weights: Buffer, top_k: usize, width: usize, d_x: Buffer, d_weights: Buffer; d_out, x, d_x);
    }
}
