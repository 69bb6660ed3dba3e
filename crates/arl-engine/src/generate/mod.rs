//! Text from a model: prompts are read packed, as in training; then one token a sequence at a time, against what is kept of
//! those before it. Sequences that end leave the batch at once.

mod cache;
mod plan;
mod prompt;
mod sampling;

use arl_model::{Error, ErrorCode, Result};

use crate::backend::Backend;
use crate::engine::Engine;
use crate::rotary::Span;
use crate::step::Generation;
use cache::{Cache, room, upload_new};
pub use plan::GenerateSize;
use plan::{Group, groups};
pub use prompt::Prompt;
use prompt::{PartSize, PromptSize, joined};
pub use sampling::GenerateOptions;
use sampling::next_token;

/// A sequence that is being generated.
struct Sequence {
    /// Index of its prompt.
    prompt: usize,
    /// Tokens in the cache.
    cached: usize,
    /// What is added to the number of a token to give its position: an image's tokens share theirs.
    shift: isize,
    /// The token that comes next.
    next: i32,
}

impl<B: Backend + ?Sized> Engine<B> {
    /// The new tokens of each prompt, without the stop token that ended it.
    pub fn generate(&mut self, prompts: &[Vec<i32>], options: &GenerateOptions) -> Result<Vec<Vec<i32>>> {
        let prompts: Vec<Prompt> = prompts.iter().cloned().map(Prompt::from).collect();
        self.generate_streaming(&prompts, options, &mut |_, _| {})
    }

    /// As [`generate`](Self::generate), to prompts that may have images; `on_token` receives each new token with its prompt's index as soon as it is chosen.
    pub fn generate_streaming(
        &mut self,
        prompts: &[Prompt],
        options: &GenerateOptions,
        on_token: &mut dyn FnMut(usize, i32),
    ) -> Result<Vec<Vec<i32>>> {
        self.alone("generation", |engine| {
            let result = engine.generate_groups(prompts, options, on_token);
            engine.settle_interrupt(result)
        })
    }

    fn generate_groups(
        &mut self,
        prompts: &[Prompt],
        options: &GenerateOptions,
        on_token: &mut dyn FnMut(usize, i32),
    ) -> Result<Vec<Vec<i32>>> {
        check(options)?;
        prompts.iter().enumerate().try_for_each(|(i, prompt)| prompt.check(i, &self.model))?;
        let mut out = vec![Vec::new(); prompts.len()];
        if options.max_new_tokens == 0 {
            return Ok(out);
        }
        let sizes: Vec<PromptSize> = prompts.iter().map(Prompt::size).collect();
        for group in groups(&self.model, &sizes, options.max_new_tokens) {
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
        prompts: &[Prompt],
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

        let sequence = |prompt: usize| {
            let PromptSize { tokens, next_position, .. } = prompts[prompt].size();
            Sequence { prompt, cached: tokens, shift: next_position as isize - tokens as isize, next: 0 }
        };
        let mut active: Vec<Sequence> = range.map(sequence).collect();
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
    fn prefill(&mut self, prompts: &[Prompt], part: std::ops::Range<usize>, slot: usize, cache: &Cache) -> Result<()> {
        let (heads, h) = (self.model.shape.heads, self.model.shape.hidden);
        let batch = joined(&prompts[part]);
        let spans: Vec<Span> = batch.spans().collect();
        let (tables, offsets) = self.tables.provide(&mut *self.backend, &self.model.rope, &spans);
        let one_axis = batch.positions.len() == batch.input_ids.len();
        let tables = if one_axis { tables.one_axis() } else { tables };
        let mut step = self.parts();
        let (mut run, new) = room(&mut step, batch.size(), batch.max_len(), (slot, false), tables);

        let (mut slots, mut last, mut angle_rows) = (Vec::new(), Vec::new(), Vec::new());
        for (i, ends) in batch.cu_seqlens.windows(2).enumerate() {
            let first = ((slot + i) * cache.capacity) as i32;
            slots.extend(first..first + ends[1] - ends[0]);
            last.push(ends[1] - 1);
        }
        batch.angle_rows(&offsets, &mut angle_rows);
        let backend = &mut *self.backend;
        backend.upload(bytemuck::cast_slice(&batch.input_ids), run.inputs.ids);
        backend.upload(bytemuck::cast_slice(&angle_rows), run.inputs.angles.rows);
        backend.upload(bytemuck::cast_slice(&batch.cu_seqlens), run.inputs.sequences.cu_seqlens);
        run.inputs.upload_images(backend, &batch, self.model.tower.as_ref(), &(0..batch.input_ids.len()));
        upload_new(backend, &new, heads, &slots);
        self.parts().see(&run)?;
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
        let position = |s: &Sequence| s.cached.wrapping_add_signed(s.shift);
        let span = |s: &Sequence| Span { sequence_len: s.cached + 1, positions: position(s)..position(s) + 1 };
        let spans: Vec<Span> = active.iter().map(span).collect();
        let (tables, offsets) = self.tables.provide(&mut *self.backend, &self.model.rope, &spans);
        let mut step = self.parts();
        let (run, new) = room(&mut step, PartSize::of_new_tokens(n).size, 1, (0, true), tables.one_axis());
        let ids: Vec<i32> = active.iter().map(|s| s.next).collect();
        let slots: Vec<i32> = active.iter().enumerate().map(|(i, s)| (i * cache.capacity + s.cached) as i32).collect();
        let lengths: Vec<i32> = active.iter().map(|s| s.cached as i32 + 1).collect();
        let angle_rows: Vec<i32> =
            active.iter().zip(offsets).map(|(s, offset)| (position(s) as isize + offset) as i32).collect();
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
        prompts: &[Prompt],
    ) -> Result<()> {
        let (h, v) = (self.model.shape.hidden, self.model.shape.vocab);
        let rows = cache.logits.len / v;
        for (chunk, sequences) in active.chunks_mut(rows).enumerate() {
            let n = sequences.len();
            let (logits, host) = (cache.logits.slice(0, n * v), &mut host[..n * v]);
            let mut step = self.parts();
            step.logits(cache.hidden.slice(chunk * rows * h, n * h), n, logits)?;
            step.backend.read_back(logits, bytemuck::cast_slice_mut(host))?;
            for (sequence, logits) in sequences.iter_mut().zip(host.chunks_exact(v)) {
                let place = sequence.cached - prompts[sequence.prompt].input_ids.len();
                sequence.next = next_token(logits, options, sequence.prompt, place);
            }
        }
        Ok(())
    }
}

fn check(options: &GenerateOptions) -> Result<()> {
    if !(options.temperature >= 0.0 && options.temperature.is_finite()) {
        let message = format!("the temperature is {}; it must be finite and at least 0", options.temperature);
        return Err(Error::new(ErrorCode::Config, message));
    }
    if !(options.top_p > 0.0 && options.top_p <= 1.0) {
        let message = format!("top_p is {}; it must be above 0 and at most 1", options.top_p);
        return Err(Error::new(ErrorCode::Config, message));
    }
    Ok(())
}
