//! What the device reaches at single things, measured in the same run: matrix products, copies, attention.

use std::time::Instant;

use arl_engine::AttentionChoice;
use arl_engine::backend::{
    Attention, AttentionLibrary, Backend, Buffer, DType, Heads, Layout, Matmul, Pool, Rows, Sequences, Stream,
    attention_library_scratch,
};
use arl_model::{Error, ErrorCode, Result};
use serde_json::{Value, json};

use super::wait;

/// The rates that leaves are held against.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ceilings {
    /// Of a bf16 product of 8,192 (f32 on the host), in TFLOP/s.
    pub(super) gemm_tflops: f64,
    /// Of a copy within the device, bytes read and written, in GB/s.
    pub(super) copy_gb_s: f64,
    /// Of pinned copies, in GB/s.
    pub(super) to_host_gb_s: f64,
    from_host_gb_s: f64,
    size: usize,
}

impl Ceilings {
    pub(super) fn line(&self) -> Value {
        json!({
            "measured": "ceilings", "gemm": self.size, "gemm_tflops": self.gemm_tflops, "copy_gb_s": self.copy_gb_s,
            "to_host_gb_s": self.to_host_gb_s, "from_host_gb_s": self.from_host_gb_s,
        })
    }

    /// The least seconds in which a leaf can be done.
    pub(super) fn least_seconds(&self, flops: f64, bytes: f64) -> f64 {
        (flops / self.gemm_tflops / 1e12).max(bytes / self.copy_gb_s / 1e9)
    }
}

/// Seconds of a call, over as many calls as fit in about `budget` seconds, after one that is not counted.
pub(super) fn seconds(backend: &mut dyn Backend, budget: f64, mut call: impl FnMut(&mut dyn Backend)) -> Result<f64> {
    call(backend);
    wait(backend)?;
    let start = Instant::now();
    call(backend);
    wait(backend)?;
    let once = start.elapsed().as_secs_f64();
    let calls = (budget / once.max(1e-6)).clamp(1.0, 200.0) as usize;
    let start = Instant::now();
    (0..calls).for_each(|_| call(backend));
    wait(backend)?;
    Ok(start.elapsed().as_secs_f64() / calls as f64)
}

/// Places buffers one after the other.
#[derive(Default)]
pub(super) struct Places {
    pub(super) bytes: usize,
}

impl Places {
    pub(super) fn take(&mut self, len: usize, dtype: DType) -> Buffer {
        let buffer = Buffer { pool: Pool::Step, offset: self.bytes, len, dtype };
        self.bytes = (self.bytes + buffer.bytes()).next_multiple_of(256);
        buffer
    }
}

/// Fills a buffer with random values between -1 and 1: the power that a product takes depends on them.
pub(super) fn fill(backend: &mut dyn Backend, buffer: Buffer) {
    const PIECE: usize = 1 << 20;
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let values: Vec<f32> = (0..PIECE.min(buffer.len))
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect();
    let narrow: Vec<half::bf16> = values.iter().map(|x| half::bf16::from_f32(*x)).collect();
    for start in (0..buffer.len).step_by(PIECE) {
        let piece = buffer.slice(start, PIECE.min(buffer.len - start));
        let bytes: &[u8] =
            if buffer.dtype == DType::Bf16 { bytemuck::cast_slice(&narrow) } else { bytemuck::cast_slice(&values) };
        backend.upload(&bytes[..piece.bytes()], piece);
    }
}

pub(super) fn rows(buffer: Buffer, stride: usize) -> Rows {
    Rows { buffer, stride }
}

