//! Attention: forward, backward and with a cache.

use super::*;
use crate::backend::{Attention, DeviceKind, Heads, Sequences};

#[derive(Debug)]
pub(super) struct Case {
    pub(super) heads: Heads,
    pub(super) bounds: Vec<usize>,
    pub(super) causal: bool,
    pub(super) window: Option<usize>,
}

struct Forward {
    out: Vec<f64>,
    log_sum_exp: Vec<f64>,
}

impl Case {
    fn tokens(&self) -> usize {
        self.bounds[self.bounds.len() - 1]
    }

    fn scale(&self) -> f32 {
        1.0 / (self.heads.dim as f32).sqrt()
    }

    /// The keys that query `i` of the sequence `bounds` sees.
    fn seen(&self, bounds: &[usize], i: usize) -> std::ops::Range<usize> {
        if !self.causal {
            return bounds[0]..bounds[1];
        }
        bounds[0].max((i + 1).saturating_sub(self.window.unwrap_or(usize::MAX)))..i + 1
    }

    /// From `qkv`, queries, keys and values side by side.
    fn reference(&self, qkv: &[f64]) -> Forward {
        let Heads { query, key_value, dim } = self.heads;
        let (width, tokens, scale) = ((query + 2 * key_value) * dim, self.tokens(), f64::from(self.scale()));
        let mut out = vec![0.0; tokens * query * dim];
        let mut log_sum_exp = vec![0.0; query * tokens];
        for bounds in self.bounds.windows(2) {
            for i in bounds[0]..bounds[1] {
                for head in 0..query {
                    let key_head = query + head / (query / key_value);
                    let seen = self.seen(bounds, i);
                    let part = |t: usize, head: usize| &qkv[t * width + head * dim..][..dim];
                    let scores: Vec<f64> =
                        seen.clone().map(|j| (scale * inner(part(i, head), part(j, key_head))).exp()).collect();
                    let total: f64 = scores.iter().sum();
                    log_sum_exp[head * tokens + i] = total.ln();
                    for (j, score) in seen.zip(scores) {
                        for (x, value) in part(j, key_head + key_value).iter().enumerate() {
                            out[(i * query + head) * dim + x] += score / total * value;
                        }
                    }
                }
            }
        }
        Forward { out, log_sum_exp }
    }

    /// The operation on `qkv`, with outputs of their own.
    pub(super) fn op(&self, fixture: &mut Fixture, qkv: Buffer) -> Attention {
        let Heads { query, key_value, dim } = self.heads;
        let (width, tokens) = ((query + 2 * key_value) * dim, self.tokens());
        let part = |head: usize| rows(qkv.slice(head.min(query + 2 * key_value) * dim, qkv.len - head * dim), width);
        let empty = tokens == 0;
        let part = |head: usize| if empty { rows(qkv, width) } else { part(head) };
        Attention {
            heads: self.heads,
            sequences: Sequences {
                cu_seqlens: fixture.ints(&self.bounds),
                count: self.bounds.len() - 1,
                max_len: self.bounds.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(0),
            },
            causal: self.causal,
            window: self.window,
            scale: self.scale(),
            q: part(0),
            k: part(query),
            v: part(query + key_value),
            out: rows(fixture.poisoned(tokens * query * dim, qkv.dtype), query * dim),
            log_sum_exp: fixture.poisoned(query * tokens, DType::F32),
        }
    }
}

/// In f32, sums of some hundred terms; in 16 bits, the rounding of the probabilities' inputs and of the result, which
/// with the three more bits of f16 is an eighth of bf16's.
fn forward_bound(dtype: DType) -> f64 {
    match dtype {
        DType::Bf16 => 0.012,
        DType::F16 => 0.012 / 8.0,
        _ => 3e-6,
    }
}

/// As [`forward_bound`]; the difference `d_out . v - d_out . out` cancels.
fn backward_bound(dtype: DType) -> f64 {
    match dtype {
        DType::Bf16 => 0.03,
        DType::F16 => 0.03 / 8.0,
        _ => 1e-5,
    }
}

fn case(query: usize, key_value: usize, dim: usize, bounds: &[usize], window: Option<usize>) -> Case {
    Case { heads: Heads { query, key_value, dim }, bounds: bounds.to_vec(), causal: true, window }
}

/// Attention of whole sequences, as in vision towers.
pub(super) fn full(query: usize, key_value: usize, dim: usize, bounds: &[usize]) -> Case {
    Case { causal: false, ..case(query, key_value, dim, bounds, None) }
}

