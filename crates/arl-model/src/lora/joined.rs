//! Adapters of experts that were modules of their own (`mlp.experts.3.gate_proj.lora_A.weight`), joined to those of the parameters
//! that they are now: A one below the other, B on the diagonal, so that the products are the same.

use super::Adapter;
use super::names::peft_name;
use crate::config::ModelConfig;
use crate::tensors::{Projection, Role, TensorSpec};
use crate::weights::SafetensorsFile;
use crate::{Error, Result};

/// A tensor of experts' adapters, in parts.
#[derive(Clone, Debug)]
pub(super) struct Joined {
    experts: usize,
    /// Rows of B, and rank, of one expert.
    output: usize,
    rank: usize,
    /// Columns of A.
    input: usize,
    is_a: bool,
    /// Names in the file, expert by expert; of gate and up two each.
    names: Vec<String>,
}

impl Joined {
    /// Finds the parts of a tensor in a file; `None`: it does not have them.
    pub(super) fn find(
        file: &SafetensorsFile,
        spec: &TensorSpec,
        adapters: &[Adapter],
        model: &ModelConfig,
        fault: &dyn Fn(String) -> Error,
    ) -> Result<Option<Self>> {
        let (projection, matrix) = match spec.role {
            Role::LoraA(projection) => (projection, "lora_A"),
            Role::LoraB(projection) => (projection, "lora_B"),
            _ => return Ok(None),
        };
        let own = |adapter: &&Adapter| (adapter.block, adapter.projection) == (spec.block, projection);
        let Some((adapter, experts)) = adapters.iter().find(own).and_then(|own| Some((own, own.experts?))) else {
            return Ok(None);
        };
        let parts: &[&str] = match projection {
            Projection::ExpertsGateUp => &["gate_proj", "up_proj"],
            _ => &["down_proj"],
        };
        let module = adapter.module.rsplit_once('.').map_or("", |(module, _)| module);
        let module = peft_name(model, module);
        let name = |expert: usize, part: &&str| format!("base_model.model.{module}.{expert}.{part}.{matrix}.weight");
        let names: Vec<String> = (0..experts).flat_map(|e| parts.iter().map(move |part| name(e, part))).collect();
        if file.info(&names[0]).is_none() {
            return Ok(None);
        }
        let (input, output) = adapter.sides(model);
        let (rank, is_a) = (adapter.rank, matrix == "lora_A");
        let (rows, columns) = (output / parts.len(), rank / parts.len());
        let expected = if is_a { [columns, input] } else { [rows, columns] };
        for name in &names {
            match file.info(name) {
                None => return Err(fault(format!("has no `{name}`"))),
                Some((_, shape)) if shape != expected => {
                    return Err(fault(format!("`{name}` is {shape:?}, not {expected:?}")));
                }
                Some(_) => {}
            }
        }
        Ok(Some(Joined { experts, output, rank, input, is_a, names }))
    }

    pub(super) fn names(&self) -> &[String] {
        &self.names
    }

    /// Reads the tensor in its layout in memory: `[experts rank, input]` or `[experts output, rank]`.
    pub(super) fn read(&self, file: &SafetensorsFile, out: &mut [f32]) -> Result<()> {
        out.fill(0.0);
        let parts = self.names.len() / self.experts;
        let (rows, columns) = (self.output / parts, self.rank / parts);
        let mut values = vec![0f32; if self.is_a { columns * self.input } else { rows * columns }];
        for (place, name) in self.names.iter().enumerate() {
            file.read_f32(name, &mut values)?;
            let (expert, part) = (place / parts, place % parts);
            if self.is_a {
                out[(expert * self.rank + part * columns) * self.input..][..values.len()].copy_from_slice(&values);
                continue;
            }
            for (row, values) in values.chunks_exact(columns).enumerate() {
                let first = (expert * self.output + part * rows + row) * self.rank + part * columns;
                out[first..][..columns].copy_from_slice(values);
            }
        }
        Ok(())
    }
}
