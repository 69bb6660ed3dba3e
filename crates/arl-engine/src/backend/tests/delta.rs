//! What is around a delta rule, in every type, by value against plain references in f64: the convolution before it, and one token
//! at a time against whole sequences; the gated norm behind it.

use super::*;
use crate::backend::{CausalConv, GatedNorm, Sequences};

const BOUNDS: [usize; 5] = [0, 1, 3, 140, 410];

pub(in super::super) fn sequences(f: &mut Fixture, bounds: &[usize]) -> Sequences {
    let max_len = bounds.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(0);
    Sequences { cu_seqlens: f.ints(bounds), count: bounds.len() - 1, max_len }
}

/// Asserts closeness within so many roundings of a type.
#[track_caller]
pub(in super::super) fn near(what: &str, dtype: DType, steps: f64, actual: &[f64], expected: &[f64]) {
    let small = least(dtype);
    let actual: Vec<f64> =
        actual.iter().zip(expected).map(|(a, e)| if (a - e).abs() <= small { *e } else { *a }).collect();
    assert_close(&format!("{what} in {dtype:?}"), &actual, expected, bound(dtype, steps));
}

pub(in super::super) fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// The convolution before SiLU, `[T, C]`.
fn convolved(x: &[f64], weight: &[f64], channels: usize, taps: usize, bounds: &[usize]) -> Vec<f64> {
    let mut sums = vec![0.0; x.len()];
    for pair in bounds.windows(2) {
        for t in pair[0]..pair[1] {
            for c in 0..channels {
                for j in 0..taps {
                    if let Some(from) = (t + j + 1).checked_sub(taps).filter(|from| *from >= pair[0]) {
                        sums[t * channels + c] += weight[c * taps + j] * x[from * channels + c];
                    }
                }
            }
        }
    }
    sums
}

/// A matrix within wider rows, whose other columns hold something else.
pub(in super::super) fn within(
    f: &mut Fixture,
    random: &mut Random,
    values: &[f64],
    width: usize,
    dtype: DType,
) -> (Buffer, usize) {
    let stride = width + 5;
    let mut padded = random.values(values.len() / width * stride, dtype);
    for (row, values) in padded.chunks_exact_mut(stride).zip(values.chunks_exact(width)) {
        row[3..3 + width].copy_from_slice(values);
    }
    let buffer = f.put(&padded, dtype);
    (buffer.slice(3, buffer.len - 3), stride)
}

pub(in super::super) fn columns(values: &[f64], width: usize, stride: usize) -> Vec<f64> {
    values.chunks(stride).flat_map(|row| row[..width].to_vec()).collect()
}

#[test]
fn the_convolution_is_its_definition() {
    for dtype in TYPES {
        for (channels, taps) in [(70, 4), (5, 1), (64, 3)] {
            let (mut random, mut f) = (Random(50), Fixture::new());
            let tokens = BOUNDS[BOUNDS.len() - 1];
            let (x, weight) = (random.values(tokens * channels, dtype), random.values(channels * taps, dtype));
            let d_out = random.values(x.len(), dtype);
            let sums = convolved(&x, &weight, channels, taps, &BOUNDS);
            let expected: Vec<f64> = sums.iter().map(|sum| sum * sigmoid(*sum)).collect();
            let (place, stride) = within(&mut f, &mut random, &x, channels, dtype);
            let sequences = sequences(&mut f, &BOUNDS);
            let weight_place = f.put(&weight, dtype);
            let op = CausalConv { sequences, tokens, channels, taps, x: rows(place, stride), weight: weight_place };
            let out = f.poisoned(x.len(), dtype);
            f.backend.causal_conv(&op, out);
            // The sigmoid's own error is some last places of f32.
            let steps = if dtype == DType::F32 { 8.0 } else { 1.0 };
            near("out", dtype, steps, &f.get(out), &expected);

            let slope = |sum: f64| sigmoid(sum) * (1.0 + sum * (1.0 - sigmoid(sum)));
            let d_sums: Vec<f64> = sums.iter().zip(&d_out).map(|(sum, d)| d * slope(*sum)).collect();
            let (mut d_x, mut d_weight) = (vec![0.0; x.len()], vec![0.0; weight.len()]);
            for pair in BOUNDS.windows(2) {
                for (t, c, j) in
                    (pair[0]..pair[1]).flat_map(|t| (0..channels * taps).map(move |i| (t, i / taps, i % taps)))
                {
                    if let Some(from) = (t + j + 1).checked_sub(taps).filter(|from| *from >= pair[0]) {
                        d_x[from * channels + c] += weight[c * taps + j] * d_sums[t * channels + c];
                        d_weight[c * taps + j] += x[from * channels + c] * d_sums[t * channels + c];
                    }
                }
            }
            let d_out = f.put(&d_out, dtype);
            let gradient = f.put(&vec![1.0; weight.len()], DType::F32);
            f.backend.causal_conv_backward(&op, d_out, gradient);
            near(
                "d_x",
                dtype,
                if dtype == DType::F32 { 24.0 } else { 3.0 },
                &columns(&f.get(place), channels, stride),
                &d_x,
            );
            let d_weight: Vec<f64> = d_weight.iter().map(|d| d + 1.0).collect();
            assert_close("d_weight", &f.get(gradient), &d_weight, 2e-6);
        }
    }
}

