//! RMSNorm by rows, forward and backward, alone and fused with the addition to the residual stream.

use rayon::prelude::*;

use super::element::Element;
use super::matmul::widened;
use super::memory::Lease;
use super::vector::{rows_a_task, sum, vectorise};
use crate::backend::NormWeight;

/// What a norm multiplies by.
pub(super) struct Weight<'m> {
    /// `[width]`, the offset included.
    pub(super) values: std::borrow::Cow<'m, [f32]>,
    /// The normed value is rounded to the activations' type before it meets the weight.
    rounded: bool,
}

impl<'m> Weight<'m> {
    pub(super) fn read(lease: &mut Lease<'m>, weight: NormWeight) -> Self {
        let mut values = widened(lease, weight.weight);
        let rounded = weight.offset == 0.0;
        if !rounded {
            values.to_mut().iter_mut().for_each(|value| *value += weight.offset);
        }
        Weight { values, rounded }
    }
}

/// `1 / sqrt(mean(x^2) + epsilon)`.
#[inline(always)]
pub(super) fn inverse_rms_of<T: Element>(x: &[T], epsilon: f32) -> f32 {
    let squares = sum(x.len(), |i| x[i].load() * x[i].load());
    1.0 / (squares / x.len() as f32 + epsilon).sqrt()
}

/// `out = weight * x * factor`.
#[inline(always)]
pub(super) fn scale_row<T: Element>(x: &[T], weight: &Weight<'_>, factor: f32, out: &mut [T]) {
    let rows = out.iter_mut().zip(x).zip(&*weight.values);
    if weight.rounded {
        for ((out, x), weight) in rows {
            *out = T::store(weight * T::round(x.load() * factor));
        }
    } else {
        for ((out, x), weight) in rows {
            *out = T::store(weight * (x.load() * factor));
        }
    }
}

/// `out = weight * x / rms(x)` by rows of `weight.len()`; `inverse_rms` has an element a row.
pub(super) fn rms_norm<T: Element>(x: &[T], weight: &Weight<'_>, epsilon: f32, out: &mut [T], inverse_rms: &mut [f32]) {
    let width = weight.values.len();
    assert_eq!((x.len(), out.len()), (inverse_rms.len() * width, x.len()), "rms_norm of rows of {width}");
    let rows = rows_a_task(width);
    out.par_chunks_mut(rows * width).zip(x.par_chunks(rows * width)).zip(inverse_rms.par_chunks_mut(rows)).for_each(
        |((out, x), inverse_rms)| {
            vectorise!({
                let rows = out.chunks_exact_mut(width).zip(x.chunks_exact(width));
                for ((out, x), inverse_rms) in rows.zip(inverse_rms) {
                    *inverse_rms = inverse_rms_of(x, epsilon);
                    scale_row(x, weight, *inverse_rms, out);
                }
            });
        },
    );
}

/// `sum = x + delta`, or `sum += delta` where `x` is `None`; then [`rms_norm`] of `sum`.
pub(super) fn add_rms_norm<T: Element>(
    x: Option<&[T]>,
    delta: &[T],
    sum: &mut [T],
    weight: &Weight<'_>,
    epsilon: f32,
    out: &mut [T],
    inverse_rms: &mut [f32],
) {
    let width = weight.values.len();
    let len = inverse_rms.len() * width;
    assert_eq!((delta.len(), sum.len(), out.len()), (len, len, len), "add_rms_norm of rows of {width}");
    assert!(x.is_none_or(|x| x.len() == len), "add_rms_norm of rows of {width}");
    let rows = rows_a_task(width);
    out.par_chunks_mut(rows * width)
        .zip(sum.par_chunks_mut(rows * width))
        .zip(delta.par_chunks(rows * width))
        .zip(inverse_rms.par_chunks_mut(rows))
        .enumerate()
        .for_each(|(task, (((out, sum), delta), inverse_rms))| {
            let x = x.map(|x| &x[task * rows * width..][..sum.len()]);
            vectorise!({
                for (row, inverse_rms) in inverse_rms.iter_mut().enumerate() {
                    let range = row * width..(row + 1) * width;
                    let (out, sum, delta) = (&mut out[range.clone()], &mut sum[range.clone()], &delta[range.clone()]);
                    match x {
                        Some(x) => add_to(&x[range], delta, sum),
                        None => super::elementwise::add_row(sum, delta),
                    }
                    *inverse_rms = inverse_rms_of(sum, epsilon);
                    scale_row(sum, weight, *inverse_rms, out);
                }
            });
        });
}

