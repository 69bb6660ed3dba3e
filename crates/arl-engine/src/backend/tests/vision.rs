//! The leaves of vision towers besides LayerNorm: GELU, interpolation, rows by number.

use super::*;
use crate::backend::Gelu;

/// The normal distribution's tail from `a >= 0` on: the series of `erf` near 0, else the continued fraction of `erfc` (Abramowitz and
/// Stegun 7.1.6 and 7.1.14).
pub(in super::super) fn normal_tail(a: f64) -> f64 {
    let z = a / std::f64::consts::SQRT_2;
    let scaled = (-z * z).exp() / std::f64::consts::PI.sqrt();
    if z < 2.5 {
        let mut term = 2.0 * z;
        let mut sum = term;
        for n in 1..80 {
            term *= 2.0 * z * z / f64::from(2 * n + 1);
            sum += term;
        }
        return 0.5 * (1.0 - scaled * sum);
    }
    let fraction = (1..=120).rev().fold(z, |below, n| z + f64::from(n) / 2.0 / below);
    0.5 * scaled / fraction
}

/// GELU and its derivative.
fn gelu_reference(kind: Gelu, x: f64) -> (f64, f64) {
    match kind {
        Gelu::Tanh => {
            let root = (2.0 / std::f64::consts::PI).sqrt();
            let s = 1.0 / (1.0 + (-2.0 * root * (x + 0.044_715 * x * x * x)).exp());
            let slope = 2.0 * root * (1.0 + 3.0 * 0.044_715 * x * x);
            let rest = 1.0 / (1.0 + (2.0 * root * (x + 0.044_715 * x * x * x)).exp());
            (x * s, s + x * s * rest * slope)
        }
        Gelu::Erf => {
            let tail = normal_tail(x.abs());
            let below = if x > 0.0 { 1.0 - tail } else { tail };
            (x * below, below + x * (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt())
        }
    }
}

const KINDS: [Gelu; 2] = [Gelu::Tanh, Gelu::Erf];

#[test]
fn gelu_and_its_derivative_are_the_reference_over_the_whole_range() {
    for kind in KINDS {
        for dtype in TYPES {
            let x: Vec<f64> = (-2600..=2600).map(|i| round(f64::from(i) / 200.0, dtype)).collect();
            let (expected, slopes): (Vec<f64>, Vec<f64>) = x.iter().map(|x| gelu_reference(kind, *x)).unzip();
            let mut f = Fixture::new();
            let x_buffer = f.put(&x, dtype);
            let (out, d_x) = (f.poisoned(x.len(), dtype), f.put(&vec![1.0; x.len()], dtype));
            f.backend.gelu(kind, x_buffer, out);
            f.backend.gelu_backward(kind, x_buffer, d_x);
            let check = |what: &str, actual: &[f64], expected: &[f64], x: &[f64]| {
                for ((actual, expected), x) in actual.iter().zip(expected).zip(x) {
                    // In f32 a product with a rounded cube, or a square, in the exponent; in 16 bits one rounding.
                    let relative = bound(dtype, 1.0).max(3e-6 * (1.0 + x * x / 8.0));
                    let error = (actual - expected).abs();
                    let allowed = relative * expected.abs() + least(dtype) + 2e-7;
                    assert!(error <= allowed, "{what} {kind:?} {dtype:?} at {x}: {actual} instead of {expected}");
                }
            };
            check("gelu", &f.get(out), &expected, &x);
            check("slope", &f.get(d_x), &slopes, &x);
        }
    }
}

#[test]
fn gelu_goes_over_any_number_of_elements_at_any_address() {
    let mut random = Random(107);
    for kind in KINDS {
        for dtype in TYPES {
            for (len, aligned) in [(0, true), (1, true), (7, false), (2049, true), (4100, false), (40_001, true)] {
                let mut f = Fixture::new();
                let (x, d_out) = (random.values(len, dtype), random.values(len, dtype));
                let (expected, slopes): (Vec<f64>, Vec<f64>) = x.iter().map(|x| gelu_reference(kind, *x)).unzip();
                let d: Vec<f64> = slopes.iter().zip(&d_out).map(|(slope, d)| slope * d).collect();
                let [x, d_x] = [x, d_out].map(|x| if aligned { f.put(&x, dtype) } else { f.put_unaligned(&x, dtype) });
                let all = f.poisoned(len + 1, dtype);
                f.backend.gelu(kind, x, all.slice(0, len));
                f.backend.gelu_backward(kind, x, d_x);
                let out = f.get(all);
                assert!(out[len].is_nan(), "nothing is written behind the end");
                assert_close("out", &out[..len], &expected, bound(dtype, 2.0).max(1e-6));
                assert_close("d_x", &f.get(d_x), &d, bound(dtype, 2.0).max(1e-6));
            }
        }
    }
}

#[test]
fn great_values_saturate_and_a_nan_is_not_hidden() {
    for kind in KINDS {
        for dtype in TYPES {
            let mut f = Fixture::new();
            let x = f.put(&[1e4, -1e4, 200.0, -200.0, f64::NAN], dtype);
            let (out, d_x) = (f.poisoned(5, dtype), f.put(&[1.0; 5], dtype));
            f.backend.gelu(kind, x, out);
            f.backend.gelu_backward(kind, x, d_x);
            let (out, d_x) = (f.get(out), f.get(d_x));
            assert_close("out", &out[..4], &[round(1e4, dtype), 0.0, 200.0, 0.0], 1e-7);
            assert_close("d_x", &d_x[..4], &[1.0, 0.0, 1.0, 0.0], 1e-7);
            assert!(out[4].is_nan() && d_x[4].is_nan(), "{kind:?}");
        }
    }
}

/// Rows of a table, and for each of `count` rows four taps and weights; some weights are 0, some taps equal.
fn taps(random: &mut Random, table: usize, count: usize) -> (Vec<usize>, Vec<f64>) {
    let taps = (0..4 * count).map(|i| if i % 7 == 0 { table - 1 } else { random.below(table) }).collect();
    let weights = random.values(4 * count, DType::F32);
    (taps, weights.iter().enumerate().map(|(i, weight)| if i % 5 == 0 { 0.0 } else { *weight }).collect())
}

/// Rows of the table, rows out, width.
const TABLES: [(usize, usize, usize); 6] =
    [(1, 1, 1), (7, 0, 3), (9, 50, 33), (48, 300, 64), (5, 70, 520), (3, 40, 1152)];

#[test]
fn positions_are_interpolated_from_four_rows_and_added() {
    let mut random = Random(108);
    for dtype in TYPES {
        for (rows, count, width) in TABLES {
            let mut f = Fixture::new();
            let (table, before) = (random.values(rows * width, dtype), random.values(count * width, dtype));
            let (taps, weights) = taps(&mut random, rows, count);
            let mut expected = before.clone();
            for (place, (tap, weight)) in taps.iter().zip(&weights).enumerate() {
                for i in 0..width {
                    expected[place / 4 * width + i] += weight * table[tap * width + i];
                }
            }
            let (table, out) = (f.put(&table, dtype), f.put(&before, dtype));
            let (taps, weights) = (f.ints(&taps), f.put(&weights, DType::F32));
            f.backend.interpolate(table, taps, weights, width, out);
            assert_close("out", &f.get(out), &expected, bound(dtype, 2.0).max(1e-6));
        }
    }
}

#[test]
fn the_tables_gradient_takes_each_tap_in_the_order_of_the_rows() {
    let mut random = Random(109);
    for dtype in TYPES {
        for (rows, count, width) in TABLES {
            let mut f = Fixture::new();
            let d_out = random.values(count * width, dtype);
            let (taps, weights) = taps(&mut random, rows, count);
            let mut expected = random.values(rows * width, DType::F32);
            let d_table = f.put(&expected, DType::F32);
            for (place, (tap, weight)) in taps.iter().zip(&weights).enumerate() {
                for i in 0..width {
                    let term = *weight as f32 * d_out[place / 4 * width + i] as f32;
                    let sum = &mut expected[tap * width + i];
                    *sum = f64::from(*sum as f32 + term);
                }
            }
            let (d_out, taps, weights) = (f.put(&d_out, dtype), f.ints(&taps), f.put(&weights, DType::F32));
            f.backend.interpolate_backward(d_out, taps, weights, width, d_table);
            assert_eq!(f.get(d_table), expected, "each product and each sum is rounded as it is made");
        }
    }
}

#[test]
fn interpolation_backward_is_the_derivative() {
    let mut random = Random(110);
    let (rows, count, width) = (6, 11, 5);
    let (table, d_out) = (random.values(rows * width, DType::F32), random.values(count * width, DType::F32));
    let (taps, weights) = taps(&mut random, rows, count);
    let loss = |table: &[f64]| -> f64 {
        let row =
            |place: usize, i: usize| weights[place] * table[taps[place] * width + i] * d_out[place / 4 * width + i];
        (0..taps.len()).flat_map(|place| (0..width).map(move |i| (place, i))).map(|(place, i)| row(place, i)).sum()
    };
    let expected = differences(&table, loss);
    let mut f = Fixture::new();
    let d_table = f.put(&vec![0.0; rows * width], DType::F32);
    let (d_out, taps, weights) = (f.put(&d_out, DType::F32), f.ints(&taps), f.put(&weights, DType::F32));
    f.backend.interpolate_backward(d_out, taps, weights, width, d_table);
    assert_close("d_table", &f.get(d_table), &expected, 1e-6);
}

#[test]
#[should_panic(expected = "outside the table")]
fn a_tap_outside_the_table_is_refused() {
    let mut f = Fixture::new();
    let (taps, weights) = (f.ints(&[0, 1, 2, 3]), f.put(&[1.0; 4], DType::F32));
    let (d_out, d_table) = (f.put(&[1.0], DType::F32), f.put(&[0.0; 3], DType::F32));
    f.backend.interpolate_backward(d_out, taps, weights, 1, d_table);
}

#[test]
fn rows_are_added_and_cleared_by_their_numbers_and_others_are_left() {
    let mut random = Random(111);
    for dtype in TYPES {
        for (rows, count, width) in [(1, 1, 1), (9, 0, 4), (90, 70, 17), (90, 33, 64), (40, 40, 1030)] {
            let mut f = Fixture::new();
            let (x, before) = (random.values(count * width, dtype), random.values(rows * width, dtype));
            let mut order: Vec<usize> = (0..rows).collect();
            for i in (1..rows).rev() {
                order.swap(i, random.below(i + 1));
            }
            let order = &order[..count];
            let (mut added, mut cleared) = (before.clone(), before.clone());
            for (row, x) in order.iter().zip(x.chunks(width)) {
                for i in 0..width {
                    added[row * width + i] = round(f64::from((added[row * width + i] + x[i]) as f32), dtype);
                }
                cleared[row * width..][..width].fill(0.0);
            }
            let (out, zeroed) = (f.put(&before, dtype), f.put(&before, dtype));
            let (x, numbers) = (f.put(&x, dtype), f.ints(order));
            f.backend.add_rows(x, numbers, width, out);
            f.backend.zero_rows(numbers, width, zeroed);
            assert_eq!(f.get(out), added);
            assert_eq!(f.get(zeroed), cleared);
        }
    }
}

#[test]
#[should_panic(expected = "twice")]
fn a_row_is_not_added_to_twice() {
    let mut f = Fixture::new();
    let (x, rows) = (f.put(&[1.0, 2.0], DType::F32), f.ints(&[1, 1]));
    let out = f.poisoned(2, DType::F32);
    f.backend.add_rows(x, rows, 1, out);
}

/// What each leaf writes, at sizes of many tasks.
pub(super) fn results(f: &mut Fixture, dtype: DType) -> Vec<(&'static str, Buffer)> {
    let mut random = Random(112);
    let (rows, width, table) = (500, 264, 60);
    let mut put = |f: &mut Fixture, len: usize, dtype: DType| {
        let values = random.values(len, dtype);
        f.put(&values, dtype)
    };
    let [x, d_out, d_x] = [(); 3].map(|()| put(f, rows * width, dtype));
    let [weight, bias] = [(); 2].map(|()| put(f, width, dtype));
    let [d_weight, d_bias] = [(); 2].map(|()| put(f, width, DType::F32));
    let op = layer_norm::op(f, x, weight, bias);
    f.backend.layer_norm(&op);
    f.backend.layer_norm_backward(&op, d_out, d_x, d_weight, d_bias);
    let mut results = vec![
        ("layer_norm", op.out),
        ("layer_norm statistics", op.statistics),
        ("layer_norm d_x", d_x),
        ("layer_norm d_weight", d_weight),
        ("layer_norm d_bias", d_bias),
    ];
    for kind in KINDS {
        let (out, d_x) = (f.poisoned(x.len, dtype), put(f, x.len, dtype));
        f.backend.gelu(kind, x, out);
        f.backend.gelu_backward(kind, x, d_x);
        results.extend([("gelu", out), ("gelu d_x", d_x)]);
    }
    let (positions, d_table) = (put(f, table * width, dtype), put(f, table * width, DType::F32));
    let out = put(f, rows * width, dtype);
    let (numbers, shares) = taps(&mut Random(113), table, rows);
    let (numbers, shares) = (f.ints(&numbers), f.put(&shares, DType::F32));
    f.backend.interpolate(positions, numbers, shares, width, out);
    f.backend.interpolate_backward(d_out, numbers, shares, width, d_table);
    let (sums, rest) = (put(f, rows * width, dtype), put(f, rows * width, dtype));
    let reversed = f.ints(&(0..rows).rev().collect::<Vec<_>>());
    f.backend.add_rows(x, reversed, width, sums);
    f.backend.zero_rows(reversed, width, rest);
    results.extend([("interpolate", out), ("interpolate d_table", d_table), ("add_rows", sums), ("zero_rows", rest)]);
    results
}
