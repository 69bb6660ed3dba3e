//! How fast the gated delta rule of the CPU is next to the best f32 product of the same run, and how exact its f32 state stays.
//! Heads of 128 x 128, 16 of them; one JSON line a case: milliseconds (the least of several), GFLOP/s by the recurrence's count
//! (6 K V a token and head forward, twice that backward) and by the arithmetic of the chunked form, and both as shares of the
//! product's rate. Times are processor time of all threads, which a busy machine changes less than the time that passed.
//!
//! `delta_rate [--threads N] [--dtype f32|bf16|f16] [--long TOKENS]`; with `--long`, the error of the state after so many tokens
//! against the recurrence in f64.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command's output")]

use std::time::{Duration, Instant};

use arl_engine::backend::cpu::CpuBackend;
use arl_engine::backend::{
    Backend, Buffer, CausalConv, DType, DeltaHeads, DeltaRule, DeviceKind, GatedDelta, GatedNorm, Layout, Matmul, Pool,
    Rows, Sequences,
};
use serde_json::json;

const DIM: usize = 128;
const TOKENS: usize = 4096;

struct Bench {
    backend: CpuBackend,
    next: usize,
    noise: u32,
}

impl Bench {
    fn new() -> arl_model::Result<Self> {
        let mut backend = CpuBackend::new();
        backend.reserve(Pool::Step, 3 << 30)?;
        Ok(Bench { backend, next: 0, noise: 1 })
    }

    fn place(&mut self, len: usize, dtype: DType) -> Buffer {
        let buffer = Buffer { pool: Pool::Step, offset: self.next, len, dtype };
        self.next = (self.next + buffer.bytes()).next_multiple_of(64);
        buffer
    }

    /// A value in (-1, 1).
    fn value(&mut self) -> f32 {
        self.noise = self.noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        self.noise as i32 as f32 / 2_147_483_648.0
    }

    fn noise(&mut self, len: usize, dtype: DType) -> Buffer {
        let values: Vec<f32> = (0..len).map(|_| self.value()).collect();
        self.put(&values, dtype)
    }

    fn put(&mut self, values: &[f32], dtype: DType) -> Buffer {
        let buffer = self.place(values.len(), dtype);
        let staged = Buffer { dtype: DType::F32, ..self.place(values.len(), DType::F32) };
        self.backend.upload(bytemuck::cast_slice(values), staged);
        self.backend.copy(staged, buffer);
        self.next = staged.offset;
        buffer
    }

    /// Sequences of one length.
    fn sequences(&mut self, tokens: usize, max_len: usize) -> Sequences {
        let bounds: Vec<i32> = (0..=tokens / max_len).map(|s| (s * max_len) as i32).collect();
        let cu_seqlens = self.place(bounds.len(), DType::I32);
        self.backend.upload(bytemuck::cast_slice(&bounds), cu_seqlens);
        Sequences { cu_seqlens, count: bounds.len() - 1, max_len }
    }

    /// The least processor time of a second's runs, each after `prepare`, which is not counted.
    fn seconds(&mut self, mut prepare: impl FnMut(&mut CpuBackend), mut leaf: impl FnMut(&mut CpuBackend)) -> f64 {
        prepare(&mut self.backend);
        leaf(&mut self.backend);
        let (begin, mut best, mut runs) = (Instant::now(), f64::INFINITY, 0);
        while runs < 5 || begin.elapsed() < Duration::from_secs(1) {
            prepare(&mut self.backend);
            let start = processor_seconds();
            leaf(&mut self.backend);
            best = best.min(processor_seconds() - start);
            runs += 1;
        }
        best
    }

    /// FLOP/s of the best of two products.
    fn product(&mut self) -> f64 {
        let side = 1536;
        let (a, b) = (self.noise(side * side, DType::F32), self.noise(side * side, DType::F32));
        let c = self.place(side * side, DType::F32);
        let rows = |buffer| Rows { buffer, stride: side };
        let rate = |layout, bench: &mut Bench| {
            let (a, b, c) = (rows(a), rows(b), rows(c));
            let op = Matmul { layout, m: side, n: side, k: side, a, b, c, accumulate: false, bias: None };
            2.0 * (side * side * side) as f64 / bench.seconds(|_| (), |backend| backend.matmul(&op))
        };
        rate(Layout::Nt, self).max(rate(Layout::Nn, self))
    }
}

/// What all threads have computed.
#[cfg(unix)]
fn processor_seconds() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is valid for the one write that the call makes.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

#[cfg(not(unix))]
fn processor_seconds() -> f64 {
    f64::NAN
}

/// Arithmetic of the chunked form a token and value head: products with the state, and those among a chunk's tokens, whose
/// triangles are counted as such. `group` value heads share the products of queries and keys.
fn chunked_flops(group: f64) -> (f64, f64) {
    let (n, dim) = (GatedDelta::CHUNK as f64, DIM as f64);
    let (state, triangle) = (2.0 * dim * dim, n * dim);
    let inverse = n * n / 3.0;
    let forward = 3.0 * state + (2.0 + 2.0 / group) * triangle + inverse;
    // The states again: two products with them, and what is written. Then seven products with states.
    let again = 2.0 * state + (1.0 + 1.0 / group) * triangle + inverse;
    let backward = 7.0 * state + (5.0 + 6.0 / group) * triangle + inverse;
    (forward, again + backward)
}

