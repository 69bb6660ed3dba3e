//! Every product is compared with sums in f64; the bounds follow from the number formats alone.

use super::super::simd::{self, Level};
use super::*;
use half::bf16;

/// A small generator (splitmix64), so that a failing case can be named by its number.
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(super) fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// In `[-1, 1)`.
    pub(super) fn float(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    /// Mostly small; often 0 or 1, and sizes around the kernels' tiles.
    fn size(&mut self) -> usize {
        match self.below(8) {
            0 => self.below(3),
            1..=4 => self.below(40),
            5 | 6 => self.below(140),
            _ => self.below(600),
        }
    }

    pub(super) fn vector(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.float()).collect()
    }
}

/// A matrix in either format, with the f64 values it stands for.
struct Operand {
    wide: Vec<f32>,
    narrow: Vec<bf16>,
    is_narrow: bool,
    stride: usize,
}

impl Operand {
    fn new(random: &mut Random, rows: usize, columns: usize) -> Operand {
        let stride = columns + if random.below(2) == 0 { 0 } else { random.below(20) };
        // As short as allowed: nothing after the last element of the last row.
        let len = if rows == 0 || columns == 0 { 0 } else { (rows - 1) * stride + columns };
        let mut wide = random.vector(len);
        let narrow: Vec<bf16> = wide.iter().map(|&x| bf16::from_f32(x)).collect();
        let is_narrow = random.below(2) == 0;
        if is_narrow {
            wide = narrow.iter().map(|x| x.to_f32()).collect();
        }
        Operand { wide, narrow, is_narrow, stride }
    }

    fn elements(&self) -> Elements<'_> {
        if self.is_narrow { Elements::Bf16(&self.narrow) } else { Elements::F32(&self.wide) }
    }

    fn matrix(&self) -> MatRef<'_> {
        MatRef { data: self.elements(), stride: self.stride }
    }
}

/// Positions of `a[i, p]` and `b[p, j]`.
pub(super) fn positions(
    layout: Layout,
    a_stride: usize,
    b_stride: usize,
) -> (impl Fn(usize, usize) -> usize, impl Fn(usize, usize) -> usize) {
    (
        move |i, p| if layout == Layout::Tn { p * a_stride + i } else { i * a_stride + p },
        move |p, j| if layout == Layout::Nt { j * b_stride + p } else { p * b_stride + j },
    )
}

/// One random product by `kernel`.
fn random_case(case: u64, kernel: &'static Kernel) {
    let random = &mut Random(case);
    let layout = [Layout::Nt, Layout::Nn, Layout::Tn][random.below(3)];
    let (m, n, k) = (random.size(), random.size(), random.size());
    let (a_shape, b_shape) = match layout {
        Layout::Nt => ((m, k), (n, k)),
        Layout::Nn => ((m, k), (k, n)),
        Layout::Tn => ((k, m), (k, n)),
    };
    let a = Operand::new(random, a_shape.0, a_shape.1);
    let b = Operand::new(random, b_shape.0, b_shape.1);
    let before = Operand::new(random, m, n);
    let bias = Operand::new(random, 1, n);
    let (accumulate, biased) = (random.below(2) == 0, random.below(3) == 0);
    let mut wide = before.wide.clone();
    let mut narrow = before.narrow.clone();
    let data = if before.is_narrow { ElementsMut::Bf16(&mut narrow) } else { ElementsMut::F32(&mut wide) };
    let c = MatMut { data, stride: before.stride };
    let bias_elements = biased.then(|| bias.elements());
    matmul_with(kernel, layout, m, n, k, a.matrix(), b.matrix(), c, accumulate, bias_elements);
    if before.is_narrow {
        wide = narrow.iter().map(|x| x.to_f32()).collect();
    }

    // Each product and each addition rounds once, to 2^-24. Where words hold pairs, f32 operands are first rounded to
    // bf16, that is to 2^-8 each.
    let rounded = if kernel.pairs { usize::from(!a.is_narrow) + usize::from(!b.is_narrow) } else { 0 };
    let narrowing = (1.0 + 2f64.powi(-8)).powi(rounded as i32) - 1.0;
    let unit = (k as f64 + 5.0) * 2f64.powi(-24) * (1.0 + narrowing) + narrowing;
    let (at, bt) = positions(layout, a.stride, b.stride);
    for i in 0..if n == 0 { 0 } else { m } {
        for j in 0..before.stride.min(wide.len() - i * before.stride) {
            let position = i * before.stride + j;
            let (got, old) = (f64::from(wide[position]), f64::from(before.wide[position]));
            if j >= n {
                assert_eq!(got, old, "case {case}: wrote beyond the width at [{i}, {j}]");
                continue;
            }
            let (mut sum, mut size) = (0.0, 0.0);
            let mut add = |x: f64| {
                sum += x;
                size += x.abs();
            };
            (0..k).for_each(|p| add(f64::from(a.wide[at(i, p)]) * f64::from(b.wide[bt(p, j)])));
            if accumulate {
                add(old);
            }
            if biased {
                add(f64::from(bias.wide[j]));
            }
            let bound = size * unit + if before.is_narrow { (sum.abs() + size * unit) * 2f64.powi(-8) } else { 0.0 };
            assert!(
                (got - sum).abs() <= bound,
                "case {case}: {layout:?} {m}x{n}x{k} accumulate {accumulate} bias {biased}: [{i}, {j}] is {got}, not {sum} (bound {bound:e})"
            );
        }
    }
}

