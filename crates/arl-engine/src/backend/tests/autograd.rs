//! Gradients against automatic differentiation in f64, of each operation's forward pass alone, written out in dual numbers.

use super::dual::{Dual, differentiate, dot, mean};
use super::*;
use crate::backend::{CrossEntropy, DeviceKind, Gelu, Heads, LayerNorm, NormRope};

const EPSILON: f32 = 1e-6;

/// The rows of `x`, each as wide as the weight.
fn rms_norm(x: &[Dual], weight: &[Dual]) -> Vec<Dual> {
    let row = |row: &[Dual]| {
        let rms = (dot(row, row) / row.len() as f64 + f64::from(EPSILON)).sqrt();
        row.iter().zip(weight).map(|(x, weight)| *x / rms * *weight).collect::<Vec<_>>()
    };
    x.chunks(weight.len()).flat_map(row).collect()
}

/// As [`rms_norm`].
fn layer_norm(x: &[Dual], weight: &[Dual], bias: &[Dual]) -> Vec<Dual> {
    let row = |row: &[Dual]| {
        let mean = mean(row);
        let centred: Vec<Dual> = row.iter().map(|x| *x - mean).collect();
        let deviation = (dot(&centred, &centred) / row.len() as f64 + f64::from(EPSILON)).sqrt();
        let scaled = centred.iter().zip(weight).zip(bias);
        scaled.map(|((x, weight), bias)| *x / deviation * *weight + *bias).collect::<Vec<_>>()
    };
    x.chunks(weight.len()).flat_map(row).collect()
}

/// What one query of one head takes of the values, from the keys and values that it sees.
fn attended(query: &[Dual], keys: &[Dual], values: &[Dual]) -> Vec<Dual> {
    let dim = query.len();
    let exp: Vec<Dual> = keys.chunks(dim).map(|key| (dot(query, key) / (dim as f64).sqrt()).exp()).collect();
    let total: Dual = exp.iter().copied().sum();
    let value = |x: usize| exp.iter().zip(values.chunks(dim)).map(|(exp, row)| *exp * row[x]).sum::<Dual>() / total;
    (0..dim).map(value).collect()
}

#[test]
fn norms_agree() {
    let (rows, width) = (7, 40);
    let mut random = Random(80);
    let (x, weight) = (random.values(rows * width, DType::F32), random.values(width, DType::F32));
    let d_out = random.values(rows * width, DType::F32);
    let (out, [d_x, d_weight]) = differentiate([&x, &weight], &d_out, |[x, weight]| rms_norm(x, weight));

    let mut f = Fixture::new();
    let (x, weight) = (f.put(&x, DType::F32), f.put(&weight, DType::F32));
    let (actual, inverse_rms) = (f.poisoned(rows * width, DType::F32), f.poisoned(rows, DType::F32));
    f.backend.rms_norm(x, weight.into(), EPSILON, actual, inverse_rms);
    assert_close("out", &f.get(actual), &out, 1e-6);
    let (d_out, zeros) = (f.put(&d_out, DType::F32), vec![0.0; rows * width]);
    let (actual_x, actual_weight) = (f.put(&zeros, DType::F32), f.put(&zeros[..width], DType::F32));
    f.backend.rms_norm_backward(d_out, x, weight.into(), inverse_rms, actual_x, actual_weight);
    assert_close("d_x", &f.get(actual_x), &d_x, 1e-6);
    assert_close("d_weight", &f.get(actual_weight), &d_weight, 1e-6);
}

