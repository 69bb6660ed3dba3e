//! The depthwise causal convolution with SiLU before a delta rule, forward, backward and one token at a time. Tasks take
//! columns, and all tokens of them: so a weight's gradient is one task's, in the order of tokens.

use std::ops::Range;

use rayon::prelude::*;

use super::element::Element;
use super::embedding::index;
use super::memory::Shared;
use super::vector::{sigmoid, vectorise};

/// Columns of a task, and tokens that it takes at a time in the backward pass.
const COLUMNS: usize = 64;
const TOKENS: usize = 128;

/// The shape of the leaf, without its buffers.
#[derive(Clone, Copy)]
pub(super) struct Shape<'a> {
    /// `C`.
    pub(super) channels: usize,
    pub(super) taps: usize,
    /// `[sequences + 1]`.
    pub(super) cu_seqlens: &'a [i32],
    /// Elements from one row of `x` to the next.
    pub(super) stride: usize,
}

impl Shape<'_> {
    fn sequences(&self) -> impl Iterator<Item = Range<usize>> {
        self.cu_seqlens.windows(2).map(|pair| index(pair[0])..index(pair[1]))
    }

    /// The columns of tasks.
    fn columns(&self) -> impl IndexedParallelIterator<Item = Range<usize>> + use<> {
        let channels = self.channels;
        (0..channels.div_ceil(COLUMNS)).into_par_iter().map(move |task| {
            let first = task * COLUMNS;
            first..channels.min(first + COLUMNS)
        })
    }

    /// A task's weights, `[taps, COLUMNS]`.
    fn weights(&self, weight: &[f32], columns: &Range<usize>) -> Vec<[f32; COLUMNS]> {
        let of_tap = |tap| {
            std::array::from_fn(|c| if c < columns.len() { weight[(columns.start + c) * self.taps + tap] } else { 0.0 })
        };
        (0..self.taps).map(of_tap).collect()
    }
}

/// The sum over taps for one token, whose taps meet the rows `window[first..first + taps]`.
#[inline(always)]
fn convolve(weights: &[[f32; COLUMNS]], window: &[[f32; COLUMNS]]) -> [f32; COLUMNS] {
    let mut sums = [0.0; COLUMNS];
    for (weight, x) in weights.iter().zip(window) {
        for ((sum, weight), x) in sums.iter_mut().zip(weight).zip(x) {
            *sum = weight.mul_add(*x, *sum);
        }
    }
    sums
}

#[inline(always)]
fn load<T: Element>(x: &[T], out: &mut [f32; COLUMNS]) {
    for (out, x) in out.iter_mut().zip(x) {
        *out = x.load();
    }
}

#[inline(always)]
fn store_silu<T: Element>(sums: &[f32; COLUMNS], out: &mut [T]) {
    for (out, sum) in out.iter_mut().zip(sums) {
        *out = T::store(sum * sigmoid(*sum));
    }
}

/// `out[t, c] = silu(sum over j of weight[c, j] x[t - (taps - 1) + j, c])`; `weight` is `[C, taps]`.
pub(super) fn conv<T: Element>(shape: &Shape<'_>, x: &[T], weight: &[f32], out: &mut [T]) {
    assert_eq!(weight.len(), shape.channels * shape.taps, "causal_conv of {} channels", shape.channels);
    let (before, out) = (shape.taps - 1, Shared::new(out));
    shape.columns().for_each(|columns| {
        let weights = shape.weights(weight, &columns);
        vectorise!({
            // The rows of the token and of those before it, in turns.
            let mut window = vec![[0.0_f32; COLUMNS]; before + TOKENS];
            for sequence in shape.sequences() {
                window[..before].fill([0.0; COLUMNS]);
                for first in sequence.clone().step_by(TOKENS) {
                    let count = TOKENS.min(sequence.end - first);
                    for (i, row) in window[before..before + count].iter_mut().enumerate() {
                        load(&x[(first + i) * shape.stride + columns.start..][..columns.len()], row);
                    }
                    for i in 0..count {
                        let sums = convolve(&weights, &window[i..i + shape.taps]);
                        // SAFETY: the columns belong to one task.
                        let row = unsafe { out.part((first + i) * shape.channels + columns.start, columns.len()) };
                        store_silu(&sums, row);
                    }
                    window.copy_within(count..count + before, 0);
                }
            }
        });
    });
}

