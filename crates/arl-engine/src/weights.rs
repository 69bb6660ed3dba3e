//! Weights in and out of the device: from a checkpoint, from random numbers, and to a model's folder.

use std::collections::HashMap;
use std::path::Path;

use half::{bf16, f16};

use arl_model::{Checkpoint, Error, ErrorCode, Result, WeightDtype, init_f32, save_model};

use crate::backend::{Backend, Buffer, DType, join_master, split_master};
use crate::engine::Engine;
use crate::params::Param;

/// Elements that cross between host and device at a time.
pub(crate) const PIECE: usize = 1 << 20;
/// Bytes of one file of an exported model, as transformers has it.
const MAX_SHARD_BYTES: u64 = 50_000_000_000;

/// What of a parameter is read back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The weights; with weights of 16 bits the exact f32 masters.
    Weights,
    /// The gradients of the step that was accumulated last, without the loss scale.
    Gradients,
    /// The first moments.
    Moment1,
    /// The second moments.
    Moment2,
}

impl<B: Backend + ?Sized> Engine<B> {
    /// Opens the weights of a folder; models are saved in their format from now on.
    pub(crate) fn open_checkpoint(&mut self, dir: &Path) -> Result<Checkpoint> {
        let checkpoint = Checkpoint::open(dir, &self.config)?;
        self.format = checkpoint.format().clone();
        Ok(checkpoint)
    }

    /// Reads all weights from the mapped checkpoint, a piece at a time.
    pub(crate) fn load_checkpoint(&mut self, dir: &Path) -> Result<()> {
        let checkpoint = self.open_checkpoint(dir)?;
        let mut staging = vec![0f32; PIECE];
        for i in 0..self.model.params.tensors.len() {
            let (name, param) = (self.model.params.tensors[i].spec.name.clone(), self.model.params.tensors[i].param());
            for start in (0..param.len).step_by(PIECE) {
                let len = PIECE.min(param.len - start);
                checkpoint.read_f32_part(&name, start, &mut staging[..len])?;
                self.write_weights(Param { offset: param.offset + start, len }, &staging[..len]);
            }
        }
        Ok(())
    }

    /// Draws all weights.
    pub(crate) fn load_random(&mut self, seed: u64) -> Result<()> {
        let mut staging = Vec::new();
        for i in 0..self.model.params.tensors.len() {
            let tensor = &self.model.params.tensors[i];
            let param = tensor.param();
            staging.resize(param.len, 0f32);
            init_f32(&self.config, &tensor.spec, seed, &mut staging);
            self.write_weights(param, &staging);
        }
        Ok(())
    }

    /// Uploads a parameter's weights.
    pub(crate) fn write_weights(&mut self, param: Param, values: &[f32]) {
        let store = self.model.store;
        if store.weights.dtype == DType::F32 {
            self.backend.upload(bytemuck::cast_slice(values), store.weight(param));
            return;
        }
        if store.weights.dtype == DType::F16 {
            for (piece, values) in values.chunks(PIECE).enumerate() {
                let place = |array: Buffer| array.slice(param.offset + piece * PIECE, values.len());
                let rounded: Vec<f16> = values.iter().map(|&value| f16::from_f32(value)).collect();
                self.backend.upload(bytemuck::cast_slice(&rounded), place(store.weights));
                if let Some(masters) = store.masters {
                    self.backend.upload(bytemuck::cast_slice(values), place(masters));
                }
            }
            return;
        }
        let mut high = Vec::with_capacity(PIECE.min(values.len()));
        let mut low = Vec::with_capacity(PIECE.min(values.len()));
        for (piece, values) in values.chunks(PIECE).enumerate() {
            high.clear();
            low.clear();
            for &value in values {
                let (h, l) = split_master(value);
                high.push(h);
                low.push(l);
            }
            let start = param.offset + piece * PIECE;
            self.backend.upload(bytemuck::cast_slice(&high), store.weights.slice(start, values.len()));
            if let Some(masters) = store.masters {
                self.backend.upload(bytemuck::cast_slice(&low), masters.slice(start, values.len()));
            }
        }
    }

