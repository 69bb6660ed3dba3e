//! The embedding of patches: a product with a patch's numbers, and learned positions, of which a patch has a weighted sum.

use arl_model::{Block, Role};

use super::inputs::ImageInputs;
use crate::backend::{Backend, Buffer};
use crate::blocks::Context;
use crate::blocks::linear::{Linear, packed};
use crate::placement::{Param, Placement};

/// Its parameters.
#[derive(Clone, Copy, Debug)]
pub(super) struct Embed {
    /// `[vision hidden, channels * frames * patch * patch]`.
    patches: Linear,
    /// `[side * side, vision hidden]`.
    positions: Option<Param>,
    /// Of a patch's row.
    width: usize,
}

impl Embed {
    pub(super) fn new(placement: &Placement, width: usize) -> Self {
        let block = Block::VisionEmbed;
        let span = |role| placement.span(block, role, role);
        Embed {
            patches: Linear {
                bias: span(Role::VisionPatchBias),
                ..Linear::new(placement.one(block, Role::VisionPatchWeight))
            },
            positions: span(Role::VisionPositions),
            width,
        }
    }

    /// The tower's stream `[N, vision hidden]` before its first block.
    pub(super) fn forward<B: Backend + ?Sized>(&self, cx: &mut Context<'_, B>, images: &ImageInputs, x: Buffer) {
        self.patches.forward(cx, images.pixels, x, x.slice(0, 0), images.patches);
        if let (Some(positions), Some((taps, weights))) = (self.positions, images.taps) {
            let table = cx.store.weight(positions);
            cx.backend.interpolate(table, taps, weights, self.width, x);
        }
    }

    /// From the stream's gradient to those of its parameters.
    pub(super) fn backward<B: Backend + ?Sized>(&self, cx: &mut Context<'_, B>, images: &ImageInputs, d_x: Buffer) {
        self.patches.backward_weight(cx, packed(d_x, images.patches), images.pixels, images.patches, true);
        let d_positions = self.positions.and_then(|positions| cx.store.gradient(positions));
        if let (Some(d_positions), Some((taps, weights))) = (d_positions, images.taps) {
            cx.backend.interpolate_backward(d_x, taps, weights, self.width, d_positions);
        }
    }
}
