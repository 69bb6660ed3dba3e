//! The norm of each value head with a gate, behind a delta rule, forward and backward.

use rayon::prelude::*;

use super::element::Element;
use super::norm::inverse_rms_of;
use super::vector::{rows_a_task, sigmoid, sum, vectorise};

/// `out = weight * x / rms(x) * silu(gate)` by heads of `weight.len()`; rows of `width` are `stride` apart in `gate`. The normed
/// value is rounded to the activations' type before it meets the weight, and the product before it meets the gate.
pub(super) fn gated_norm<T: Element>(
    x: &[T],
    (gate, stride): (&[T], usize),
    (weight, epsilon): (&[f32], f32),
    width: usize,
    out: &mut [T],
) {
    let dim = weight.len();
    assert_eq!((x.len(), width % dim), (out.len(), 0), "gated_norm of heads of {dim}");
    let rows = rows_a_task(width);
    out.par_chunks_mut(rows * width).zip(x.par_chunks(rows * width)).enumerate().for_each(|(task, (out, x))| {
        vectorise!({
            for (row, (out, x)) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)).enumerate() {
                let gate = &gate[(task * rows + row) * stride..][..width];
                let heads = out.chunks_exact_mut(dim).zip(x.chunks_exact(dim)).zip(gate.chunks_exact(dim));
                for ((out, x), gate) in heads {
                    let inverse_rms = inverse_rms_of(x, epsilon);
                    for (((out, x), gate), weight) in out.iter_mut().zip(x).zip(gate).zip(weight) {
                        let (normed, gate) = (T::round(x.load() * inverse_rms), gate.load());
                        *out = T::store(T::round(weight * normed) * (gate * sigmoid(gate)));
                    }
                }
            }
        });
    });
}

/// `d`, the gradient of the output, becomes that of `x`, and `gate` its own; `d_weight` is added to: within each task, then over
/// the tasks in their order.
pub(super) fn gated_norm_backward<T: Element>(
    x: &[T],
    (gate, stride): (&mut [T], usize),
    (weight, epsilon): (&[f32], f32),
    width: usize,
    d: &mut [T],
    d_weight: &mut [f32],
) {
    let dim = weight.len();
    assert_eq!((x.len(), width % dim), (d.len(), 0), "gated_norm_backward of heads of {dim}");
    let rows = 4 * rows_a_task(width);
    let mut partial = vec![0.0_f32; (d.len() / width).div_ceil(rows) * dim];
    d.par_chunks_mut(rows * width)
        .zip(x.par_chunks(rows * width))
        .zip(gate.par_chunks_mut(rows * stride))
        .zip(partial.par_chunks_mut(dim))
        .for_each(|(((d, x), gate), partial)| {
            vectorise!({
                let all = d.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(gate.chunks_mut(stride));
                for ((d, x), gate) in all {
                    let heads =
                        d.chunks_exact_mut(dim).zip(x.chunks_exact(dim)).zip(gate[..width].chunks_exact_mut(dim));
                    for ((d, x), gate) in heads {
                        backward_head(x, gate, weight, inverse_rms_of(x, epsilon), d, partial);
                    }
                }
            });
        });
    for partial in partial.chunks_exact(dim) {
        super::elementwise::add_row(d_weight, partial);
    }
}

/// One head. With `n = x / rms`, `s = sigmoid(gate)` and `u = gate s`: `d_gate = d weight n s (1 + gate (1 - s))`, `d_weight = d n u`,
/// and RMSNorm's backward pass with `d weight u`.
#[inline(always)]
fn backward_head<T: Element>(
    x: &[T],
    gate: &mut [T],
    weight: &[f32],
    inverse_rms: f32,
    d: &mut [T],
    d_weight: &mut [f32],
) {
    let dim = weight.len();
    let (x, gate, d, d_weight) = (&x[..dim], &mut gate[..dim], &mut d[..dim], &mut d_weight[..dim]);
    let product = sum(dim, |i| {
        let gate = gate[i].load();
        d[i].load() * weight[i] * (gate * sigmoid(gate)) * x[i].load()
    });
    let pull = product / dim as f32 * inverse_rms * inverse_rms * inverse_rms;
    for i in 0..dim {
        let (g, of_out, x) = (gate[i].load(), d[i].load(), x[i].load());
        let s = sigmoid(g);
        let (normed, silu) = (x * inverse_rms, g * s);
        d_weight[i] += of_out * normed * silu;
        gate[i] = T::store(of_out * weight[i] * normed * s * (1.0 + g * (1.0 - s)));
        d[i] = T::store(of_out * weight[i] * silu * inverse_rms - x * pull);
    }
}