fn rule(b: &mut Bench, heads: DeltaHeads, len: usize, dtype: DType, product: f64) {
    let sequences = b.sequences(TOKENS, len);
    let qkv = b.noise(TOKENS * heads.channels(), dtype);
    let gates = b.noise(TOKENS * 2 * heads.value, dtype);
    let op = GatedDelta {
        heads,
        sequences,
        tokens: TOKENS,
        qkv: b.place(qkv.len, dtype),
        gates: Rows { buffer: b.place(gates.len, dtype), stride: 2 * heads.value },
        a_log: b.noise(heads.value, dtype),
        dt_bias: b.noise(heads.value, dtype),
        scratch: b.place(GatedDelta::backward_scratch(DeviceKind::Cpu, heads, TOKENS, sequences.count), DType::F32),
    };
    let (out, d_out) = (b.place(TOKENS * heads.value_columns(), dtype), b.noise(TOKENS * heads.value_columns(), dtype));
    let (d_a_log, d_dt_bias) = (b.noise(heads.value, DType::F32), b.noise(heads.value, DType::F32));
    // In place: each backward pass begins with the inputs again.
    let prepare = move |backend: &mut CpuBackend| {
        backend.copy(qkv, op.qkv);
        backend.copy(gates, op.gates.buffer);
    };
    let forward = b.seconds(prepare, |backend| backend.gated_delta(&op, out, None));
    let backward = b.seconds(prepare, |backend| backend.gated_delta_backward(&op, d_out, d_a_log, d_dt_bias));
    let all = (TOKENS * heads.value) as f64;
    let recurrence = 6.0 * (DIM * DIM) as f64;
    let chunked = chunked_flops((heads.value / heads.key) as f64);
    let passes = [("forward", forward, recurrence, chunked.0), ("backward", backward, 2.0 * recurrence, chunked.1)];
    for (pass, seconds, recurrence, chunked) in passes {
        let (recurrence, chunked) = (all * recurrence / seconds, all * chunked / seconds);
        let line = json!({
            "leaf": "gated_delta", "pass": pass, "key_heads": heads.key, "value_heads": heads.value, "sequence": len,
            "ms": round(seconds * 1e3), "gflop_s": round(recurrence / 1e9), "chunked_gflop_s": round(chunked / 1e9),
            "share": round(recurrence / product), "chunked_share": round(chunked / product),
        });
        println!("{line}");
    }
}

fn round(x: f64) -> f64 {
    (x * 1000.0).round() / 1000.0
}

/// The leaves around the rule, by the memory that they touch.
fn around(b: &mut Bench, heads: DeltaHeads, dtype: DType) {
    let (channels, width) = (heads.channels(), heads.value_columns());
    let sequences = b.sequences(TOKENS, 512);
    let kept = b.noise(TOKENS * channels, dtype);
    let (x, out) = (b.place(kept.len, dtype), b.noise(TOKENS * channels, dtype));
    let weight = b.noise(channels * 4, dtype);
    let d_weight = b.noise(channels * 4, DType::F32);
    let conv =
        CausalConv { sequences, tokens: TOKENS, channels, taps: 4, x: Rows { buffer: x, stride: channels }, weight };
    let (values, gate) = (b.noise(TOKENS * width, dtype), b.place(TOKENS * width, dtype));
    let (gates, d) = (b.noise(TOKENS * width, dtype), b.place(TOKENS * width, dtype));
    let (weight, d_norm) = (b.noise(DIM, dtype), b.noise(DIM, DType::F32));
    let gate_rows = Rows { buffer: gate, stride: width };
    let norm = GatedNorm { tokens: TOKENS, heads: heads.value, x: values, gate: gate_rows, weight, epsilon: 1e-6 };
    let prepare = move |backend: &mut CpuBackend| {
        backend.copy(kept, x);
        backend.copy(gates, gate);
        backend.copy(gates, d);
    };
    let size = dtype.bytes() * TOKENS;
    for (leaf, bytes, seconds) in [
        ("causal_conv", 2 * channels, b.seconds(prepare, |backend| backend.causal_conv(&conv, out))),
        (
            "causal_conv_backward",
            3 * channels,
            b.seconds(prepare, |backend| backend.causal_conv_backward(&conv, out, d_weight)),
        ),
        ("gated_norm", 3 * width, b.seconds(prepare, |backend| backend.gated_norm(&norm, d))),
        ("gated_norm_backward", 5 * width, b.seconds(prepare, |backend| backend.gated_norm_backward(&norm, d, d_norm))),
    ] {
        let rate = (bytes * size) as f64 / seconds / 1e9;
        println!("{}", json!({ "leaf": leaf, "ms": round(seconds * 1e3), "gb_s": round(rate) }));
    }
}

