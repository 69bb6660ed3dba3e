//! Gates: attention's output gate, head by head next to its query, and the shared expert's, one a token.

use rayon::prelude::*;

use super::CpuBackend;
use super::element::{Element, with_element};
use super::vector::{dot, rows_a_task, sigmoid, vectorise};
use crate::backend::gates::Gates;
use crate::backend::{Buffer, Heads};

/// Elements that one task takes.
const BLOCK: usize = 16_384;

impl Gates for CpuBackend {
    fn split_gates(&mut self, heads: Heads, joined: Buffer, qkv: Buffer, gates: Buffer) {
        let mut lease = self.memory.lease();
        with_element!(joined.dtype, T => {
            split(heads, lease.read::<T>(joined), lease.write::<T>(qkv), lease.write::<T>(gates));
        });
    }

    fn join_gates(&mut self, heads: Heads, qkv: Buffer, gates: Buffer, joined: Buffer) {
        let mut lease = self.memory.lease();
        with_element!(joined.dtype, T => {
            join(heads, lease.read::<T>(qkv), lease.read::<T>(gates), lease.write::<T>(joined));
        });
    }

    fn gate(&mut self, x: Buffer, gates: Buffer, out: Buffer) {
        let mut lease = self.memory.lease();
        with_element!(x.dtype, T => gate(lease.read::<T>(x), lease.read::<T>(gates), lease.write::<T>(out)));
    }

    fn gate_backward(&mut self, d_out: Buffer, x: Buffer, gates: Buffer) {
        let mut lease = self.memory.lease();
        with_element!(x.dtype, T => {
            gate_backward(lease.write::<T>(d_out), lease.read::<T>(x), lease.write::<T>(gates));
        });
    }

    fn add_gated_rows(&mut self, x: Buffer, logits: Buffer, width: usize, out: Buffer) {
        let mut lease = self.memory.lease();
        let logits = lease.read(logits);
        with_element!(x.dtype, T => add_gated_rows(lease.read::<T>(x), logits, width, lease.write::<T>(out)));
    }

    fn gated_rows_backward(&mut self, d_out: Buffer, x: Buffer, logits: Buffer, width: usize, d_x: Buffer) {
        let mut lease = self.memory.lease();
        let logits = lease.write(logits);
        with_element!(x.dtype, T => {
            let (d_out, x) = (lease.read::<T>(d_out), lease.read::<T>(x));
            gated_rows_backward(d_out, x, logits, width, lease.write::<T>(d_x));
        });
    }
}

/// Columns of `joined`, of `qkv` and of `gates`, after a check of their lengths.
fn columns(heads: Heads, [joined, qkv, gates]: [usize; 3]) -> [usize; 3] {
    let columns = [heads.qkv_columns() + heads.query_columns(), heads.qkv_columns(), heads.query_columns()];
    let tokens = gates / columns[2];
    assert_eq!([joined, qkv, gates], columns.map(|columns| tokens * columns), "gates of {tokens} tokens");
    columns
}

fn split<T: Element>(heads: Heads, joined: &[T], qkv: &mut [T], gates: &mut [T]) {
    let [all, without, queries] = columns(heads, [joined.len(), qkv.len(), gates.len()]);
    let (dim, rows) = (heads.dim, rows_a_task(2 * all));
    let tasks = qkv.par_chunks_mut(rows * without).zip(gates.par_chunks_mut(rows * queries));
    tasks.zip(joined.par_chunks(rows * all)).for_each(|((qkv, gates), joined)| {
        let tokens = qkv.chunks_exact_mut(without).zip(gates.chunks_exact_mut(queries));
        for ((qkv, gates), joined) in tokens.zip(joined.chunks_exact(all)) {
            let (pairs, rest) = joined.split_at(2 * queries);
            qkv[queries..].copy_from_slice(rest);
            let heads = qkv.chunks_exact_mut(dim).zip(gates.chunks_exact_mut(dim));
            for ((query, gate), pair) in heads.zip(pairs.chunks_exact(2 * dim)) {
                query.copy_from_slice(&pair[..dim]);
                gate.copy_from_slice(&pair[dim..]);
            }
        }
    });
}