/// Measures all of them; about two seconds on a GPU.
pub(super) fn ceilings(backend: &mut dyn Backend, large: bool) -> Result<Ceilings> {
    let (size, copied, dtype) = if large { (8192, 1 << 29, DType::Bf16) } else { (256, 1 << 20, DType::F32) };
    let scratch = backend.scratch_bytes(size, size);
    backend.reserve(Pool::Scratch, scratch)?;
    let mut places = Places::default();
    let [a, b, c] = [(); 3].map(|()| places.take(size * size, dtype));
    backend.reserve(Pool::Step, places.bytes)?;
    fill(backend, a);
    fill(backend, b);
    let [a, b, c] = [a, b, c].map(|buffer| rows(buffer, size));
    let op = Matmul { layout: Layout::Nt, m: size, n: size, k: size, a, b, c, accumulate: false, bias: None };
    let of_gemm = seconds(backend, 0.4, |backend| backend.matmul(&op))?;

    let mut places = Places::default();
    let [source, target] = [(); 2].map(|()| places.take(copied, DType::Bf16));
    backend.reserve(Pool::Step, places.bytes)?;
    backend.reserve(Pool::HostStep, source.bytes())?;
    let host = Buffer { pool: Pool::HostStep, offset: 0, ..source };
    let bytes = source.bytes() as f64;
    let of_copy = seconds(backend, 0.2, |backend| backend.copy(source, target))?;
    let of_host = seconds(backend, 0.3, |backend| backend.transfer(Stream::ToHost, source, host))?;
    let from_host = seconds(backend, 0.3, |backend| backend.transfer(Stream::FromHost, host, target))?;
    Ok(Ceilings {
        gemm_tflops: 2.0 * (size as f64).powi(3) / of_gemm / 1e12,
        copy_gb_s: 2.0 * bytes / of_copy / 1e9,
        to_host_gb_s: bytes / of_host / 1e9,
        from_host_gb_s: bytes / from_host / 1e9,
        size,
    })
}

/// FLOPs of causal attention over one sequence, forward: two products over half of the square.
pub(super) fn attention_flops(heads: Heads, tokens: usize) -> f64 {
    2.0 * (tokens as f64).powi(2) * (heads.query * heads.dim) as f64
}

/// FLOP/s of attention over one sequence of `tokens`, forward and backward (which has 2.5 times the operations).
pub(super) fn attention_rates(
    backend: &mut dyn Backend,
    choice: AttentionChoice,
    heads: Heads,
    tokens: usize,
    dtype: DType,
) -> Result<(f64, f64)> {
    let scratch = backend.scratch_bytes(heads.query * heads.dim, tokens);
    backend.reserve(Pool::Scratch, scratch)?;
    let width = (heads.query + 2 * heads.key_value) * heads.dim;
    let mut places = Places::default();
    let [qkv, d_qkv] = [(); 2].map(|()| places.take(tokens * width, dtype));
    let [out, d_out] = [(); 2].map(|()| places.take(tokens * heads.query * heads.dim, dtype));
    let log_sum_exp = places.take(tokens * heads.query, DType::F32);
    let own = backend.kind().attention_scratch(heads, tokens);
    let largest = places.take(attention_library_scratch(heads, tokens, 1).max(own), DType::F32);
    let cu_seqlens = places.take(2, DType::I32);
    backend.reserve(Pool::Step, places.bytes)?;
    fill(backend, qkv);
    fill(backend, d_out);
    backend.upload(bytemuck::cast_slice(&[0, tokens as i32]), cu_seqlens);
    let part = |head: usize| rows(qkv.slice(head * heads.dim, qkv.len - head * heads.dim), width);
    let op = Attention {
        heads,
        sequences: Sequences { cu_seqlens, count: 1, max_len: tokens },
        causal: true,
        window: None,
        scale: 1.0 / (heads.dim as f32).sqrt(),
        q: part(0),
        k: part(heads.query),
        v: part(heads.query + heads.key_value),
        out: rows(out, heads.query * heads.dim),
        log_sum_exp,
    };
    let d_out = rows(d_out, heads.query * heads.dim);
    let mut scratch = largest.slice(0, own);
    if choice != AttentionChoice::Own {
        let asked = AttentionLibrary {
            heads,
            window: None,
            scale: op.scale,
            tokens,
            sequences: 1,
            max_len: tokens,
            strides: [op.q, op.k, op.v, op.out].map(|rows| rows.stride),
        };
        match backend.use_attention_library(&[asked]) {
            Ok(()) => scratch = largest,
            Err(reason) if choice == AttentionChoice::Cudnn => {
                return Err(Error::new(ErrorCode::Device, format!("attention cudnn: {reason}")));
            }
            // The own kernels compute, as in the step.
            Err(_) => {}
        }
    }
    let forward = seconds(backend, 1.0, |backend| backend.attention(&op))?;
    let backward = seconds(backend, 1.0, |backend| backend.attention_backward(&op, d_out, d_qkv, scratch))?;
    let flops = attention_flops(heads, tokens);
    Ok((flops / forward, 2.5 * flops / backward))
}
