//! AdamW as torch.optim.AdamW computes it, with clipping as torch.nn.utils.clip_grad_norm_ does, in one pass over memory.

use half::{bf16, f16};
use rayon::prelude::*;

use super::element::Element;
use super::elementwise::convert;
use super::vector::vectorise;
use crate::backend::{AdamW, StochasticRounding, join_master, split_master};

/// Elements that one task takes.
const BLOCK: usize = 16_384;

/// The numbers of one update.
#[derive(Clone, Copy)]
pub(super) struct Step {
    /// Factor on the gradients: what clipping leaves of them, over the loss scale.
    clip: f32,
    /// See [`AdamW::keep`].
    keep: f32,
    beta1: f32,
    beta2: f32,
    /// See [`AdamW::step_size`].
    size: f32,
    /// See [`AdamW::root_correction`].
    root: f32,
    epsilon: f32,
}

impl Step {
    /// The numbers for `op` where the gradients' sum of squares is `grad_norm_squared`; `None` where it is not finite.
    pub(super) fn new(op: &AdamW, grad_norm_squared: f64) -> Option<Step> {
        if !grad_norm_squared.is_finite() {
            return None;
        }
        let scale = f64::from(op.gradient_scale);
        let norm = grad_norm_squared.sqrt() / scale;
        let clip = if op.max_grad_norm == 0.0 { 1.0 } else { (f64::from(op.max_grad_norm) / (norm + 1e-6)).min(1.0) };
        Some(Step {
            clip: (clip / scale) as f32,
            keep: op.keep(),
            beta1: op.beta1,
            beta2: op.beta2,
            size: op.step_size(),
            root: op.root_correction(),
            epsilon: op.epsilon,
        })
    }

    /// The new weight; the moments are updated.
    #[inline(always)]
    fn apply(&self, weight: f32, gradient: f32, moment1: &mut f32, moment2: &mut f32) -> f32 {
        let gradient = gradient * self.clip;
        // torch's own order: lerp(m, g, 1 - beta1), v * beta2 + (1 - beta2) * g * g.
        *moment1 += (1.0 - self.beta1) * (gradient - *moment1);
        *moment2 = *moment2 * self.beta2 + (1.0 - self.beta2) * gradient * gradient;
        let denominator = moment2.sqrt() * self.root + self.epsilon;
        weight * self.keep - self.size * *moment1 / denominator
    }
}

/// Updates f32 weights.
pub(super) fn adamw(step: Step, weights: &mut [f32], gradients: &[f32], moment1: &mut [f32], moment2: &mut [f32]) {
    let len = weights.len();
    assert_eq!((gradients.len(), moment1.len(), moment2.len()), (len, len, len), "adamw of {len} weights");
    weights
        .par_chunks_mut(BLOCK)
        .zip(gradients.par_chunks(BLOCK))
        .zip(moment1.par_chunks_mut(BLOCK).zip(moment2.par_chunks_mut(BLOCK)))
        .for_each(|((weights, gradients), (moment1, moment2))| {
            vectorise!({
                let moments = moment1.iter_mut().zip(moment2);
                for ((weight, gradient), (moment1, moment2)) in weights.iter_mut().zip(gradients).zip(moments) {
                    *weight = step.apply(*weight, *gradient, moment1, moment2);
                }
            });
        });
}

/// Updates split masters: bf16 weights and the 16 bits that make them exact.
pub(super) fn adamw_split(
    step: Step,
    weights: &mut [bf16],
    masters: &mut [u16],
    gradients: &[f32],
    moment1: &mut [f32],
    moment2: &mut [f32],
) {
    let len = weights.len();
    assert_eq!((gradients.len(), moment1.len(), moment2.len()), (len, len, len), "adamw of {len} weights");
    assert_eq!(masters.len(), len, "adamw of {len} weights");
    weights
        .par_chunks_mut(BLOCK)
        .zip(masters.par_chunks_mut(BLOCK))
        .zip(gradients.par_chunks(BLOCK))
        .zip(moment1.par_chunks_mut(BLOCK).zip(moment2.par_chunks_mut(BLOCK)))
        .for_each(|(((weights, masters), gradients), (moment1, moment2))| {
            vectorise!({
                let moments = moment1.iter_mut().zip(moment2);
                let weights = weights.iter_mut().zip(masters);
                for (((high, low), gradient), (moment1, moment2)) in weights.zip(gradients).zip(moments) {
                    let weight = join_master(high.to_bits(), *low);
                    let (new_high, new_low) = split_master(step.apply(weight, *gradient, moment1, moment2));
                    *high = bf16::from_bits(new_high);
                    *low = new_low;
                }
            });
        });
}

/// Updates f32 masters, and the f16 weights that are their roundings.
pub(super) fn adamw_masters(
    step: Step,
    weights: &mut [f16],
    masters: &mut [f32],
    gradients: &[f32],
    moment1: &mut [f32],
    moment2: &mut [f32],
) {
    assert_eq!(weights.len(), masters.len(), "adamw of {} weights", masters.len());
    adamw(step, masters, gradients, moment1, moment2);
    convert(masters, weights);
}

/// Updates bf16 weights without masters.
pub(super) fn adamw_rounded(
    step: Step,
    rounding: StochasticRounding,
    weights: &mut [bf16],
    gradients: &[f32],
    moment1: &mut [f32],
    moment2: &mut [f32],
) {
    let len = weights.len();
    assert_eq!((gradients.len(), moment1.len(), moment2.len()), (len, len, len), "adamw of {len} weights");
    weights
        .par_chunks_mut(BLOCK)
        .zip(gradients.par_chunks(BLOCK))
        .zip(moment1.par_chunks_mut(BLOCK).zip(moment2.par_chunks_mut(BLOCK)))
        .enumerate()
        .for_each(|(block, ((weights, gradients), (moment1, moment2)))| {
            let rounding = rounding.from(block * BLOCK);
            vectorise!({
                let moments = moment1.iter_mut().zip(moment2);
                for (i, ((weight, gradient), (moment1, moment2))) in
                    weights.iter_mut().zip(gradients).zip(moments).enumerate()
                {
                    let new = step.apply(weight.load(), *gradient, moment1, moment2);
                    *weight = bf16::from_bits(rounding.round(new, i));
                }
            });
        });
}
