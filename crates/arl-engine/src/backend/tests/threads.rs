//! The number of threads does not change a bit of any leaf that reduces or shares work.

use super::*;
use crate::backend::{CrossEntropy, DeviceKind, Heads, Layout, Matmul, NormRope, Permutation, Router};

/// The bytes that each leaf writes, at sizes of many tasks.
fn everything(dtype: DType) -> Vec<(&'static str, Vec<u8>)> {
    let mut random = Random(70);
    let mut f = Fixture::new();
    let mut results = Vec::new();
    let (tokens, width) = (700, 264);
    let mut put = |f: &mut Fixture, len: usize, dtype: DType| {
        let values = random.values(len, dtype);
        f.put(&values, dtype)
    };

    let (x, d_out, weight) =
        (put(&mut f, tokens * width, dtype), put(&mut f, tokens * width, dtype), put(&mut f, width, dtype));
    let (out, inverse_rms) = (f.poisoned(tokens * width, dtype), f.poisoned(tokens, DType::F32));
    f.backend.rms_norm(x, weight.into(), 1e-6, out, inverse_rms);
    let (d_x, d_weight) = (put(&mut f, tokens * width, dtype), put(&mut f, width, DType::F32));
    f.backend.rms_norm_backward(d_out, x, weight.into(), inverse_rms, d_x, d_weight);
    for (name, buffer) in [("rms_norm", out), ("rms_norm d_x", d_x), ("rms_norm d_weight", d_weight)] {
        results.push((name, f.bytes(buffer)));
    }

    let heads = Heads { query: 4, key_value: 2, dim: 64 };
    let (qkv_width, dim) = (8 * 64, 64);
    let norm = Some((put(&mut f, dim, dtype).into(), put(&mut f, dim, dtype).into(), 1e-6));
    let (cos, sin) = (put(&mut f, tokens * dim / 2, DType::F32), put(&mut f, tokens * dim / 2, DType::F32));
    let op = NormRope { heads, rotary: dim, tokens, norm, angles: f.angles(cos, sin, tokens) };
    let (qkv, qk) = (put(&mut f, tokens * qkv_width, dtype), f.poisoned(tokens * 6 * dim, dtype));
    f.backend.norm_rope(&op, qkv, qk);
    let d_qkv = put(&mut f, tokens * qkv_width, dtype);
    let d_norm = (put(&mut f, dim, DType::F32), put(&mut f, dim, DType::F32));
    f.backend.norm_rope_backward(&op, qkv, d_qkv, Some(d_norm));
    for (name, buffer) in [("rope", qk), ("rope d_qkv", d_qkv), ("rope d_query", d_norm.0), ("rope d_key", d_norm.1)] {
        results.push((name, f.bytes(buffer)));
    }

    // Heads so wide that a sequence is cut.
    let (heads, dim) = (Heads { query: 2, key_value: 1, dim: 128 }, 128);
    for (causal, window) in [(true, None), (true, Some(100)), (false, None)] {
        let case = attention::Case { heads, bounds: vec![0, 130, 131, tokens], causal, window };
        let op = case.op(&mut f, qkv);
        f.backend.attention(&op);
        let d_out = put(&mut f, tokens * 2 * dim, dtype);
        let (d_qkv, scratch) =
            (f.poisoned(qkv.len, dtype), f.poisoned(DeviceKind::Cpu.attention_scratch(heads, tokens), DType::F32));
        f.backend.attention_backward(&op, rows(d_out, 2 * dim), d_qkv, scratch);
        for (name, buffer) in
            [("attention", op.out.buffer), ("log_sum_exp", op.log_sum_exp), ("attention d_qkv", d_qkv)]
        {
            results.push((name, f.bytes(buffer)));
        }
    }

    for (name, buffer) in vision::results(&mut f, dtype) {
        results.push((name, f.bytes(buffer)));
    }

    let gate_up = put(&mut f, tokens * 2 * width, dtype);
    let out = f.poisoned(tokens * width, dtype);
    f.backend.swiglu(gate_up, width, out);
    f.backend.swiglu_backward(gate_up, width, d_out);
    results.push(("swiglu", f.bytes(out)));
    results.push(("swiglu d", f.bytes(gate_up)));

    let (vocab, loss_rows) = (3000, 50);
    let logits = put(&mut f, loss_rows * vocab, dtype);
    let targets = f.ints(&(0..loss_rows).map(|row| row * 7).collect::<Vec<_>>());
    let op = CrossEntropy {
        rows: loss_rows,
        vocab,
        logits,
        targets,
        weights: put(&mut f, loss_rows, DType::F32),
        scale: 0.1,
        gradient: Some(rows(logits, vocab)),
        nll: f.poisoned(loss_rows, DType::F32),
        correct: f.poisoned(loss_rows, DType::F32),
        entropy: f.poisoned(loss_rows, DType::F32),
    };
    f.backend.cross_entropy(&op);
    for (name, buffer) in [("logits", logits), ("nll", op.nll), ("correct", op.correct), ("entropy", op.entropy)] {
        results.push((name, f.bytes(buffer)));
    }

    let ids = f.ints(&(0..tokens).map(|t| t * t % 97).collect::<Vec<_>>());
    let table_gradient = put(&mut f, 400 * width, DType::F32);
    f.backend.embedding_backward(ids, d_out, width, table_gradient);
    let bias = put(&mut f, width, DType::F32);
    f.backend.sum_rows(rows(d_out, width), tokens, width, bias);
    let product = f.put(&[1.0], DType::F64);
    f.backend.dot(table_gradient, table_gradient, product);
    for (name, buffer) in [("embedding", table_gradient), ("bias", bias), ("dot", product)] {
        results.push((name, f.bytes(buffer)));
    }

    for (layout, a, b) in [(Layout::Nt, x, d_out), (Layout::Tn, x, d_out)] {
        let (m, n, k) = if layout == Layout::Nt { (tokens, tokens, width) } else { (width, width, tokens) };
        let c = put(&mut f, m * n, DType::F32);
        let (a, b) = (rows(a, width), rows(b, width));
        f.backend.matmul(&Matmul { layout, m, n, k, a, b, c: rows(c, n), accumulate: true, bias: None });
        results.push(("matmul", f.bytes(c)));
    }

    let (experts, top_k) = (16, 4);
    let op = Router {
        tokens,
        experts,
        top_k,
        normalise: true,
        probabilities: f.poisoned(tokens * experts, DType::F32),
        experts_chosen: f.poisoned(tokens * top_k, DType::I32),
        weights: f.poisoned(tokens * top_k, DType::F32),
    };
    let (logits, balance) = (put(&mut f, tokens * experts, DType::F32), put(&mut f, 2 * experts, DType::F32));
    f.backend.router(&op, logits, Some(balance));
    let permutation = Permutation {
        offsets: f.poisoned(experts + 1, DType::I32),
        pairs: f.poisoned(tokens * top_k, DType::I32),
        rows: f.poisoned(tokens * top_k, DType::I32),
    };
    f.backend.permute(&op, &permutation);
    let experts_out = f.poisoned(tokens * top_k * width, dtype);
    f.backend.gather_rows(x, permutation.pairs, top_k, width, experts_out);
    let out = f.poisoned(tokens * width, dtype);
    f.backend.combine(experts_out, &permutation, Some(op.weights), top_k, width, out);
    let (d_x, d_weights) = (f.poisoned(experts_out.len, dtype), f.poisoned(op.weights.len, DType::F32));
    f.backend.combine_backward(d_out, experts_out, &permutation, op.weights, top_k, width, d_x, d_weights);
    for (name, buffer) in [("balance", balance), ("combine", out), ("combine d_x", d_x), ("d_weights", d_weights)] {
        results.push((name, f.bytes(buffer)));
    }
    results
}

#[test]
fn one_and_three_threads_give_equal_bits() {
    for dtype in TYPES {
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| everything(dtype))
        };
        for ((name, one), (_, three)) in run(1).iter().zip(run(3)) {
            assert!(*one == three, "{name} in {dtype:?}");
        }
    }
}
