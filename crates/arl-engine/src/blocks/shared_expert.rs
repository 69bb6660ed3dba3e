//! The expert that every token of a mixture of experts meets: a gated MLP whose output is scaled by a gate of the token,
//! `σ(x . w_g) SwiGLU(x)`, and added to that of the chosen experts. `W` is its inner width.

use arl_model::{Block, Projection, Role};

use super::context::{Context, Run, Take};
use super::linear::{Linear, packed};
use super::low_rank::Adapters;
use crate::backend::{Backend, Buffer, DType};
use crate::options::Recompute;
use crate::placement::{Param, Placement};

/// Its parameters and sizes.
#[derive(Clone, Copy, Debug)]
pub(super) struct SharedExpert {
    hidden: usize,
    width: usize,
    /// `[2 W, hidden]`: gate, then up.
    gate_up: Linear,
    /// `[hidden, W]`.
    down: Linear,
    /// `[1, hidden]`.
    gate: Linear,
}

/// What it computes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Buffers {
    /// f32 `[T]`: the gate before the logistic function.
    logits: Buffer,
    /// `[T, 2 W]`.
    gate_up: Buffer,
    /// `[T, W]`: after SwiGLU.
    act: Buffer,
    /// `[T, H]`: before the gate.
    out: Buffer,
    /// What the adapters of the three products leave for the backward pass.
    low: [Buffer; 3],
}

impl SharedExpert {
    pub(super) fn new(placement: &Placement, block: Block, hidden: usize, width: usize) -> Self {
        let adapter = |projection, columns| (placement.adapter(block, projection), columns);
        let linear = |first, last, adapters: &[_]| Linear {
            adapters: Adapters::new(adapters),
            ..Linear::new(placement.span(block, first, last).unwrap_or_default())
        };
        let one = |role, projection, columns| linear(role, role, &[adapter(projection, columns)]);
        let halves = [adapter(Projection::SharedGate, width), adapter(Projection::SharedUp, width)];
        SharedExpert {
            hidden,
            width,
            gate_up: linear(Role::SharedGate, Role::SharedUp, &halves),
            down: one(Role::SharedDown, Projection::SharedDown, hidden),
            gate: one(Role::SharedExpertGate, Projection::SharedExpertGate, 1),
        }
    }

    /// Parameters whose gradients a step's first micro-batch assigns.
    pub(super) fn assigned(&self) -> impl Iterator<Item = Param> + use<> {
        self.gate_up.assigned().chain(self.down.assigned()).chain(self.gate.assigned())
    }

    pub(super) fn buffers(&self, dtype: DType, tokens: usize, take: &mut Take<'_>) -> Buffers {
        use Recompute::{Norms, Off};
        Buffers {
            logits: take(Norms, DType::F32, tokens),
            gate_up: take(Norms, dtype, tokens * 2 * self.width),
            act: take(Off, dtype, tokens * self.width),
            out: take(Norms, dtype, tokens * self.hidden),
            low: [&self.gate_up, &self.down, &self.gate].map(|linear| take(Norms, dtype, tokens * linear.kept())),
        }
    }

    /// From the normed input `[T, H]` to what the gate is applied to.
    pub(super) fn compute<B: Backend + ?Sized>(&self, cx: &mut Context<'_, B>, at: &Buffers, input: Buffer, run: &Run) {
        let t = run.size().tokens;
        self.gate_up.forward(cx, input, at.gate_up, at.low[0], t);
        self.activate(cx, at);
        self.down.forward(cx, at.act, at.out, at.low[1], t);
        self.gate.forward(cx, input, at.logits, at.low[2], t);
    }

    /// SwiGLU alone.
    pub(super) fn activate<B: Backend + ?Sized>(&self, cx: &mut Context<'_, B>, at: &Buffers) {
        cx.backend.swiglu(at.gate_up, self.width, at.act);
    }

    /// Adds to what the chosen experts add to the residual stream.
    pub(super) fn output<B: Backend + ?Sized>(&self, cx: &mut Context<'_, B>, at: &Buffers, run: &Run) {
        cx.backend.add_gated_rows(at.out, at.logits, self.hidden, run.delta);
    }

    /// From `d_x`, the residual stream's gradient; adds to `d_input`, that of the normed input.
    pub(super) fn backward<B: Backend + ?Sized>(
        &self,
        cx: &mut Context<'_, B>,
        at: &Buffers,
        input: Buffer,
        run: &Run,
        d_x: Buffer,
        d_input: Buffer,
    ) {
        let (t, accumulate) = (run.size().tokens, !run.first);
        let top = cx.arena.mark();
        // [T, H], [T, W]
        let d_out = cx.workspace(cx.dtype, t * self.hidden);
        let d_act = cx.workspace(cx.dtype, t * self.width);
        cx.backend.gated_rows_backward(d_x, at.out, at.logits, self.hidden, d_out);
        self.down.backward(cx, packed(d_out, t), at.act, at.low[1], d_act, t, accumulate);
        cx.backend.swiglu_backward(at.gate_up, self.width, d_act);
        for (linear, d, low) in [(self.gate_up, at.gate_up, at.low[0]), (self.gate, at.logits, at.low[2])] {
            linear.backward_added(cx, packed(d, t), input, low, d_input, t, accumulate);
        }
        cx.arena.release(top);
    }
}