fn join<T: Element>(heads: Heads, qkv: &[T], gates: &[T], joined: &mut [T]) {
    let [all, without, queries] = columns(heads, [joined.len(), qkv.len(), gates.len()]);
    let (dim, rows) = (heads.dim, rows_a_task(2 * all));
    let tasks = qkv.par_chunks(rows * without).zip(gates.par_chunks(rows * queries));
    joined.par_chunks_mut(rows * all).zip(tasks).for_each(|(joined, (qkv, gates))| {
        let tokens = qkv.chunks_exact(without).zip(gates.chunks_exact(queries));
        for (joined, (qkv, gates)) in joined.chunks_exact_mut(all).zip(tokens) {
            let (pairs, rest) = joined.split_at_mut(2 * queries);
            rest.copy_from_slice(&qkv[queries..]);
            let heads = qkv.chunks_exact(dim).zip(gates.chunks_exact(dim));
            for ((query, gate), pair) in heads.zip(pairs.chunks_exact_mut(2 * dim)) {
                pair[..dim].copy_from_slice(query);
                pair[dim..].copy_from_slice(gate);
            }
        }
    });
}

fn gate<T: Element>(x: &[T], gates: &[T], out: &mut [T]) {
    assert_eq!((x.len(), gates.len()), (out.len(), out.len()), "a gate for each element");
    let inputs = x.par_chunks(BLOCK).zip(gates.par_chunks(BLOCK));
    out.par_chunks_mut(BLOCK).zip(inputs).for_each(|(out, (x, gates))| {
        vectorise!({
            for ((out, x), gate) in out.iter_mut().zip(x).zip(gates) {
                *out = T::store(x.load() * sigmoid(gate.load()));
            }
        });
    });
}

/// With `s = σ(gate)`: `d_x = d_out s`, `d_gate = d_out x s (1 - s)`, and `1 - s = σ(-gate)` without loss.
fn gate_backward<T: Element>(d_out: &mut [T], x: &[T], gates: &mut [T]) {
    assert_eq!((x.len(), gates.len()), (d_out.len(), d_out.len()), "a gate for each element");
    let outputs = d_out.par_chunks_mut(BLOCK).zip(gates.par_chunks_mut(BLOCK));
    outputs.zip(x.par_chunks(BLOCK)).for_each(|((d_out, gates), x)| {
        vectorise!({
            for ((d, gate), x) in d_out.iter_mut().zip(gates.iter_mut()).zip(x) {
                let (g, d_out) = (gate.load(), d.load());
                let s = sigmoid(g);
                *d = T::store(d_out * s);
                *gate = T::store(d_out * x.load() * s * sigmoid(-g));
            }
        });
    });
}

fn add_gated_rows<T: Element>(x: &[T], logits: &[f32], width: usize, out: &mut [T]) {
    assert_eq!((x.len(), out.len()), (logits.len() * width, logits.len() * width), "gated rows of {width}");
    let rows = rows_a_task(3 * width);
    let inputs = x.par_chunks(rows * width).zip(logits.par_chunks(rows));
    out.par_chunks_mut(rows * width).zip(inputs).for_each(|(out, (x, logits))| {
        vectorise!({
            for ((out, x), logit) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(logits) {
                let s = sigmoid(*logit);
                for (out, x) in out.iter_mut().zip(x) {
                    *out = T::store(out.load() + s * x.load());
                }
            }
        });
    });
}

/// With `s = σ(logit)`: `d_x = s d_out`, `d_logit = (x . d_out) s (1 - s)`, and `1 - s = σ(-logit)` without loss.
fn gated_rows_backward<T: Element>(d_out: &[T], x: &[T], logits: &mut [f32], width: usize, d_x: &mut [T]) {
    let len = logits.len() * width;
    assert_eq!((d_out.len(), x.len(), d_x.len()), (len, len, len), "gated rows of {width}");
    let rows = rows_a_task(3 * width);
    let inputs = d_out.par_chunks(rows * width).zip(x.par_chunks(rows * width));
    let outputs = d_x.par_chunks_mut(rows * width).zip(logits.par_chunks_mut(rows));
    outputs.zip(inputs).for_each(|((d_x, logits), (d_out, x))| {
        vectorise!({
            let inputs = d_out.chunks_exact(width).zip(x.chunks_exact(width));
            for ((d_x, logit), (d_out, x)) in d_x.chunks_exact_mut(width).zip(logits.iter_mut()).zip(inputs) {
                let s = sigmoid(*logit);
                *logit = dot(x, d_out) * s * sigmoid(-*logit);
                for (d_x, d_out) in d_x.iter_mut().zip(d_out) {
                    *d_x = T::store(s * d_out.load());
                }
            }
        });
    });
}
