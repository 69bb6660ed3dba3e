//! Rows by index: the embedding and its gradient, gathering and scattering.

use rayon::prelude::*;

use super::element::Element;
use super::memory::Shared;
use super::vector::{rows_a_task, vectorise};

/// The row number that an i32 of a buffer is. Ids are checked where rows enter the engine; a bad one stops here.
#[inline(always)]
pub(super) fn index(value: i32) -> usize {
    assert!(value >= 0, "a row number of {value}");
    value as usize
}

#[inline(always)]
fn convert_row<A: Element, B: Element>(source: &[A], target: &mut [B]) {
    for (target, source) in target.iter_mut().zip(source) {
        *target = B::store(source.load());
    }
}

/// `out[r] = x[rows[r] / divisor]`.
pub(super) fn gather<A: Element, B: Element>(x: &[A], rows: &[i32], divisor: usize, width: usize, out: &mut [B]) {
    assert_eq!(out.len(), rows.len() * width, "gather of rows of {width}");
    let block = rows_a_task(width);
    out.par_chunks_mut(block * width).zip(rows.par_chunks(block)).for_each(|(out, rows)| {
        vectorise!({
            for (out, row) in out.chunks_exact_mut(width).zip(rows) {
                convert_row(&x[index(*row) / divisor * width..][..width], out);
            }
        });
    });
}

/// `out[rows[r]] = x[r]` for distinct rows.
pub(super) fn scatter<A: Element, B: Element>(x: &[A], rows: &[i32], width: usize, out: &mut [B]) {
    assert_eq!(x.len(), rows.len() * width, "scatter of rows of {width}");
    let mut seen = vec![false; out.len() / width];
    for row in rows {
        assert!(!std::mem::replace(&mut seen[index(*row)], true), "scatter to row {row} twice");
    }
    let out = Shared::new(out);
    let block = rows_a_task(width);
    x.par_chunks(block * width).zip(rows.par_chunks(block)).for_each(|(x, rows)| {
        vectorise!({
            for (x, row) in x.chunks_exact(width).zip(rows) {
                // SAFETY: the rows are distinct, as was just asserted.
                convert_row(x, unsafe { out.part(index(*row) * width, width) });
            }
        });
    });
}

/// `table_gradient[ids[t]] += d_out[t]`, in the order of `t`: each task owns a range of ids and reads all of them.
pub(super) fn embedding_backward<T: Element>(ids: &[i32], d_out: &[T], width: usize, table_gradient: &mut [f32]) {
    const RANGES: usize = 64;
    assert_eq!(d_out.len(), ids.len() * width, "embedding_backward of rows of {width}");
    let vocab = table_gradient.len() / width;
    assert!(ids.iter().all(|id| index(*id) < vocab), "an id is outside the vocabulary of {vocab}");
    let range = vocab.div_ceil(RANGES);
    table_gradient.par_chunks_mut(range.max(1) * width).enumerate().for_each(|(task, gradient)| {
        let first = task * range;
        vectorise!({
            for (id, d_out) in ids.iter().zip(d_out.chunks_exact(width)) {
                let row = (*id as usize).wrapping_sub(first);
                if row < range {
                    for (gradient, d_out) in gradient[row * width..][..width].iter_mut().zip(d_out) {
                        *gradient += d_out.load();
                    }
                }
            }
        });
    });
}
