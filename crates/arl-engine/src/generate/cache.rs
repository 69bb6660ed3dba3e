//! What is kept of sequences that are being generated, and the memory of the forward pass into them.

use crate::backend::{Backend, Buffer, DType, Heads};
use crate::batch::{BatchSize, Inputs};
use crate::blocks::Run;
use crate::blocks::cache::{Cached, CachedKeys, CachedState, NewTokens};
use crate::model::Model;
use crate::placement::arena::{Arena, Category};
use crate::rotary::Tables;
use crate::statistics::Figures;
use crate::step::Step;

/// What a group of sequences keeps.
pub(super) struct Cache {
    /// By blocks.
    pub(super) blocks: Vec<Option<Cached>>,
    /// Tokens that each sequence has room for.
    pub(super) capacity: usize,
    /// `[sequences, H]`: the head's input for each sequence's next token.
    pub(super) hidden: Buffer,
    /// f32 `[rows, vocab]`: as many rows of logits as the loss has at a time.
    pub(super) logits: Buffer,
}

/// Bytes that one token takes.
pub(super) fn token_bytes(model: &Model) -> usize {
    let columns = model.blocks.iter().filter_map(|block| block.attention()).map(|one| 2 * one.heads.key_columns());
    columns.sum::<usize>() * model.dtype.bytes()
}

/// Bytes that one sequence takes, however long it is.
pub(super) fn sequence_bytes(model: &Model) -> usize {
    let kept = model.blocks.iter().filter_map(|block| block.delta()).map(|delta| delta.kept());
    kept.map(|(inputs, state)| inputs * model.dtype.bytes() + state * DType::F32.bytes()).sum()
}

impl Cache {
    pub(super) fn take(arena: &mut Arena, model: &Model, sequences: usize, capacity: usize) -> Self {
        let blocks = model.blocks.iter().map(|block| {
            let mut take = |dtype, of_each: usize| arena.take(Category::Cache, dtype, sequences * of_each);
            if let Some(delta) = block.delta() {
                let (inputs, state) = delta.kept();
                let (inputs, states) = (take(model.dtype, inputs), take(DType::F32, state));
                return Some(Cached::Delta(CachedState { inputs, states, sequences }));
            }
            let of_each = capacity * block.attention()?.heads.key_columns();
            let (keys, values) = (take(model.dtype, of_each), take(model.dtype, of_each));
            Some(Cached::Attention(CachedKeys { keys, values, capacity }))
        });
        let blocks = blocks.collect();
        let rows = model.loss_chunk.min(sequences);
        Cache {
            blocks,
            capacity,
            hidden: arena.take(Category::Activations, model.dtype, sequences * model.shape.hidden),
            logits: arena.take(Category::LogitsChunk, DType::F32, rows * model.shape.vocab),
        }
    }
}

/// Takes what the forward pass over `size` tokens needs, of sequences from place `first` on: of whole prompts, or `one_each`;
/// `tables` are for positions of as many axes as theirs.
pub(super) fn room<B: Backend + ?Sized>(
    step: &mut Step<'_, B>,
    size: BatchSize,
    max_len: usize,
    (first, one_each): (usize, bool),
    tables: Tables,
) -> (Run, NewTokens) {
    let (heads, tokens) = (step.model.shape.heads, size.tokens);
    let mut ints = |len| step.arena.take(Category::Inputs, DType::I32, len);
    let (slots, keys, values) = (ints(tokens), ints(tokens * heads.key_value), ints(tokens * heads.key_value));
    let lengths = ints(tokens);
    let rows = step.arena.take(Category::Workspace, step.model.dtype, tokens * heads.key_columns());
    let inputs = Inputs::take(step.arena, step.model.tower.as_ref(), size, 0, max_len, tables);
    let figures = Figures::take(step.arena, &step.model.shape, 1, 0);
    let run = step.begin(inputs, None, Figures { balances: None, ..figures });
    step.take_scratch(&run);
    (run, NewTokens { first, slots, keys, values, rows, lengths, one_each })
}

impl<B: Backend + ?Sized> Step<'_, B> {
    /// Moves what is kept of a sequence to another place.
    pub(super) fn move_sequence(&mut self, cache: &Cache, from: usize, to: usize, tokens: usize) {
        for cached in cache.blocks.iter().flatten() {
            match cached {
                Cached::Attention(cached) => {
                    for buffer in [cached.keys, cached.values] {
                        let width = self.model.shape.heads.key_columns();
                        let part = |s: usize| buffer.slice(s * cache.capacity * width, tokens * width);
                        self.backend.copy(part(from), part(to));
                    }
                }
                Cached::Delta(cached) => {
                    let ((old_inputs, old_states), (inputs, states)) = (cached.of(from, 1), cached.of(to, 1));
                    self.backend.copy(old_inputs, inputs);
                    self.backend.copy(old_states, states);
                }
            }
        }
    }
}

/// The index lists of new tokens that go to `slots`.
pub(super) fn upload_new<B: Backend + ?Sized>(backend: &mut B, new: &NewTokens, heads: Heads, slots: &[i32]) {
    let rows = |before: usize, of: usize| -> Vec<i32> {
        (0..slots.len()).flat_map(|t| (0..heads.key_value).map(move |h| (t * of + before + h) as i32)).collect()
    };
    backend.upload(bytemuck::cast_slice(slots), new.slots);
    let keys = rows(heads.query, heads.query + heads.key_value);
    backend.upload(bytemuck::cast_slice(&keys), new.keys);
    let values = rows(heads.query + heads.key_value, heads.query + 2 * heads.key_value);
    backend.upload(bytemuck::cast_slice(&values), new.values);
}
