//! The backward pass: scores are computed again from the kept log-sum-exp. A short sequence is one task a key head, with
//! five products a tile. A long one is split: tasks own the gradients of some keys, others those of some queries, at
//! the price of computing the scores twice. No gradient is shared between tasks, so the order of sums is fixed.

use std::ops::Range;

use rayon::prelude::*;

use super::{Matrix, Shape, parts};
use crate::backend::Layout;
use crate::backend::cpu::element::Element;
use crate::backend::cpu::gemm::tile;
use crate::backend::cpu::memory::Shared;
use crate::backend::cpu::vector::{dot, exp, vectorise};

/// Queries of a tile.
const QUERIES: usize = 128;
/// Keys of a tile.
const KEYS: usize = 64;
/// Longest sequence that one task a key head takes, where there are few such tasks and where there are many.
const WHOLE: (usize, usize) = (512, 4096);
/// Queries or keys that a task of a longer sequence owns.
const PART: usize = 512;

/// What the forward pass read and wrote, and the gradient of what it wrote.
pub(in crate::backend::cpu) struct Input<'a, T> {
    /// `[T, query * dim]`.
    pub(in crate::backend::cpu) q: Matrix<'a, T>,
    /// `[T, key_value * dim]`.
    pub(in crate::backend::cpu) k: Matrix<'a, T>,
    /// `[T, key_value * dim]`.
    pub(in crate::backend::cpu) v: Matrix<'a, T>,
    /// `[T, query * dim]`.
    pub(in crate::backend::cpu) out: Matrix<'a, T>,
    /// `[T, query * dim]`.
    pub(in crate::backend::cpu) d_out: Matrix<'a, T>,
    /// `[query, T]`.
    pub(in crate::backend::cpu) log_sum_exp: &'a [f32],
}

/// A task: the pairs of `queries` and `keys` of one sequence, and whose gradients it owns.
struct Task {
    queries: Range<usize>,
    keys: Range<usize>,
    key_head: usize,
    owns_queries: bool,
    owns_keys: bool,
}

fn tasks(shape: &Shape<'_>) -> Vec<Task> {
    let many = shape.sequences().count() * shape.heads.key_value >= 8;
    let whole = if many { WHOLE.1 } else { WHOLE.0 };
    let mut tasks = Vec::new();
    for all in shape.sequences() {
        for key_head in 0..shape.heads.key_value {
            let mut add = |queries: &Range<usize>, keys: &Range<usize>, owns_queries, owns_keys| {
                let (queries, keys) = (queries.clone(), keys.clone());
                tasks.push(Task { queries, keys, key_head, owns_queries, owns_keys });
            };
            if all.len() <= whole {
                add(&all, &all, true, true);
                continue;
            }
            for part in parts(all.clone(), PART) {
                add(&part, &(all.start..part.end), true, false);
                add(&(part.start..all.end), &part, false, true);
            }
        }
    }
    tasks.sort_by_key(|task| std::cmp::Reverse(task.queries.len() * task.keys.len()));
    tasks
}

/// Writes the gradients of q, k and v side by side to `d_qkv`. `scratch` `[query, T]` takes `d_out . out` by row.
pub(in crate::backend::cpu) fn backward<T: Element>(
    shape: &Shape<'_>,
    input: &Input<'_, T>,
    d_qkv: &mut [T],
    scratch: &mut [f32],
) {
    let (heads, dim) = (shape.heads, shape.heads.dim);
    assert_eq!(d_qkv.len(), shape.tokens * (heads.query + 2 * heads.key_value) * dim, "d_qkv is that of q, k and v");
    assert_eq!((scratch.len(), input.log_sum_exp.len()), (heads.query * shape.tokens, scratch.len()), "[query, T]");
    if shape.tokens == 0 {
        return;
    }
    scratch.par_chunks_mut(shape.tokens).enumerate().for_each(|(head, delta)| {
        vectorise!({
            for (i, delta) in delta.iter_mut().enumerate() {
                *delta = dot(input.d_out.row(i, head * dim, dim), input.out.row(i, head * dim, dim));
            }
        });
    });
    let (delta, d_qkv) = (&*scratch, Shared::new(d_qkv));
    tasks(shape).into_par_iter().with_max_len(1).for_each(|task| run(shape, input, delta, &task, d_qkv));
}

