//! The leaves of vision towers: interpolation of learned positions, rows by their numbers; and the way to the norm and the
//! activation, which have files of their own.

use rayon::prelude::*;

use super::CpuBackend;
use super::element::{Element, with_element};
use super::embedding::index;
use super::gelu;
use super::layer_norm::{Affine, AffineGradients, layer_norm, layer_norm_backward};
use super::matmul::widened;
use super::memory::Shared;
use super::vector::{rows_a_task, vectorise};
use crate::backend::{Buffer, Gelu, LayerNorm, Vision};

/// Rows of a table that a patch's position is interpolated from.
const TAPS: usize = 4;

impl Vision for CpuBackend {
    fn layer_norm(&mut self, op: &LayerNorm) {
        let mut lease = self.memory.lease();
        assert_eq!(op.weight.len, op.width, "layer_norm of rows of {}", op.width);
        let (weight, bias) = (widened(&mut lease, op.weight), widened(&mut lease, op.bias));
        let affine = Affine { weight: &weight, bias: &bias, epsilon: op.epsilon };
        with_element!(op.x.dtype, T => {
            layer_norm(lease.read::<T>(op.x), affine, lease.write::<T>(op.out), lease.write(op.statistics));
        });
    }

    fn layer_norm_backward(&mut self, op: &LayerNorm, d_out: Buffer, d_x: Buffer, d_weight: Buffer, d_bias: Buffer) {
        let mut lease = self.memory.lease();
        assert_eq!(op.weight.len, op.width, "layer_norm_backward of rows of {}", op.width);
        let (weight, statistics) = (widened(&mut lease, op.weight), lease.read(op.statistics));
        let gradients = AffineGradients { weight: lease.write(d_weight), bias: lease.write(d_bias) };
        with_element!(op.x.dtype, T => {
            let (d_out, x, d_x) = (lease.read::<T>(d_out), lease.read::<T>(op.x), lease.write::<T>(d_x));
            layer_norm_backward(d_out, x, &weight, statistics, d_x, gradients);
        });
    }

    fn gelu(&mut self, kind: Gelu, x: Buffer, out: Buffer) {
        let mut lease = self.memory.lease();
        with_element!(x.dtype, T => gelu::gelu(kind, lease.read::<T>(x), lease.write::<T>(out)));
    }

    fn gelu_backward(&mut self, kind: Gelu, x: Buffer, d_x: Buffer) {
        let mut lease = self.memory.lease();
        with_element!(x.dtype, T => gelu::gelu_backward(kind, lease.read::<T>(x), lease.write::<T>(d_x)));
    }

    fn interpolate(&mut self, table: Buffer, taps: Buffer, weights: Buffer, width: usize, out: Buffer) {
        let mut lease = self.memory.lease();
        let (taps, weights) = (lease.read(taps), lease.read(weights));
        with_element!(table.dtype, A => with_element!(out.dtype, B => {
            interpolate(lease.read::<A>(table), (taps, weights), width, lease.write::<B>(out));
        }));
    }

    fn interpolate_backward(&mut self, d_out: Buffer, taps: Buffer, weights: Buffer, width: usize, d_table: Buffer) {
        let mut lease = self.memory.lease();
        let (taps, weights, d_table) = (lease.read(taps), lease.read(weights), lease.write(d_table));
        with_element!(d_out.dtype, T => {
            interpolate_backward(lease.read::<T>(d_out), (taps, weights), width, d_table);
        });
    }

    fn add_rows(&mut self, x: Buffer, rows: Buffer, width: usize, out: Buffer) {
        let mut lease = self.memory.lease();
        let rows = lease.read(rows);
        with_element!(x.dtype, T => add_rows(lease.read::<T>(x), rows, width, lease.write::<T>(out)));
    }

    fn zero_rows(&mut self, rows: Buffer, width: usize, x: Buffer) {
        let mut lease = self.memory.lease();
        let rows = lease.read(rows);
        with_element!(x.dtype, T => zero_rows(rows, width, lease.write::<T>(x)));
    }
}