/// Ragged, packed, grouped and windowed.
pub(super) fn cases() -> Vec<Case> {
    vec![
        case(1, 1, 2, &[0, 1], None),
        case(1, 1, 2, &[0, 0], None),
        case(2, 1, 4, &[0, 0, 3, 3, 8], None),
        case(2, 2, 6, &[0, 9], Some(1)),
        case(4, 2, 8, &[0, 5, 6, 19], Some(4)),
        case(3, 1, 16, &[0, 1, 2, 3], None),
        case(4, 4, 128, &[0, 7], None),
        case(6, 2, 64, &[0, 11], Some(100)),
        full(1, 1, 2, &[0, 1]),
        full(2, 1, 4, &[0, 0, 3, 3, 8]),
        full(4, 2, 8, &[0, 5, 6, 19]),
        full(1, 1, 72, &[0, 5]),
        case(2, 1, 256, &[0, 0, 2, 5], Some(2)),
    ]
}

/// Long enough for several tiles of queries and keys.
fn long_cases() -> Vec<Case> {
    vec![
        case(2, 1, 64, &[0, 300, 301, 555], None),
        case(1, 1, 32, &[0, 513], Some(65)),
        case(2, 2, 16, &[0, 257], Some(256)),
        case(3, 1, 80, &[0, 63, 127, 192, 320], None),
        case(1, 1, 128, &[0, 129], Some(64)),
        full(2, 2, 8, &[0, 300, 301, 555]),
        full(2, 2, 32, &[0, 48, 96, 192, 290]),
        full(1, 1, 16, &[0, 600]),
    ]
}

/// The head sizes of tensor cores: sequences that end before, with and after a tile, empty ones, windows that begin within
/// a tile, one to eight query heads a key head.
fn tile_cases() -> Vec<Case> {
    vec![
        case(1, 1, 64, &[0, 1, 1, 64, 128, 193, 323], None),
        case(2, 1, 128, &[0, 130, 130, 131, 194], None),
        case(4, 1, 64, &[0, 65, 215], Some(70)),
        case(8, 1, 128, &[0, 67], Some(33)),
        case(4, 2, 128, &[0, 0, 63, 128, 128], Some(1)),
        case(2, 2, 64, &[0, 200], Some(129)),
        case(2, 1, 72, &[0, 70, 71, 200], None),
        case(2, 2, 80, &[0, 130], Some(70)),
        full(2, 2, 72, &[0, 64, 64, 65, 193, 260]),
        full(1, 1, 72, &[0, 257]),
        full(2, 2, 80, &[0, 31, 97, 225]),
        full(2, 1, 64, &[0, 1, 65, 195]),
        full(2, 1, 128, &[0, 130, 130, 200]),
        case(2, 1, 256, &[0, 129, 129, 130, 170], Some(70)),
        case(1, 1, 256, &[0, 101], None),
        full(2, 1, 256, &[0, 33, 33, 98]),
    ]
}

#[test]
fn forward_is_the_reference() {
    let mut random = Random(8);
    for dtype in TYPES {
        for case in cases().into_iter().chain(long_cases()).chain(tile_cases()) {
            let Heads { query, key_value, dim } = case.heads;
            let qkv = random.values(case.tokens() * (query + 2 * key_value) * dim, dtype);
            let expected = case.reference(&qkv);
            let mut fixture = Fixture::new();
            let qkv = fixture.put(&qkv, dtype);
            let op = case.op(&mut fixture, qkv);
            fixture.backend.attention(&op);
            let out = format!("out of {case:?} in {dtype:?}");
            assert_close(&out, &fixture.get(op.out.buffer), &expected.out, forward_bound(dtype));
            assert_close("log_sum_exp", &fixture.get(op.log_sum_exp), &expected.log_sum_exp, 2e-6);
        }
    }
}

#[test]
fn great_scores_do_not_overflow() {
    let case = case(1, 1, 64, &[0, 200], None);
    let mut random = Random(9);
    // Beside arithmetic in f32, the rounding of the probabilities and that of the result.
    for (dtype, room) in [(DType::F32, 1e-5), (DType::Bf16, 2.0 / 256.0), (DType::F16, 2.0 / 2048.0)] {
        let qkv: Vec<f64> = random.values(200 * 192, dtype).iter().map(|x| round(20.0 * x, dtype)).collect();
        let mut fixture = Fixture::new();
        let qkv_buffer = fixture.put(&qkv, dtype);
        let op = case.op(&mut fixture, qkv_buffer);
        fixture.backend.attention(&op);
        // The reference takes exponentials of scores of some 10^3 in f64, which overflow: shift by scaling is not needed
        // for this check, as a softmax so sharp is finite and its rows are convex sums of the values.
        let out = fixture.get(op.out.buffer);
        let greatest = qkv.iter().fold(0.0_f64, |a, b| a.max(b.abs()));
        assert!(out.iter().all(|x| x.is_finite() && x.abs() <= greatest * (1.0 + room)));
        assert!(fixture.get(op.log_sum_exp).iter().all(|x| x.is_finite()));
    }
}