/// The state after so many tokens, and one token at a time, against the recurrence in f64.
fn long(b: &mut Bench, tokens: usize) -> arl_model::Result<()> {
    let heads = DeltaHeads { key: 1, value: 2, key_dim: DIM, value_dim: DIM };
    let sequences = b.sequences(tokens, tokens);
    let qkv: Vec<f32> = (0..tokens * heads.channels()).map(|_| b.value()).collect();
    // One head forgets a thousandth a token or less, one next to nothing.
    let gates: Vec<f32> = (0..tokens * 4).map(|_| b.value()).collect();
    let (a_log, dt_bias) = ([-7.0_f32, -14.0], [0.0_f32, 0.0]);
    let op = GatedDelta {
        heads,
        sequences,
        tokens,
        qkv: b.put(&qkv, DType::F32),
        gates: Rows { buffer: b.put(&gates, DType::F32), stride: 4 },
        a_log: b.put(&a_log, DType::F32),
        dt_bias: b.put(&dt_bias, DType::F32),
        scratch: b.place(GatedDelta::forward_scratch(DeviceKind::Cpu, heads, tokens, sequences.count), DType::F32),
    };
    let (out, states) = (b.place(tokens * heads.value_columns(), DType::F32), b.place(heads.state(), DType::F32));
    b.backend.gated_delta(&op, out, Some(states));
    let mut actual = vec![0.0_f32; states.len];
    b.backend.read_back(states, bytemuck::cast_slice_mut(&mut actual))?;
    for head in 0..heads.value {
        let mut state = vec![0.0_f64; DIM * DIM];
        for t in 0..tokens {
            let row = &qkv[t * heads.channels()..][..heads.channels()];
            let (k, v) = (&row[DIM..2 * DIM], &row[(2 + head) * DIM..(3 + head) * DIM]);
            let squares: f64 = k.iter().map(|k| f64::from(*k).powi(2)).sum();
            let factor = 1.0 / (squares + 1e-6).sqrt();
            let [strength, forgotten] = [gates[t * 4 + head], gates[t * 4 + 2 + head] + dt_bias[head]].map(f64::from);
            let decay = (-f64::from(a_log[head]).exp() * forgotten.exp().ln_1p()).exp();
            let beta = 1.0 / (1.0 + (-strength).exp());
            let mut met = [0.0; DIM];
            for (state, k) in state.chunks_exact_mut(DIM).zip(k) {
                let k = f64::from(*k) * factor;
                for (state, met) in state.iter_mut().zip(&mut met) {
                    *state *= decay;
                    *met += *state * k;
                }
            }
            for (met, v) in met.iter_mut().zip(v) {
                *met = beta * (f64::from(*v) - *met);
            }
            for (state, k) in state.chunks_exact_mut(DIM).zip(k) {
                let k = f64::from(*k) * factor;
                state.iter_mut().zip(&met).for_each(|(state, written)| *state += k * written);
            }
        }
        let size = (state.iter().map(|x| x * x).sum::<f64>() / state.len() as f64).sqrt();
        let errors = actual[head * state.len()..].iter().zip(&state).map(|(a, e)| (f64::from(*a) - e).abs());
        let worst = errors.fold(0.0, f64::max) / size;
        println!("{}", json!({ "state_after": tokens, "head": head, "worst_error_of_root_mean_square": worst }));
    }
    Ok(())
}

fn run(dtype: DType, tokens: Option<usize>) -> arl_model::Result<()> {
    if let Some(tokens) = tokens {
        return long(&mut Bench::new()?, tokens);
    }
    let mut b = Bench::new()?;
    let product = b.product();
    println!("{}", json!({ "product_gflop_s": round(product / 1e9), "device": b.backend.name() }));
    for (key, value) in [(16, 16), (8, 16)] {
        for len in [512, 4096] {
            b.next = 0;
            rule(&mut b, DeltaHeads { key, value, key_dim: DIM, value_dim: DIM }, len, dtype, product);
        }
    }
    b.next = 0;
    around(&mut b, DeltaHeads { key: 16, value: 16, key_dim: DIM, value_dim: DIM }, dtype);
    Ok(())
}

fn main() -> std::process::ExitCode {
    let (mut dtype, mut threads, mut tokens) = (DType::F32, 0, None);
    let mut words = std::env::args().skip(1);
    while let Some(flag) = words.next() {
        let value = words.next().unwrap_or_default();
        match (flag.as_str(), value.as_str(), value.parse::<usize>()) {
            ("--dtype", "f32", _) => dtype = DType::F32,
            ("--dtype", "bf16", _) => dtype = DType::Bf16,
            ("--dtype", "f16", _) => dtype = DType::F16,
            ("--threads", _, Ok(number)) => threads = number,
            ("--long", _, Ok(number)) => tokens = Some(number),
            _ => {
                eprintln!("delta_rate [--threads N] [--dtype f32|bf16|f16] [--long TOKENS]");
                return std::process::ExitCode::FAILURE;
            }
        }
    }
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    let result = match pool {
        Ok(pool) => pool.install(|| run(dtype, tokens)).map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    };
    match result {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            std::process::ExitCode::FAILURE
        }
    }
}
