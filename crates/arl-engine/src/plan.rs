//! The memory plan: a dry run of the very step against a backend that computes nothing.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use arl_model::{Error, ErrorCode, ModelConfig, Result};

use crate::backend::plan::PlanBackend;
use crate::backend::{Backend, DType, DeviceKind, Pool};
use crate::batch::{BatchSize, Inputs};
use crate::generate::GenerateSize;
use crate::model::Model;
use crate::options::EngineOptions;
use crate::pipeline_parallel::Passing;
use crate::placement::arena::{Arena, Category};
use crate::rotary::{Tables, table_bytes};
use crate::statistics::Figures;
use crate::step::{Stages, Step, host_bytes};
use crate::token_slice::Slicing;

/// Micro-batches of a step for whose statistics room is reserved from the start.
pub(crate) const MICRO_BATCHES: usize = 64;

/// Bytes by category.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Name and bytes of each category on the device that is not empty.
    pub categories: Vec<(&'static str, usize)>,
    /// All of them.
    pub total_bytes: usize,
    /// Name and bytes of what is offloaded to host memory.
    pub host_categories: Vec<(&'static str, usize)>,
    /// All of them.
    pub host_bytes: usize,
}

/// The memory that a step over micro-batches of a size needs at its highest point.
#[derive(Clone, Debug)]
pub(crate) struct StepPlan {
    pub(crate) size: BatchSize,
    /// The step has room for slices of micro-batches of `size` alone, or for a part of the model.
    partial: bool,
    /// Of micro-batches of which the loss alone is computed; those of `size` have room too.
    evaluation: BatchSize,
    pub(crate) micro_batches: usize,
    /// Positions of all sequences together: for the rotary embedding's tables.
    pub(crate) positions: usize,
    arena: Arena,
    /// Of the inputs of layers that wait in host memory.
    host_bytes: usize,
}

impl StepPlan {
    /// Runs the step dry. Every position counts as a target: then it needs most.
    pub(crate) fn new(model: &Model, size: BatchSize, micro_batches: usize) -> Result<Self> {
        let size = at_least_one(size);
        let training = model.store.training.is_some();
        let slicing = if training { Slicing::of(&model.place) } else { Slicing::WHOLE };
        let (arena, _) = dry_run(model, (size, slicing), micro_batches, training)?;
        let offloading = model.activation_offloading && model.store.training.is_some();
        let input_bytes =
            if offloading { slicing.own(size.tokens) * model.shape.hidden * model.dtype.bytes() } else { 0 };
        let host_bytes = host_bytes(model.own_layers.end.saturating_sub(model.lowest_layer), input_bytes);
        Ok(StepPlan {
            size,
            partial: slicing.divides() || model.place.mesh.divides_model(),
            evaluation: BatchSize::default(),
            micro_batches,
            positions: size.tokens,
            arena,
            host_bytes,
        })
    }

    /// The plan, with room for the loss alone of micro-batches of `size` too; of no tokens: as it is.
    pub(crate) fn with_evaluation(self, model: &Model, size: BatchSize) -> Result<Self> {
        if size.tokens == 0 {
            return Ok(self);
        }
        let evaluation = at_least_one(size);
        let (arena, _) = dry_run(model, (evaluation, Slicing::WHOLE), 1, false)?;
        let arena = if arena.peak() > self.arena.peak() { arena } else { self.arena };
        Ok(StepPlan { evaluation, positions: self.positions.max(evaluation.tokens), arena, ..self })
    }

    /// The plan, with room for replies that are generated too.
    pub(crate) fn with_generation(mut self, model: &Model, size: &GenerateSize) -> Result<Self> {
        for (arena, positions) in size.dry_runs(model)? {
            self.positions = self.positions.max(positions);
            if arena.peak() > self.arena.peak() {
                self.arena = arena;
            }
        }
        Ok(self)
    }

    /// The plan of an engine with these options. `whole`: what rank 0 computes alone with, where a mesh divides the model.
    pub(crate) fn of(model: &Model, whole: Option<&Model>, options: &EngineOptions) -> Result<Self> {
        let plan = StepPlan::new(model, options.max_batch, MICRO_BATCHES)?;
        let Some(alone) = alone(model, whole) else { return Ok(plan) };
        plan.with_evaluation(alone, options.eval_batch)?.with_generation(alone, &options.generate)
    }

    /// The plan of an engine that has no memory.
    pub(crate) fn nothing() -> Self {
        let nothing = BatchSize::default();
        StepPlan {
            size: nothing,
            partial: false,
            evaluation: nothing,
            micro_batches: 0,
            positions: 0,
            arena: Arena::new(0),
            host_bytes: 0,
        }
    }

    /// A plan that was found by another dry run, for the same micro-batches.
    pub(crate) fn with_arena(&self, arena: Arena) -> Self {
        StepPlan { arena, ..self.clone() }
    }

    /// The plan for no fewer positions than `positions`.
    pub(crate) fn with_positions(self, positions: usize) -> Self {
        StepPlan { positions: positions.max(self.positions), ..self }
    }

    /// Bytes of the pool.
    pub(crate) fn bytes(&self) -> usize {
        self.arena.peak()
    }

    /// Reserves what a step needs.
    pub(crate) fn reserve<B: Backend + ?Sized>(&self, backend: &mut B, model: &Model) -> Result<()> {
        backend.reserve(Pool::Scratch, backend.scratch_bytes(model.shape.widest(), self.rows()))?;
        backend.reserve(Pool::Step, self.bytes())?;
        backend.reserve(Pool::HostStep, self.host_bytes)
    }

    /// Rows of the largest micro-batch: tokens or patches.
    fn rows(&self) -> usize {
        let rows = |size: BatchSize| size.tokens.max(size.patches);
        rows(self.size).max(rows(self.evaluation))
    }

    /// Whether there is room for `count` micro-batches of `size` and so many positions.
    pub(crate) fn holds(&self, size: BatchSize, positions: usize, count: usize) -> bool {
        fits(size, self.size) && positions <= self.positions && count <= self.micro_batches
    }

    /// Whether there is room for the loss alone of a micro-batch of `size` and so many positions.
    pub(crate) fn holds_evaluation(&self, size: BatchSize, positions: usize) -> bool {
        !self.partial && self.holds(size, positions, 1) || fits(size, self.evaluation) && positions <= self.positions
    }

    /// The plan of a step that holds both this one's and `count` micro-batches of `size` and so many positions.
    pub(crate) fn grown(
        &self,
        model: &Model,
        whole: Option<&Model>,
        size: BatchSize,
        positions: usize,
        count: usize,
    ) -> Result<Self> {
        let mut plan = StepPlan::new(model, larger(size, self.size), self.micro_batches.max(count))?;
        if let Some(alone) = alone(model, whole) {
            plan = plan.with_evaluation(alone, self.evaluation)?;
        }
        Ok(plan.with_positions(positions.max(self.positions)))
    }

    /// The plan with room for the loss alone of a micro-batch of `size` and so many positions.
    pub(crate) fn grown_evaluation(&self, model: &Model, size: BatchSize, positions: usize) -> Result<Self> {
        let plan = self.clone().with_evaluation(model, larger(size, self.evaluation))?;
        Ok(plan.with_positions(positions))
    }
}

/// What this rank computes alone with; none: it computes nothing alone.
fn alone<'a>(model: &'a Model, whole: Option<&'a Model>) -> Option<&'a Model> {
    if model.place.mesh.divides_model() { whole } else { Some(model) }
}

fn at_least_one(size: BatchSize) -> BatchSize {
    BatchSize {
        tokens: size.tokens.max(1),
        sequences: size.sequences.clamp(1, size.tokens.max(1)),
        images: if size.patches == 0 { 0 } else { size.images.max(1) },
        ..size
    }
}

fn fits(size: BatchSize, room: BatchSize) -> bool {
    let BatchSize { tokens, sequences, patches, images } = size;
    tokens <= room.tokens && sequences <= room.sequences && patches <= room.patches && images <= room.images
}

/// The least size that holds both.
pub(crate) fn larger(a: BatchSize, b: BatchSize) -> BatchSize {
    BatchSize {
        tokens: a.tokens.max(b.tokens),
        sequences: a.sequences.max(b.sequences),
        patches: a.patches.max(b.patches),
        images: a.images.max(b.images),
    }
}

/// The memory of a slice of a micro-batch of `size`, with room for the statistics of `micro_batches`: of a training step, or of the
/// loss alone; and the bytes that ranks exchange in it.
fn dry_run(
    model: &Model,
    (size, slicing): (BatchSize, Slicing),
    micro_batches: usize,
    training: bool,
) -> Result<(Arena, u64)> {
    let mut arena = Arena::new(usize::MAX);
    model.take_weights(&mut arena);
    let sequences = if training { size.sequences } else { 0 };
    Figures::take(&mut arena, &model.shape, micro_batches * slicing.count, sequences);
    let (targets, tables) = (slicing.own(size.tokens), Tables::dry(&model.rope));
    let passing = (training && model.place.mesh.pp > 1).then(|| Passing::take(&mut arena, model, targets));
    if training {
        let top = arena.mark();
        arena.take(Category::Workspace, DType::F32, model.tied_workspace());
        arena.release(top);
    }
    let inputs = Inputs::take_slice(&mut arena, model.tower.as_ref(), (size, slicing), targets, size.tokens, tables);
    let figures = Figures::take(&mut Arena::new(usize::MAX), &model.shape, 1, 0);
    let mut step = Step {
        backend: &mut PlanBackend::of(model.kind),
        arena: &mut arena,
        model,
        stages: &mut Stages::default(),
        interrupt: &AtomicBool::new(false),
        pending: &mut None,
        ranks: None,
        failure: None,
        planned: 0,
    };
    let (passed, dropout) = (passing.map(|passing| passing.of(model, 0, targets)), model.dropout(0, 0, [0; 2]));
    if let Some(passed) = passed {
        step.pass_round(inputs, figures, passed, dropout)?;
    }
    let mut run = step.begin(inputs, training.then_some(model.recompute), figures);
    if training {
        (run.dropout, run.passed) = (dropout, passed);
        step.train(&run, 1.0)?;
    } else {
        step.evaluate(&run)?;
    }
    let exchanged = step.planned;
    Ok((arena, exchanged))
}

/// Bytes of activations and their gradients that a rank sends in a step for a micro-batch of `size`.
pub(crate) fn exchanged_bytes(model: &Model, size: BatchSize) -> Result<u64> {
    Ok(dry_run(model, (at_least_one(size), Slicing::of(&model.place)), 1, true)?.1)
}

impl MemoryPlan {
    /// With so many bytes of the optimizer's pieces that stay on the device.
    pub(crate) fn with_kept(mut self, bytes: usize) -> Self {
        self.categories.extend((bytes > 0).then_some(("optimizer pieces kept", bytes)));
        self.total_bytes += bytes;
        self
    }

    pub(crate) fn of(model: &Model, plan: &StepPlan, kind: DeviceKind) -> Self {
        let store = &model.store;
        let own = kind.own_bytes(model.shape.widest(), plan.rows());
        let kept = model.shards().map_or(store.weights.len, |shards| shards.weights.kept);
        let mut categories = vec![("weights", store.weights.slice(0, kept).bytes())];
        categories.push(("gathered weights", store.weights.slice(kept, store.weights.len - kept).bytes()));
        if let Some(nf4) = store.quantized {
            let gathered = nf4.gathered_bytes(model.shards().map(|shards| &shards.quantized));
            categories.push(("weights in 4 bits", nf4.bytes() - gathered));
            categories.push(("gathered weights in 4 bits", gathered));
        }
        let mut host_categories = Vec::new();
        if let Some(training) = &store.training {
            categories.push(("gradients", training.gradients.bytes()));
            categories.extend(training.sums.map(|sums| ("gradient sums", sums.bytes())));
            let optimizer = if store.host_bytes > 0 { &mut host_categories } else { &mut categories };
            optimizer.extend(store.masters.map(|masters| ("master weights", masters.bytes())));
            optimizer.push(("moments", training.moment1.bytes() + training.moment2.bytes()));
        }
        categories.extend(store.slots.map(|slots| ("optimizer slots", slots.bytes())));
        host_categories.push(("activations", plan.host_bytes));
        host_categories.retain(|(_, bytes)| *bytes > 0);
        let tables = table_bytes(&model.rope, plan.positions);
        let exchange = if store.training.is_some() { kind.exchange_bytes(model.place.world()) } else { 0 };
        let rest = store.bytes - categories.iter().map(|(_, bytes)| bytes).sum::<usize>();
        let step = Category::ALL.iter().zip(plan.arena.at_peak());
        categories.extend(step.map(|(category, bytes)| (category.name(), bytes)));
        for (name, bytes) in &mut categories {
            if *name == Category::Inputs.name() {
                *bytes += rest;
            }
        }
        categories.push(("rotary tables", tables));
        categories.push(("scratch and libraries", own));
        categories.push(("parts from other ranks", exchange));
        categories.retain(|(_, bytes)| *bytes > 0);
        MemoryPlan {
            total_bytes: store.bytes + plan.bytes() + tables + own + exchange,
            categories,
            host_bytes: store.host_bytes + plan.host_bytes,
            host_categories,
        }
    }
}

/// The memory that an engine with these options takes, by category; with `optimizer_offload` it keeps some of what it offloads
/// on the device as well, where that has more. Takes none itself.
pub fn plan_memory(dir: &Path, options: &EngineOptions, kind: DeviceKind) -> Result<MemoryPlan> {
    let config = ModelConfig::from_dir(dir)?;
    plan_memory_of(&config, options, kind)
}

/// [`plan_memory`] of a configuration that was read already.
pub fn plan_memory_of(config: &ModelConfig, options: &EngineOptions, kind: DeviceKind) -> Result<MemoryPlan> {
    let config = options.seeing(config.clone());
    let model = Model::new(&config, options, kind)?;
    if options.max_batch.tokens == 0 {
        return Err(Error::new(ErrorCode::Config, "a micro-batch has at least one token"));
    }
    let whole = model.whole_model(&config, options, kind)?;
    let plan = StepPlan::of(&model, whole.as_ref(), options)?;
    Ok(MemoryPlan::of(&model, &plan, kind))
}
