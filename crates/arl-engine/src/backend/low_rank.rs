//! A matrix product and what adapters of low rank add to it, as one leaf: a device may compute both at once.

use std::ops::Range;

use super::{Backend, Buffer, Matmul, Nf4Matmul, Rows};

/// What a linear layer multiplies with.
#[derive(Clone, Copy, Debug)]
pub enum Product<'a> {
    /// Weights as they are.
    Plain(Matmul),
    /// In NF4.
    Nf4(Nf4Matmul<'a>),
}

/// A factor of adapters that some of the columns of a product share.
#[derive(Clone, Debug)]
pub struct LowRankFactor {
    /// Columns of `a`, or of `c`.
    pub columns: Range<usize>,
    /// Columns of `low`.
    pub low: Range<usize>,
    /// Its values, laid out as the weights are: with [`Layout::Nt`](super::Layout::Nt) a row for each column of what is computed with
    /// it, else a row for each column of what it is multiplied with.
    pub weight: Buffer,
}

/// `c (+)= a w`, `low = factor a P`, `c += low Q`, where `P` and `Q` consist of factors. `Nt` is a layer's forward pass, `Nn` what
/// gives the gradient of its input.
#[derive(Clone, Debug)]
pub struct LowRankMatmul<'a> {
    /// `c (+)= a w`.
    pub product: Product<'a>,
    /// `P`: each gives columns of `low` from columns of `a`; together they give all of `low`.
    pub projections: &'a [LowRankFactor],
    /// `[m, rank]`.
    pub low: Buffer,
    /// Columns of `low`.
    pub rank: usize,
    /// On what is projected.
    pub factor: f32,
    /// As `low`, for what is not multiplied by the factor yet; empty where that is 1.
    pub scratch: Buffer,
    /// `Q`: each adds to columns of `c` what it makes of columns of `low`. In the order of their columns, none of which two have.
    pub additions: &'a [LowRankFactor],
}

impl Product<'_> {
    /// With no weights in NF4: the product's shape and operands but for `b`.
    pub fn shape(&self) -> Matmul {
        match *self {
            Product::Plain(op) => op,
            Product::Nf4(Nf4Matmul { layout, m, n, k, a, c, accumulate, bias, .. }) => {
                Matmul { layout, m, n, k, a, b: a, c, accumulate, bias }
            }
        }
    }
}

/// The product, and products with each factor behind it.
pub(super) fn apart<B: Backend + ?Sized>(backend: &mut B, op: &LowRankMatmul<'_>) {
    match &op.product {
        Product::Plain(product) => backend.matmul(product),
        Product::Nf4(product) => backend.matmul_nf4(product),
    }
    let whole = op.product.shape();
    let plain = if op.factor == 1.0 { op.low } else { op.scratch };
    let low = |buffer| Rows { buffer, stride: op.rank };
    for part in op.projections {
        let (a, c) = (columns(whole.a, &part.columns), columns(low(plain), &part.low));
        backend.matmul(&part.product(whole, [part.low.len(), part.columns.len()], a, c, false));
    }
    if op.factor != 1.0 {
        backend.scale(plain, op.factor, None, op.low);
    }
    for part in op.additions {
        let (a, c) = (columns(low(op.low), &part.low), columns(whole.c, &part.columns));
        backend.matmul(&part.product(whole, [part.columns.len(), part.low.len()], a, c, true));
    }
}

impl LowRankFactor {
    /// Elements from one row of its values to the next, in a product of `n` columns over `k`.
    pub(super) fn stride(layout: super::Layout, [n, k]: [usize; 2]) -> usize {
        if layout == super::Layout::Nt { k } else { n }
    }

    fn product(&self, whole: Matmul, [n, k]: [usize; 2], a: Rows, c: Rows, accumulate: bool) -> Matmul {
        let b = Rows { buffer: self.weight, stride: Self::stride(whole.layout, [n, k]) };
        Matmul { n, k, a, b, c, accumulate, bias: None, ..whole }
    }
}

/// Some columns of a matrix.
fn columns(rows: Rows, of: &Range<usize>) -> Rows {
    Rows { buffer: rows.buffer.slice(of.start, rows.buffer.len - of.start), stride: rows.stride }
}
