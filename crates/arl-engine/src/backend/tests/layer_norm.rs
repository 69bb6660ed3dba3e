//! LayerNorm.

use super::*;
use crate::backend::LayerNorm;

const EPSILON: f32 = 1e-6;

/// Mean and `1 / sqrt(variance + epsilon)` of a row.
fn statistics(x: &[f64]) -> (f64, f64) {
    let mean = x.iter().sum::<f64>() / x.len() as f64;
    let variance = x.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / x.len() as f64;
    (mean, 1.0 / (variance + f64::from(EPSILON)).sqrt())
}

fn reference(x: &[f64], weight: &[f64], bias: &[f64]) -> Vec<f64> {
    let row = |x: &[f64]| -> Vec<f64> {
        let (mean, factor) = statistics(x);
        (0..x.len()).map(|i| weight[i] * (x[i] - mean) * factor + bias[i]).collect()
    };
    x.chunks(weight.len()).flat_map(row).collect()
}

/// The gradients of x, of the weight and of the bias, for `d_out`.
fn gradients(x: &[f64], weight: &[f64], d_out: &[f64]) -> [Vec<f64>; 3] {
    let width = weight.len();
    let [mut d_x, mut d_weight, mut d_bias] = [Vec::new(), vec![0.0; width], vec![0.0; width]];
    for (x, d_out) in x.chunks(width).zip(d_out.chunks(width)) {
        let (mean, factor) = statistics(x);
        let n: Vec<f64> = x.iter().map(|x| (x - mean) * factor).collect();
        let g: Vec<f64> = weight.iter().zip(d_out).map(|(weight, d)| weight * d).collect();
        let (mean_g, mean_gn) = (g.iter().sum::<f64>() / width as f64, inner(&g, &n) / width as f64);
        d_x.extend((0..width).map(|i| factor * (g[i] - mean_g - n[i] * mean_gn)));
        for i in 0..width {
            d_weight[i] += d_out[i] * n[i];
            d_bias[i] += d_out[i];
        }
    }
    [d_x, d_weight, d_bias]
}

/// The operation on values that are given, with outputs of its own.
pub(super) fn op(f: &mut Fixture, x: Buffer, weight: Buffer, bias: Buffer) -> LayerNorm {
    let rows = x.len / weight.len;
    let (out, statistics) = (f.poisoned(x.len, x.dtype), f.poisoned(2 * rows, DType::F32));
    LayerNorm { x, weight, bias, width: weight.len, epsilon: EPSILON, out, statistics }
}

const SHAPES: [(usize, usize); 10] =
    [(0, 8), (1, 1), (1, 64), (3, 33), (17, 128), (70, 1030), (3, 1152), (2, 4608), (2, 8190), (2, 8192)];

#[test]
fn layer_norm_is_the_reference() {
    let mut random = Random(101);
    for dtype in TYPES {
        for (rows, width) in SHAPES {
            let mut f = Fixture::new();
            let [x, weight, bias] = [rows * width, width, width].map(|len| random.values(len, dtype));
            let expected = reference(&x, &weight, &bias);
            let kept: Vec<f64> = x.chunks(width).flat_map(|x| <[f64; 2]>::from(statistics(x))).collect();
            let [x, weight, bias] = [x, weight, bias].map(|values| f.put(&values, dtype));
            let op = op(&mut f, x, weight, bias);
            f.backend.layer_norm(&op);
            assert_close("out", &f.get(op.out), &expected, bound(dtype, 4.0).max(1e-6));
            assert_close("statistics", &f.get(op.statistics), &kept, 2e-6);
        }
    }
}

#[test]
fn a_great_mean_costs_the_variance_no_places() {
    let mut random = Random(102);
    let (rows, width) = (3, 1152);
    let x: Vec<f64> = random.values(rows * width, DType::F32).iter().map(|x| round(1000.0 + x, DType::F32)).collect();
    let (weight, bias) = (vec![1.0; width], vec![0.0; width]);
    let expected = reference(&x, &weight, &bias);
    let mut f = Fixture::new();
    let [x, weight, bias] = [x, weight, bias].map(|values| f.put(&values, DType::F32));
    let op = op(&mut f, x, weight, bias);
    f.backend.layer_norm(&op);
    // The mean itself is rounded: to 2^-14 at a size of 1000.
    assert_close("out", &f.get(op.out), &expected, 1e-4);
}

