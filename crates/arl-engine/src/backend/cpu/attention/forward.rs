//! The forward pass.

use rayon::prelude::*;

use super::{Matrix, Shape};
use crate::backend::cpu::element::Element;
use crate::backend::cpu::memory::Shared;
use crate::backend::cpu::vector::{dot, exp, vectorise};

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
    let dim = shape.heads.dim;
    let tasks: Vec<(usize, usize, usize)> =
        shape.sequences().flat_map(|(start, end)| (0..shape.heads.query).map(move |head| (start, end, head))).collect();
    let out = Shared::new(out);
    let log_sum_exp = Shared::new(log_sum_exp);
    tasks.par_iter().for_each(|&(start, end, head)| {
        let key_head = head / shape.group();
        // SAFETY: each (sequence, head) has its own run of `log_sum_exp`.
        let log_sum_exp = unsafe { log_sum_exp.part(head * shape.tokens + start, end - start) };
        vectorise(|| {
            let mut scores = vec![0.0_f32; end - start];
            let mut total = vec![0.0_f32; dim];
            for i in start..end {
                let first = shape.first_key(start, i);
                let query = q.row(i, head * dim, dim);
                let scores = &mut scores[..i + 1 - first];
                let mut max = f32::NEG_INFINITY;
                for (j, score) in scores.iter_mut().enumerate() {
                    *score = shape.scale * dot(query, k.row(first + j, key_head * dim, dim));
                    max = if *score > max { *score } else { max };
                }
                let mut sum = 0.0;
                total.fill(0.0);
                for (j, score) in scores.iter().enumerate() {
                    let weight = exp(score - max);
                    sum += weight;
                    for (total, value) in total.iter_mut().zip(v.row(first + j, key_head * dim, dim)) {
                        *total += weight * value.load();
                    }
                }
                log_sum_exp[i - start] = max + sum.ln();
                // SAFETY: each (token, head) has its own part of `out`.
                let out = unsafe { out.part(i * out_stride + head * dim, dim) };
                for (out, total) in out.iter_mut().zip(&total) {
                    *out = T::store(total / sum);
                }
            }
        });
    });
}