#[test]
fn one_token_at_a_time_the_convolution_has_its_bits() {
    let (channels, taps) = (70, 4);
    for dtype in TYPES {
        let (mut random, mut f) = (Random(51), Fixture::new());
        let bounds = [0, 1, 3, 9];
        let (x, weight) = (random.values(9 * channels, dtype), random.values(channels * taps, dtype));
        let weight = f.put(&weight, dtype);
        let all = f.put(&x, dtype);
        let of = |f: &mut Fixture, bounds: &[usize], x: Buffer| CausalConv {
            sequences: sequences(f, bounds),
            tokens: x.len / channels,
            channels,
            taps,
            x: rows(x, channels),
            weight,
        };
        // Sequences of 1, 2 and 6 tokens, and a new token behind each.
        let kept = f.poisoned(3 * (taps - 1) * channels, dtype);
        let op = of(&mut f, &bounds, all);
        f.backend.causal_conv_keep(&op, kept);
        let new = random.values(2 * 3 * channels, dtype);
        let mut steps = Vec::new();
        for new in new.chunks_exact(3 * channels) {
            let (new, out) = (f.put(new, dtype), f.poisoned(3 * channels, dtype));
            let op = of(&mut f, &[0, 1, 2, 3], new);
            f.backend.causal_conv_step(&op, kept, out);
            steps.push(f.bytes(out));
        }
        let mut longer = Vec::new();
        for (s, pair) in bounds.windows(2).enumerate() {
            longer.extend_from_slice(&x[pair[0] * channels..pair[1] * channels]);
            for step in 0..2 {
                longer.extend_from_slice(&new[(step * 3 + s) * channels..][..channels]);
            }
        }
        let (longer, out) = (f.put(&longer, dtype), f.poisoned(15 * channels, dtype));
        let op = of(&mut f, &[0, 3, 7, 15], longer);
        f.backend.causal_conv(&op, out);
        for (s, end) in [3, 7, 15].into_iter().enumerate() {
            for (step, bytes) in steps.iter().enumerate() {
                let expected = f.bytes(out.slice((end - 2 + step) * channels, channels));
                let size = channels * dtype.bytes();
                assert!(bytes[s * size..(s + 1) * size] == expected, "{dtype:?} {s} {step}");
            }
        }
    }
}

#[test]
fn the_gated_norm_is_its_definition() {
    let (tokens, heads, dim) = (300, 3, 20);
    for dtype in TYPES {
        let (mut random, mut f) = (Random(54), Fixture::new());
        let mut values = |len: usize| random.values(len, dtype);
        let (x, gate, weight) = (values(tokens * heads * dim), values(tokens * heads * dim), values(dim));
        let d_out = values(x.len());
        let (mut out, mut d_x, mut d_gate, mut d_weight) = (Vec::new(), Vec::new(), Vec::new(), vec![1.0; dim]);
        for ((x, gate), d) in x.chunks(dim).zip(gate.chunks(dim)).zip(d_out.chunks(dim)) {
            let factor = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / dim as f64 + 1e-6).sqrt();
            let silu = |i: usize| gate[i] * sigmoid(gate[i]);
            let along: f64 = (0..dim).map(|i| d[i] * weight[i] * silu(i) * x[i]).sum::<f64>() / dim as f64;
            for i in 0..dim {
                let (s, normed) = (sigmoid(gate[i]), x[i] * factor);
                out.push(weight[i] * normed * silu(i));
                d_weight[i] += d[i] * normed * silu(i);
                d_gate.push(d[i] * weight[i] * normed * s * (1.0 + gate[i] * (1.0 - s)));
                d_x.push(factor * (d[i] * weight[i] * silu(i) - x[i] * factor * factor * along));
            }
        }
        let (place, stride) = within(&mut f, &mut random, &gate, heads * dim, dtype);
        let op = GatedNorm {
            tokens,
            heads,
            x: f.put(&x, dtype),
            gate: rows(place, stride),
            weight: f.put(&weight, dtype),
            epsilon: 1e-6,
        };
        let actual = f.poisoned(x.len(), dtype);
        f.backend.gated_norm(&op, actual);
        near("out", dtype, 4.0, &f.get(actual), &out);
        let (d, gradient) = (f.put(&d_out, dtype), f.put(&vec![1.0; dim], DType::F32));
        f.backend.gated_norm_backward(&op, d, gradient);
        near("d_x", dtype, 8.0, &f.get(d), &d_x);
        near("d_gate", dtype, 8.0, &columns(&f.get(place), heads * dim, stride), &d_gate);
        assert_close("d_weight", &f.get(gradient), &d_weight, 3e-6);
    }
}
