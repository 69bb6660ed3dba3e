//! Per-head norm and rotary embedding.

use super::*;
use crate::backend::{Angles, Heads, NormRope, NormWeight};

struct Case {
    heads: Heads,
    /// Elements of a head that are rotated.
    rotary: usize,
    tokens: usize,
    /// Added to the norms' weights.
    offset: f64,
    /// Whether a token has three rows of the tables, of which the columns take turns.
    axes: bool,
    norm: Option<(Vec<f64>, Vec<f64>)>,
    cos: Vec<f64>,
    sin: Vec<f64>,
    qkv: Vec<f64>,
}

const EPSILON: f32 = 1e-6;

impl Case {
    fn new(random: &mut Random, dtype: DType, heads: Heads, tokens: usize, norm: bool) -> Case {
        Case::partial(random, dtype, heads, heads.dim, tokens, norm)
    }

    fn partial(random: &mut Random, dtype: DType, heads: Heads, rotary: usize, tokens: usize, norm: bool) -> Case {
        let half = rotary / 2;
        let angles: Vec<f64> = (0..tokens * half).map(|_| 3.0 * random.value()).collect();
        Case {
            heads,
            rotary,
            tokens,
            offset: 0.0,
            axes: false,
            norm: norm.then(|| (random.values(heads.dim, dtype), random.values(heads.dim, dtype))),
            cos: angles.iter().map(|x| round(x.cos(), DType::F32)).collect(),
            sin: angles.iter().map(|x| round(x.sin(), DType::F32)).collect(),
            qkv: random.values(tokens * (heads.query + 2 * heads.key_value) * heads.dim, dtype),
        }
    }

    fn reference(&self, qkv: &[f64], norm: Option<(&[f64], &[f64])>) -> Vec<f64> {
        let Heads { query, key_value, dim } = self.heads;
        let half = self.rotary / 2;
        let mut out = Vec::new();
        for (t, row) in qkv.chunks((query + 2 * key_value) * dim).enumerate() {
            for (head, x) in row.chunks(dim).take(query + key_value).enumerate() {
                let x = match norm {
                    Some((of_queries, of_keys)) => {
                        let weight = if head < query { of_queries } else { of_keys };
                        super::norm::reference(x, &self.whole(weight), f64::from(EPSILON))
                    }
                    None => x.to_vec(),
                };
                let (cos, sin) = (&self.cos[t * half..], &self.sin[t * half..]);
                out.extend((0..half).map(|i| x[i] * cos[i] - x[i + half] * sin[i]));
                out.extend((0..half).map(|i| x[i + half] * cos[i] + x[i] * sin[i]));
                out.extend(&x[2 * half..]);
            }
        }
        out
    }

    /// The gradients of `qkv` and of the weights of the norms of queries and keys (zero where there are none), for `d`
    /// laid out as `qkv`.
    fn gradients(&self, d: &[f64]) -> (Vec<f64>, [Vec<f64>; 2]) {
        let Heads { query, key_value, dim } = self.heads;
        let (half, width) = (self.rotary / 2, (query + 2 * key_value) * dim);
        let mut d_qkv = d.to_vec();
        let mut d_norm = [vec![0.0; dim], vec![0.0; dim]];
        for (t, (row, d)) in self.qkv.chunks(width).zip(d_qkv.chunks_mut(width)).enumerate() {
            let (cos, sin) = (&self.cos[t * half..], &self.sin[t * half..]);
            for (head, (x, d)) in row.chunks(dim).zip(d.chunks_mut(dim)).take(query + key_value).enumerate() {
                for i in 0..half {
                    let (low, high) = (d[i], d[i + half]);
                    d[i] = low * cos[i] + high * sin[i];
                    d[i + half] = high * cos[i] - low * sin[i];
                }
                let Some((of_queries, of_keys)) = &self.norm else { continue };
                let keys = usize::from(head >= query);
                let weight = [of_queries, of_keys][keys];
                let (d_x, d_weight) = super::norm::gradients(x, &self.whole(weight), d, f64::from(EPSILON));
                d.copy_from_slice(&d_x);
                d_norm[keys] = sum(&d_norm[keys], &d_weight);
            }
        }
        (d_qkv, d_norm)
    }

    /// What a norm multiplies by.
    fn whole(&self, weight: &[f64]) -> Vec<f64> {
        weight.iter().map(|weight| weight + self.offset).collect()
    }

    fn norms(&self) -> Option<(&[f64], &[f64])> {
        self.norm.as_ref().map(|(query, key)| (&query[..], &key[..]))
    }

    fn op(&self, fixture: &mut Fixture, dtype: DType) -> NormRope {
        let mut put = |weight| NormWeight { weight: fixture.put(weight, dtype), offset: self.offset as f32 };
        let norm = self.norms().map(|(query, key)| (put(query), put(key), EPSILON));
        NormRope { heads: self.heads, rotary: self.rotary, tokens: self.tokens, norm, angles: self.angles(fixture) }
    }

