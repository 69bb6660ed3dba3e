//! Text from a model: prompts are read packed, as in training; then one token a sequence at a time, against what is kept of
//! those before it. Sequences that end leave the batch at once.

mod cache;
mod plan;
mod sampling;

use arl_model::{Error, ErrorCode, Result};

use crate::backend::Backend;
use crate::batch::BatchSize;
use crate::engine::Engine;
use crate::rotary::Span;
use crate::step::Generation;
use cache::{Cache, room, upload_new};
pub use plan::GenerateSize;
use plan::{Group, groups};
pub use sampling::GenerateOptions;
use sampling::next_token;

/// A sequence that is being generated.
struct Sequence {
    /// Index of its prompt.
    prompt: usize,
    /// Tokens in the cache.
    cached: usize,
    /// The token that comes next.
    next: i32,
}

impl<B: Backend + ?Sized> Engine<B> {
    /// The new tokens of each prompt, without the stop token that ended it.
    pub fn generate(&mut self, prompts: &[Vec<i32>], options: &GenerateOptions) -> Result<Vec<Vec<i32>>> {
        self.generate_streaming(prompts, options, &mut |_, _| {})
    }

    /// As [`generate`](Self::generate); `on_token` receives each new token with its prompt's index as soon as it is chosen.
    pub fn generate_streaming(
        &mut self,
        prompts: &[Vec<i32>],
        options: &GenerateOptions,
        on_token: &mut dyn FnMut(usize, i32),
    ) -> Result<Vec<Vec<i32>>> {
        let result = self.generate_groups(prompts, options, on_token);
        self.settle_interrupt(result)
    }

    fn generate_groups(
        &mut self,
        prompts: &[Vec<i32>],
        options: &GenerateOptions,
        on_token: &mut dyn FnMut(usize, i32),
    ) -> Result<Vec<Vec<i32>>> {
        check(prompts, options, self.model.shape.vocab)?;
        let mut out = vec![Vec::new(); prompts.len()];
        if options.max_new_tokens == 0 {
            return Ok(out);
        }
        let lengths: Vec<usize> = prompts.iter().map(Vec::len).collect();
        for group in groups(&self.model, &lengths, options.max_new_tokens) {
            self.generate_group(prompts, group, options, &mut |prompt, token| {
                out[prompt].push(token);
                on_token(prompt, token);
                out[prompt].len()
            })?;
        }
        Ok(out)
    }

    /// Generates for the prompts of one group together; `push` appends a token to a prompt's reply and returns its length.
    fn generate_group(
        &mut self,
        prompts: &[Vec<i32>],
        group: Group,
        options: &GenerateOptions,
        push: &mut dyn FnMut(usize, i32) -> usize,
    ) -> Result<()> {
        let (dry, positions) = group.dry_run(&self.model)?;
        self.make_room_in(dry, positions)?;
        let Group { range, capacity, parts, .. } = group;
        self.clear_arena();
        self.complete_update();
        let cache = Cache::take(&mut self.arena, &self.model, range.len(), capacity);
        let bottom = self.arena.mark();
        for part in &parts {
            self.prefill(prompts, part.clone(), part.start - range.start, &cache)?;
            self.arena.release(bottom);
        }

        let mut active: Vec<Sequence> =
            range.map(|prompt| Sequence { prompt, cached: prompts[prompt].len(), next: 0 }).collect();
        let mut host = vec![0f32; cache.logits.len];
        loop {
            self.choose(&mut active, &cache, &mut host, options, prompts)?;
            // From the last slot down, so that what moves into a free slot is a sequence that has not ended.
            for slot in (0..active.len()).rev() {
                let sequence = &active[slot];
                let stopped = options.stop_ids.contains(&sequence.next);
                if stopped || push(sequence.prompt, sequence.next) == options.max_new_tokens {
                    active.swap_remove(slot);
                    if slot < active.len() {
                        let (from, tokens) = (active.len(), active[slot].cached);
                        self.parts().move_sequence(&cache, from, slot, tokens);
                    }
                }
            }
            if active.is_empty() {
                return Ok(());
            }
            self.decode(&mut active, &cache)?;
            self.arena.release(bottom);
        }
    }

