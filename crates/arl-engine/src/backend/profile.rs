//! A wrapper around any backend that sums time, floating-point operations and bytes by leaf, and the time between leaves. A
//! device with a clock of its own is not waited for; without one each leaf is.

use std::collections::BTreeMap;
use std::time::Instant;

use arl_model::Result;

use super::timeline::{Rates, Timeline};
use super::*;

/// What one kind of leaf came to.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LeafTotal {
    /// Calls.
    pub calls: usize,
    /// Seconds. 0 for copies concurrent with the leaves on a device with a clock of its own.
    pub seconds: f64,
    /// Floating-point operations of matrix products and attention; 0 for the others.
    pub flops: f64,
    /// Bytes that must be moved: each operand read once, each result written once.
    pub bytes: f64,
}

/// What was measured since [`ProfileBackend::enable`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Profile {
    /// By leaf, the slowest first. Each shape of a matrix product counts as a leaf of its own.
    pub leaves: Vec<(String, LeafTotal)>,
    /// Seconds between the end of a leaf and the beginning of the next.
    pub gaps: f64,
}

/// Measures the leaves of the backend that it wraps.
#[derive(Debug)]
pub struct ProfileBackend<B: ?Sized> {
    totals: BTreeMap<String, LeafTotal>,
    enabled: bool,
    /// The device has timestamps: two a leaf.
    clocked: bool,
    /// The leaves whose timestamps are not read yet.
    queued: Vec<String>,
    /// The end of the leaf before, where leaves are waited for.
    last: Option<Instant>,
    gaps: f64,
    timeline: Option<Timeline>,
    inner: Box<B>,
}

impl<B: Backend + ?Sized> ProfileBackend<B> {
    /// A wrapper that measures nothing until [`ProfileBackend::enable`].
    pub fn new(inner: Box<B>) -> Self {
        let (totals, queued, last, timeline) = (BTreeMap::new(), Vec::new(), None, None);
        Self { totals, enabled: false, clocked: false, queued, last, gaps: 0.0, timeline, inner }
    }

    /// Models from here on when a device with these rates would be done, without measuring anything.
    pub fn model(&mut self, rates: Rates) {
        self.timeline = Some(Timeline::new(rates));
    }

    /// What is modelled.
    pub fn timeline(&self) -> Option<&Timeline> {
        self.timeline.as_ref()
    }

    /// Measures from here on, from zero.
    pub fn enable(&mut self) -> Result<()> {
        self.clocked = self.inner.timestamp();
        self.inner.timestamps()?;
        self.enabled = true;
        (self.last, self.gaps) = (None, 0.0);
        self.totals.clear();
        self.queued.clear();
        Ok(())
    }

    /// What was measured so far; waits for the leaves, and measures no more.
    pub fn take(&mut self) -> Result<Profile> {
        self.enabled = false;
        let times = self.inner.timestamps()?;
        for (leaf, pair) in self.queued.drain(..).zip(times.chunks_exact(2)) {
            self.totals.entry(leaf).or_default().seconds += pair[1] - pair[0];
        }
        let between = times.get(1..).unwrap_or_default().chunks_exact(2);
        let gaps = self.gaps + between.map(|pair| pair[1] - pair[0]).sum::<f64>();
        let mut leaves: Vec<_> = std::mem::take(&mut self.totals).into_iter().collect();
        leaves.sort_by(|a, b| b.1.seconds.total_cmp(&a.1.seconds));
        Ok(Profile { leaves, gaps })
    }

    fn count(&mut self, name: &str, flops: f64, bytes: f64) -> &mut LeafTotal {
        let total = self.totals.entry(name.to_string()).or_default();
        total.calls += 1;
        total.flops += flops;
        total.bytes += bytes;
        total
    }

    fn measure(&mut self, name: impl FnOnce() -> String, flops: f64, bytes: f64, leaf: impl FnOnce(&mut B)) {
        if let Some(timeline) = &mut self.timeline {
            timeline.leaf(flops, bytes);
        }
        self.timed(name, flops, bytes, leaf);
    }

    fn timed(&mut self, name: impl FnOnce() -> String, flops: f64, bytes: f64, leaf: impl FnOnce(&mut B)) {
        if !self.enabled {
            return leaf(&mut self.inner);
        }
        let name = name();
        if self.clocked {
            self.count(&name, flops, bytes);
            self.inner.timestamp();
            leaf(&mut self.inner);
            self.inner.timestamp();
            return self.queued.push(name);
        }
        let start = Instant::now();
        self.gaps += self.last.map_or(0.0, |last| (start - last).as_secs_f64());
        leaf(&mut self.inner);
        // An empty read waits for what was queued; the next read reports what failed.
        let _ = self.inner.read_back(NOTHING, &mut []);
        let end = Instant::now();
        self.last = Some(end);
        self.count(&name, flops, bytes).seconds += (end - start).as_secs_f64();
    }
}

