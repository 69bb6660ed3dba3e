//! The rule's leaf over buffers, in every type: by value against the recurrence in f64, and one token at a time against whole
//! sequences.

use super::inputs;
use super::recurrence::Inputs;
use crate::backend::cpu::tests::delta::{columns, near, sequences, sigmoid, within};
use crate::backend::cpu::tests::{Fixture, Random, TYPES, assert_close, round, rows};
use crate::backend::{DType, DeltaHeads, GatedDelta, Sequences};

/// The rule's operation, and the inputs as it sees them.
fn rule(
    f: &mut Fixture,
    random: &mut Random,
    heads: DeltaHeads,
    bounds: &[usize],
    dtype: DType,
) -> (GatedDelta, Inputs) {
    let mut inputs = inputs(random, heads, bounds);
    let tokens = inputs.tokens();
    for x in [&mut inputs.q, &mut inputs.k, &mut inputs.v] {
        x.iter_mut().for_each(|x| *x = round(*x, dtype));
    }
    let gates = random.values(tokens * 2 * heads.value, dtype);
    let (a_log, dt_bias) = (random.values(heads.value, dtype), random.values(heads.value, dtype));
    for (t, row) in gates.chunks_exact(2 * heads.value).enumerate() {
        for head in 0..heads.value {
            let x: f64 = row[heads.value + head] + dt_bias[head];
            inputs.g[t * heads.value + head] = -a_log[head].exp() * x.exp().ln_1p();
            inputs.beta[t * heads.value + head] = sigmoid(row[head]);
        }
    }
    let (gates, stride) = within(f, random, &gates, 2 * heads.value, dtype);
    let qkv: Vec<f32> = inputs.qkv();
    let op = GatedDelta {
        heads,
        sequences: sequences(f, bounds),
        tokens,
        qkv: f.put(&qkv.iter().map(|x| f64::from(*x)).collect::<Vec<_>>(), dtype),
        gates: rows(gates, stride),
        a_log: f.put(&a_log, dtype),
        dt_bias: f.put(&dt_bias, dtype),
        scratch: f.poisoned(GatedDelta::backward_scratch(heads, tokens), DType::F32),
    };
    (op, inputs)
}

#[test]
fn the_rule_is_the_recurrence_in_every_type() {
    let heads = DeltaHeads { key: 2, value: 4, key_dim: 16, value_dim: 24 };
    for dtype in TYPES {
        let (mut random, mut f) = (Random(52), Fixture::new());
        let (op, inputs) = rule(&mut f, &mut random, heads, &[0, 5, 64, 150], dtype);
        let d_out = random.values(inputs.v.len(), dtype);
        let (expected, gradients) = (inputs.forward(), inputs.backward(&d_out));
        let (out, states) = (f.poisoned(inputs.v.len(), dtype), f.poisoned(3 * heads.state(), DType::F32));
        f.backend.gated_delta(&op, out, Some(states));
        // One rounding of what comes out; in f32 those of the sums.
        let steps = if dtype == DType::F32 { 80.0 } else { 1.0 };
        near("out", dtype, steps, &f.get(out), &expected.out);
        // State and sums are f32 in every type.
        assert_close("states", &f.get(states), &expected.states, 3e-6);

        let gates = f.get(op.gates.buffer);
        let d_out = f.put(&d_out, dtype);
        let (d_a_log, d_dt_bias) = (f.put(&[1.0; 4], DType::F32), f.put(&[1.0; 4], DType::F32));
        f.backend.gated_delta_backward(&op, d_out, d_a_log, d_dt_bias);
        let d_qkv = f.get(op.qkv);
        let (keys, values) = (heads.key_columns(), heads.value_columns());
        for (name, first, width, expected) in
            [("d_q", 0, keys, &gradients.q), ("d_k", keys, keys, &gradients.k), ("d_v", 2 * keys, values, &gradients.v)]
        {
            near(name, dtype, steps, &columns(&d_qkv[first..], width, heads.channels()), expected);
        }
        let (mut d_a, mut d_b) = (Vec::new(), Vec::new());
        let (mut of_log, mut of_bias) = ([1.0; 4], [1.0; 4]);
        let (a_log, dt_bias) = (f.get(op.a_log), f.get(op.dt_bias));
        for (i, (d_g, d_beta)) in gradients.g.iter().zip(&gradients.beta).enumerate() {
            let (t, head) = (i / 4, i % 4);
            let x = gates[t * op.gates.stride + 4 + head] + dt_bias[head];
            d_a.push(d_g * -a_log[head].exp() * sigmoid(x));
            d_b.push(d_beta * inputs.beta[i] * (1.0 - inputs.beta[i]));
            of_log[head] += d_g * inputs.g[i];
            of_bias[head] += d_a[i];
        }
        let d_gates = f.get(op.gates.buffer);
        near("d_b", dtype, steps, &columns(&d_gates, 4, op.gates.stride), &d_b);
        near("d_a", dtype, steps, &columns(&d_gates[4..], 4, op.gates.stride), &d_a);
        assert_close("d_a_log", &f.get(d_a_log), &of_log, 1e-5);
        assert_close("d_dt_bias", &f.get(d_dt_bias), &of_bias, 1e-5);
    }
}

#[test]
fn one_token_at_a_time_the_rule_is_that_of_whole_sequences() {
    let heads = DeltaHeads { key: 2, value: 4, key_dim: 16, value_dim: 24 };
    let (mut random, mut f) = (Random(53), Fixture::new());
    let (op, inputs) = rule(&mut f, &mut random, heads, &[0, 40], DType::F32);
    let expected = inputs.forward();
    let state = f.poisoned(heads.state(), DType::F32);
    let width = heads.value_columns();
    let part = |first: usize, tokens: usize, sequences: Sequences| GatedDelta {
        sequences,
        tokens,
        qkv: op.qkv.slice(first * heads.channels(), tokens * heads.channels()),
        gates: rows(
            op.gates.buffer.slice(first * op.gates.stride, op.gates.buffer.len - first * op.gates.stride),
            op.gates.stride,
        ),
        ..op
    };
    let prompt = sequences(&mut f, &[0, 30]);
    let out = f.poisoned(40 * width, DType::F32);
    f.backend.gated_delta(&part(0, 30, prompt), out.slice(0, 30 * width), Some(state));
    let one = sequences(&mut f, &[0, 1]);
    for t in 30..40 {
        f.backend.gated_delta_step(&part(t, 1, one), state, out.slice(t * width, width));
    }
    assert_close("out", &f.get(out), &expected.out, 3e-6);
    assert_close("state", &f.get(state), &expected.states, 3e-6);
}
