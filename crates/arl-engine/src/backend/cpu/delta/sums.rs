//! The part of a chunk's backward pass that is no product: gradients of decays and strengths, as sums over rows and columns, and
//! what one value head adds to the gradients of queries and keys. Notation as in [`super::backward`].

use super::Shape;
use super::backward::{Chunk, Place};
use super::decay::Gates;
use super::head::{Head, Keys};
use crate::backend::DeltaHeads;
use crate::backend::cpu::vector::dot;

/// The sums over rows and columns: `chunk.d_sums` and `d_beta`; and what the head adds to the gradients of queries and keys.
#[inline(always)]
pub(super) fn sums(
    shape: &Shape<'_>,
    (keys, head, chunk): (&Keys<'_>, &Head<'_>, &mut Chunk<'_>),
    gates: Gates<'_>,
    place: &Place<'_>,
    d_beta: &mut [f32],
) {
    let DeltaHeads { key_dim, value_dim: width, .. } = shape.heads;
    let (n, stride) = (place.tokens.len(), shape.chunk);
    chunk.columns.fill(0.0);
    let mut to_the_end = 0.0;
    for (i, d_beta) in d_beta.iter_mut().enumerate() {
        let (beta, e, r) = (gates.beta[i], head.e[i], head.d[(n - 1) * stride + i]);
        let (row, row_of_keys) = (i * width..(i + 1) * width, i * key_dim..(i + 1) * key_dim);
        let (x, ks) = (&chunk.x[row.clone()], &head.ks[row.clone()]);
        let (of_v, of_ks) = (dot(x, &head.v[row]), dot(x, ks));
        let mut d_sum = -beta * e * of_ks;
        let mut d_write = of_v - e * of_ks;
        if !place.first {
            let (z, y) = (&chunk.z[row_of_keys.clone()], &chunk.y[row_of_keys.clone()]);
            d_sum += e * dot(&keys.q[row_of_keys.clone()], z);
            add(&mut chunk.d_q[row_of_keys.clone()], z, e);
            add(&mut chunk.d_k[row_of_keys.clone()], y, -beta * e);
        }
        if !place.last {
            let w = &chunk.w[row_of_keys.clone()];
            let along = r * dot(&keys.k[row_of_keys.clone()], w);
            d_sum -= along;
            to_the_end += along;
            add(&mut chunk.d_k[row_of_keys], w, r);
        }
        // Below the diagonal, then on it, where the decay is 1 and counts for nothing.
        let below = i * stride..i * stride + i;
        let square = Row {
            d: &head.d[below.clone()],
            m: &head.m[below.clone()],
            p: &head.p[below.clone()],
            kk: &keys.kk[below.clone()],
            d_p: &chunk.d_p[below.clone()],
            d_m: &chunk.d_m[below.clone()],
        };
        let of_keys = &mut chunk.of_keys[below.clone()];
        let (of_decay, of_beta) = square.add(beta, &mut chunk.of_queries[below], of_keys, &mut chunk.columns[..i]);
        chunk.of_queries[i * stride + i] += chunk.d_p[i * stride + i];
        d_sum += of_decay;
        d_write += of_beta;
        chunk.d_sums[i] = d_sum;
        *d_beta = d_write;
    }
    for (d_sum, column) in chunk.d_sums[..n].iter_mut().zip(&*chunk.columns) {
        *d_sum -= column;
    }
    chunk.d_sums[n - 1] += to_the_end;
    chunk.d_sums[n..].fill(0.0);
}

/// A row below the diagonal.
struct Row<'a> {
    d: &'a [f32],
    m: &'a [f32],
    p: &'a [f32],
    kk: &'a [f32],
    d_p: &'a [f32],
    /// Minus the gradient of `m`.
    d_m: &'a [f32],
}

impl Row<'_> {
    /// Adds to the gradients' matrices and to the sums of columns; the row's sums: those of the decay, and of the write's strength.
    #[inline(always)]
    fn add(&self, beta: f32, of_queries: &mut [f32], of_keys: &mut [f32], columns: &mut [f32]) -> (f32, f32) {
        let (mut of_decay, mut of_beta) = (0.0, 0.0);
        let len = columns.len();
        let (of_queries, of_keys) = (&mut of_queries[..len], &mut of_keys[..len]);
        for j in 0..len {
            let decayed = -self.d_m[j] * self.d[j];
            of_queries[j] += self.d_p[j] * self.d[j];
            of_keys[j] += beta * decayed;
            let product = self.d_p[j] * self.p[j] - self.d_m[j] * self.m[j];
            columns[j] += product;
            of_decay += product;
            of_beta += decayed * self.kk[j];
        }
        (of_decay, of_beta)
    }
}

/// `to += factor * x`.
#[inline(always)]
fn add(to: &mut [f32], x: &[f32], factor: f32) {
    for (to, x) in to.iter_mut().zip(x) {
        *to += factor * x;
    }
}