const NOTHING: Buffer = Buffer { pool: Pool::Step, offset: 0, len: 0, dtype: DType::F32 };

/// Bytes of all of these buffers together.
fn all(buffers: &[Buffer]) -> f64 {
    buffers.iter().map(|buffer| buffer.bytes() as f64).sum()
}

/// Bytes of rows without the gaps between them.
fn rows_of(x: Rows, rows: usize, columns: usize) -> f64 {
    (rows * columns * x.buffer.dtype.bytes()) as f64
}

/// Bytes that a matrix product moves.
fn matmul_bytes(op: &Matmul) -> f64 {
    let times = if op.accumulate { 2.0 } else { 1.0 };
    rows_of(op.a, op.m, op.k) + rows_of(op.b, op.k, op.n) + times * rows_of(op.c, op.m, op.n)
}

/// As [`matmul_bytes`], by experts.
fn grouped_bytes(op: &GroupedMatmul) -> f64 {
    let (matrices, rows) = (op.experts * op.n * op.k, op.rows);
    let (b, c) = match op.layout {
        Layout::Nt | Layout::Nn => (rows_of(op.b, matrices, 1), rows_of(op.c, rows, op.n)),
        Layout::Tn => (rows_of(op.b, rows, op.n), 2.0 * rows_of(op.c, matrices, 1)),
    };
    rows_of(op.a, rows, op.k) + b + c
}

/// Operations of attention forward: two products over the part of each sequence's square that is seen. The sequences'
/// lengths are on the device; all are taken to be as long as the longest.
fn attention_flops(op: &Attention) -> f64 {
    let len = op.sequences.max_len as f64;
    let window = op.window.map_or(len, |window| len.min(window as f64));
    let keys = if op.causal { window - window * window / (2.0 * len.max(1.0)) } else { len };
    4.0 * op.tokens() as f64 * keys * (op.heads.query * op.heads.dim) as f64
}

/// Bytes of queries, keys, values, and what is as large as the queries `outputs` times.
fn attention_bytes(op: &Attention, outputs: usize) -> f64 {
    let columns = (1 + outputs) * op.heads.query + 2 * op.heads.key_value;
    rows_of(op.q, op.tokens(), columns * op.heads.dim) + all(&[op.log_sum_exp])
}

/// Bytes of the query and key columns, so many times, and of the tables: tokens at one position share a row in the cache.
fn rotated_bytes(op: &NormRope, dtype: DType, times: f64) -> f64 {
    let columns = op.tokens * (op.heads.query + op.heads.key_value) * op.heads.dim * dtype.bytes();
    times * columns as f64 + all(&[op.angles.cos, op.angles.sin, op.angles.rows])
}

fn cross_entropy_bytes(op: &CrossEntropy) -> f64 {
    let gradient = op.gradient.map_or(0.0, |gradient| rows_of(gradient, op.rows, op.vocab));
    all(&[op.logits, op.targets, op.weights, op.nll, op.correct, op.entropy]) + gradient
}

fn adamw_bytes(op: &AdamW) -> f64 {
    let updated = [Some(op.weights), op.masters, Some(op.moment1), Some(op.moment2)];
    2.0 * updated.into_iter().flatten().map(|buffer| buffer.bytes() as f64).sum::<f64>() + all(&[op.gradients])
}

/// Leaves without operations that are counted: arguments, then the bytes.
macro_rules! plain {
    ($($name:ident($($arg:ident: $type:ty),*) = $bytes:expr;)*) => {
        $(#[allow(clippy::too_many_arguments, reason = "the trait's signature")]
        fn $name(&mut self, $($arg: $type),*) {
            let bytes = $bytes;
            self.measure(|| stringify!($name).into(), 0.0, bytes, |inner| inner.$name($($arg),*));
        })*
    };
}

// Behind the macro that it uses.
mod families;

fn magnitude_bytes(op: &Magnitude) -> f64 {
    match *op {
        Magnitude::Norms { weight, a, b, out, .. } => all(&[weight, a, b, out]),
        Magnitude::Rescale { x, rows, norms, .. } => 2.0 * rows_of(x, rows, norms.len),
        Magnitude::Gradient { d_out, x, rows, norms, .. } => {
            [d_out, x].map(|y| rows_of(y, rows, norms.len)).iter().sum()
        }
    }
}

impl<B: Backend + ?Sized> Backend for ProfileBackend<B> {
    fn name(&self) -> String {
        self.inner.name()
    }

