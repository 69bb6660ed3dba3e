//! The engine: a model's weights, gradients and moments on a device, and the optimizer step over micro-batches.
//! Owns all memory; knows the order of things, and leaves arithmetic to the step and the step's leaves.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use arl_model::{CheckpointFormat, Error, ErrorCode, ExportOverrides, ModelConfig, ModelFiles, Result};

use crate::attention;
use crate::backend::{Backend, DType, Pool, split_master};
use crate::batch::{BatchSize, MicroBatch};
use crate::blocks::Run;
use crate::kept::Kept;
use crate::logits_rows::with_logits_rows;
use crate::loss_scale::LossScale;
use crate::mesh::Axis;
use crate::model::Model;
use crate::options::{Adam, EngineOptions, Hyper, Recompute, Weights};
use crate::placement::arena::Arena;
use crate::placement::store::TrainingStore;
use crate::plan::{MemoryPlan, StepPlan, larger};
use crate::queue::Queue;
use crate::ranks::{Hashes, Ranks};
use crate::rotary::RotaryTables;
use crate::staging::Staging;
use crate::statistics::{Figures, MicroBatchStats, Statistics, weight_of};
use crate::step::{Stages, Step};
use crate::token_slice::{Sliced, Slicing};
use crate::update::{Numbers, Pending, Update};

/// A model on a device.
pub struct Engine<B: Backend + ?Sized> {
    pub(crate) backend: Box<B>,
    pub(crate) config: ModelConfig,
    /// The small files of the folder that it was opened on, as every saved model has them.
    pub(crate) files: ModelFiles,
    /// How that folder holds the weights.
    pub(crate) format: CheckpointFormat,
    pub(crate) model: Model,
    /// What rank 0 computes alone with, where a mesh divides the model.
    pub(crate) whole: Option<Model>,
    pub(crate) adam: Adam,
    pub(crate) arena: Arena,
    pub(crate) stages: Stages,
    pub(crate) staging: Staging,
    /// The rotary embedding's tables on the device.
    pub(crate) tables: RotaryTables,
    pub(crate) plan: StepPlan,
    pub(crate) interrupt: Arc<AtomicBool>,
    /// Why attention is not the library's that it might be; why choices among algorithms are not kept.
    notices: [Option<String>; 2],
    /// Optimizer steps done; those that were skipped are none.
    pub(crate) steps: u64,
    /// Those of them that had images: the vision tower's own.
    pub(crate) vision_steps: u64,
    pub(crate) queue: Queue,
    /// What is left of the last update, for the next forward pass to do.
    pub(crate) pending: Option<Pending>,
    /// Pieces of the offloaded optimizer that stay on the device.
    pub(crate) kept: Kept,
    /// Of the next step; `None` where gradients need none.
    pub(crate) loss_scale: Option<LossScale>,
    /// What the gradients that were computed last are to be divided by.
    pub(crate) gradient_scale: f32,
    /// See [`EngineOptions::rounding_seed`].
    pub(crate) rounding_seed: u64,
    /// The ranks that train with this one; of one, where it trains alone.
    pub(crate) ranks: Ranks,
    /// Of the values that were read when it was opened, where ranks divide weights: they have few others in common.
    pub(crate) loaded: Hashes,
}

impl<B: Backend + ?Sized> Engine<B> {
    /// Reserves all memory and reads the weights of the model in `dir`, or draws them. The folder may be removed
    /// afterwards: what saved models need of it is in memory, but for tensors that are carried, whose files stay mapped.
    pub fn open(backend: Box<B>, dir: &Path, weights: Weights, options: &EngineOptions) -> Result<Self> {
        let mut engine = Self::reserve(backend, ModelFiles::read(dir)?, options)?;
        match weights {
            Weights::Checkpoint => engine.load_checkpoint(dir, false)?,
            Weights::Random(seed) => engine.load_random(seed)?,
            Weights::Restored => engine.load_checkpoint(dir, true)?,
            Weights::Unset => {}
        }
        Ok(engine)
    }

    /// Has every model that is saved from now on describe how it was trained. Returns a sentence for each thing that its
    /// folder says differently from the one that the engine was opened on.
    pub fn describe_export(&mut self, overrides: &ExportOverrides) -> Vec<String> {
        self.files.apply(overrides)
    }