#[test]
fn any_layout_format_size_and_stride_is_within_the_bound() {
    for case in 0..600 {
        random_case(case, Kernel::choose(simd::level(), case % 2 == 0));
    }
}

#[test]
fn the_portable_kernel_is_within_the_bound() {
    (0..200).for_each(|case| random_case(case, &kernel::PORTABLE));
}

#[test]
fn packed_pairs_with_an_emulated_dot_product_are_within_the_bound() {
    (0..400).for_each(|case| random_case(case, &kernel::PORTABLE_PAIRS));
}

#[cfg(target_arch = "x86_64")]
#[test]
fn packed_pairs_with_vector_transposition_are_within_the_bound() {
    if simd::level() < Level::Avx2 {
        eprintln!("SKIPPED: this CPU has no AVX2");
        return;
    }
    (0..400).for_each(|case| random_case(case, &kernel::AVX2_PAIRS));
}

#[cfg(target_arch = "x86_64")]
#[test]
fn the_kernels_of_avx_512_are_within_the_bound() {
    if simd::level() < Level::Avx512 {
        eprintln!("SKIPPED: this CPU has no AVX-512");
        return;
    }
    (0..400).for_each(|case| random_case(case, &kernel::AVX512));
    if simd::level() >= Level::Avx512Bf16 {
        (0..400).for_each(|case| random_case(case, &kernel::AVX512_PAIRS));
    }
}

#[test]
fn a_row_does_not_depend_on_the_other_rows() {
    let random = &mut Random(11);
    let (m, n, k) = (333, 70, 900);
    let (a, b) = (random.vector(m * k), random.vector(n * k));
    let run = |rows: usize, first: usize| {
        let mut c = vec![0f32; rows * n];
        let a = MatRef { data: Elements::F32(&a[first * k..]), stride: k };
        let b = MatRef { data: Elements::F32(&b), stride: k };
        matmul(Layout::Nt, rows, n, k, a, b, MatMut { data: ElementsMut::F32(&mut c), stride: n }, false, None);
        c
    };
    let whole = run(m, 0);
    for (first, rows) in [(0, 1), (7, 5), (100, 64), (332, 1)] {
        assert_eq!(run(rows, first), whole[first * n..(first + rows) * n], "{rows} rows from {first}");
    }
}

#[test]
fn rounding_to_pairs_is_that_of_the_format() {
    let random = &mut Random(3);
    for _ in 0..100_000 {
        let x = f32::from_bits(random.next() as u32);
        let (ours, exact) = (pack::narrow(x), bf16::from_f32(x));
        assert!(ours == exact.to_bits() || (x.is_nan() && exact.is_nan() && bf16::from_bits(ours).is_nan()), "{x:e}");
    }
}