/// `x` becomes its own gradient, from `d_out` `[T, C]`; `d_weight` `[C, taps]` is added to.
pub(super) fn conv_backward<T: Element>(
    shape: &Shape<'_>,
    x: &mut [T],
    weight: &[f32],
    d_out: &[T],
    d_weight: &mut [f32],
) {
    assert_eq!(weight.len(), shape.channels * shape.taps, "causal_conv_backward of {} channels", shape.channels);
    let (taps, before, x) = (shape.taps, shape.taps - 1, Shared::new(x));
    d_weight.par_chunks_mut(COLUMNS * taps).zip(shape.columns()).for_each(|(d_weight, columns)| {
        let weights = shape.weights(weight, &columns);
        vectorise!({
            // Rows of x from `before` tokens before the first one on, and to `before` behind the last one; then the
            // gradients of the sums, from the first token on.
            let mut window = vec![[0.0_f32; COLUMNS]; TOKENS + 2 * before];
            let mut d_sums = vec![[0.0_f32; COLUMNS]; TOKENS + before];
            let mut total = vec![[0.0_f32; COLUMNS]; taps];
            for sequence in shape.sequences() {
                window[..before].fill([0.0; COLUMNS]);
                for first in sequence.clone().step_by(TOKENS) {
                    let count = TOKENS.min(sequence.end - first);
                    let seen = (count + before).min(sequence.end - first);
                    for i in 0..seen {
                        // SAFETY: the columns belong to one task.
                        let row = unsafe { x.part((first + i) * shape.stride + columns.start, columns.len()) };
                        load(row, &mut window[before + i]);
                    }
                    for i in 0..seen {
                        let sums = convolve(&weights, &window[i..i + taps]);
                        let d_out = &d_out[(first + i) * shape.channels + columns.start..][..columns.len()];
                        silu_backward(&sums, d_out, &mut d_sums[i]);
                    }
                    d_sums[seen..].fill([0.0; COLUMNS]);
                    let mut partial = vec![[0.0_f32; COLUMNS]; taps];
                    for i in 0..count {
                        let mut d_x = [0.0_f32; COLUMNS];
                        for (tap, weight) in weights.iter().enumerate() {
                            // The token that meets this one by that tap.
                            let d_sum = &d_sums[i + before - tap];
                            for ((d_x, weight), d_sum) in d_x.iter_mut().zip(weight).zip(d_sum) {
                                *d_x = weight.mul_add(*d_sum, *d_x);
                            }
                        }
                        for (tap, partial) in partial.iter_mut().enumerate() {
                            for ((partial, d_sum), x) in partial.iter_mut().zip(&d_sums[i]).zip(&window[i + tap]) {
                                *partial = d_sum.mul_add(*x, *partial);
                            }
                        }
                        // SAFETY: as above.
                        let row = unsafe { x.part((first + i) * shape.stride + columns.start, columns.len()) };
                        for (row, d_x) in row.iter_mut().zip(&d_x) {
                            *row = T::store(*d_x);
                        }
                    }
                    for (total, partial) in total.iter_mut().zip(&partial) {
                        for (total, partial) in total.iter_mut().zip(partial) {
                            *total += partial;
                        }
                    }
                    window.copy_within(count..count + before, 0);
                }
            }
            for (c, d_weight) in d_weight.chunks_exact_mut(taps).enumerate() {
                for (d_weight, total) in d_weight.iter_mut().zip(&total) {
                    *d_weight += total[c];
                }
            }
        });
    });
}

/// `d_sums = d_out silu'(sums)`.
#[inline(always)]
fn silu_backward<T: Element>(sums: &[f32; COLUMNS], d_out: &[T], d_sums: &mut [f32; COLUMNS]) {
    for ((d_sum, sum), d_out) in d_sums.iter_mut().zip(sums).zip(d_out) {
        let s = sigmoid(*sum);
        *d_sum = d_out.load() * s * (1.0 + sum * (1.0 - s));
    }
}

/// The last `taps - 1` rows of `x` of each sequence, zeros before its start: `inputs` is `[sequences, taps - 1, C]`.
pub(super) fn keep<T: Element>(shape: &Shape<'_>, x: &[T], inputs: &mut [T]) {
    let (before, channels) = (shape.taps - 1, shape.channels);
    assert_eq!(inputs.len(), (shape.cu_seqlens.len() - 1) * before * channels, "causal_conv_keep");
    for (i, inputs) in inputs.chunks_exact_mut(channels).enumerate() {
        let pair = &shape.cu_seqlens[i / before..];
        let (start, end) = (index(pair[0]), index(pair[1]));
        match (end + i % before).checked_sub(before).filter(|token| *token >= start) {
            Some(token) => inputs.copy_from_slice(&x[token * shape.stride..][..channels]),
            None => inputs.fill(T::store(0.0)),
        }
    }
}

/// One new token a sequence: `out` `[sequences, C]`; its row of `x` joins the kept `inputs` `[sequences, taps - 1, C]`.
pub(super) fn step<T: Element>(shape: &Shape<'_>, x: &[T], weight: &[f32], inputs: &mut [T], out: &mut [T]) {
    let (before, channels) = (shape.taps - 1, shape.channels);
    let sequences = out.len() / channels;
    assert_eq!(inputs.len(), sequences * before * channels, "causal_conv_step of {sequences} sequences");
    let (inputs, out) = (Shared::new(inputs), Shared::new(out));
    shape.columns().for_each(|columns| {
        let weights = shape.weights(weight, &columns);
        let mut window = vec![[0.0_f32; COLUMNS]; shape.taps];
        vectorise!({
            for sequence in 0..sequences {
                let place = |row: usize| (sequence * before + row) * channels + columns.start;
                for (row, kept) in window[..before].iter_mut().enumerate() {
                    // SAFETY: the columns belong to one task.
                    load(unsafe { inputs.part(place(row), columns.len()) }, kept);
                }
                let new = &x[sequence * shape.stride + columns.start..][..columns.len()];
                load(new, &mut window[before]);
                // SAFETY: as above.
                let row = unsafe { out.part(sequence * channels + columns.start, columns.len()) };
                store_silu(&convolve(&weights, &window), row);
                for (row, x) in window[1..].iter().enumerate() {
                    // SAFETY: as above.
                    let kept = unsafe { inputs.part(place(row), columns.len()) };
                    for (kept, x) in kept.iter_mut().zip(x) {
                        *kept = T::store(*x);
                    }
                }
            }
        });
    });
}