fn backward(fixture: &mut Fixture, case: &Case, qkv: Buffer, d_out: &[f64]) -> Buffer {
    let op = case.op(fixture, qkv);
    fixture.backend.attention(&op);
    let d_out = fixture.put(d_out, qkv.dtype);
    let (d_qkv, scratch) = (
        fixture.poisoned(qkv.len, qkv.dtype),
        fixture.poisoned(DeviceKind::Cpu.attention_scratch(case.heads, case.tokens()), DType::F32),
    );
    fixture.backend.attention_backward(&op, rows(d_out, case.heads.query * case.heads.dim), d_qkv, scratch);
    d_qkv
}

#[test]
fn backward_is_the_derivative() {
    let mut random = Random(10);
    for dtype in TYPES {
        for case in cases() {
            let Heads { query, key_value, dim } = case.heads;
            let qkv = random.values(case.tokens() * (query + 2 * key_value) * dim, dtype);
            let d_out = random.values(case.tokens() * query * dim, dtype);
            let expected = analytic(&case, &qkv, &d_out);
            // Differences of one element each take long: some 100 of them, at every place of a head.
            let places = || (0..qkv.len()).step_by((qkv.len() / 100) | 1);
            let slopes = differences_at(&qkv, places(), |qkv| inner(&case.reference(qkv).out, &d_out));
            assert_close("the chain rule", &places().map(|i| expected[i]).collect::<Vec<_>>(), &slopes, 1e-7);
            let mut fixture = Fixture::new();
            let qkv = fixture.put(&qkv, dtype);
            let d_qkv = backward(&mut fixture, &case, qkv, &d_out);
            assert_close("d_qkv", &fixture.get(d_qkv), &expected, backward_bound(dtype));
        }
    }
}

/// The gradient by the chain rule in f64, for lengths at which differences take too long.
fn analytic(case: &Case, qkv: &[f64], d_out: &[f64]) -> Vec<f64> {
    let Heads { query, key_value, dim } = case.heads;
    let (width, tokens, scale) = ((query + 2 * key_value) * dim, case.tokens(), f64::from(case.scale()));
    let forward = case.reference(qkv);
    let mut d_qkv = vec![0.0; qkv.len()];
    for bounds in case.bounds.windows(2) {
        for i in bounds[0]..bounds[1] {
            for head in 0..query {
                let key_head = query + head / (query / key_value);
                let at = |t: usize, head: usize| t * width + head * dim;
                let d = &d_out[(i * query + head) * dim..][..dim];
                let delta = inner(d, &forward.out[(i * query + head) * dim..][..dim]);
                for j in case.seen(bounds, i) {
                    let (q, k, v) = (at(i, head), at(j, key_head), at(j, key_head + key_value));
                    let score = scale * inner(&qkv[q..q + dim], &qkv[k..k + dim]);
                    let p = (score - forward.log_sum_exp[head * tokens + i]).exp();
                    let d_score = scale * p * (inner(d, &qkv[v..v + dim]) - delta);
                    for x in 0..dim {
                        d_qkv[q + x] += d_score * qkv[k + x];
                        d_qkv[k + x] += d_score * qkv[q + x];
                        d_qkv[v + x] += p * d[x];
                    }
                }
            }
        }
    }
    d_qkv
}

#[test]
fn backward_over_several_tiles_is_the_chain_rule() {
    let mut random = Random(11);
    for case in long_cases().into_iter().chain(tile_cases()) {
        let Heads { query, key_value, dim } = case.heads;
        for dtype in TYPES {
            let qkv = random.values(case.tokens() * (query + 2 * key_value) * dim, dtype);
            let d_out = random.values(case.tokens() * query * dim, dtype);
            let expected = analytic(&case, &qkv, &d_out);
            let mut fixture = Fixture::new();
            let qkv = fixture.put(&qkv, dtype);
            let d_qkv = backward(&mut fixture, &case, qkv, &d_out);
            let what = format!("d_qkv of {case:?} in {dtype:?}");
            assert_close(&what, &fixture.get(d_qkv), &expected, backward_bound(dtype));
        }
    }
}

