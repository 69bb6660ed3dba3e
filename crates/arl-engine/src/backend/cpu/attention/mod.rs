//! Causal attention over packed sequences, blockwise: nothing is ever `[T, T]`.

mod backward;
mod cached;
mod forward;

pub(super) use backward::{Results, backward};
pub(super) use cached::cached;
pub(super) use forward::{Inputs, forward};

use std::ops::Range;

use super::element::Element;
use super::embedding::index;
use super::gemm::MatRef;
use crate::backend::{Attention, Heads};

/// The shape of an attention leaf, without its buffers.
#[derive(Clone, Copy)]
pub(super) struct Shape<'a> {
    /// Head counts and size.
    pub(super) heads: Heads,
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
        assert_eq!(cu_seqlens.len(), op.sequences.count + 1, "cu_seqlens has a bound more than sequences");
        assert_eq!(cu_seqlens[0], 0, "cu_seqlens begins with 0");
        assert!(cu_seqlens.is_sorted(), "cu_seqlens ascends");
        let tokens = index(cu_seqlens[op.sequences.count]);
        Shape { heads: op.heads, window: op.window.unwrap_or(usize::MAX), scale: op.scale, tokens, cu_seqlens }
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

/// The first `len` elements of `memory`, which keeps the rest.
fn carve<'m>(memory: &mut &'m mut [f32], len: usize) -> &'m mut [f32] {
    let (first, rest) = std::mem::take(memory).split_at_mut(len);
    *memory = rest;
    first
}
