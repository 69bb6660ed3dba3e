//! Adapters inside a product against the products one after the other.

use std::ops::Range;

use super::low_rank::{Addition, Factor, LowRank, Projection};
use super::tests::Random;
use super::{Elements, ElementsMut, MatMut, MatRef, Matrix, matmul, matmul_low_rank, takes_low_rank};
use crate::backend::Layout;

struct Case {
    layout: Layout,
    n: usize,
    k: usize,
    /// Rank and columns of adapters side by side: of `c` (`Nt`) or of `a` (`Nn`).
    parts: Vec<(usize, Range<usize>)>,
}

fn plain(data: &[f32], stride: usize) -> MatRef<'_> {
    MatRef { data: Elements::F32(data), stride }
}

fn result(data: &mut [f32], stride: usize) -> MatMut<'_> {
    MatMut { data: ElementsMut::F32(data), stride }
}

impl Case {
    fn rank(&self) -> usize {
        self.parts.iter().map(|(rank, _)| rank).sum()
    }

    /// The factor that all parts share, and each part's own.
    fn factors(&self, random: &mut Random) -> (Vec<f32>, Vec<Vec<f32>>) {
        let shared = if self.layout == Layout::Nt { self.k } else { self.n };
        (
            random.vector(self.rank() * shared),
            self.parts.iter().map(|(rank, of)| random.vector(rank * of.len())).collect(),
        )
    }

