//! Weights in and out of the device: from a checkpoint, from random numbers, and to a model's folder.

use std::collections::HashMap;
use std::path::Path;

use half::{bf16, f16};

use arl_model::{
    Checkpoint, Error, ErrorCode, Lora, MAX_SHARD_BYTES, Result, Role, TensorSpec, WeightDtype, init_f32, save_model,
};

use crate::backend::{Backend, Buffer, DType, join_master, split_master};
use crate::engine::Engine;
use crate::placement::cut::Owned;
use crate::placement::shards::Part;
use crate::placement::store::Store;
use crate::placement::{Param, Tensor};

/// Elements that cross between host and device at a time.
pub(crate) const PIECE: usize = 1 << 20;

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

    /// Reads this rank's weights from the mapped checkpoint, or the frozen ones alone, a piece at a time. Adapters are drawn. Where
    /// ranks divide weights, each reads all of what several have the same of, so that it knows whether the others have read the same.
    pub(crate) fn load_checkpoint(&mut self, dir: &Path, frozen_alone: bool) -> Result<()> {
        let checkpoint = self.open_checkpoint(dir)?;
        let mut staging = vec![0f32; PIECE];
        for i in 0..self.model.placement.tensors.len() {
            let Tensor { spec, param, .. } = &self.model.placement.tensors[i];
            if frozen_alone && param.trained.is_some() {
                continue;
            }
            if matches!(spec.role, Role::LoraA(_) | Role::LoraB(_) | Role::LoraMagnitude(_)) {
                self.draw(i, self.model.lora.as_ref().map_or(0, |&(_, seed)| seed))?;
                continue;
            }
            let (name, param) = (self.source(i).name.clone(), *param);
            if param.quantized {
                let nf4 = self.stored_nf4(&checkpoint, i)?;
                self.write_nf4(i, nf4)?;
                continue;
            }
            let slice = self.model.placement.tensors[i].slice.clone();
            for start in (0..param.len).step_by(PIECE) {
                let len = PIECE.min(param.len - start);
                checkpoint.read_f32_slice(&name, &slice, start, &mut staging[..len])?;
                if self.model.shards().is_some() {
                    self.loaded.of(param.axis).update(bytemuck::cast_slice(&staging[..len]));
                }
                self.write_weights(param.part(start, len), &staging[..len]);
            }
        }
        if frozen_alone {
            return Ok(());
        }
        self.begin_magnitudes(|engine, tensor, out| {
            if engine.model.placement.tensors[tensor].param.quantized {
                engine.stored_nf4(&checkpoint, tensor)?.read(0, out);
                return Ok(());
            }
            checkpoint.read_f32_part(&engine.source(tensor).name, 0, out)
        })
    }

    /// Magnitudes of layers with fresh adapters are the norms of their weights' rows. `read` gives all values of the tensor of a
    /// number; they are read from the device where it has whole rows.
    fn begin_magnitudes(&mut self, read: impl Fn(&Self, usize, &mut [f32]) -> Result<()>) -> Result<()> {
        let tensors = &self.model.placement.tensors;
        let of = |tensor: &Tensor| {
            let module = tensor.spec.name.strip_suffix(".lora_magnitude_vector")?;
            let weight = tensors.iter().position(|other| other.spec.name.strip_suffix(".weight") == Some(module))?;
            Some((tensor.clone(), weight))
        };
        let pairs: Vec<(Tensor, usize)> = tensors.iter().filter_map(of).collect();
        for (magnitude, tensor) in pairs {
            let Tensor { spec, slice, param: weight, .. } = &self.model.placement.tensors[tensor];
            let (weight, whole_rows) = (*weight, slice.columns.len() == spec.elements() / spec.shape[0].max(1));
            let here = whole_rows && self.model.shards().is_none();
            let (len, rows) = if here { (weight.len, magnitude.param.len) } else { (spec.elements(), spec.shape[0]) };
            let (mut values, mut norms) = (vec![0f32; len], vec![0f32; rows]);
            if here {
                self.read_weights(weight, &mut values)?;
            } else {
                read(self, tensor, &mut values)?;
            }
            // As products see them: those in NF4, and those that another rank has, are exact until here.
            round(self.model.dtype, &mut values);
            Lora::row_norms(&values, &mut norms);
            let norms = if here { norms } else { magnitude.slice.of_whole(norms) };
            self.write_weights(magnitude.param, &norms);
        }
        Ok(())
    }

    /// Draws all weights.
    pub(crate) fn load_random(&mut self, seed: u64) -> Result<()> {
        (0..self.model.placement.tensors.len()).try_for_each(|i| self.draw(i, seed))?;
        self.begin_magnitudes(|engine, tensor, out| {
            init_f32(&engine.config, engine.source(tensor), seed, out);
            if engine.model.placement.tensors[tensor].param.quantized {
                engine.quantized(out).read(0, out);
            }
            Ok(())
        })
    }

    /// Draws the values of a tensor: of all of it, whatever this rank has.
    fn draw(&mut self, tensor: usize, seed: u64) -> Result<()> {
        let Tensor { spec, slice, param, .. } = &self.model.placement.tensors[tensor];
        let (param, mut values) = (*param, vec![0f32; spec.elements()]);
        let slice = slice.clone();
        init_f32(&self.config, self.source(tensor), seed, &mut values);
        if param.quantized {
            return self.write_nf4(tensor, self.quantized(&values));
        }
        self.write_weights(param, &slice.of_whole(values));
        Ok(())
    }

    /// The tensor whose values another one begins with: its own, but for a head that is trained as a whole and was tied to
    /// the embedding, of which it is a copy.
    fn source(&self, tensor: usize) -> &TensorSpec {
        let spec = &self.model.placement.tensors[tensor].spec;
        if spec.role != Role::LmHead || !self.config.tie_word_embeddings {
            return spec;
        }
        // Another stage may have the embedding.
        self.model.placement.table().into_iter().find(|other| other.role == Role::Embedding).unwrap_or(spec)
    }

    /// Uploads a parameter's weights, and the masters of a trained one; where ranks divide them, this rank's own.
    pub(crate) fn write_weights(&mut self, param: Param, values: &[f32]) {
        let store = self.model.store;
        self.ranks.forget_gathered();
        self.ranks.settle_exchanges(&mut *self.backend);
        for (piece, values) in values.chunks(PIECE).enumerate() {
            let param = param.part(piece * PIECE, values.len());
            let weights = self.model.weight_parts(param);
            let array = store.masters.filter(|_| param.trained.is_some() && !param.wide);
            let owned = array.map(|array| (array, self.model.owned(param)));
            match weights.first().map_or(store.weights.dtype, |(_, weights)| weights.dtype) {
                DType::F32 => self.upload_parts(&weights, values),
                DType::F16 => {
                    let rounded: Vec<f16> = values.iter().map(|&value| f16::from_f32(value)).collect();
                    self.upload_parts(&weights, &rounded);
                    self.upload_owned(owned, values);
                }
                _ => {
                    let (high, low): (Vec<u16>, Vec<u16>) = values.iter().map(|&value| split_master(value)).unzip();
                    self.upload_parts(&weights, &high);
                    self.upload_owned(owned, &low);
                }
            }
        }
    }

    /// Uploads what each place has of `values`.
    fn upload_parts<T: bytemuck::Pod>(&mut self, parts: &[(usize, Buffer)], values: &[T]) {
        for &(start, place) in parts {
            self.backend.upload(bytemuck::cast_slice(&values[start..start + place.len]), place);
        }
    }

    /// Uploads what an array has of `values`.
    fn upload_owned<T: bytemuck::Pod>(&mut self, array: Option<(Buffer, Vec<Owned>)>, values: &[T]) {
        let Some((array, parts)) = array else { return };
        for Owned { start, own, len } in parts {
            self.backend.upload(bytemuck::cast_slice(&values[start..start + len]), array.slice(own, len));
        }
    }

    /// Reads a parameter's weights back; the exact masters where there are any. Where ranks divide masters, or weights, the parameter
    /// is a part of one that this rank owns.
    pub(crate) fn read_weights(&mut self, param: Param, out: &mut [f32]) -> Result<()> {
        if param.quantized {
            return self.read_nf4(param, out);
        }
        self.complete_update_in_host();
        let store = self.model.store;
        for (piece, out) in out.chunks_mut(PIECE).enumerate() {
            let param = param.part(piece * PIECE, out.len());
            let weights = match self.model.weight_parts(param)[..] {
                [(_, weights)] if weights.len == param.len => weights,
                _ => return Err(Error::new(ErrorCode::Internal, "weights are read that another rank owns")),
            };
            let masters = match store.masters.filter(|_| param.trained.is_some() && !param.wide) {
                None => None,
                Some(array) => match self.model.owned(param)[..] {
                    [Owned { own, len, .. }] if len == param.len => Some(array.slice(own, len)),
                    _ => return Err(Error::new(ErrorCode::Internal, "masters are read that another rank owns")),
                },
            };
            match (weights.dtype, masters) {
                (DType::F32, _) => self.backend.read_back(weights, bytemuck::cast_slice_mut(out))?,
                (DType::F16, Some(masters)) => self.backend.read_back(masters, bytemuck::cast_slice_mut(out))?,
                (DType::F16, None) => {
                    let rounded: Vec<f16> = self.read_back(weights)?;
                    out.iter_mut().zip(&rounded).for_each(|(out, rounded)| *out = rounded.to_f32());
                }
                (_, Some(masters)) => {
                    let (high, low): (Vec<u16>, Vec<u16>) = (self.read_back(weights)?, self.read_back(masters)?);
                    let exact = high.iter().zip(&low).map(|(&high, &low)| join_master(high, low));
                    out.iter_mut().zip(exact).for_each(|(out, exact)| *out = exact);
                }
                (_, None) => {
                    let rounded: Vec<bf16> = self.read_back(weights)?;
                    out.iter_mut().zip(&rounded).for_each(|(out, rounded)| *out = rounded.to_f32());
                }
            }
        }
        Ok(())
    }

    fn read_back<T: bytemuck::Pod>(&mut self, buffer: Buffer) -> Result<Vec<T>> {
        let mut values = vec![T::zeroed(); buffer.len];
        self.backend.read_back(buffer, bytemuck::cast_slice_mut(&mut values))?;
        Ok(values)
    }

    /// Names of all tensors, as in a checkpoint.
    pub fn tensor_names(&self) -> Vec<String> {
        self.model.placement.table().iter().map(|spec| spec.name.clone()).collect()
    }

    /// Reads one tensor back by its name in a checkpoint, row-major. Where ranks divide moments, all of them call it, for the
    /// same tensors in the same order.
    pub fn read_tensor(&mut self, name: &str, kind: Kind) -> Result<Vec<f32>> {
        let table = self.model.placement.table();
        let Some(spec) = table.iter().find(|spec| spec.name == name) else {
            return Err(Error::new(ErrorCode::Internal, format!("the model has no tensor `{name}`")));
        };
        let (elements, trained) = (spec.elements(), spec.trainable);
        let tensor = self.model.placement.tensors.iter().find(|tensor| tensor.spec.name == name);
        let param = tensor.map_or_else(Param::default, |tensor| tensor.param);
        let in_nf4 = tensor.filter(|tensor| tensor.param.quantized).map(|tensor| Part::of(&tensor.spec));
        self.complete_update_in_host();
        let array = match (kind, self.model.store.training) {
            (Kind::Weights, _) => {
                in_nf4.map_or(Ok(()), |part| self.gather_nf4(part))?;
                return self
                    .gather_tensor(name, elements, param, |engine, part, _, out| engine.read_weights(part, out));
            }
            (_, None) => return Err(Error::new(ErrorCode::Internal, "an engine for inference only has weights alone")),
            (Kind::Gradients, Some(training)) if !self.model.divides_gradients() => {
                let Some(array) = Store::trained(training.gradients, param) else { return Err(frozen(name)) };
                let scale = self.gradient_scale;
                return Ok(self.read_back::<f32>(array)?.into_iter().map(|value| value / scale).collect());
            }
            (Kind::Gradients, Some(training)) => training.sums.unwrap_or(training.gradients),
            (Kind::Moment1, Some(training)) => training.moment1,
            (Kind::Moment2, Some(training)) => training.moment2,
        };
        if !trained {
            return Err(frozen(name));
        }
        let scale = if kind == Kind::Gradients { self.gradient_scale } else { 1.0 };
        self.gather_tensor(name, elements, param, |engine, part, own, out| {
            let values = match array.slice(own, part.len) {
                narrow if narrow.dtype == DType::Bf16 => {
                    engine.read_back::<bf16>(narrow)?.into_iter().map(bf16::to_f32).collect()
                }
                values => engine.read_back::<f32>(values)?,
            };
            out.iter_mut().zip(values).for_each(|(out, value)| *out = value / scale);
            Ok(())
        })
    }

    /// Writes the model to `dir`, an empty folder or none yet, in Hugging Face's layout, as the folder was that the
    /// engine was opened on: configuration, tokenizer, names, joined tensors, and types (without weights there, the type
    /// that `config.json` names, else f32). `dtype` replaces the types. With weights of 16 bits, what is narrowed is the
    /// exact masters.
    pub fn export_model(&mut self, dir: &Path, dtype: Option<WeightDtype>) -> Result<()> {
        if self.lora().is_some() {
            return Err(Error::new(ErrorCode::Config, "an engine with adapters saves an adapter, not a model")
                .hint("merge the adapter into its model: arl merge"));
        }
        if self.is_divided() {
            return self.export_pieces(dir, dtype);
        }
        if self.model.store.quantized.is_some() {
            return Err(Error::new(ErrorCode::Config, "an engine with weights in 4 bits saves no model")
                .hint("save the model from its folder with weights in 16 bits"));
        }
        std::fs::create_dir_all(dir).map_err(|e| Error::io(dir, &e))?;
        let (config, files, format) = (self.config.clone(), self.files.clone(), self.format.clone());
        let places: HashMap<String, Param> =
            self.model.placement.tensors.iter().map(|t| (t.spec.name.clone(), t.param)).collect();
        save_model(dir, &files, &config, &format, dtype, MAX_SHARD_BYTES, |name, out| match places.get(name) {
            Some(&param) => self.read_weights(param, out),
            None => Err(Error::new(ErrorCode::Internal, format!("the model has no tensor `{name}`"))),
        })
    }
}

/// Rounds values as weights of a type are.
fn round(dtype: DType, values: &mut [f32]) {
    let rounded = |value: f32| match dtype {
        DType::F16 => f16::from_f32(value).to_f32(),
        DType::Bf16 => bf16::from_bits(split_master(value).0).to_f32(),
        _ => value,
    };
    values.iter_mut().for_each(|value| *value = rounded(*value));
}

fn frozen(name: &str) -> Error {
    Error::new(ErrorCode::Internal, format!("`{name}` is frozen and has weights alone"))
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
            ..MicroBatch::default()
        };
        engine.step(&[batch], Hyper { learning_rate: 0.1, max_grad_norm: 1.0 }).unwrap();
        let gaps = engine.model.placement.gaps();
        assert!(!gaps.is_empty());
        for gap in gaps {
            let mut values = vec![1f32; gap.len];
            engine.read_weights(gap, &mut values).unwrap();
            assert_eq!(values, vec![0.0; gap.len]);
        }
    }
}
