//! The backward pass: scores are computed again from the kept log-sum-exp. A short sequence is one task a key head, with
//! five products a tile. A long one is split: tasks own the gradients of some keys, others those of some queries, at
//! the price of computing the scores twice. No gradient is shared between tasks, so the order of sums is fixed.
//!
//! Scores are computed transposed, `[keys, queries]`: so they are read in place by the three products that follow.

use std::ops::Range;

use rayon::prelude::*;

use super::{Inputs, Matrix, Shape, parts};
use crate::backend::cpu::element::Element;
use crate::backend::cpu::gemm::{Left, Products, Right, Workspace, carve};
use crate::backend::cpu::memory::Shared;
use crate::backend::cpu::vector::{dot, exp_below, rows_a_task, vectorise};

/// Queries that are packed at a time.
const BLOCK: usize = 128;
/// Queries of a tile: whole panels of every kernel.
const QUERIES: usize = 64;
/// Keys of a tile, and where its queries do not see all of them.
const KEYS: (usize, usize) = (48, 24);
/// Longest sequence that one task a key head takes, where there are few such tasks and where there are many.
const WHOLE: (usize, usize) = (512, 4096);
/// Queries or keys that a task of a longer sequence owns.
const PART: usize = 512;

/// What the forward pass wrote, and the gradient of it.
pub(in crate::backend::cpu) struct Results<'a, T> {
    /// `[T, query * dim]`.
    pub(in crate::backend::cpu) out: Matrix<'a, T>,
    /// Gradient of `out`.
    pub(in crate::backend::cpu) d_out: Matrix<'a, T>,
    /// `[query, T]`.
    pub(in crate::backend::cpu) log_sum_exp: &'a [f32],
}

/// Scores of some queries and keys of one sequence, and whose gradients come of them.
struct Task {
    queries: Range<usize>,
    keys: Range<usize>,
    key_head: usize,
    owns_queries: bool,
    owns_keys: bool,
}

/// The tasks, the longest first.
fn tasks(shape: &Shape<'_>) -> Vec<Task> {
    // By the number of sequences and heads alone: which sums are formed must not depend on the number of threads.
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
                let (before, after) = if shape.causal { (part.end, part.start) } else { (all.end, all.start) };
                add(&part, &(all.start..before), true, false);
                add(&(after..all.end), &part, false, true);
            }
        }
    }
    tasks.sort_by_key(|task| std::cmp::Reverse(task.queries.len() * task.keys.len()));
    tasks
}

/// The gradients of q, k and v, side by side in `d_qkv` `[T, (query + 2 key_value) dim]`. `delta` `[query, T]` is scratch:
/// the scalar product of each row of `out` with its gradient.
pub(in crate::backend::cpu) fn backward<T: Element>(
    shape: &Shape<'_>,
    inputs: Inputs<'_, T>,
    results: &Results<'_, T>,
    d_qkv: &mut [T],
    delta: &mut [f32],
) {
    let (heads, dim) = (shape.heads, shape.heads.dim);
    assert_eq!(d_qkv.len(), shape.tokens * (heads.query + 2 * heads.key_value) * dim, "d_qkv is that of q, k and v");
    assert_eq!((delta.len(), results.log_sum_exp.len()), (heads.query * shape.tokens, delta.len()), "[query, T]");
    if shape.tokens == 0 {
        return;
    }
    let rows = Shared::new(delta);
    let parts: Vec<Range<usize>> = parts(0..shape.tokens, rows_a_task(heads.query * dim)).collect();
    parts.into_par_iter().for_each(|tokens| {
        vectorise!({
            for head in 0..heads.query {
                // SAFETY: each (token, head) belongs to one task.
                let delta = unsafe { rows.part(head * shape.tokens + tokens.start, tokens.len()) };
                for (i, delta) in tokens.clone().zip(delta) {
                    *delta = dot(results.d_out.row(i, head * dim, dim), results.out.row(i, head * dim, dim));
                }
            }
        });
    });
    let (delta, d_qkv) = (&*delta, Shared::new(d_qkv));
    let pass = Pass { shape, inputs, results, delta, products: Products::new() };
    tasks(shape).into_par_iter().with_max_len(1).for_each(|task| pass.run(&task, d_qkv));
}

/// What all tasks share.
struct Pass<'a, T> {
    shape: &'a Shape<'a>,
    inputs: Inputs<'a, T>,
    results: &'a Results<'a, T>,
    delta: &'a [f32],
    products: Products,
}

/// Queries of one head and the gradients of their outputs, packed both ways for a block of queries.
struct Packed<'w> {
    head: usize,
    /// `[queries, dim]`, as columns over `dim` and as `dim` columns over the queries.
    q: (Right<'w>, Right<'w>),
    d_out: (Right<'w>, Right<'w>),
}

