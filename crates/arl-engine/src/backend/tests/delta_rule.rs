//! The gated delta rule in every type: by value against the recurrence in f64, one token at a time against whole sequences, and packed
//! sequences against each alone.

use super::delta::{columns, near, sequences, sigmoid, within};
use super::recurrence::{Inputs, inputs};
use super::*;
use crate::backend::{DeltaHeads, GatedDelta, Sequences};

const HEADS: DeltaHeads = DeltaHeads { key: 2, value: 4, key_dim: 16, value_dim: 24 };

/// Gates as they come: `b`, then `a`, of all heads of each token.
fn gates(random: &mut Random, tokens: usize, dtype: DType) -> Vec<f64> {
    random.values(tokens * 2 * HEADS.value, dtype)
}

/// The rule's operation, and the inputs as it sees them: its gates are taken from `gates`, `[T, 2 value]`.
fn rule(
    f: &mut Fixture,
    random: &mut Random,
    (heads, bounds): (DeltaHeads, &[usize]),
    gates: &[f64],
    dtype: DType,
) -> (GatedDelta, Inputs) {
    let mut inputs = inputs(random, heads, bounds);
    let tokens = inputs.tokens();
    for x in [&mut inputs.q, &mut inputs.k, &mut inputs.v] {
        x.iter_mut().for_each(|x| *x = round(*x, dtype));
    }
    let (a_log, dt_bias) = (random.values(heads.value, dtype), random.values(heads.value, dtype));
    for (t, row) in gates.chunks_exact(2 * heads.value).enumerate() {
        for head in 0..heads.value {
            let x: f64 = row[heads.value + head] + dt_bias[head];
            let softplus = if x > 20.0 { x } else { x.exp().ln_1p() };
            inputs.g[t * heads.value + head] = -a_log[head].exp() * softplus;
            inputs.beta[t * heads.value + head] = sigmoid(row[head]);
        }
    }
    let (gates, stride) = within(f, random, gates, 2 * heads.value, dtype);
    let kind = f.backend.kind();
    let op = GatedDelta {
        heads,
        sequences: sequences(f, bounds),
        tokens,
        qkv: f.put(&inputs.qkv(), dtype),
        gates: rows(gates, stride),
        a_log: f.put(&a_log, dtype),
        dt_bias: f.put(&dt_bias, dtype),
        scratch: f.poisoned(GatedDelta::backward_scratch(kind, heads, tokens, bounds.len() - 1), DType::F32),
    };
    (op, inputs)
}

