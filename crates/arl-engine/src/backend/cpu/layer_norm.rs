//! LayerNorm by rows, forward and backward.

use rayon::prelude::*;

use super::element::Element;
use super::vector::{rows_a_task, sum, vectorise};

/// A weight and a bias of `width` elements, and what is added to the variance.
#[derive(Clone, Copy)]
pub(super) struct Affine<'m> {
    pub(super) weight: &'m [f32],
    pub(super) bias: &'m [f32],
    pub(super) epsilon: f32,
}

/// The mean of a row, and `1 / sqrt(variance + epsilon)`. The variance is of the differences from the mean: a mean that is much
/// greater than they are costs no places.
#[inline(always)]
fn statistics_of<T: Element>(x: &[T], epsilon: f32) -> [f32; 2] {
    let width = x.len() as f32;
    let mean = sum(x.len(), |i| x[i].load()) / width;
    let squares = sum(x.len(), |i| {
        let difference = x[i].load() - mean;
        difference * difference
    });
    [mean, 1.0 / (squares / width + epsilon).sqrt()]
}

/// `out = weight (x - mean) factor + bias` by rows of `weight.len()`; `statistics` has two numbers a row.
pub(super) fn layer_norm<T: Element>(x: &[T], affine: Affine<'_>, out: &mut [T], statistics: &mut [f32]) {
    let width = affine.weight.len();
    let (statistics, rest) = statistics.as_chunks_mut::<2>();
    assert!(rest.is_empty(), "layer_norm has two statistics a row");
    assert_eq!((x.len(), out.len()), (statistics.len() * width, x.len()), "layer_norm of rows of {width}");
    assert_eq!(affine.bias.len(), width, "layer_norm of rows of {width}");
    let rows = rows_a_task(width);
    let outputs = out.par_chunks_mut(rows * width).zip(statistics.par_chunks_mut(rows));
    outputs.zip(x.par_chunks(rows * width)).for_each(|((out, statistics), x)| {
        vectorise!({
            let rows = out.chunks_exact_mut(width).zip(x.chunks_exact(width));
            for ((out, x), statistics) in rows.zip(statistics) {
                *statistics = statistics_of(x, affine.epsilon);
                let [mean, factor] = *statistics;
                for (((out, x), weight), bias) in out.iter_mut().zip(x).zip(affine.weight).zip(affine.bias) {
                    *out = T::store((x.load() - mean) * factor * weight + bias);
                }
            }
        });
    });
}

/// The gradients of a weight and a bias, added to.
pub(super) struct AffineGradients<'m> {
    pub(super) weight: &'m mut [f32],
    pub(super) bias: &'m mut [f32],
}

/// With `g = weight * d_out`, `n = (x - mean) factor`: `d_x += factor (g - mean(g) - n mean(g n))`, `d_weight += sum of d_out n`,
/// `d_bias += sum of d_out`. These two are summed within each task, then over the tasks in their order.
pub(super) fn layer_norm_backward<T: Element>(
    d_out: &[T],
    x: &[T],
    weight: &[f32],
    statistics: &[f32],
    d_x: &mut [T],
    gradients: AffineGradients<'_>,
) {
    let width = weight.len();
    let (statistics, rest) = statistics.as_chunks::<2>();
    assert!(rest.is_empty(), "layer_norm_backward has two statistics a row");
    let len = statistics.len() * width;
    assert_eq!((d_out.len(), x.len(), d_x.len()), (len, len, len), "layer_norm_backward of rows of {width}");
    let (d_weight, d_bias) = (gradients.weight, gradients.bias);
    assert_eq!((d_weight.len(), d_bias.len()), (width, width), "layer_norm_backward of rows of {width}");
    // As many rows as in RMSNorm's: each task's partial sums are rows to write and read.
    let rows = 4 * rows_a_task(width);
    let mut partial = vec![0.0_f32; statistics.len().div_ceil(rows) * 2 * width];
    d_x.par_chunks_mut(rows * width)
        .zip(d_out.par_chunks(rows * width))
        .zip(x.par_chunks(rows * width))
        .zip(statistics.par_chunks(rows))
        .zip(partial.par_chunks_mut(2 * width))
        .for_each(|((((d_x, d_out), x), statistics), partial)| {
            vectorise!({
                let (d_weight, d_bias) = partial.split_at_mut(width);
                let rows = d_x.chunks_exact_mut(width).zip(d_out.chunks_exact(width)).zip(x.chunks_exact(width));
                for (((d_x, d_out), x), statistics) in rows.zip(statistics) {
                    backward_row(d_out, x, weight, *statistics, d_x, (d_weight, d_bias));
                }
            });
        });
    for partial in partial.chunks_exact(2 * width) {
        let (of_weight, of_bias) = partial.split_at(width);
        super::elementwise::add_row(d_weight, of_weight);
        super::elementwise::add_row(d_bias, of_bias);
    }
}

/// A function of its own, so that the compiler knows the rows to be apart.
#[inline(always)]
fn backward_row<T: Element>(
    d_out: &[T],
    x: &[T],
    weight: &[f32],
    [mean, factor]: [f32; 2],
    d_x: &mut [T],
    (d_weight, d_bias): (&mut [f32], &mut [f32]),
) {
    let width = weight.len();
    let (d_out, x, d_x) = (&d_out[..width], &x[..width], &mut d_x[..width]);
    let (d_weight, d_bias) = (&mut d_weight[..width], &mut d_bias[..width]);
    let mean_g = sum(width, |i| weight[i] * d_out[i].load()) / width as f32;
    let mean_gn = sum(width, |i| weight[i] * d_out[i].load() * ((x[i].load() - mean) * factor)) / width as f32;
    for i in 0..width {
        let (d, n) = (d_out[i].load(), (x[i].load() - mean) * factor);
        d_weight[i] += d * n;
        d_bias[i] += d;
        d_x[i] = T::store(d_x[i].load() + factor * (weight[i] * d - mean_g - n * mean_gn));
    }
}
