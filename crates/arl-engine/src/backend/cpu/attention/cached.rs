//! One new token a sequence against its cached keys and values.

use rayon::prelude::*;

use super::Matrix;
use crate::backend::Heads;
use crate::backend::cpu::element::Element;
use crate::backend::cpu::embedding::index;
use crate::backend::cpu::vector::{dot, exp, vectorise};

/// `out[s, head]` from `q[s, head]` and the first `lengths[s]` entries of sequence `s` in the caches
/// `[S, capacity, key_value * dim]`.
#[allow(clippy::too_many_arguments, reason = "the leaf's own arguments")]
pub(in crate::backend::cpu) fn cached<T: Element>(
    heads: Heads,
    window: usize,
    scale: f32,
    q: Matrix<'_, T>,
    (k_cache, v_cache): (&[T], &[T]),
    capacity: usize,
    lengths: &[i32],
    out: &mut [T],
) {
    let (dim, group) = (heads.dim, heads.query / heads.key_value);
    let width = heads.key_value * dim;
    assert_eq!(out.len(), lengths.len() * heads.query * dim, "attention_cached of {} sequences", lengths.len());
    assert_eq!(k_cache.len(), lengths.len() * capacity * width, "attention_cached with a capacity of {capacity}");
    assert_eq!(v_cache.len(), k_cache.len(), "attention_cached with a capacity of {capacity}");
    out.par_chunks_mut(dim).enumerate().for_each(|(task, out)| {
        let (sequence, head) = (task / heads.query, task % heads.query);
        let length = index(lengths[sequence]);
        assert!(0 < length && length <= capacity, "{length} entries in a cache of {capacity}");
        let first = length.saturating_sub(window);
        let base = sequence * capacity * width + head / group * dim;
        let row = |entry: usize| base + entry * width..base + entry * width + dim;
        vectorise!({
            let query = q.row(sequence, head * dim, dim);
            let mut scores = vec![0.0_f32; length - first];
            let mut max = f32::NEG_INFINITY;
            for (j, score) in scores.iter_mut().enumerate() {
                *score = scale * dot(query, &k_cache[row(first + j)]);
                max = if *score > max { *score } else { max };
            }
            let mut total = vec![0.0_f32; dim];
            let mut sum = 0.0;
            for (j, score) in scores.iter().enumerate() {
                let weight = exp(score - max);
                sum += weight;
                for (total, value) in total.iter_mut().zip(&v_cache[row(first + j)]) {
                    *total += weight * value.load();
                }
            }
            for (out, total) in out.iter_mut().zip(&total) {
                *out = T::store(total / sum);
            }
        });
    });
}
