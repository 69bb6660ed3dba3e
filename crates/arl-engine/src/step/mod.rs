//! One micro-batch: the walk over blocks forward and back, the residual stream between them, and the loss, as sequences of
//! leaf calls over any backend. `T` tokens, `H` hidden size.
//!
//! The same code runs against a counting allocator and a backend that does nothing to find the memory it needs.

mod backward;
mod forward;
mod loss;
mod offload;
mod serve;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use arl_model::{Error, ErrorCode, Result};

use crate::backend::{Backend, Buffer, DType, Pool};
use crate::batch::Inputs;
use crate::blocks::{Active, Context, LowRankDropout, Run, Take};
use crate::events::ACTIVATION_SLOTS;
use crate::mesh::Axis;
use crate::model::Model;
use crate::options::Recompute;
use crate::placement::Param;
use crate::placement::arena::{Arena, Category, higher};
use crate::placement::cut::Complete;
use crate::placement::shards::Part;
use crate::ranks::Ranks;
use crate::statistics::Figures;
use crate::update::Pending;

pub(crate) use forward::Generation;
pub(crate) use loss::LossMode;
pub(crate) use offload::host_bytes;

/// The place of a buffer that is taken later.
const NOWHERE: Buffer = Buffer { pool: Pool::Step, offset: 0, len: 0, dtype: DType::F32 };

/// A block at work: the norm before it, and the block with its own buffers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stage {
    norm: Param,
    /// f32 `[T]`.
    inverse_rms: Buffer,
    /// `[T, H]`: the normed stream.
    input: Buffer,
    pub(crate) block: Active,
}

/// The blocks of a micro-batch. Each buffer has memory of its own or is in scratch that all layers share, depending on the level
/// of recomputation.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stages {
    /// `[T, H]`: the residual stream before each block.
    pub(crate) streams: Vec<Buffer>,
    /// In the order of the model's blocks.
    pub(crate) blocks: Vec<Stage>,
    /// The other buffers that are kept, in the order in which blocks take them.
    kept: Vec<Buffer>,
    /// What the parts of the tower keep, in the order in which they take it.
    pub(crate) seen: Vec<Buffer>,
    /// Of the micro-batch's adapters.
    dropout: Option<LowRankDropout>,
}

impl Stages {
    /// Adds the blocks of layer `l`, for so many tokens; `of_all`: of all ranks together that divide experts.
    fn add(&mut self, model: &Model, l: usize, tokens: usize, of_all: usize, take: &mut Take<'_>) {
        for block in &model.blocks[model.layers[l].clone()] {
            self.blocks.push(Stage {
                norm: block.norm,
                inverse_rms: take(Recompute::Mlp, DType::F32, tokens),
                input: take(Recompute::Off, model.dtype, tokens * model.shape.hidden),
                block: block.activate(model.dtype, tokens, of_all, take),
            });
        }
    }
}

/// One micro-batch in progress.
pub(crate) struct Step<'a, B: ?Sized> {
    pub(crate) backend: &'a mut B,
    pub(crate) arena: &'a mut Arena,
    pub(crate) model: &'a Model,
    pub(crate) stages: &'a mut Stages,
    pub(crate) interrupt: &'a AtomicBool,
    /// What is left of the last update.
    pub(crate) pending: &'a mut Option<Pending>,
    /// The ranks that train with this one; none in a dry run.
    pub(crate) ranks: Option<&'a mut Ranks>,
    /// The first failure of an exchange with them.
    pub(crate) failure: Option<Error>,
    /// Bytes that a dry run would have exchanged with them.
    pub(crate) planned: u64,
}

/// Whether layer `l` keeps for the backward pass what is last kept at `level`.
fn keeps(model: &Model, keep: Option<Recompute>, l: usize, level: Recompute) -> bool {
    l >= model.lowest_layer && keep.is_some_and(|keep| keep <= level)
}

/// Whether the residual stream before block `b` is kept: a layer's input at every level.
fn keeps_stream(model: &Model, keep: Option<Recompute>, b: usize) -> bool {
    let l = model.blocks[b].layer;
    let level = if b == model.layers[l].start { Recompute::Block } else { Recompute::Mlp };
    keeps(model, keep, l, level)
}

