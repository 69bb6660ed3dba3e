//! The leaves of gates, which the hybrid families have: attention's output gate, and that of the shared expert. A device
//! without them refuses these families before anything is queued. May import what leaves work on.

use super::{Buffer, Heads};

/// The leaves of gates. `σ` is the logistic function.
pub trait Gates {
    /// From `joined` `[T, (2 query + 2 key_value) dim]`, head by head query then gate, then keys, then values, to `qkv`
    /// `[T, (query + 2 key_value) dim]` and `gates` `[T, query * dim]`.
    fn split_gates(&mut self, heads: Heads, joined: Buffer, qkv: Buffer, gates: Buffer);

    /// The reverse of [`Gates::split_gates`].
    fn join_gates(&mut self, heads: Heads, qkv: Buffer, gates: Buffer, joined: Buffer);

    /// `out = x σ(gates)`, element by element.
    fn gate(&mut self, x: Buffer, gates: Buffer, out: Buffer);

    /// In place: from the gradient of what [`Gates::gate`] gave, `d_out` becomes that of `x`, and `gates` its own.
    fn gate_backward(&mut self, d_out: Buffer, x: Buffer, gates: Buffer);

    /// `out[t] += σ(logits[t]) x[t]`, `width` elements a row; `logits` is f32 `[T]`.
    fn add_gated_rows(&mut self, x: Buffer, logits: Buffer, width: usize, out: Buffer);

    /// From `d_out` `[T, width]`, the gradient of what [`Gates::add_gated_rows`] added to: `d_x = σ(logits) d_out`, and
    /// `logits` becomes its own gradient.
    fn gated_rows_backward(&mut self, d_out: Buffer, x: Buffer, logits: Buffer, width: usize, d_x: Buffer);
}
