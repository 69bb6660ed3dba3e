//! One new token a sequence, from and to the state that is kept of it.

use rayon::prelude::*;

use super::decay::Gates;
use super::head::{query_scale, unit_factor};
use crate::backend::DeltaHeads;
use crate::backend::cpu::element::Element;
use crate::backend::cpu::vector::vectorise;

/// `states` `[sequences, value heads, K, V]` and `out` `[sequences, value heads * V]` from `qkv` `[sequences, channels]`; gates are
/// `[value heads, sequences]`.
pub(super) fn step<T: Element>(heads: DeltaHeads, qkv: &[T], gates: Gates<'_>, states: &mut [f32], out: &mut [T]) {
    let DeltaHeads { key_dim, value_dim: width, .. } = heads;
    let sequences = gates.g.len() / heads.value;
    assert_eq!(qkv.len(), sequences * heads.channels(), "gated_delta_step of {sequences} sequences");
    assert_eq!(states.len(), sequences * heads.state(), "gated_delta_step of {sequences} sequences");
    assert_eq!(out.len(), sequences * heads.value_columns(), "gated_delta_step of {sequences} sequences");
    let tasks = out.par_chunks_exact_mut(width).zip(states.par_chunks_exact_mut(key_dim * width));
    tasks.enumerate().for_each(|(task, (out, state))| {
        let (sequence, head) = (task / heads.value, task % heads.value);
        let row = &qkv[sequence * heads.channels()..][..heads.channels()];
        let key_head = head / (heads.value / heads.key);
        let (q, rest) = row[key_head * key_dim..].split_at(key_dim);
        let k = &rest[heads.key_columns() - key_dim..][..key_dim];
        let v = &row[2 * heads.key_columns() + head * width..][..width];
        let at = head * sequences + sequence;
        vectorise!({
            let (of_q, of_k) = (unit_factor(q), unit_factor(k));
            let decay = gates.g[at].exp();
            let mut known = vec![0.0_f32; width];
            for (state, k) in state.chunks_exact_mut(width).zip(k) {
                let k = k.load() * of_k;
                for (state, known) in state.iter_mut().zip(&mut known) {
                    *state *= decay;
                    *known = state.mul_add(k, *known);
                }
            }
            for (known, v) in known.iter_mut().zip(v) {
                *known = gates.beta[at] * (v.load() - *known);
            }
            let mut total = vec![0.0_f32; width];
            for ((state, k), q) in state.chunks_exact_mut(width).zip(k).zip(q) {
                let (k, q) = (k.load() * of_k, q.load() * of_q * query_scale(key_dim));
                for ((state, written), total) in state.iter_mut().zip(&known).zip(&mut total) {
                    *state = k.mul_add(*written, *state);
                    *total = q.mul_add(*state, *total);
                }
            }
            for (out, total) in out.iter_mut().zip(&total) {
                *out = T::store(*total);
            }
        });
    });
}
