//! Weights in NF4: each is its code's value times its block's scale, rounded once; products are those with these values.

use arl_model::{Nf4, Nf4Builder, Nf4Scales, nf4_scale_values};

use super::*;
use crate::backend::{DeviceKind, Layout, Matmul, Nf4Matmul, Nf4Nested, Nf4Weights};

/// Random weights, as they are stored.
fn quantized(random: &mut Random, len: usize, is_nested: bool) -> Nf4 {
    let mut builder = Nf4Builder::default();
    builder.push(&random.values(len, DType::F32).iter().map(|x| *x as f32).collect::<Vec<f32>>());
    builder.finish(is_nested)
}

fn put(fixture: &mut Fixture, nf4: &Nf4, len: usize) -> Nf4Weights {
    let wide = |values: &[f32]| values.iter().map(|x| f64::from(*x)).collect::<Vec<f64>>();
    let bytes = |values: &[u8]| values.iter().map(|x| f64::from(*x)).collect::<Vec<f64>>();
    let codes = fixture.put(&bytes(&nf4.codes), DType::U8);
    let (scales, nested) = match &nf4.scales {
        Nf4Scales::Plain(scales) => (fixture.put(&wide(scales), DType::F32), None),
        Nf4Scales::Nested { codes, largest, offset } => {
            let scales = fixture.put(&bytes(codes), DType::U8);
            let largest = [&[*offset], largest.as_slice()].concat();
            let largest = fixture.put(&wide(&largest), DType::F32);
            let values = fixture.put(&wide(nf4_scale_values()), DType::F32);
            (scales, Some(Nf4Nested { largest, values }))
        }
    };
    Nf4Weights { len, codes, scales, nested }
}

#[test]
fn weights_in_nf4_are_values_times_scales_rounded_once() {
    let mut random = Random(61);
    for dtype in TYPES {
        for len in [1, 63, 64, 129, 70_001] {
            for is_nested in [false, true] {
                let mut fixture = Fixture::new();
                let nf4 = quantized(&mut random, len, is_nested);
                let mut expected = vec![0f32; len];
                nf4.read(0, &mut expected);
                let weights = put(&mut fixture, &nf4, len);
                let expected: Vec<f64> = expected.iter().map(|x| round(f64::from(*x), dtype)).collect();
                // From the first on, and from within a block and a byte.
                for first in [0, (len / 3) | 1].into_iter().filter(|first| *first < len) {
                    let all = fixture.put(&vec![7.0; len - first + 2], dtype);
                    fixture.backend.dequantize(&weights, first, all.slice(1, len - first));
                    let actual = fixture.get(all);
                    assert_eq!((actual[0], actual[len - first + 1]), (7.0, 7.0));
                    assert_eq!(actual[1..=len - first], expected[first..], "{dtype:?} {len} {is_nested} {first}");
                }
            }
        }
    }
}

#[test]
fn products_are_those_with_the_values_to_the_bit() {
    let mut random = Random(62);
    // Tensors one below the other; rows that begin within blocks, and rows of whole blocks; one token and many.
    for (m, heights, width) in [
        (1, vec![40, 24], 64),
        (4, vec![130, 66, 9], 192),
        (3, vec![5], 7),
        (9, vec![70, 200], 150),
        (70, vec![300], 128),
    ] {
        let height: usize = heights.iter().sum();
        for dtype in TYPES {
            let mut fixture = Fixture::new();
            let weights: Vec<Nf4Weights> = heights
                .iter()
                .map(|rows| {
                    let nf4 = quantized(&mut random, rows * width, m % 2 == 1);
                    put(&mut fixture, &nf4, rows * width)
                })
                .collect();
            let whole = fixture.poisoned(height * width, dtype);
            let mut first = 0;
            for weights in &weights {
                fixture.backend.dequantize(weights, 0, whole.slice(first, weights.len));
                first += weights.len;
            }
            let on_gpu = fixture.backend.kind() == DeviceKind::Cuda;
            // Several tiles.
            let tile = if on_gpu { (64 * height.max(width)).min(height * width) } else { 0 };
            let tile = fixture.poisoned(tile, dtype);
            for (layout, n, k) in [(Layout::Nt, height, width), (Layout::Nn, width, height)] {
                let nt = layout == Layout::Nt;
                let (a_values, c_values) = (random.values(m * k, dtype), random.values(m * (n + 8), dtype));
                let a = rows(fixture.put(&a_values, dtype), k);
                let bias = nt.then(|| fixture.put(&random.values(n, dtype), dtype));
                let accumulate = !nt;
                let [expected, actual] = [0, 1].map(|_| rows(fixture.put(&c_values, dtype), n + 8));
                let b = rows(whole, width);
                fixture.backend.matmul(&Matmul { layout, m, n, k, a, b, c: expected, accumulate, bias });
                let c = actual;
                let weights = weights.as_slice();
                fixture.backend.matmul_nf4(&Nf4Matmul {
                    layout,
                    m,
                    n,
                    k,
                    a,
                    weights,
                    dtype,
                    c,
                    accumulate,
                    bias,
                    tile,
                });
                let what = format!("{layout:?} {m}x{n}x{k} {dtype:?}");
                if on_gpu && nt && m <= 4 && width % 64 == 0 {
                    // A kernel of its own, whose sums are in another order.
                    let (actual, expected) = (fixture.get(actual.buffer), fixture.get(expected.buffer));
                    assert_close(&what, &actual, &expected, bound(dtype, 1.0) + 1e-5);
                } else {
                    assert!(fixture.bytes(actual.buffer) == fixture.bytes(expected.buffer), "{what}");
                }
            }
        }
    }
}
