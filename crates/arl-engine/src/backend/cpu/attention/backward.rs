//! The backward pass: scores are computed again from the kept log-sum-exp. A task has some keys of one sequence and one key
//! head, and owns the gradients of these; it goes through the queries that see them. To the gradients of queries the tasks
//! of a sequence add one after the other, each block behind the task of the keys before: so the order of all sums is that
//! of one task, whatever the number of threads and wherever a sequence is cut.
//!
//! Scores are computed transposed, `[keys, queries]`: so they are read in place by the three products that follow.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

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
/// Keys that a task owns are a multiple of this: whole tiles and whole blocks, so that where tiles begin does not depend on it.
pub(super) const PART: usize = 384;
/// Elements of a key head's rows that a task owns at least: their two gradients take half of a second-level cache.
const OWNED: usize = PART * 128;

/// What the forward pass wrote, and the gradient of it.
pub(in crate::backend::cpu) struct Results<'a, T> {
    /// `[T, query * dim]`.
    pub(in crate::backend::cpu) out: Matrix<'a, T>,
    /// Gradient of `out`.
    pub(in crate::backend::cpu) d_out: Matrix<'a, T>,
    /// `[query, T]`.
    pub(in crate::backend::cpu) log_sum_exp: &'a [f32],
}

/// Keys of one sequence, and the queries that see one of them.
struct Task {
    queries: Range<usize>,
    keys: Range<usize>,
    key_head: usize,
    /// The end of the sequence.
    end: usize,
    /// The place of its own progress.
    place: usize,
    /// The task of the keys before has the place before.
    follows: bool,
}

/// The tasks of at most `size` keys, the longest first, and each behind the one that it follows.
fn tasks(shape: &Shape<'_>, size: usize) -> Vec<Task> {
    let mut tasks = Vec::new();
    for all in shape.sequences() {
        for key_head in 0..shape.heads.key_value {
            for keys in parts(all.clone(), size) {
                let last = (keys.end - 1).saturating_add(shape.window).min(all.end);
                let queries = if shape.causal { keys.start..last } else { all.clone() };
                let (place, follows) = (tasks.len(), keys.start > all.start);
                tasks.push(Task { queries, keys, key_head, end: all.end, place, follows });
            }
        }
    }
    tasks.sort_by_key(|task| std::cmp::Reverse(task.queries.len() * task.keys.len()));
    tasks
}

/// Up to which token a task has added to the gradients of queries; all tokens once it ends.
struct Progress<'a>(&'a AtomicUsize);

impl Progress<'_> {
    fn reach(&self, token: usize) {
        self.0.store(token, Ordering::Release);
    }
}

/// A task that panics ends, too: nothing waits for it for ever.
impl Drop for Progress<'_> {
    fn drop(&mut self) {
        self.reach(usize::MAX);
    }
}

/// Returns once `progress` has reached `token`.
fn wait_for(progress: &AtomicUsize, token: usize) {
    const SPINS: usize = 64;
    let mut tries = 0;
    while progress.load(Ordering::Acquire) < token {
        tries += 1;
        if tries < SPINS { std::hint::spin_loop() } else { std::thread::yield_now() }
    }
}

/// The gradients of q, k and v, side by side in `d_qkv` `[T, (query + 2 key_value) dim]`. `scratch` `[query, T, 1 + dim]` has
/// the scalar product of each row of `out` with its gradient, then the sums of the gradients of queries.
pub(in crate::backend::cpu) fn backward<T: Element>(
    shape: &Shape<'_>,
    inputs: Inputs<'_, T>,
    results: &Results<'_, T>,
    d_qkv: &mut [T],
    scratch: &mut [f32],
) {
    let size = (OWNED / shape.heads.dim).max(PART) / PART * PART;
    in_parts(shape, inputs, results, d_qkv, scratch, size);
}

/// As [`backward`], with at most `size` keys a task.
pub(super) fn in_parts<T: Element>(
    shape: &Shape<'_>,
    inputs: Inputs<'_, T>,
    results: &Results<'_, T>,
    d_qkv: &mut [T],
    scratch: &mut [f32],
    size: usize,
) {
    let (heads, dim) = (shape.heads, shape.heads.dim);
    let rows = heads.query * shape.tokens;
    assert_eq!(d_qkv.len(), shape.tokens * (heads.query + 2 * heads.key_value) * dim, "d_qkv is that of q, k and v");
    assert_eq!(results.log_sum_exp.len(), rows, "[query, T]");
    if shape.tokens == 0 {
        return;
    }
    let (delta, d_q) = scratch[..rows * (1 + dim)].split_at_mut(rows);
    let (of_delta, d_q) = (Shared::new(delta), Shared::new(d_q));
    let all: Vec<Range<usize>> = parts(0..shape.tokens, rows_a_task(heads.query * dim)).collect();
    all.into_par_iter().for_each(|tokens| {
        vectorise!({
            for head in 0..heads.query {
                let first = head * shape.tokens + tokens.start;
                // SAFETY: each (token, head) belongs to one task.
                let (delta, d_q) =
                    unsafe { (of_delta.part(first, tokens.len()), d_q.part(first * dim, tokens.len() * dim)) };
                d_q.fill(0.0);
                for (i, delta) in tokens.clone().zip(delta) {
                    *delta = dot(results.d_out.row(i, head * dim, dim), results.out.row(i, head * dim, dim));
                }
            }
        });
    });
    let (delta, d_qkv) = (&*delta, Shared::new(d_qkv));
    let pass = Pass { shape, inputs, results, delta, products: Products::new() };
    let tasks = tasks(shape, size);
    let progress: Vec<AtomicUsize> = tasks.iter().map(|_| AtomicUsize::new(0)).collect();
    let next = AtomicUsize::new(0);
    // Tasks begin in their order: the one that another follows has begun before it, and is never waited for in vain.
    (0..rayon::current_num_threads()).into_par_iter().with_max_len(1).for_each(|_| {
        while let Some(task) = tasks.get(next.fetch_add(1, Ordering::Relaxed)) {
            pass.run(task, &progress, d_q, d_qkv);
        }
    });
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

/// What a tile's gradients are added to: rows of the block's queries, and of the tile's keys, `[.., dim]`.
struct Gradients<'w> {
    q: &'w mut [f32],
    k: &'w mut [f32],
    v: &'w mut [f32],
}

