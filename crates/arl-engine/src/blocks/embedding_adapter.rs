//! The adapter of the look-up of tokens: `out[t] += factor B A[ids[t]]`, with A as rows of tokens.

use super::Context;
use crate::backend::{Backend, Buffer, DType, Layout, Matmul, Rows};
use crate::placement::AdapterPlace;

/// Its places.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EmbeddingAdapter(pub(crate) AdapterPlace);

impl EmbeddingAdapter {
    /// Adds to `out[T, H]` what it makes of `ids[T]`.
    pub(crate) fn forward<B: Backend + ?Sized>(self, cx: &mut Context<'_, B>, ids: Buffer, out: Buffer) {
        let top = cx.arena.mark();
        let (t, rank) = (ids.len, self.0.rank);
        let low = self.low(cx, ids);
        let b = Rows { buffer: cx.store.weight(self.0.b), stride: rank };
        let c = Rows { buffer: out, stride: out.len / t };
        matmul(cx, Layout::Nt, [t, out.len / t, rank], Rows { buffer: low, stride: rank }, b, c, true);
        cx.arena.release(top);
    }

    /// Adds the gradients of A and B, from `d_out[T, H]`. The row of A of the token `padding` gets none, as in torch.
    pub(crate) fn backward<B: Backend + ?Sized>(
        self,
        cx: &mut Context<'_, B>,
        ids: Buffer,
        d_out: Buffer,
        padding: Option<usize>,
    ) {
        let AdapterPlace { a, b, rank, factor, .. } = self.0;
        let (Some(d_a), Some(d_b)) = (cx.store.gradient(a), cx.store.gradient(b)) else { return };
        let top = cx.arena.mark();
        let (t, h) = (ids.len, d_out.len / ids.len);
        let d_out = Rows { buffer: d_out, stride: h };
        let low = Rows { buffer: self.low(cx, ids), stride: rank };
        matmul(cx, Layout::Tn, [h, rank, t], d_out, low, Rows { buffer: d_b, stride: rank }, true);
        let d_product = cx.workspace(cx.dtype, t * rank);
        let weight = Rows { buffer: cx.store.weight(b), stride: rank };
        matmul(cx, Layout::Nn, [t, rank, h], d_out, weight, Rows { buffer: d_product, stride: rank }, false);
        let d_low = cx.workspace(cx.dtype, t * rank);
        cx.backend.scale(d_product, factor, None, d_low);
        let kept = padding.map(|row| (d_a.slice(row * rank, rank), cx.workspace(DType::F32, rank)));
        kept.iter().for_each(|(row, kept)| cx.backend.copy(*row, *kept));
        cx.backend.embedding_backward(ids, d_low, rank, d_a);
        kept.iter().for_each(|(row, kept)| cx.backend.copy(*kept, *row));
        cx.arena.release(top);
    }

    /// `factor A[ids]`, `[T, rank]`, in workspace.
    fn low<B: Backend + ?Sized>(self, cx: &mut Context<'_, B>, ids: Buffer) -> Buffer {
        let AdapterPlace { a, rank, factor, .. } = self.0;
        let (rows, low) = (cx.workspace(cx.dtype, ids.len * rank), cx.workspace(cx.dtype, ids.len * rank));
        let table = cx.store.weight(a);
        cx.backend.embedding(ids, table, rank, rows);
        cx.backend.scale(rows, factor, None, low);
        low
    }
}

fn matmul<B: Backend + ?Sized>(
    cx: &mut Context<'_, B>,
    layout: Layout,
    [m, n, k]: [usize; 3],
    a: Rows,
    b: Rows,
    c: Rows,
    accumulate: bool,
) {
    cx.backend.matmul(&Matmul { layout, m, n, k, a, b, c, accumulate, bias: None });
}
