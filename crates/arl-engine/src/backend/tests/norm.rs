//! RMSNorm.

use super::*;
use crate::backend::NormWeight;

pub(super) fn reference(x: &[f64], weight: &[f64], epsilon: f64) -> Vec<f64> {
    let width = weight.len();
    x.chunks(width)
        .flat_map(|x| {
            let factor = 1.0 / (inner(x, x) / width as f64 + epsilon).sqrt();
            x.iter().zip(weight).map(move |(x, weight)| weight * x * factor).collect::<Vec<_>>()
        })
        .collect()
}

/// The gradients of x and of the weight, for `d_out`.
pub(super) fn gradients(x: &[f64], weight: &[f64], d_out: &[f64], epsilon: f64) -> (Vec<f64>, Vec<f64>) {
    let width = weight.len();
    let (mut d_x, mut d_weight) = (Vec::new(), vec![0.0; width]);
    for (x, d_out) in x.chunks(width).zip(d_out.chunks(width)) {
        let factor = 1.0 / (inner(x, x) / width as f64 + epsilon).sqrt();
        let g: Vec<f64> = weight.iter().zip(d_out).map(|(weight, d)| weight * d).collect();
        let pull = inner(&g, x) / width as f64 * factor.powi(3);
        d_x.extend(g.iter().zip(x).map(|(g, x)| g * factor - x * pull));
        for ((d_weight, d), x) in d_weight.iter_mut().zip(d_out).zip(x) {
            *d_weight += d * x * factor;
        }
    }
    (d_x, d_weight)
}

const SHAPES: [(usize, usize); 11] = [
    (0, 8),
    (1, 1),
    (1, 64),
    (3, 33),
    (17, 128),
    (70, 1030),
    (3, 1024),
    (2, 2560),
    (2, 4096),
    (2, 8190),
    // The widest rows that a kernel holds.
    (2, 8192),
];
const EPSILON: f32 = 1e-6;

#[test]
fn forward_is_the_reference() {
    let mut random = Random(1);
    for dtype in TYPES {
        for (rows, width) in SHAPES {
            let mut fixture = Fixture::new();
            let (x, weight) = (random.values(rows * width, dtype), random.values(width, dtype));
            let expected = reference(&x, &weight, f64::from(EPSILON));
            let (x, weight) = (fixture.put(&x, dtype), fixture.put(&weight, dtype));
            let out = fixture.poisoned(rows * width, dtype);
            let inverse_rms = fixture.poisoned(rows, DType::F32);
            fixture.backend.rms_norm(x, weight.into(), EPSILON, out, inverse_rms);
            assert_close("out", &fixture.get(out), &expected, bound(dtype, 4.0));

            let again = fixture.poisoned(rows * width, dtype);
            fixture.backend.rms_norm_recompute(x, weight.into(), inverse_rms, again);
            assert_eq!(fixture.bytes(again), fixture.bytes(out), "the norm applied again");
        }
    }
}

#[test]
fn addition_and_norm_are_those_of_the_parts_in_place_or_not() {
    let mut random = Random(2);
    for dtype in TYPES {
        for (rows, width) in SHAPES {
            let mut fixture = Fixture::new();
            let (x, delta) = (random.values(rows * width, dtype), random.values(rows * width, dtype));
            let weight = random.values(width, dtype);
            let (x, delta) = (fixture.put(&x, dtype), fixture.put(&delta, dtype));
            let weight = fixture.put(&weight, dtype);
            let expected_sum = fixture.poisoned(rows * width, dtype);
            fixture.backend.copy(x, expected_sum);
            fixture.backend.add(expected_sum, delta);
            let expected = fixture.poisoned(rows * width, dtype);
            let factors = fixture.poisoned(rows, DType::F32);
            fixture.backend.rms_norm(expected_sum, weight.into(), EPSILON, expected, factors);

            let other = fixture.poisoned(rows * width, dtype);
            for place in [other, x, delta] {
                let (x_bytes, delta_bytes) = (fixture.bytes(x), fixture.bytes(delta));
                let out = fixture.poisoned(rows * width, dtype);
                let inverse_rms = fixture.poisoned(rows, DType::F32);
                fixture.backend.add_rms_norm(x, delta, place, weight.into(), EPSILON, out, inverse_rms);
                assert_eq!(fixture.bytes(place), fixture.bytes(expected_sum));
                assert_eq!(fixture.bytes(out), fixture.bytes(expected));
                assert_eq!(fixture.bytes(inverse_rms), fixture.bytes(factors));
                fixture.backend.upload(&x_bytes, x);
                fixture.backend.upload(&delta_bytes, delta);
            }
        }
    }
}