fn run<T: Element>(shape: &Shape<'_>, input: &Input<'_, T>, delta: &[f32], task: &Task, d_qkv: Shared<'_, T>) {
    let (heads, dim, group) = (shape.heads, shape.heads.dim, shape.group());
    let width = (heads.query + 2 * heads.key_value) * dim;
    let key_column = task.key_head * dim;
    let len = if task.owns_queries { task.queries.len() } else { 0 };
    let mut d_q = vec![0.0_f32; group * len * dim];
    let (mut d_k, mut d_v) = (vec![0.0_f32; KEYS * dim], vec![0.0_f32; KEYS * dim]);
    let (mut p, mut d_s) = (vec![0.0_f32; QUERIES * KEYS], vec![0.0_f32; QUERIES * KEYS]);
    let tiles = || vec![0.0_f32; KEYS * dim];
    let (mut k, mut k_transposed, mut v_transposed) = (tiles(), tiles(), tiles());
    let (mut q, mut d_out) = (vec![0.0_f32; QUERIES * dim], vec![0.0_f32; QUERIES * dim]);
    let first = (task.queries.start + 1).saturating_sub(shape.window).max(task.keys.start);
    for keys in parts(first..task.keys.end, KEYS) {
        let n = keys.len();
        input.k.transposed(keys.clone(), key_column, dim, &mut k_transposed);
        input.v.transposed(keys.clone(), key_column, dim, &mut v_transposed);
        input.k.copy(keys.clone(), key_column, dim, &mut k);
        d_k.fill(0.0);
        d_v.fill(0.0);
        for member in 0..group {
            let head = task.key_head * group + member;
            for rows in parts(shape.seeing(&task.queries, &keys), QUERIES) {
                let m = rows.len();
                input.q.copy(rows.clone(), head * dim, dim, &mut q);
                input.d_out.copy(rows.clone(), head * dim, dim, &mut d_out);
                tile(Layout::Nn, m, n, dim, (&q, dim), (&k_transposed, n), (&mut p, n), false);
                tile(Layout::Nn, m, n, dim, (&d_out, dim), (&v_transposed, n), (&mut d_s, n), false);
                vectorise!({
                    let scores = p.chunks_exact_mut(n).zip(d_s.chunks_exact_mut(n));
                    for (i, (p, d_s)) in rows.clone().zip(scores) {
                        let at = head * shape.tokens + i;
                        scores_backward(shape, shape.seen(i, &keys), input.log_sum_exp[at], delta[at], p, d_s);
                    }
                });
                if task.owns_keys {
                    tile(Layout::Tn, n, dim, m, (&p, n), (&d_out, dim), (&mut d_v, dim), true);
                    tile(Layout::Tn, n, dim, m, (&d_s, n), (&q, dim), (&mut d_k, dim), true);
                }
                if task.owns_queries {
                    let d_q = &mut d_q[(member * len + rows.start - task.queries.start) * dim..];
                    tile(Layout::Nn, m, dim, n, (&d_s, n), (&k, dim), (d_q, dim), true);
                }
            }
        }
        if task.owns_keys {
            for (j, (d_k, d_v)) in keys.clone().zip(d_k.chunks_exact(dim).zip(d_v.chunks_exact(dim))) {
                let column = (heads.query + task.key_head) * dim;
                // SAFETY: each (token, key head) is owned by one task.
                store(d_k, unsafe { d_qkv.part(j * width + column, dim) });
                // SAFETY: as above.
                store(d_v, unsafe { d_qkv.part(j * width + column + heads.key_value * dim, dim) });
            }
        }
    }
    if task.owns_queries {
        for (member, d_q) in d_q.chunks_exact(len * dim).enumerate() {
            let column = (task.key_head * group + member) * dim;
            for (i, d_q) in task.queries.clone().zip(d_q.chunks_exact(dim)) {
                // SAFETY: each (token, head) is owned by one task.
                store(d_q, unsafe { d_qkv.part(i * width + column, dim) });
            }
        }
    }
}

/// One row: scores become probabilities, and the gradients of probabilities those of scores; 0 for unseen keys.
#[inline(always)]
fn scores_backward(
    shape: &Shape<'_>,
    seen: Range<usize>,
    log_sum_exp: f32,
    delta: f32,
    p: &mut [f32],
    d_s: &mut [f32],
) {
    for row in [&mut *p, &mut *d_s] {
        row[..seen.start].fill(0.0);
        row[seen.end..].fill(0.0);
    }
    for (p, d_s) in p[seen.clone()].iter_mut().zip(&mut d_s[seen]) {
        *p = exp(p.mul_add(shape.scale, -log_sum_exp));
        *d_s = shape.scale * *p * (*d_s - delta);
    }
}

fn store<T: Element>(source: &[f32], target: &mut [T]) {
    vectorise!({
        for (target, source) in target.iter_mut().zip(source) {
            *target = T::store(*source);
        }
    });
}
