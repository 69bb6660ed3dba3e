//! The folder of an adapter: `adapter_config.json` and `adapter_model.safetensors` with PEFT's names, and the tokenizer's files
//! as TRL saves them next to it.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use safetensors::Dtype;

use super::joined::Joined;
use super::names::{of_other_class, peft_name};
use super::{Adapter, Lora, targets};
use crate::config::ModelConfig;
use crate::folder::{ModelFiles, write_file};
use crate::tensors::{Projection, Role, TensorSpec};
use crate::weights::{SafetensorsFile, SafetensorsWriter, TensorDecl, sync_folder};
use crate::{Error, ErrorCode, Result};

/// What PEFT puts before every name.
const PREFIX: &str = "base_model.model.";
const WEIGHTS: &str = "adapter_model.safetensors";

/// The name of a trained tensor in an adapter's file.
pub(super) fn stored_name(model: &ModelConfig, spec: &TensorSpec, adapters: &[Adapter]) -> String {
    if super::is_bias_of(spec, adapters)
        && let Some(module) = spec.name.strip_suffix(".bias")
    {
        return format!("{PREFIX}{}.base_layer.bias", peft_name(model, module));
    }
    let of_experts = |projection: Projection| {
        adapters.iter().any(|adapter| (adapter.block, adapter.projection) == (spec.block, projection))
    };
    // PEFT wraps the experts' module once for each parameter, in their order: the first one is inside.
    let name = match spec.role {
        Role::LoraA(Projection::ExpertsGateUp) | Role::LoraB(Projection::ExpertsGateUp) => {
            let inner = if of_experts(Projection::ExpertsDown) { "experts.base_layer" } else { "experts" };
            spec.name.replace("experts.gate_up_proj", inner)
        }
        Role::LoraA(Projection::ExpertsDown) | Role::LoraB(Projection::ExpertsDown) => {
            spec.name.replace("experts.down_proj", "experts")
        }
        _ => spec.name.clone(),
    };
    format!("{PREFIX}{}", peft_name(model, &name))
}

/// The shape of a trained tensor in an adapter's file. B of experts is `[output, rank experts]`: element `[o, j]` of expert `e` is in
/// row `o`, column `j experts + e`.
fn stored_shape(spec: &TensorSpec, adapters: &[Adapter]) -> Vec<usize> {
    match experts_of_b(spec, adapters) {
        Some(experts) => vec![spec.shape[0] / experts, spec.shape[1] * experts],
        None if is_transposed(spec) => vec![spec.shape[1], spec.shape[0]],
        None => spec.shape.clone(),
    }
}

/// Whether a tensor is the look-up's A, which the file has as `[rank, vocab]`.
fn is_transposed(spec: &TensorSpec) -> bool {
    spec.role == Role::LoraA(Projection::Embedding)
}

/// Rows of `columns` elements, as columns.
pub(super) fn transposed(values: &[f32], columns: usize) -> Vec<f32> {
    (0..columns).flat_map(|column| values.iter().skip(column).step_by(columns).copied()).collect()
}

/// How many experts' B a tensor has; none: it is another one.
fn experts_of_b(spec: &TensorSpec, adapters: &[Adapter]) -> Option<usize> {
    let Role::LoraB(projection) = spec.role else { return None };
    let own = |adapter: &&Adapter| (adapter.block, adapter.projection) == (spec.block, projection);
    adapters.iter().find(own)?.experts
}

/// Swaps `[experts][output, rank]` and `[output, rank, experts]`.
fn reorder(values: &[f32], spec: &TensorSpec, experts: usize, to_file: bool) -> Vec<f32> {
    let (output, rank) = (spec.shape[0] / experts, spec.shape[1]);
    let mut out = vec![0f32; values.len()];
    for e in 0..experts {
        for o in 0..output {
            for j in 0..rank {
                let (memory, file) = ((e * output + o) * rank + j, (o * rank + j) * experts + e);
                if to_file { out[file] = values[memory] } else { out[memory] = values[file] }
            }
        }
    }
    out
}

/// The tensors of an adapter's folder, checked against what a LoRA trains.
#[derive(Debug)]
pub struct AdapterFile {
    file: SafetensorsFile,
    /// Where the tensors of the table are, by their names there.
    places: HashMap<String, Place>,
}

/// Where a tensor is in an adapter's file.
#[derive(Debug)]
enum Place {
    /// As it is in memory, under this name.
    Whole(String),
    /// Transposed, with so many columns in the file.
    Transposed(String, usize),
    /// Of so many experts' B, which the file has in another order.
    Experts(String, TensorSpec, usize),
    /// One expert at a time.
    Joined(Joined),
}

impl AdapterFile {
    /// Opens `dir/adapter_model.safetensors`. Its tensors must be those of `lora`, by names and shapes.
    pub fn open(dir: &Path, lora: &Lora) -> Result<Self> {
        Self::open_file(&dir.join(WEIGHTS), lora)
    }

