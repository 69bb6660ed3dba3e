//! The folder of an adapter: `adapter_config.json` and `adapter_model.safetensors` with PEFT's names, and the tokenizer's files
//! as TRL saves them next to it.

use std::collections::HashMap;
use std::path::Path;

use safetensors::Dtype;

use super::{Adapter, Lora, targets};
use crate::folder::{ModelFiles, write_file};
use crate::tensors::TensorSpec;
use crate::weights::{SafetensorsFile, SafetensorsWriter, TensorDecl, sync_folder};
use crate::{Error, ErrorCode, Result};

/// What PEFT puts before every name.
const PREFIX: &str = "base_model.model.";
const WEIGHTS: &str = "adapter_model.safetensors";

/// The name of a trained tensor in an adapter's file.
pub(super) fn stored_name(spec: &TensorSpec, adapters: &[Adapter]) -> String {
    if super::is_bias_of(spec, adapters)
        && let Some(module) = spec.name.strip_suffix(".bias")
    {
        return format!("{PREFIX}{module}.base_layer.bias");
    }
    format!("{PREFIX}{}", spec.name)
}

/// The tensors of an adapter's folder, checked against what a LoRA trains.
#[derive(Debug)]
pub struct AdapterFile {
    file: SafetensorsFile,
    /// Names in the file, by names in the table of tensors.
    names: HashMap<String, String>,
}

impl AdapterFile {
    /// Opens `dir/adapter_model.safetensors`. Its tensors must be those of `lora`, by names and shapes.
    pub fn open(dir: &Path, lora: &Lora) -> Result<Self> {
        let path = dir.join(WEIGHTS);
        let file = SafetensorsFile::open(&path)?;
        let stored = lora.stored();
        let fault = |what: String| {
            Error::new(ErrorCode::Weights, format!("{}: {what}", path.display()))
                .hint("the adapter belongs to another model, or adapter_config.json is not its own")
        };
        for (name, spec) in &stored {
            match file.info(name) {
                None => return Err(fault(format!("has no `{name}`"))),
                Some((_, shape)) if shape != spec.shape.as_slice() => {
                    return Err(fault(format!("`{name}` is {shape:?}, not {:?}", spec.shape)));
                }
                Some(_) => {}
            }
        }
        if let Some(name) = file.names().into_iter().find(|name| stored.iter().all(|(known, _)| known != name)) {
            return Err(fault(format!("`{name}` is no part of this adapter")));
        }
        let names = stored.into_iter().map(|(name, spec)| (spec.name.clone(), name)).collect();
        Ok(AdapterFile { file, names })
    }

    /// Whether the file has a tensor, by its name in the table of tensors.
    pub fn has(&self, name: &str) -> bool {
        self.names.contains_key(name)
    }

    /// Reads a tensor by its name in the table of tensors. A value that is not finite is an error.
    pub fn read_f32(&self, name: &str, out: &mut [f32]) -> Result<()> {
        match self.names.get(name) {
            Some(stored) => self.file.read_f32(stored, out),
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
        shape: spec.shape.clone(),
    };
    let declared: Vec<TensorDecl> = stored.iter().map(declare).collect();
    let mut writer = SafetensorsWriter::create(&dir.join(WEIGHTS), &[("format", "pt")], &declared)?;
    for (name, spec) in stored {
        let mut values = vec![0f32; spec.elements()];
        fetch(&spec.name, &mut values)?;
        if values.iter().any(|value| !value.is_finite()) {
            let what = format!("tensor `{name}` has a value that is not finite");
            return Err(Error::new(ErrorCode::NonFinite, what).hint("the run diverged: lower the learning rate"));
        }
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        writer.append(&bytes)?;
    }
    writer.finish()?;
    let text = lora.config.to_json(base, &targets::target_names(&lora.config, &lora.adapters));
    write_file(&dir.join("adapter_config.json"), text.as_bytes())?;
    sync_folder(dir)
}
