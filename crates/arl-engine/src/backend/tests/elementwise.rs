//! Zero, copy, add, sums, and the products' way from buffers to the GEMM.

use super::*;
use crate::backend::{Dropout, GroupedMatmul, Layout, Matmul};

#[test]
fn zero_reaches_its_ends_and_no_further() {
    for len in [0, 1, 33, 70_001] {
        let mut fixture = Fixture::new();
        let all = fixture.put(&vec![1.0; len + 2], DType::F32);
        fixture.backend.zero(all.slice(1, len));
        let values = fixture.get(all);
        assert_eq!((values[0], values[len + 1]), (1.0, 1.0));
        assert!(values[1..=len].iter().all(|x| *x == 0.0));
    }
}

#[test]
fn copies_convert_between_the_types() {
    let mut random = Random(30);
    for from in TYPES {
        for to in TYPES.into_iter().filter(|to| meet(&[from, *to])) {
            for len in [0, 1, 40_000] {
                let mut fixture = Fixture::new();
                let values = random.values(len, from);
                let (source, target) = (fixture.put(&values, from), fixture.poisoned(len, to));
                fixture.backend.copy(source, target);
                let expected: Vec<f64> = values.iter().map(|x| round(*x, to)).collect();
                assert_eq!(fixture.get(target), expected);
            }
        }
    }
}

#[test]
fn addition_is_rounded_once() {
    let mut random = Random(31);
    for dtype in TYPES {
        for len in [0, 1, 40_001] {
            let mut fixture = Fixture::new();
            let (x, delta) = (random.values(len, dtype), random.values(len, dtype));
            let expected: Vec<f64> = sum(&x, &delta).iter().map(|x| round(f64::from(*x as f32), dtype)).collect();
            let (x, delta) = (fixture.put(&x, dtype), fixture.put(&delta, dtype));
            fixture.backend.add(x, delta);
            assert_eq!(fixture.get(x), expected);
        }
    }
}

#[test]
fn multiples_are_rounded_once_and_dropped_elements_are_zero() {
    let mut random = Random(38);
    let dropout = Dropout::new(0.3, &[1, 2]);
    // Of all rows from the sixth element on, and of parts of longer rows.
    let (later, part) = (Dropout { first: 5, ..dropout }, Dropout { first: 1 << 33, columns: [7, 19], ..dropout });
    for dtype in TYPES {
        for len in [0, 1, 7, 40_001] {
            for dropout in [None, Some(dropout), Some(later), Some(part)] {
                let mut fixture = Fixture::new();
                let values = random.values(len, dtype);
                let expected: Vec<f64> = values
                    .iter()
                    .enumerate()
                    .map(|(i, x)| {
                        let dropped = dropout.is_some_and(|dropout| dropout.drops(dropout.run(i).0));
                        if dropped { 0.0 } else { round(f64::from(*x as f32 * 1.7), dtype) }
                    })
                    .collect();
                for unaligned in [false, true] {
                    let x = if unaligned { fixture.put_unaligned(&values, dtype) } else { fixture.put(&values, dtype) };
                    let all = fixture.poisoned(len + 1, dtype);
                    fixture.backend.scale(x, 1.7, dropout, all.slice(0, len));
                    let out = fixture.get(all);
                    assert!(out[len].is_nan());
                    assert_eq!(out[..len], expected);
                }
            }
        }
    }
}

#[test]
fn elements_need_not_be_aligned() {
    let mut random = Random(36);
    for len in [7, 16, 4099] {
        for dtype in TYPES {
            let mut fixture = Fixture::new();
            let (x, delta) = (random.values(len, dtype), random.values(len, dtype));
            let expected: Vec<f64> = sum(&x, &delta).iter().map(|x| round(f64::from(*x as f32), dtype)).collect();
            let (x, delta) = (fixture.put(&x, dtype), fixture.put_unaligned(&delta, dtype));
            fixture.backend.add(x, delta);
            assert_eq!(fixture.get(x), expected);
            for other in TYPES.into_iter().filter(|other| *other != dtype && meet(&[dtype, *other])) {
                let all = fixture.poisoned(len + 2, other);
                fixture.backend.copy(x, all.slice(1, len));
                let copied = fixture.get(all);
                assert!(copied[0].is_nan() && copied[len + 1].is_nan());
                let expected: Vec<f64> = expected.iter().map(|x| round(*x, other)).collect();
                assert_eq!(copied[1..=len], expected);
            }
        }
        let mut fixture = Fixture::new();
        let (a, b) = (random.values(len, DType::F32), random.values(len, DType::F32));
        let expected = inner(&a, &b);
        let (a, b) = (fixture.put(&a, DType::F32), fixture.put_unaligned(&b, DType::F32));
        let out = fixture.put(&[0.0], DType::F64);
        fixture.backend.dot(a, b, out);
        assert_close("out", &fixture.get(out), &[expected], 1e-12);
    }
}

#[test]
fn rows_are_summed_by_column_and_added() {
    let mut random = Random(32);
    for dtype in TYPES {
        let shapes = [(0, 4, 4), (1, 1, 1), (5, 300, 310), (400, 257, 300), (130, 520, 528)];
        for (count, columns, stride) in shapes {
            let mut fixture = Fixture::new();
            let x = random.values(count * stride, dtype);
            let mut expected = random.values(columns, DType::F32);
            let out = fixture.put(&expected, DType::F32);
            for row in x.chunks(stride) {
                for (total, x) in expected.iter_mut().zip(row) {
                    *total += x;
                }
            }
            let x = fixture.put(&x, dtype);
            fixture.backend.sum_rows(rows(x, stride), count, columns, out);
            assert_close("out", &fixture.get(out), &expected, 2e-6);
        }
    }
}