#[inline(always)]
fn add_to<T: Element>(x: &[T], delta: &[T], sum: &mut [T]) {
    for ((sum, x), delta) in sum.iter_mut().zip(x).zip(delta) {
        *sum = T::store(x.load() + delta.load());
    }
}

/// [`rms_norm`] from the kept factors; the same arithmetic, so the same bits.
pub(super) fn rms_norm_recompute<T: Element>(x: &[T], weight: &Weight<'_>, inverse_rms: &[f32], out: &mut [T]) {
    let width = weight.values.len();
    assert_eq!((x.len(), out.len()), (inverse_rms.len() * width, x.len()), "rms_norm_recompute of rows of {width}");
    let rows = rows_a_task(width);
    out.par_chunks_mut(rows * width).zip(x.par_chunks(rows * width)).zip(inverse_rms.par_chunks(rows)).for_each(
        |((out, x), inverse_rms)| {
            vectorise!({
                let rows = out.chunks_exact_mut(width).zip(x.chunks_exact(width));
                for ((out, x), inverse_rms) in rows.zip(inverse_rms) {
                    scale_row(x, weight, *inverse_rms, out);
                }
            });
        },
    );
}

/// With `g = weight * d_out` and `r` the kept factor: `d_x += r g - x r^3 mean(g x)`, `d_weight += sum of d_out x r`.
/// The weight's gradient is summed within each task, then over the tasks in their order.
pub(super) fn rms_norm_backward<T: Element>(
    d_out: &[T],
    x: &[T],
    weight: &[f32],
    inverse_rms: &[f32],
    d_x: &mut [T],
    d_weight: &mut [f32],
) {
    let width = weight.len();
    let len = inverse_rms.len() * width;
    assert_eq!((d_out.len(), x.len(), d_x.len()), (len, len, len), "rms_norm_backward of rows of {width}");
    assert_eq!(d_weight.len(), width, "rms_norm_backward of rows of {width}");
    // Four times as many rows as elsewhere: each task's partial sum is itself a row to write and read.
    let rows = 4 * rows_a_task(width);
    let mut partial = vec![0.0_f32; inverse_rms.len().div_ceil(rows) * width];
    d_x.par_chunks_mut(rows * width)
        .zip(d_out.par_chunks(rows * width))
        .zip(x.par_chunks(rows * width))
        .zip(inverse_rms.par_chunks(rows))
        .zip(partial.par_chunks_mut(width))
        .for_each(|((((d_x, d_out), x), inverse_rms), partial)| {
            vectorise!({
                let rows = d_x.chunks_exact_mut(width).zip(d_out.chunks_exact(width)).zip(x.chunks_exact(width));
                for (((d_x, d_out), x), inverse_rms) in rows.zip(inverse_rms) {
                    backward_row(d_out, x, weight, *inverse_rms, partial, |i, value| {
                        d_x[i] = T::store(d_x[i].load() + value);
                    });
                }
            });
        });
    for partial in partial.chunks_exact(width) {
        super::elementwise::add_row(d_weight, partial);
    }
}

/// One row of the backward pass; `write(i, value)` takes the gradient of `x[i]`, in the order of `i`.
#[inline(always)]
pub(super) fn backward_row<D: Element, T: Element>(
    d_out: &[D],
    x: &[T],
    weight: &[f32],
    inverse_rms: f32,
    d_weight: &mut [f32],
    mut write: impl FnMut(usize, f32),
) {
    let width = weight.len();
    let (d_out, x, d_weight) = (&d_out[..width], &x[..width], &mut d_weight[..width]);
    let product = sum(width, |i| weight[i] * d_out[i].load() * x[i].load());
    let pull = product / width as f32 * inverse_rms * inverse_rms * inverse_rms;
    for i in 0..width {
        let (d, x) = (d_out[i].load(), x[i].load());
        d_weight[i] += d * (x * inverse_rms);
        write(i, weight[i] * d * inverse_rms - x * pull);
    }
}