    /// Reads prompts into the cache, from slot `slot` on, and leaves the head's input for each one's next token.
    fn prefill(
        &mut self,
        prompts: &[Vec<i32>],
        part: std::ops::Range<usize>,
        slot: usize,
        cache: &Cache,
    ) -> Result<()> {
        let (heads, h) = (self.model.shape.heads, self.model.shape.hidden);
        let prompts = &prompts[part];
        let tokens: usize = prompts.iter().map(Vec::len).sum();
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
        let spans: Vec<Span> =
            prompts.iter().map(|prompt| Span { sequence_len: prompt.len(), positions: 0..prompt.len() }).collect();
        let (tables, offsets) = self.tables.provide(&mut *self.backend, &self.model.rope, &spans);
        let mut step = self.parts();
        let size = BatchSize { tokens, sequences: prompts.len(), ..BatchSize::default() };
        let (run, new) = room(&mut step, size, longest, (slot, false), tables);

        let mut cu_seqlens = vec![0i32];
        let (mut slots, mut last) = (Vec::with_capacity(tokens), Vec::with_capacity(prompts.len()));
        let mut angle_rows = Vec::with_capacity(tokens);
        for (i, (prompt, offset)) in prompts.iter().zip(offsets).enumerate() {
            let first = (slot + i) * cache.capacity;
            slots.extend((first..first + prompt.len()).map(|s| s as i32));
            angle_rows.extend((0..prompt.len()).map(|position| (position as isize + offset) as i32));
            cu_seqlens.push(slots.len() as i32);
            last.push(slots.len() as i32 - 1);
        }
        let backend = &mut *self.backend;
        let ids: Vec<i32> = prompts.concat();
        backend.upload(bytemuck::cast_slice(&ids), run.inputs.ids);
        backend.upload(bytemuck::cast_slice(&angle_rows), run.inputs.angles.rows);
        backend.upload(bytemuck::cast_slice(&cu_seqlens), run.inputs.sequences.cu_seqlens);
        upload_new(backend, &new, heads, &slots);
        self.parts().forward(&run, Some(Generation { caches: &cache.blocks, new: &new }))?;
        // The rows of the prompts' last tokens; the slots are not needed any more.
        let rows = new.slots.slice(0, last.len());
        self.backend.upload(bytemuck::cast_slice(&last), rows);
        let hidden = cache.hidden.slice(slot * h, last.len() * h);
        self.backend.gather_rows(run.final_norm, rows, 1, h, hidden);
        Ok(())
    }

    /// Reads each sequence's next token into the cache.
    fn decode(&mut self, active: &mut [Sequence], cache: &Cache) -> Result<()> {
        let (heads, h, n) = (self.model.shape.heads, self.model.shape.hidden, active.len());
        let spans: Vec<Span> =
            active.iter().map(|s| Span { sequence_len: s.cached + 1, positions: s.cached..s.cached + 1 }).collect();
        let (tables, offsets) = self.tables.provide(&mut *self.backend, &self.model.rope, &spans);
        let mut step = self.parts();
        let (run, new) = room(&mut step, BatchSize { tokens: n, sequences: n, ..BatchSize::default() }, 1, (0, true), tables);
        let ids: Vec<i32> = active.iter().map(|s| s.next).collect();
        let slots: Vec<i32> = active.iter().enumerate().map(|(i, s)| (i * cache.capacity + s.cached) as i32).collect();
        let lengths: Vec<i32> = active.iter().map(|s| s.cached as i32 + 1).collect();
        let angle_rows: Vec<i32> =
            active.iter().zip(offsets).map(|(s, offset)| (s.cached as isize + offset) as i32).collect();
        active.iter_mut().for_each(|sequence| sequence.cached += 1);
        let backend = &mut *self.backend;
        backend.upload(bytemuck::cast_slice(&ids), run.inputs.ids);
        backend.upload(bytemuck::cast_slice(&angle_rows), run.inputs.angles.rows);
        backend.upload(bytemuck::cast_slice(&lengths), new.lengths);
        upload_new(backend, &new, heads, &slots);
        self.parts().forward(&run, Some(Generation { caches: &cache.blocks, new: &new }))?;
        self.backend.copy(run.final_norm, cache.hidden.slice(0, n * h));
        Ok(())
    }

    /// Logits of every sequence, and the token that follows from them.
    fn choose(
        &mut self,
        active: &mut [Sequence],
        cache: &Cache,
        host: &mut [f32],
        options: &GenerateOptions,
        prompts: &[Vec<i32>],
    ) -> Result<()> {
        let (h, v) = (self.model.shape.hidden, self.model.shape.vocab);
        let rows = cache.logits.len / v;
        for (chunk, sequences) in active.chunks_mut(rows).enumerate() {
            let n = sequences.len();
            let (logits, host) = (cache.logits.slice(0, n * v), &mut host[..n * v]);
            let mut step = self.parts();
            step.logits(cache.hidden.slice(chunk * rows * h, n * h), n, logits);
            step.backend.read_back(logits, bytemuck::cast_slice_mut(host))?;
            for (sequence, logits) in sequences.iter_mut().zip(host.chunks_exact(v)) {
                let place = sequence.cached - prompts[sequence.prompt].len();
                sequence.next = next_token(logits, options, sequence.prompt, place);
            }
        }
        Ok(())
    }
}

fn check(prompts: &[Vec<i32>], options: &GenerateOptions, vocab: usize) -> Result<()> {
    if !(options.temperature >= 0.0 && options.temperature.is_finite()) {
        let message = format!("the temperature is {}; it must be finite and at least 0", options.temperature);
        return Err(Error::new(ErrorCode::Config, message));
    }
    if !(options.top_p > 0.0 && options.top_p <= 1.0) {
        let message = format!("top_p is {}; it must be above 0 and at most 1", options.top_p);
        return Err(Error::new(ErrorCode::Config, message));
    }
    for (i, prompt) in prompts.iter().enumerate() {
        if prompt.is_empty() {
            return Err(Error::new(ErrorCode::Data, format!("prompt {i} has no tokens")));
        }
        if let Some(id) = prompt.iter().find(|&&id| id < 0 || id as usize >= vocab) {
            let message = format!("prompt {i} has id {id}, the vocabulary has {vocab}");
            return Err(Error::new(ErrorCode::Data, message).hint("the tokenizer does not belong to this model"));
        }
    }
    Ok(())
}