/// A tile of keys: rows of `k` and `v` over `dim`, and `dim` columns of `k` over the keys.
struct Keys<'w> {
    range: Range<usize>,
    k: Left<'w>,
    v: Left<'w>,
    k_columns: Right<'w>,
}

/// Where a tile's gradients go: rows of the queries and of the keys, `[.., dim]`; absent where the task does not own them.
struct Gradients<'w> {
    q: Option<&'w mut [f32]>,
    k_and_v: Option<(&'w mut [f32], &'w mut [f32])>,
}

impl<T: Element> Pass<'_, T> {
    /// One task. It writes the rows of `d_qkv` that it owns.
    fn run(&self, task: &Task, d_qkv: Shared<'_, T>) {
        let (dim, group) = (self.shape.heads.dim, self.shape.group());
        let queries = |owned: bool| if owned { BLOCK.min(task.queries.len()) * dim } else { 0 };
        let keys = if task.owns_keys { task.keys.len() * dim } else { 0 };
        let along = self.products.right_words(BLOCK, dim);
        let across = self.products.right_words(dim, BLOCK);
        let (k_words, k_columns_words) =
            (self.products.left_words(KEYS.0, dim), self.products.right_words(dim, KEYS.0));
        let tile = KEYS.0 * QUERIES;
        let mut workspace = Workspace::take(
            group * (2 * (along + across) + queries(task.owns_queries))
                + 2 * keys
                + 2 * k_words
                + k_columns_words
                + 2 * tile,
        );
        let mut memory = workspace.floats();
        let packed = carve(&mut memory, group * 2 * (along + across));
        let d_q = carve(&mut memory, group * queries(task.owns_queries));
        let (d_k, d_v) = (carve(&mut memory, keys), carve(&mut memory, keys));
        let (k_words, v_words) = (carve(&mut memory, k_words), carve(&mut memory, k_words));
        let k_columns_words = carve(&mut memory, k_columns_words);
        let (p, d_s) = (carve(&mut memory, tile), carve(&mut memory, tile));
        d_k.fill(0.0);
        d_v.fill(0.0);
        for block in parts(task.queries.clone(), BLOCK) {
            let packed: Vec<Packed<'_>> = packed
                .chunks_exact_mut(2 * (along + across))
                .enumerate()
                .map(|(member, words)| self.pack(task.key_head * group + member, &block, words))
                .collect();
            d_q.fill(0.0);
            for range in self.tiles(task, &block) {
                let (n, column) = (range.len(), task.key_head * dim);
                let (k, v) = (self.inputs.k.part(&range, column), self.inputs.v.part(&range, column));
                let keys = Keys {
                    k: self.products.pack_left(k, true, n, dim, k_words),
                    v: self.products.pack_left(v, true, n, dim, v_words),
                    k_columns: self.products.pack_right(k, false, dim, n, k_columns_words),
                    range,
                };
                for (member, packed) in packed.iter().enumerate() {
                    for rows in parts(block.clone(), QUERIES) {
                        let at = (keys.range.start - task.keys.start) * dim;
                        let gradients = Gradients {
                            q: task.owns_queries.then(|| &mut d_q[member * queries(true)..]),
                            k_and_v: task.owns_keys.then(|| (&mut d_k[at..], &mut d_v[at..])),
                        };
                        self.tile(&block, rows, packed, &keys, (p, d_s), gradients);
                    }
                }
            }
            for (member, d_q) in d_q.chunks_exact(queries(true)).enumerate() {
                let column = (task.key_head * group + member) * dim;
                // SAFETY: each (token, head) is owned by one task.
                unsafe { self.store(&block, column, d_q, self.shape.scale, d_qkv) }
            }
        }
        if task.owns_keys {
            let column = (self.shape.heads.query + task.key_head) * dim;
            // SAFETY: each (token, key head) is owned by one task.
            unsafe {
                self.store(&task.keys, column, d_k, self.shape.scale, d_qkv);
                self.store(&task.keys, column + self.shape.heads.key_value * dim, d_v, 1.0, d_qkv);
            }
        }
    }

    /// The tiles of the task's keys that the queries of `block` see, at places that depend on the two alone.
    fn tiles(&self, task: &Task, block: &Range<usize>) -> impl Iterator<Item = Range<usize>> + use<T> {
        let unseen = (block.start + 1).saturating_sub(self.shape.window).saturating_sub(task.keys.start);
        let all = (task.keys.end, task.keys.end);
        let (end, from) = if self.shape.causal { (task.keys.end.min(block.end), block.start) } else { all };
        let mut start = task.keys.start + unseen / KEYS.0 * KEYS.0;
        std::iter::from_fn(move || {
            let size = if start + KEYS.0 <= from { KEYS.0 } else { KEYS.1 };
            let tile = start..end.min(start + size);
            start = tile.end;
            (!tile.is_empty()).then_some(tile)
        })
    }

    /// Packs the queries of `block` and the gradients of their outputs.
    fn pack<'w>(&self, head: usize, block: &Range<usize>, words: &'w mut [f32]) -> Packed<'w> {
        let dim = self.shape.heads.dim;
        let mut memory = words;
        let mut both = |source: Matrix<'_, T>| {
            let source = source.part(block, head * dim);
            let along = carve(&mut memory, self.products.right_words(BLOCK, dim));
            let across = carve(&mut memory, self.products.right_words(dim, BLOCK));
            (
                self.products.pack_right(source, true, block.len(), dim, along),
                self.products.pack_right(source, false, dim, block.len(), across),
            )
        };
        Packed { head, q: both(self.inputs.q), d_out: both(self.results.d_out) }
    }

    /// What the queries `rows` of `block` and a tile of keys give each other.
    fn tile(
        &self,
        block: &Range<usize>,
        rows: Range<usize>,
        packed: &Packed<'_>,
        keys: &Keys<'_>,
        (p, d_s): (&mut [f32], &mut [f32]),
        gradients: Gradients<'_>,
    ) {
        let (dim, products, shape) = (self.shape.heads.dim, self.products, self.shape);
        let panel = products.columns();
        // From the panel on that holds the first query that sees a key, to the last query that does.
        let before = if shape.causal { keys.range.start.saturating_sub(block.start) } else { 0 };
        let start = rows.start.max(block.start + before / panel * panel);
        let end = rows.end.min((keys.range.end - 1).saturating_add(shape.window));
        if start >= end {
            return;
        }
        let (m, offset) = (end - start, start - block.start);
        let n = if shape.causal { keys.range.end.min(end) - keys.range.start } else { keys.range.len() };
        products.multiply((n, m, dim), keys.k, packed.q.0.from_column(offset), (p, QUERIES), false);
        products.multiply((n, m, dim), keys.v, packed.d_out.0.from_column(offset), (d_s, QUERIES), false);
        let at = packed.head * shape.tokens + start;
        let (log_sum_exp, delta) = (&self.results.log_sum_exp[at..][..m], &self.delta[at..][..m]);
        vectorise!({
            let scores = p.chunks_exact_mut(QUERIES).zip(d_s.chunks_exact_mut(QUERIES));
            for (key, (p, d_s)) in keys.range.clone().zip(scores).take(n) {
                let first = if shape.causal { key.max(start) - start } else { 0 };
                let last = key.saturating_add(shape.window).clamp(start + first, end) - start;
                scores_backward(shape.scale, first..last, log_sum_exp, delta, &mut p[..m], &mut d_s[..m]);
            }
        });
        if let Some((d_k, d_v)) = gradients.k_and_v {
            let (p, d_s) = (products.left(p, QUERIES, false), products.left(d_s, QUERIES, false));
            products.multiply((n, dim, m), p, packed.d_out.1.from_step(offset), (d_v, dim), true);
            products.multiply((n, dim, m), d_s, packed.q.1.from_step(offset), (d_k, dim), true);
        }
        if let Some(d_q) = gradients.q {
            let d_s = products.left(d_s, QUERIES, true);
            products.multiply((m, dim, n), d_s, keys.k_columns, (&mut d_q[offset * dim..], dim), true);
        }
    }

    /// Writes `scale` times the rows of `gradient` `[rows.len(), dim]` to the columns from `column` on.
    ///
    /// # Safety
    /// No other thread touches these rows and columns of `d_qkv`.
    unsafe fn store(&self, rows: &Range<usize>, column: usize, gradient: &[f32], scale: f32, d_qkv: Shared<'_, T>) {
        let (heads, dim) = (self.shape.heads, self.shape.heads.dim);
        let width = (heads.query + 2 * heads.key_value) * dim;
        vectorise!({
            for (i, gradient) in rows.clone().zip(gradient.chunks_exact(dim)) {
                // SAFETY: the caller's promise.
                let target = unsafe { d_qkv.part(i * width + column, dim) };
                for (target, gradient) in target.iter_mut().zip(gradient) {
                    *target = T::store(scale * gradient);
                }
            }
        });
    }
}

/// One key's row over the queries of a tile, of which those in `seen` see it: turns the scores `p` into probabilities, and
/// the gradients `d_s` of the probabilities into those of the scaled scores.
#[inline(always)]
fn scores_backward(scale: f32, seen: Range<usize>, log_sum_exp: &[f32], delta: &[f32], p: &mut [f32], d_s: &mut [f32]) {
    // All of them, then zeros where nothing is seen: a loop of a known form is a vector one.
    for (((p, d_s), log_sum_exp), delta) in p.iter_mut().zip(&mut *d_s).zip(log_sum_exp).zip(delta) {
        *p = exp_below(p.mul_add(scale, -log_sum_exp));
        *d_s = *p * (*d_s - delta);
    }
    for row in [p, d_s] {
        row[..seen.start].fill(0.0);
        row[seen.end..].fill(0.0);
    }
}
