//! The gates.

use super::*;
use crate::backend::Heads;

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

#[test]
fn queries_and_gates_are_parted_head_by_head_and_joined_again() {
    let mut random = Random(80);
    for dtype in TYPES {
        for (tokens, heads) in [
            (1, Heads { query: 1, key_value: 1, dim: 2 }),
            (5, Heads { query: 4, key_value: 2, dim: 6 }),
            (300, Heads { query: 6, key_value: 3, dim: 64 }),
        ] {
            let mut fixture = Fixture::new();
            let (dim, rest) = (heads.dim, 2 * heads.key_columns());
            let values = random.values(tokens * (2 * heads.query_columns() + rest), dtype);
            let (mut qkv, mut gates) = (Vec::new(), Vec::new());
            for row in values.chunks(2 * heads.query_columns() + rest) {
                for head in row[..2 * heads.query_columns()].chunks(2 * dim) {
                    qkv.extend_from_slice(&head[..dim]);
                    gates.extend_from_slice(&head[dim..]);
                }
                qkv.extend_from_slice(&row[2 * heads.query_columns()..]);
            }
            let joined = fixture.put(&values, dtype);
            let (out, out_gates) = (fixture.poisoned(qkv.len(), dtype), fixture.poisoned(gates.len(), dtype));
            fixture.backend.split_gates(heads, joined, out, out_gates);
            assert_eq!((fixture.get(out), fixture.get(out_gates)), (qkv, gates));
            let again = fixture.poisoned(values.len(), dtype);
            fixture.backend.join_gates(heads, out, out_gates, again);
            assert_eq!(fixture.get(again), values);
        }
    }
}

#[test]
fn a_gate_of_each_element_and_its_derivatives_are_the_reference() {
    let mut random = Random(81);
    let reference =
        |x: &[f64], gates: &[f64]| -> Vec<f64> { x.iter().zip(gates).map(|(x, gate)| x * sigmoid(*gate)).collect() };
    for dtype in TYPES {
        for len in [1, 37, 40_001] {
            let mut fixture = Fixture::new();
            let (x, d_out) = (random.values(len, dtype), random.values(len, dtype));
            let gates: Vec<f64> = random.values(len, dtype).iter().map(|gate| round(4.0 * gate, dtype)).collect();
            let [x_buffer, gates_buffer, d_buffer] = [&x, &gates, &d_out].map(|values| fixture.put(values, dtype));
            let out = fixture.poisoned(len, dtype);
            fixture.backend.gate(x_buffer, gates_buffer, out);
            assert_close("out", &fixture.get(out), &reference(&x, &gates), bound(dtype, 6.0));
            fixture.backend.gate_backward(d_buffer, x_buffer, gates_buffer);
            if len < 100 {
                let d_x = differences(&x, |x| inner(&reference(x, &gates), &d_out));
                let d_gates = differences(&gates, |gates| inner(&reference(&x, gates), &d_out));
                assert_close("d_x", &fixture.get(d_buffer), &d_x, bound(dtype, 8.0));
                assert_close("d_gates", &fixture.get(gates_buffer), &d_gates, bound(dtype, 8.0));
            }
        }
    }
}

#[test]
fn a_gate_of_each_row_and_its_derivatives_are_the_reference() {
    let mut random = Random(82);
    let reference = |x: &[f64], logits: &[f64], before: &[f64], width: usize| -> Vec<f64> {
        (0..x.len()).map(|i| before[i] + sigmoid(logits[i / width]) * x[i]).collect()
    };
    for dtype in TYPES {
        for (rows, width) in [(1, 1), (3, 37), (700, 64)] {
            let mut fixture = Fixture::new();
            let len = rows * width;
            let [x, before, d_out] = [(); 3].map(|()| random.values(len, dtype));
            let logits = random.values(rows, DType::F32);
            let [x_buffer, out, d_buffer] = [&x, &before, &d_out].map(|values| fixture.put(values, dtype));
            let (logits_buffer, d_x) = (fixture.put(&logits, DType::F32), fixture.poisoned(len, dtype));
            fixture.backend.add_gated_rows(x_buffer, logits_buffer, width, out);
            assert_close("out", &fixture.get(out), &reference(&x, &logits, &before, width), bound(dtype, 6.0));
            fixture.backend.gated_rows_backward(d_buffer, x_buffer, logits_buffer, width, d_x);
            if len < 200 {
                let of = |x: &[f64], logits: &[f64]| inner(&reference(x, logits, &before, width), &d_out);
                assert_close("d_x", &fixture.get(d_x), &differences(&x, |x| of(x, &logits)), bound(dtype, 8.0));
                let d_logits = differences(&logits, |logits| of(&x, logits));
                assert_close("d_logits", &fixture.get(logits_buffer), &d_logits, bound(DType::F32, 64.0));
            }
        }
    }
}
