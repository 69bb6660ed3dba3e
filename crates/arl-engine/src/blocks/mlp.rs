//! The dense MLP: gate and up in one product, SwiGLU, and down. `W` is its inner width. Where ranks divide its columns, they are those of
//! this rank's, and `T` are the tokens that these ranks have together, of which the residual stream has this one's.

use arl_model::{Block, Projection, Role};

use super::context::{Context, Run, Take};
use super::linear::{Linear, packed};
use super::low_rank::Adapters;
use super::tensor_parallel::{all_tokens, gathered_len};
use crate::backend::{Backend, Buffer, DType};
use crate::options::Recompute;
use crate::placement::{Param, Placement};

/// Its parameters and sizes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mlp {
    hidden: usize,
    width: usize,
    /// Ranks that divide columns.
    ranks: usize,
    /// `[2 W, hidden]`: gate, then up.
    gate_up: Linear,
    /// `[hidden, W]`.
    down: Linear,
}

/// What it computes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Buffers {
    /// `[T, H]`: the normed input of all tokens, where ranks divide columns; else empty.
    input: Buffer,
    /// `[T, 2 W]`.
    gate_up: Buffer,
    /// `[T, W]`: after SwiGLU.
    act: Buffer,
    /// What the adapters of both products leave for the backward pass.
    low: [Buffer; 2],
}

impl Mlp {
    /// Of `width` columns, which `ranks` divide.
    pub(super) fn new(placement: &Placement, layer: usize, hidden: usize, width: usize, ranks: usize) -> Self {
        let (block, width) = (Block::Mlp(layer), width / ranks);
        let adapter = |projection, columns| (placement.adapter(block, projection), columns);
        Mlp {
            hidden,
            width,
            ranks,
            gate_up: Linear {
                adapters: Adapters::new(&[adapter(Projection::Gate, width), adapter(Projection::Up, width)]),
                ..Linear::new(placement.span(block, Role::Gate, Role::Up).unwrap_or_default())
            },
            down: Linear {
                adapters: Adapters::new(&[adapter(Projection::Down, hidden)]),
                ..Linear::new(placement.one(block, Role::Down))
            },
        }
    }

    /// Parameters whose gradients a step's first micro-batch assigns.
    pub(super) fn assigned(&self) -> Vec<Param> {
        self.gate_up.assigned().chain(self.down.assigned()).collect()
    }

    /// Those of `tokens` of this rank's.
    pub(super) fn buffers(&self, dtype: DType, tokens: usize, take: &mut Take<'_>) -> Buffers {
        let own = tokens;
        let tokens = self.ranks * own;
        Buffers {
            input: take(Recompute::Off, dtype, gathered_len(self.ranks, own * self.hidden)),
            gate_up: take(Recompute::Norms, dtype, tokens * 2 * self.width),
            act: take(Recompute::Off, dtype, tokens * self.width),
            low: [
                take(Recompute::Norms, dtype, tokens * self.gate_up.kept()),
                // The output of a layer's last block is never computed again.
                take(Recompute::Block, dtype, tokens * self.down.kept()),
            ],
        }
    }

    /// From the normed input to what SwiGLU gives.
    pub(super) fn compute<B: Backend + ?Sized>(&self, cx: &mut Context<'_, B>, at: &Buffers, input: Buffer, run: &Run) {
        let input = cx.gather_tokens(input, at.input);
        self.gate_up.forward(cx, input, at.gate_up, at.low[0], run.inputs.shared.tensor_tokens);
        cx.backend.swiglu(at.gate_up, self.width, at.act);
    }

    /// What the block adds to the residual stream, into `run.delta`.
    pub(super) fn output<B: Backend + ?Sized>(&self, cx: &mut Context<'_, B>, at: &Buffers, run: &Run) {
        self.down.forward_scattered(cx, at.act, run.delta, at.low[1], run.inputs.shared.tensor_tokens);
    }

    /// Whether its output's adapter leaves anything for the backward pass.
    pub(super) fn output_is_kept(&self) -> bool {
        self.down.kept() > 0
    }

    /// Computes again what was not kept: the same leaves on the same values.
    pub(super) fn recompute<B: Backend + ?Sized>(
        &self,
        cx: &mut Context<'_, B>,
        at: &Buffers,
        input: Buffer,
        run: &Run,
        level: Recompute,
    ) {
        match level {
            Recompute::Norms => {
                cx.gather_tokens(input, at.input);
                cx.backend.swiglu(at.gate_up, self.width, at.act);
            }
            _ => self.compute(cx, at, input, run),
        }
    }

    /// From `d_x`, the residual stream's gradient, to `d_input`, that of the normed input.
    pub(super) fn backward<B: Backend + ?Sized>(
        &self,
        cx: &mut Context<'_, B>,
        at: &Buffers,
        input: Buffer,
        run: &Run,
        d_x: Buffer,
        d_input: Buffer,
    ) {
        let t = run.inputs.shared.tensor_tokens;
        let top = cx.arena.mark();
        // [T, W]
        let d_act = cx.workspace(cx.dtype, t * self.width);
        self.down.backward_gathered(cx, d_x, at.act, at.low[1], d_act, t, !run.first);
        cx.backend.swiglu_backward(at.gate_up, self.width, d_act);
        let d_gate_up = packed(at.gate_up, t);
        let input = all_tokens(input, at.input);
        self.gate_up.backward_scattered(cx, d_gate_up, input, at.low[0], d_input, t, !run.first);
        cx.arena.release(top);
    }
}