/// `values` as rows of `width`, with `gap` elements after each that are no numbers.
fn apart(values: &[f64], width: usize, gap: usize) -> Vec<f64> {
    let row = |row: &[f64]| row.iter().copied().chain(std::iter::repeat_n(f64::NAN, gap)).collect::<Vec<_>>();
    values.chunks_exact(width).flat_map(row).collect()
}

#[test]
fn rows_may_lie_apart_and_what_is_between_them_stays() {
    let cases = [case(2, 1, 64, &[0, 70, 71, 140], Some(40)), full(2, 1, 72, &[0, 70, 71, 140])];
    for case in cases {
        rows_apart(&case);
    }
}

fn rows_apart(case: &Case) {
    let mut random = Random(13);
    let dim = case.heads.dim;
    // A gap of 8 leaves rows of bf16 at multiples of 16 bytes.
    for (dtype, gap) in TYPES.into_iter().flat_map(|dtype| [(dtype, 2), (dtype, 8)]) {
        let (tokens, width, out_width) = (case.tokens(), 4 * dim, 2 * dim);
        let qkv = random.values(tokens * width, dtype);
        let d_out = random.values(tokens * out_width, dtype);
        let mut fixture = Fixture::new();
        let side_by_side = fixture.put(&qkv, dtype);
        let inputs = fixture.put(&apart(&qkv, width, gap), dtype);
        let part = |head: usize| rows(inputs.slice(head * dim, inputs.len - head * dim), width + gap);
        let out = fixture.poisoned(tokens * (out_width + gap), dtype);
        let op = case.op(&mut fixture, side_by_side);
        let op = Attention { q: part(0), k: part(2), v: part(3), out: rows(out, out_width + gap), ..op };
        fixture.backend.attention(&op);
        let actual = fixture.get(out);
        let (actual, between): (Vec<_>, Vec<_>) =
            actual.chunks_exact(out_width + gap).map(|row| row.split_at(out_width)).unzip();
        assert!(between.concat().iter().all(|x| x.is_nan()), "a gap of {gap} is written");
        assert_close("out", &actual.concat(), &case.reference(&qkv).out, forward_bound(dtype));
        let expected = analytic(case, &qkv, &d_out);
        let d_out = fixture.put(&apart(&d_out, out_width, gap), dtype);
        let (d_qkv, scratch) = (
            fixture.poisoned(qkv.len(), dtype),
            fixture.poisoned(DeviceKind::Cpu.attention_scratch(case.heads, tokens), DType::F32),
        );
        fixture.backend.attention_backward(&op, rows(d_out, out_width + gap), d_qkv, scratch);
        assert_close("d_qkv", &fixture.get(d_qkv), &expected, backward_bound(dtype));
    }
}

#[test]
fn a_cache_gives_the_last_row_of_the_forward_pass() {
    let mut random = Random(12);
    for dtype in TYPES {
        for (query, key_value, dim, window) in
            [(1, 1, 2, None), (4, 2, 64, None), (3, 1, 10, Some(3)), (2, 2, 128, Some(1)), (4, 1, 256, Some(200))]
        {
            let (capacity, lengths) = (301, [1, 9, 301, 32, 64]);
            let (width, key_width) = ((query + 2 * key_value) * dim, key_value * dim);
            let mut fixture = Fixture::new();
            let (mut q, mut expected) = (Vec::new(), Vec::new());
            let (mut k, mut v) = (Vec::new(), Vec::new());
            for length in lengths {
                let case = case(query, key_value, dim, &[0, length], window);
                let qkv = random.values(length * width, dtype);
                expected.extend_from_slice(&case.reference(&qkv).out[(length - 1) * query * dim..]);
                q.extend_from_slice(&qkv[(length - 1) * width..][..query * dim]);
                for entry in 0..capacity {
                    let row = qkv.get(entry * width + query * dim..).map(|row| &row[..2 * key_width]);
                    // What is beyond the length must not be read.
                    let row = row.map_or(vec![f64::NAN; 2 * key_width], <[f64]>::to_vec);
                    k.extend_from_slice(&row[..key_width]);
                    v.extend_from_slice(&row[key_width..]);
                }
            }
            let (q, k, v) = (fixture.put(&q, dtype), fixture.put(&k, dtype), fixture.put(&v, dtype));
            let (lengths, out) = (fixture.ints(&lengths), fixture.poisoned(expected.len(), dtype));
            let heads = Heads { query, key_value, dim };
            let scale = 1.0 / (dim as f32).sqrt();
            let q = rows(q, query * dim);
            fixture.backend.attention_cached(heads, window, scale, q, k, v, capacity, lengths, out);
            assert_close("out", &fixture.get(out), &expected, forward_bound(dtype));
        }
    }
}
