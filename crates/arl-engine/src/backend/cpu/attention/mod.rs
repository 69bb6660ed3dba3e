//! Causal attention over packed sequences, blockwise: nothing is ever `[T, T]`.

mod backward;
mod cached;
mod forward;

pub(super) use backward::{Input, backward};
pub(super) use cached::cached;
pub(super) use forward::forward;

use std::ops::Range;

use super::element::Element;
use super::embedding::index;
use super::vector::vectorise;
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

    /// The queries among `queries` that see any of `keys` (both of one sequence).
    fn seeing(&self, queries: &Range<usize>, keys: &Range<usize>) -> Range<usize> {
        let end = (keys.end - 1).saturating_add(self.window).min(queries.end);
        queries.start.max(keys.start)..end
    }

    /// Which of `keys` query `i` sees, counted from the first of them; `keys` are of its sequence.
    #[inline(always)]
    fn seen(&self, i: usize, keys: &Range<usize>) -> Range<usize> {
        let first = (i + 1).saturating_sub(self.window).clamp(keys.start, keys.end);
        first - keys.start..(i + 1).clamp(first, keys.end) - keys.start
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

    /// Copies rows `rows`, `width` columns from `column` on, to `out` `[rows.len(), width]`. Products read the copy: rows
    /// that lie a power of two apart in memory would all compete for the same few lines of the cache.
    fn copy(&self, rows: Range<usize>, column: usize, width: usize, out: &mut [f32]) {
        vectorise!({
            for (row, out) in rows.zip(out.chunks_exact_mut(width)) {
                for (x, out) in self.row(row, column, width).iter().zip(out) {
                    *out = x.load();
                }
            }
        });
    }

    /// The same rows transposed to `out` `[width, rows.len()]`.
    fn transposed(&self, rows: Range<usize>, column: usize, width: usize, out: &mut [f32]) {
        let count = rows.len();
        // Eight rows at a time: what is written then fills half a cache line instead of a word of it.
        vectorise!({
            for first in (0..count).step_by(8) {
                let lines: [&[T]; 8] =
                    std::array::from_fn(|line| self.row(rows.start + (first + line).min(count - 1), column, width));
                let filled = (count - first).min(8);
                for x in 0..width {
                    let values: [f32; 8] = std::array::from_fn(|line| lines[line][x].load());
                    let out = &mut out[x * count + first..][..filled];
                    if filled == 8 {
                        out.copy_from_slice(&values);
                    } else {
                        out.copy_from_slice(&values[..filled]);
                    }
                }
            }
        });
    }
}
