//! How fast each leaf of the CPU is, at the shapes of a 30M and an 8M model with 2,048 tokens in sequences of 512, and of a vision
//! tower with 1,024 patches.
//! Prints one JSON line a leaf: milliseconds (the best of several), GB/s of the memory it must touch or GFLOP/s, and the
//! processor time of all threads together.
//!
//! `leaf_rate [--dtype f32|bf16|f16] [--threads N] [--only LEAF]`

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command's output")]

use std::time::{Duration, Instant};

use arl_engine::backend::cpu::CpuBackend;
use arl_engine::backend::{
    AdamW, Angles, Attention, Backend, Buffer, CrossEntropy, DType, DeviceKind, Gelu, Heads, LayerNorm, Layout, Matmul,
    NormRope, Pool, Rows, Sequences, StochasticRounding, Vision,
};

const TOKENS: usize = 2048;
const SEQUENCE: usize = 512;

struct Model {
    name: &'static str,
    hidden: usize,
    intermediate: usize,
    vocab: usize,
    heads: Heads,
    parameters: usize,
}

const MODELS: [Model; 2] = [
    Model {
        name: "30M",
        hidden: 512,
        intermediate: 1536,
        vocab: 16_384,
        heads: Heads { query: 8, key_value: 4, dim: 64 },
        parameters: 30_000_000,
    },
    Model {
        name: "8M",
        hidden: 256,
        intermediate: 768,
        vocab: 8192,
        heads: Heads { query: 4, key_value: 2, dim: 64 },
        parameters: 8_000_000,
    },
];

/// What a leaf's time is measured against.
enum Work {
    Bytes(usize),
    Flops(usize),
}

struct Bench {
    backend: CpuBackend,
    next: usize,
    model: &'static str,
    only: String,
    noise: u32,
}

impl Bench {
    fn place(&mut self, len: usize, dtype: DType) -> Buffer {
        let buffer = Buffer { pool: Pool::Step, offset: self.next, len, dtype };
        self.next = (self.next + buffer.bytes()).next_multiple_of(64);
        buffer
    }

    /// Values in (-1, 1).
    fn noise(&mut self, len: usize, dtype: DType) -> Buffer {
        let buffer = self.place(len, dtype);
        let staged = Buffer { dtype: DType::F32, ..self.place(len, DType::F32) };
        let mut bytes = Vec::with_capacity(len * 4);
        for _ in 0..len {
            self.noise = self.noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            bytes.extend((self.noise as i32 as f32 / 2_147_483_648.0).to_le_bytes());
        }
        self.backend.upload(&bytes, staged);
        self.backend.copy(staged, buffer);
        self.next = staged.offset;
        buffer
    }

    fn ints(&mut self, values: impl Iterator<Item = usize>) -> Buffer {
        let bytes: Vec<u8> = values.flat_map(|x| (x as i32).to_le_bytes()).collect();
        let buffer = self.place(bytes.len() / 4, DType::I32);
        self.backend.upload(&bytes, buffer);
        buffer
    }

    fn measure(&mut self, name: &str, work: Work, leaf: impl FnMut(&mut CpuBackend)) {
        self.measure_after(name, work, |_| (), leaf);
    }

    /// Runs `leaf` for a third of a second, each time after `prepare`, which is not counted; prints the best time.
    fn measure_after(
        &mut self,
        name: &str,
        work: Work,
        mut prepare: impl FnMut(&mut CpuBackend),
        mut leaf: impl FnMut(&mut CpuBackend),
    ) {
        if !self.only.is_empty() && name != self.only {
            return;
        }
        prepare(&mut self.backend);
        leaf(&mut self.backend);
        let (begin, mut best, mut least) = (Instant::now(), Duration::MAX, f64::INFINITY);
        let mut runs = 0;
        while runs < 3 || begin.elapsed() < Duration::from_millis(330) {
            prepare(&mut self.backend);
            let (start, busy) = (Instant::now(), processor_seconds());
            leaf(&mut self.backend);
            best = best.min(start.elapsed());
            least = least.min(processor_seconds() - busy);
            runs += 1;
        }
        let seconds = best.as_secs_f64();
        let (unit, amount) = match work {
            Work::Bytes(bytes) => ("gb_s", bytes),
            Work::Flops(flops) => ("gflop_s", flops),
        };
        let rate = amount as f64 / seconds / 1e9;
        println!(
            r#"{{"model":"{}","leaf":"{name}","ms":{:.3},"{unit}":{rate:.1},"processor_ms":{:.3},"runs":{runs}}}"#,
            self.model,
            seconds * 1e3,
            least * 1e3
        );
    }
}

