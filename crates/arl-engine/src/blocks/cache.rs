//! What attention keeps of earlier tokens while sequences are generated, and the new tokens that join it.

use crate::backend::Buffer;

/// The keys and values of a block: `[sequences, capacity, K]` each.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cached {
    pub(crate) keys: Buffer,
    pub(crate) values: Buffer,
    /// Tokens that each sequence has room for.
    pub(crate) capacity: usize,
}

/// New tokens. They move one head's row at a time, so that plain gathers and scatters do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NewTokens {
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