#[test]
fn the_backward_pass_of_layer_norm_is_the_derivative_and_is_added() {
    let mut random = Random(103);
    for dtype in TYPES {
        for (rows, width) in [(1, 2), (1, 64), (3, 33), (17, 40)] {
            let [x, d_out, before] = [(); 3].map(|()| random.values(rows * width, dtype));
            let [weight, bias] = [(); 2].map(|()| random.values(width, dtype));
            let loss = |x: &[f64], weight: &[f64], bias: &[f64]| inner(&reference(x, weight, bias), &d_out);
            let expected = [
                differences(&x, |x| loss(x, &weight, &bias)),
                differences(&weight, |weight| loss(&x, weight, &bias)),
                differences(&bias, |bias| loss(&x, &weight, bias)),
            ];
            for (formula, expected) in gradients(&x, &weight, &d_out).iter().zip(&expected) {
                let ones = vec![1.0; expected.len()];
                assert_close("the formula's", &sum(&ones, formula), &sum(&ones, expected), 1e-6);
            }
            assert_backward(dtype, &[x, d_out, before], &[weight, bias], 8.0, &mut random);
        }
    }
}

#[test]
fn the_backward_pass_of_layer_norm_goes_over_many_rows_and_wide_ones() {
    let mut random = Random(104);
    for dtype in TYPES {
        for (rows, width) in [(0, 64), (301, 64), (130, 264), (97, 1152), (9, 4608), (3, 8187), (5, 8192)] {
            let inputs = [(); 3].map(|()| random.values(rows * width, dtype));
            let affine = [(); 2].map(|()| random.values(width, dtype));
            assert_backward(dtype, &inputs, &affine, 8.0, &mut random);
        }
    }
}

/// Compares the leaf's gradients with those of the formula. `x`, `d_out`, and what `d_x` holds before; weight and bias.
fn assert_backward(
    dtype: DType,
    [x, d_out, before]: &[Vec<f64>; 3],
    [weight, bias]: &[Vec<f64>; 2],
    steps: f64,
    random: &mut Random,
) {
    let [d_x, d_weight, d_bias] = gradients(x, weight, d_out);
    let mut f = Fixture::new();
    let befores = [(); 2].map(|()| random.values(weight.len(), DType::F32));
    let [x, d_out, actual, weight, bias] = [x, d_out, before, weight, bias].map(|values| f.put(values, dtype));
    let [of_weight, of_bias] = [&befores[0], &befores[1]].map(|values| f.put(values, DType::F32));
    let op = op(&mut f, x, weight, bias);
    f.backend.layer_norm(&op);
    f.backend.layer_norm_backward(&op, d_out, actual, of_weight, of_bias);
    assert_close("d_x", &f.get(actual), &sum(before, &d_x), bound(dtype, steps).max(2e-6));
    assert_close("d_weight", &f.get(of_weight), &sum(&befores[0], &d_weight), 3e-6);
    assert_close("d_bias", &f.get(of_bias), &sum(&befores[1], &d_bias), 2e-6);
}

#[test]
fn rows_of_layer_norm_need_not_be_aligned() {
    let mut random = Random(105);
    for dtype in TYPES {
        let (rows, width) = (5, 64);
        let [x, d_out] = [(); 2].map(|()| random.values(rows * width, dtype));
        let [weight, bias] = [(); 2].map(|()| random.values(width, dtype));
        let expected = reference(&x, &weight, &bias);
        let [of_x, of_weight, of_bias] = gradients(&x, &weight, &d_out);
        let mut f = Fixture::new();
        let [x, d_out, weight, bias] = [x, d_out, weight, bias].map(|values| f.put_unaligned(&values, dtype));
        let op = op(&mut f, x, weight, bias);
        f.backend.layer_norm(&op);
        assert_close("out", &f.get(op.out), &expected, bound(dtype, 4.0).max(1e-6));
        let d_x = f.put_unaligned(&vec![0.0; rows * width], dtype);
        let [d_weight, d_bias] = [(); 2].map(|()| f.put(&vec![0.0; width], DType::F32));
        f.backend.layer_norm_backward(&op, d_out, d_x, d_weight, d_bias);
        let zeros = vec![0.0; width];
        assert_close("d_x", &f.get(d_x), &of_x, bound(dtype, 8.0).max(2e-6));
        assert_close("d_weight", &f.get(d_weight), &sum(&zeros, &of_weight), 3e-6);
        assert_close("d_bias", &f.get(d_bias), &of_bias, 2e-6);
    }
}