    /// An engine whose memory is reserved and zero.
    pub(crate) fn reserve(mut backend: Box<B>, files: ModelFiles, options: &EngineOptions) -> Result<Self> {
        let config = options.seeing(files.config()?);
        let options = &with_logits_rows(&config, options, backend.kind(), backend.memory()?)?;
        let mut model = Model::new(&config, options, backend.kind())?;
        let attention_notice = if model.attention_library {
            let contexts = model.place.size(Axis::Context);
            attention::settle(options.attention, &mut *backend, &model.blocks, options.max_batch, contexts)?
        } else {
            None
        };
        model.attention_library &= attention_notice.is_none();
        let algorithms = backend.matmul_algorithms().filter(|_| options.matmul_autotune && !options.inference_only);
        let algorithms_notice = algorithms.and_then(|algorithms| algorithms.autotune(options.matmul_cache.as_deref()));
        let whole = model.whole_model(&config, options, backend.kind())?;
        let plan = StepPlan::of(&model, whole.as_ref(), options)?;
        backend.reserve(Pool::State, model.store.bytes)?;
        backend.reserve(Pool::HostState, model.store.host_bytes)?;
        plan.reserve(&mut *backend, &model)?;
        let mut tables = RotaryTables::default();
        tables.reserve(&mut *backend, &model.rope, plan.positions)?;
        zero_gaps(&mut *backend, &model);
        let kept = Kept::reserve(&mut *backend, &model)?;
        Ok(Engine {
            backend,
            format: CheckpointFormat::new(&config),
            files,
            config,
            model,
            whole,
            adam: options.adam,
            arena: Arena::new(plan.bytes()),
            stages: Stages::default(),
            staging: Staging::default(),
            tables,
            plan,
            interrupt: Arc::new(AtomicBool::new(false)),
            notices: [attention_notice, algorithms_notice],
            steps: 0,
            vision_steps: 0,
            queue: Queue::default(),
            pending: None,
            kept,
            loss_scale: LossScale::new(options.dtype, options.loss_scaling)?,
            gradient_scale: 1.0,
            rounding_seed: options.rounding_seed,
            ranks: Ranks::alone(options.place()?),
            loaded: Hashes::default(),
        })
    }

    /// The model's configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The device, for messages.
    pub fn device(&self) -> String {
        self.backend.name()
    }

    /// What a user should know of how the model runs on this device.
    pub fn notice(&self) -> Option<String> {
        let of_sizes = self.backend.kind().notice(self.model.shape.heads, self.model.dtype);
        let all: Vec<String> = of_sizes.into_iter().chain(self.notices.iter().flatten().cloned()).collect();
        (!all.is_empty()).then(|| all.join("; "))
    }

    /// The backend itself; for measurements.
    pub fn backend_mut(&mut self) -> &mut B {
        &mut self.backend
    }

    /// Bytes reserved, by category.
    pub fn memory(&self) -> MemoryPlan {
        let kept = self.model.store.slots.map_or(0, |slots| self.kept.count * slots.kept_bytes());
        MemoryPlan::of(&self.model, &self.plan, self.backend.kind()).with_kept(kept)
    }