/// What all threads have computed, which a busy machine changes less than the time that passed.
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

fn rows(buffer: Buffer, stride: usize) -> Rows {
    Rows { buffer, stride }
}

fn bench(model: &Model, dtype: DType, only: &str) -> arl_model::Result<()> {
    let mut b = Bench { backend: CpuBackend::new(), next: 0, model: model.name, only: only.to_owned(), noise: 1 };
    b.backend.reserve(Pool::Step, 2 << 30)?;
    let size = dtype.bytes();
    let (hidden, vocab) = (model.hidden, model.vocab);

    let (x, delta) = (b.noise(TOKENS * hidden, dtype), b.noise(TOKENS * hidden, dtype));
    let (d_x, out) = (b.noise(TOKENS * hidden, dtype), b.noise(TOKENS * hidden, dtype));
    let (weight, inverse_rms) = (b.noise(hidden, dtype), b.place(TOKENS, DType::F32));
    let d_weight = b.noise(hidden, DType::F32);
    let pass = TOKENS * hidden * size;
    b.measure("rms_norm", Work::Bytes(2 * pass), |b| b.rms_norm(x, weight.into(), 1e-6, out, inverse_rms));
    b.measure("add_rms_norm", Work::Bytes(4 * pass), |b| {
        b.add_rms_norm(x, delta, d_x, weight.into(), 1e-6, out, inverse_rms)
    });
    b.measure("rms_norm_recompute", Work::Bytes(2 * pass), |b| {
        b.rms_norm_recompute(x, weight.into(), inverse_rms, out)
    });
    b.measure("rms_norm_backward", Work::Bytes(4 * pass), |b| {
        b.rms_norm_backward(delta, x, weight.into(), inverse_rms, d_x, d_weight);
    });
    b.measure("add", Work::Bytes(3 * pass), |b| b.add(out, delta));
    let (ids, table) = (b.ints((0..TOKENS).map(|t| t * 7919 % vocab)), b.noise(vocab * hidden, dtype));
    let d_table = b.noise(vocab * hidden, DType::F32);
    b.measure("embedding", Work::Bytes(2 * pass), |b| b.embedding(ids, table, hidden, out));
    b.measure("embedding_backward", Work::Bytes(pass + TOKENS * hidden * 8), |b| {
        b.embedding_backward(ids, x, hidden, d_table);
    });

    attention(&mut b, model.heads, dtype);

    let width = model.intermediate;
    let (gate_up, h) = (b.noise(TOKENS * 2 * width, dtype), b.noise(TOKENS * width, dtype));
    b.measure("swiglu", Work::Bytes(3 * TOKENS * width * size), |b| b.swiglu(gate_up, width, h));
    // In place: repeated, the values would sink to subnormal numbers, which are slow.
    let kept = b.noise(TOKENS * 2 * width, dtype);
    b.measure_after(
        "swiglu_backward",
        Work::Bytes(5 * TOKENS * width * size),
        |b| b.copy(kept, gate_up),
        |b| b.swiglu_backward(gate_up, width, h),
    );

    let chunk = 512;
    let logits = b.noise(chunk * vocab, dtype);
    let op = CrossEntropy {
        rows: chunk,
        vocab,
        logits,
        targets: b.ints((0..chunk).map(|row| row * 31 % vocab)),
        weights: b.noise(chunk, DType::F32),
        scale: 1e-3,
        gradient: Some(Rows { buffer: logits, stride: vocab }),
        nll: b.place(chunk, DType::F32),
        correct: b.place(chunk, DType::F32),
        entropy: b.place(chunk, DType::F32),
    };
    b.measure("cross_entropy", Work::Bytes(2 * chunk * vocab * size), |b| b.cross_entropy(&op));
    let head = Matmul {
        layout: Layout::Nt,
        m: chunk,
        n: vocab,
        k: hidden,
        a: rows(x, hidden),
        b: rows(table, hidden),
        c: rows(logits, vocab),
        accumulate: false,
        bias: None,
    };
    b.measure("matmul head nt", Work::Flops(2 * chunk * vocab * hidden), |b| b.matmul(&head));

    let n = model.parameters;
    let (weights, gradients) = (b.noise(n, dtype), b.noise(n, DType::F32));
    let masters = match dtype {
        DType::Bf16 => Some(b.place(n, DType::U16)),
        DType::F16 => Some(b.place(n, DType::F32)),
        _ => None,
    };
    let norm = b.place(1, DType::F64);
    b.backend.zero(norm);
    b.measure("dot", Work::Bytes(4 * n), |b| b.dot(gradients, gradients, norm));
    let op = AdamW {
        weights,
        masters,
        rounding: StochasticRounding::default(),
        gradients,
        moment1: b.place(n, DType::F32),
        moment2: b.place(n, DType::F32),
        learning_rate: 1e-3,
        beta1: 0.9,
        beta2: 0.95,
        epsilon: 1e-8,
        weight_decay: 0.1,
        bias_correction1: 0.1,
        bias_correction2: 0.05,
        grad_norm_squared: norm,
        gradient_scale: 1.0,
        max_grad_norm: 1.0,
    };
    b.backend.zero(op.moment1);
    b.backend.zero(op.moment2);
    b.measure("adamw", Work::Bytes(28 * n), |b| b.adamw(&op));
    b.measure("zero", Work::Bytes(4 * n), |b| b.zero(gradients));
    Ok(())
}

