//! Leaves without structure: zero, copy, add, scale, the gradient of a bias, and scalar products.

use rayon::prelude::*;

use super::element::Element;
use super::memory::Lease;
use super::vector::vectorise;
use crate::backend::{Dropout, Rows};

/// Elements that one task takes.
pub(crate) const BLOCK: usize = 16_384;

/// Sets bytes to zero.
pub(super) fn zero(target: &mut [u8]) {
    target.par_chunks_mut(4 * BLOCK).for_each(|target| target.fill(0));
}

/// Copies bytes.
pub(super) fn copy_bytes(source: &[u8], target: &mut [u8]) {
    assert_eq!(source.len(), target.len(), "copy between buffers of one length");
    target.par_chunks_mut(4 * BLOCK).zip(source.par_chunks(4 * BLOCK)).for_each(|(target, source)| {
        target.copy_from_slice(source);
    });
}

/// Copies the first `columns` elements of rows, of any type.
pub(super) fn copy_columns(lease: &mut Lease<'_>, source: Rows, target: Rows, rows: usize, columns: usize) {
    assert_eq!(source.buffer.dtype, target.buffer.dtype, "copy of columns of one type");
    let size = source.buffer.dtype.bytes();
    let targets = lease.write_bytes(target.buffer).par_chunks_mut(target.stride * size).take(rows);
    let sources = lease.read_bytes(source.buffer).par_chunks(source.stride * size);
    assert!(targets.len() == rows && sources.len() >= rows, "{rows} rows of {source:?} to {target:?}");
    let row = |(target, source): (&mut [u8], &[u8])| {
        target[..columns * size].copy_from_slice(&source[..columns * size]);
    };
    targets.zip(sources).with_min_len(64).for_each(row);
}

/// Copies and converts.
pub(super) fn convert<A: Element, B: Element>(source: &[A], target: &mut [B]) {
    assert_eq!(source.len(), target.len(), "copy between buffers of one length");
    target.par_chunks_mut(BLOCK).zip(source.par_chunks(BLOCK)).for_each(|(target, source)| {
        vectorise!({
            for (target, source) in target.iter_mut().zip(source) {
                *target = B::store(source.load());
            }
        });
    });
}

/// `x += delta`, one row.
#[inline(always)]
pub(super) fn add_row<T: Element>(x: &mut [T], delta: &[T]) {
    for (x, delta) in x.iter_mut().zip(delta) {
        *x = T::store(x.load() + delta.load());
    }
}

/// `x += delta`.
pub(super) fn add<T: Element>(x: &mut [T], delta: &[T]) {
    assert_eq!(x.len(), delta.len(), "add of buffers of one length");
    x.par_chunks_mut(BLOCK).zip(delta.par_chunks(BLOCK)).for_each(|(x, delta)| vectorise!(add_row(x, delta)));
}

/// `out = factor * x`, and 0 for what is dropped.
pub(super) fn scale<T: Element>(x: &[T], factor: f32, dropout: Option<Dropout>, out: &mut [T]) {
    assert_eq!(x.len(), out.len(), "scale of buffers of one length");
    out.par_chunks_mut(BLOCK).zip(x.par_chunks(BLOCK)).enumerate().for_each(|(task, (out, x))| match dropout {
        None => vectorise!({
            for (out, x) in out.iter_mut().zip(x) {
                *out = T::store(factor * x.load());
            }
        }),
        Some(dropout) => {
            let mut start = 0;
            while start < out.len() {
                let (place, len) = dropout.run(task * BLOCK + start);
                let end = start.saturating_add(len).min(out.len());
                vectorise!({
                    for (i, (out, x)) in out[start..end].iter_mut().zip(&x[start..end]).enumerate() {
                        let scaled = factor * x.load();
                        *out = T::store(if dropout.drops(place + i) { 0.0 } else { scaled });
                    }
                });
                start = end;
            }
        }
    });
}

/// `out[n] += sum over rows of x[r * stride + n]`.
pub(super) fn sum_rows<T: Element>(x: &[T], stride: usize, rows: usize, out: &mut [f32]) {
    const COLUMNS: usize = 256;
    out.par_chunks_mut(COLUMNS).enumerate().for_each(|(task, out)| {
        vectorise!({
            let mut total = [0.0_f32; COLUMNS];
            let total = &mut total[..out.len()];
            for row in 0..rows {
                let x = &x[row * stride + task * COLUMNS..][..out.len()];
                for (total, x) in total.iter_mut().zip(x) {
                    *total += x.load();
                }
            }
            add_row(out, total);
        });
    });
}

/// The scalar product, summed in f64 by blocks of a fixed size.
pub(super) fn dot(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len(), "dot of buffers of one length");
    let blocks: Vec<f64> =
        a.par_chunks(BLOCK).zip(b.par_chunks(BLOCK)).map(|(a, b)| vectorise!(dot_block(a, b))).collect();
    blocks.iter().sum()
}

/// The sums of squares of the blocks that [`dot`] sums.
pub(crate) fn squares(values: &[f32]) -> Vec<f64> {
    values.par_chunks(BLOCK).map(|block| vectorise!(dot_block(block, block))).collect()
}

#[inline(always)]
fn dot_block(a: &[f32], b: &[f32]) -> f64 {
    const LANES: usize = 16;
    let mut lanes = [0.0_f64; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest = a_chunks.remainder().iter().zip(b_chunks.remainder());
    let rest: f64 = rest.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
    for (a, b) in a_chunks.zip(b_chunks) {
        for lane in 0..LANES {
            lanes[lane] += f64::from(a[lane]) * f64::from(b[lane]);
        }
    }
    lanes.iter().sum::<f64>() + rest
}
