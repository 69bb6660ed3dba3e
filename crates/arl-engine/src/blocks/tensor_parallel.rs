//! Tensor parallelism of the products of a block. Of `R` ranks along [`Axis::Tensor`] each has some of the heads or columns of a
//! layer, and between the products its own slice of their `T` tokens. A layer whose rows they divide takes the tokens of all,
//! gathered; one whose columns they divide gives each rank a partial sum for every token, and these are added and scattered. The
//! backward pass mirrors that. One rank computes with what it has: the leaves, the memory and the bits of no parallelism.

use super::context::Context;
use super::linear::{Linear, packed};
use crate::backend::{Backend, Buffer, DType, Rows};
use crate::mesh::Axis;

/// Elements of a block's input, `own` of which are of this rank's tokens, that one of so many ranks gathers: none where it is
/// alone.
pub(super) fn gathered_len(ranks: usize, own: usize) -> usize {
    if ranks == 1 { 0 } else { ranks * own }
}

/// The tokens of all ranks that were gathered into `all`, or this rank's `own` where it is alone.
pub(super) fn all_tokens(own: Buffer, all: Buffer) -> Buffer {
    if all.len == 0 { own } else { all }
}

impl<B: Backend + ?Sized> Context<'_, B> {
    /// Gathers the tokens of all ranks, of which `own` are this one's, into `all`, of [`gathered_len`]; gives [`all_tokens`].
    pub(super) fn gather_tokens(&mut self, own: Buffer, all: Buffer) -> Buffer {
        if all.len > 0 {
            self.all_gather(Axis::Tensor, own, all);
        }
        all_tokens(own, all)
    }

    /// `out`, of this rank's tokens, becomes the sum over ranks of their partial sums, rounded once; `partial`, f32, has this rank's
    /// for all tokens.
    fn sum_tokens(&mut self, partial: Buffer, out: Buffer) {
        if out.dtype == DType::F32 {
            return self.sum_scattered(Axis::Tensor, partial, out);
        }
        let top = self.arena.mark();
        let sum = self.workspace(DType::F32, out.len);
        self.sum_scattered(Axis::Tensor, partial, sum);
        self.backend.copy(sum, out);
        self.arena.release(top);
    }
}

impl Linear {
    /// [`Linear::forward`] of a layer whose columns ranks divide: `x[m, k]` are this rank's columns of all tokens, and `out` are its own
    /// tokens, `m` only where it is alone.
    pub(super) fn forward_scattered<B: Backend + ?Sized>(
        self,
        cx: &mut Context<'_, B>,
        x: Buffer,
        out: Buffer,
        low: Buffer,
        m: usize,
    ) {
        let (ranks, rank) = cx.along(Axis::Tensor);
        if ranks == 1 {
            return self.forward(cx, x, out, low, m);
        }
        let top = cx.arena.mark();
        let partial = cx.workspace(DType::F32, ranks * out.len);
        // Once in the sum: every rank has all of the bias.
        let bias = self.bias.filter(|_| rank == 0).map(|bias| cx.store.weight(bias));
        // A has this rank's columns: what its adapter adds is partial as well.
        self.adapters.forward(cx, &self, x, bias, partial, low, m);
        cx.sum_tokens(partial, out);
        self.rescale(cx, out, m / ranks);
        cx.arena.release(top);
    }

    /// [`Linear::backward`] of a layer whose columns ranks divide: `d_out` is of this rank's tokens, `x` and `d_x` are its columns of
    /// all `m` tokens.
    #[allow(clippy::too_many_arguments, reason = "as there")]
    pub(super) fn backward_gathered<B: Backend + ?Sized>(
        self,
        cx: &mut Context<'_, B>,
        d_out: Buffer,
        x: Buffer,
        low: Buffer,
        d_x: Buffer,
        m: usize,
        accumulate: bool,
    ) {
        let (ranks, _) = cx.along(Axis::Tensor);
        let top = cx.arena.mark();
        let all = cx.workspace(d_out.dtype, gathered_len(ranks, d_out.len));
        let all = cx.gather_tokens(d_out, all);
        // The bias's gradient is a sum over all tokens, to which each rank adds its own.
        let bias = self.bias.filter(|_| ranks > 1);
        if let Some(d_bias) = bias.and_then(|bias| cx.store.gradient(bias)) {
            let own = m / ranks;
            cx.backend.sum_rows(packed(d_out, own), own, d_bias.len, d_bias);
        }
        let product = Linear { bias: self.bias.filter(|_| ranks == 1), ..self };
        product.backward(cx, packed(all, m), x, low, d_x, m, accumulate);
        cx.arena.release(top);
    }

    /// [`Linear::backward`] of a layer whose rows ranks divide: `d_out` are this rank's columns of all `m` tokens, `x` is of all
    /// tokens, and `d_x` of its own.
    #[allow(clippy::too_many_arguments, reason = "as there")]
    pub(super) fn backward_scattered<B: Backend + ?Sized>(
        self,
        cx: &mut Context<'_, B>,
        d_out: Rows,
        x: Buffer,
        low: Buffer,
        d_x: Buffer,
        m: usize,
        accumulate: bool,
    ) {
        let (ranks, _) = cx.along(Axis::Tensor);
        if ranks == 1 || d_x.len == 0 {
            return self.backward(cx, d_out, x, low, d_x, m, accumulate);
        }
        let top = cx.arena.mark();
        let partial = cx.workspace(DType::F32, ranks * d_x.len);
        self.backward(cx, d_out, x, low, partial, m, accumulate);
        cx.sum_tokens(partial, d_x);
        cx.arena.release(top);
    }
}
