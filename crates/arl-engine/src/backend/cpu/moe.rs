//! The router of a mixture of experts, the sorting of tokens by expert, and the weighted sum of the experts' outputs.

use rayon::prelude::*;

use super::element::Element;
use super::embedding::index;
use super::memory::Shared;
use super::vector::{dot, exp, rows_a_task, vectorise};
use crate::backend::Router;

/// How many experts a token gets, and whether their weights are made to sum to 1.
#[derive(Clone, Copy)]
pub(super) struct Choice {
    /// Experts to choose from.
    pub(super) experts: usize,
    /// Experts chosen a token.
    pub(super) top_k: usize,
    /// Divide the chosen probabilities by their sum.
    pub(super) normalise: bool,
}

impl Choice {
    /// Of an operation.
    pub(super) fn of(op: &Router) -> Self {
        Choice { experts: op.experts, top_k: op.top_k, normalise: op.normalise }
    }
}

/// What the router decides.
pub(super) struct Routing<'a> {
    /// `[T, experts]`.
    pub(super) probabilities: &'a mut [f32],
    /// `[T, top_k]`.
    pub(super) chosen: &'a mut [i32],
    /// `[T, top_k]`.
    pub(super) weights: &'a mut [f32],
}

/// Probabilities, choice and weights from the logits; with `balance` `[2, experts]`, the choices' counts and the
/// probabilities' sums are added to it.
pub(super) fn router(choice: Choice, logits: &[f32], routing: Routing<'_>, balance: Option<&mut [f32]>) {
    let Choice { experts, top_k, .. } = choice;
    assert!(0 < top_k && top_k <= experts, "{top_k} of {experts} experts");
    let tokens = logits.len() / experts;
    let block = rows_a_task(4 * experts);
    let Routing { probabilities, chosen, weights } = routing;
    assert_eq!(probabilities.len(), tokens * experts, "router of {tokens} tokens");
    assert_eq!((chosen.len(), weights.len()), (tokens * top_k, tokens * top_k), "router of {tokens} tokens");
    probabilities
        .par_chunks_mut(block * experts)
        .zip(logits.par_chunks(block * experts))
        .zip(chosen.par_chunks_mut(block * top_k).zip(weights.par_chunks_mut(block * top_k)))
        .for_each(|((probabilities, logits), (chosen, weights))| {
            vectorise!({
                let rows = probabilities.chunks_exact_mut(experts).zip(logits.chunks_exact(experts));
                let choices = chosen.chunks_exact_mut(top_k).zip(weights.chunks_exact_mut(top_k));
                for ((probabilities, logits), (chosen, weights)) in rows.zip(choices) {
                    softmax(logits, probabilities);
                    choose(choice, probabilities, chosen, weights);
                }
            });
        });
    if let Some(balance) = balance {
        let (counts, sums) = balance.split_at_mut(experts);
        for expert in chosen.iter() {
            counts[index(*expert)] += 1.0;
        }
        super::elementwise::sum_rows(probabilities, experts, tokens, &mut sums[..experts]);
    }
}

#[inline(always)]
fn softmax(logits: &[f32], probabilities: &mut [f32]) {
    let max = logits.iter().fold(f32::NEG_INFINITY, |a, b| if *b > a { *b } else { a });
    for (probability, logit) in probabilities.iter_mut().zip(logits) {
        *probability = exp(logit - max);
    }
    let total: f32 = probabilities.iter().sum();
    for probability in probabilities {
        *probability /= total;
    }
}

/// The most probable experts in order; the lower index first among equals.
#[inline(always)]
fn choose(choice: Choice, probabilities: &[f32], chosen: &mut [i32], weights: &mut [f32]) {
    for slot in 0..choice.top_k {
        let (taken, _) = chosen.split_at(slot);
        let mut best: Option<(usize, f32)> = None;
        for (expert, probability) in probabilities.iter().enumerate() {
            if best.is_none_or(|(_, greatest)| *probability > greatest) && !taken.contains(&(expert as i32)) {
                best = Some((expert, *probability));
            }
        }
        let (expert, probability) = best.unwrap_or((slot, f32::NAN));
        chosen[slot] = expert as i32;
        weights[slot] = probability;
    }
    if choice.normalise {
        let total: f32 = weights.iter().sum();
        for weight in weights {
            *weight /= total;
        }
    }
}

/// What the router decided, and the gradient it sends back.
pub(super) struct RouterBackward<'a> {
    /// `[T, experts]`.
    pub(super) probabilities: &'a [f32],
    /// `[T, top_k]`.
    pub(super) chosen: &'a [i32],
    /// `[T, top_k]`.
    pub(super) weights: &'a [f32],
    /// `[T, top_k]`.
    pub(super) d_weights: &'a [f32],
    /// The choices' counts `[experts]` (or `[2, experts]`, of which the first row is read), and a factor.
    pub(super) balance: Option<(&'a [f32], f32)>,
}

