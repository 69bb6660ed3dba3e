//! Which prompts are generated together and read together, and the memory of that: a dry run, as of a step. Knows lengths
//! alone, so that an engine can have the memory from the start.

use std::ops::Range;
use std::sync::atomic::AtomicBool;

use arl_model::Result;

use super::cache::{Cache, room, sequence_bytes, token_bytes};
use super::prompt::{PartSize, PromptSize};
use crate::backend::plan::PlanBackend;
use crate::model::Model;
use crate::placement::arena::Arena;
use crate::rotary::Tables;
use crate::step::{Generation, Stages, Step};

/// Bytes of what is kept of sequences at a time.
const CACHE_BYTES: usize = 512 << 20;
/// Sequences at a time.
const MAX_SEQUENCES: usize = 256;
/// Tokens of prompts at a time, if no single one is longer.
const PREFILL_TOKENS: usize = 2048;

/// Calls of [`Engine::generate`](crate::Engine::generate) that are expected.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GenerateSize {
    /// The prompts of each call, by their tokens.
    pub prompts: Vec<Vec<usize>>,
    /// New tokens of a reply, at most.
    pub max_new_tokens: usize,
}

/// Prompts that are generated together.
pub(super) struct Group {
    /// Their indexes.
    pub(super) range: Range<usize>,
    /// Tokens that each sequence has room for.
    pub(super) capacity: usize,
    /// Those that are read together.
    pub(super) parts: Vec<Range<usize>>,
    /// What is read at a time.
    sizes: Vec<PartSize>,
    /// Positions that the longest sequence comes to.
    positions: usize,
}

/// The groups of prompts of these sizes.
pub(super) fn groups(model: &Model, prompts: &[PromptSize], max_new_tokens: usize) -> Vec<Group> {
    let (token_bytes, sequence_bytes) = (token_bytes(model), sequence_bytes(model));
    let mut groups = Vec::new();
    let mut first = 0;
    while first < prompts.len() {
        let (mut end, mut longest) = (first, 0);
        while end < prompts.len() && end - first < MAX_SEQUENCES {
            let longer = longest.max(prompts[end].tokens);
            let bytes = (end + 1 - first) * ((longer + max_new_tokens) * token_bytes + sequence_bytes);
            if end > first && bytes > CACHE_BYTES {
                break;
            }
            (end, longest) = (end + 1, longer);
        }
        let parts = prefill_parts(prompts, first..end);
        let sizes = parts.iter().map(|part| PartSize::of(&prompts[part.clone()])).collect();
        let furthest = prompts[first..end].iter().map(|prompt| prompt.next_position).max().unwrap_or(0);
        let (capacity, positions) = (longest + max_new_tokens, longest.max(furthest) + max_new_tokens);
        groups.push(Group { range: first..end, capacity, parts, sizes, positions });
        first = end;
    }
    groups
}

impl Group {
    /// The memory that the group takes, and the positions that rotary tables need.
    pub(super) fn dry_run(&self, model: &Model) -> Result<(Arena, usize)> {
        let (mut dry, tables) = (Arena::new(usize::MAX), Tables::dry(&model.rope));
        let (sequences, mut positions) = (self.range.len(), self.positions);
        model.take_weights(&mut dry);
        let cache = Cache::take(&mut dry, model, sequences, self.capacity);
        let bottom = dry.mark();
        for part in self.sizes.iter().chain([&PartSize::of_new_tokens(sequences)]) {
            let size = part.size;
            positions = positions.max(part.positions);
            let tables = if part.axes { tables } else { tables.one_axis() };
            let mut step = Step {
                backend: &mut PlanBackend::of(model.kind),
                arena: &mut dry,
                model,
                stages: &mut Stages::default(),
                interrupt: &AtomicBool::new(false),
                pending: &mut None,
                ranks: None,
                failure: None,
                planned: 0,
            };
            let (run, new) = room(&mut step, size, size.tokens, (0, false), tables);
            step.see(&run)?;
            step.forward(&run, Some(Generation { caches: &cache.blocks, new: &new }))?;
            let (h, v) = (model.shape.hidden, model.shape.vocab);
            let rows = sequences.min(cache.logits.len / v);
            step.logits(cache.hidden.slice(0, rows * h), rows, cache.logits.slice(0, rows * v))?;
            dry.release(bottom);
        }
        Ok((dry, positions))
    }
}

impl GenerateSize {
    /// The memory of each group of prompts, and its positions.
    pub(crate) fn dry_runs(&self, model: &Model) -> Result<Vec<(Arena, usize)>> {
        // Nothing is computed for a reply without tokens.
        let calls = self.prompts.iter().filter(|_| self.max_new_tokens > 0);
        let sizes = |lengths: &Vec<usize>| lengths.iter().copied().map(PromptSize::of_text).collect::<Vec<_>>();
        let groups = calls.flat_map(|lengths| groups(model, &sizes(lengths), self.max_new_tokens));
        groups.map(|group| group.dry_run(model)).collect()
    }
}

/// Consecutive prompts that are read together.
fn prefill_parts(prompts: &[PromptSize], range: Range<usize>) -> Vec<Range<usize>> {
    let mut parts = Vec::new();
    let (mut start, mut tokens) = (range.start, 0);
    for i in range.clone() {
        if i > start && tokens + prompts[i].tokens > PREFILL_TOKENS {
            parts.push(start..i);
            (start, tokens) = (i, 0);
        }
        tokens += prompts[i].tokens;
    }
    parts.push(start..range.end);
    parts
}
