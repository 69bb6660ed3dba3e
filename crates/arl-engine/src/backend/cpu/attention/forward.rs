//! The forward pass: a task takes some queries of a sequence with all heads that share a key head, goes over the tiles
//! of keys that they see, and keeps each query's maximum, sum and weighted values so far (online softmax).
//!
//! Scores are computed transposed, `[keys, queries]`, a panel of queries at a time: what runs over keys then runs down
//! columns of a panel, a vector operation each, and the panel of probabilities is the packed operand of the next product.

use std::ops::Range;

use rayon::prelude::*;

use super::{Matrix, Shape, parts};
use crate::backend::cpu::element::Element;
use crate::backend::cpu::gemm::{Left, Products, Workspace, carve};
use crate::backend::cpu::memory::Shared;
use crate::backend::cpu::vector::{exp_below, vectorise};

/// Queries of a task where there are tasks enough for all threads, and where there are few. A query's bits are the same
/// in both: tiles begin at fixed places of its sequence.
const QUERIES: (usize, usize) = (512, 128);
/// Keys of a tile: whole panels of every kernel, few enough for a panel's scores to stay in the first-level cache.
const KEYS: usize = 96;
/// The maximum of a query that has seen no key. Not minus infinity, from which a masked score has no difference.
const NOTHING: f32 = -1e30;
/// Partial maxima and sums, as many as hide their latency.
const PARTIAL: usize = 4;

/// A part of the leaf: some queries of a sequence, for the heads that share a key head.
struct Task {
    /// The sequence, up to the last token that the queries see where there is no window.
    seen: Range<usize>,
    queries: Range<usize>,
    key_head: usize,
}

/// What the forward pass reads.
#[derive(Clone, Copy)]
pub(in crate::backend::cpu) struct Inputs<'a, T> {
    /// `[T, query * dim]`.
    pub(in crate::backend::cpu) q: Matrix<'a, T>,
    /// `[T, key_value * dim]`.
    pub(in crate::backend::cpu) k: Matrix<'a, T>,
    /// As `k`.
    pub(in crate::backend::cpu) v: Matrix<'a, T>,
}

/// What it writes, shared among tasks that each own some queries of some heads.
#[derive(Clone, Copy)]
struct Outputs<'a, T> {
    out: Shared<'a, T>,
    out_stride: usize,
    log_sum_exp: Shared<'a, f32>,
}

/// `out = softmax(scale q k^T) v` and the logarithm of each row's sum, `[query, T]`.
pub(in crate::backend::cpu) fn forward<T: Element>(
    shape: &Shape<'_>,
    inputs: Inputs<'_, T>,
    out: &mut [T],
    out_stride: usize,
    log_sum_exp: &mut [f32],
) {
    assert_eq!(log_sum_exp.len(), shape.heads.query * shape.tokens, "log_sum_exp is [query, T]");
    let many = shape.tokens / QUERIES.0 * shape.heads.key_value >= 4 * rayon::current_num_threads();
    let size = if many { QUERIES.0 } else { QUERIES.1 };
    let mut tasks: Vec<Task> = shape
        .sequences()
        .flat_map(|all| parts(all.clone(), size).map(move |queries| (all.clone(), queries)))
        .flat_map(|(all, queries)| {
            let seen = all.start..if shape.causal { queries.end } else { all.end };
            let task = move |key_head| Task { seen: seen.clone(), queries: queries.clone(), key_head };
            (0..shape.heads.key_value).map(task)
        })
        .collect();
    // The last queries of a sequence see the most keys: they go first, so that no thread begins one at the end.
    tasks.sort_by_key(|task| std::cmp::Reverse(task.seen.len()));
    let outputs = Outputs { out: Shared::new(out), out_stride, log_sum_exp: Shared::new(log_sum_exp) };
    let products = Products::new();
    tasks.into_par_iter().with_max_len(1).for_each(|task| match products.columns() {
        16 => run::<T, 16>(products, shape, inputs, outputs, &task),
        32 => run::<T, 32>(products, shape, inputs, outputs, &task),
        other => unreachable!("panels have 16 or 32 columns, not {other}"),
    });
}