/// Compares both passes with the recurrence, one rounding of a type of 16 bits apart; `f32` is the bound of what is f32 throughout.
fn compare(op: &GatedDelta, inputs: &Inputs, (f, random): (&mut Fixture, &mut Random), dtype: DType, f32: f64) {
    let heads = op.heads;
    let count = heads.value;
    let d_out = random.values(inputs.v.len(), dtype);
    let (expected, gradients) = (inputs.forward(), inputs.backward(&d_out));
    let out = f.poisoned(inputs.v.len(), dtype);
    let states = f.poisoned(op.sequences.count * heads.state(), DType::F32);
    f.backend.gated_delta(op, out, Some(states));
    // One rounding of what comes out; in f32 those of the sums.
    let steps = if dtype == DType::F32 { f32 / bound(dtype, 1.0) } else { 1.0 };
    near("out", dtype, steps, &f.get(out), &expected.out);
    // State and sums are f32 in every type.
    assert_close("states", &f.get(states), &expected.states, f32 / 1.6);
    // Without a place for the states the output is the same.
    let again = f.poisoned(inputs.v.len(), dtype);
    f.backend.gated_delta(op, again, None);
    assert_eq!(f.bytes(again), f.bytes(out));

    let gates = f.get(op.gates.buffer);
    let d_out = f.put(&d_out, dtype);
    let ones = vec![1.0; count];
    let (d_a_log, d_dt_bias) = (f.put(&ones, DType::F32), f.put(&ones, DType::F32));
    f.backend.gated_delta_backward(op, d_out, d_a_log, d_dt_bias);
    let d_qkv = f.get(op.qkv);
    let (keys, values) = (heads.key_columns(), heads.value_columns());
    for (name, first, width, expected) in
        [("d_q", 0, keys, &gradients.q), ("d_k", keys, keys, &gradients.k), ("d_v", 2 * keys, values, &gradients.v)]
    {
        near(name, dtype, steps, &columns(&d_qkv[first..], width, heads.channels()), expected);
    }
    let (mut d_a, mut d_b) = (Vec::new(), Vec::new());
    let (mut of_log, mut of_bias) = (ones.clone(), ones);
    let (a_log, dt_bias) = (f.get(op.a_log), f.get(op.dt_bias));
    for (i, (d_g, d_beta)) in gradients.g.iter().zip(&gradients.beta).enumerate() {
        let (t, head) = (i / count, i % count);
        let x = gates[t * op.gates.stride + count + head] + dt_bias[head];
        d_a.push(d_g * -a_log[head].exp() * sigmoid(x));
        d_b.push(d_beta * inputs.beta[i] * (1.0 - inputs.beta[i]));
        of_log[head] += d_g * inputs.g[i];
        of_bias[head] += d_a[i];
    }
    let d_gates = f.get(op.gates.buffer);
    near("d_b", dtype, steps, &columns(&d_gates, count, op.gates.stride), &d_b);
    // Of gates at their ends nothing but rounding is left, at the size of what cancels.
    if d_a.iter().all(|d| d.abs() < 1e-6) {
        let rest = d_gates.chunks(op.gates.stride).flat_map(|row| &row[count..2 * count]);
        return assert!(rest.into_iter().all(|d| d.abs() < f32), "gradients of decays that count for nothing");
    }
    near("d_a", dtype, steps, &columns(&d_gates[count..], count, op.gates.stride), &d_a);
    assert_close("d_a_log", &f.get(d_a_log), &of_log, 1e-5);
    assert_close("d_dt_bias", &f.get(d_dt_bias), &of_bias, 1e-5);
}

#[test]
fn the_rule_is_the_recurrence_in_every_type() {
    // Sequences of 1, 0, 63, 64, 65 and 200 tokens: within a chunk, of a chunk, over chunks.
    let bounds = [0, 1, 1, 64, 128, 193, 393];
    for dtype in TYPES {
        let (mut random, mut f) = (Random(52), Fixture::new());
        let gates = gates(&mut random, 393, dtype);
        let (op, inputs) = rule(&mut f, &mut random, (HEADS, &bounds), &gates, dtype);
        compare(&op, &inputs, (&mut f, &mut random), dtype, 4.8e-6);
    }
}

#[test]
fn heads_of_released_models_and_the_largest_and_odd_ones_are_the_recurrence() {
    let heads = |key, value, key_dim, value_dim| DeltaHeads { key, value, key_dim, value_dim };
    for (heads, tokens, types) in [
        (heads(1, 1, 128, 128), 70, &TYPES[..2]),
        (heads(1, 1, 256, 32), 66, &NARROW[..1]),
        (heads(3, 3, 5, 7), 65, &TYPES[..]),
    ] {
        for &dtype in types {
            let (mut random, mut f) = (Random(55), Fixture::new());
            let gates = random.values(tokens * 2 * heads.value, dtype);
            let (op, inputs) = rule(&mut f, &mut random, (heads, &[0, tokens]), &gates, dtype);
            compare(&op, &inputs, (&mut f, &mut random), dtype, 4.8e-6);
        }
    }
}

#[test]
fn heads_that_forget_at_once_or_never_stay_finite_and_right() {
    let (mut random, mut f) = (Random(56), Fixture::new());
    let mut gates = gates(&mut random, 130, DType::F32);
    for (t, row) in gates.chunks_exact_mut(8).enumerate() {
        // Strengths of about 1 and 0; decays of e^-(thousands), 1, and both by turns.
        row.copy_from_slice(&[30.0, 30.0, -30.0, 30.0, 1e4, -40.0, if t % 7 == 0 { 300.0 } else { -40.0 }, 60.0]);
        row[t % 3] = [1.0, -90.0, 90.0][t % 3];
    }
    let (op, inputs) = rule(&mut f, &mut random, (HEADS, &[0, 130]), &gates, DType::F32);
    compare(&op, &inputs, (&mut f, &mut random), DType::F32, 2e-5);
}

