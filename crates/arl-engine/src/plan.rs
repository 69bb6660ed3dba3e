//! The memory plan: a dry run of the very step against a backend that computes nothing.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use arl_model::{Error, ErrorCode, ModelConfig, Result};

use crate::backend::plan::PlanBackend;
use crate::backend::{Backend, DeviceKind, Pool};
use crate::batch::{BatchSize, Inputs};
use crate::model::Model;
use crate::options::EngineOptions;
use crate::placement::arena::{Arena, Category};
use crate::statistics::take_statistics;
use crate::step::{Stages, Step, host_bytes};

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
    pub(crate) micro_batches: usize,
    arena: Arena,
    /// Of the inputs of layers that wait in host memory.
    host_bytes: usize,
}

impl StepPlan {
    /// Runs the step dry. Every position counts as a target: then it needs most.
    pub(crate) fn new(model: &Model, size: BatchSize, micro_batches: usize) -> Result<Self> {
        let size = BatchSize { tokens: size.tokens.max(1), sequences: size.sequences.clamp(1, size.tokens.max(1)) };
        let mut arena = Arena::new(usize::MAX);
        take_statistics(&mut arena, &model.shape, micro_batches);
        let inputs = Inputs::take(&mut arena, size, size.tokens, size.tokens, model.shape.rotary / 2);
        let (sums, balance) = take_statistics(&mut Arena::new(usize::MAX), &model.shape, 1);
        let mut step = Step {
            backend: &mut PlanBackend::default(),
            arena: &mut arena,
            model,
            stages: &mut Stages::default(),
            interrupt: &AtomicBool::new(false),
            pending: &mut None,
        };
        if model.store.training.is_some() {
            let run = step.begin(inputs, Some(model.recompute), sums, balance);
            step.train(&run, 1.0)?;
        } else {
            let run = step.begin(inputs, None, sums, balance);
            step.evaluate(&run)?;
        }
        let offloading = model.activation_offloading && model.store.training.is_some();
        let input_bytes = if offloading { size.tokens * model.shape.hidden * model.dtype.bytes() } else { 0 };
        let host_bytes = host_bytes(model.layers.len() - model.lowest_layer, input_bytes);
        Ok(StepPlan { size, micro_batches, arena, host_bytes })
    }

    /// The plan of an engine that has no memory.
    pub(crate) fn nothing() -> Self {
        StepPlan { size: BatchSize::default(), micro_batches: 0, arena: Arena::new(0), host_bytes: 0 }
    }

    /// A plan that was found by another dry run, for the same micro-batches.
    pub(crate) fn with_arena(&self, arena: Arena) -> Self {
        StepPlan { arena, ..self.clone() }
    }

    /// Bytes of the pool.
    pub(crate) fn bytes(&self) -> usize {
        self.arena.peak()
    }

    /// Reserves what a step needs.
    pub(crate) fn reserve<B: Backend + ?Sized>(&self, backend: &mut B, model: &Model) -> Result<()> {
        backend.reserve(Pool::Scratch, backend.scratch_bytes(model.shape.widest(), self.size.tokens))?;
        backend.reserve(Pool::Step, self.bytes())?;
        backend.reserve(Pool::HostStep, self.host_bytes)
    }

    /// Whether there is room for `count` micro-batches of `size`.
    pub(crate) fn holds(&self, size: BatchSize, count: usize) -> bool {
        size.tokens <= self.size.tokens && size.sequences <= self.size.sequences && count <= self.micro_batches
    }

    /// The least size that holds both the plan's and `size`.
    pub(crate) fn larger(&self, size: BatchSize) -> BatchSize {
        BatchSize { tokens: size.tokens.max(self.size.tokens), sequences: size.sequences.max(self.size.sequences) }
    }
}

impl MemoryPlan {
    pub(crate) fn of(model: &Model, plan: &StepPlan, kind: DeviceKind) -> Self {
        let store = &model.store;
        let own = kind.own_bytes(model.shape.widest(), plan.size.tokens);
        let mut categories = vec![("weights", store.weights.bytes())];
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
        let rest = store.bytes - categories.iter().map(|(_, bytes)| bytes).sum::<usize>();
        let step = Category::ALL.iter().zip(plan.arena.at_peak());
        categories.extend(step.map(|(category, bytes)| (category.name(), bytes)));
        for (name, bytes) in &mut categories {
            if *name == Category::Inputs.name() {
                *bytes += rest;
            }
        }
        categories.push(("scratch and libraries", own));
        categories.retain(|(_, bytes)| *bytes > 0);
        MemoryPlan {
            total_bytes: store.bytes + plan.bytes() + own,
            categories,
            host_bytes: store.host_bytes + plan.host_bytes,
            host_categories,
        }
    }
}

/// The memory that an engine with these options takes, by category. Takes none itself.
pub fn plan_memory(dir: &Path, options: &EngineOptions, kind: DeviceKind) -> Result<MemoryPlan> {
    let config = ModelConfig::from_dir(dir)?;
    plan_memory_of(&config, options, kind)
}

/// [`plan_memory`] of a configuration that was read already.
pub fn plan_memory_of(config: &ModelConfig, options: &EngineOptions, kind: DeviceKind) -> Result<MemoryPlan> {
    let model = Model::new(config, options, kind)?;
    if options.max_batch.tokens == 0 {
        return Err(Error::new(ErrorCode::Config, "a micro-batch has at least one token"));
    }
    let plan = StepPlan::new(&model, options.max_batch, MICRO_BATCHES)?;
    Ok(MemoryPlan::of(&model, &plan, kind))
}
