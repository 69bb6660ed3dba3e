//! AdamW as torch.optim.AdamW computes it, with clipping as torch.nn.utils.clip_grad_norm_ does, in one pass over memory.

use half::{bf16, f16};
use rayon::prelude::*;

use super::element::Element;
use super::elementwise::convert;
use super::memory::Lease;
use super::vector::vectorise;
use crate::backend::rounding::round;
use crate::backend::{AdamW, DType, StochasticRounding, join_master, split_master};

/// Elements that one task takes.
const BLOCK: usize = 16_384;

/// [`Backend::adamw`](crate::backend::Backend::adamw).
pub(super) fn run(lease: &mut Lease<'_>, op: &AdamW) {
    let Some(step) = Step::new(op, lease.read::<f64>(op.grad_norm_squared)[0]) else {
        return;
    };
    match op.moment1.dtype {
        DType::Bf16 => run_with::<bf16>(lease, op, step),
        _ => run_with::<f32>(lease, op, step),
    }
}

/// With moments of a type.
fn run_with<M: Moment>(lease: &mut Lease<'_>, op: &AdamW, step: Step) {
    let arrays = Arrays::<M> {
        gradients: lease.read(op.gradients),
        moment1: lease.write(op.moment1),
        moment2: lease.write(op.moment2),
        rounding: op.rounding,
    };
    match op.masters {
        Some(masters) if masters.dtype == DType::U16 => {
            adamw_split(step, lease.write(op.weights), lease.write(masters), arrays);
        }
        Some(masters) => adamw_masters(step, lease.write(op.weights), lease.write(masters), arrays),
        None if op.weights.dtype == DType::Bf16 => adamw_rounded(step, lease.write(op.weights), arrays),
        None => adamw(step, lease.write(op.weights), arrays),
    }
}

/// A type of the moments.
trait Moment: Element {
    /// `value` as it is kept; what is cut off is rounded by 16 random bits.
    fn keep(value: f32, random: u32) -> Self;
}

impl Moment for f32 {
    #[inline(always)]
    fn keep(value: f32, _: u32) -> Self {
        value
    }
}

impl Moment for bf16 {
    #[inline(always)]
    fn keep(value: f32, random: u32) -> Self {
        bf16::from_bits(round(value, random))
    }
}

/// Gradients and moments of a run of parameters.
struct Arrays<'a, M> {
    gradients: &'a [f32],
    moment1: &'a mut [M],
    moment2: &'a mut [M],
    /// Of what is rounded at random.
    rounding: StochasticRounding,
}

impl<'a, M: Moment> Arrays<'a, M> {
    /// Those of `len` weights in blocks, as tasks take them.
    fn blocks(self, len: usize) -> impl IndexedParallelIterator<Item = Arrays<'a, M>> {
        let lens = (self.gradients.len(), self.moment1.len(), self.moment2.len());
        assert_eq!(lens, (len, len, len), "adamw of {len} weights");
        let moments = self.moment1.par_chunks_mut(BLOCK).zip(self.moment2.par_chunks_mut(BLOCK));
        let rounding = self.rounding;
        self.gradients.par_chunks(BLOCK).zip(moments).enumerate().map(
            move |(block, (gradients, (moment1, moment2)))| Arrays {
                gradients,
                moment1,
                moment2,
                rounding: rounding.from(block * BLOCK),
            },
        )
    }
}

/// The numbers of one update.
#[derive(Clone, Copy)]
struct Step {
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
    fn new(op: &AdamW, grad_norm_squared: f64) -> Option<Step> {
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

/// A weight, with what makes it exact.
trait Weight {
    /// The exact value.
    fn get(&self) -> f32;
    /// Replaces it; what is cut off is rounded by the bits of the parameter `offset` after the first.
    fn set(&mut self, value: f32, rounding: &StochasticRounding, offset: usize);
}

impl Weight for &mut f32 {
    #[inline(always)]
    fn get(&self) -> f32 {
        **self
    }

    #[inline(always)]
    fn set(&mut self, value: f32, _: &StochasticRounding, _: usize) {
        **self = value;
    }
}

/// A bf16 and the 16 bits that make it exact.
impl Weight for (&mut bf16, &mut u16) {
    #[inline(always)]
    fn get(&self) -> f32 {
        join_master(self.0.to_bits(), *self.1)
    }

    #[inline(always)]
    fn set(&mut self, value: f32, _: &StochasticRounding, _: usize) {
        let (high, low) = split_master(value);
        *self.0 = bf16::from_bits(high);
        *self.1 = low;
    }
}

/// A bf16 without a master.
impl Weight for &mut bf16 {
    #[inline(always)]
    fn get(&self) -> f32 {
        self.load()
    }

    #[inline(always)]
    fn set(&mut self, value: f32, rounding: &StochasticRounding, offset: usize) {
        **self = bf16::from_bits(rounding.round(value, offset));
    }
}

/// Updates the parameters of a block.
#[inline(always)]
fn update<W: Weight, M: Moment>(step: &Step, weights: impl Iterator<Item = W>, arrays: Arrays<'_, M>) {
    let moments = arrays.moment1.iter_mut().zip(arrays.moment2);
    let parameters = weights.zip(arrays.gradients).zip(moments);
    for (i, ((mut weight, gradient), (moment1, moment2))) in parameters.enumerate() {
        let (mut first, mut second) = (moment1.load(), moment2.load());
        weight.set(step.apply(weight.get(), *gradient, &mut first, &mut second), &arrays.rounding, i);
        let random = arrays.rounding.of_moments(i);
        *moment1 = M::keep(first, random[0]);
        *moment2 = M::keep(second, random[1]);
    }
}

/// Updates f32 weights.
fn adamw<M: Moment>(step: Step, weights: &mut [f32], arrays: Arrays<'_, M>) {
    let len = weights.len();
    weights
        .par_chunks_mut(BLOCK)
        .zip(arrays.blocks(len))
        .for_each(|(weights, arrays)| vectorise!(update(&step, weights.iter_mut(), arrays)));
}

/// Updates split masters: bf16 weights and the 16 bits that make them exact.
fn adamw_split<M: Moment>(step: Step, weights: &mut [bf16], masters: &mut [u16], arrays: Arrays<'_, M>) {
    let len = weights.len();
    assert_eq!(masters.len(), len, "adamw of {len} weights");
    weights
        .par_chunks_mut(BLOCK)
        .zip(masters.par_chunks_mut(BLOCK))
        .zip(arrays.blocks(len))
        .for_each(|((weights, masters), arrays)| vectorise!(update(&step, weights.iter_mut().zip(masters), arrays)));
}

/// Updates f32 masters, and the f16 weights that are their roundings.
fn adamw_masters<M: Moment>(step: Step, weights: &mut [f16], masters: &mut [f32], arrays: Arrays<'_, M>) {
    assert_eq!(weights.len(), masters.len(), "adamw of {} weights", masters.len());
    adamw(step, masters, arrays);
    convert(masters, weights);
}

/// Updates bf16 weights without masters.
fn adamw_rounded<M: Moment>(step: Step, weights: &mut [bf16], arrays: Arrays<'_, M>) {
    let len = weights.len();
    weights
        .par_chunks_mut(BLOCK)
        .zip(arrays.blocks(len))
        .for_each(|(weights, arrays)| vectorise!(update(&step, weights.iter_mut(), arrays)));
}