#[test]
fn a_small_product_is_within_the_bound_however_its_operands_lie() {
    let products = Products::new();
    for case in 0..100 {
        let random = &mut Random(case);
        let (m, n, k) = (random.size(), random.size(), random.size());
        let (a_across, b_across) = (random.below(2) == 1, random.below(2) == 1);
        let (a_stride, b_stride) = (m.max(k) + random.below(9), n.max(k) + random.below(9));
        let (a, b) = (random.vector(a_stride * m.max(k)), random.vector(b_stride * n.max(k)));
        let (a_at, _) = positions(if a_across { Layout::Tn } else { Layout::Nn }, a_stride, b_stride);
        let (_, b_at) = positions(if b_across { Layout::Nn } else { Layout::Nt }, a_stride, b_stride);
        let before = random.vector(m * (n + 3));
        let mut words = vec![f32::NAN; products.right_words(n, k)];
        let source = |x, stride| MatRef { data: Elements::F32(x), stride };
        let right = products.pack_right(source(&b, b_stride), !b_across, n, k, &mut words);
        let mut left_words = vec![f32::NAN; products.left_words(m, k)];
        let packed = products.pack_left(source(&a, a_stride), !a_across, m, k, &mut left_words);
        for left in [packed, products.left(&a, a_stride, a_across)] {
            // All of it, and from a later step and panel on.
            let (column, step) = (n / 2 / products.columns() * products.columns(), k / 3);
            for (columns, steps) in [(0, 0), (column, 0), (0, step)] {
                for accumulate in [false, true] {
                    let (n_left, k_left) = (n - columns, k - steps);
                    let left = left.from_step(steps);
                    let right = right.from_column(columns).from_step(steps);
                    let mut c = before.clone();
                    products.multiply((m, n_left, k_left), left, right, (&mut c, n + 3), accumulate);
                    for (position, &got) in c.iter().enumerate() {
                        let (i, j) = (position / (n + 3), position % (n + 3));
                        let old = f64::from(before[position]);
                        if j >= n_left {
                            assert_eq!(f64::from(got), old);
                            continue;
                        }
                        let start = if accumulate { (old, old.abs()) } else { (0.0, 0.0) };
                        let (sum, size) = (steps..k)
                            .map(|p| f64::from(a[a_at(i, p)]) * f64::from(b[b_at(p, columns + j)]))
                            .fold(start, |(sum, size), x| (sum + x, size + x.abs()));
                        let bound = size * (k as f64 + 4.0) * 2f64.powi(-24);
                        assert!(
                            (f64::from(got) - sum).abs() <= bound,
                            "case {case}: {m}x{n}x{k} from {columns}, {steps}: [{i}, {j}] is {got}, not {sum}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
#[should_panic(expected = "does not lie in")]
fn a_small_product_reads_nothing_beyond_its_operands() {
    let products = Products::new();
    let words = vec![0.0; products.right_words(1, 8)];
    let (left, right) = (products.left(&[0.0; 7], 8, false), products.right(&words, 8));
    products.multiply((1, 1, 8), left, right, (&mut [0.0], 1), false);
}

#[test]
fn bits_do_not_depend_on_the_number_of_threads() {
    let random = &mut Random(7);
    for (m, n, k) in [(300, 200, 700), (1, 900, 300), (700, 1, 900), (64, 64, 2000), (515, 333, 129)] {
        for layout in [Layout::Nt, Layout::Nn, Layout::Tn] {
            let side = m.max(n).max(k);
            let (a, b) = (random.vector(side * side), random.vector(side * side));
            let run = |threads: usize| {
                let mut c = vec![0f32; m * n];
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let (a, b) = (Elements::F32(&a), Elements::F32(&b));
                let (a, b) = (MatRef { data: a, stride: side }, MatRef { data: b, stride: side });
                pool.install(|| {
                    matmul(layout, m, n, k, a, b, MatMut { data: ElementsMut::F32(&mut c), stride: n }, false, None)
                });
                c.iter().map(|x| x.to_bits()).collect::<Vec<u32>>()
            };
            let one = run(1);
            assert!([2, 3, 5].into_iter().all(|threads| run(threads) == one), "{layout:?} {m}x{n}x{k}");
        }
    }
}