    /// Optimizer steps done, of which the host knows.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Set it, and the step in progress ends with `ARL_INTERRUPTED` at the next layer; weights are as before the step.
    /// The step that it ends clears it.
    pub fn interrupt_flag(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.interrupt)
    }

    /// Makes room for micro-batches of `size` and so many positions, `count` of them a step. Nothing happens where there is
    /// room already.
    pub(crate) fn make_room(&mut self, size: BatchSize, positions: usize, count: usize) -> Result<()> {
        if self.plan.holds(size, positions, count) {
            return Ok(());
        }
        let plan = self.plan.grown(&self.model, self.whole.as_ref(), size, positions, count)?;
        self.make_room_for(plan)
    }

    /// Makes room for something else that was found by a dry run, over sequences of so many positions together.
    pub(crate) fn make_room_in(&mut self, dry: Arena, positions: usize) -> Result<()> {
        let enough = dry.peak() <= self.plan.bytes();
        if enough && positions <= self.plan.positions {
            return Ok(());
        }
        let plan = if enough { self.plan.clone() } else { self.plan.with_arena(dry) };
        self.make_room_for(plan.with_positions(positions))
    }

    /// Reserves the memory of a plan. Where that fails there is room for nothing, until there is memory again.
    pub(crate) fn make_room_for(&mut self, plan: StepPlan) -> Result<()> {
        self.give_up_submitted();
        self.give_up_kept()?;
        self.plan = StepPlan::nothing();
        plan.reserve(&mut *self.backend, &self.model)?;
        self.tables.reserve(&mut *self.backend, &self.model.rope, plan.positions)?;
        self.ranks.forget_gathered();
        self.arena = Arena::new(plan.bytes());
        self.plan = plan;
        self.kept = Kept::reserve(&mut *self.backend, self.model.trained())?;
        Ok(())
    }

    /// Empties the step's memory, for something else to be computed in it.
    pub(crate) fn clear_arena(&mut self) {
        self.give_up_submitted();
        self.arena.clear();
        if self.model.whole.is_none() {
            self.ranks.forget_whole();
        }
        self.model.take_weights(&mut self.arena);
    }

    /// The parts of one micro-batch's computation.
    pub(crate) fn parts(&mut self) -> Step<'_, B> {
        Step {
            backend: &mut *self.backend,
            arena: &mut self.arena,
            model: &self.model,
            stages: &mut self.stages,
            interrupt: &self.interrupt,
            pending: &mut self.pending,
            ranks: Some(&mut self.ranks),
            failure: None,
            planned: 0,
        }
    }

    /// Uploads a slice of a micro-batch and takes its memory.
    pub(crate) fn begin(&mut self, batch: Sliced<'_>, keep: Option<Recompute>, figures: Figures) -> Run {
        let (backend, model) = (&mut *self.backend, &self.model);
        let (rope, tower) = (&model.rope, model.tower.as_ref());
        let inputs = self.staging.upload(backend, &mut self.arena, batch, rope, tower, &mut self.tables);
        self.parts().begin(inputs, keep, figures)
    }

    /// Clears the flag once a call has ended by it.
    pub(crate) fn settle_interrupt<T>(&self, result: Result<T>) -> Result<T> {
        if matches!(&result, Err(error) if error.code == ErrorCode::Interrupted) {
            self.interrupt.store(false, Ordering::Relaxed);
        }
        result
    }

    pub(crate) fn training(&self) -> Result<TrainingStore> {
        self.model.store.training.ok_or_else(|| {
            Error::new(ErrorCode::Config, "the engine was opened for inference only, and has no gradients")
        })
    }

    /// Queues the gradients of a step, without the update.
    pub(crate) fn accumulate(&mut self, batches: &[MicroBatch]) -> Result<Statistics> {
        if let Some(sums) = self.training()?.sums {
            let result = self.accumulate_in_order(batches, sums);
            self.ranks.end_together(&mut *self.backend);
            return result.and_then(|statistics| self.add_tied(sums).map(|()| statistics));
        }
        let stats = self.prepare(batches)?;
        let weight = weight_of(&stats)?;
        self.gradient_scale = self.loss_scale.map_or(1.0, |scale| scale.scale());
        let step = self.next_step();
        let sequences: Vec<usize> = batches.iter().map(|batch| batch.size().sequences).collect();
        let figures = self.take_figures(batches.len(), sequences.iter().copied().max().unwrap_or(0));
        let bottom = self.arena.mark();
        let (mut first, mut sees) = (true, false);
        for (i, batch) in batches.iter().enumerate() {
            if stats[i].target_tokens > 0 {
                let own = figures.of(i, batches.len());
                let mut run = self.begin(batch.whole(), Some(self.model.recompute), own);
                (run.loss_scale, run.first) = (self.gradient_scale, first);
                run.dropout = self.model.dropout(step, i, batch.whole().first());
                self.parts().train(&run, weight)?;
                self.parts().sum_sequences(batch.whole(), &run, own.sequence_losses);
                (first, sees) = (false, sees || run.seen.is_some());
                self.arena.release(bottom);
            }
        }
        Ok(Statistics { stats, slices: 1, sequences, figures, sees })
    }

    /// The number of the step whose gradients come next. The one before may be applied and not yet known to have been taken.
    pub(crate) fn next_step(&self) -> u64 {
        self.steps + u64::from(self.queue.applied.is_some()) + 1
    }

    /// Checks all micro-batches, counts their targets and makes room for the largest.
    pub(crate) fn prepare(&mut self, batches: &[MicroBatch]) -> Result<Vec<MicroBatchStats>> {
        let (stats, largest, positions) = self.count(batches, Slicing::WHOLE)?;
        if self.model.attention_library {
            let asked = |batch: &MicroBatch| attention::asked(&self.model.blocks, batch.size(), batch.max_len(), 1);
            self.backend.expect_attention(&batches.iter().flat_map(asked).collect::<Vec<_>>());
        }
        if self.evaluates_one_by_one() {
            self.make_room_to_evaluate(largest, positions)?;
        } else {
            self.make_room(largest, positions, batches.len())?;
        }
        self.clear_arena();
        Ok(stats)
    }

    /// Checks all micro-batches, counts the targets of this rank's slices of them, and finds the size of the largest, and the most
    /// positions of one.
    pub(crate) fn count(
        &self,
        batches: &[MicroBatch],
        slicing: Slicing,
    ) -> Result<(Vec<MicroBatchStats>, BatchSize, usize)> {
        let (mut largest, mut positions) = (BatchSize::default(), 0);
        for (i, batch) in batches.iter().enumerate() {
            self.model.check(i, batch)?;
            largest = larger(largest, batch.size());
            positions = positions.max(batch.positions());
        }
        let stats = batches.iter().map(|batch| Sliced { batch, slicing }.stats()).collect();
        Ok((stats, largest, positions))
    }

    /// Zeroed room for the figures of `count` micro-batches, each of at most `sequences` sequences.
    pub(crate) fn take_figures(&mut self, count: usize, sequences: usize) -> Figures {
        let figures = Figures::take(&mut self.arena, &self.model.shape, count, sequences);
        for buffer in figures.buffers() {
            self.backend.zero(buffer);
        }
        figures
    }

    /// Waits for the statistics.
    pub(crate) fn read_statistics(&mut self, statistics: Statistics) -> Result<Vec<MicroBatchStats>> {
        let mut host = vec![0; statistics.bytes()];
        let mut rest = host.as_mut_slice();
        for buffer in statistics.figures.buffers() {
            let (place, behind) = rest.split_at_mut(buffer.bytes());
            self.backend.read_back(buffer, place)?;
            rest = behind;
        }
        Ok(statistics.complete(&self.model.shape, &host))
    }

    /// AdamW on all trained parameters; on the vision tower's only where the step `sees` an image.
    pub(crate) fn update(&mut self, training: &TrainingStore, hyper: Hyper, sees: bool) -> Result<()> {
        let store = self.model.store;
        // Others may still read, and send, what it is about to update.
        self.ranks.settle_exchanges(&mut *self.backend);
        let numbers = Numbers {
            adam: self.adam,
            hyper,
            step: self.steps + 1,
            vision_step: sees.then_some(self.vision_steps + 1),
            gradient_scale: self.gradient_scale,
            rounding_seed: self.rounding_seed,
        };
        let sums = training.sums.filter(|_| self.model.divides_gradients());
        let update = Update::new(&store, training, sums, self.model.runs.clone(), numbers);
        match store.slots {
            None => update.run(&mut *self.backend),
            Some(slots) => self.pending = Some(Pending::begin(&mut *self.backend, update, slots, &mut self.kept)),
        }
        self.gather_weights()
    }

    /// Does what is left of the last update, and has leaves wait for what others have updated, for callers that read weights or
    /// moments without a forward pass.
    pub(crate) fn complete_update(&mut self) {
        self.complete_pending();
        self.ranks.settle_exchanges(&mut *self.backend);
    }

    /// Does what is left of this rank's own last update.
    pub(crate) fn complete_pending(&mut self) {
        if let Some(mut pending) = self.pending.take() {
            pending.advance(&mut *self.backend, usize::MAX);
        }
    }
}

/// Makes the elements between trained parameters zero. Memory comes zeroed, which as a split master is not a number.
fn zero_gaps<B: Backend + ?Sized>(backend: &mut B, model: &Model) {
    let Some(low) = model.store.masters.filter(|masters| masters.dtype == DType::U16) else { return };
    let (_, zero) = split_master(0.0);
    for gap in model.placement.gaps() {
        for part in model.owned(gap) {
            backend.upload(bytemuck::cast_slice(&vec![zero; part.len]), low.slice(part.own, part.len));
        }
    }
}
