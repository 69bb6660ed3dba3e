//! Matrix products, alone and by experts. Bounds follow from the number formats alone.

use super::*;
use crate::backend::{DeviceKind, GroupedMatmul, Layout, Matmul};

const LAYOUTS: [Layout; 3] = [Layout::Nt, Layout::Nn, Layout::Tn];

/// A matrix in a buffer that ends with its last row's last element, and the values in it.
struct Matrix {
    values: Vec<f64>,
    rows: Rows,
}

impl Matrix {
    /// `rows` of `width` elements, `gap` elements apart, the first `gap` elements after an aligned address.
    fn new(fixture: &mut Fixture, random: &mut Random, rows: usize, width: usize, gap: usize, dtype: DType) -> Matrix {
        let stride = width + gap;
        let values = random.values((rows * stride).saturating_sub(gap), dtype);
        Matrix::of(fixture, values, stride, gap, dtype)
    }

    /// NaN instead of values.
    fn poisoned(fixture: &mut Fixture, rows: usize, width: usize, gap: usize, dtype: DType) -> Matrix {
        let stride = width + gap;
        Matrix::of(fixture, vec![f64::NAN; (rows * stride).saturating_sub(gap)], stride, gap, dtype)
    }

    fn of(fixture: &mut Fixture, values: Vec<f64>, stride: usize, lead: usize, dtype: DType) -> Matrix {
        let led: Vec<f64> = vec![f64::NAN; lead].into_iter().chain(values.iter().copied()).collect();
        let buffer = fixture.put(&led, dtype).slice(lead, values.len());
        Matrix { values, rows: Rows { buffer, stride } }
    }

    fn at(&self, row: usize, column: usize) -> f64 {
        self.values[row * self.rows.stride + column]
    }
}

/// What a sum of `terms` may be apart from `actual`: each product and each addition rounds once to 2^-24, operands
/// before it by `narrowing`, the result to `dtype`.
struct Sum {
    value: f64,
    size: f64,
    terms: usize,
}

impl Sum {
    fn of(terms: impl Iterator<Item = f64>) -> Sum {
        terms.fold(Sum { value: 0.0, size: 0.0, terms: 0 }, |sum, x| Sum {
            value: sum.value + x,
            size: sum.size + x.abs(),
            terms: sum.terms + 1,
        })
    }

    #[track_caller]
    fn check(&self, what: &str, actual: f64, narrowing: f64, dtype: DType) {
        self.check_of(self.terms, what, actual, narrowing, dtype);
    }

    /// As `check`, of a sum that is made of `terms`.
    #[track_caller]
    fn check_of(&self, terms: usize, what: &str, actual: f64, narrowing: f64, dtype: DType) {
        let unit = (terms as f64 + 5.0) * 2f64.powi(-24) * (1.0 + narrowing) + narrowing;
        let rounding = if NARROW.contains(&dtype) { bound(dtype, 1.0) } else { 0.0 };
        let allowed = self.size * unit + (self.value.abs() + self.size * unit) * rounding + least(dtype);
        assert!((actual - self.value).abs() <= allowed, "{what} is {actual}, not {} (bound {allowed:e})", self.value);
    }
}

/// Whether a GPU splits the f32 operand into two of bf16.
fn is_split(fixture: &Fixture, case: &Case) -> bool {
    let (_, n, _) = case.size;
    let columns = if case.layout == Layout::Tn { case.size.0 } else { case.size.2 };
    fixture.backend.kind() == DeviceKind::Cuda
        && case.types[..2] == [DType::F32, DType::Bf16]
        && match case.layout {
            Layout::Nt => false,
            Layout::Nn => case.gap == 0,
            Layout::Tn => case.types[2] == DType::F32,
        }
        && (columns > 0 && columns.is_multiple_of(8) && n.is_multiple_of(8) && case.bias.is_none())
}

/// How much an operand of a product of unlike types is rounded, relatively: the CPU may make it bf16 like the other.
fn narrowing(fixture: &Fixture, a: DType, b: DType) -> f64 {
    let to_bf16 = a != b && [a, b].contains(&DType::Bf16) && fixture.backend.name().contains("AVX-512 BF16");
    if to_bf16 { 2f64.powi(-8) } else { 0.0 }
}

/// One product; `gap` is between rows.
struct Case {
    layout: Layout,
    types: [DType; 3],
    size: (usize, usize, usize),
    gap: usize,
    accumulate: bool,
    bias: Option<DType>,
}

