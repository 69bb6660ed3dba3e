//! One micro-batch: the walk over blocks forward and back, the residual stream between them, and the loss, as sequences of
//! leaf calls over any backend. `T` tokens, `H` hidden size.
//!
//! The same code runs against a counting allocator and a backend that does nothing to find the memory it needs.

mod backward;
mod forward;
mod loss;
mod offload;

use std::sync::atomic::{AtomicBool, Ordering};

use arl_model::{Error, ErrorCode, Result};

use crate::backend::{Backend, Buffer, DType, Pool};
use crate::batch::Inputs;
use crate::blocks::{Active, Context, Run, Take};
use crate::events::ACTIVATION_SLOTS;
use crate::model::Model;
use crate::options::Recompute;
use crate::placement::Param;
use crate::placement::arena::{Arena, Category, higher};
use crate::update::Pending;

pub(crate) use forward::Generation;
pub(crate) use loss::LossMode;
pub(crate) use offload::host_bytes;

/// A block at work: the residual stream before it, its norm, and the block with its own buffers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stage {
    /// `[T, H]`: the residual stream before the block.
    pub(crate) x: Buffer,
    norm: Param,
    /// f32 `[T]`.
    inverse_rms: Buffer,
    /// `[T, H]`: the normed stream.
    input: Buffer,
    pub(crate) block: Active,
}

/// The blocks of a micro-batch. Each buffer lies in memory of its own or in scratch that all layers share, as recomputation
/// has it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stages {
    /// In the order of the model's blocks.
    pub(crate) blocks: Vec<Stage>,
    /// The buffers that are kept, in the order in which blocks take them.
    kept: Vec<Buffer>,
}

impl Stages {
    /// Adds the blocks of layer `l`. The residual streams come first, so that those of layers that share scratch are in the same
    /// places or apart.
    fn add(&mut self, model: &Model, l: usize, tokens: usize, take: &mut Take<'_>) {
        let (blocks, stream) = (&model.blocks[model.layers[l].clone()], tokens * model.shape.hidden);
        let level = |b| if b == 0 { Recompute::Block } else { Recompute::Mlp };
        let streams: Vec<Buffer> = (0..blocks.len()).map(|b| take(level(b), model.dtype, stream)).collect();
        for (block, x) in blocks.iter().zip(streams) {
            self.blocks.push(Stage {
                x,
                norm: block.norm,
                inverse_rms: take(Recompute::Mlp, DType::F32, tokens),
                input: take(Recompute::Off, model.dtype, stream),
                block: block.activate(model.dtype, tokens, take),
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
}

/// Whether layer `l` keeps for the backward pass what is last kept at `level`.
fn keeps(model: &Model, keep: Option<Recompute>, l: usize, level: Recompute) -> bool {
    l >= model.lowest_layer && keep.is_some_and(|keep| keep <= level)
}

impl<B: Backend + ?Sized> Step<'_, B> {
    /// Takes the memory that lasts for the whole micro-batch.
    pub(crate) fn begin(
        &mut self,
        inputs: Inputs,
        keep: Option<Recompute>,
        sums: Buffer,
        balance: Option<Buffer>,
    ) -> Run {
        let (model, t) = (self.model, inputs.size.tokens);
        let stream = t * model.shape.hidden;
        // With offloading, the inputs of layers take turns in a few slots.
        let slots = (keep.is_some() && model.activation_offloading)
            .then(|| [(); ACTIVATION_SLOTS].map(|()| self.take(Category::Activations, model.dtype, stream)));
        let mut kept = std::mem::take(&mut self.stages.kept);
        kept.clear();
        let mut unused = Stages::default();
        for l in 0..model.layers.len() {
            unused.add(model, l, t, &mut |level, dtype, len| {
                if !keeps(model, keep, l, level) {
                    return Buffer { pool: Pool::Step, offset: 0, len: 0, dtype };
                }
                let buffer = match slots {
                    Some(slots) if level == Recompute::Block => slots[l % slots.len()],
                    _ => self.take(Category::Activations, dtype, len),
                };
                kept.push(buffer);
                buffer
            });
        }
        self.stages.kept = kept;
        Run {
            inputs,
            keep,
            delta: self.take(Category::Activations, model.dtype, stream),
            final_inverse_rms: self.take(Category::Activations, DType::F32, t),
            final_norm: self.take(Category::Activations, model.dtype, stream),
            sums,
            balance,
            loss_scale: 1.0,
            first: true,
        }
    }

    /// Gives every block its buffers: those that are kept, and scratch that all layers share, on top of the stack: the most
    /// that any one of them needs.
    pub(crate) fn take_scratch(&mut self, run: &Run) {
        let (model, t) = (self.model, run.size().tokens);
        let base = self.arena.mark();
        let (mut top, mut next) = (base, 0);
        let mut stages = std::mem::take(self.stages);
        stages.blocks.clear();
        let kept = std::mem::take(&mut stages.kept);
        for l in 0..model.layers.len() {
            stages.add(model, l, t, &mut |level, dtype, len| {
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

    /// Takes memory whose contents are of no use.
    fn take(&mut self, category: Category, dtype: DType, len: usize) -> Buffer {
        self.context().take(category, dtype, len)
    }

    /// What blocks compute with.
    fn context(&mut self) -> Context<'_, B> {
        Context {
            backend: self.backend,
            arena: self.arena,
            store: &self.model.store,
            dtype: self.model.dtype,
            attention_library: self.model.attention_library,
        }
    }

    /// Forward, loss and backward; gradients are added to, but assigned in the first micro-batch of a step. `weight` is that of
    /// all targets of the step.
    pub(crate) fn train(&mut self, run: &Run, weight: f64) -> Result<()> {
        let result = self.passes(run, (f64::from(run.loss_scale) / weight) as f32);
        if result.is_err() && self.model.activation_offloading {
            // Copies may be on their way; what comes next must not meet them.
            self.backend.read_back(run.sums.slice(0, 0), &mut [])?;
        }
        result
    }

    fn passes(&mut self, run: &Run, scale: f32) -> Result<()> {
        let top = self.arena.mark();
        self.take_scratch(run);
        self.forward(run, None)?;
        self.arena.release(top);
        // Not before: the forward pass may have had the last update to do.
        if let (true, Some(training)) = (run.first, &self.model.store.training) {
            for &(start, len) in &self.model.added {
                self.backend.zero(training.gradients.slice(start, len));
            }
        }

        let (t, h) = (run.size().tokens, self.model.shape.hidden);
        let d_norm = self.take(Category::Workspace, self.model.dtype, t * h);
        self.loss(run, LossMode::Train { scale, d_norm });

        let d_x = self.take(Category::Workspace, self.model.dtype, t * h);
        self.take_scratch(run);
        self.backward(run, d_norm, d_x)?;
        self.arena.release(top);
        Ok(())
    }

    /// Forward and loss.
    pub(crate) fn evaluate(&mut self, run: &Run) -> Result<()> {
        let top = self.arena.mark();
        self.take_scratch(run);
        self.forward(run, None)?;
        self.arena.release(top);
        self.loss(run, LossMode::Evaluate);
        Ok(())
    }

    /// To be called before decayed parameters up to element `end` of the weights' arena, or any others, are used.
    fn update_to(&mut self, end: usize) {
        if let Some(pending) = self.pending
            && pending.advance(self.backend, end)
        {
            *self.pending = None;
        }
    }

    pub(crate) fn check_interrupt(&self) -> Result<()> {
        if self.interrupt.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorCode::Interrupted, "interrupted; the weights are as before the step"));
        }
        Ok(())
    }
}
