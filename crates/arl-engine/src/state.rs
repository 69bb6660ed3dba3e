//! Weights in and out of the device: from a checkpoint, from random numbers, to and from a saved state of a run.
//! What is saved is exact: an engine that restores it goes on with equal bits.

use std::collections::HashMap;
use std::path::Path;

use half::{bf16, f16};

use arl_model::{
    Checkpoint, Dtype, Error, ErrorCode, Result, SafetensorsFile, SafetensorsWriter, TensorDecl, WeightDtype, init_f32,
    save_model, sync_folder,
};

use crate::backend::{Backend, Buffer, DType, join_master, split_master};
use crate::engine::Engine;
use crate::loss_scale::LossScale;
use crate::params::Param;

/// Elements that cross between host and device at a time.
const PIECE: usize = 1 << 20;
/// The file that [`Engine::save_state`] writes into its folder.
const STATE_FILE: &str = "engine.safetensors";
/// Bytes of one file of an exported model, as transformers has it.
const MAX_SHARD_BYTES: u64 = 50_000_000_000;
const FORMAT: &str = "arl engine state 1";
/// The name of f32 masters in it.
const MASTERS: &str = "master_weights";

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
    /// Opens the weights of a folder; models are saved in their type and layout from now on.
    pub(crate) fn open_checkpoint(&mut self, dir: &Path) -> Result<Checkpoint> {
        let checkpoint = Checkpoint::open(dir, &self.config)?;
        self.source_dtype = Some(checkpoint.dtype());
        self.layout = checkpoint.layout();
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
    fn write_weights(&mut self, param: Param, values: &[f32]) {
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

    /// The arrays of a saved state under their names. f16 weights are no part of it: they are the masters' roundings.
    fn state_arrays(&self) -> Result<Vec<(&'static str, Buffer)>> {
        let store = self.model.store;
        let Some(training) = store.training else {
            return Err(Error::new(ErrorCode::Config, "an engine for inference only has no state to save or restore"));
        };
        let mut arrays = match (store.weights.dtype, store.masters) {
            (DType::F16, Some(masters)) => vec![(MASTERS, masters)],
            (_, masters) => {
                let low = masters.map(|low| ("weights_low", low));
                [("weights", store.weights)].into_iter().chain(low).collect()
            }
        };
        arrays.extend([("moment1", training.moment1), ("moment2", training.moment2)]);
        Ok(arrays)
    }

    /// Changes whenever the order, names, shapes or types of the flat arrays do.
    fn layout(&self) -> String {
        let mut hash = 0xcbf2_9ce4_8422_2325u64;
        let mut add = |bytes: &[u8]| {
            for &byte in bytes {
                hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
            }
        };
        add(&[self.model.dtype.bytes() as u8]);
        let store = &self.model.store;
        match (self.model.dtype, store.masters) {
            (DType::F16, _) => add(b"f16"),
            (DType::Bf16, None) => add(b"stochastic rounding"),
            _ => {}
        }
        if store.training.is_some_and(|training| training.moment1.dtype == DType::Bf16) {
            add(b"bf16 moments");
        }
        for tensor in &self.model.params.tensors {
            add(tensor.spec.name.as_bytes());
            add(&(tensor.offset as u64).to_le_bytes());
            for &side in &tensor.spec.shape {
                add(&(side as u64).to_le_bytes());
            }
        }
        format!("{hash:016x}")
    }

    /// Writes exact weights, moments, step count and loss scale to `dir/engine.safetensors`, by way of a file beside it that is
    /// renamed when it is complete and on the disk.
    pub fn save_state(&mut self, dir: &Path) -> Result<()> {
        self.state_arrays()?;
        self.settle();
        self.complete_update();
        std::fs::create_dir_all(dir).map_err(|e| Error::io(dir, &e))?;
        let (path, partial) = (dir.join(STATE_FILE), dir.join(format!("{STATE_FILE}.partial")));
        let written = self.write_state(&partial);
        if written.is_err() {
            // The error that is reported is the first one.
            let _ = std::fs::remove_file(&partial);
        }
        written?;
        std::fs::rename(&partial, &path).map_err(|e| Error::io(&path, &e))?;
        sync_folder(dir)
    }

    fn write_state(&mut self, path: &Path) -> Result<()> {
        let arrays = self.state_arrays()?;
        let (layout, steps) = (self.layout(), self.steps.to_string());
        let declare = |&(name, buffer): &(&str, Buffer)| TensorDecl {
            name: name.to_owned(),
            dtype: file_dtype(buffer.dtype),
            shape: vec![buffer.len],
        };
        let declared: Vec<TensorDecl> = arrays.iter().map(declare).collect();
        let loss_scale = self.loss_scale.map(LossScale::to_text);
        let mut metadata = vec![("format", FORMAT), ("layout", &layout), ("steps", &steps)];
        metadata.extend(loss_scale.as_deref().map(|text| ("loss_scale", text)));
        let mut writer = SafetensorsWriter::create(path, &metadata, &declared)?;
        let mut staging = vec![0u8; PIECE * 4];
        for (_, buffer) in arrays {
            for start in (0..buffer.len).step_by(PIECE) {
                let part = buffer.slice(start, PIECE.min(buffer.len - start));
                let staging = &mut staging[..part.bytes()];
                self.backend.read_back(part, staging)?;
                writer.append(staging)?;
            }
        }
        writer.finish()
    }

    /// Writes the model to `dir`, an empty folder or none yet, in Hugging Face's layout; `dtype` `None`: the type of
    /// the checkpoint that the engine was opened on, f32 where it had none. Configuration and tokenizer are those that
    /// were read then; names and joined tensors are as they were there. With weights of 16 bits, what is narrowed is the
    /// exact masters.
    pub fn export_model(&mut self, dir: &Path, dtype: Option<WeightDtype>) -> Result<()> {
        std::fs::create_dir_all(dir).map_err(|e| Error::io(dir, &e))?;
        let dtype = dtype.or(self.source_dtype).unwrap_or(WeightDtype::F32);
        let (config, files, layout) = (self.config.clone(), self.files.clone(), self.layout);
        let places: HashMap<String, Param> =
            self.model.params.tensors.iter().map(|t| (t.spec.name.clone(), t.param())).collect();
        save_model(dir, &files, &config, layout, dtype, MAX_SHARD_BYTES, |name, out| match places.get(name) {
            Some(&param) => self.read_weights(param, out),
            None => Err(Error::new(ErrorCode::Internal, format!("the model has no tensor `{name}`"))),
        })
    }

    /// Reads what [`Engine::save_state`] wrote. The engine must have been opened with the same model and type. Nothing
    /// is changed unless the file fits.
    pub fn restore_state(&mut self, dir: &Path) -> Result<()> {
        let path = dir.join(STATE_FILE);
        let arrays = self.state_arrays()?;
        // Whatever is wrong with the file, it is a state that is damaged, not the weights of a model.
        let file = SafetensorsFile::open(&path)
            .map_err(|e| if e.code == ErrorCode::Io { e } else { damaged(&path, &e.message) })?;
        if file.metadata("format") != Some(FORMAT) {
            return Err(damaged(&path, "it is not a state that this version writes"));
        }
        if file.metadata("layout") != Some(self.layout().as_str()) {
            return Err(damaged(&path, "it belongs to another model, or to a run with another dtype or rounding"));
        }
        let Some(steps) = file.metadata("steps").and_then(|s| s.parse().ok()) else {
            return Err(damaged(&path, "its step count is missing"));
        };
        let loss_scale = match self.loss_scale {
            None => None,
            Some(scale) => match file.metadata("loss_scale").and_then(|text| scale.restored(text)) {
                None => return Err(damaged(&path, "its loss scale is missing")),
                restored => restored,
            },
        };
        for (name, buffer) in &arrays {
            if file.info(name) != Some((file_dtype(buffer.dtype), &[buffer.len][..])) {
                return Err(damaged(&path, &format!("its array `{name}` is missing or of another size")));
            }
        }
        self.settle();
        self.give_up_submitted();
        // The weights that it was about are written over.
        self.pending = None;
        for (name, buffer) in &arrays {
            let bytes = file.bytes(name)?;
            for (piece, bytes) in bytes.chunks(PIECE * buffer.dtype.bytes()).enumerate() {
                let (start, len) = (piece * PIECE, bytes.len() / buffer.dtype.bytes());
                if *name == MASTERS {
                    let words = bytes.chunks_exact(4).map(|word| [word[0], word[1], word[2], word[3]]);
                    let values: Vec<f32> = words.map(f32::from_le_bytes).collect();
                    self.write_weights(Param { offset: start, len }, &values);
                } else {
                    self.backend.upload(bytes, buffer.slice(start, len));
                }
            }
        }
        self.steps = steps;
        self.loss_scale = loss_scale;
        Ok(())
    }
}

fn file_dtype(dtype: DType) -> Dtype {
    match dtype {
        DType::F32 => Dtype::F32,
        DType::Bf16 => Dtype::BF16,
        DType::F16 => Dtype::F16,
        DType::F64 => Dtype::F64,
        DType::I32 => Dtype::I32,
        DType::U16 => Dtype::U16,
    }
}

fn damaged(path: &Path, what: &str) -> Error {
    Error::new(ErrorCode::State, format!("{}: {what}", path.display()))
        .hint("resume from another checkpoint of this run, with the options that it was started with")
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
