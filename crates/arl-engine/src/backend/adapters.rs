//! What leaves for adapters work on: weights in NF4, and the magnitudes of DoRA.

use super::{Buffer, DType, Layout, Rows};

/// Weights in NF4 (see `arl_model::Nf4`): codes of 4 bits, two a byte, and a scale for each 64 of them.
#[derive(Clone, Copy, Debug)]
pub struct Nf4Weights {
    /// Weights.
    pub len: usize,
    /// u8 `[len / 2, rounded up]`; the first of two is the high half.
    pub codes: Buffer,
    /// `[len / 64, rounded up]`: f32, or with `nested` u8 codes.
    pub scales: Buffer,
    /// What scales in 8 bits stand for.
    pub nested: Option<Nf4Nested>,
}

/// What scales in 8 bits stand for: `values[code] * largest + offset`.
#[derive(Clone, Copy, Debug)]
pub struct Nf4Nested {
    /// f32: the offset, then the largest of each 256 scales, less the offset.
    pub largest: Buffer,
    /// f32 `[256]`.
    pub values: Buffer,
}

/// A matrix product whose right operand is weights in NF4: the result is that of the product with what [`Backend::dequantize`] makes of
/// them, on the CPU to the bit.
///
/// [`Backend::dequantize`]: super::Backend::dequantize
#[derive(Clone, Copy, Debug)]
pub struct Nf4Matmul<'a> {
    /// `Nt`: `c[m, n] = a[m, k] w[n, k]^T`, `Nn`: `c[m, n] = a[m, k] w[k, n]`.
    pub layout: Layout,
    /// Rows of `c`.
    pub m: usize,
    /// Columns of `c`.
    pub n: usize,
    /// Length of the sums.
    pub k: usize,
    /// Left operand.
    pub a: Rows,
    /// `w`: tensors one below the other, each of whole rows.
    pub weights: &'a [Nf4Weights],
    /// What `w` is rounded to before it is multiplied.
    pub dtype: DType,
    /// Result.
    pub c: Rows,
    /// Add to `c` (true) or assign it (false).
    pub accumulate: bool,
    /// `[n]`, added to each row of `c`.
    pub bias: Option<Buffer>,
    /// Scratch of `dtype`, as long as [`DeviceKind::nf4_tile`](super::DeviceKind::nf4_tile) says.
    pub tile: Buffer,
}

impl Nf4Matmul<'_> {
    /// Rows and columns of `w`.
    pub fn shape(&self) -> (usize, usize) {
        if self.layout == Layout::Nt { (self.n, self.k) } else { (self.k, self.n) }
    }

    /// The tensors, each with its first row and its rows.
    pub fn tensors(&self) -> impl Iterator<Item = (&Nf4Weights, usize, usize)> {
        let (_, width) = self.shape();
        self.weights.iter().scan(0, move |next, weights| {
            let (first, rows) = (*next, weights.len / width);
            *next += rows;
            Some((weights, first, rows))
        })
    }
}

/// What DoRA computes with the magnitudes of a layer's rows. Weights, adapters and activations are of one type, magnitudes and norms
/// f32; `n` is the layer's rows, which are the columns of what it computes.
#[derive(Clone, Copy, Debug)]
pub enum Magnitude {
    /// `out[o] = |weight[o] + factor b[o] a|`.
    Norms {
        /// `[n, k]`.
        weight: Buffer,
        /// `[rank, k]`.
        a: Buffer,
        /// `[n, rank]`.
        b: Buffer,
        /// On `b a`.
        factor: f32,
        /// f32 `[n]`.
        out: Buffer,
    },
    /// In place: `x = bias + magnitude / norm (x - bias)`, by columns.
    Rescale {
        /// `[rows, n]`.
        x: Rows,
        /// Rows of `x`.
        rows: usize,
        /// f32 `[n]`.
        magnitude: Buffer,
        /// f32 `[n]`.
        norms: Buffer,
        /// `[n]`; none: 0.
        bias: Option<Buffer>,
    },
    /// `out[o] += sum over rows of d_out[r, o] x[r, o] / norm[o]`.
    Gradient {
        /// `[rows, n]`.
        d_out: Rows,
        /// `[rows, n]`: what the layer computed before it was scaled, without the bias.
        x: Rows,
        /// Rows of both.
        rows: usize,
        /// f32 `[n]`.
        norms: Buffer,
        /// f32 `[n]`.
        out: Buffer,
    },
}
