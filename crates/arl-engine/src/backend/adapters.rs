//! What leaves for adapters work on: weights in NF4, and the magnitudes of DoRA.

use super::{Buffer, Rows};

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

/// What DoRA computes with the magnitudes of a layer's rows. All buffers are f32; `n` is the layer's rows, which are the columns of
/// what it computes.
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
        /// `[n]`.
        out: Buffer,
    },
    /// In place: `x = bias + magnitude / norm (x - bias)`, by columns.
    Rescale {
        /// `[rows, n]`.
        x: Rows,
        /// Rows of `x`.
        rows: usize,
        /// `[n]`.
        magnitude: Buffer,
        /// `[n]`.
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
        /// `[n]`.
        norms: Buffer,
        /// `[n]`.
        out: Buffer,
    },
}
