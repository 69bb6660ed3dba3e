//! The way of a micro-batch, or of this rank's slice of one, into the step's memory.

use arl_model::RopeTable;

use crate::backend::Backend;
use crate::batch::Inputs;
use crate::placement::arena::Arena;
use crate::rotary::{RotaryTables, Span};
use crate::token_slice::Sliced;
use crate::vision::Tower;

/// Host memory from which micro-batches are uploaded; used again for each.
#[derive(Debug, Default)]
pub(crate) struct Staging {
    rows: Vec<i32>,
    targets: Vec<i32>,
    weights: Vec<f32>,
    ones: Vec<f32>,
    spans: Vec<Span>,
    angle_rows: Vec<i32>,
}

impl Staging {
    /// Compacts the targets of a slice of a valid micro-batch, takes its memory and uploads it.
    pub(crate) fn upload<B: Backend + ?Sized>(
        &mut self,
        backend: &mut B,
        arena: &mut Arena,
        sliced: Sliced<'_>,
        rope: &RopeTable,
        tower: Option<&Tower>,
        tables: &mut RotaryTables,
    ) -> Inputs {
        let Sliced { batch, slicing } = sliced;
        let (own, tokens) = (sliced.padded(), sliced.tokens());
        self.rows.clear();
        self.targets.clear();
        self.weights.clear();
        for t in tokens.clone() {
            let weight = batch.weight(t);
            if weight > 0.0 {
                self.rows.push((t - own.start) as i32);
                self.targets.push(batch.targets[t]);
                self.weights.push(weight);
            }
        }
        self.ones.resize(self.rows.len(), 1.0);
        self.spans.clear();
        self.spans.extend(batch.spans());
        let (tables, offsets) = tables.provide(backend, rope, &self.spans);
        batch.angle_rows(&offsets, &mut self.angle_rows);
        let one_axis = self.angle_rows.len() == batch.input_ids.len();
        let tables = if one_axis { tables.one_axis() } else { tables };

        let (ends, max_len) = sliced.sequences();
        let targets = self.rows.len();
        let mut inputs = Inputs::take_slice(arena, tower, (batch.size(), slicing), targets, max_len, tables);
        inputs.counted = tokens.len();
        let mut upload = |values: &[i32], target| backend.upload(bytemuck::cast_slice(values), target);
        upload(&ends, inputs.sequences.cu_seqlens);
        upload(&sliced.part(&batch.input_ids, &own), inputs.ids);
        upload(&sliced.part(&self.angle_rows, &sliced.of_neighbours()), inputs.shared.angles.rows);
        if inputs.angles.rows != inputs.shared.angles.rows {
            upload(&sliced.part(&self.angle_rows, &own), inputs.angles.rows);
        }
        backend.upload(bytemuck::cast_slice(&self.rows), inputs.rows);
        backend.upload(bytemuck::cast_slice(&self.targets), inputs.targets);
        backend.upload(bytemuck::cast_slice(&self.weights), inputs.weights);
        backend.upload(bytemuck::cast_slice(&self.ones), inputs.ones);
        inputs.upload_images(backend, batch, tower, &own);
        inputs
    }
}