#[test]
fn rotated_heads_agree() {
    let heads = Heads { query: 4, key_value: 2, dim: 16 };
    let (tokens, dim, half, width) = (5, 16, 8, 8 * 16);
    let mut random = Random(81);
    let qkv = random.values(tokens * width, DType::F32);
    let (of_queries, of_keys) = (random.values(dim, DType::F32), random.values(dim, DType::F32));
    let angles: Vec<f64> = (0..tokens * half).map(|_| 3.0 * random.value()).collect();
    let cos: Vec<f64> = angles.iter().map(|x| round(x.cos(), DType::F32)).collect();
    let sin: Vec<f64> = angles.iter().map(|x| round(x.sin(), DType::F32)).collect();
    let d_qk = random.values(tokens * 6 * dim, DType::F32);

    let (out, [d_qkv, d_queries, d_keys]) =
        differentiate([&qkv, &of_queries, &of_keys], &d_qk, |[qkv, of_queries, of_keys]| {
            let mut out = Vec::new();
            for (i, head) in (0..tokens).flat_map(|i| (0..6).map(move |head| (i, head))) {
                let weight = if head < 4 { of_queries } else { of_keys };
                let normed = rms_norm(&qkv[(i * 8 + head) * dim..][..dim], weight);
                let (low, high) = normed.split_at(half);
                let (c, s) = (&cos[i * half..][..half], &sin[i * half..][..half]);
                out.extend((0..half).map(|x| low[x] * c[x] - high[x] * s[x]));
                out.extend((0..half).map(|x| high[x] * c[x] + low[x] * s[x]));
            }
            out
        });

    let mut f = Fixture::new();
    let norm = Some((f.put(&of_queries, DType::F32).into(), f.put(&of_keys, DType::F32).into(), EPSILON));
    let (cos, sin) = (f.put(&cos, DType::F32), f.put(&sin, DType::F32));
    let op = NormRope { heads, rotary: dim, tokens, norm, angles: f.angles(cos, sin, tokens) };
    let (qkv, qk) = (f.put(&qkv, DType::F32), f.poisoned(tokens * 6 * dim, DType::F32));
    f.backend.norm_rope(&op, qkv, qk);
    assert_close("qk", &f.get(qk), &out, 1e-6);
    // The values' columns hold nothing: their gradient is 0.
    let given: Vec<f64> =
        d_qk.chunks(6 * dim).flat_map(|row| row.iter().copied().chain(std::iter::repeat_n(0.0, 2 * dim))).collect();
    let given = f.put(&given, DType::F32);
    let (query, key) = (f.put(&vec![0.0; dim], DType::F32), f.put(&vec![0.0; dim], DType::F32));
    f.backend.norm_rope_backward(&op, qkv, given, Some((query, key)));
    assert_close("d_qkv", &f.get(given), &d_qkv, 2e-6);
    assert_close("d_query_norm", &f.get(query), &d_queries, 2e-6);
    assert_close("d_key_norm", &f.get(key), &d_keys, 2e-6);
}

#[test]
fn attention_agrees() {
    let heads = Heads { query: 4, key_value: 2, dim: 8 };
    of_attention(&attention::Case { heads, bounds: vec![0, 6, 7, 20], causal: true, window: Some(5) });
    of_attention(&attention::full(4, 2, 72, &[0, 6, 7, 20]));
}

fn of_attention(case: &attention::Case) {
    let (tokens, dim) = (20, case.heads.dim);
    let mut random = Random(82);
    let qkv = random.values(tokens * 8 * dim, DType::F32);
    let d_out = random.values(tokens * 4 * dim, DType::F32);

    let sequence = |t: usize| case.bounds.iter().filter(|bound| **bound <= t).count();
    let before = |i: usize, j: usize| j <= i && case.window.is_none_or(|window| i < j + window);
    let seen = |i: usize, j: usize| sequence(i) == sequence(j) && (!case.causal || before(i, j));
    let (mut out, mut d_qkv) = (vec![0.0; d_out.len()], vec![0.0; qkv.len()]);
    for (i, head) in (0..tokens).flat_map(|i| (0..4).map(move |head| (i, head))) {
        let place = |token: usize, head: usize| (token * 8 + head) * dim;
        let of_seen = |head: usize| (0..tokens).filter(|j| seen(i, *j)).map(|j| place(j, head)).collect::<Vec<_>>();
        let places = [vec![place(i, head)], of_seen(4 + head / 2), of_seen(6 + head / 2)];
        let parts =
            places.each_ref().map(|places| places.iter().map(|at| &qkv[*at..][..dim]).collect::<Vec<_>>().concat());
        let at = (i * 4 + head) * dim;
        let (row, gradients) =
            differentiate(parts.each_ref().map(Vec::as_slice), &d_out[at..][..dim], |[q, k, v]| attended(q, k, v));
        out[at..][..dim].copy_from_slice(&row);
        for (at, gradient) in places.iter().zip(&gradients).flat_map(|(places, of)| places.iter().zip(of.chunks(dim))) {
            d_qkv[*at..][..dim].iter_mut().zip(gradient).for_each(|(sum, x)| *sum += x);
        }
    }

    let mut f = Fixture::new();
    let qkv = f.put(&qkv, DType::F32);
    let op = case.op(&mut f, qkv);
    f.backend.attention(&op);
    assert_close("out", &f.get(op.out.buffer), &out, 2e-6);
    let d_out = f.put(&d_out, DType::F32);
    let (actual, scratch) = (
        f.poisoned(qkv.len, DType::F32),
        f.poisoned(DeviceKind::Cpu.attention_scratch(case.heads, tokens), DType::F32),
    );
    f.backend.attention_backward(&op, rows(d_out, 4 * dim), actual, scratch);
    assert_close("d_qkv", &f.get(actual), &d_qkv, 5e-6);
}