fn attention(b: &mut Bench, heads: Heads, dtype: DType) {
    let Heads { query, key_value, dim } = heads;
    let size = dtype.bytes();
    let (width, rotated) = ((query + 2 * key_value) * dim, (query + key_value) * dim);
    let rope = NormRope {
        heads,
        rotary: dim,
        tokens: TOKENS,
        norm: Some((b.noise(dim, dtype).into(), b.noise(dim, dtype).into(), 1e-6)),
        angles: Angles {
            cos: b.noise(SEQUENCE * dim / 2, DType::F32),
            sin: b.noise(SEQUENCE * dim / 2, DType::F32),
            rows: b.ints((0..TOKENS).map(|token| token % SEQUENCE)),
            axes: None,
        },
    };
    let (qkv, qk) = (b.noise(TOKENS * width, dtype), b.noise(TOKENS * rotated, dtype));
    let d_qkv = b.noise(TOKENS * width, dtype);
    let d_norm = Some((b.noise(dim, DType::F32), b.noise(dim, DType::F32)));
    b.measure("norm_rope", Work::Bytes(2 * TOKENS * rotated * size), |b| b.norm_rope(&rope, qkv, qk));
    b.measure("norm_rope_backward", Work::Bytes(3 * TOKENS * rotated * size), |b| {
        b.norm_rope_backward(&rope, qkv, d_qkv, d_norm);
    });

    let op = Attention {
        heads,
        sequences: Sequences {
            cu_seqlens: b.ints((0..=TOKENS / SEQUENCE).map(|s| s * SEQUENCE)),
            count: TOKENS / SEQUENCE,
            max_len: SEQUENCE,
        },
        causal: true,
        window: None,
        scale: 0.125,
        q: rows(qk, rotated),
        k: rows(qk.slice(query * dim, qk.len - query * dim), rotated),
        v: rows(qkv.slice(rotated, qkv.len - rotated), width),
        out: rows(b.place(TOKENS * query * dim, dtype), query * dim),
        log_sum_exp: b.place(query * TOKENS, DType::F32),
    };
    let (d_out, scratch) =
        (b.noise(TOKENS * query * dim, dtype), b.place(DeviceKind::Cpu.attention_scratch(heads, TOKENS), DType::F32));
    // Pairs of a query and a key that it sees; two products of `dim` forward, five backward.
    let pairs = query * (TOKENS / SEQUENCE) * SEQUENCE * (SEQUENCE + 1) / 2;
    b.measure("attention", Work::Flops(pairs * 4 * dim), |b| b.attention(&op));
    b.measure("attention_backward", Work::Flops(pairs * 10 * dim), |b| {
        b.attention_backward(&op, rows(d_out, query * dim), d_qkv, scratch);
    });
}

