//! A matrix product with a parameter: a layer's projection with its adapters, and its gradients.

use super::Context;
use super::low_rank::Adapters;
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

    /// `out[m, n] = x[m, k] weight[n, k]^T + bias`, and what adapters add.
    pub(crate) fn forward<B: Backend + ?Sized>(self, cx: &mut Context<'_, B>, x: Buffer, out: Buffer, m: usize) {
        let (n, k) = (out.len / m, x.len / m);
        cx.backend.matmul(&Matmul {
            layout: Layout::Nt,
            m,
            n,
            k,
            a: Rows { buffer: x, stride: k },
            b: Rows { buffer: cx.store.weight(self.weight), stride: k },
            c: Rows { buffer: out, stride: n },
            accumulate: false,
            bias: self.bias.map(|bias| cx.store.weight(bias)),
        });
        self.adapters.forward(cx, x, out, m);
    }

    /// From `d_out[m, n]` and the input `x[m, k]` the gradients of the weight, the bias and the adapters, added to where
    /// `accumulate` says so (the bias's always), and `d_x[m, k]`, assigned.
    pub(crate) fn backward<B: Backend + ?Sized>(
        self,
        cx: &mut Context<'_, B>,
        d_out: Rows,
        x: Buffer,
        d_x: Buffer,
        m: usize,
        accumulate: bool,
    ) {
        self.backward_weight(cx, d_out, x, m, accumulate);
        self.backward_input(cx, d_out, d_x, m, false);
        self.adapters.backward(cx, d_out, x, d_x, m, accumulate);
    }

    /// [`Linear::backward`] that adds to `d_x`.
    pub(crate) fn backward_added<B: Backend + ?Sized>(
        self,
        cx: &mut Context<'_, B>,
        d_out: Rows,
        x: Buffer,
        d_x: Buffer,
        m: usize,
        accumulate: bool,
    ) {
        self.backward_weight(cx, d_out, x, m, accumulate);
        self.backward_input(cx, d_out, d_x, m, true);
        self.adapters.backward(cx, d_out, x, d_x, m, accumulate);
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
        cx.backend.matmul(&Matmul {
            layout: Layout::Nn,
            m,
            n: k,
            k: self.weight.len / k,
            a: d_out,
            b: Rows { buffer: cx.store.weight(self.weight), stride: k },
            c: Rows { buffer: d_x, stride: k },
            accumulate,
            bias: None,
        });
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
