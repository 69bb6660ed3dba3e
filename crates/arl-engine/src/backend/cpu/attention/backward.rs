//! The backward pass: scores are computed again from the kept log-sum-exp.

use rayon::prelude::*;

use super::{Matrix, Shape};
use crate::backend::cpu::element::Element;
use crate::backend::cpu::memory::Shared;
use crate::backend::cpu::vector::{dot, exp, vectorise};

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

/// Writes the gradients of q, k and v side by side to `d_qkv`. `scratch` `[query, T]` takes `d_out . out` by row.
pub(in crate::backend::cpu) fn backward<T: Element>(
    shape: &Shape<'_>,
    input: &Input<'_, T>,
    d_qkv: &mut [T],
    scratch: &mut [f32],
) {
    let (dim, heads, group) = (shape.heads.dim, shape.heads, shape.group());
    let width = (heads.query + 2 * heads.key_value) * dim;
    let tasks: Vec<(usize, usize, usize)> =
        shape.sequences().flat_map(|(start, end)| (0..heads.key_value).map(move |head| (start, end, head))).collect();
    let d_qkv = Shared::new(d_qkv);
    let scratch = Shared::new(scratch);
    tasks.par_iter().for_each(|&(start, end, key_head)| {
        vectorise(|| {
            let len = end - start;
            let mut d_q = vec![0.0_f32; len * dim];
            let mut d_k = vec![0.0_f32; len * dim];
            let mut d_v = vec![0.0_f32; len * dim];
            for head in key_head * group..(key_head + 1) * group {
                // SAFETY: each (sequence, head) has its own run of `scratch`.
                let delta = unsafe { scratch.part(head * shape.tokens + start, len) };
                d_q.fill(0.0);
                for i in start..end {
                    let (query, d_out) = (input.q.row(i, head * dim, dim), input.d_out.row(i, head * dim, dim));
                    delta[i - start] = dot(d_out, input.out.row(i, head * dim, dim));
                    let log_sum_exp = input.log_sum_exp[head * shape.tokens + i];
                    let d_query = &mut d_q[(i - start) * dim..][..dim];
                    for j in shape.first_key(start, i)..=i {
                        let (key, value) = (input.k.row(j, key_head * dim, dim), input.v.row(j, key_head * dim, dim));
                        let probability = exp(shape.scale * dot(query, key) - log_sum_exp);
                        let d_score = shape.scale * probability * (dot(d_out, value) - delta[i - start]);
                        let d_key = &mut d_k[(j - start) * dim..][..dim];
                        let d_value = &mut d_v[(j - start) * dim..][..dim];
                        for x in 0..dim {
                            d_query[x] += d_score * key[x].load();
                            d_key[x] += d_score * query[x].load();
                            d_value[x] += probability * d_out[x].load();
                        }
                    }
                }
                for (i, d_q) in (start..end).zip(d_q.chunks_exact(dim)) {
                    // SAFETY: each (token, head) has its own part of `d_qkv`.
                    store(d_q, unsafe { d_qkv.part(i * width + head * dim, dim) });
                }
            }
            for (i, (d_k, d_v)) in (start..end).zip(d_k.chunks_exact(dim).zip(d_v.chunks_exact(dim))) {
                let column = (heads.query + key_head) * dim;
                // SAFETY: each (token, key head) has its own parts of `d_qkv`.
                store(d_k, unsafe { d_qkv.part(i * width + column, dim) });
                // SAFETY: as above.
                store(d_v, unsafe { d_qkv.part(i * width + column + heads.key_value * dim, dim) });
            }
        });
    });
}

#[inline(always)]
fn store<T: Element>(source: &[f32], target: &mut [T]) {
    for (target, source) in target.iter_mut().zip(source) {
        *target = T::store(*source);
    }
}
