//! Magnitudes of weights with an adapter (DoRA): norms of rows, columns scaled by them, and their gradient.

use rayon::prelude::*;

use super::element::{Element, with_element};
use super::memory::Lease;
use super::vector::{sum, vectorise};
use crate::backend::Magnitude;

/// Rows, or columns, that one task takes.
const ROWS: usize = 16;
const COLUMNS: usize = 64;

pub(super) fn magnitude(lease: &mut Lease<'_>, op: &Magnitude) {
    match *op {
        Magnitude::Norms { weight, a, b, factor, out } => with_element!(weight.dtype, T => {
            norms::<T>(lease.read(weight), lease.read(a), lease.read(b), factor, lease.write(out));
        }),
        Magnitude::Rescale { x, rows, magnitude, norms, bias } => with_element!(x.buffer.dtype, T => {
            let (magnitude, norms): (&[f32], &[f32]) = (lease.read(magnitude), lease.read(norms));
            let bias: Option<&[T]> = bias.map(|bias| lease.read(bias));
            rescale(lease.write_rows::<T>(x, rows, norms.len()), x.stride, magnitude, norms, bias);
        }),
        Magnitude::Gradient { d_out, x, rows, norms, out } => with_element!(x.buffer.dtype, T => {
            let norms: &[f32] = lease.read(norms);
            let d_out_rows = lease.read_rows::<T>(d_out, rows, norms.len());
            let x_rows = lease.read_rows::<T>(x, rows, norms.len());
            gradient((d_out_rows, d_out.stride), (x_rows, x.stride), rows, norms, lease.write(out));
        }),
    }
}

/// `out[o] = |weight[o] + factor b[o] a|`.
fn norms<T: Element>(weight: &[T], a: &[T], b: &[T], factor: f32, out: &mut [f32]) {
    let (width, rank) = (weight.len() / out.len(), b.len() / out.len());
    assert_eq!((a.len(), weight.len()), (rank * width, out.len() * width), "norms of rows of {width}");
    let tasks = out.par_chunks_mut(ROWS).zip(weight.par_chunks(ROWS * width)).zip(b.par_chunks(ROWS * rank));
    tasks.for_each(|((out, weight), b)| {
        let mut row = vec![0f32; width];
        for ((out, weight), b) in out.iter_mut().zip(weight.chunks_exact(width)).zip(b.chunks_exact(rank)) {
            vectorise!({
                row.fill(0.0);
                for (a, b) in a.chunks_exact(width).zip(b) {
                    let b = b.load();
                    for (row, a) in row.iter_mut().zip(a) {
                        *row += b * a.load();
                    }
                }
                for (row, weight) in row.iter_mut().zip(weight) {
                    *row = weight.load() + factor * *row;
                }
                *out = sum(width, |i| row[i] * row[i]).sqrt();
            });
        }
    });
}

/// `x = bias + magnitude / norm (x - bias)`, columns `0 .. norms.len()` of each row.
fn rescale<T: Element>(x: &mut [T], stride: usize, magnitude: &[f32], norms: &[f32], bias: Option<&[T]>) {
    let factors: Vec<f32> = magnitude.iter().zip(norms).map(|(magnitude, norm)| magnitude / norm).collect();
    x.par_chunks_mut(ROWS * stride).for_each(|x| {
        for x in x.chunks_mut(stride) {
            match bias {
                None => vectorise!({
                    for (x, factor) in x.iter_mut().zip(&factors) {
                        *x = T::store(x.load() * factor);
                    }
                }),
                Some(bias) => vectorise!({
                    for ((x, factor), bias) in x.iter_mut().zip(&factors).zip(bias) {
                        let bias = bias.load();
                        *x = T::store(bias + factor * (x.load() - bias));
                    }
                }),
            }
        }
    });
}

/// `out[o] += sum over rows of d_out[r, o] x[r, o] / norm[o]`.
fn gradient<T: Element>(d_out: (&[T], usize), x: (&[T], usize), rows: usize, norms: &[f32], out: &mut [f32]) {
    out.par_chunks_mut(COLUMNS).enumerate().for_each(|(task, out)| {
        let first = task * COLUMNS;
        vectorise!({
            let mut total = [0f32; COLUMNS];
            for row in 0..rows {
                let d_out = &d_out.0[row * d_out.1 + first..][..out.len()];
                let x = &x.0[row * x.1 + first..][..out.len()];
                for ((total, d_out), x) in total.iter_mut().zip(d_out).zip(x) {
                    *total += d_out.load() * x.load();
                }
            }
            for ((out, total), norm) in out.iter_mut().zip(total).zip(&norms[first..]) {
                *out += total / norm;
            }
        });
    });
}
