//! The gated activation of the MLP: `silu(gate) * up`, forward and backward.

use rayon::prelude::*;

use super::element::Element;
use super::vector::{rows_a_task, sigmoid, vectorise};

/// `out[t, i] = silu(gate_up[t, i]) * gate_up[t, width + i]`.
pub(super) fn swiglu<T: Element>(gate_up: &[T], width: usize, out: &mut [T]) {
    assert_eq!(gate_up.len(), 2 * out.len(), "swiglu of rows of {width}");
    let rows = rows_a_task(3 * width);
    out.par_chunks_mut(rows * width).zip(gate_up.par_chunks(rows * 2 * width)).for_each(|(out, gate_up)| {
        vectorise!({
            for (out, gate_up) in out.chunks_exact_mut(width).zip(gate_up.chunks_exact(2 * width)) {
                let (gate, up) = gate_up.split_at(width);
                for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
                    let gate = gate.load();
                    *out = T::store(gate * sigmoid(gate) * up.load());
                }
            }
        });
    });
}

/// `gate_up` becomes its own gradient: with `s = sigmoid(gate)`, `d_gate = d_out up s (1 + gate (1 - s))` and
/// `d_up = d_out gate s`.
pub(super) fn swiglu_backward<T: Element>(gate_up: &mut [T], width: usize, d_out: &[T]) {
    assert_eq!(gate_up.len(), 2 * d_out.len(), "swiglu_backward of rows of {width}");
    let rows = rows_a_task(3 * width);
    gate_up.par_chunks_mut(rows * 2 * width).zip(d_out.par_chunks(rows * width)).for_each(|(gate_up, d_out)| {
        vectorise!({
            for (gate_up, d_out) in gate_up.chunks_exact_mut(2 * width).zip(d_out.chunks_exact(width)) {
                let (gate, up) = gate_up.split_at_mut(width);
                backward_row(gate, up, d_out);
            }
        });
    });
}

/// A function of its own, so that the compiler knows the three rows to be apart.
#[inline(always)]
fn backward_row<T: Element>(gate: &mut [T], up: &mut [T], d_out: &[T]) {
    let width = d_out.len();
    let (gate, up) = (&mut gate[..width], &mut up[..width]);
    for i in 0..width {
        let (g, u, d) = (gate[i].load(), up[i].load(), d_out[i].load());
        let s = sigmoid(g);
        gate[i] = T::store(d * u * s * (1.0 + g * (1.0 - s)));
        up[i] = T::store(d * g * s);
    }
}
