//! What tests look at: all logits, each target's loss, the routers' logits, and gradients without an update.

use std::sync::atomic::AtomicBool;

use arl_model::Result;

use crate::backend::plan::PlanBackend;
use crate::backend::{Backend, Buffer, DType};
use crate::batch::{Inputs, MicroBatch};
use crate::blocks::Run;
use crate::engine::Engine;
use crate::model::Model;
use crate::options::Recompute;
use crate::placement::arena::{Arena, Category};
use crate::rotary::Tables;
use crate::statistics::{Figures, MicroBatchStats};
use crate::step::{LossMode, Step};

/// What the forward pass over one micro-batch gives.
#[derive(Clone, Debug)]
pub struct Inspection {
    /// f32 `[T, vocab]`.
    pub logits: Vec<f32>,
    /// `[T]`: negative log-likelihood of each target, 0 where there is none.
    pub nll: Vec<f32>,
    /// By layers that have experts: f32 `[T, experts]`.
    pub router_logits: Vec<Vec<f32>>,
    /// Of images: f32 `[image tokens, hidden]`, in their order: what takes the place of embeddings; then what DeepStack adds
    /// after each of the first layers.
    pub image_features: Vec<Vec<f32>>,
}

/// All memory that [`Engine::inspect`] takes: what every layer computes is kept.
fn room<B: Backend + ?Sized>(step: &mut Step<'_, B>, inputs: Inputs) -> (Run, Buffer) {
    let figures = Figures::take(step.arena, &step.model.shape, 1, 0);
    let run = step.begin(inputs, Some(Recompute::Off), figures);
    step.take_scratch(&run);
    let chunk = step.model.loss_chunk.min(inputs.size.tokens);
    let logits = step.arena.take(Category::LogitsChunk, DType::F32, chunk * step.model.shape.vocab);
    (run, logits)
}

impl<B: Backend + ?Sized> Engine<B> {
    /// Runs the forward pass and reads back what training never looks at.
    pub fn inspect(&mut self, batch: &MicroBatch) -> Result<Inspection> {
        self.alone("inspection", |engine| engine.inspect_alone(batch))
    }

    fn inspect_alone(&mut self, batch: &MicroBatch) -> Result<Inspection> {
        self.model.check(0, batch)?;
        let size = batch.size();
        // What is looked at stays on the device, of frozen layers too.
        let model = Model { activation_offloading: false, lowest_layer: 0, ..self.model.clone() };
        let mut dry = Arena::new(usize::MAX);
        model.take_weights(&mut dry);
        let inputs =
            Inputs::take(&mut dry, model.tower.as_ref(), size, size.tokens, size.tokens, Tables::dry(&self.model.rope));
        let mut step = Step {
            backend: &mut PlanBackend::of(self.model.kind),
            arena: &mut dry,
            model: &model,
            stages: &mut self.stages,
            interrupt: &AtomicBool::new(false),
            pending: &mut None,
            ranks: None,
            failure: None,
            planned: 0,
        };
        let (run, _) = room(&mut step, inputs);
        step.see(&run)?;
        step.forward(&run, None)?;
        step.loss(&run, LossMode::Evaluate)?;
        self.make_room_in(dry, batch.positions())?;

        self.clear_arena();
        let inputs = self.staging.upload(
            &mut *self.backend,
            &mut self.arena,
            batch.whole(),
            &self.model.rope,
            model.tower.as_ref(),
            &mut self.tables,
        );
        let mut step = Step {
            backend: &mut *self.backend,
            arena: &mut self.arena,
            model: &model,
            stages: &mut self.stages,
            interrupt: &self.interrupt,
            pending: &mut self.pending,
            ranks: Some(&mut self.ranks),
            failure: None,
            planned: 0,
        };
        let (run, chunk) = room(&mut step, inputs);
        step.see(&run)?;
        step.forward(&run, None)?;
        step.loss(&run, LossMode::Evaluate)?;

        let (h, v) = (step.model.shape.hidden, step.model.shape.vocab);
        let mut logits = vec![0f32; size.tokens * v];
        let rows = chunk.len / v;
        for (i, part) in logits.chunks_mut(rows * v).enumerate() {
            let n = part.len() / v;
            step.logits(run.final_norm.slice(i * rows * h, n * h), n, chunk.slice(0, n * v))?;
            step.backend.read_back(chunk.slice(0, n * v), bytemuck::cast_slice_mut(part))?;
        }
        let mut compact = vec![0f32; inputs.target_rows];
        step.backend.read_back(inputs.nll, bytemuck::cast_slice_mut(&mut compact))?;
        let mut compact = compact.into_iter();
        let nll = (0..size.tokens).map(|t| if batch.weight(t) > 0.0 { compact.next().unwrap_or(0.0) } else { 0.0 });
        let nll = nll.collect();
        let mut router_logits = Vec::new();
        for buffer in step.stages.blocks.iter().filter_map(|stage| stage.block.router_logits()) {
            let mut host = vec![0f32; buffer.len];
            step.backend.read_back(buffer, bytemuck::cast_slice_mut(&mut host))?;
            router_logits.push(host);
        }
        let image_features = step.read_features(&run, batch)?;
        Ok(Inspection { logits, nll, router_logits, image_features })
    }

    /// The gradients of a step without its update; read them with [`Engine::read_tensor`].
    pub fn gradients(&mut self, batches: &[MicroBatch]) -> Result<Vec<MicroBatchStats>> {
        let statistics = self.accumulate(batches)?;
        self.read_statistics(statistics)
    }
}
