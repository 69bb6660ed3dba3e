//! Attention: forward, backward, with a cache, and by a device's own library. Sequences are ragged, some empty; heads
//! grouped; half have windows, and a third is not causal. At a step's sizes once more with heads of 256.

use arl_engine::backend::{
    Attention, AttentionLibrary, Buffer, DType, DeviceKind, Heads, Rows, Sequences, attention_library_scratch,
};

use super::super::draw::TOKENS;
use super::super::trial::{Scene, Trial};

/// The operation without its outputs, over queries, keys and values side by side.
fn inputs(s: &mut Scene, heads: Heads) -> (Attention, Buffer, String) {
    let Heads { query, key_value, dim } = heads;
    let most = s.draw.scaled(150, 700, TOKENS);
    let bounds = s.draw.sequences(most);
    let tokens = bounds[bounds.len() - 1];
    let max_len = bounds.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(0);
    let causal = s.draw.below(3) > 0;
    let window = (causal && s.draw.coin()).then(|| s.draw.between(1, max_len + 5));
    let width = (query + 2 * key_value) * dim;
    let qkv = s.random(tokens * width);
    let part = |head: usize| Rows { buffer: qkv.slice(head * dim, qkv.len - head * dim), stride: width };
    let of = if causal { "" } else { " not causal," };
    let what = format!("sequences {bounds:?},{of} heads {query}/{key_value} of {dim}, window {window:?}");
    let op = Attention {
        heads,
        sequences: Sequences { cu_seqlens: s.ints(&bounds), count: bounds.len() - 1, max_len },
        causal,
        window,
        scale: 1.0 / (dim as f32).sqrt(),
        q: part(0),
        k: part(query),
        v: part(query + key_value),
        out: Rows { buffer: s.scratch(tokens * query * dim, s.dtype), stride: query * dim },
        log_sum_exp: s.scratch(query * tokens, DType::F32),
    };
    (op, qkv, what)
}

pub(super) fn attention(mut s: Scene) -> Trial {
    let heads = s.draw.heads();
    forward(s, heads)
}

/// As [`attention`], with the heads of a hybrid.
pub(super) fn attention_of_256(s: Scene) -> Trial {
    let heads = of_256(&s);
    forward(s, heads)
}

/// Heads of 256, in a step those of Qwen3-Next.
fn of_256(s: &Scene) -> Heads {
    Heads { query: s.draw.scaled(2, 8, 16), key_value: s.draw.scaled(1, 2, 2), dim: 256 }
}

fn forward(mut s: Scene, heads: Heads) -> Trial {
    let (mut op, _, what) = inputs(&mut s, heads);
    op.out.buffer = s.output("out", op.out.buffer.len, s.dtype);
    op.log_sum_exp = s.output("log_sum_exp", op.log_sum_exp.len, DType::F32);
    s.trial(what, move |backend| backend.attention(&op))
}

/// From the forward pass of the same backend, as in a step.
pub(super) fn attention_backward(mut s: Scene) -> Trial {
    let heads = s.draw.heads();
    backward(s, heads)
}

/// As [`attention_backward`], with the heads of a hybrid.
pub(super) fn attention_backward_of_256(s: Scene) -> Trial {
    let heads = of_256(&s);
    backward(s, heads)
}

fn backward(mut s: Scene, heads: Heads) -> Trial {
    let (op, qkv, what) = inputs(&mut s, heads);
    let d_out = Rows { buffer: s.random(op.out.buffer.len), stride: op.out.stride };
    let d_qkv = s.output("d_qkv", qkv.len, s.dtype);
    let tokens = op.log_sum_exp.len / op.heads.query;
    // The host's leaf takes the most.
    let scratch = s.scratch(DeviceKind::Cpu.attention_scratch(op.heads, tokens), DType::F32);
    s.trial(what, move |backend| {
        let scratch = scratch.slice(0, backend.kind().attention_scratch(op.heads, tokens));
        backend.attention(&op);
        backend.attention_backward(&op, d_out, d_qkv, scratch);
    })
}

/// Query heads, and key and value heads, of what a library is asked for.
const LIBRARY_HEADS: [(usize, usize); 6] = [(2, 2), (4, 2), (2, 1), (8, 2), (14, 2), (16, 2)];

