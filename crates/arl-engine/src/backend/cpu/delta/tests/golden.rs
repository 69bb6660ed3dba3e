//! The leaves against torch's autograd in f64, where the cases are on this machine.

use std::path::PathBuf;

use safetensors::SafeTensors;

use super::{by_heads, by_tokens, run, widened};
use crate::backend::DeltaHeads;
use crate::backend::cpu::conv;
use crate::backend::cpu::delta::decay::{Gates, Rates, gates, gates_backward};
use crate::backend::cpu::gated_norm::{gated_norm, gated_norm_backward};
use crate::backend::cpu::tests::assert_close;
use crate::backend::cpu::tests::recurrence::Inputs;

/// What rounding to f32 leaves of results that were computed in f64, with room for the sums.
const TOLERANCE: f64 = 3e-6;

/// The tensors of a case; `None`, with a notice, where there is none.
fn case(name: &str) -> Option<Vec<u8>> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..");
    let shared = std::env::var_os("ARL_SHARED").map_or_else(|| root.join("../shared"), PathBuf::from);
    let path = shared.join("golden/leaves").join(name).with_extension("safetensors");
    let bytes = std::fs::read(&path).ok();
    if bytes.is_none() {
        eprintln!("SKIPPED: {} is not there", path.display());
    }
    bytes
}

fn tensor(tensors: &SafeTensors<'_>, name: &str) -> (Vec<f64>, Vec<usize>) {
    let view = tensors.tensor(name).unwrap();
    let values = view.data().chunks_exact(4).map(|x| f64::from(f32::from_le_bytes(x.try_into().unwrap()))).collect();
    (values, view.shape().to_vec())
}

fn narrow(tensors: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    tensor(tensors, name).0.iter().map(|x| *x as f32).collect()
}

fn bounds(tensors: &SafeTensors<'_>) -> Vec<usize> {
    let view = tensors.tensor("cu").unwrap();
    view.data().chunks_exact(8).map(|x| i64::from_le_bytes(x.try_into().unwrap()) as usize).collect()
}

#[test]
fn the_rule_is_torchs() {
    for name in ["gated-delta", "gated-delta-128"] {
        let Some(bytes) = case(name) else { return };
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let get = |name: &str| tensor(&tensors, name);
        let ((q, keys), (v, values)) = (get("query"), get("value"));
        let heads = DeltaHeads { key: keys[1], value: values[1], key_dim: keys[2], value_dim: values[2] };
        let (k, g, beta) = (get("key").0, get("g").0, get("beta").0);
        let inputs = Inputs { heads, bounds: bounds(&tensors), q, k, v, g, beta };
        for chunk in [16, 64] {
            let outcome = run::<f32>(&inputs, &get("d_out").0, chunk);
            assert_close("out", &widened(&outcome.out), &get("out").0, TOLERANCE);
            let (keys, values) = (heads.key_columns(), heads.value_columns());
            let rows = outcome.d_qkv.chunks_exact(heads.channels());
            for (name, first, width) in [("d_query", 0, keys), ("d_key", keys, keys), ("d_value", 2 * keys, values)] {
                let columns: Vec<f64> =
                    rows.clone().flat_map(|row| row[first..first + width].iter().map(|x| f64::from(*x))).collect();
                assert_close(name, &columns, &get(name).0, TOLERANCE);
            }
            assert_close("d_g", &by_tokens(&outcome.d_g, heads.value), &get("d_g").0, TOLERANCE);
            assert_close("d_beta", &by_tokens(&outcome.d_beta, heads.value), &get("d_beta").0, TOLERANCE);
        }
    }
}

#[test]
fn the_convolution_is_torchs() {
    let Some(bytes) = case("conv") else { return };
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let (mut x, weight, d_out) = (narrow(&tensors, "x"), narrow(&tensors, "weight"), narrow(&tensors, "d_out"));
    let cu_seqlens: Vec<i32> = bounds(&tensors).into_iter().map(|bound| bound as i32).collect();
    let shape = conv::Shape { channels: 24, taps: 4, cu_seqlens: &cu_seqlens, stride: 24 };
    let mut out = vec![0.0; x.len()];
    conv::conv(&shape, &x, &weight, &mut out);
    assert_close("out", &widened(&out), &tensor(&tensors, "out").0, TOLERANCE);
    let mut d_weight = vec![0.0; weight.len()];
    conv::conv_backward(&shape, &mut x, &weight, &d_out, &mut d_weight);
    assert_close("d_x", &widened(&x), &tensor(&tensors, "d_x").0, TOLERANCE);
    assert_close("d_weight", &widened(&d_weight), &tensor(&tensors, "d_weight").0, TOLERANCE);
}

#[test]
fn the_gated_norm_is_torchs() {
    let Some(bytes) = case("gated-norm") else { return };
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let (x, mut gate, weight) = (narrow(&tensors, "x"), narrow(&tensors, "gate"), narrow(&tensors, "weight"));
    let mut out = vec![0.0; x.len()];
    gated_norm(&x, (&gate, 24), (&weight, 1e-6), 24, &mut out);
    assert_close("out", &widened(&out), &tensor(&tensors, "out").0, TOLERANCE);
    let (mut d, mut d_weight) = (narrow(&tensors, "d_out"), vec![0.0; weight.len()]);
    gated_norm_backward(&x, (&mut gate, 24), (&weight, 1e-6), 24, &mut d, &mut d_weight);
    assert_close("d_x", &widened(&d), &tensor(&tensors, "d_x").0, TOLERANCE);
    assert_close("d_gate", &widened(&gate), &tensor(&tensors, "d_gate").0, TOLERANCE);
    assert_close("d_weight", &widened(&d_weight), &tensor(&tensors, "d_weight").0, TOLERANCE);
}

#[test]
fn the_decay_is_torchs() {
    let Some(bytes) = case("decay") else { return };
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let (a, a_log, dt_bias) = (narrow(&tensors, "a"), narrow(&tensors, "A_log"), narrow(&tensors, "dt_bias"));
    let rates = Rates { a_log: &a_log, dt_bias: &dt_bias };
    let mut rows: Vec<f32> = a.chunks_exact(6).flat_map(|row| [&[0.0; 6], row].concat()).collect();
    let (mut g, mut beta) = (vec![0.0; a.len()], vec![0.0; a.len()]);
    gates(&rates, (&rows, 12), &mut g, &mut beta);
    assert_close("g", &by_tokens(&g, 6), &tensor(&tensors, "g").0, TOLERANCE);
    assert_eq!(beta, vec![0.5; a.len()]);
    let d_g = by_heads(&tensor(&tensors, "d_g").0, 6);
    let (mut d_a_log, mut d_dt_bias) = (vec![0.0; 6], vec![0.0; 6]);
    let of_gates = Gates { g: &g, beta: &beta };
    let d_gates = (&*d_g, &*vec![0.0; a.len()]);
    gates_backward(&rates, of_gates, d_gates, (&mut rows, 12), (&mut d_a_log, &mut d_dt_bias));
    let d_a: Vec<f32> = rows.chunks_exact(12).flat_map(|row| row[6..].to_vec()).collect();
    assert_close("d_a", &widened(&d_a), &tensor(&tensors, "d_a").0, TOLERANCE);
    assert_close("d_A_log", &widened(&d_a_log), &tensor(&tensors, "d_A_log").0, TOLERANCE);
    assert_close("d_dt_bias", &widened(&d_dt_bias), &tensor(&tensors, "d_dt_bias").0, TOLERANCE);
}