impl<B: Backend + ?Sized> Step<'_, B> {
    /// Takes the memory that lasts for the whole micro-batch.
    pub(crate) fn begin(&mut self, inputs: Inputs, keep: Option<Recompute>, figures: Figures) -> Run {
        let (model, t) = (self.model, inputs.size.tokens);
        let stream = t * model.shape.hidden;
        // With offloading, the inputs of layers take turns in a few slots.
        let slots = (keep.is_some() && model.activation_offloading)
            .then(|| [(); ACTIVATION_SLOTS].map(|()| self.take(Category::Activations, model.dtype, stream)));
        self.stages.dropout = None;
        self.stages.streams.clear();
        for (b, block) in model.blocks.iter().enumerate() {
            let place = match slots {
                _ if !keeps_stream(model, keep, b) => NOWHERE,
                Some(slots) if b == model.layers[block.layer].start => slots[block.layer % slots.len()],
                _ => self.take(Category::Activations, model.dtype, stream),
            };
            self.stages.streams.push(place);
        }
        let (mut unused, mut kept, of_all) = (Stages::default(), Vec::new(), self.tokens_of_all(t));
        for l in 0..model.layers.len() {
            unused.add(model, l, t, of_all, &mut |level, dtype, len| {
                if keeps(model, keep, l, level) {
                    kept.push(self.take(Category::Activations, dtype, len));
                }
                NOWHERE
            });
        }
        self.stages.kept = kept;
        let seen = self.begin_seeing(&inputs, keep);
        // The head's input, of a stage that has a head.
        let (ends, end) = if model.place.is_last_stage() { (t, stream) } else { (0, 0) };
        Run {
            inputs,
            seen,
            keep,
            delta: self.take(Category::Activations, model.dtype, stream),
            final_inverse_rms: self.take(Category::Activations, DType::F32, ends),
            final_norm: self.take(Category::Activations, model.dtype, end),
            sums: figures.sums,
            balance: figures.balances,
            loss_scale: 1.0,
            dropout: None,
            passed: None,
            first: true,
        }
    }

    /// Gives every block its buffers: those that are kept, and scratch that all layers share, on top of the stack: the most
    /// that any one of them needs.
    pub(crate) fn take_scratch(&mut self, run: &Run) {
        let (model, t) = (self.model, run.size().tokens);
        let of_all = self.tokens_of_all(t);
        let mut stages = std::mem::take(self.stages);
        // A layer's first block reads the stream before the last one of the layer below: what is computed with it is elsewhere.
        let passing = |blocks: &Range<usize>| blocks.clone().filter(|b| !keeps_stream(model, run.keep, *b));
        let most = model.layers.iter().map(|blocks| passing(blocks).count()).max().unwrap_or(0);
        let stream = t * model.shape.hidden;
        let shared: Vec<Buffer> = (0..most).map(|_| self.take(Category::Workspace, model.dtype, stream)).collect();
        for blocks in &model.layers {
            passing(blocks).zip(&shared).for_each(|(b, place)| stages.streams[b] = *place);
        }
        let base = self.arena.mark();
        let (mut top, mut next) = (base, 0);
        stages.blocks.clear();
        let kept = std::mem::take(&mut stages.kept);
        for l in 0..model.layers.len() {
            stages.add(model, l, t, of_all, &mut |level, dtype, len| {
                if !keeps(model, run.keep, l, level) {
                    return self.take(Category::Workspace, dtype, len);
                }
                next += 1;
                kept[next - 1]
            });
            top = higher(top, self.arena.mark());
            self.arena.release(base);
        }
        self.arena.release(top);
        *self.stages = Stages { kept, ..stages };
    }

    /// Tokens of all ranks together that divide experts, where this one has `own`; a dry run has them have equally many.
    fn tokens_of_all(&self, own: usize) -> usize {
        let ranks = self.model.place.size(Axis::Expert);
        self.ranks.as_ref().filter(|_| ranks > 1).map_or(ranks * own, |all| all.round_tokens)
    }

    /// Takes memory whose contents are of no use.
    pub(crate) fn take(&mut self, category: Category, dtype: DType, len: usize) -> Buffer {
        self.context().take(category, dtype, len)
    }

    /// What blocks compute with.
    pub(crate) fn context(&mut self) -> Context<'_, B> {
        Context {
            backend: self.backend,
            arena: self.arena,
            store: &self.model.store,
            quantized: &self.model.placement.quantized,
            place: &self.model.place,
            ranks: self.ranks.as_deref_mut(),
            failure: &mut self.failure,
            planned: &mut self.planned,
            dtype: self.model.dtype,
            norm_offset: self.model.shape.norm_offset,
            attention_library: self.model.attention_library,
            dropout: self.stages.dropout,
        }
    }

    /// Forward, loss and backward; gradients are added to, but assigned in the first micro-batch of a step. `weight` is that of
    /// all targets of the step.
    pub(crate) fn train(&mut self, run: &Run, weight: f64) -> Result<()> {
        let result = self.passes(run, (f64::from(run.loss_scale) / weight) as f32);
        if result.is_err() && self.model.activation_offloading {
            // Copies may still run; what comes next must not meet them.
            self.backend.read_back(run.sums.slice(0, 0), &mut [])?;
        }
        result
    }

    /// Drops in adapters' inputs what a micro-batch drops, until another one begins.
    pub(crate) fn use_dropout(&mut self, run: &Run) {
        self.stages.dropout = run.dropout;
    }

    fn passes(&mut self, run: &Run, scale: f32) -> Result<()> {
        let top = self.arena.mark();
        self.use_dropout(run);
        self.see(run)?;
        self.take_scratch(run);
        self.forward(run, None)?;
        self.arena.release(top);
        // Not before: the forward pass may have completed the last update, which reads gradients.
        self.clear_added(run, Complete::Loss);

        let (t, h) = (run.size().tokens, self.model.shape.hidden);
        let d_norm = self.take(Category::Workspace, self.model.dtype, t * h);
        if self.model.place.is_last_stage() {
            self.add_balances(run);
            self.loss(run, LossMode::Train { scale, d_norm })?;
        } else {
            self.take_balance(run);
        }
        self.collect(Complete::Loss)?;

        let d_x = match run.passed {
            Some(passed) => passed.link.stream,
            None => self.take(Category::Workspace, self.model.dtype, t * h),
        };
        self.take_scratch(run);
        self.backward(run, d_norm, d_x)?;
        self.arena.release(top);
        self.see_backward(run)?;
        self.check_exchanges()?;
        self.collect(Complete::End)
    }

    /// Adds up what the routers of all slices of a micro-batch chose: the balance loss is of the whole.
    fn add_balances(&mut self, run: &Run) {
        if let Some(balance) = run.balance.filter(|_| run.inputs.is_slice()) {
            self.context().sum_over(Axis::Tokens, balance);
        }
    }

    /// Zeroes what the backward pass only ever adds to from here on, where a step's gradients begin with this micro-batch.
    fn clear_added(&mut self, run: &Run, before: Complete) {
        if let Some(ranks) = &mut self.ranks {
            ranks.claim_gradients(self.backend, self.model, before);
        }
        let Some(training) = self.model.store.training.filter(|_| run.first) else { return };
        for added in self.model.added.iter().filter(|added| added.before == before) {
            self.backend.zero(training.gradients.slice(added.first, added.len));
        }
    }

    /// Adds the gradients that are complete to their sums, where ranks divide these: their place is needed for others.
    pub(crate) fn collect(&mut self, complete: Complete) -> Result<()> {
        let Some(ranks) = &mut self.ranks else { return Ok(()) };
        ranks.collect(self.backend, self.model, complete)
    }

    /// Forward and loss.
    pub(crate) fn evaluate(&mut self, run: &Run) -> Result<()> {
        self.see(run)?;
        let top = self.arena.mark();
        self.take_scratch(run);
        self.forward(run, None)?;
        self.arena.release(top);
        self.loss(run, LossMode::Evaluate)
    }

    /// Called before the weights of a part are used: gathers them, where ranks divide weights. What it is called for is what
    /// [`Model::turns`] lists.
    pub(crate) fn need(&mut self, part: Part) -> Result<()> {
        let Some(ranks) = &mut self.ranks else { return Ok(()) };
        ranks.need(self.backend, self.model, part)
    }

    /// Called before the tower's weights would be used, also where this micro-batch has no images and another of its round may.
    pub(crate) fn need_tower(&mut self, run: &Run) -> Result<()> {
        let own = run.seen.is_some();
        if self.ranks.as_ref().is_some_and(|ranks| ranks.sees(own)) { self.need(Part::Tower) } else { Ok(()) }
    }

    /// Called before decayed parameters up to element `end` of the weights' arena, or any others, are used.
    pub(crate) fn update_to(&mut self, end: usize) {
        if let Some(pending) = self.pending
            && pending.advance(self.backend, end)
        {
            *self.pending = None;
        }
    }

    /// Fails where an exchange between ranks has failed since it was called last.
    pub(crate) fn check_exchanges(&mut self) -> Result<()> {
        self.failure.take().map_or(Ok(()), Err)
    }

    pub(crate) fn check_interrupt(&self) -> Result<()> {
        if self.interrupt.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorCode::Interrupted, "interrupted; the weights are as before the step"));
        }
        Ok(())
    }
}
