//! Magnitudes of a matrix product's weights (DoRA; Liu et al., 2024): `y = m / n (W x + factor B A x) + b` with `n` the norms of the
//! rows of `W + factor B A`, which the backward pass takes for constants. Layers without magnitudes stay as they are.

use super::Context;
use super::low_rank::Adapters;
use crate::backend::{Backend, Buffer, DType, Magnitude, Rows};
use crate::mesh::Axis;
use crate::placement::{AdapterPlace, Param};

/// Elements of weights in NF4 that are decoded at a time for their norms.
const DECODED: usize = 4 << 20;

/// What a linear layer computed, before or behind its magnitudes.
#[derive(Clone, Copy)]
pub(super) struct Product {
    /// `[m, n]`.
    pub(super) rows: Rows,
    pub(super) m: usize,
}

/// A layer's part of a product.
struct Part {
    place: AdapterPlace,
    magnitude: Param,
    first: usize,
    columns: usize,
}

impl Adapters {
    /// Whether some layer of the product has magnitudes.
    pub(super) fn has_magnitudes(&self) -> bool {
        !self.with_magnitudes().is_empty()
    }

    fn with_magnitudes(&self) -> Vec<Part> {
        let part = |(place, first, columns): (AdapterPlace, usize, usize)| {
            Some(Part { place, magnitude: place.magnitude?, first, columns })
        };
        self.places().filter_map(part).collect()
    }

    /// Scales columns of `out` in place: of what the weights `[n, k]` and the adapters made, and the bias.
    pub(super) fn scale<B: Backend + ?Sized>(
        &self,
        cx: &mut Context<'_, B>,
        weight: Param,
        bias: Option<Buffer>,
        out: Product,
    ) {
        for part in self.with_magnitudes() {
            let top = cx.arena.mark();
            let norms = part.norms(cx, weight, out.rows.stride);
            part.rescale(cx, norms, bias, out);
            cx.arena.release(top);
        }
    }

    /// Adds the gradients of the magnitudes, from `d_out` and `product`, which is `W x + factor B A x`; and makes of `d_out` the
    /// gradient of the latter, in place of `product`.
    pub(super) fn scale_backward<B: Backend + ?Sized>(
        &self,
        cx: &mut Context<'_, B>,
        weight: Param,
        d_out: Rows,
        product: Product,
    ) {
        let parts = self.with_magnitudes();
        let top = cx.arena.mark();
        let norms: Vec<Buffer> = parts.iter().map(|part| part.norms(cx, weight, d_out.stride)).collect();
        for (part, norms) in parts.iter().zip(&norms) {
            if let Some(out) = cx.store.gradient(part.magnitude) {
                let (d_out, x) = (part.of(d_out), part.of(product.rows));
                cx.backend.magnitude(&Magnitude::Gradient { d_out, x, rows: product.m, norms: *norms, out });
            }
        }
        cx.backend.copy(d_out.buffer, product.rows.buffer);
        for (part, norms) in parts.iter().zip(norms) {
            part.rescale(cx, norms, None, product);
        }
        cx.arena.release(top);
    }
}

impl Part {
    /// Its columns.
    fn of(&self, rows: Rows) -> Rows {
        Rows { buffer: rows.buffer.slice(self.first, rows.buffer.len - self.first), stride: rows.stride }
    }

    /// f32 `[columns]`, in workspace; `weight` is that of all `n` columns. Weights in NF4 are taken some rows at a time. Of a layer
    /// whose own columns ranks divide, whole rows' norms are those of the norms of what each has of them.
    fn norms<B: Backend + ?Sized>(&self, cx: &mut Context<'_, B>, weight: Param, n: usize) -> Buffer {
        let out = cx.workspace(DType::F32, self.columns);
        let k = weight.len / n;
        let AdapterPlace { a, b, rank, factor, .. } = self.place;
        let (a, b) = (cx.store.weight(a), cx.store.weight(b));
        let most = if weight.quantized { (DECODED / k).max(1) } else { self.columns };
        for first in (0..self.columns).step_by(most) {
            let rows = most.min(self.columns - first);
            let top = cx.arena.mark();
            let weight = cx.weights(weight, (self.first + first) * k, rows * k);
            let (b, out) = (b.slice(first * rank, rows * rank), out.slice(first, rows));
            cx.backend.magnitude(&Magnitude::Norms { weight, a, b, factor, out });
            cx.arena.release(top);
        }
        if self.place.a.axis == Axis::SameTensor {
            join_norms(cx, out);
        }
        out
    }

    fn rescale<B: Backend + ?Sized>(&self, cx: &mut Context<'_, B>, norms: Buffer, bias: Option<Buffer>, out: Product) {
        let magnitude = cx.store.weight(self.magnitude);
        let bias = bias.map(|bias| bias.slice(self.first, self.columns));
        cx.backend.magnitude(&Magnitude::Rescale { x: self.of(out.rows), rows: out.m, magnitude, norms, bias });
    }
}

/// Makes norms of the columns that each rank along [`Axis::Tensor`] has those of all columns: the norms of rows of norms.
fn join_norms<B: Backend + ?Sized>(cx: &mut Context<'_, B>, norms: Buffer) {
    let ((ranks, _), n) = (cx.along(Axis::Tensor), norms.len);
    let top = cx.arena.mark();
    let [all, by_row] = [(); 2].map(|()| cx.workspace(DType::F32, ranks * n));
    let none = cx.workspace(DType::F32, ranks + n);
    cx.all_gather(Axis::Tensor, norms, all);
    for rank in 0..ranks {
        let source = Rows { buffer: all.slice(rank * n, n), stride: 1 };
        let target = Rows { buffer: by_row.slice(rank, ranks * n - rank), stride: ranks };
        cx.backend.copy_columns(source, target, n, 1);
    }
    cx.backend.zero(none);
    let (a, b) = (none.slice(0, ranks), none.slice(ranks, n));
    cx.backend.magnitude(&Magnitude::Norms { weight: by_row, a, b, factor: 0.0, out: norms });
    cx.arena.release(top);
}