    /// Tables whose rows are not in the tokens' order, and hold no number where no token reads them.
    fn angles(&self, fixture: &mut Fixture) -> Angles {
        let half = self.rotary / 2;
        let rows = if self.axes { 3 * self.tokens } else { self.tokens };
        let axis = |column: usize| if self.axes { column % 3 } else { 0 };
        let row = |axis: usize, token: usize| rows - (axis * self.tokens + token);
        let mut table = |values: &[f64]| {
            let mut table = vec![f64::NAN; (rows + 1) * half];
            for (i, value) in values.iter().enumerate() {
                let (token, column) = (i / half, i % half);
                table[row(axis(column), token) * half + column] = *value;
            }
            fixture.put(&table, DType::F32)
        };
        let (cos, sin) = (table(&self.cos), table(&self.sin));
        let rows = fixture.ints(&(1..=rows).rev().collect::<Vec<_>>());
        let axes = self.axes.then(|| fixture.ints(&(0..half).map(axis).collect::<Vec<_>>()));
        Angles { cos, sin, rows, axes }
    }
}

/// Query heads, key heads, their size, tokens.
const CASES: [(usize, usize, usize, usize); 8] = [
    (1, 1, 2, 1),
    (2, 1, 6, 5),
    (3, 1, 16, 4),
    (4, 2, 64, 3),
    (3, 3, 128, 1),
    (8, 4, 64, 70),
    (7, 1, 128, 40),
    (5, 1, 80, 9),
];

fn cases(random: &mut Random, dtype: DType) -> Vec<Case> {
    let mut cases = Vec::new();
    for (query, key_value, dim, tokens) in CASES {
        for norm in [false, true] {
            let case = Case::new(random, dtype, Heads { query, key_value, dim }, tokens, norm);
            cases.push(Case { axes: (cases.len() / 2).is_multiple_of(2) == norm, ..case });
        }
    }
    cases
}

#[test]
fn forward_is_the_reference() {
    let mut random = Random(4);
    for dtype in TYPES {
        for case in cases(&mut random, dtype) {
            let mut fixture = Fixture::new();
            let op = case.op(&mut fixture, dtype);
            let expected = case.reference(&case.qkv, case.norms());
            let (qkv, qk) = (fixture.put(&case.qkv, dtype), fixture.poisoned(expected.len(), dtype));
            fixture.backend.norm_rope(&op, qkv, qk);
            assert_close("qk", &fixture.get(qk), &expected, bound(dtype, 5.0));
        }
    }
}

#[test]
fn backward_is_the_derivative() {
    let mut random = Random(5);
    for dtype in TYPES {
        for case in cases(&mut random, dtype).into_iter().filter(|case| case.tokens < 6) {
            let Heads { query, key_value, dim } = case.heads;
            let (width, rotated) = ((query + 2 * key_value) * dim, (query + key_value) * dim);
            let d = random.values(case.qkv.len(), dtype);
            let d_qk: Vec<f64> = d.chunks(width).flat_map(|d| d[..rotated].to_vec()).collect();
            // Each token's gradient depends on that token alone; the columns of the values are left as they are.
            let full = differences(&case.qkv, |qkv| inner(&case.reference(qkv, case.norms()), &d_qk));
            let expected: Vec<f64> =
                full.iter().zip(&d).enumerate().map(|(i, (f, d))| if i % width < rotated { *f } else { *d }).collect();
            let (same, [same_query, same_key]) = case.gradients(&d);
            assert_close("the formula's d_qkv", &same, &expected, 1e-7);

            let mut fixture = Fixture::new();
            let op = case.op(&mut fixture, dtype);
            let (qkv, d_qkv) = (fixture.put(&case.qkv, dtype), fixture.put(&d, dtype));
            let before = random.values(dim, DType::F32);
            let d_norm =
                case.norm.is_some().then(|| (fixture.put(&before, DType::F32), fixture.put(&before, DType::F32)));
            fixture.backend.norm_rope_backward(&op, qkv, d_qkv, d_norm);
            assert_close("d_qkv", &fixture.get(d_qkv), &expected, bound(dtype, 10.0));
            if let (Some((of_queries, of_keys)), Some((query, key))) = (case.norms(), d_norm) {
                let expected =
                    differences(of_queries, |w| inner(&case.reference(&case.qkv, Some((w, of_keys))), &d_qk));
                assert_close("the formula's d_norm of queries", &same_query, &expected, 1e-7);
                assert_close("d_norm of queries", &fixture.get(query), &sum(&before, &expected), 2e-6);
                let expected =
                    differences(of_keys, |w| inner(&case.reference(&case.qkv, Some((of_queries, w))), &d_qk));
                assert_close("the formula's d_norm of keys", &same_key, &expected, 1e-7);
                assert_close("d_norm of keys", &fixture.get(key), &sum(&before, &expected), 2e-6);
            }
        }
    }
}