/// The gradient of the logits: through the normalisation of the chosen weights (if any), then through the softmax.
pub(super) fn router_backward(choice: Choice, input: &RouterBackward<'_>, d_logits: &mut [f32]) {
    let Choice { experts, top_k, normalise } = choice;
    let block = rows_a_task(4 * experts);
    d_logits.par_chunks_mut(block * experts).enumerate().for_each(|(task, d_logits)| {
        vectorise!({
            for (row, d_logits) in d_logits.chunks_exact_mut(experts).enumerate() {
                let token = task * block + row;
                let probabilities = &input.probabilities[token * experts..][..experts];
                let chosen = &input.chosen[token * top_k..][..top_k];
                let weights = &input.weights[token * top_k..][..top_k];
                let d_weights = &input.d_weights[token * top_k..][..top_k];
                match input.balance {
                    Some((counts, factor)) => {
                        for (d, count) in d_logits.iter_mut().zip(counts) {
                            *d = factor * count;
                        }
                    }
                    None => d_logits.fill(0.0),
                }
                // weight = p / total: d_p = (d_weight - sum of weight d_weight) / total, over the chosen.
                let total: f32 = chosen.iter().map(|expert| probabilities[index(*expert)]).sum();
                let (pull, total) = if normalise {
                    (weights.iter().zip(d_weights).map(|(weight, d)| weight * d).sum(), total)
                } else {
                    (0.0, 1.0)
                };
                for (expert, d) in chosen.iter().zip(d_weights) {
                    d_logits[index(*expert)] += (d - pull) / total;
                }
                let product = dot(probabilities, d_logits);
                for (d, probability) in d_logits.iter_mut().zip(probabilities) {
                    *d = probability * (*d - product);
                }
            }
        });
    });
}

/// Sorts pairs by expert, keeping their order within each (a counting sort).
pub(super) fn permute(chosen: &[i32], offsets: &mut [i32], pairs: &mut [i32], rows: &mut [i32]) {
    assert_eq!((pairs.len(), rows.len()), (chosen.len(), chosen.len()), "permute of {} pairs", chosen.len());
    offsets.fill(0);
    for expert in chosen {
        offsets[index(*expert) + 1] += 1;
    }
    for expert in 1..offsets.len() {
        offsets[expert] += offsets[expert - 1];
    }
    let mut next = offsets.to_vec();
    for (pair, expert) in chosen.iter().enumerate() {
        let row = &mut next[index(*expert)];
        pairs[index(*row)] = pair as i32;
        rows[pair] = *row;
        *row += 1;
    }
}

/// `out[t] = sum over j of weights[t, j] * x[rows[t, j]]`; plain sums without weights.
pub(super) fn combine<T: Element>(
    x: &[T],
    rows: &[i32],
    weights: Option<&[f32]>,
    top_k: usize,
    width: usize,
    out: &mut [T],
) {
    assert_eq!(rows.len() * width, out.len() * top_k, "combine of {top_k} rows of {width}");
    let block = rows_a_task(width * (top_k + 1));
    out.par_chunks_mut(block * width).enumerate().for_each(|(task, out)| {
        vectorise!({
            let mut total = vec![0.0_f32; width];
            for (row, out) in out.chunks_exact_mut(width).enumerate() {
                let first = (task * block + row) * top_k;
                total.fill(0.0);
                for pair in first..first + top_k {
                    let weight = weights.map_or(1.0, |weights| weights[pair]);
                    let x = &x[index(rows[pair]) * width..][..width];
                    for (total, x) in total.iter_mut().zip(x) {
                        *total += weight * x.load();
                    }
                }
                for (out, total) in out.iter_mut().zip(&total) {
                    *out = T::store(*total);
                }
            }
        });
    });
}

/// `d_x[rows[p]] = weights[p] d_out[p / top_k]` and `d_weights[p] = x[rows[p]] . d_out[p / top_k]`.
#[allow(clippy::too_many_arguments, reason = "the leaf's own arguments")]
pub(super) fn combine_backward<T: Element>(
    d_out: &[T],
    x: &[T],
    rows: &[i32],
    weights: &[f32],
    top_k: usize,
    width: usize,
    d_x: &mut [T],
    d_weights: &mut [f32],
) {
    assert_eq!((weights.len(), d_weights.len()), (rows.len(), rows.len()), "combine_backward of {top_k} rows");
    assert_eq!((x.len(), d_x.len()), (rows.len() * width, x.len()), "combine_backward of rows of {width}");
    let mut seen = vec![false; rows.len()];
    for row in rows {
        assert!(!std::mem::replace(&mut seen[index(*row)], true), "row {row} belongs to two pairs");
    }
    let d_x = Shared::new(d_x);
    let block = rows_a_task(2 * width);
    d_weights.par_chunks_mut(block).enumerate().for_each(|(task, d_weights)| {
        vectorise!({
            for (number, d_weight) in d_weights.iter_mut().enumerate() {
                let pair = task * block + number;
                let row = index(rows[pair]) * width;
                let d_out = &d_out[pair / top_k * width..][..width];
                *d_weight = dot(&x[row..row + width], d_out);
                // SAFETY: each pair has a row of its own, as was just asserted.
                let d_x = unsafe { d_x.part(row, width) };
                for (d_x, d_out) in d_x.iter_mut().zip(d_out) {
                    *d_x = T::store(weights[pair] * d_out.load());
                }
            }
        });
    });
}