/// `out[n] += sum over j of weights[n, j] table[taps[n, j]]`.
fn interpolate<A: Element, B: Element>(table: &[A], (taps, weights): (&[i32], &[f32]), width: usize, out: &mut [B]) {
    let ((taps, rest), (weights, _)) = (taps.as_chunks::<TAPS>(), weights.as_chunks::<TAPS>());
    assert!(rest.is_empty() && taps.len() == weights.len(), "four taps and weights a row");
    assert_eq!(out.len(), taps.len() * width, "interpolate of rows of {width}");
    let rows = rows_a_task(width);
    let inputs = taps.par_chunks(rows).zip(weights.par_chunks(rows));
    out.par_chunks_mut(rows * width).zip(inputs).for_each(|(out, (taps, weights))| {
        vectorise!({
            for ((out, taps), [w0, w1, w2, w3]) in out.chunks_exact_mut(width).zip(taps).zip(weights) {
                let out = &mut out[..width];
                let [t0, t1, t2, t3] = taps.map(|tap| &table[index(tap) * width..][..width]);
                for i in 0..width {
                    let sum = w0 * t0[i].load() + w1 * t1[i].load() + w2 * t2[i].load() + w3 * t3[i].load();
                    out[i] = B::store(out[i].load() + sum);
                }
            }
        });
    });
}

/// `d_table[taps[n, j]] += weights[n, j] d_out[n]`: taps are sorted by their rows, those of one row in the order of `(n, j)`, and
/// each task takes some rows.
fn interpolate_backward<T: Element>(d_out: &[T], (taps, weights): (&[i32], &[f32]), width: usize, d_table: &mut [f32]) {
    assert_eq!(taps.len(), weights.len(), "a weight for each tap");
    assert_eq!(d_out.len() * TAPS, taps.len() * width, "interpolate_backward of rows of {width}");
    let count = d_table.len() / width;
    assert!(taps.iter().all(|tap| index(*tap) < count), "a tap is outside the table of {count} rows");
    // Where each row's taps end, once they are placed: `ends[row]` begins as where they begin.
    let mut ends = vec![0_usize; count + 1];
    for tap in taps {
        ends[index(*tap) + 1] += 1;
    }
    for row in 0..count {
        ends[row + 1] += ends[row];
    }
    let mut order = vec![0_usize; taps.len()];
    for (place, tap) in taps.iter().enumerate() {
        let end = &mut ends[index(*tap)];
        order[*end] = place;
        *end += 1;
    }
    let (ends, order) = (&ends, &order);
    let rows = rows_a_task(4 * width);
    d_table.par_chunks_mut(rows * width).enumerate().for_each(|(task, d_table)| {
        vectorise!({
            for (row, d_table) in (task * rows..).zip(d_table.chunks_exact_mut(width)) {
                let start = if row == 0 { 0 } else { ends[row - 1] };
                for place in &order[start..ends[row]] {
                    let (weight, d_out) = (weights[*place], &d_out[place / TAPS * width..][..width]);
                    for (d_table, d_out) in d_table.iter_mut().zip(d_out) {
                        *d_table += weight * d_out.load();
                    }
                }
            }
        });
    });
}

/// Stops at a row that is named twice or is not there.
fn assert_distinct(rows: &[i32], count: usize, what: &str) {
    let mut seen = vec![false; count];
    for row in rows {
        assert!(!std::mem::replace(&mut seen[index(*row)], true), "{what} names row {row} twice");
    }
}

/// `out[rows[r]] += x[r]` for distinct rows.
fn add_rows<T: Element>(x: &[T], rows: &[i32], width: usize, out: &mut [T]) {
    assert_eq!(x.len(), rows.len() * width, "add_rows of rows of {width}");
    assert_distinct(rows, out.len() / width, "add_rows");
    let out = Shared::new(out);
    let block = rows_a_task(width);
    x.par_chunks(block * width).zip(rows.par_chunks(block)).for_each(|(x, rows)| {
        vectorise!({
            for (x, row) in x.chunks_exact(width).zip(rows) {
                // SAFETY: the rows are distinct, as was just asserted.
                super::elementwise::add_row(unsafe { out.part(index(*row) * width, width) }, x);
            }
        });
    });
}

/// `x[rows[r]] = 0` for distinct rows.
fn zero_rows<T: Element>(rows: &[i32], width: usize, x: &mut [T]) {
    assert_distinct(rows, x.len() / width, "zero_rows");
    let x = Shared::new(x);
    rows.par_chunks(rows_a_task(width)).for_each(|rows| {
        for row in rows {
            // SAFETY: the rows are distinct, as was just asserted.
            unsafe { x.part(index(*row) * width, width) }.fill(T::store(0.0));
        }
    });
}