    /// `c` and `low`.
    fn run(&self, a: &[f32], b: &[f32], c: &[f32], (shared, own): &(Vec<f32>, Vec<Vec<f32>>)) -> (Vec<f32>, Vec<f32>) {
        let (m, rank) = (a.len() / self.k, self.rank());
        let (along, width) = if self.layout == Layout::Nt { (true, self.k) } else { (false, self.n) };
        let mut at = 0;
        let places: Vec<(Range<usize>, Range<usize>, Factor<'_>)> = self
            .parts
            .iter()
            .zip(own)
            .map(|((rank, of), values)| {
                at += rank;
                (of.clone(), at - rank..at, Factor { matrix: plain(values, *rank), along })
            })
            .collect();
        let whole = Factor { matrix: plain(shared, width), along };
        let (projections, additions) = if along {
            (vec![(0..self.k, 0..rank, whole)], places)
        } else {
            (places, vec![(0..self.n, 0..rank, whole)])
        };
        let projections: Vec<_> =
            projections.into_iter().map(|(k, low, b)| Projection { k, at: low.start, columns: low.len(), b }).collect();
        let additions: Vec<_> = additions.into_iter().map(|(columns, low, b)| Addition { columns, low, b }).collect();
        assert!(takes_low_rank(self.n, self.k, additions.iter().map(|part| part.columns.clone())));
        let (mut c, mut low) = (c.to_vec(), vec![f32::NAN; m * rank]);
        let mut low_rank =
            LowRank { low: &mut low, rank, factor: 0.75, projections: &projections, additions: &additions };
        let right = Matrix::Plain(plain(b, width));
        matmul_low_rank(
            self.layout,
            m,
            self.n,
            self.k,
            plain(a, self.k),
            right,
            result(&mut c, self.n),
            true,
            None,
            Some(&mut low_rank),
        );
        (c, low)
    }

    /// The same by products one after the other.
    fn apart(
        &self,
        a: &[f32],
        b: &[f32],
        c: &[f32],
        (shared, own): &(Vec<f32>, Vec<Vec<f32>>),
    ) -> (Vec<f32>, Vec<f32>) {
        let (m, rank) = (a.len() / self.k, self.rank());
        let (mut c, mut low) = (c.to_vec(), vec![0f32; m * rank]);
        let (n, k, layout) = (self.n, self.k, self.layout);
        let width = if layout == Layout::Nt { k } else { n };
        matmul(layout, m, n, k, plain(a, k), plain(b, width), result(&mut c, n), true, None);
        let mut at = 0;
        for ((part, of), values) in self.parts.iter().zip(own) {
            if layout == Layout::Nn {
                let low = result(&mut low[at..], rank);
                matmul(layout, m, *part, of.len(), plain(&a[of.start..], k), plain(values, *part), low, false, None);
            }
            at += part;
        }
        if layout == Layout::Nt {
            matmul(layout, m, rank, k, plain(a, k), plain(shared, k), result(&mut low, rank), false, None);
        }
        low.iter_mut().for_each(|x| *x *= 0.75);
        if layout == Layout::Nn {
            matmul(layout, m, n, rank, plain(&low, rank), plain(shared, n), result(&mut c, n), true, None);
            return (c, low);
        }
        let mut at = 0;
        for ((part, of), values) in self.parts.iter().zip(own) {
            let c = result(&mut c[of.start..], n);
            matmul(layout, m, of.len(), *part, plain(&low[at..], rank), plain(values, *part), c, true, None);
            at += part;
        }
        (c, low)
    }
}

#[test]
fn a_product_with_adapters_is_the_products_one_after_the_other() {
    let mut random = Random(97);
    let whole = |rank: usize, n: usize| vec![(rank, 0..n)];
    let cases = [
        (Layout::Nt, 96, 70, whole(8, 96)),
        (Layout::Nt, 500, 600, vec![(16, 0..256), (3, 320..500)]),
        (Layout::Nt, 1500, 1100, vec![(16, 0..1024), (16, 1024..1280), (16, 1280..1500)]),
        (Layout::Nn, 70, 96, whole(8, 96)),
        (Layout::Nn, 300, 700, vec![(16, 0..250), (3, 250..257), (5, 400..700)]),
        (Layout::Nn, 1100, 3000, vec![(16, 0..1500), (16, 1500..3000)]),
    ];
    for (layout, n, k, parts) in cases {
        let case = Case { layout, n, k, parts };
        for m in [1, 13, 250] {
            let (a, b, c) = (random.vector(m * k), random.vector(n * k), random.vector(m * n));
            let factors = case.factors(&mut random);
            let (actual, low) = case.run(&a, &b, &c, &factors);
            let (expected, expected_low) = case.apart(&a, &b, &c, &factors);
            let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
            for (what, actual, expected) in [("c", &actual, &expected), ("low", &low, &expected_low)] {
                let error = norm(&mut actual.iter().zip(expected).map(|(a, b)| a - b));
                let share = error / norm(&mut expected.iter().copied());
                assert!(share < 1e-6, "{layout:?} {m}x{n}x{k}: {what} differs by {share}");
            }
            // The bits of a row do not depend on the other rows.
            let (alone, low_alone) = case.run(&a[(m - 1) * k..], &b, &c[(m - 1) * n..], &factors);
            assert_eq!(alone, actual[(m - 1) * n..], "{layout:?} {m}x{n}x{k}: a row alone");
            assert_eq!(low_alone, low[(m - 1) * case.rank()..]);
        }
    }
}

#[test]
fn gradients_of_small_factors_are_within_the_bound() {
    let mut random = Random(98);
    // One factor's rows are far apart in memory, on either side; several blocks of `k`, whole and not.
    for (m, n, k) in [(16, 700, 100), (700, 20, 70), (3, 513, 33), (600, 64, 1)] {
        let (a, b) = (random.vector(k * m), random.vector(k * n));
        let before = random.vector(m * n);
        for accumulate in [false, true] {
            let mut c = before.clone();
            matmul(Layout::Tn, m, n, k, plain(&a, m), plain(&b, n), result(&mut c, n), accumulate, None);
            for (at, &c) in c.iter().enumerate() {
                let products = (0..k).map(|p| f64::from(a[p * m + at / n]) * f64::from(b[p * n + at % n]));
                let terms: Vec<f64> = products.chain(accumulate.then(|| f64::from(before[at]))).collect();
                let (sum, size): (f64, f64) = (terms.iter().sum(), terms.iter().map(|term| term.abs()).sum());
                let bound = (k as f64 + 2.0) * 2f64.powi(-24) * size;
                assert!((f64::from(c) - sum).abs() <= bound, "{m}x{n}x{k} at {at}: {c}, not {sum}");
            }
        }
    }
}
