//! The leaves that vision towers have besides the decoder's: LayerNorm, GELU, interpolation of learned positions, and rows
//! added to or cleared by their numbers. May import what leaves work on.

use super::Buffer;

/// `out = weight (x - mean) / sqrt(variance + epsilon) + bias` by rows, with the variance over `width`, not `width - 1`.
#[derive(Clone, Copy, Debug)]
pub struct LayerNorm {
    /// `[rows, width]`.
    pub x: Buffer,
    /// `[width]`.
    pub weight: Buffer,
    /// `[width]`.
    pub bias: Buffer,
    /// Elements of a row.
    pub width: usize,
    /// Added to the variance.
    pub epsilon: f32,
    /// `[rows, width]`.
    pub out: Buffer,
    /// f32 `[rows, 2]`: mean and `1 / sqrt(variance + epsilon)`, kept for the backward pass.
    pub statistics: Buffer,
}

impl LayerNorm {
    /// Rows of `x`.
    pub(crate) fn rows(&self) -> usize {
        self.statistics.len / 2
    }
}

/// Which form of GELU (Hendrycks and Gimpel, 2016, arXiv 1606.08415).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gelu {
    /// `x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`: `gelu_pytorch_tanh`.
    Tanh,
    /// `x / 2 (1 + erf(x / sqrt(2)))`: `gelu`.
    Erf,
}

/// The leaves of vision towers.
pub trait Vision {
    /// Writes `op.out` and `op.statistics`.
    fn layer_norm(&mut self, op: &LayerNorm);

    /// From `d_out` and what the forward pass read and kept; `op.out` is not looked at. `d_x` is added to, and so are `d_weight`
    /// and `d_bias` (f32 `[width]`).
    fn layer_norm_backward(&mut self, op: &LayerNorm, d_out: Buffer, d_x: Buffer, d_weight: Buffer, d_bias: Buffer);

    /// `out = gelu(x)`, element by element.
    fn gelu(&mut self, kind: Gelu, x: Buffer, out: Buffer);

    /// In place: the gradient of what [`Vision::gelu`] gave becomes that of `x`.
    fn gelu_backward(&mut self, kind: Gelu, x: Buffer, d_x: Buffer);

    /// `out[n] += sum over j of weights[n, j] table[taps[n, j]]`, `width` elements a row; `taps` is i32 `[N, 4]`, `weights` f32
    /// `[N, 4]`.
    fn interpolate(&mut self, table: Buffer, taps: Buffer, weights: Buffer, width: usize, out: Buffer);

    /// `d_table[taps[n, j]] += weights[n, j] d_out[n]`; f32, in the order of `n`, then of `j`.
    fn interpolate_backward(&mut self, d_out: Buffer, taps: Buffer, weights: Buffer, width: usize, d_table: Buffer);

    /// `out[rows[r]] += x[r]`, `width` elements a row, for distinct rows (i32); the others are left.
    fn add_rows(&mut self, x: Buffer, rows: Buffer, width: usize, out: Buffer);

    /// `x[rows[r]] = 0`, `width` elements a row, for distinct rows (i32); the others are left.
    fn zero_rows(&mut self, rows: Buffer, width: usize, x: Buffer);
}
