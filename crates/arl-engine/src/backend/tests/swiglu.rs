//! The gated activation.

use super::*;

fn reference(gate_up: &[f64], width: usize) -> Vec<f64> {
    let silu = |x: f64| x / (1.0 + (-x).exp());
    gate_up.chunks(2 * width).flat_map(|row| (0..width).map(|i| silu(row[i]) * row[width + i])).collect()
}

/// The gradient of `gate_up`, for `d_out`.
fn gradient(gate_up: &[f64], width: usize, d_out: &[f64]) -> Vec<f64> {
    let mut d = Vec::new();
    for (row, d_out) in gate_up.chunks(2 * width).zip(d_out.chunks(width)) {
        let (gate, up) = row.split_at(width);
        let sigmoid: Vec<f64> = gate.iter().map(|gate| 1.0 / (1.0 + (-gate).exp())).collect();
        d.extend((0..width).map(|i| d_out[i] * up[i] * sigmoid[i] * (1.0 + gate[i] * (1.0 - sigmoid[i]))));
        d.extend((0..width).map(|i| d_out[i] * gate[i] * sigmoid[i]));
    }
    d
}

const SHAPES: [(usize, usize); 8] = [(0, 8), (1, 1), (1, 37), (5, 33), (3, 1000), (67, 130), (2, 4104), (3, 2051)];

#[test]
fn forward_is_the_reference() {
    let mut random = Random(6);
    for dtype in TYPES {
        for (rows, width) in SHAPES {
            let mut fixture = Fixture::new();
            let gate_up: Vec<f64> =
                random.values(rows * 2 * width, dtype).iter().map(|x| round(4.0 * x, dtype)).collect();
            let expected = reference(&gate_up, width);
            let (gate_up, out) = (fixture.put(&gate_up, dtype), fixture.poisoned(rows * width, dtype));
            fixture.backend.swiglu(gate_up, width, out);
            assert_close("out", &fixture.get(out), &expected, bound(dtype, 6.0));
        }
    }
}

#[test]
fn great_gates_saturate() {
    let mut fixture = Fixture::new();
    let gate_up = fixture.put(&[1e4, -1e4, 200.0, -200.0, 2.0, 2.0, 2.0, 2.0], DType::F32);
    let (d_out, out) = (fixture.put(&[1.0; 4], DType::F32), fixture.poisoned(4, DType::F32));
    fixture.backend.swiglu(gate_up, 4, out);
    assert_close("out", &fixture.get(out), &[2e4, 0.0, 400.0, 0.0], 1e-7);
    fixture.backend.swiglu_backward(gate_up, 4, d_out);
    assert_close("d", &fixture.get(gate_up), &[2.0, 0.0, 2.0, 0.0, 1e4, 0.0, 200.0, 0.0], 1e-7);
}

#[test]
fn a_nan_is_not_hidden() {
    for dtype in TYPES {
        let mut fixture = Fixture::new();
        let gate_up = fixture.put(&[f64::NAN, 1.0, 1.0, f64::NAN], dtype);
        let (d_out, out) = (fixture.put(&[1.0; 2], dtype), fixture.poisoned(2, dtype));
        fixture.backend.swiglu(gate_up, 2, out);
        assert!(fixture.get(out).iter().all(|x| x.is_nan()));
        fixture.backend.swiglu_backward(gate_up, 2, d_out);
        let nan: Vec<bool> = fixture.get(gate_up).iter().map(|x| x.is_nan()).collect();
        // The gradient of `up` is the gate's activation, whatever `up` is.
        assert_eq!(nan, [true, true, true, false]);
    }
}

#[test]
fn backward_is_the_derivative() {
    let mut random = Random(7);
    for dtype in TYPES {
        for (rows, width) in [(1, 1), (1, 37), (5, 33)] {
            let mut fixture = Fixture::new();
            let (gate_up, d_out) = (random.values(rows * 2 * width, dtype), random.values(rows * width, dtype));
            let expected = differences(&gate_up, |gate_up| inner(&reference(gate_up, width), &d_out));
            assert_close("the formula's", &gradient(&gate_up, width, &d_out), &expected, 1e-7);
            let (gate_up, d_out) = (fixture.put(&gate_up, dtype), fixture.put(&d_out, dtype));
            fixture.backend.swiglu_backward(gate_up, width, d_out);
            assert_close("d_gate_up", &fixture.get(gate_up), &expected, bound(dtype, 8.0));
        }
    }
}

#[test]
fn backward_goes_over_rows_of_all_widths_and_alignments() {
    let mut random = Random(10);
    for dtype in TYPES {
        for (rows, width) in SHAPES {
            for aligned in [true, false] {
                let mut fixture = Fixture::new();
                let (gate_up, d_out) = (random.values(rows * 2 * width, dtype), random.values(rows * width, dtype));
                let expected = gradient(&gate_up, width, &d_out);
                let expected_out = reference(&gate_up, width);
                let d_out = fixture.put(&d_out, dtype);
                let gate_up =
                    if aligned { fixture.put(&gate_up, dtype) } else { fixture.put_unaligned(&gate_up, dtype) };
                let out = fixture.poisoned(rows * width, dtype);
                fixture.backend.swiglu(gate_up, width, out);
                assert_close("out", &fixture.get(out), &expected_out, bound(dtype, 6.0));
                fixture.backend.swiglu_backward(gate_up, width, d_out);
                assert_close("d_gate_up", &fixture.get(gate_up), &expected, bound(dtype, 8.0));
            }
        }
    }
}