#[test]
fn backward_goes_over_many_heads_of_all_sizes_and_alignments() {
    let mut random = Random(11);
    for dtype in TYPES {
        let mut cases = cases(&mut random, dtype);
        cases.push(Case::new(&mut random, dtype, Heads { query: 5, key_value: 2, dim: 34 }, 61, true));
        cases.push(Case::new(&mut random, dtype, Heads { query: 2, key_value: 1, dim: 256 }, 5, true));
        cases.push(Case::new(&mut random, dtype, Heads { query: 2, key_value: 1, dim: 64 }, 0, true));
        for case in cases {
            for aligned in [true, false] {
                let d = random.values(case.qkv.len(), dtype);
                let (expected, [of_queries, of_keys]) = case.gradients(&d);
                let expected_qk = case.reference(&case.qkv, case.norms());
                let mut fixture = Fixture::new();
                let op = case.op(&mut fixture, dtype);
                let d_qkv = fixture.put(&d, dtype);
                let (qkv, d_qkv) = if aligned {
                    (fixture.put(&case.qkv, dtype), d_qkv)
                } else {
                    (fixture.put_unaligned(&case.qkv, dtype), fixture.put_unaligned(&d, dtype))
                };
                let qk = fixture.poisoned(expected_qk.len(), dtype);
                fixture.backend.norm_rope(&op, qkv, qk);
                assert_close("qk", &fixture.get(qk), &expected_qk, bound(dtype, 5.0));
                let before = random.values(case.heads.dim, DType::F32);
                let d_norm =
                    case.norm.is_some().then(|| (fixture.put(&before, DType::F32), fixture.put(&before, DType::F32)));
                fixture.backend.norm_rope_backward(&op, qkv, d_qkv, d_norm);
                assert_close("d_qkv", &fixture.get(d_qkv), &expected, bound(dtype, 10.0));
                if let Some((query, key)) = d_norm {
                    assert_close("d_norm of queries", &fixture.get(query), &sum(&before, &of_queries), 2e-6);
                    assert_close("d_norm of keys", &fixture.get(key), &sum(&before, &of_keys), 2e-6);
                }
            }
        }
    }
}

#[test]
fn a_part_of_a_head_is_rotated_and_the_rest_passes() {
    let mut random = Random(12);
    for dtype in TYPES {
        for (query, key_value, dim, rotary, tokens) in
            // With packs of the rest and without; a quarter of 256, as the hybrid families have.
            [(2, 1, 8, 2, 5), (4, 2, 64, 16, 9), (3, 1, 16, 0, 3), (2, 2, 6, 6, 4), (2, 1, 256, 64, 2)]
        {
            for (norm, offset) in [(false, 0.0), (true, 0.0), (true, 1.0)] {
                let mut fixture = Fixture::new();
                let heads = Heads { query, key_value, dim };
                let case = Case { offset, ..Case::partial(&mut random, dtype, heads, rotary, tokens, norm) };
                let d = random.values(case.qkv.len(), dtype);
                let (expected, [of_queries, of_keys]) = case.gradients(&d);
                let (width, rotated) = ((query + 2 * key_value) * dim, (query + key_value) * dim);
                let d_qk: Vec<f64> = d.chunks(width).flat_map(|d| d[..rotated].to_vec()).collect();
                let places = || (0..d.len()).step_by((d.len() / 100) | 1);
                let slopes =
                    differences_at(&case.qkv, places(), |qkv| inner(&case.reference(qkv, case.norms()), &d_qk));
                let same = places().zip(slopes).map(|(i, slope)| if i % width < rotated { slope } else { d[i] });
                let formula: Vec<f64> = places().map(|i| expected[i]).collect();
                assert_close("the formula's d_qkv", &formula, &same.collect::<Vec<_>>(), 1e-7);

                let op = case.op(&mut fixture, dtype);
                let expected_qk = case.reference(&case.qkv, case.norms());
                let (qkv, qk) = (fixture.put(&case.qkv, dtype), fixture.poisoned(expected_qk.len(), dtype));
                fixture.backend.norm_rope(&op, qkv, qk);
                assert_close("qk", &fixture.get(qk), &expected_qk, bound(dtype, 5.0));
                let (d_qkv, zeros) = (fixture.put(&d, dtype), vec![0.0; dim]);
                let d_norm = norm.then(|| (fixture.put(&zeros, DType::F32), fixture.put(&zeros, DType::F32)));
                fixture.backend.norm_rope_backward(&op, qkv, d_qkv, d_norm);
                assert_close("d_qkv", &fixture.get(d_qkv), &expected, bound(dtype, 10.0));
                if let Some((query, key)) = d_norm {
                    assert_close("d_norm of queries", &fixture.get(query), &of_queries, 2e-6);
                    assert_close("d_norm of keys", &fixture.get(key), &of_keys, 2e-6);
                }
            }
        }
    }
}