#[test]
fn gated_activations_agree() {
    let (rows, width) = (6, 35);
    let mut random = Random(83);
    let (gate_up, d_out) = (random.values(rows * 2 * width, DType::F32), random.values(rows * width, DType::F32));
    let (out, [d_gate_up]) = differentiate([&gate_up], &d_out, |[gate_up]| {
        let rows = gate_up.chunks(2 * width).map(|row| row.split_at(width));
        let silu = |gate: Dual| gate / ((Dual::from(0.0) - gate).exp() + 1.0);
        rows.flat_map(|(gate, up)| gate.iter().zip(up).map(|(gate, up)| silu(*gate) * *up)).collect()
    });

    let mut f = Fixture::new();
    let (gate_up, actual) = (f.put(&gate_up, DType::F32), f.poisoned(rows * width, DType::F32));
    f.backend.swiglu(gate_up, width, actual);
    assert_close("out", &f.get(actual), &out, 1e-6);
    let d_out = f.put(&d_out, DType::F32);
    f.backend.swiglu_backward(gate_up, width, d_out);
    assert_close("d_gate_up", &f.get(gate_up), &d_gate_up, 1e-6);
}

#[test]
fn losses_agree() {
    let (count, vocab, scale) = (5, 300, 0.25);
    let mut random = Random(84);
    let logits: Vec<f64> = random.values(count * vocab, DType::F32);
    let targets: Vec<usize> = (0..count).map(|_| random.below(vocab)).collect();
    let weights = [1.0, 0.5, 2.0, 0.0, 1.0];
    let scaled: Vec<f64> = weights.iter().map(|weight| weight * scale).collect();
    let (nll, [d_logits]) = differentiate([&logits], &scaled, |[logits]| {
        let rows = logits.chunks(vocab).zip(&targets);
        rows.map(|(row, target)| row.iter().map(|x| x.exp()).sum::<Dual>().ln() - row[*target]).collect()
    });

    let mut f = Fixture::new();
    let logits = f.put(&logits, DType::F32);
    let op = CrossEntropy {
        rows: count,
        vocab,
        logits,
        targets: f.ints(&targets),
        weights: f.put(&weights, DType::F32),
        scale: scale as f32,
        gradient: Some(rows(logits, vocab)),
        nll: f.poisoned(count, DType::F32),
        correct: f.poisoned(count, DType::F32),
        entropy: f.poisoned(count, DType::F32),
    };
    f.backend.cross_entropy(&op);
    assert_close("nll", &f.get(op.nll), &nll, 2e-7);
    assert_close("d_logits", &f.get(op.logits), &d_logits, 1e-6);
}

#[test]
fn embeddings_agree() {
    let (vocab, width, ids) = (9, 6, [3, 0, 3, 8, 3, 8, 1]);
    let mut random = Random(85);
    let table = random.values(vocab * width, DType::F32);
    let d_out = random.values(ids.len() * width, DType::F32);
    let (out, [d_table]) = differentiate([&table], &d_out, |[table]| {
        ids.iter().flat_map(|id| table[id * width..][..width].iter().copied()).collect()
    });

    let mut f = Fixture::new();
    let ids = f.ints(&ids);
    let (table, actual) = (f.put(&table, DType::F32), f.poisoned(d_out.len(), DType::F32));
    f.backend.embedding(ids, table, width, actual);
    assert_eq!(f.get(actual), out);
    let (d_out, gradient) = (f.put(&d_out, DType::F32), f.put(&vec![0.0; vocab * width], DType::F32));
    f.backend.embedding_backward(ids, d_out, width, gradient);
    assert_close("d_table", &f.get(gradient), &d_table, 1e-6);
}