    /// [`AdapterFile::open`] of a file of any name.
    pub fn open_file(path: &Path, lora: &Lora) -> Result<Self> {
        let file = SafetensorsFile::open(path)?;
        let stored = lora.stored();
        let fault = |what: String| {
            Error::new(ErrorCode::Weights, format!("{}: {what}", path.display()))
                .hint("the adapter belongs to another model, or adapter_config.json is not its own")
        };
        let mut places = HashMap::with_capacity(stored.len());
        let mut known: HashSet<String> = HashSet::with_capacity(stored.len());
        for (name, spec) in stored {
            let has = |name: &String| file.info(name).is_some();
            let other = of_other_class(PREFIX, &name).filter(|other| !has(&name) && has(other));
            let name = other.unwrap_or(name);
            let expected = stored_shape(spec, &lora.adapters);
            let place = match file.info(&name) {
                Some((_, shape)) if shape == expected.as_slice() => match experts_of_b(spec, &lora.adapters) {
                    Some(experts) => Place::Experts(name.clone(), spec.clone(), experts),
                    None if is_transposed(spec) => Place::Transposed(name.clone(), expected[1]),
                    None => Place::Whole(name.clone()),
                },
                Some((_, shape)) => return Err(fault(format!("`{name}` is {shape:?}, not {expected:?}"))),
                None => match Joined::find(&file, spec, &lora.adapters, &lora.model, &fault)? {
                    Some(joined) => Place::Joined(joined),
                    None => return Err(fault(format!("has no `{name}`"))),
                },
            };
            match &place {
                Place::Joined(joined) => known.extend(joined.names().iter().cloned()),
                _ => known.extend([name]),
            }
            places.insert(spec.name.clone(), place);
        }
        // Next to an adapter of one of its ends PEFT saves both ends of the model as they are.
        let ends = lora.adapters.iter().any(|adapter| adapter.block.layer().is_none());
        let end = |name: &str| {
            let name = name.strip_suffix(".weight").unwrap_or_default();
            let name = name.strip_suffix(".base_layer").unwrap_or(name);
            ends && (name.ends_with(".embed_tokens") || name.ends_with(".lm_head"))
        };
        if let Some(name) = file.names().into_iter().find(|name| !known.contains(name) && !end(name)) {
            return Err(fault(format!("`{name}` is no part of this adapter")));
        }
        Ok(AdapterFile { file, places })
    }

    /// Whether the file has a tensor, by its name in the table of tensors.
    pub fn has(&self, name: &str) -> bool {
        self.places.contains_key(name)
    }

    /// Reads a tensor by its name in the table of tensors. A value that is not finite is an error.
    pub fn read_f32(&self, name: &str, out: &mut [f32]) -> Result<()> {
        match self.places.get(name) {
            Some(Place::Whole(stored)) => self.file.read_f32(stored, out),
            Some(Place::Experts(stored, spec, experts)) => {
                self.file.read_f32(stored, out)?;
                out.copy_from_slice(&reorder(out, spec, *experts, false));
                Ok(())
            }
            Some(Place::Transposed(stored, columns)) => {
                self.file.read_f32(stored, out)?;
                out.copy_from_slice(&transposed(out, *columns));
                Ok(())
            }
            Some(Place::Joined(joined)) => joined.read(&self.file, out),
            None => Err(Error::new(ErrorCode::Internal, format!("an adapter has no tensor `{name}`"))),
        }
    }
}

/// Writes an adapter's folder, which exists: PEFT's two files in f32, and of `files` those of the tokenizer. `base` is what the
/// configuration calls the model. `fetch` fills in one tensor at a time, by its name in the table of tensors. Everything is on the
/// disk when it returns.
pub fn save_adapter(
    dir: &Path,
    files: &ModelFiles,
    lora: &Lora,
    base: Option<&str>,
    mut fetch: impl FnMut(&str, &mut [f32]) -> Result<()>,
) -> Result<()> {
    files.write_tokenizer(dir)?;
    let mut stored = lora.stored();
    stored.sort_by(|left, right| left.0.cmp(&right.0));
    let declare = |(name, spec): &(String, &TensorSpec)| TensorDecl {
        name: name.clone(),
        dtype: Dtype::F32,
        shape: stored_shape(spec, &lora.adapters),
    };
    let declared: Vec<TensorDecl> = stored.iter().map(declare).collect();
    let mut writer = SafetensorsWriter::create(&dir.join(WEIGHTS), &[("format", "pt")], &declared)?;
    for (name, spec) in stored {
        let mut values = vec![0f32; spec.elements()];
        fetch(&spec.name, &mut values)?;
        if let Some(experts) = experts_of_b(spec, &lora.adapters) {
            values = reorder(&values, spec, experts, true);
        } else if is_transposed(spec) {
            values = transposed(&values, spec.shape[1]);
        }
        if values.iter().any(|value| !value.is_finite()) {
            let what = format!("tensor `{name}` has a value that is not finite");
            return Err(Error::new(ErrorCode::NonFinite, what).hint("the run diverged: lower the learning rate"));
        }
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        writer.append(&bytes)?;
    }
    writer.finish()?;
    let text = lora.config.to_json(base, &targets::target_names(lora));
    write_file(&dir.join("adapter_config.json"), text.as_bytes())?;
    sync_folder(dir)
}
