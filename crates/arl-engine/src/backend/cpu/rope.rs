//! Per-head RMSNorm of queries and keys (Qwen3), then rotary position embedding, forward and backward.

use rayon::prelude::*;

use super::element::Element;
use super::memory::Lease;
use super::norm::{Weight, backward_row, inverse_rms_of, scale_row};
use super::vector::{rows_a_task, vectorise};
use crate::backend::{Heads, NormRope};

/// The two norms.
pub(super) struct HeadNorm<'m> {
    /// `[dim]`, of queries.
    query: Weight<'m>,
    /// `[dim]`, of keys.
    key: Weight<'m>,
    /// Added to the mean of squares.
    epsilon: f32,
}

impl<'m> HeadNorm<'m> {
    /// Those of an operation, if it has any.
    pub(super) fn read(lease: &mut Lease<'m>, op: &NormRope) -> Option<Self> {
        let (query, key, epsilon) = op.norm?;
        let (query, key) = (Weight::read(lease, query), Weight::read(lease, key));
        let dim = op.heads.dim;
        assert_eq!((query.values.len(), key.values.len()), (dim, dim), "norms of heads of {dim}");
        Some(HeadNorm { query, key, epsilon })
    }

    fn weight(&self, heads: Heads, head: usize) -> &Weight<'m> {
        if head < heads.query { &self.query } else { &self.key }
    }
}

/// The angles' cosines and sines, as in [`crate::backend::Angles`].
#[derive(Clone, Copy)]
pub(super) struct Angles<'m> {
    /// `[rows, half]`.
    cos: &'m [f32],
    /// `[rows, half]`.
    sin: &'m [f32],
    /// `[T]`, or `[3, T]` with `axes`.
    rows: &'m [i32],
    /// `[half]`.
    axes: Option<&'m [i32]>,
    tokens: usize,
    /// Pairs of elements that are rotated.
    half: usize,
}

impl<'m> Angles<'m> {
    /// Those of an operation.
    pub(super) fn read(lease: &mut Lease<'m>, op: &NormRope) -> Self {
        assert!(op.rotary.is_multiple_of(2) && op.rotary <= op.heads.dim, "{} of {} rotated", op.rotary, op.heads.dim);
        let (angles, tokens, half) = (op.angles, op.tokens, op.rotary / 2);
        let axes = angles.axes.map(|axes| lease.read::<i32>(axes));
        let (cos, sin, rows) = (lease.read(angles.cos), lease.read(angles.sin), lease.read::<i32>(angles.rows));
        assert_eq!(rows.len(), if axes.is_some() { 3 * tokens } else { tokens }, "angles of {tokens} tokens");
        Angles { cos, sin, rows, axes, tokens, half }
    }

    /// Memory for [`Angles::of`].
    fn gathered(&self) -> Vec<f32> {
        vec![0.0; if self.axes.is_some() { 2 * self.half } else { 0 }]
    }

    /// Cosines and sines of one token; those of three rows are gathered.
    #[inline(always)]
    fn of<'a>(&'a self, token: usize, gathered: &'a mut [f32]) -> (&'a [f32], &'a [f32]) {
        let half = self.half;
        let Some(axes) = self.axes else {
            let first = self.rows[token] as usize * half;
            return (&self.cos[first..first + half], &self.sin[first..first + half]);
        };
        let (cos, sin) = gathered.split_at_mut(half);
        for (i, &axis) in axes.iter().enumerate() {
            let at = self.rows[axis as usize * self.tokens + token] as usize * half + i;
            (cos[i], sin[i]) = (self.cos[at], self.sin[at]);
        }
        (cos, sin)
    }
}

/// `qk[t, head] = rotate(norm(qkv[t, head]))` for the query and key heads.
pub(super) fn norm_rope<T: Element>(
    heads: Heads,
    norm: Option<&HeadNorm<'_>>,
    angles: Angles<'_>,
    qkv: &[T],
    qk: &mut [T],
) {
    let dim = heads.dim;
    let read = (heads.query + 2 * heads.key_value) * dim;
    let written = (heads.query + heads.key_value) * dim;
    assert_eq!(qkv.len() / read, qk.len() / written, "norm_rope of as many tokens in as out");
    let rows = rows_a_task(read);
    qk.par_chunks_mut(rows * written).enumerate().for_each(|(task, qk)| {
        vectorise!({
            let (mut normed, mut gathered) = (vec![T::store(0.0); dim], angles.gathered());
            for (row, qk) in qk.chunks_exact_mut(written).enumerate() {
                let token = task * rows + row;
                let qkv = &qkv[token * read..][..written];
                let (cos, sin) = angles.of(token, &mut gathered);
                for (head, (x, out)) in qkv.chunks_exact(dim).zip(qk.chunks_exact_mut(dim)).enumerate() {
                    match norm {
                        Some(norm) => {
                            scale_row(x, norm.weight(heads, head), inverse_rms_of(x, norm.epsilon), &mut normed);
                            rotate(&normed, cos, sin, out);
                        }
                        None => rotate(x, cos, sin, out),
                    }
                }
            }
        });
    });
}