    /// Reads a parameter's weights back; the exact masters where there are any.
    pub(crate) fn read_weights(&mut self, param: Param, out: &mut [f32]) -> Result<()> {
        self.complete_update();
        let store = self.model.store;
        if store.weights.dtype == DType::F32 {
            return self.backend.read_back(store.weight(param), bytemuck::cast_slice_mut(out));
        }
        if store.weights.dtype == DType::F16 {
            let Some(masters) = store.masters else {
                let mut rounded = vec![f16::ZERO; out.len()];
                self.backend.read_back(store.weight(param), bytemuck::cast_slice_mut(&mut rounded))?;
                out.iter_mut().zip(&rounded).for_each(|(out, rounded)| *out = rounded.to_f32());
                return Ok(());
            };
            return self.backend.read_back(masters.slice(param.offset, param.len), bytemuck::cast_slice_mut(out));
        }
        let (mut high, mut low) = (vec![0u16; PIECE.min(out.len())], vec![0u16; PIECE.min(out.len())]);
        for (piece, out) in out.chunks_mut(PIECE).enumerate() {
            let start = param.offset + piece * PIECE;
            let (high, low) = (&mut high[..out.len()], &mut low[..out.len()]);
            self.backend.read_back(store.weights.slice(start, out.len()), bytemuck::cast_slice_mut(high))?;
            match store.masters {
                Some(masters) => {
                    self.backend.read_back(masters.slice(start, out.len()), bytemuck::cast_slice_mut(low))?;
                    for ((out, &h), &l) in out.iter_mut().zip(&*high).zip(&*low) {
                        *out = join_master(h, l);
                    }
                }
                None => {
                    for (out, &h) in out.iter_mut().zip(&*high) {
                        *out = f32::from_bits(u32::from(h) << 16);
                    }
                }
            }
        }
        Ok(())
    }

    /// Names of all tensors, as in a checkpoint.
    pub fn tensor_names(&self) -> Vec<String> {
        self.model.params.tensors.iter().map(|t| t.spec.name.clone()).collect()
    }

    /// Reads one tensor back by its name in a checkpoint, row-major.
    pub fn read_tensor(&mut self, name: &str, kind: Kind) -> Result<Vec<f32>> {
        let Some(tensor) = self.model.params.tensors.iter().find(|t| t.spec.name == name) else {
            return Err(Error::new(ErrorCode::Internal, format!("the model has no tensor `{name}`")));
        };
        let param = tensor.param();
        self.complete_update();
        let mut values = vec![0f32; param.len];
        let array = match (kind, self.model.store.training) {
            (Kind::Weights, _) => {
                self.read_weights(param, &mut values)?;
                return Ok(values);
            }
            (_, None) => return Err(Error::new(ErrorCode::Internal, "an engine for inference only has weights alone")),
            (Kind::Gradients, Some(training)) => training.gradients,
            (Kind::Moment1, Some(training)) => training.moment1,
            (Kind::Moment2, Some(training)) => training.moment2,
        };
        let array = array.slice(param.offset, param.len);
        if array.dtype == DType::Bf16 {
            let mut narrow = vec![bf16::ZERO; param.len];
            self.backend.read_back(array, bytemuck::cast_slice_mut(&mut narrow))?;
            return Ok(narrow.into_iter().map(bf16::to_f32).collect());
        }
        self.backend.read_back(array, bytemuck::cast_slice_mut(&mut values))?;
        if kind == Kind::Gradients {
            values.iter_mut().for_each(|value| *value /= self.gradient_scale);
        }
        Ok(values)
    }

    /// Writes the model to `dir`, an empty folder or none yet, in Hugging Face's layout, as the folder was that the
    /// engine was opened on: configuration, tokenizer, names, joined tensors, and types (without weights there, the type
    /// that `config.json` names, else f32). `dtype` replaces the types. With weights of 16 bits, what is narrowed is the
    /// exact masters.
    pub fn export_model(&mut self, dir: &Path, dtype: Option<WeightDtype>) -> Result<()> {
        std::fs::create_dir_all(dir).map_err(|e| Error::io(dir, &e))?;
        let (config, files, format) = (self.config.clone(), self.files.clone(), self.format.clone());
        let places: HashMap<String, Param> =
            self.model.params.tensors.iter().map(|t| (t.spec.name.clone(), t.param())).collect();
        save_model(dir, &files, &config, &format, dtype, MAX_SHARD_BYTES, |name, out| match places.get(name) {
            Some(&param) => self.read_weights(param, out),
            None => Err(Error::new(ErrorCode::Internal, format!("the model has no tensor `{name}`"))),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::CpuBackend;
    use crate::{EngineOptions, Hyper, MicroBatch, Weights};

    #[test]
    fn elements_between_parameters_stay_zero() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../__test__/golden/window-bias");
        let options = EngineOptions { dtype: DType::Bf16, ..EngineOptions::default() };
        let mut engine = Engine::open(Box::new(CpuBackend::new()), &dir, Weights::Checkpoint, &options).unwrap();
        let batch = MicroBatch {
            input_ids: vec![1, 2, 3],
            targets: vec![2, 3, 4],
            positions: vec![0, 1, 2],
            cu_seqlens: vec![0, 3],
            weights: None,
        };
        engine.step(&[batch], Hyper { learning_rate: 0.1, max_grad_norm: 1.0 }).unwrap();
        let gaps = engine.model.params.gaps();
        assert!(!gaps.is_empty());
        for (offset, len) in gaps {
            let mut values = vec![1f32; len];
            engine.read_weights(Param { offset, len }, &mut values).unwrap();
            assert_eq!(values, vec![0.0; len]);
        }
    }
}