#[test]
fn layer_norms_agree() {
    let (rows, width) = (7, 40);
    let mut random = Random(86);
    let [x, d_out] = [(); 2].map(|()| random.values(rows * width, DType::F32));
    let [weight, bias] = [(); 2].map(|()| random.values(width, DType::F32));
    let (out, [d_x, d_weight, d_bias]) =
        differentiate([&x, &weight, &bias], &d_out, |[x, weight, bias]| layer_norm(x, weight, bias));

    let mut f = Fixture::new();
    let [x, d_out, weight, bias] = [x, d_out, weight, bias].map(|values| f.put(&values, DType::F32));
    let (actual, statistics) = (f.poisoned(rows * width, DType::F32), f.poisoned(2 * rows, DType::F32));
    let op = LayerNorm { x, weight, bias, width, epsilon: EPSILON, out: actual, statistics };
    f.backend.layer_norm(&op);
    assert_close("out", &f.get(actual), &out, 1e-6);
    let zeros = vec![0.0; rows * width];
    let [of_x, of_weight, of_bias] = [rows * width, width, width].map(|len| f.put(&zeros[..len], DType::F32));
    f.backend.layer_norm_backward(&op, d_out, of_x, of_weight, of_bias);
    assert_close("d_x", &f.get(of_x), &d_x, 2e-6);
    assert_close("d_weight", &f.get(of_weight), &d_weight, 2e-6);
    assert_close("d_bias", &f.get(of_bias), &d_bias, 1e-6);
}

#[test]
fn gelus_agree() {
    let len = 300;
    let mut random = Random(87);
    let x: Vec<f64> = random.values(len, DType::F32).iter().map(|x| round(3.0 * x, DType::F32)).collect();
    let d_out = random.values(len, DType::F32);
    let tanh = |x: Dual| x * (((x + x * x * x * 0.044_715) * (2.0 / std::f64::consts::PI).sqrt()).tanh() + 1.0) * 0.5;
    let erf = |x: Dual| x * ((x / std::f64::consts::SQRT_2).erf() + 1.0) * 0.5;
    let kinds: [(Gelu, &dyn Fn(Dual) -> Dual); 2] = [(Gelu::Tanh, &tanh), (Gelu::Erf, &erf)];
    for (kind, gelu) in kinds {
        // By element, as each has an effect on its own result alone.
        let of_one = |(x, d_out): (&f64, &f64)| {
            let (out, [d_x]) = differentiate([&[*x]], &[*d_out], |[x]| vec![gelu(x[0])]);
            (out[0], d_x[0])
        };
        let (out, d_x): (Vec<f64>, Vec<f64>) = x.iter().zip(&d_out).map(of_one).unzip();
        let mut f = Fixture::new();
        let (x, actual) = (f.put(&x, DType::F32), f.poisoned(len, DType::F32));
        f.backend.gelu(kind, x, actual);
        assert_close("out", &f.get(actual), &out, 1e-6);
        let d = f.put(&d_out, DType::F32);
        f.backend.gelu_backward(kind, x, d);
        assert_close("d_x", &f.get(d), &d_x, 2e-6);
    }
}

#[test]
fn interpolations_agree() {
    let (rows, width, taps) = (5, 6, [0, 1, 3, 4, 4, 4, 2, 0]);
    let mut random = Random(88);
    let (table, weights) = (random.values(rows * width, DType::F32), random.values(8, DType::F32));
    let d_out = random.values(2 * width, DType::F32);
    let (out, [d_table]) = differentiate([&table], &d_out, |[table]| {
        let tap = |i: usize, x: usize| table[taps[i] * width + x] * weights[i];
        let places = (0..2).flat_map(|row| (0..width).map(move |x| (row, x)));
        places.map(|(row, x)| (4 * row..4 * row + 4).map(|i| tap(i, x)).sum()).collect()
    });

    let mut f = Fixture::new();
    let (taps, weights) = (f.ints(&taps), f.put(&weights, DType::F32));
    let (table, actual) = (f.put(&table, DType::F32), f.put(&vec![0.0; 2 * width], DType::F32));
    f.backend.interpolate(table, taps, weights, width, actual);
    assert_close("out", &f.get(actual), &out, 1e-6);
    let (d_out, gradient) = (f.put(&d_out, DType::F32), f.put(&vec![0.0; rows * width], DType::F32));
    f.backend.interpolate_backward(d_out, taps, weights, width, gradient);
    assert_close("d_table", &f.get(gradient), &d_table, 1e-6);
}
