//! A merger: rows of the patches of a merge block, side by side, through a norm and two layers with GELU between, give a row of
//! the decoder. `M` merge blocks, `W` the width of one: all its patches' rows.

use arl_model::{Block, Role};

use super::norm::Norm;
use crate::backend::{Backend, Buffer, DType, Gelu};
use crate::blocks::linear::{Linear, packed};
use crate::blocks::{Context, Take};
use crate::options::Recompute;
use crate::placement::Placement;

/// Its parameters and sizes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Merger {
    /// Of patches, or of merge blocks: its own width decides.
    norm: Norm,
    /// `[W, W]`.
    fc1: Linear,
    /// `[hidden, W]`.
    fc2: Linear,
    width: usize,
}

/// What it computes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Buffers {
    /// `[M, W]`.
    normed: Buffer,
    statistics: Buffer,
    /// `[M, W]`: before GELU.
    inner: Buffer,
    /// `[M, W]`: after it.
    act: Buffer,
}

impl Merger {
    pub(super) fn new(placement: &Placement, block: Block, width: usize, epsilon: f32) -> Self {
        let linear = |weight, bias| Linear {
            bias: placement.span(block, bias, bias),
            ..Linear::new(placement.one(block, weight))
        };
        Merger {
            norm: Norm::new(placement, block, Role::VisionMergerNormWeight, Role::VisionMergerNormBias, epsilon),
            fc1: linear(Role::VisionMergerFc1Weight, Role::VisionMergerFc1Bias),
            fc2: linear(Role::VisionMergerFc2Weight, Role::VisionMergerFc2Bias),
            width,
        }
    }

    pub(super) fn buffers(&self, dtype: DType, rows: usize, take: &mut Take<'_>) -> Buffers {
        let elements = rows * self.width;
        Buffers {
            normed: take(Recompute::Off, dtype, elements),
            statistics: take(Recompute::Off, DType::F32, self.norm.statistics(elements)),
            inner: take(Recompute::Norms, dtype, elements),
            act: take(Recompute::Off, dtype, elements),
        }
    }

    /// From the tower's stream `x` `[N, vision hidden]` to `out` `[M, hidden]`.
    pub(super) fn forward<B: Backend + ?Sized>(
        &self,
        cx: &mut Context<'_, B>,
        at: &Buffers,
        x: Buffer,
        out: Buffer,
        rows: usize,
    ) {
        self.compute(cx, at, x, rows);
        self.fc2.forward(cx, at.act, out, at.act.slice(0, 0), rows);
    }

    fn compute<B: Backend + ?Sized>(&self, cx: &mut Context<'_, B>, at: &Buffers, x: Buffer, rows: usize) {
        self.norm.forward(cx, x, at.normed, at.statistics);
        self.fc1.forward(cx, at.normed, at.inner, at.act.slice(0, 0), rows);
        cx.backend.gelu(Gelu::Erf, at.inner, at.act);
    }

    /// Computes again what was not kept: the same leaves on the same values.
    pub(super) fn recompute<B: Backend + ?Sized>(
        &self,
        cx: &mut Context<'_, B>,
        at: &Buffers,
        x: Buffer,
        rows: usize,
        level: Recompute,
    ) {
        match level {
            Recompute::Off => {}
            Recompute::Norms => {
                self.norm.forward(cx, x, at.normed, at.statistics);
                cx.backend.gelu(Gelu::Erf, at.inner, at.act);
            }
            Recompute::Mlp | Recompute::Block => self.compute(cx, at, x, rows),
        }
    }

    /// From `d_out` `[M, hidden]` to the gradients of its parameters; that of the stream `x` is added to `d_x`, if there is one.
    pub(super) fn backward<B: Backend + ?Sized>(
        &self,
        cx: &mut Context<'_, B>,
        at: &Buffers,
        x: Buffer,
        d_out: Buffer,
        d_x: Option<Buffer>,
        rows: usize,
    ) {
        let top = cx.arena.mark();
        let none = at.act.slice(0, 0);
        // [M, W] both
        let d_act = cx.workspace(cx.dtype, rows * self.width);
        let d_normed = cx.workspace(cx.dtype, rows * self.width);
        self.fc2.backward(cx, packed(d_out, rows), at.act, none, d_act, rows, true);
        cx.backend.gelu_backward(Gelu::Erf, at.inner, d_act);
        self.fc1.backward(cx, packed(d_act, rows), at.normed, none, d_normed, rows, true);
        let d_x = d_x.unwrap_or_else(|| {
            // Nobody reads it: the norm's own gradients are what is wanted.
            let unread = cx.workspace(cx.dtype, x.len);
            cx.backend.zero(unread);
            unread
        });
        self.norm.backward(cx, x, at.statistics, d_normed, d_x);
        cx.arena.release(top);
    }
}
