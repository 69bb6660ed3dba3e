//! Gradients against those of another program: candle's autograd in f64, on the operations written out.

use candle_core::{D, Device, Result, Tensor, Var};

use super::*;
use crate::backend::{CrossEntropy, DeviceKind, Gelu, Heads, LayerNorm, NormRope};

const EPSILON: f32 = 1e-6;

fn var(values: &[f64], shape: &[usize]) -> Result<Var> {
    Var::from_tensor(&Tensor::from_slice(values, shape, &Device::Cpu)?)
}

fn constant(values: &[f64], shape: &[usize]) -> Result<Tensor> {
    Tensor::from_slice(values, shape, &Device::Cpu)
}

/// The gradients of `sum(out * d_out)`.
fn gradients<const N: usize>(out: &Tensor, d_out: &[f64], of: [&Var; N]) -> Result<[Vec<f64>; N]> {
    let d_out = constant(d_out, out.dims())?;
    let store = (out * d_out)?.sum_all()?.backward()?;
    let gradient = |var: &Var| store.get(var).unwrap().flatten_all()?.to_vec1::<f64>();
    let found: Vec<Vec<f64>> = of.into_iter().map(gradient).collect::<Result<_>>()?;
    Ok(found.try_into().unwrap())
}

fn rms_norm(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
    x.broadcast_div(&(mean + f64::from(EPSILON))?.sqrt()?)?.broadcast_mul(weight)
}

fn softmax(scores: &Tensor) -> Result<Tensor> {
    let exp = scores.exp()?;
    exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)
}

#[test]
fn norms_agree() -> Result<()> {
    let (rows, width) = (7, 40);
    let mut random = Random(80);
    let (x, weight) = (random.values(rows * width, DType::F32), random.values(width, DType::F32));
    let d_out = random.values(rows * width, DType::F32);
    let (x_var, weight_var) = (var(&x, &[rows, width])?, var(&weight, &[width])?);
    let out = rms_norm(&x_var, &weight_var)?;
    let [d_x, d_weight] = gradients(&out, &d_out, [&x_var, &weight_var])?;

    let mut f = Fixture::new();
    let (x, weight) = (f.put(&x, DType::F32), f.put(&weight, DType::F32));
    let (actual, inverse_rms) = (f.poisoned(rows * width, DType::F32), f.poisoned(rows, DType::F32));
    f.backend.rms_norm(x, weight.into(), EPSILON, actual, inverse_rms);
    assert_close("out", &f.get(actual), &out.flatten_all()?.to_vec1()?, 1e-6);
    let (d_out, zeros) = (f.put(&d_out, DType::F32), vec![0.0; rows * width]);
    let (actual_x, actual_weight) = (f.put(&zeros, DType::F32), f.put(&zeros[..width], DType::F32));
    f.backend.rms_norm_backward(d_out, x, weight.into(), inverse_rms, actual_x, actual_weight);
    assert_close("d_x", &f.get(actual_x), &d_x, 1e-6);
    assert_close("d_weight", &f.get(actual_weight), &d_weight, 1e-6);
    Ok(())
}