/// Rotates the first two halves as long as the angles; the rest passes.
#[inline(always)]
fn rotate<T: Element>(x: &[T], cos: &[f32], sin: &[f32], out: &mut [T]) {
    let half = cos.len();
    let (low, high) = (&x[..half], &x[half..2 * half]);
    let (out, rest) = out.split_at_mut(2 * half);
    rest.copy_from_slice(&x[2 * half..]);
    let (out_low, out_high) = out.split_at_mut(half);
    let sin = &sin[..half];
    for i in 0..half {
        let (a, b) = (low[i].load(), high[i].load());
        out_low[i] = T::store(a * cos[i] - b * sin[i]);
        out_high[i] = T::store(b * cos[i] + a * sin[i]);
    }
}

/// The transpose of [`rotate`]: turns back by the same angles.
#[inline(always)]
fn rotate_back<T: Element>(d: &[T], cos: &[f32], sin: &[f32], out: &mut [f32]) {
    let half = cos.len();
    let (low, high) = (&d[..half], &d[half..2 * half]);
    let (out, rest) = out.split_at_mut(2 * half);
    rest.iter_mut().zip(&d[2 * half..]).for_each(|(rest, d)| *rest = d.load());
    let (out_low, out_high) = out.split_at_mut(half);
    let sin = &sin[..half];
    for i in 0..half {
        let (a, b) = (low[i].load(), high[i].load());
        out_low[i] = a * cos[i] + b * sin[i];
        out_high[i] = b * cos[i] - a * sin[i];
    }
}

/// In place on the query and key columns of `d_qkv`. The norms' gradients are summed within each task, then over the
/// tasks in their order.
pub(super) fn norm_rope_backward<T: Element>(
    heads: Heads,
    norm: Option<&HeadNorm<'_>>,
    angles: Angles<'_>,
    qkv: &[T],
    d_qkv: &mut [T],
    d_norm: Option<(&mut [f32], &mut [f32])>,
) {
    let dim = heads.dim;
    let width = (heads.query + 2 * heads.key_value) * dim;
    let rotated = (heads.query + heads.key_value) * dim;
    assert_eq!(qkv.len(), d_qkv.len(), "norm_rope_backward of as many tokens in as out");
    let rows = 4 * rows_a_task(width);
    let tasks = (d_qkv.len() / width).div_ceil(rows);
    // Of each task: the gradient of the queries' norm, then that of the keys'.
    let mut partial = vec![0.0_f32; tasks * 2 * dim];
    d_qkv.par_chunks_mut(rows * width).zip(partial.par_chunks_mut(2 * dim)).enumerate().for_each(
        |(task, (d_qkv, partial))| {
            vectorise!({
                let (d_query_norm, d_key_norm) = partial.split_at_mut(dim);
                let (mut turned, mut gathered) = (vec![0.0_f32; dim], angles.gathered());
                for (row, d_qkv) in d_qkv.chunks_exact_mut(width).enumerate() {
                    let token = task * rows + row;
                    let x = &qkv[token * width..][..rotated];
                    let (cos, sin) = angles.of(token, &mut gathered);
                    let by_head = x.chunks_exact(dim).zip(d_qkv[..rotated].chunks_exact_mut(dim));
                    for (head, (x, d)) in by_head.enumerate() {
                        rotate_back(d, cos, sin, &mut turned);
                        let Some(norm) = norm else {
                            for (d, turned) in d.iter_mut().zip(&turned) {
                                *d = T::store(*turned);
                            }
                            continue;
                        };
                        let weight = norm.weight(heads, head);
                        let d_weight = if head < heads.query { &mut *d_query_norm } else { &mut *d_key_norm };
                        let inverse_rms = inverse_rms_of(x, norm.epsilon);
                        backward_row(&turned, x, &weight.values, inverse_rms, d_weight, |i, value| {
                            d[i] = T::store(value)
                        });
                    }
                }
            });
        },
    );
    if let Some((d_query_norm, d_key_norm)) = d_norm {
        for partial in partial.chunks_exact(2 * dim) {
            super::elementwise::add_row(d_query_norm, &partial[..dim]);
            super::elementwise::add_row(d_key_norm, &partial[dim..]);
        }
    }
}