impl<T: Element> Pass<'_, T> {
    /// One task. It writes the rows of `d_qkv` of its keys, and those of the queries that see no key behind them.
    fn run(&self, task: &Task, progress: &[AtomicUsize], d_q: Shared<'_, f32>, d_qkv: Shared<'_, T>) {
        let (dim, group) = (self.shape.heads.dim, self.shape.group());
        let along = self.products.right_words(BLOCK, dim);
        let across = self.products.right_words(dim, BLOCK);
        let (k_words, k_columns_words) =
            (self.products.left_words(KEYS.0, dim), self.products.right_words(dim, KEYS.0));
        let (tile, keys) = (KEYS.0 * QUERIES, task.keys.len() * dim);
        let words = group * 2 * (along + across) + 2 * keys + 2 * k_words + k_columns_words + 2 * tile;
        let mut workspace = Workspace::take(words);
        let mut memory = workspace.floats();
        let packed = carve(&mut memory, group * 2 * (along + across));
        let (d_k, d_v) = (carve(&mut memory, keys), carve(&mut memory, keys));
        let (k_words, v_words) = (carve(&mut memory, k_words), carve(&mut memory, k_words));
        let k_columns_words = carve(&mut memory, k_columns_words);
        let (p, d_s) = (carve(&mut memory, tile), carve(&mut memory, tile));
        d_k.fill(0.0);
        d_v.fill(0.0);
        let own = Progress(&progress[task.place]);
        for block in parts(task.queries.clone(), BLOCK) {
            let packed: Vec<Packed<'_>> = packed
                .chunks_exact_mut(2 * (along + across))
                .enumerate()
                .map(|(member, words)| self.pack(task.key_head * group + member, &block, words))
                .collect();
            if task.follows {
                wait_for(&progress[task.place - 1], block.end);
            }
            for range in self.tiles(task, &block) {
                let (n, column) = (range.len(), task.key_head * dim);
                let (k, v) = (self.inputs.k.part(&range, column), self.inputs.v.part(&range, column));
                let keys = Keys {
                    k: self.products.pack_left(k, true, n, dim, k_words),
                    v: self.products.pack_left(v, true, n, dim, v_words),
                    k_columns: self.products.pack_right(k, false, dim, n, k_columns_words),
                    range,
                };
                let at = (keys.range.start - task.keys.start) * dim;
                for packed in &packed {
                    // SAFETY: of the tasks that add to this block one does at a time: the others wait for it, or it for them.
                    let q = unsafe { self.sums(d_q, packed.head, &block) };
                    for rows in parts(block.clone(), QUERIES) {
                        let gradients = Gradients { q: &mut *q, k: &mut d_k[at..], v: &mut d_v[at..] };
                        self.tile(&block, rows, packed, &keys, (p, d_s), gradients);
                    }
                }
            }
            let complete = task.keys.end == task.end || (self.shape.causal && block.end <= task.keys.end);
            for packed in packed.iter().filter(|_| complete) {
                // SAFETY: as above; and this task alone completes the block.
                unsafe {
                    let sums = self.sums(d_q, packed.head, &block);
                    self.store(&block, packed.head * dim, sums, self.shape.scale, d_qkv);
                }
            }
            own.reach(block.end);
        }
        let column = (self.shape.heads.query + task.key_head) * dim;
        // SAFETY: each (token, key head) is owned by one task.
        unsafe {
            self.store(&task.keys, column, d_k, self.shape.scale, d_qkv);
            self.store(&task.keys, column + self.shape.heads.key_value * dim, d_v, 1.0, d_qkv);
        }
    }

    /// The sums of the gradients of a block of queries, `[queries, dim]`.
    ///
    /// # Safety
    /// No other thread touches them, and no other borrow of them is used while this one is.
    #[allow(clippy::mut_from_ref, reason = "the caller's promise")]
    unsafe fn sums<'s>(&self, d_q: Shared<'s, f32>, head: usize, block: &Range<usize>) -> &'s mut [f32] {
        let dim = self.shape.heads.dim;
        // SAFETY: the caller's promise.
        unsafe { d_q.part((head * self.shape.tokens + block.start) * dim, block.len() * dim) }
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
        let Gradients { q, k, v } = gradients;
        let (p, across) = (products.left(p, QUERIES, false), products.left(d_s, QUERIES, true));
        let d_s = products.left(d_s, QUERIES, false);
        products.multiply((n, dim, m), p, packed.d_out.1.from_step(offset), (v, dim), true);
        products.multiply((n, dim, m), d_s, packed.q.1.from_step(offset), (k, dim), true);
        products.multiply((m, dim, n), across, keys.k_columns, (&mut q[offset * dim..], dim), true);
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
