//! A matrix product with a parameter: a layer's projection with its adapters, and its gradients.

use super::Context;
use super::low_rank::Adapters;
use super::magnitude::Product;
use crate::backend::{Backend, Buffer, Layout, Matmul, Rows};
use crate::placement::Param;

/// `out = x weight^T + bias`, and what adapters add.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Linear {
    /// `[n, k]`.
    pub(crate) weight: Param,
    /// `[n]`.
    pub(crate) bias: Option<Param>,
    pub(crate) adapters: Adapters,
}

impl Linear {
    /// Without a bias.
    pub(crate) fn new(weight: Param) -> Self {
        Linear { weight, bias: None, adapters: Adapters::default() }
    }

    /// Parameters whose gradients a step's first micro-batch assigns.
    pub(crate) fn assigned(self) -> impl Iterator<Item = Param> {
        std::iter::once(self.weight).chain(self.adapters.params())
    }

    /// Elements a token that the forward pass leaves for the backward pass.
    pub(crate) fn kept(&self) -> usize {
        self.adapters.rank()
    }

    /// `out[m, n] = x[m, k] weight[n, k]^T + bias`, and what adapters add. `low`, of [`Linear::kept`] elements a row, is left
    /// for the backward pass.
    pub(crate) fn forward<B: Backend + ?Sized>(
        self,
        cx: &mut Context<'_, B>,
        x: Buffer,
        out: Buffer,
        low: Buffer,
        m: usize,
    ) {
        let bias = self.bias.map(|bias| cx.store.weight(bias));
        self.adapters.forward(cx, &self, x, bias, out, low, m);
        self.rescale(cx, out, m);
    }

    /// Scales `out[m, n]`, which is complete otherwise, by the magnitudes of the adapters that have some.
    pub(super) fn rescale<B: Backend + ?Sized>(self, cx: &mut Context<'_, B>, out: Buffer, m: usize) {
        if self.adapters.has_magnitudes() {
            let bias = self.bias.map(|bias| cx.store.weight(bias));
            self.adapters.scale(cx, self.weight, bias, Product { rows: packed(out, m), m });
        }
    }

    /// `out[m, n] = x[m, k] weight[n, k]^T + bias`.
    pub(super) fn multiply<B: Backend + ?Sized>(
        self,
        cx: &mut Context<'_, B>,
        x: Buffer,
        bias: Option<Buffer>,
        out: Buffer,
        m: usize,
    ) {
        let size = [m, out.len / m, x.len / m];
        cx.multiply(Layout::Nt, size, packed(x, m), self.weight, packed(out, m), false, bias);
    }

    /// From `d_out[m, n]`, the input `x[m, k]` and what the forward pass left the gradients of the weight, the bias and the
    /// adapters, added to where `accumulate` says so (the bias's always), and `d_x[m, k]`, assigned; empty: not wanted.
    #[allow(clippy::too_many_arguments, reason = "what a layer has, and what the forward pass left")]
    pub(crate) fn backward<B: Backend + ?Sized>(
        self,
        cx: &mut Context<'_, B>,
        d_out: Rows,
        x: Buffer,
        low: Buffer,
        d_x: Buffer,
        m: usize,
        accumulate: bool,
    ) {
        self.backward_weight(cx, d_out, x, m, accumulate);
        let top = cx.arena.mark();
        let d_out = if self.adapters.has_magnitudes() { self.unscaled(cx, d_out, x, low, m) } else { d_out };
        self.adapters.backward(cx, Some((&self, false)), d_out, x, low, d_x, m, accumulate);
        cx.arena.release(top);
    }

    /// The gradient of what magnitudes scale, in workspace, from that of what they made of it; theirs are added to. What they scale
    /// is computed again, as it is kept nowhere.
    fn unscaled<B: Backend + ?Sized>(
        self,
        cx: &mut Context<'_, B>,
        d_out: Rows,
        x: Buffer,
        low: Buffer,
        m: usize,
    ) -> Rows {
        let product = cx.workspace(cx.dtype, m * d_out.stride);
        self.multiply(cx, x, None, product, m);
        self.adapters.add(cx, low, product, m);
        self.adapters.scale_backward(cx, self.weight, d_out, Product { rows: packed(product, m), m });
        packed(product, m)
    }

    /// [`Linear::backward`] that adds to `d_x`.
    #[allow(clippy::too_many_arguments, reason = "as there")]
    pub(crate) fn backward_added<B: Backend + ?Sized>(
        self,
        cx: &mut Context<'_, B>,
        d_out: Rows,
        x: Buffer,
        low: Buffer,
        d_x: Buffer,
        m: usize,
        accumulate: bool,
    ) {
        self.backward_weight(cx, d_out, x, m, accumulate);
        let top = cx.arena.mark();
        let d_out = if self.adapters.has_magnitudes() { self.unscaled(cx, d_out, x, low, m) } else { d_out };
        self.adapters.backward(cx, Some((&self, true)), d_out, x, low, d_x, m, accumulate);
        cx.arena.release(top);
    }

    /// `d_x[m, k] = d_out[m, n] weight[n, k]`, or added to it; without adapters.
    pub(crate) fn backward_input<B: Backend + ?Sized>(
        self,
        cx: &mut Context<'_, B>,
        d_out: Rows,
        d_x: Buffer,
        m: usize,
        accumulate: bool,
    ) {
        let k = d_x.len / m;
        let size = [m, k, self.weight.len / k];
        cx.multiply(Layout::Nn, size, d_out, self.weight, packed(d_x, m), accumulate, None);
    }

    /// `d_weight[n, k] = d_out[m, n]^T x[m, k]`, or added to it; the bias's gradient is added to. Nothing for what is frozen, and
    /// none of adapters.
    pub(crate) fn backward_weight<B: Backend + ?Sized>(
        self,
        cx: &mut Context<'_, B>,
        d_out: Rows,
        x: Buffer,
        m: usize,
        accumulate: bool,
    ) {
        let k = x.len / m;
        let n = self.weight.len / k;
        if let Some(d_weight) = cx.store.gradient(self.weight) {
            cx.backend.matmul(&Matmul {
                layout: Layout::Tn,
                m: n,
                n: k,
                k: m,
                a: d_out,
                b: Rows { buffer: x, stride: k },
                c: Rows { buffer: d_weight, stride: k },
                accumulate,
                bias: None,
            });
        }
        if let Some(d_bias) = self.bias.and_then(|bias| cx.store.gradient(bias)) {
            cx.backend.sum_rows(d_out, m, n, d_bias);
        }
    }
}

/// Rows without gaps: `m` of them.
pub(crate) fn packed(buffer: Buffer, m: usize) -> Rows {
    Rows { buffer, stride: buffer.len / m }
}
