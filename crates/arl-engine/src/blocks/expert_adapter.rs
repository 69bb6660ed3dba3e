//! The adapters of experts: each expert has an A and a B of its own for its gate and up together, and for its down. The rows of
//! the token side are sorted by expert, as for the experts' products.

use super::Context;
use crate::backend::{Backend, Buffer, GroupedMatmul, Layout, Rows};
use crate::placement::AdapterPlace;

/// Rows sorted by expert.
#[derive(Clone, Copy)]
pub(super) struct Sorted {
    pub(super) experts: usize,
    /// i32 `[experts + 1]`.
    pub(super) offsets: Buffer,
    pub(super) rows: usize,
    /// Most of them: what rows need is taken for so many, as a plan does not know how many come.
    pub(super) room: usize,
}

impl Sorted {
    /// Workspace for the rows that there are, each of so many elements.
    fn workspace<B: Backend + ?Sized>(self, cx: &mut Context<'_, B>, width: usize) -> Buffer {
        cx.workspace(cx.dtype, self.room * width).slice(0, self.rows * width)
    }
}

/// The adapters of one product: `out[rows e] += factor x[rows e] A_e^T B_e^T`.
#[derive(Clone, Copy, Debug)]
pub(super) struct ExpertAdapter(pub(super) AdapterPlace);

impl ExpertAdapter {
    /// Adds to `out[rows, n]` what the adapters make of `x[rows, k]`.
    pub(super) fn forward<B: Backend + ?Sized>(self, cx: &mut Context<'_, B>, sorted: Sorted, x: Buffer, out: Buffer) {
        let top = cx.arena.mark();
        let low = self.project(cx, sorted, x);
        let n = out.len / sorted.rows;
        let added = sorted.workspace(cx, n);
        let b = cx.store.weight(self.0.b);
        product(cx, sorted, Layout::Nt, low, (b, self.0.rank), (added, n));
        cx.backend.add(out, added);
        cx.arena.release(top);
    }

    /// From `d_out[rows, n]` and the input `x[rows, k]` the gradients of A and B, which are added to, as is `d_x[rows, k]`.
    pub(super) fn backward<B: Backend + ?Sized>(
        self,
        cx: &mut Context<'_, B>,
        sorted: Sorted,
        d_out: Buffer,
        x: Buffer,
        d_x: Buffer,
    ) {
        let AdapterPlace { a, b, rank, factor, .. } = self.0;
        let (n, k) = (d_out.len / sorted.rows, x.len / sorted.rows);
        let top = cx.arena.mark();
        let low = self.project(cx, sorted, x);
        if let Some(d_b) = cx.store.gradient(b) {
            product(cx, sorted, Layout::Tn, (d_out, n), low, (d_b, rank));
        }
        let d_product = sorted.workspace(cx, rank);
        let weight = cx.store.weight(b);
        product(cx, sorted, Layout::Nn, (d_out, n), (weight, rank), (d_product, rank));
        let d_low = sorted.workspace(cx, rank);
        cx.backend.scale(d_product, factor, None, d_low);
        if let Some(d_a) = cx.store.gradient(a) {
            product(cx, sorted, Layout::Tn, (d_low, rank), (x, k), (d_a, k));
        }
        let added = sorted.workspace(cx, k);
        let weight = cx.store.weight(a);
        product(cx, sorted, Layout::Nn, (d_low, rank), (weight, k), (added, k));
        cx.backend.add(d_x, added);
        cx.arena.release(top);
    }

    /// `factor x A^T`, `[rows, rank]`.
    fn project<B: Backend + ?Sized>(self, cx: &mut Context<'_, B>, sorted: Sorted, x: Buffer) -> (Buffer, usize) {
        let AdapterPlace { a, rank, factor, .. } = self.0;
        let [low, scaled] = [(); 2].map(|()| sorted.workspace(cx, rank));
        let (k, weight) = (x.len / sorted.rows, cx.store.weight(a));
        product(cx, sorted, Layout::Nt, (x, k), (weight, k), (low, rank));
        cx.backend.scale(low, factor, None, scaled);
        (scaled, rank)
    }
}

/// A product over the rows of each expert; operands with the lengths of their rows.
pub(super) fn product<B: Backend + ?Sized>(
    cx: &mut Context<'_, B>,
    sorted: Sorted,
    layout: Layout,
    a: (Buffer, usize),
    b: (Buffer, usize),
    c: (Buffer, usize),
) {
    let rows = |(buffer, stride): (Buffer, usize)| Rows { buffer, stride };
    cx.backend.grouped_matmul(&GroupedMatmul {
        layout,
        experts: sorted.experts,
        offsets: sorted.offsets,
        rows: sorted.rows,
        n: c.1,
        k: a.1,
        a: rows(a),
        b: rows(b),
        c: rows(c),
    });
}