/// Both passes, number `number` of them, laid out as a step has them, and what a library is to be asked for before.
pub(crate) fn by_library(mut s: Scene, number: usize) -> (Trial, AttentionLibrary) {
    let (query, key_value) = s.draw.pick(&LIBRARY_HEADS[..s.draw.scaled(4, 6, 6)]);
    let heads = Heads { query, key_value, dim: [64, 128][number % 2] };
    let dim = heads.dim;
    let most = s.draw.scaled(150, 2000, TOKENS);
    let bounds = s.draw.sequences(most);
    let (tokens, count) = (bounds[bounds.len() - 1], bounds.len() - 1);
    let max_len = bounds.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(0);
    let window = (number / 2 % 2 == 1).then(|| s.draw.between(1, max_len + 5));
    // Queries and keys come from the rotation, values from the product.
    let (qk_width, width) = ((query + key_value) * dim, (query + 2 * key_value) * dim);
    let (qk, qkv) = (s.random(tokens * qk_width), s.random(tokens * width));
    let part =
        |of: Buffer, head: usize, stride: usize| Rows { buffer: of.slice(head * dim, of.len - head * dim), stride };
    let rows = query * dim;
    let op = Attention {
        heads,
        sequences: Sequences { cu_seqlens: s.ints(&bounds), count, max_len },
        causal: true,
        window,
        scale: 1.0 / (dim as f32).sqrt(),
        q: part(qk, 0, qk_width),
        k: part(qk, query, qk_width),
        v: part(qkv, query + key_value, width),
        out: Rows { buffer: s.output("out", tokens * rows, s.dtype), stride: rows },
        log_sum_exp: s.scratch(query * tokens, DType::F32),
    };
    let d_out = Rows { buffer: s.random(tokens * rows), stride: rows };
    let d_qkv = s.output("d_qkv", tokens * width, s.dtype);
    let of_host = DeviceKind::Cpu.attention_scratch(heads, tokens);
    let scratch = s.scratch(attention_library_scratch(heads, tokens, count).max(of_host), DType::F32);
    let asked = AttentionLibrary {
        heads,
        window,
        scale: op.scale,
        tokens,
        sequences: count,
        max_len,
        strides: [op.q, op.k, op.v, op.out].map(|rows| rows.stride),
    };
    let what = format!("sequences {bounds:?}, heads {query}/{key_value} of {dim}, window {window:?}");
    let trial = s.trial(what, move |backend| {
        // The host has no library.
        let host = backend.kind() == DeviceKind::Cpu;
        let scratch = if host { scratch.slice(0, of_host) } else { scratch };
        backend.attention(&op);
        backend.attention_backward(&op, d_out, d_qkv, scratch);
    });
    (trial, asked)
}

pub(super) fn attention_cached(mut s: Scene) -> Trial {
    let heads = s.draw.heads();
    let Heads { query, key_value, dim } = heads;
    let count = s.draw.between(1, 6);
    let most = s.draw.scaled(150, 900, 4096);
    let capacity = s.draw.between(1, most);
    let lengths: Vec<usize> = (0..count).map(|_| s.draw.between(1, capacity)).collect();
    let window = s.draw.coin().then(|| s.draw.between(1, capacity));
    let what = format!("lengths {lengths:?} of {capacity}, heads {query}/{key_value} of {dim}, window {window:?}");
    // What is beyond a sequence's length must not be read: NaN.
    let cache = |s: &mut Scene| {
        let width = key_value * dim;
        let mut values = s.draw.values(count * capacity * width);
        for (sequence, length) in values.chunks_mut(capacity * width).zip(&lengths) {
            sequence[length * width..].fill(f64::NAN);
        }
        s.put(&values, s.dtype)
    };
    let (k_cache, v_cache) = (cache(&mut s), cache(&mut s));
    let q = Rows { buffer: s.random(count * query * dim), stride: query * dim };
    let (lengths, out) = (s.ints(&lengths), s.output("out", count * query * dim, s.dtype));
    let scale = 1.0 / (dim as f32).sqrt();
    s.trial(what, move |backend| {
        backend.attention_cached(heads, window, scale, q, k_cache, v_cache, capacity, lengths, out);
    })
}