/// A vision tower's leaves: 1,024 patches of one picture, 16 heads of 72.
fn tower(dtype: DType, only: &str) -> arl_model::Result<()> {
    const PATCHES: usize = 1024;
    let mut b = Bench { backend: CpuBackend::new(), next: 0, model: "tower", only: only.to_owned(), noise: 1 };
    b.backend.reserve(Pool::Step, 1 << 29)?;
    let (heads, hidden, width, size) = (Heads { query: 16, key_value: 16, dim: 72 }, 1152, 4304, dtype.bytes());
    let pass = PATCHES * hidden * size;
    let [x, d_out, d_x] = [(); 3].map(|()| b.noise(PATCHES * hidden, dtype));
    let [weight, bias] = [(); 2].map(|()| b.noise(hidden, dtype));
    let [d_weight, d_bias] = [(); 2].map(|()| b.noise(hidden, DType::F32));
    let (out, statistics) = (b.place(PATCHES * hidden, dtype), b.place(2 * PATCHES, DType::F32));
    let norm = LayerNorm { x, weight, bias, width: hidden, epsilon: 1e-6, out, statistics };
    b.measure("layer_norm", Work::Bytes(2 * pass), |b| b.layer_norm(&norm));
    b.measure("layer_norm_backward", Work::Bytes(4 * pass), |b| {
        b.layer_norm_backward(&norm, d_out, d_x, d_weight, d_bias);
    });

    let [h, d_h, kept] = [(); 3].map(|()| b.noise(PATCHES * width, dtype));
    let activated = b.place(PATCHES * width, dtype);
    for (kind, forward, backward) in
        [(Gelu::Tanh, "gelu tanh", "gelu_backward tanh"), (Gelu::Erf, "gelu erf", "gelu_backward erf")]
    {
        b.measure(forward, Work::Bytes(2 * PATCHES * width * size), |b| b.gelu(kind, h, activated));
        let work = Work::Bytes(3 * PATCHES * width * size);
        b.measure_after(backward, work, |b| b.copy(kept, d_h), |b| b.gelu_backward(kind, h, d_h));
    }

    let columns = heads.query_columns();
    let qkv = b.noise(PATCHES * heads.qkv_columns(), dtype);
    let part = |head: usize| rows(qkv.slice(head * heads.dim, qkv.len - head * heads.dim), heads.qkv_columns());
    let op = Attention {
        heads,
        sequences: Sequences { cu_seqlens: b.ints([0, PATCHES].into_iter()), count: 1, max_len: PATCHES },
        causal: false,
        window: None,
        scale: heads.scale(),
        q: part(0),
        k: part(heads.query),
        v: part(2 * heads.query),
        out: rows(b.place(PATCHES * columns, dtype), columns),
        log_sum_exp: b.place(heads.query * PATCHES, DType::F32),
    };
    let (d_qkv, scratch) =
        (b.place(qkv.len, dtype), b.place(DeviceKind::Cpu.attention_scratch(heads, PATCHES), DType::F32));
    let products = heads.query * PATCHES * PATCHES * 2 * heads.dim;
    b.measure("attention not causal", Work::Flops(2 * products), |b| b.attention(&op));
    b.measure("attention_backward not causal", Work::Flops(5 * products), |b| {
        b.attention_backward(&op, rows(d_out, columns), d_qkv, scratch);
    });
    Ok(())
}

fn main() -> std::process::ExitCode {
    let (mut dtype, mut threads, mut only) = (DType::F32, 0, String::new());
    let mut words = std::env::args().skip(1);
    while let Some(flag) = words.next() {
        match (flag.as_str(), words.next().as_deref()) {
            ("--dtype", Some("f32")) => dtype = DType::F32,
            ("--dtype", Some("bf16")) => dtype = DType::Bf16,
            ("--dtype", Some("f16")) => dtype = DType::F16,
            ("--threads", Some(value)) if value.parse::<usize>().is_ok() => threads = value.parse().unwrap_or(0),
            ("--only", Some(value)) => value.clone_into(&mut only),
            _ => {
                eprintln!("leaf_rate [--dtype f32|bf16|f16] [--threads N] [--only LEAF]");
                return std::process::ExitCode::FAILURE;
            }
        }
    }
    let pool = match rayon::ThreadPoolBuilder::new().num_threads(threads).build() {
        Ok(pool) => pool,
        Err(error) => {
            eprintln!("no threads: {error}");
            return std::process::ExitCode::FAILURE;
        }
    };
    for model in &MODELS {
        if let Err(error) = pool.install(|| bench(model, dtype, &only)) {
            eprintln!("{error}");
            return std::process::ExitCode::FAILURE;
        }
    }
    if let Err(error) = pool.install(|| tower(dtype, &only)) {
        eprintln!("{error}");
        return std::process::ExitCode::FAILURE;
    }
    std::process::ExitCode::SUCCESS
}
