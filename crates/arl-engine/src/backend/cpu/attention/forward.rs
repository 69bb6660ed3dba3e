//! The forward pass: a task takes some queries of a sequence with all heads that share a key head, goes over the tiles
//! of keys that they see, and keeps each row's maximum, sum and weighted values so far (online softmax).

use std::ops::Range;

use rayon::prelude::*;

use super::{Matrix, Shape, parts};
use crate::backend::Layout;
use crate::backend::cpu::element::Element;
use crate::backend::cpu::gemm::tile;
use crate::backend::cpu::memory::Shared;
use crate::backend::cpu::vector::{exp, max, sum, vectorise};

/// Queries that a task takes.
const QUERIES: usize = 128;
/// Keys of a tile.
const KEYS: usize = 64;

/// What the queries of one head have gathered from the keys so far.
struct Gathered {
    /// `[QUERIES, dim]`: sums of values, weighted by `exp(score - max)`.
    values: Vec<f32>,
    /// Greatest score of each query.
    max: Vec<f32>,
    /// Sum of `exp(score - max)`.
    total: Vec<f32>,
}

/// Writes `out` (rows `out_stride` apart) and `log_sum_exp` `[query, T]`.
pub(in crate::backend::cpu) fn forward<T: Element>(
    shape: &Shape<'_>,
    q: Matrix<'_, T>,
    k: Matrix<'_, T>,
    v: Matrix<'_, T>,
    out: &mut [T],
    out_stride: usize,
    log_sum_exp: &mut [f32],
) {
    assert_eq!(log_sum_exp.len(), shape.heads.query * shape.tokens, "log_sum_exp is [query, T]");
    let (dim, group) = (shape.heads.dim, shape.group());
    let heads = || 0..shape.heads.key_value;
    // The last queries of a sequence see the most keys: they go first, so that no thread begins one at the end.
    let mut tasks: Vec<(Range<usize>, Range<usize>, usize)> = shape
        .sequences()
        .flat_map(|all| parts(all.clone(), QUERIES).map(move |queries| (all.start..queries.end, queries)))
        .flat_map(|(keys, queries)| heads().map(move |head| (keys.clone(), queries.clone(), head)))
        .collect();
    tasks.sort_by_key(|(keys, _, _)| std::cmp::Reverse(keys.len()));
    let out = Shared::new(out);
    let log_sum_exp = Shared::new(log_sum_exp);
    tasks.into_par_iter().with_max_len(1).for_each(|(keys, queries, key_head)| {
        let gathered = gather(shape, q, k, v, &keys, &queries, key_head);
        for (head, gathered) in (key_head * group..).zip(gathered) {
            // SAFETY: each (query, head) belongs to one task.
            let log_sum_exp = unsafe { log_sum_exp.part(head * shape.tokens + queries.start, queries.len()) };
            for (row, i) in queries.clone().enumerate() {
                let total = gathered.total[row];
                log_sum_exp[row] = gathered.max[row] + total.ln();
                // SAFETY: as above.
                let out = unsafe { out.part(i * out_stride + head * dim, dim) };
                vectorise!({
                    let factor = 1.0 / total;
                    for (out, value) in out.iter_mut().zip(&gathered.values[row * dim..]) {
                        *out = T::store(value * factor);
                    }
                });
            }
        }
    });
}

/// Goes over the keys that `queries` see, for each head that reads `key_head`.
fn gather<T: Element>(
    shape: &Shape<'_>,
    q: Matrix<'_, T>,
    k: Matrix<'_, T>,
    v: Matrix<'_, T>,
    keys: &Range<usize>,
    queries: &Range<usize>,
    key_head: usize,
) -> Vec<Gathered> {
    let (dim, group) = (shape.heads.dim, shape.group());
    let mut gathered: Vec<Gathered> = (0..group)
        .map(|_| Gathered {
            values: vec![0.0; queries.len() * dim],
            max: vec![f32::NEG_INFINITY; queries.len()],
            total: vec![0.0; queries.len()],
        })
        .collect();
    let mut scores = vec![0.0_f32; queries.len() * KEYS];
    let mut q_tile = vec![0.0_f32; group * queries.len() * dim];
    let (mut k_transposed, mut v_tile) = (vec![0.0_f32; KEYS * dim], vec![0.0_f32; KEYS * dim]);
    for (head, q_tile) in (key_head * group..).zip(q_tile.chunks_exact_mut(queries.len() * dim)) {
        q.copy(queries.clone(), head * dim, dim, q_tile);
    }
    let first = (queries.start + 1).saturating_sub(shape.window).max(keys.start);
    for keys in parts(first..keys.end, KEYS) {
        let rows = shape.seeing(queries, &keys);
        let (m, n, offset) = (rows.len(), keys.len(), (rows.start - queries.start) * dim);
        k.transposed(keys.clone(), key_head * dim, dim, &mut k_transposed);
        v.copy(keys.clone(), key_head * dim, dim, &mut v_tile);
        for (gathered, q) in gathered.iter_mut().zip(q_tile.chunks_exact(queries.len() * dim)) {
            tile(Layout::Nn, m, n, dim, (&q[offset..], dim), (&k_transposed, n), (&mut scores, n), false);
            vectorise!({
                for (i, scores) in rows.clone().zip(scores.chunks_exact_mut(n)) {
                    gathered.take(shape, i, i - queries.start, &keys, dim, scores);
                }
            });
            let values = &mut gathered.values[offset..];
            tile(Layout::Nn, m, dim, n, (&scores, n), (&v_tile, dim), (values, dim), true);
        }
    }
    gathered
}

impl Gathered {
    /// Turns query `i`'s scores into weights against the greatest score so far, and scales what was gathered to it.
    #[inline(always)]
    fn take(&mut self, shape: &Shape<'_>, i: usize, row: usize, keys: &Range<usize>, dim: usize, scores: &mut [f32]) {
        let seen = shape.seen(i, keys);
        scores[..seen.start].fill(0.0);
        scores[seen.end..].fill(0.0);
        let scores = &mut scores[seen];
        let greatest = max(scores) * shape.scale;
        let before = self.max[row];
        if greatest > before {
            let factor = exp(before - greatest);
            self.max[row] = greatest;
            self.total[row] *= factor;
            for value in &mut self.values[row * dim..][..dim] {
                *value *= factor;
            }
        }
        let max = self.max[row];
        for score in scores.iter_mut() {
            *score = exp(score.mul_add(shape.scale, -max));
        }
        self.total[row] += sum(scores.len(), |j| scores[j]);
    }
}