fn check(fixture: &mut Fixture, random: &mut Random, case: &Case) {
    fixture.next = 0;
    let Case { layout, types: [a_type, b_type, c_type], size: (m, n, k), gap, accumulate, bias } = *case;
    let (a_rows, a_width) = if layout == Layout::Tn { (k, m) } else { (m, k) };
    let (b_rows, b_width) = if layout == Layout::Nt { (n, k) } else { (k, n) };
    let a = Matrix::new(fixture, random, a_rows, a_width, gap, a_type);
    let b = Matrix::new(fixture, random, b_rows, b_width, gap, b_type);
    let before = if accumulate {
        Matrix::new(fixture, random, m, n, gap, c_type)
    } else {
        Matrix::poisoned(fixture, m, n, gap, c_type)
    };
    let bias = bias.map(|dtype| Matrix::new(fixture, random, 1, n, 0, dtype));
    let split = is_split(fixture, case);
    // What is left of an f32 in two bf16 is below half a unit in the last of 16 bits and a sign.
    let narrowing = if split { 2f64.powi(-17) } else { narrowing(fixture, a_type, b_type) };
    fixture.backend.matmul(&Matmul {
        layout,
        m,
        n,
        k,
        a: a.rows,
        b: b.rows,
        c: before.rows,
        accumulate,
        bias: bias.as_ref().map(|bias| bias.rows.buffer),
    });
    let actual = fixture.get(before.rows.buffer);
    for (position, actual) in actual.into_iter().enumerate() {
        let (i, j) = (position / before.rows.stride, position % before.rows.stride);
        let what = format!("{layout:?} {:?} {:?} gap {gap} [{i}, {j}]", case.types, case.size);
        let old = before.values[position];
        if j >= n {
            assert!(actual == old || (actual.is_nan() && old.is_nan()), "{what} lies between rows and is {actual}");
            continue;
        }
        let products = (0..k).map(|p| {
            let a = if layout == Layout::Tn { a.at(p, i) } else { a.at(i, p) };
            a * if layout == Layout::Nt { b.at(j, p) } else { b.at(p, j) }
        });
        let more = accumulate.then_some(old).into_iter().chain(bias.as_ref().map(|bias| bias.at(0, j)));
        let sum = Sum::of(products.chain(more));
        let terms = if split { 2 * sum.terms } else { sum.terms };
        sum.check_of(terms, &what, actual, narrowing, c_type);
    }
}