    fn reserve(&mut self, pool: Pool, bytes: usize) -> Result<()> {
        self.inner.reserve(pool, bytes)
    }

    fn read_back(&mut self, source: Buffer, target: &mut [u8]) -> Result<()> {
        self.inner.read_back(source, target)
    }

    fn queue_read(&mut self, sources: &[Buffer]) {
        self.measure(|| "queue_read".into(), 0.0, all(sources), |inner| inner.queue_read(sources));
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

    fn expect_attention(&mut self, asked: &[AttentionLibrary]) {
        self.inner.expect_attention(asked);
    }

    fn logits_gradient(&self, activations: DType) -> DType {
        self.inner.logits_gradient(activations)
    }

    fn matmul_algorithms(&mut self) -> Option<&mut dyn MatmulAlgorithms> {
        self.inner.matmul_algorithms()
    }

    fn record(&mut self, stream: Stream, event: Event) {
        if let Some(timeline) = &mut self.timeline {
            timeline.record(stream, event);
        }
        self.inner.record(stream, event);
    }

    fn wait(&mut self, stream: Stream, event: Event) {
        if let Some(timeline) = &mut self.timeline {
            timeline.wait(stream, event);
        }
        self.inner.wait(stream, event);
    }

    fn discard(&mut self, buffer: Buffer) {
        self.inner.discard(buffer);
    }

    fn memory(&self) -> Result<Option<(usize, usize)>> {
        self.inner.memory()
    }

    fn transfer(&mut self, stream: Stream, source: Buffer, target: Buffer) {
        let name = format!("transfer {stream:?}");
        if let Some(timeline) = &mut self.timeline {
            timeline.transfer(stream, source.bytes() as f64);
        }
        // It runs concurrently with the leaves: two timestamps among theirs would not measure it.
        if self.enabled && self.clocked && stream != Stream::Compute {
            self.count(&name, 0.0, source.bytes() as f64);
            return self.inner.transfer(stream, source, target);
        }
        self.timed(|| name, 0.0, source.bytes() as f64, |inner| inner.transfer(stream, source, target));
    }

    fn matmul(&mut self, op: &Matmul) {
        let name = || {
            let add = if op.accumulate { " +=" } else { "" };
            format!("matmul {:?} m={} n={} k={}{add}", op.layout, op.m, op.n, op.k)
        };
        let flops = 2.0 * op.m as f64 * op.n as f64 * op.k as f64;
        self.measure(name, flops, matmul_bytes(op), |inner| inner.matmul(op));
    }

    fn matmul_nf4(&mut self, op: &Nf4Matmul<'_>) {
        let name = || format!("matmul_nf4 {:?} m={} n={} k={}", op.layout, op.m, op.n, op.k);
        let flops = 2.0 * op.m as f64 * op.n as f64 * op.k as f64;
        let bytes = rows_of(op.a, op.m, op.k) + (op.n * op.k) as f64 / 2.0 + rows_of(op.c, op.m, op.n);
        self.measure(name, flops, bytes, |inner| inner.matmul_nf4(op));
    }

    fn matmul_low_rank(&mut self, op: &LowRankMatmul<'_>) {
        let Matmul { layout, m, n, k, .. } = op.product.shape();
        let name = || format!("matmul_low_rank {layout:?} m={m} n={n} k={k} rank={}", op.rank);
        let factors = op.projections.iter().chain(op.additions);
        let added: usize = factors.map(|part| part.columns.len() * part.low.len()).sum();
        let flops = 2.0 * m as f64 * (n * k + added) as f64;
        let bytes = matmul_bytes(&op.product.shape());
        self.measure(name, flops, bytes, |inner| inner.matmul_low_rank(op));
    }

    fn grouped_matmul(&mut self, op: &GroupedMatmul) {
        let name = || format!("grouped_matmul {:?} rows={} n={} k={}", op.layout, op.rows, op.n, op.k);
        let flops = 2.0 * op.rows as f64 * op.n as f64 * op.k as f64;
        self.measure(name, flops, grouped_bytes(op), |inner| inner.grouped_matmul(op));
    }

    fn attention(&mut self, op: &Attention) {
        let flops = attention_flops(op);
        self.measure(|| "attention".into(), flops, attention_bytes(op, 1), |inner| inner.attention(op));
    }

    fn attention_backward(&mut self, op: &Attention, d_out: Rows, d_qkv: Buffer, scratch: Buffer) {
        let (flops, bytes) = (2.5 * attention_flops(op), attention_bytes(op, 2) + all(&[d_qkv]));
        let leaf = |inner: &mut B| inner.attention_backward(op, d_out, d_qkv, scratch);
        self.measure(|| "attention_backward".into(), flops, bytes, leaf);
    }

    plain! {
        upload(source: &[u8], target: Buffer) = all(&[target]);
        zero(target: Buffer) = all(&[target]);
        copy(source: Buffer, target: Buffer) = all(&[source, target]);
        magnitude(op: &Magnitude) = magnitude_bytes(op);
        dequantize(weights: &Nf4Weights, first: usize, out: Buffer) = all(&[out]) + out.len as f64 / 2.0;
        sum_rows(x: Rows, rows: usize, columns: usize, out: Buffer) = rows_of(x, rows, columns) + all(&[out, out]);
        embedding(ids: Buffer, table: Buffer, width: usize, out: Buffer) = all(&[ids, out]) + (out.len * table.dtype.bytes()) as f64;
        embedding_backward(ids: Buffer, d_out: Buffer, width: usize, table_gradient: Buffer) = all(&[ids, d_out]) + 2.0 * (d_out.len.min(table_gradient.len) * 4) as f64;
        rms_norm(x: Buffer, weight: NormWeight, epsilon: f32, out: Buffer, inverse_rms: Buffer) = all(&[x, weight.weight, out, inverse_rms]);
        add_rms_norm(x: Buffer, delta: Buffer, sum: Buffer, weight: NormWeight, epsilon: f32, out: Buffer, inverse_rms: Buffer) = all(&[x, delta, sum, weight.weight, out, inverse_rms]);
        rms_norm_recompute(x: Buffer, weight: NormWeight, inverse_rms: Buffer, out: Buffer) = all(&[x, weight.weight, inverse_rms, out]);
        rms_norm_backward(d_out: Buffer, x: Buffer, weight: NormWeight, inverse_rms: Buffer, d_x: Buffer, d_weight: Buffer) = all(&[d_out, x, weight.weight, inverse_rms, d_x, d_x, d_weight, d_weight]);
        add(x: Buffer, delta: Buffer) = all(&[x, x, delta]);
        scale(x: Buffer, factor: f32, dropout: Option<Dropout>, out: Buffer) = all(&[x, out]);
        norm_rope(op: &NormRope, qkv: Buffer, qk: Buffer) = rotated_bytes(op, qk.dtype, 2.0);
        norm_rope_backward(op: &NormRope, qkv: Buffer, d_qkv: Buffer, d_norm: Option<(Buffer, Buffer)>) = rotated_bytes(op, qkv.dtype, if op.norm.is_some() { 3.0 } else { 2.0 });
        attention_cached(heads: Heads, window: Option<usize>, scale: f32, q: Rows, k_cache: Buffer, v_cache: Buffer, capacity: usize, lengths: Buffer, out: Buffer) = all(&[out, out, k_cache, v_cache]);
        swiglu(gate_up: Buffer, width: usize, out: Buffer) = all(&[gate_up, out]);
        swiglu_backward(gate_up: Buffer, width: usize, d_out: Buffer) = all(&[gate_up, gate_up, d_out]);
        gather_rows(x: Buffer, rows: Buffer, divisor: usize, width: usize, out: Buffer) = all(&[rows, out, out]);
        scatter_rows(x: Buffer, rows: Buffer, width: usize, out: Buffer) = all(&[rows, x, x]);
        copy_columns(source: Rows, target: Rows, rows: usize, columns: usize) = rows_of(source, rows, columns) + rows_of(target, rows, columns);
        cross_entropy(op: &CrossEntropy) = cross_entropy_bytes(op);
        dot(a: Buffer, b: Buffer, out: Buffer) = if a == b { all(&[a]) } else { all(&[a, b]) };
        guard(losses: Rows, balances: Option<Buffer>, norm_squared: Buffer) = all(&[losses.buffer, norm_squared]);
        adamw(op: &AdamW) = adamw_bytes(op);
        router(op: &Router, logits: Buffer, balance: Option<Buffer>) = all(&[logits, op.probabilities, op.experts_chosen, op.weights]);
        router_backward(op: &Router, d_weights: Buffer, balance: Option<(Buffer, f32)>, d_logits: Buffer) = all(&[op.probabilities, op.experts_chosen, op.weights, d_weights, d_logits]);
        permute(op: &Router, permutation: &Permutation) = all(&[op.experts_chosen, permutation.offsets, permutation.pairs, permutation.rows]);
        combine(x: Buffer, permutation: &Permutation, weights: Option<Buffer>, top_k: usize, width: usize, out: Buffer) = all(&[x, permutation.rows, out]);
        combine_backward(d_out: Buffer, x: Buffer, permutation: &Permutation, weights: Buffer, top_k: usize, width: usize, d_x: Buffer, d_weights: Buffer) = all(&[d_out, x, permutation.rows, weights, d_x, d_weights]);
    }
}
