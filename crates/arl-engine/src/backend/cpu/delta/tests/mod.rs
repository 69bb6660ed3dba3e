//! The chunked form against the recurrence in f64, both passes; and what must not change a bit.

mod golden;

use super::decay::Gates;
use super::{Shape, backward, forward};
use crate::backend::cpu::element::Element;
use crate::backend::cpu::gemm::Products;
use crate::backend::cpu::tests::recurrence::{Inputs, inputs};
use crate::backend::cpu::tests::{Random, assert_close};
use crate::backend::{DType, DeltaHeads};

const HEADS: DeltaHeads = DeltaHeads { key: 2, value: 4, key_dim: 24, value_dim: 40 };

/// What a whole pass gives.
struct Outcome<T> {
    out: Vec<T>,
    states: Vec<f32>,
    d_qkv: Vec<T>,
    /// `[value, T]` each.
    d_g: Vec<f32>,
    d_beta: Vec<f32>,
}

/// `[T, heads]` as `[heads, T]`.
fn by_heads(x: &[f64], heads: usize) -> Vec<f32> {
    let tokens = x.len() / heads;
    (0..heads * tokens).map(|i| x[i % tokens * heads + i / tokens] as f32).collect()
}

/// Back again.
fn by_tokens(x: &[f32], heads: usize) -> Vec<f64> {
    let tokens = x.len() / heads;
    (0..heads * tokens).map(|i| f64::from(x[i % heads * tokens + i / heads])).collect()
}

fn widened<T: Element>(x: &[T]) -> Vec<f64> {
    x.iter().map(|x| f64::from(x.load())).collect()
}

fn run<T: Element>(inputs: &Inputs, d_out: &[f64], chunk: usize) -> Outcome<T> {
    let (heads, tokens) = (inputs.heads, inputs.tokens());
    let cu_seqlens: Vec<i32> = inputs.bounds.iter().map(|bound| *bound as i32).collect();
    let shape = Shape::new(heads, tokens, &cu_seqlens, chunk);
    let (g, beta) = (by_heads(&inputs.g, heads.value), by_heads(&inputs.beta, heads.value));
    let gates = Gates { g: &g, beta: &beta };
    let mut qkv: Vec<T> = inputs.qkv().into_iter().map(|x| T::store(x as f32)).collect();
    let mut out = vec![T::store(f32::NAN); tokens * heads.value_columns()];
    let mut states = vec![f32::NAN; (cu_seqlens.len() - 1) * heads.state()];
    forward::forward(&shape, &qkv, gates, &mut out, Some(&mut states));
    let d_out: Vec<T> = d_out.iter().map(|x| T::store(*x as f32)).collect();
    let (mut d_g, mut d_beta) = (vec![f32::NAN; g.len()], vec![f32::NAN; g.len()]);
    let panels = heads.key_dim * heads.value_dim.next_multiple_of(Products::new().columns());
    let mut before = vec![f32::NAN; tokens / chunk * heads.value * panels];
    backward::backward(&shape, &mut qkv, gates, &d_out, (&mut d_g, &mut d_beta), &mut before);
    Outcome { out, states, d_qkv: qkv, d_g, d_beta }
}

/// Compares both passes in f32 with the recurrence.
fn compare(inputs: &Inputs, chunk: usize, tolerance: f64) {
    let heads = inputs.heads;
    let mut random = Random(31);
    let d_out = random.values(inputs.v.len(), DType::F32);
    let (expected, gradients) = (inputs.forward(), inputs.backward(&d_out));
    let outcome = run::<f32>(inputs, &d_out, chunk);
    assert_close("out", &widened(&outcome.out), &expected.out, tolerance);
    assert_close("states", &widened(&outcome.states), &expected.states, tolerance);
    let rows = outcome.d_qkv.chunks_exact(heads.channels());
    let columns = |first: usize, width: usize| -> Vec<f64> {
        rows.clone().flat_map(|row| row[first..first + width].iter().map(|x| f64::from(*x))).collect()
    };
    let (keys, values) = (heads.key_columns(), heads.value_columns());
    assert_close("d_q", &columns(0, keys), &gradients.q, tolerance);
    assert_close("d_k", &columns(keys, keys), &gradients.k, tolerance);
    assert_close("d_v", &columns(2 * keys, values), &gradients.v, tolerance);
    // A gate's gradient is what is left of sums over all pairs of tokens around it: with 40 other draws of the inputs below, chunks
    // of 64 and 256 bits, half of them are more than 1.8e-6 apart somewhere, and the farthest 3.5e-6.
    assert_close("d_g", &by_tokens(&outcome.d_g, heads.value), &gradients.g, tolerance.max(6e-6));
    assert_close("d_beta", &by_tokens(&outcome.d_beta, heads.value), &gradients.beta, tolerance);
}

#[test]
fn the_chunked_form_is_the_recurrence() {
    for chunk in [16, 32, 64] {
        compare(&inputs(&mut Random(30), HEADS, &[0, 1, 16, 80, 80, 213]), chunk, 3e-6);
    }
    let wide = DeltaHeads { key: 1, value: 2, key_dim: 128, value_dim: 128 };
    compare(&inputs(&mut Random(32), wide, &[0, 10, 150]), 64, 3e-6);
    let narrow = DeltaHeads { key: 3, value: 3, key_dim: 5, value_dim: 7 };
    compare(&inputs(&mut Random(33), narrow, &[0, 64, 65]), 64, 3e-6);
}