#[test]
fn backward_is_the_derivative_and_is_added() {
    let mut random = Random(3);
    for dtype in TYPES {
        for (rows, width) in [(1, 1), (1, 64), (3, 33), (17, 40)] {
            let mut fixture = Fixture::new();
            let (x, weight) = (random.values(rows * width, dtype), random.values(width, dtype));
            let (d_out, before) = (random.values(rows * width, dtype), random.values(rows * width, dtype));
            let before_weight = random.values(width, DType::F32);
            let epsilon = f64::from(EPSILON);
            let d_x = differences(&x, |x| inner(&reference(x, &weight, epsilon), &d_out));
            let d_weight = differences(&weight, |weight| inner(&reference(&x, weight, epsilon), &d_out));
            let (same_x, same_weight) = gradients(&x, &weight, &d_out, epsilon);
            assert_close("the formula's d_x", &sum(&before, &same_x), &sum(&before, &d_x), 1e-8);
            assert_close("the formula's d_weight", &same_weight, &d_weight, 1e-7);

            let (x, weight) = (fixture.put(&x, dtype), fixture.put(&weight, dtype));
            let out = fixture.poisoned(rows * width, dtype);
            let inverse_rms = fixture.poisoned(rows, DType::F32);
            fixture.backend.rms_norm(x, weight.into(), EPSILON, out, inverse_rms);
            let d_out = fixture.put(&d_out, dtype);
            let (actual_x, actual_weight) = (fixture.put(&before, dtype), fixture.put(&before_weight, DType::F32));
            fixture.backend.rms_norm_backward(d_out, x, weight.into(), inverse_rms, actual_x, actual_weight);
            assert_close("d_x", &fixture.get(actual_x), &sum(&before, &d_x), bound(dtype, 8.0));
            assert_close("d_weight", &fixture.get(actual_weight), &sum(&before_weight, &d_weight), 1e-6);
        }
    }
}

#[test]
fn backward_goes_over_many_rows_and_wide_ones() {
    let mut random = Random(8);
    for dtype in TYPES {
        for (rows, width) in [(0, 64), (301, 64), (130, 264), (97, 768), (9, 2560), (11, 4096), (3, 8187), (5, 8192)] {
            let mut fixture = Fixture::new();
            let (x, weight) = (random.values(rows * width, dtype), random.values(width, dtype));
            let (d_out, before) = (random.values(rows * width, dtype), random.values(rows * width, dtype));
            let before_weight = random.values(width, DType::F32);
            let (d_x, d_weight) = gradients(&x, &weight, &d_out, f64::from(EPSILON));

            let (x, weight) = (fixture.put(&x, dtype), fixture.put(&weight, dtype));
            let out = fixture.poisoned(rows * width, dtype);
            let inverse_rms = fixture.poisoned(rows, DType::F32);
            fixture.backend.rms_norm(x, weight.into(), EPSILON, out, inverse_rms);
            let d_out = fixture.put(&d_out, dtype);
            let (actual_x, actual_weight) = (fixture.put(&before, dtype), fixture.put(&before_weight, DType::F32));
            fixture.backend.rms_norm_backward(d_out, x, weight.into(), inverse_rms, actual_x, actual_weight);
            assert_close("d_x", &fixture.get(actual_x), &sum(&before, &d_x), bound(dtype, 8.0));
            assert_close("d_weight", &fixture.get(actual_weight), &sum(&before_weight, &d_weight), 1e-6);
        }
    }
}

#[test]
fn rows_need_not_be_aligned() {
    let (rows, width) = (7, 264);
    let mut random = Random(9);
    for dtype in TYPES {
        let mut fixture = Fixture::new();
        let (x, weight) = (random.values(rows * width, dtype), random.values(width, dtype));
        let (d_out, delta) = (random.values(rows * width, dtype), random.values(rows * width, dtype));
        let sums: Vec<f64> = sum(&x, &delta).iter().map(|x| round(*x, dtype)).collect();
        let expected = reference(&sums, &weight, f64::from(EPSILON));
        let (d_x, d_weight) = gradients(&sums, &weight, &d_out, f64::from(EPSILON));

        let (x, delta) = (fixture.put_unaligned(&x, dtype), fixture.put(&delta, dtype));
        let (weight, d_out) = (fixture.put_unaligned(&weight, dtype), fixture.put_unaligned(&d_out, dtype));
        let out = fixture.poisoned(rows * width, dtype);
        let inverse_rms = fixture.poisoned(rows, DType::F32);
        fixture.backend.add_rms_norm(x, delta, x, weight.into(), EPSILON, out, inverse_rms);
        assert_close("sum", &fixture.get(x), &sums, 0.0);
        assert_close("out", &fixture.get(out), &expected, bound(dtype, 4.0));
        let again = fixture.poisoned(rows * width, dtype);
        fixture.backend.rms_norm_recompute(x, weight.into(), inverse_rms, again);
        assert_eq!(fixture.bytes(again), fixture.bytes(out), "the norm applied again");
        let (actual_x, actual_weight) = (fixture.put(&d_x, dtype), fixture.put(&d_weight, DType::F32));
        fixture.backend.rms_norm_backward(d_out, x, weight.into(), inverse_rms, actual_x, actual_weight);
        assert_close("d_x", &fixture.get(actual_x), &sum(&d_x, &d_x), bound(dtype, 8.0));
        assert_close("d_weight", &fixture.get(actual_weight), &sum(&d_weight, &d_weight), 1e-6);
    }
}