/// One task, with panels of `W` queries.
fn run<T: Element, const W: usize>(
    products: Products,
    shape: &Shape<'_>,
    inputs: Inputs<'_, T>,
    outputs: Outputs<'_, T>,
    task: &Task,
) {
    let (dim, group, queries) = (shape.heads.dim, shape.group(), &task.queries);
    let panels = queries.len().div_ceil(W);
    let (q_words, state_words) = (panels * W * dim, panels * W * (dim + 2));
    let (k_words, v_words) = (products.left_words(KEYS, dim), products.left_words(dim, KEYS));
    let mut workspace = Workspace::take(group * (q_words + state_words) + k_words + v_words + KEYS * W);
    let mut memory = workspace.floats();
    let q = carve(&mut memory, group * q_words);
    let states = carve(&mut memory, group * state_words);
    let (k, v) = (carve(&mut memory, k_words), carve(&mut memory, v_words));
    let scores = carve(&mut memory, KEYS * W);
    for (member, q) in q.chunks_exact_mut(q_words).enumerate() {
        let column = (task.key_head * group + member) * dim;
        products.pack_right(inputs.q.part(queries, column), true, queries.len(), dim, q);
    }
    for state in states.chunks_exact_mut(W * (dim + 2)) {
        state.fill(0.0);
        state[..W].fill(NOTHING);
    }
    let unseen = (queries.start + 1).saturating_sub(shape.window).saturating_sub(task.seen.start);
    for keys in parts(task.seen.start + unseen / KEYS * KEYS..task.seen.end, KEYS) {
        let n = keys.len();
        let k = products.pack_left(inputs.k.part(&keys, task.key_head * dim), true, n, dim, k);
        let v = products.pack_left(inputs.v.part(&keys, task.key_head * dim), false, dim, n, v);
        for (panel, (q, state)) in q.chunks_exact(W * dim).zip(states.chunks_exact_mut(W * (dim + 2))).enumerate() {
            let first = queries.start + panel % panels * W;
            take::<W>(products, shape, first..queries.end.min(first + W), &keys, q, k, v, scores, state);
        }
    }
    for (panel, state) in states.chunks_exact_mut(W * (dim + 2)).enumerate() {
        let (head, first) = (task.key_head * group + panel / panels, queries.start + panel % panels * W);
        // SAFETY: each (query, head) belongs to one task.
        unsafe { finish::<T, W>(shape, outputs, head, first..queries.end.min(first + W), state) }
    }
}

/// Takes one panel of queries over one tile of keys. `state` is the panel's maxima, sums and values `[dim, W]`.
#[allow(clippy::too_many_arguments, reason = "one caller; the pieces of its workspace")]
fn take<const W: usize>(
    products: Products,
    shape: &Shape<'_>,
    queries: Range<usize>,
    keys: &Range<usize>,
    q: &[f32],
    k: Left<'_>,
    v: Left<'_>,
    scores: &mut [f32],
    state: &mut [f32],
) {
    let dim = shape.heads.dim;
    let first_seen = (queries.start + 1).saturating_sub(shape.window);
    let seen = if shape.causal { queries.end.min(keys.end).saturating_sub(keys.start) } else { keys.len() };
    if seen == 0 || first_seen >= keys.end {
        return;
    }
    let scores = &mut scores[..seen * W];
    products.multiply((seen, W, dim), k, products.right(q, dim), (scores, W), false);
    let (rows, _) = scores.as_chunks_mut::<W>();
    // Queries before a key do not see it, ...
    let first = if shape.causal { (queries.start + 1).saturating_sub(keys.start).min(seen) } else { seen };
    for (before, row) in rows[first..].iter_mut().enumerate() {
        row[..(keys.start + first + before - queries.start).min(W)].fill(f32::NEG_INFINITY);
    }
    // ... nor do those from whose window it has gone.
    let gone = queries.end.saturating_sub(shape.window).saturating_sub(keys.start).min(seen);
    for (key, row) in (keys.start..).zip(&mut rows[..gone]) {
        row[(key + shape.window).saturating_sub(queries.start).min(W)..].fill(f32::NEG_INFINITY);
    }
    let (state, _) = state.as_chunks_mut::<W>();
    vectorise!(online(rows, shape.scale, state));
    let values = state[2..].as_flattened_mut();
    products.multiply((dim, W, seen), v, products.right(scores, seen), (values, W), true);
}

