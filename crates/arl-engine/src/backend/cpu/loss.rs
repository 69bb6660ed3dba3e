//! The classifier pass: loss, accuracy, entropy and the logits' gradient. A row of logits is read once for its
//! statistics and once, from the cache, for the gradient that replaces it.

use rayon::prelude::*;

use super::element::Element;
use super::embedding::index;
use super::vector::{self, LANES, exp, vectorise};

/// What a row of logits says about its distribution.
struct Statistics {
    max: f32,
    /// The first index of `max`; the vocabulary's size where a logit is NaN.
    argmax: usize,
    log_sum_exp: f64,
    entropy: f64,
}

/// One chunk's inputs by row.
pub(super) struct Targets<'a> {
    /// `[rows]`.
    pub(super) targets: &'a [i32],
    /// `[rows]`.
    pub(super) weights: &'a [f32],
    /// Factor of the gradient.
    pub(super) scale: f32,
    /// Write the gradient over the logits.
    pub(super) gradient: bool,
}

/// One chunk's results by row.
pub(super) struct Losses<'a> {
    /// `[rows]`.
    pub(super) nll: &'a mut [f32],
    /// `[rows]`.
    pub(super) correct: &'a mut [f32],
    /// `[rows]`.
    pub(super) entropy: &'a mut [f32],
}

/// The pass over `[rows, vocab]` logits.
pub(super) fn cross_entropy<T: Element>(logits: &mut [T], vocab: usize, input: &Targets<'_>, output: Losses<'_>) {
    let rows = input.targets.len();
    assert_eq!(logits.len(), rows * vocab, "cross_entropy of rows of {vocab}");
    assert!(input.weights.len() == rows && output.nll.len() == rows, "cross_entropy of {rows} rows");
    assert!(output.correct.len() == rows && output.entropy.len() == rows, "cross_entropy of {rows} rows");
    logits
        .par_chunks_mut(vocab)
        .zip(input.targets.par_iter().zip(input.weights))
        .zip(output.nll.par_iter_mut().zip(output.correct).zip(output.entropy))
        .for_each(|((logits, (target, weight)), ((nll, correct), entropy))| {
            vectorise!({
                let target = index(*target);
                let statistics = statistics(logits);
                *nll = (statistics.log_sum_exp - f64::from(logits[target].load())) as f32;
                *correct = if statistics.argmax == target { 1.0 } else { 0.0 };
                *entropy = statistics.entropy as f32;
                if input.gradient {
                    gradient(logits, target, weight * input.scale, &statistics);
                }
            });
        });
}

/// Online over blocks that stay in the first-level cache: each block's maximum, then its sums against the greatest so
/// far; the sums of earlier blocks shrink when the maximum grows.
#[inline(always)]
fn statistics<T: Element>(logits: &[T]) -> Statistics {
    const BLOCK: usize = 1024;
    /// Elements whose terms are summed in f32: four a lane.
    const PART: usize = 4 * LANES;
    let (mut max, mut argmax) = (f32::NEG_INFINITY, logits.len());
    // Of e = exp(x - max): the sum, and the sum of e (x - max).
    let (mut total, mut moment) = (0.0_f64, 0.0_f64);
    for (number, block) in logits.chunks(BLOCK).enumerate() {
        let block_max = vector::max(block);
        if block_max > max {
            let position = block.iter().position(|x| x.load() == block_max).unwrap_or(0);
            argmax = number * BLOCK + position;
            if total > 0.0 {
                let shift = f64::from(max) - f64::from(block_max);
                let factor = shift.exp();
                moment = factor * (moment + shift * total);
                total *= factor;
            }
            max = block_max;
        }
        // All logits so far are -inf (or NaN): nothing to add, or nothing that a later block would not repeat.
        let base = if max == f32::NEG_INFINITY { 0.0 } else { max };
        // Sums in f32 are short, lest many small terms vanish next to a great one.
        let (mut totals, mut block_moments) = ([0.0_f64; LANES], [0.0_f64; LANES]);
        for part in block.chunks(PART) {
            let (mut sums, mut moments) = ([0.0_f32; LANES], [0.0_f32; LANES]);
            let chunks = part.chunks_exact(LANES);
            let rest = chunks.remainder();
            for chunk in chunks {
                for lane in 0..LANES {
                    let (e, product) = terms(chunk[lane].load() - base);
                    sums[lane] += e;
                    moments[lane] += product;
                }
            }
            for (lane, x) in rest.iter().enumerate() {
                let (e, product) = terms(x.load() - base);
                sums[lane] += e;
                moments[lane] += product;
            }
            for lane in 0..LANES {
                totals[lane] += f64::from(sums[lane]);
                block_moments[lane] += f64::from(moments[lane]);
            }
        }
        total += totals.iter().sum::<f64>();
        moment += block_moments.iter().sum::<f64>();
    }
    if total.is_nan() {
        argmax = logits.len();
    }
    let log_total = total.ln();
    Statistics { max, argmax, log_sum_exp: f64::from(max) + log_total, entropy: log_total - moment / total }
}

/// `e^x` and `x e^x`, the latter 0 at -inf.
#[inline(always)]
fn terms(x: f32) -> (f32, f32) {
    let e = exp(x);
    let x = if x < -100.0 { -100.0 } else { x };
    (e, e * x)
}

/// `weight * (softmax(logits) - one_hot(target))`, over the logits.
#[inline(always)]
fn gradient<T: Element>(logits: &mut [T], target: usize, weight: f32, statistics: &Statistics) {
    // exp(x - max) / total rather than exp(x - log_sum_exp): the rounding of a great log_sum_exp does not enter.
    let inverse = (f64::from(statistics.max) - statistics.log_sum_exp).exp();
    let factor = (f64::from(weight) * inverse) as f32;
    let probability = exp(logits[target].load() - statistics.max) * inverse as f32;
    let max = statistics.max;
    for logit in logits.iter_mut() {
        *logit = T::store(factor * exp(logit.load() - max));
    }
    logits[target] = T::store(weight * (probability - 1.0));
}
