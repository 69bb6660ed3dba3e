//! Attention over packed sequences, causal or not, blockwise: nothing is ever `[T, T]`.

mod backward;
mod cached;
mod forward;
#[cfg(test)]
mod tests;

pub(super) use cached::cached;

use std::ops::Range;

use self::backward::{Results, backward};
use self::forward::{Inputs, forward};
use super::element::{Element, with_element};
use super::embedding::index;
use super::gemm::MatRef;
use super::memory::{Lease, Plain};
use crate::backend::{Attention, Buffer, Heads, Rows};

/// The shape of an attention leaf, without its buffers.
#[derive(Clone, Copy)]
pub(super) struct Shape<'a> {
    /// Head counts and size.
    pub(super) heads: Heads,
    /// A query sees no key after its own; else it sees the whole of its sequence.
    pub(super) causal: bool,
    /// Keys that a query may see; at least as many as the longest sequence has where there is no window.
    pub(super) window: usize,
    /// Factor on `q k^T`.
    pub(super) scale: f32,
    /// Tokens.
    pub(super) tokens: usize,
    /// `[count + 1]`.
    pub(super) cu_seqlens: &'a [i32],
}

impl<'a> Shape<'a> {
    /// The shape of `op` over these sequences, which must cover all tokens.
    pub(super) fn new(op: &Attention, cu_seqlens: &'a [i32]) -> Self {
        assert_eq!(op.heads.query % op.heads.key_value, 0, "query heads are a multiple of key heads");
        assert!(op.window != Some(0), "a query sees itself");
        assert!(op.causal || op.window.is_none(), "a window is of causal attention");
        assert_eq!(cu_seqlens.len(), op.sequences.count + 1, "cu_seqlens has a bound more than sequences");
        assert_eq!(cu_seqlens[0], 0, "cu_seqlens begins with 0");
        assert!(cu_seqlens.is_sorted(), "cu_seqlens ascends");
        let tokens = index(cu_seqlens[op.sequences.count]);
        let window = op.window.unwrap_or(usize::MAX);
        Shape { heads: op.heads, causal: op.causal, window, scale: op.scale, tokens, cu_seqlens }
    }

    /// The tokens of each sequence that has any.
    fn sequences(&self) -> impl Iterator<Item = Range<usize>> {
        self.cu_seqlens.windows(2).map(|pair| index(pair[0])..index(pair[1])).filter(|tokens| !tokens.is_empty())
    }

    /// Query heads that share a key head.
    fn group(&self) -> usize {
        self.heads.query / self.heads.key_value
    }
}

/// `range` in parts of `size`, the last one shorter.
fn parts(range: Range<usize>, size: usize) -> impl Iterator<Item = Range<usize>> {
    range.clone().step_by(size).map(move |start| start..range.end.min(start + size))
}

/// Rows of an input, `stride` elements apart.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a, T> {
    /// From the first row's first element on.
    pub(super) data: &'a [T],
    /// Elements from one row's start to the next one's.
    pub(super) stride: usize,
}

impl<'a, T: Element> Matrix<'a, T> {
    #[inline(always)]
    fn row(&self, row: usize, column: usize, width: usize) -> &'a [T] {
        &self.data[row * self.stride + column..][..width]
    }

    /// These rows from column `column` on, as an operand of products.
    fn part(&self, rows: &Range<usize>, column: usize) -> MatRef<'a> {
        MatRef { data: T::elements(&self.data[rows.start * self.stride + column..]), stride: self.stride }
    }
}

pub(super) fn matrix<'m, T: Plain>(lease: &mut Lease<'m>, rows: Rows, count: usize, width: usize) -> Matrix<'m, T> {
    Matrix { data: lease.read_rows(rows, count, width), stride: rows.stride }
}

/// Queries, keys and values of so many tokens.
fn inputs<'m, T: Plain>(lease: &mut Lease<'m>, op: &Attention, tokens: usize) -> Inputs<'m, T> {
    Inputs {
        q: matrix(lease, op.q, tokens, op.heads.query_columns()),
        k: matrix(lease, op.k, tokens, op.heads.key_columns()),
        v: matrix(lease, op.v, tokens, op.heads.key_columns()),
    }
}

/// As [`crate::backend::Backend::attention`].
pub(super) fn attention(lease: &mut Lease<'_>, op: &Attention) {
    let shape = Shape::new(op, lease.read(op.sequences.cu_seqlens));
    with_element!(op.q.buffer.dtype, T => {
        let inputs = inputs::<T>(lease, op, shape.tokens);
        let out = lease.write_rows::<T>(op.out, shape.tokens, op.heads.query_columns());
        forward(&shape, inputs, out, op.out.stride, lease.write(op.log_sum_exp));
    });
}

/// As [`crate::backend::Backend::attention_backward`].
pub(super) fn attention_backward(lease: &mut Lease<'_>, op: &Attention, d_out: Rows, d_qkv: Buffer, scratch: Buffer) {
    let shape = Shape::new(op, lease.read(op.sequences.cu_seqlens));
    let columns = op.heads.query_columns();
    with_element!(op.q.buffer.dtype, T => {
        let inputs = inputs::<T>(lease, op, shape.tokens);
        let results = Results {
            out: matrix(lease, op.out, shape.tokens, columns),
            d_out: matrix(lease, d_out, shape.tokens, columns),
            log_sum_exp: lease.read(op.log_sum_exp),
        };
        backward(&shape, inputs, &results, lease.write::<T>(d_qkv), lease.write(scratch));
    });
}