#[test]
fn any_layout_type_size_and_stride_is_the_reference() {
    let mut random = Random(80);
    let mut fixture = Fixture::new();
    let sizes = [(1, 1, 1), (3, 5, 7), (2, 3, 0), (16, 64, 32), (131, 67, 37), (24, 136, 300)];
    for layout in LAYOUTS {
        for a in TYPES {
            for b in TYPES {
                let on_gpu = |c| a == b && [a, DType::F32].contains(&c) || a == DType::F32 && b != a;
                let served = |c| fixture.backend.kind() == DeviceKind::Cpu || on_gpu(c);
                for c in TYPES.into_iter().filter(|c| meet(&[a, b, *c]) && served(*c)).collect::<Vec<_>>() {
                    for (number, size) in sizes.into_iter().enumerate() {
                        let (gap, accumulate) = ([0, 1, 8][number % 3], random.below(2) == 0);
                        check(
                            &mut fixture,
                            &mut random,
                            &Case { layout, types: [a, b, c], size, gap, accumulate, bias: None },
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn a_bias_is_added_to_each_row() {
    let mut random = Random(81);
    let mut fixture = Fixture::new();
    let unlike = NARROW.map(|dtype| [DType::F32, dtype, DType::F32]);
    for types in TYPES.map(|dtype| [dtype; 3]).into_iter().chain(unlike) {
        for bias in [DType::F32, types[1]] {
            for (size, accumulate) in
                [((3, 70, 9), false), ((3, 70, 9), true), ((5, 9, 0), false), ((2, 5, 1000), true)]
            {
                check(
                    &mut fixture,
                    &mut random,
                    &Case { layout: Layout::Nt, types, size, gap: 0, accumulate, bias: Some(bias) },
                );
            }
        }
    }
}

/// A router's gradient: few rows, sums over all tokens.
#[test]
fn a_long_sum_of_unlike_types_is_the_reference_and_equal_in_bits_each_time() {
    let mut random = Random(82);
    let mut fixture = Fixture::new();
    for dtype in NARROW {
        let types = [DType::F32, dtype, DType::F32];
        for gap in [0, 3] {
            let case = Case { layout: Layout::Tn, types, size: (9, 72, 1500), gap, accumulate: true, bias: None };
            check(&mut fixture, &mut random, &case);
        }
        let (m, n, k) = (9, 72, 1500);
        let a = Matrix::new(&mut fixture, &mut random, k, m, 0, DType::F32);
        let b = Matrix::new(&mut fixture, &mut random, k, n, 0, dtype);
        let results: Vec<Vec<u8>> = (0..4)
            .map(|_| {
                let c = Matrix::poisoned(&mut fixture, m, n, 0, DType::F32);
                fixture.backend.matmul(&Matmul {
                    layout: Layout::Tn,
                    m,
                    n,
                    k,
                    a: a.rows,
                    b: b.rows,
                    c: c.rows,
                    accumulate: false,
                    bias: None,
                });
                fixture.bytes(c.rows.buffer)
            })
            .collect();
        assert!(results.iter().all(|result| *result == results[0]));
    }
}

/// A router's two gradients, of more tokens than are split at a time; and sizes on either side of what is split.
#[test]
fn an_f32_gradient_by_bf16_is_the_reference_in_pieces_and_with_gaps() {
    let mut random = Random(85);
    let mut fixture = Fixture::new();
    let mut run = |layout, c, size, gap, accumulate| {
        let types = [DType::F32, DType::Bf16, c];
        check(&mut fixture, &mut random, &Case { layout, types, size, gap, accumulate, bias: None });
    };
    for accumulate in [false, true] {
        run(Layout::Tn, DType::F32, (16, 72, 700), 0, accumulate);
        run(Layout::Tn, DType::F32, (16, 72, 700), 3, accumulate);
        run(Layout::Tn, DType::F32, (16, 70, 700), 0, accumulate);
        run(Layout::Tn, DType::F32, (12, 72, 700), 0, accumulate);
        for c in [DType::F32, DType::Bf16] {
            run(Layout::Nn, c, (300, 72, 16), 0, accumulate);
            run(Layout::Nn, c, (300, 72, 16), 8, accumulate);
            run(Layout::Nn, c, (300, 72, 12), 0, accumulate);
        }
    }
    // 4,096 rows of 512 columns fill the scratch.
    run(Layout::Tn, DType::F32, (512, 8, 4100), 0, true);
    run(Layout::Tn, DType::F32, (512, 8, 4100), 0, false);
    run(Layout::Nn, DType::Bf16, (4100, 8, 512), 0, true);
}

/// The low parts count: the sums of the high parts alone are those of a gradient that is rounded to bf16.
#[test]
fn a_split_gradient_is_a_hundred_times_closer_than_one_rounded_to_bf16() {
    let mut random = Random(86);
    let mut fixture = Fixture::new();
    let (m, n, k) = (8, 8, 512);
    let a = Matrix::new(&mut fixture, &mut random, k, m, 0, DType::F32);
    let b = Matrix::new(&mut fixture, &mut random, k, n, 0, DType::Bf16);
    let c = Matrix::poisoned(&mut fixture, m, n, 0, DType::F32);
    let op = Matmul { layout: Layout::Tn, m, n, k, a: a.rows, b: b.rows, c: c.rows, accumulate: false, bias: None };
    if fixture.backend.kind() == DeviceKind::Cpu {
        return println!("SKIPPED: {} splits nothing", fixture.backend.name());
    }
    fixture.backend.matmul(&op);
    let actual = fixture.get(c.rows.buffer);
    let far = |of: &dyn Fn(f64) -> f64, actual: Option<&[f64]>| {
        let apart = (0..m * n).map(|at| {
            let (i, j) = (at / n, at % n);
            let exact: f64 = (0..k).map(|p| a.at(p, i) * b.at(p, j)).sum();
            let other = (0..k).map(|p| of(a.at(p, i)) * b.at(p, j)).sum();
            (actual.map_or(other, |actual| actual[at]) - exact).powi(2)
        });
        apart.sum::<f64>().sqrt()
    };
    let rounded = far(&|x| round(x, DType::Bf16), None);
    let split = far(&|x| x, Some(&actual));
    assert!(split < rounded / 100.0, "{split:e} of {rounded:e}");
}

/// The products of experts with `counts` rows each; those of expert `spoilt` are NaN. `gap` is between rows.
struct Grouped<'a> {
    layout: Layout,
    dtype: DType,
    counts: &'a [usize],
    size: (usize, usize),
    gap: usize,
    spoilt: Option<usize>,
}

fn check_grouped(fixture: &mut Fixture, random: &mut Random, case: &Grouped<'_>) {
    fixture.next = 0;
    let Grouped { layout, dtype, counts, size: (n, k), gap, spoilt } = *case;
    let experts = counts.len();
    let offsets: Vec<usize> = (0..=experts).map(|e| counts[..e].iter().sum()).collect();
    let rows = offsets[experts];
    let mut a = Matrix::new(fixture, random, rows, k, gap, dtype);
    if let Some(expert) = spoilt {
        let stride = a.rows.stride;
        let end = (offsets[expert + 1] * stride).min(a.values.len());
        a.values[offsets[expert] * stride..end].fill(f64::NAN);
        a = Matrix::of(fixture, a.values, stride, gap, dtype);
    }
    let (b, c, c_type) = match layout {
        Layout::Nt => {
            let b = Matrix::new(fixture, random, experts * n, k, gap, dtype);
            (b, Matrix::poisoned(fixture, rows, n, gap, dtype), dtype)
        }
        Layout::Nn => {
            let b = Matrix::new(fixture, random, experts * k, n, gap, dtype);
            (b, Matrix::poisoned(fixture, rows, n, gap, dtype), dtype)
        }
        Layout::Tn => {
            let b = Matrix::new(fixture, random, rows, n, gap, dtype);
            (b, Matrix::new(fixture, random, experts * k, n, gap, DType::F32), DType::F32)
        }
    };
    let offsets_buffer = fixture.ints(&offsets);
    fixture.backend.grouped_matmul(&GroupedMatmul {
        layout,
        experts,
        offsets: offsets_buffer,
        rows,
        n,
        k,
        a: a.rows,
        b: b.rows,
        c: c.rows,
    });
    let actual = fixture.get(c.rows.buffer);
    for (position, actual) in actual.into_iter().enumerate() {
        let (i, j) = (position / c.rows.stride, position % c.rows.stride);
        let old = c.values[position];
        let expert = match layout {
            Layout::Tn => i / k,
            Layout::Nt | Layout::Nn => offsets[1..].iter().take_while(|end| **end <= i).count(),
        };
        let what = format!("{layout:?} {dtype:?} {n} by {k} gap {gap}, expert {expert} of {experts}, [{i}, {j}]");
        if j >= n || (layout == Layout::Tn && counts[expert] == 0) {
            assert!(actual == old || (actual.is_nan() && old.is_nan()), "{what} was {old} and is {actual}");
            continue;
        }
        if spoilt == Some(expert) {
            assert!(actual.is_nan(), "{what} is {actual}");
            continue;
        }
        let sum = match layout {
            Layout::Nt => Sum::of((0..k).map(|p| a.at(i, p) * b.at(expert * n + j, p))),
            Layout::Nn => Sum::of((0..k).map(|p| a.at(i, p) * b.at(expert * k + p, j))),
            Layout::Tn => {
                let tokens = offsets[expert]..offsets[expert + 1];
                Sum::of(tokens.map(|t| a.at(t, i % k) * b.at(t, j)).chain([old]))
            }
        };
        sum.check(&what, actual, 0.0, c_type);
    }
}

#[test]
fn experts_multiply_their_own_rows_whatever_their_number() {
    let mut random = Random(83);
    let mut fixture = Fixture::new();
    for layout in LAYOUTS {
        for dtype in TYPES {
            let mut check = |counts: &[usize], size, gap| {
                let case = Grouped { layout, dtype, counts, size, gap, spoilt: None };
                check_grouped(&mut fixture, &mut random, &case);
            };
            check(&[1], (1, 1), 0);
            check(&[5, 0, 130, 1, 0, 0, 64], (72, 104), 0);
            check(&[0, 33, 3], (136, 40), 8);
            check(&[0, 0, 40, 0], (37, 45), 1);
            check(&[0, 0], (8, 8), 0);
            // more experts than a block has threads
            let many: Vec<usize> = (0..300).map(|e| e % 3 / 2 + e / 299).collect();
            check(&many, (8, 24), 0);
        }
    }
}

#[test]
fn an_experts_rows_are_seen_by_no_other_expert() {
    let mut random = Random(84);
    let mut fixture = Fixture::new();
    for layout in LAYOUTS {
        for dtype in TYPES {
            let case = Grouped { layout, dtype, counts: &[20, 7, 140], size: (40, 48), gap: 0, spoilt: Some(1) };
            check_grouped(&mut fixture, &mut random, &case);
        }
    }
}