#[test]
fn rotated_heads_agree() -> Result<()> {
    let heads = Heads { query: 4, key_value: 2, dim: 16 };
    let (tokens, dim, half, width) = (5, 16, 8, 8 * 16);
    let mut random = Random(81);
    let qkv = random.values(tokens * width, DType::F32);
    let (of_queries, of_keys) = (random.values(dim, DType::F32), random.values(dim, DType::F32));
    let angles: Vec<f64> = (0..tokens * half).map(|_| 3.0 * random.value()).collect();
    let cos: Vec<f64> = angles.iter().map(|x| round(x.cos(), DType::F32)).collect();
    let sin: Vec<f64> = angles.iter().map(|x| round(x.sin(), DType::F32)).collect();
    let d_qk = random.values(tokens * 6 * dim, DType::F32);

    let qkv_var = var(&qkv, &[tokens, 8, dim])?;
    let (queries_var, keys_var) = (var(&of_queries, &[dim])?, var(&of_keys, &[dim])?);
    let queries = rms_norm(&qkv_var.narrow(1, 0, 4)?, &queries_var)?;
    let keys = rms_norm(&qkv_var.narrow(1, 4, 2)?, &keys_var)?;
    let normed = Tensor::cat(&[&queries, &keys], 1)?;
    let (low, high) = (normed.narrow(2, 0, half)?, normed.narrow(2, half, half)?);
    let (c, s) = (constant(&cos, &[tokens, 1, half])?, constant(&sin, &[tokens, 1, half])?);
    let first = (low.broadcast_mul(&c)? - high.broadcast_mul(&s)?)?;
    let second = (high.broadcast_mul(&c)? + low.broadcast_mul(&s)?)?;
    let out = Tensor::cat(&[&first, &second], 2)?;
    let [d_qkv, d_queries, d_keys] = gradients(&out, &d_qk, [&qkv_var, &queries_var, &keys_var])?;

    let mut f = Fixture::new();
    let norm = Some((f.put(&of_queries, DType::F32).into(), f.put(&of_keys, DType::F32).into(), EPSILON));
    let (cos, sin) = (f.put(&cos, DType::F32), f.put(&sin, DType::F32));
    let op = NormRope { heads, rotary: dim, tokens, norm, angles: f.angles(cos, sin, tokens) };
    let (qkv, qk) = (f.put(&qkv, DType::F32), f.poisoned(tokens * 6 * dim, DType::F32));
    f.backend.norm_rope(&op, qkv, qk);
    assert_close("qk", &f.get(qk), &out.flatten_all()?.to_vec1()?, 1e-6);
    // The values' columns hold nothing: their gradient is 0.
    let given: Vec<f64> =
        d_qk.chunks(6 * dim).flat_map(|row| row.iter().copied().chain(std::iter::repeat_n(0.0, 2 * dim))).collect();
    let given = f.put(&given, DType::F32);
    let (query, key) = (f.put(&vec![0.0; dim], DType::F32), f.put(&vec![0.0; dim], DType::F32));
    f.backend.norm_rope_backward(&op, qkv, given, Some((query, key)));
    assert_close("d_qkv", &f.get(given), &d_qkv, 2e-6);
    assert_close("d_query_norm", &f.get(query), &d_queries, 2e-6);
    assert_close("d_key_norm", &f.get(key), &d_keys, 2e-6);
    Ok(())
}

#[test]
fn attention_agrees() -> Result<()> {
    let heads = Heads { query: 4, key_value: 2, dim: 8 };
    of_attention(&attention::Case { heads, bounds: vec![0, 6, 7, 20], causal: true, window: Some(5) })?;
    of_attention(&attention::full(4, 2, 72, &[0, 6, 7, 20]))
}

fn of_attention(case: &attention::Case) -> Result<()> {
    let (tokens, dim) = (20, case.heads.dim);
    let mut random = Random(82);
    let qkv = random.values(tokens * 8 * dim, DType::F32);
    let d_out = random.values(tokens * 4 * dim, DType::F32);

    let qkv_var = var(&qkv, &[tokens, 8, dim])?;
    let sequence = |t: usize| case.bounds.iter().filter(|bound| **bound <= t).count();
    let before = |i: usize, j: usize| j <= i && case.window.is_none_or(|window| i < j + window);
    let seen = |i: usize, j: usize| sequence(i) == sequence(j) && (!case.causal || before(i, j));
    let mask: Vec<f64> = (0..tokens * tokens).map(|x| if seen(x / tokens, x % tokens) { 0.0 } else { -1e9 }).collect();
    let mask = constant(&mask, &[tokens, tokens])?;
    let head = |head: usize| qkv_var.narrow(1, head, 1)?.squeeze(1)?.contiguous();
    let mut by_head = Vec::new();
    for query in 0..4 {
        let (q, k, v) = (head(query)?, head(4 + query / 2)?, head(6 + query / 2)?);
        let scores = ((q.matmul(&k.t()?)? * (1.0 / (dim as f64).sqrt()))? + &mask)?;
        by_head.push(softmax(&scores)?.matmul(&v)?);
    }
    let out = Tensor::stack(&by_head, 1)?;
    let [d_qkv] = gradients(&out, &d_out, [&qkv_var])?;

    let mut f = Fixture::new();
    let qkv = f.put(&qkv, DType::F32);
    let op = case.op(&mut f, qkv);
    f.backend.attention(&op);
    assert_close("out", &f.get(op.out.buffer), &out.flatten_all()?.to_vec1()?, 2e-6);
    let d_out = f.put(&d_out, DType::F32);
    let (actual, scratch) = (
        f.poisoned(qkv.len, DType::F32),
        f.poisoned(DeviceKind::Cpu.attention_scratch(case.heads, tokens), DType::F32),
    );
    f.backend.attention_backward(&op, rows(d_out, 4 * dim), actual, scratch);
    assert_close("d_qkv", &f.get(actual), &d_qkv, 5e-6);
    Ok(())
}

