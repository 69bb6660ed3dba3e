//! The gated delta rule in its chunked form (Yang et al., 2024, arXiv 2412.06464, section 3.3): a task takes one key head of
//! one sequence with all value heads that share it, chunk by chunk, so that what they share is computed once and everything
//! of a chunk stays in the second-level cache.
//!
//! Within a chunk of `n` tokens, with `D[i, j]` the decay from token `j` to token `i`, `e` that from before the chunk to a token
//! and `r` that from a token to the chunk's end (rows of `D` both), `S` the state before the chunk and `A` the inverse of `I + M`
//! with `M = strictly lower(diag(beta) (K K^T . D))`:
//!
//! ```text
//! N = A diag(beta) (V - diag(e) K S)           what is written
//! P = lower(Q K^T . D)
//! O = diag(e) Q S + P N                        S' = e_n S + (diag(r) K)^T N
//! ```

mod backward;
mod decay;
mod forward;
mod head;
mod leaves;
mod step;
mod sums;
#[cfg(test)]
mod tests;
mod tiles;

use std::ops::Range;

use self::decay::Gates;
use super::embedding::index;
use crate::backend::DeltaHeads;

/// The shape of a leaf, without its buffers.
#[derive(Clone, Copy)]
struct Shape<'a> {
    heads: DeltaHeads,
    /// `T`.
    tokens: usize,
    /// `[sequences + 1]`.
    cu_seqlens: &'a [i32],
    /// Tokens of a chunk: a multiple of 16.
    chunk: usize,
}

/// A part of the leaf: a key head of a sequence.
struct Task {
    sequence: usize,
    tokens: Range<usize>,
    key_head: usize,
}

impl<'a> Shape<'a> {
    /// That of these sequences, which must cover all tokens.
    fn new(heads: DeltaHeads, tokens: usize, cu_seqlens: &'a [i32], chunk: usize) -> Self {
        assert_eq!(heads.value % heads.key, 0, "value heads are a multiple of key heads");
        assert!(chunk.is_multiple_of(16), "chunks of {chunk} tokens");
        let ends = [cu_seqlens.first(), cu_seqlens.last()].map(|bound| bound.map(|bound| index(*bound)));
        assert_eq!(ends, [Some(0), Some(tokens)], "cu_seqlens covers {tokens} tokens");
        assert!(cu_seqlens.is_sorted(), "cu_seqlens ascends");
        Shape { heads, tokens, cu_seqlens, chunk }
    }

    /// Value heads that share a key head.
    fn group(&self) -> usize {
        self.heads.value / self.heads.key
    }

    /// The tasks, the longest sequences first.
    fn tasks(&self) -> Vec<Task> {
        let mut tasks = Vec::with_capacity(self.cu_seqlens.len() * self.heads.key);
        for (sequence, pair) in self.cu_seqlens.windows(2).enumerate().filter(|(_, pair)| pair[0] < pair[1]) {
            let tokens = index(pair[0])..index(pair[1]);
            tasks.extend((0..self.heads.key).map(|key_head| Task { sequence, tokens: tokens.clone(), key_head }));
        }
        tasks.sort_by_key(|task| std::cmp::Reverse(task.tokens.len()));
        tasks
    }

    /// The chunks of a task.
    fn chunks(&self, task: &Task) -> impl DoubleEndedIterator<Item = Range<usize>> + ExactSizeIterator + use<> {
        let (end, chunk) = (task.tokens.end, self.chunk);
        (0..task.tokens.len().div_ceil(chunk)).map({
            let start = task.tokens.start;
            move |number| start + number * chunk..end.min(start + (number + 1) * chunk)
        })
    }

    /// The first column of queries, keys and values: of key head `key_head` and of value head `head`.
    fn columns(&self, key_head: usize, head: usize) -> [usize; 3] {
        let DeltaHeads { key_dim, value_dim, .. } = self.heads;
        let keys = self.heads.key_columns();
        [key_head * key_dim, keys + key_head * key_dim, 2 * keys + head * value_dim]
    }

    /// The gates of a value head over some tokens.
    fn gates<'g>(&self, gates: Gates<'g>, head: usize, tokens: &Range<usize>) -> Gates<'g> {
        let range = head * self.tokens + tokens.start..head * self.tokens + tokens.end;
        Gates { g: &gates.g[range.clone()], beta: &gates.beta[range] }
    }
}