/// Turns scores `[keys, W]` into `exp(scale (score - maximum))`, and brings maxima, sums and values up to date.
#[inline(always)]
fn online<const W: usize>(scores: &mut [[f32; W]], scale: f32, state: &mut [[f32; W]]) {
    let [max, total, values @ ..] = state else { return };
    let mut partial = [*max; PARTIAL];
    let fold = |greatest: &mut [f32; W], row: &[f32; W]| {
        for (greatest, &x) in greatest.iter_mut().zip(row) {
            *greatest = if x > *greatest { x } else { *greatest };
        }
    };
    let (fours, rest) = scores.as_chunks::<PARTIAL>();
    for four in fours {
        for (greatest, row) in partial.iter_mut().zip(four) {
            fold(greatest, row);
        }
    }
    for (greatest, row) in partial.iter_mut().zip(rest) {
        fold(greatest, row);
    }
    let [mut greatest, others @ ..] = partial;
    for other in &others {
        fold(&mut greatest, other);
    }
    if greatest != *max {
        let factor: [f32; W] = std::array::from_fn(|lane| exp_below(scale * (max[lane] - greatest[lane])));
        *total = std::array::from_fn(|lane| total[lane] * factor[lane]);
        for row in values {
            *row = std::array::from_fn(|lane| row[lane] * factor[lane]);
        }
        *max = greatest;
    }
    let mut sums = [[0.0; W]; PARTIAL];
    let add = |sum: &mut [f32; W], row: &mut [f32; W]| {
        for ((sum, x), max) in sum.iter_mut().zip(row).zip(&greatest) {
            *x = exp_below(scale * (*x - max));
            *sum += *x;
        }
    };
    let (fours, rest) = scores.as_chunks_mut::<PARTIAL>();
    for four in fours {
        for (sum, row) in sums.iter_mut().zip(four) {
            add(sum, row);
        }
    }
    for (sum, row) in sums.iter_mut().zip(rest) {
        add(sum, row);
    }
    for sum in &sums {
        for (total, sum) in total.iter_mut().zip(sum) {
            *total += sum;
        }
    }
}

/// Writes the rows of a panel.
///
/// # Safety
/// No other thread writes these queries of `head`.
unsafe fn finish<T: Element, const W: usize>(
    shape: &Shape<'_>,
    outputs: Outputs<'_, T>,
    head: usize,
    queries: Range<usize>,
    state: &mut [f32],
) {
    let dim = shape.heads.dim;
    let (state, _) = state.as_chunks_mut::<W>();
    let [max, total, values @ ..] = state else { return };
    // SAFETY: the caller's promise.
    let log_sum_exp = unsafe { outputs.log_sum_exp.part(head * shape.tokens + queries.start, queries.len()) };
    for ((log_sum_exp, max), total) in log_sum_exp.iter_mut().zip(max).zip(&*total) {
        *log_sum_exp = shape.scale * *max + total.ln();
    }
    vectorise!({
        for total in total.iter_mut() {
            *total = 1.0 / *total;
        }
        for (lane, i) in queries.enumerate() {
            // SAFETY: the caller's promise.
            let out = unsafe { outputs.out.part(i * outputs.out_stride + head * dim, dim) };
            for (out, row) in out.iter_mut().zip(&*values) {
                *out = T::store(row[lane] * total[lane]);
            }
        }
    });
}