#[test]
fn the_weights_gradient_takes_rows_of_every_task() {
    let (rows, width) = (1000, 512);
    let mut fixture = Fixture::new();
    let ones = vec![1.0; rows * width];
    let (x, d_out) = (fixture.put(&ones, DType::F32), fixture.put(&ones, DType::F32));
    let weight = fixture.put(&ones[..width], DType::F32);
    let out = fixture.poisoned(rows * width, DType::F32);
    let inverse_rms = fixture.poisoned(rows, DType::F32);
    fixture.backend.rms_norm(x, weight.into(), 0.0, out, inverse_rms);
    let (d_x, d_weight) = (fixture.put(&ones, DType::F32), fixture.put(&ones[..width], DType::F32));
    fixture.backend.rms_norm_backward(d_out, x, weight.into(), inverse_rms, d_x, d_weight);
    assert_close("d_weight", &fixture.get(d_weight), &vec![1001.0; width], 1e-6);
    assert_close("d_x", &fixture.get(d_x), &ones, 1e-6);
}

#[test]
fn an_offset_is_added_to_the_weight_and_the_product_alone_is_rounded() {
    let mut random = Random(10);
    for dtype in TYPES {
        for (rows, width, offset) in [(1, 1, 1.0), (3, 33, 1.0), (17, 128, 1.0), (70, 1030, -0.5)] {
            let mut fixture = Fixture::new();
            let (x, weight) = (random.values(rows * width, dtype), random.values(width, dtype));
            let (d_out, before) = (random.values(rows * width, dtype), random.values(rows * width, dtype));
            let whole: Vec<f64> = weight.iter().map(|weight| weight + offset).collect();
            let expected = reference(&x, &whole, f64::from(EPSILON));
            let (d_x, d_weight) = gradients(&x, &whole, &d_out, f64::from(EPSILON));

            let (x, d_out) = (fixture.put(&x, dtype), fixture.put(&d_out, dtype));
            let weight = NormWeight { weight: fixture.put(&weight, dtype), offset: offset as f32 };
            let (out, again) = (fixture.poisoned(rows * width, dtype), fixture.poisoned(rows * width, dtype));
            let inverse_rms = fixture.poisoned(rows, DType::F32);
            fixture.backend.rms_norm(x, weight, EPSILON, out, inverse_rms);
            // One rounding, where a norm without an offset has two.
            let (actual, within) = (fixture.get(out), bound(dtype, 1.0) + bound(DType::F32, 4.0));
            for (actual, expected) in actual.iter().zip(&expected) {
                let allowed = within * expected.abs() + least(dtype) + 1e-6;
                assert!((actual - expected).abs() <= allowed, "{dtype:?}: {actual} instead of {expected}");
            }
            fixture.backend.rms_norm_recompute(x, weight, inverse_rms, again);
            assert_eq!(fixture.bytes(again), fixture.bytes(out), "the norm applied again");
            let zeros = fixture.put(&vec![0.0; rows * width], dtype);
            let (sum_of, added) = (fixture.poisoned(rows * width, dtype), fixture.poisoned(rows * width, dtype));
            fixture.backend.add_rms_norm(x, zeros, sum_of, weight, EPSILON, added, inverse_rms);
            assert_eq!(fixture.bytes(added), fixture.bytes(out), "the norm of a sum");
            let (actual_x, actual_weight) = (fixture.put(&before, dtype), fixture.put(&d_weight, DType::F32));
            fixture.backend.rms_norm_backward(d_out, x, weight, inverse_rms, actual_x, actual_weight);
            assert_close("d_x", &fixture.get(actual_x), &sum(&before, &d_x), bound(dtype, 8.0));
            assert_close("d_weight", &fixture.get(actual_weight), &sum(&d_weight, &d_weight), 1e-6);
        }
    }
}
