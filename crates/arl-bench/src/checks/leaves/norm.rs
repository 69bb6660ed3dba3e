//! Norms, and the norm and rotation of heads.

use arl_engine::backend::{Angles, Buffer, DType, Heads, NormRope};

use super::super::draw::TOKENS;
use super::super::trial::{Scene, Trial};

const EPSILON: f32 = 1e-6;

fn shape(s: &mut Scene) -> (usize, usize) {
    let (rows, width) = (s.draw.scaled(100, 600, TOKENS), s.draw.scaled(600, 5200, 1024));
    (s.draw.extent(1, rows), s.draw.extent(32, width))
}

/// Factors as a norm would have kept them, near 1.
fn factors(s: &mut Scene, rows: usize) -> Buffer {
    let values: Vec<f64> = s.draw.values(rows).iter().map(|x| 1.0 + 0.1 * x).collect();
    s.put(&values, DType::F32)
}

pub(super) fn rms_norm(mut s: Scene) -> Trial {
    let (rows, width) = shape(&mut s);
    let (x, weight) = (s.anywhere(rows * width), s.anywhere(width));
    let (out, inverse_rms) = (s.output("out", rows * width, s.dtype), s.output("inverse_rms", rows, DType::F32));
    s.trial(format!("{rows} rows of {width}"), move |backend| {
        backend.rms_norm(x, weight.into(), EPSILON, out, inverse_rms)
    })
}

pub(super) fn add_rms_norm(mut s: Scene) -> Trial {
    let (rows, width) = shape(&mut s);
    let (x, delta, weight) = (s.anywhere(rows * width), s.anywhere(rows * width), s.anywhere(width));
    let way = s.draw.below(3);
    let sum = match way {
        0 => s.output("sum", rows * width, s.dtype),
        1 => s.updated("sum", x),
        _ => s.updated("sum", delta),
    };
    let (out, inverse_rms) = (s.output("out", rows * width, s.dtype), s.output("inverse_rms", rows, DType::F32));
    s.trial(format!("{rows} rows of {width}, sum {way}"), move |backend| {
        backend.add_rms_norm(x, delta, sum, weight.into(), EPSILON, out, inverse_rms);
    })
}

pub(super) fn rms_norm_recompute(mut s: Scene) -> Trial {
    let (rows, width) = shape(&mut s);
    let (x, weight, inverse_rms) = (s.anywhere(rows * width), s.anywhere(width), factors(&mut s, rows));
    let out = s.output("out", rows * width, s.dtype);
    s.trial(format!("{rows} rows of {width}"), move |backend| {
        backend.rms_norm_recompute(x, weight.into(), inverse_rms, out)
    })
}

pub(super) fn rms_norm_backward(mut s: Scene) -> Trial {
    let (rows, width) = shape(&mut s);
    let (d_out, x, weight) = (s.anywhere(rows * width), s.anywhere(rows * width), s.anywhere(width));
    let inverse_rms = factors(&mut s, rows);
    let (before_x, before_weight) = (s.anywhere(rows * width), s.random_of(width, DType::F32));
    let (d_x, d_weight) = (s.updated("d_x", before_x), s.updated("d_weight", before_weight));
    s.trial(format!("{rows} rows of {width}"), move |backend| {
        backend.rms_norm_backward(d_out, x, weight.into(), inverse_rms, d_x, d_weight);
    })
}

/// The operation, and columns of queries, keys and values.
fn rope(s: &mut Scene) -> (NormRope, usize) {
    let heads = s.draw.heads();
    let most = s.draw.scaled(70, 400, TOKENS);
    let tokens = s.draw.extent(1, most);
    let norm = s.draw.coin().then(|| (s.anywhere(heads.dim).into(), s.anywhere(heads.dim).into(), EPSILON));
    let angles: Vec<f64> = s.draw.values(tokens * heads.dim / 2);
    let (cos, sin): (Vec<f64>, Vec<f64>) = angles.iter().map(|angle| (angle.cos(), angle.sin())).unzip();
    let (cos, sin) = (s.put(&cos, DType::F32), s.put(&sin, DType::F32));
    let rows = s.ints(&(0..tokens).rev().collect::<Vec<_>>());
    let angles = Angles { cos, sin, rows, axes: None };
    (NormRope { heads, rotary: heads.dim, tokens, norm, angles }, (heads.query + 2 * heads.key_value) * heads.dim)
}

fn described(op: &NormRope) -> String {
    let Heads { query, key_value, dim } = op.heads;
    format!("{} tokens, heads {query}/{key_value} of {dim}, norm {}", op.tokens, op.norm.is_some())
}

pub(super) fn norm_rope(mut s: Scene) -> Trial {
    let (op, width) = rope(&mut s);
    let qkv = s.anywhere(op.tokens * width);
    let columns = (op.heads.query + op.heads.key_value) * op.heads.dim;
    let qk = s.output("qk", op.tokens * columns, s.dtype);
    s.trial(described(&op), move |backend| backend.norm_rope(&op, qkv, qk))
}

pub(super) fn norm_rope_backward(mut s: Scene) -> Trial {
    let (op, width) = rope(&mut s);
    let (qkv, before) = (s.anywhere(op.tokens * width), s.anywhere(op.tokens * width));
    let d_qkv = s.updated("d_qkv", before);
    let d_norm = op.norm.map(|_| {
        let (query, key) = (s.random_of(op.heads.dim, DType::F32), s.random_of(op.heads.dim, DType::F32));
        (s.updated("d_norm of queries", query), s.updated("d_norm of keys", key))
    });
    s.trial(described(&op), move |backend| backend.norm_rope_backward(&op, qkv, d_qkv, d_norm))
}