#[test]
fn sums_of_many_rows_lose_none() {
    let (count, columns, stride) = (9001, 24, 32);
    let mut random = Random(37);
    for dtype in TYPES {
        let mut fixture = Fixture::new();
        // Whole numbers, whose sums f32 holds exactly.
        let x: Vec<f64> = (0..count * stride).map(|_| random.below(9) as f64 - 3.0).collect();
        let mut expected = vec![7.0; columns];
        let out = fixture.put(&expected, DType::F32);
        for row in x.chunks(stride) {
            for (total, x) in expected.iter_mut().zip(row) {
                *total += x;
            }
        }
        let x = fixture.put(&x, dtype);
        fixture.backend.sum_rows(rows(x, stride), count, columns, out);
        assert_eq!(fixture.get(out), expected);
    }
}

#[test]
fn scalar_products_are_exact_to_f64_and_added() {
    let mut random = Random(33);
    for len in [0, 1, 15, 100_003] {
        let mut fixture = Fixture::new();
        let (a, b) = (random.values(len, DType::F32), random.values(len, DType::F32));
        let expected = 5.0 + inner(&a, &b);
        let (a, b) = (fixture.put(&a, DType::F32), fixture.put(&b, DType::F32));
        let out = fixture.put(&[5.0], DType::F64);
        fixture.backend.dot(a, b, out);
        assert_close("out", &fixture.get(out), &[expected], 1e-12);
        let squares = fixture.put(&[0.0], DType::F64);
        fixture.backend.dot(a, a, squares);
        let a = fixture.get(a);
        assert_close("squares", &fixture.get(squares), &[inner(&a, &a)], 1e-12);
    }
}

#[test]
fn products_read_and_write_the_rows_they_are_given() {
    let mut random = Random(34);
    for (layout, accumulate, dtype) in [
        (Layout::Nt, false, DType::F32),
        (Layout::Nn, false, DType::Bf16),
        (Layout::Tn, true, DType::F32),
        (Layout::Nt, true, DType::Bf16),
        (Layout::Nn, true, DType::F16),
    ] {
        let (m, n, k) = (7, 5, 9);
        let (a_rows, a_columns) = if layout == Layout::Tn { (k, m) } else { (m, k) };
        let (b_rows, b_columns) = if layout == Layout::Nt { (n, k) } else { (k, n) };
        let mut fixture = Fixture::new();
        let (a_stride, b_stride, c_stride) = (a_columns + 2, b_columns + 1, n + 3);
        let (a, b) = (random.values(a_rows * a_stride, dtype), random.values(b_rows * b_stride, dtype));
        let (c, bias) = (random.values(m * c_stride, DType::F32), random.values(n, dtype));
        let mut expected = c.clone();
        for i in 0..m {
            for j in 0..n {
                let term = |x: usize| {
                    let a = if layout == Layout::Tn { a[x * a_stride + i] } else { a[i * a_stride + x] };
                    a * if layout == Layout::Nt { b[j * b_stride + x] } else { b[x * b_stride + j] }
                };
                let old = if accumulate { c[i * c_stride + j] } else { 0.0 };
                expected[i * c_stride + j] = old + bias[j] + (0..k).map(term).sum::<f64>();
            }
        }
        let op = Matmul {
            layout,
            m,
            n,
            k,
            a: rows(fixture.put(&a, dtype), a_stride),
            b: rows(fixture.put(&b, dtype), b_stride),
            c: rows(fixture.put(&c, DType::F32), c_stride),
            accumulate,
            bias: Some(fixture.put(&bias, dtype)),
        };
        fixture.backend.matmul(&op);
        assert_close("c", &fixture.get(op.c.buffer), &expected, 2e-6);
    }
}

#[test]
fn each_expert_multiplies_its_own_rows() {
    let mut random = Random(35);
    let offsets = [0, 3, 3, 10, 11];
    let (experts, count, n, k) = (4, 11, 6, 5);
    for dtype in TYPES {
        for layout in [Layout::Nt, Layout::Nn, Layout::Tn] {
            let mut fixture = Fixture::new();
            let a = random.values(count * k, dtype);
            let b = random.values(if layout == Layout::Tn { count * n } else { experts * n * k }, dtype);
            let before = random.values(experts * k * n, DType::F32);
            let mut expected = if layout == Layout::Tn { before.clone() } else { vec![0.0; count * n] };
            for e in 0..experts {
                for row in offsets[e]..offsets[e + 1] {
                    for j in 0..n {
                        for x in 0..k {
                            let a = a[row * k + x];
                            match layout {
                                Layout::Nt => expected[row * n + j] += a * b[(e * n + j) * k + x],
                                Layout::Nn => expected[row * n + j] += a * b[(e * k + x) * n + j],
                                Layout::Tn => expected[(e * k + x) * n + j] += a * b[row * n + j],
                            }
                        }
                    }
                }
            }
            let b_stride = if layout == Layout::Nt { k } else { n };
            let c = match layout {
                Layout::Tn => fixture.put(&before, DType::F32),
                _ => fixture.poisoned(count * n, dtype),
            };
            let op = GroupedMatmul {
                layout,
                experts,
                offsets: fixture.ints(&offsets),
                rows: count,
                n,
                k,
                a: rows(fixture.put(&a, dtype), k),
                b: rows(fixture.put(&b, dtype), b_stride),
                c: rows(c, n),
            };
            fixture.backend.grouped_matmul(&op);
            assert_close("c", &fixture.get(c), &expected, bound(c.dtype, 4.0).max(1e-6));
        }
    }
}
