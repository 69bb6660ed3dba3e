//! What blocks keep of earlier tokens while sequences are generated, and the new tokens that join it.

use crate::backend::Buffer;

/// What a block keeps.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Cached {
    Attention(CachedKeys),
    Delta(CachedState),
}

/// What a delta rule keeps, the same for sequences of any length.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CachedState {
    /// `[sequences, taps - 1, C]`: the last inputs of the convolution.
    pub(crate) inputs: Buffer,
    /// f32 `[sequences, value heads, key_dim, value_dim]`.
    pub(crate) states: Buffer,
    pub(crate) sequences: usize,
}

impl CachedState {
    /// Inputs and states of some sequences.
    pub(crate) fn of(&self, first: usize, count: usize) -> (Buffer, Buffer) {
        let part = |buffer: Buffer| {
            let one = buffer.len / self.sequences;
            buffer.slice(first * one, count * one)
        };
        (part(self.inputs), part(self.states))
    }
}

/// The keys and values of attention: `[sequences, capacity, K]` each.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CachedKeys {
    pub(crate) keys: Buffer,
    pub(crate) values: Buffer,
    /// Tokens that each sequence has room for.
    pub(crate) capacity: usize,
}

/// New tokens of consecutive sequences. Keys and values move one head's row at a time, so that plain gathers and scatters do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NewTokens {
    /// The place of the first sequence among those that are generated together.
    pub(crate) first: usize,
    /// i32 `[T]`: where each token goes, counted over `[sequences, capacity]`.
    pub(crate) slots: Buffer,
    /// i32 `[T, key_value]`: the rows of keys in `[T, query + key_value]` heads.
    pub(crate) keys: Buffer,
    /// i32 `[T, key_value]`: the rows of values in `[T, query + 2 key_value]` heads.
    pub(crate) values: Buffer,
    /// `[T, key_value, dim]`.
    pub(crate) rows: Buffer,
    /// i32 `[T]`: entries of each sequence, where every token is one of a sequence of its own.
    pub(crate) lengths: Buffer,
    /// Whether every token is one of a sequence of its own; else they are whole prompts.
    pub(crate) one_each: bool,
}
