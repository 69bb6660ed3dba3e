//! A norm of the tower: LayerNorm where it has a bias, else RMSNorm.

use arl_model::{Block, Role};

use crate::backend::{Backend, Buffer, LayerNorm};
use crate::blocks::Context;
use crate::placement::{Param, Placement};

/// Its parameters.
#[derive(Clone, Copy, Debug)]
pub(super) struct Norm {
    /// `[width]` each.
    weight: Param,
    bias: Option<Param>,
    epsilon: f32,
}

impl Norm {
    pub(super) fn new(placement: &Placement, block: Block, weight: Role, bias: Role, epsilon: f32) -> Self {
        Norm { weight: placement.one(block, weight), bias: placement.span(block, bias, bias), epsilon }
    }

    /// f32 elements that the forward pass leaves of rows of `elements` together.
    pub(super) fn statistics(&self, elements: usize) -> usize {
        elements / self.weight.len.max(1) * if self.bias.is_some() { 2 } else { 1 }
    }

    /// Norms rows of `x`; `statistics` are left for the backward pass.
    pub(super) fn forward<B: Backend + ?Sized>(
        &self,
        cx: &mut Context<'_, B>,
        x: Buffer,
        out: Buffer,
        statistics: Buffer,
    ) {
        match self.layer_norm(cx, x, out, statistics) {
            Some(op) => cx.backend.layer_norm(&op),
            None => {
                let weight = cx.store.weight(self.weight).into();
                cx.backend.rms_norm(x, weight, self.epsilon, out, statistics);
            }
        }
    }

    /// From the gradient of what [`Norm::forward`] gave to those of its parameters; that of `x` is added to `d_x`.
    pub(super) fn backward<B: Backend + ?Sized>(
        &self,
        cx: &mut Context<'_, B>,
        x: Buffer,
        statistics: Buffer,
        d_out: Buffer,
        d_x: Buffer,
    ) {
        let top = cx.arena.mark();
        let d_weight = cx.norm_gradient(self.weight);
        match (self.layer_norm(cx, x, d_out, statistics), self.bias) {
            (Some(op), Some(bias)) => {
                let d_bias = cx.norm_gradient(bias);
                cx.backend.layer_norm_backward(&op, d_out, d_x, d_weight, d_bias);
            }
            _ => {
                let weight = cx.store.weight(self.weight).into();
                cx.backend.rms_norm_backward(d_out, x, weight, statistics, d_x, d_weight);
            }
        }
        cx.arena.release(top);
    }

    fn layer_norm<B: Backend + ?Sized>(
        &self,
        cx: &Context<'_, B>,
        x: Buffer,
        out: Buffer,
        statistics: Buffer,
    ) -> Option<LayerNorm> {
        Some(LayerNorm {
            x,
            weight: cx.store.weight(self.weight),
            bias: cx.store.weight(self.bias?),
            width: self.weight.len,
            epsilon: self.epsilon,
            out,
            statistics,
        })
    }
}