#[test]
fn heads_that_forget_at_once_or_never_stay_finite_and_right() {
    let mut inputs = inputs(&mut Random(34), HEADS, &[0, 130]);
    for (i, g) in inputs.g.iter_mut().enumerate() {
        *g = [-1e4, 0.0, if i / 4 % 7 == 0 { -200.0 } else { 0.0 }, -80.0][i % 4];
    }
    for (i, beta) in inputs.beta.iter_mut().enumerate() {
        *beta = [1.0, 1.0, 0.0, 1.0][(i / 4 + i) % 4];
    }
    compare(&inputs, 64, 2e-5);
}

#[test]
fn keys_that_are_all_equal_write_over_each_other() {
    let mut inputs = inputs(&mut Random(35), HEADS, &[0, 100]);
    let width = HEADS.key_columns();
    let first = inputs.k[..width].to_vec();
    inputs.k.chunks_exact_mut(width).for_each(|row| row.copy_from_slice(&first));
    inputs.g.fill(0.0);
    inputs.beta.fill(1.0);
    let expected = inputs.forward();
    let outcome = run::<f32>(&inputs, &vec![0.0; inputs.v.len()], 64);
    // What is left of values of about 1 is some 0.04 of them.
    assert_close("out", &widened(&outcome.out), &expected.out, 1e-5);
}

#[test]
fn the_number_of_threads_does_not_change_a_bit() {
    let inputs = inputs(&mut Random(36), HEADS, &[0, 1, 130, 200, 263]);
    let d_out = Random(37).values(inputs.v.len(), DType::F32);
    let bits = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let outcome = pool.install(|| run::<f32>(&inputs, &d_out, 64));
        let all = [outcome.out, outcome.states, outcome.d_qkv, outcome.d_g, outcome.d_beta];
        all.concat().into_iter().map(f32::to_bits).collect::<Vec<_>>()
    };
    let one = bits(1);
    assert!(one == bits(2) && one == bits(3));
}

#[test]
fn packed_sequences_have_the_bits_of_each_alone() {
    let inputs = inputs(&mut Random(38), HEADS, &[0, 70, 71, 200]);
    let d_out = Random(39).values(inputs.v.len(), DType::F32);
    let together = run::<f32>(&inputs, &d_out, 64);
    let values = HEADS.value_columns();
    for number in 0..3 {
        let tokens = inputs.bounds[number]..inputs.bounds[number + 1];
        let alone = run::<f32>(&inputs.sequence(number), &d_out[tokens.start * values..tokens.end * values], 64);
        assert!(together.out[tokens.start * values..tokens.end * values] == alone.out, "{number}");
        let channels = HEADS.channels();
        assert!(together.d_qkv[tokens.start * channels..tokens.end * channels] == alone.d_qkv, "{number}");
        assert!(together.states[number * HEADS.state()..(number + 1) * HEADS.state()] == alone.states, "{number}");
        for head in 0..HEADS.value {
            let range = head * inputs.tokens() + tokens.start..head * inputs.tokens() + tokens.end;
            let of_alone = head * tokens.len()..(head + 1) * tokens.len();
            assert!(together.d_g[range.clone()] == alone.d_g[of_alone.clone()], "{number} {head}");
            assert!(together.d_beta[range] == alone.d_beta[of_alone], "{number} {head}");
        }
    }
}

#[test]
fn chunks_of_every_size_leave_one_state_after_eight_thousand_tokens() {
    let heads = DeltaHeads { key: 1, value: 2, key_dim: 32, value_dim: 32 };
    let mut inputs = inputs(&mut Random(40), heads, &[0, 8192]);
    // One head hardly forgets: e^-0.0005 a token; the other one not at all.
    inputs.g.iter_mut().enumerate().for_each(|(i, g)| *g = if i % 2 == 0 { *g * 0.1 } else { 0.0 });
    let expected = inputs.forward().states;
    let size = (expected.iter().map(|x| x * x).sum::<f64>() / expected.len() as f64).sqrt();
    let cu_seqlens = [0, 8192];
    let (g, beta) = (by_heads(&inputs.g, 2), by_heads(&inputs.beta, 2));
    let qkv: Vec<f32> = inputs.qkv().into_iter().map(|x| x as f32).collect();
    for chunk in [16, 32, 64, 128] {
        let shape = Shape::new(heads, 8192, &cu_seqlens, chunk);
        let mut states = vec![0.0; heads.state()];
        let mut out = vec![0.0; 8192 * heads.value_columns()];
        forward::forward(&shape, &qkv, Gates { g: &g, beta: &beta }, &mut out, Some(&mut states));
        let errors = states.iter().zip(&expected).map(|(state, expected)| (f64::from(*state) - expected).abs());
        let worst = errors.fold(0.0, f64::max) / size;
        assert!(worst < 4e-6, "chunks of {chunk}: {worst:e} of the state's root mean square");
    }
}
