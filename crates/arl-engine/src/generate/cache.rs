//! The keys and values of sequences that are being generated, and the forward pass into them.

use arl_model::Result;

use crate::arena::{Arena, Category};
use crate::backend::{Backend, Buffer, DType, Heads, Rows};
use crate::batch::{BatchSize, Inputs};
use crate::model::Model;
use crate::statistics::take_statistics;
use crate::step::{Run, Step};

/// Keys and values of a group of sequences.
pub(super) struct Cache {
    /// By layer: `[sequences, capacity, K]`, keys and values.
    pub(super) layers: Vec<(Buffer, Buffer)>,
    /// Tokens that each sequence has room for.
    pub(super) capacity: usize,
    /// `[sequences, H]`: the head's input for each sequence's next token.
    pub(super) hidden: Buffer,
    /// f32 `[rows, vocab]`: as many rows of logits as the loss has at a time.
    pub(super) logits: Buffer,
}

impl Cache {
    pub(super) fn take(arena: &mut Arena, model: &Model, sequences: usize, capacity: usize) -> Self {
        let shape = &model.shape;
        let width = shape.heads.key_value * shape.heads.dim;
        let mut take = || arena.take(Category::Cache, model.dtype, sequences * capacity * width);
        let layers = shape.layers.iter().map(|_| (take(), take())).collect();
        let rows = model.loss_chunk.min(sequences);
        Cache {
            layers,
            capacity,
            hidden: arena.take(Category::Activations, model.dtype, sequences * shape.hidden),
            logits: arena.take(Category::LogitsChunk, DType::F32, rows * shape.vocab),
        }
    }
}

/// New tokens on their way into the cache. Rows of one head at a time, so that plain gathers and scatters do.
#[derive(Clone, Copy)]
pub(super) struct Entry {
    /// i32 `[T]`: where each token goes, counted over `[sequences, capacity]`.
    pub(super) slots: Buffer,
    /// i32 `[T, key_value]`: the rows of keys in `[T, query + key_value]` heads.
    keys: Buffer,
    /// i32 `[T, key_value]`: the rows of values in `[T, query + 2 key_value]` heads.
    values: Buffer,
    /// `[T, key_value, dim]`.
    rows: Buffer,
    /// i32 `[T]`: entries of each sequence, where every token is one of a sequence of its own.
    pub(super) lengths: Buffer,
}

impl Entry {
    pub(super) fn take(arena: &mut Arena, model: &Model, tokens: usize) -> Self {
        let heads = model.shape.heads;
        let mut ints = |len| arena.take(Category::Inputs, DType::I32, len);
        Entry {
            slots: ints(tokens),
            keys: ints(tokens * heads.key_value),
            values: ints(tokens * heads.key_value),
            lengths: ints(tokens),
            rows: arena.take(Category::Workspace, model.dtype, tokens * heads.key_value * heads.dim),
        }
    }
}

/// Takes what the forward pass over `size` tokens needs.
pub(super) fn room<B: Backend + ?Sized>(step: &mut Step<'_, B>, size: BatchSize, max_len: usize) -> (Run, Entry) {
    let entry = Entry::take(step.arena, step.model, size.tokens);
    let inputs = Inputs::take(step.arena, size, 0, max_len, step.model.shape.heads.dim);
    let (sums, _) = take_statistics(step.arena, &step.model.shape, 1);
    let run = step.begin(inputs, None, sums, None);
    step.take_scratch(&run);
    (run, entry)
}

impl<B: Backend + ?Sized> Step<'_, B> {
    /// The forward pass into the cache: `cached` is false for whole prompts, true for one new token a sequence.
    pub(super) fn forward_cached(&mut self, run: &Run, entry: &Entry, cache: &Cache, cached: bool) -> Result<()> {
        let (heads, scale) = (self.model.shape.heads, self.model.shape.attention_scale());
        let width = heads.key_value * heads.dim;
        self.embed(run);
        for l in 0..self.layers.len() {
            self.check_interrupt()?;
            self.enter_layer(l, run);
            self.qkv(l, run);
            let (layer, (k_cache, v_cache)) = (self.layers[l], cache.layers[l]);
            self.backend.gather_rows(layer.qk, entry.keys, 1, heads.dim, entry.rows);
            self.backend.scatter_rows(entry.rows, entry.slots, width, k_cache);
            self.backend.gather_rows(layer.qkv, entry.values, 1, heads.dim, entry.rows);
            self.backend.scatter_rows(entry.rows, entry.slots, width, v_cache);
            if cached {
                let sequences = run.inputs.size.tokens * cache.capacity * width;
                let caches = (k_cache.slice(0, sequences), v_cache.slice(0, sequences));
                let q = Rows { buffer: layer.qk, stride: self.model.shape.qk() };
                let window = self.model.shape.layers[l].window;
                self.backend.attention_cached(
                    heads,
                    window,
                    scale,
                    q,
                    caches.0,
                    caches.1,
                    cache.capacity,
                    entry.lengths,
                    layer.attention,
                );
            } else {
                self.attend(l, run);
            }
            self.leave_attention(l, run);
            self.mlp(l, run);
        }
        self.final_norm(run);
        Ok(())
    }

    /// Moves a sequence's keys and values to another place.
    pub(super) fn move_sequence(&mut self, cache: &Cache, from: usize, to: usize, tokens: usize) {
        let width = self.model.shape.heads.key_value * self.model.shape.heads.dim;
        for &(k, v) in &cache.layers {
            for buffer in [k, v] {
                let part = |s: usize| buffer.slice(s * cache.capacity * width, tokens * width);
                self.backend.copy(part(from), part(to));
            }
        }
    }
}

/// The index lists of new tokens that go to `slots`.
pub(super) fn upload_entry<B: Backend + ?Sized>(backend: &mut B, entry: &Entry, heads: Heads, slots: &[i32]) {
    let rows = |before: usize, of: usize| -> Vec<i32> {
        (0..slots.len()).flat_map(|t| (0..heads.key_value).map(move |h| (t * of + before + h) as i32)).collect()
    };
    backend.upload(bytemuck::cast_slice(slots), entry.slots);
    let keys = rows(heads.query, heads.query + heads.key_value);
    backend.upload(bytemuck::cast_slice(&keys), entry.keys);
    let values = rows(heads.query + heads.key_value, heads.query + 2 * heads.key_value);
    backend.upload(bytemuck::cast_slice(&values), entry.values);
}