#[test]
fn packed_sequences_have_the_bits_of_each_alone() {
    let bounds = [0, 70, 71, 200];
    for dtype in [DType::F32, DType::Bf16] {
        let (mut random, mut f) = (Random(57), Fixture::new());
        let gates = gates(&mut random, 200, dtype);
        let (op, inputs) = rule(&mut f, &mut random, (HEADS, &bounds), &gates, dtype);
        let d_out = random.values(inputs.v.len(), dtype);
        let (values, channels, gate_columns) = (HEADS.value_columns(), HEADS.channels(), 2 * HEADS.value);
        let run = |f: &mut Fixture, op: &GatedDelta, d_out: &[f64]| {
            let (out, d_out) = (f.poisoned(op.tokens * values, dtype), f.put(d_out, dtype));
            let states = f.poisoned(op.sequences.count * HEADS.state(), DType::F32);
            let [d_a_log, d_dt_bias] = [(); 2].map(|()| f.put(&[0.0; 4], DType::F32));
            f.backend.gated_delta(op, out, Some(states));
            f.backend.gated_delta_backward(op, d_out, d_a_log, d_dt_bias);
            let d_gates = columns(&f.get(op.gates.buffer), gate_columns, op.gates.stride);
            [f.get(out), f.get(states), f.get(op.qkv), d_gates]
        };
        let together = run(&mut f, &op, &d_out);
        for (number, pair) in bounds.windows(2).enumerate() {
            let alone = inputs.sequence(number);
            let tokens = alone.tokens();
            let part = |x: &[f64], width: usize| x[pair[0] * width..pair[1] * width].to_vec();
            let own = f.put(&part(&gates, gate_columns), dtype);
            let op = GatedDelta {
                sequences: sequences(&mut f, &[0, tokens]),
                tokens,
                qkv: f.put(&alone.qkv(), dtype),
                gates: rows(own, gate_columns),
                ..op
            };
            let [out, states, d_qkv, d_gates] = run(&mut f, &op, &part(&d_out, values));
            assert!(part(&together[0], values) == out, "{dtype:?} {number}: out");
            assert!(together[1][number * HEADS.state()..][..HEADS.state()] == states, "{dtype:?} {number}: states");
            assert!(part(&together[2], channels) == d_qkv, "{dtype:?} {number}: d_qkv");
            assert!(part(&together[3], gate_columns) == d_gates, "{dtype:?} {number}: d_gates");
        }
    }
}

#[test]
fn one_token_at_a_time_the_rule_is_that_of_whole_sequences() {
    for dtype in TYPES {
        let (mut random, mut f) = (Random(53), Fixture::new());
        let gates = gates(&mut random, 40, dtype);
        let (op, inputs) = rule(&mut f, &mut random, (HEADS, &[0, 40]), &gates, dtype);
        let expected = inputs.forward();
        let state = f.poisoned(HEADS.state(), DType::F32);
        let width = HEADS.value_columns();
        let part = |first: usize, tokens: usize, sequences: Sequences| GatedDelta {
            sequences,
            tokens,
            qkv: op.qkv.slice(first * HEADS.channels(), tokens * HEADS.channels()),
            gates: rows(
                op.gates.buffer.slice(first * op.gates.stride, op.gates.buffer.len - first * op.gates.stride),
                op.gates.stride,
            ),
            ..op
        };
        let prompt = sequences(&mut f, &[0, 30]);
        let out = f.poisoned(40 * width, dtype);
        f.backend.gated_delta(&part(0, 30, prompt), out.slice(0, 30 * width), Some(state));
        let one = sequences(&mut f, &[0, 1]);
        for t in 30..40 {
            f.backend.gated_delta_step(&part(t, 1, one), state, out.slice(t * width, width));
        }
        near("out", dtype, if dtype == DType::F32 { 50.0 } else { 1.0 }, &f.get(out), &expected.out);
        assert_close("state", &f.get(state), &expected.states, 3e-6);
    }
}