#[test]
fn gated_activations_agree() -> Result<()> {
    let (rows, width) = (6, 35);
    let mut random = Random(83);
    let (gate_up, d_out) = (random.values(rows * 2 * width, DType::F32), random.values(rows * width, DType::F32));
    let gate_up_var = var(&gate_up, &[rows, 2 * width])?;
    let out = (gate_up_var.narrow(1, 0, width)?.silu()? * gate_up_var.narrow(1, width, width)?)?;
    let [d_gate_up] = gradients(&out, &d_out, [&gate_up_var])?;

    let mut f = Fixture::new();
    let (gate_up, actual) = (f.put(&gate_up, DType::F32), f.poisoned(rows * width, DType::F32));
    f.backend.swiglu(gate_up, width, actual);
    assert_close("out", &f.get(actual), &out.flatten_all()?.to_vec1()?, 1e-6);
    let d_out = f.put(&d_out, DType::F32);
    f.backend.swiglu_backward(gate_up, width, d_out);
    assert_close("d_gate_up", &f.get(gate_up), &d_gate_up, 1e-6);
    Ok(())
}

#[test]
fn losses_agree() -> Result<()> {
    let (count, vocab, scale) = (5, 300, 0.25);
    let mut random = Random(84);
    let logits: Vec<f64> = random.values(count * vocab, DType::F32);
    let targets: Vec<usize> = (0..count).map(|_| random.below(vocab)).collect();
    let weights = [1.0, 0.5, 2.0, 0.0, 1.0];
    let logits_var = var(&logits, &[count, vocab])?;
    let picks: Vec<f64> =
        targets.iter().flat_map(|target| (0..vocab).map(move |i| if i == *target { 1.0 } else { 0.0 })).collect();
    let picked = (&*logits_var * constant(&picks, &[count, vocab])?)?.sum(1)?;
    let nll = (logits_var.exp()?.sum(1)?.log()? - picked)?;
    let scaled: Vec<f64> = weights.iter().map(|weight| weight * scale).collect();
    let [d_logits] = gradients(&nll, &scaled, [&logits_var])?;

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
    assert_close("nll", &f.get(op.nll), &nll.to_vec1()?, 2e-7);
    assert_close("d_logits", &f.get(op.logits), &d_logits, 1e-6);
    Ok(())
}

#[test]
fn embeddings_agree() -> Result<()> {
    let (vocab, width, ids) = (9, 6, [3_u32, 0, 3, 8, 3, 8, 1]);
    let mut random = Random(85);
    let table = random.values(vocab * width, DType::F32);
    let d_out = random.values(ids.len() * width, DType::F32);
    let table_var = var(&table, &[vocab, width])?;
    let out = table_var.index_select(&Tensor::new(&ids, &Device::Cpu)?, 0)?;
    let [d_table] = gradients(&out, &d_out, [&table_var])?;

    let mut f = Fixture::new();
    let ids = f.ints(&ids.map(|id| id as usize));
    let (table, actual) = (f.put(&table, DType::F32), f.poisoned(d_out.len(), DType::F32));
    f.backend.embedding(ids, table, width, actual);
    assert_eq!(f.get(actual), out.flatten_all()?.to_vec1::<f64>()?);
    let (d_out, gradient) = (f.put(&d_out, DType::F32), f.put(&vec![0.0; vocab * width], DType::F32));
    f.backend.embedding_backward(ids, d_out, width, gradient);
    assert_close("d_table", &f.get(gradient), &d_table, 1e-6);
    Ok(())
}

#[test]
fn layer_norms_agree() -> Result<()> {
    let (rows, width) = (7, 40);
    let mut random = Random(86);
    let [x, d_out] = [(); 2].map(|()| random.values(rows * width, DType::F32));
    let [weight, bias] = [(); 2].map(|()| random.values(width, DType::F32));
    let (x_var, weight_var, bias_var) = (var(&x, &[rows, width])?, var(&weight, &[width])?, var(&bias, &[width])?);
    let centred = x_var.broadcast_sub(&x_var.mean_keepdim(D::Minus1)?)?;
    let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
    let normed = centred.broadcast_div(&(variance + f64::from(EPSILON))?.sqrt()?)?;
    let out = normed.broadcast_mul(&weight_var)?.broadcast_add(&bias_var)?;
    let [d_x, d_weight, d_bias] = gradients(&out, &d_out, [&x_var, &weight_var, &bias_var])?;

    let mut f = Fixture::new();
    let [x, d_out, weight, bias] = [x, d_out, weight, bias].map(|values| f.put(&values, DType::F32));
    let (actual, statistics) = (f.poisoned(rows * width, DType::F32), f.poisoned(2 * rows, DType::F32));
    let op = LayerNorm { x, weight, bias, width, epsilon: EPSILON, out: actual, statistics };
    f.backend.layer_norm(&op);
    assert_close("out", &f.get(actual), &out.flatten_all()?.to_vec1()?, 1e-6);
    let zeros = vec![0.0; rows * width];
    let [of_x, of_weight, of_bias] = [rows * width, width, width].map(|len| f.put(&zeros[..len], DType::F32));
    f.backend.layer_norm_backward(&op, d_out, of_x, of_weight, of_bias);
    assert_close("d_x", &f.get(of_x), &d_x, 2e-6);
    assert_close("d_weight", &f.get(of_weight), &d_weight, 2e-6);
    assert_close("d_bias", &f.get(of_bias), &d_bias, 1e-6);
    Ok(())
}

#[test]
fn gelus_agree() -> Result<()> {
    let len = 300;
    let mut random = Random(87);
    let x: Vec<f64> = random.values(len, DType::F32).iter().map(|x| round(3.0 * x, DType::F32)).collect();
    let d_out = random.values(len, DType::F32);
    let x_var = var(&x, &[len])?;
    for (kind, out) in [(Gelu::Tanh, x_var.gelu()?), (Gelu::Erf, x_var.gelu_erf()?)] {
        let [d_x] = gradients(&out, &d_out, [&x_var])?;
        let mut f = Fixture::new();
        let (x, actual) = (f.put(&x, DType::F32), f.poisoned(len, DType::F32));
        f.backend.gelu(kind, x, actual);
        assert_close("out", &f.get(actual), &out.to_vec1()?, 1e-6);
        let d = f.put(&d_out, DType::F32);
        f.backend.gelu_backward(kind, x, d);
        assert_close("d_x", &f.get(d), &d_x, 2e-6);
    }
    Ok(())
}

#[test]
fn interpolations_agree() -> Result<()> {
    let (rows, width, taps) = (5, 6, [0_u32, 1, 3, 4, 4, 4, 2, 0]);
    let mut random = Random(88);
    let (table, weights) = (random.values(rows * width, DType::F32), random.values(8, DType::F32));
    let d_out = random.values(2 * width, DType::F32);
    let table_var = var(&table, &[rows, width])?;
    let picked = table_var.index_select(&Tensor::new(&taps, &Device::Cpu)?, 0)?;
    let out = picked.broadcast_mul(&constant(&weights, &[8, 1])?)?.reshape((2, 4, width))?.sum(1)?;
    let [d_table] = gradients(&out, &d_out, [&table_var])?;

    let mut f = Fixture::new();
    let (taps, weights) = (f.ints(&taps.map(|tap| tap as usize)), f.put(&weights, DType::F32));
    let (table, actual) = (f.put(&table, DType::F32), f.put(&vec![0.0; 2 * width], DType::F32));
    f.backend.interpolate(table, taps, weights, width, actual);
    assert_close("out", &f.get(actual), &out.flatten_all()?.to_vec1()?, 1e-6);
    let (d_out, gradient) = (f.put(&d_out, DType::F32), f.put(&vec![0.0; rows * width], DType::F32));
    f.backend.interpolate_backward(d_out, taps, weights, width, gradient);
    assert_close("d_table", &f.get(gradient), &d_table, 1e-6);
    Ok(())
}
