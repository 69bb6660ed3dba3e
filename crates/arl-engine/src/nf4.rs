//! Frozen weights in NF4, in and out of the device: from a folder that has them so, or quantized as they are read.

use arl_model::{Checkpoint, Error, ErrorCode, Nf4, Nf4Builder, Nf4Scales, Result, nf4_scale_values};

use crate::backend::{Backend, Nf4Weights};
use crate::engine::Engine;
use crate::placement::shards::Part;
use crate::placement::{Param, Tensor};
use crate::weights::PIECE;

impl<B: Backend + ?Sized> Engine<B> {
    /// Reads a tensor of a checkpoint in NF4, or quantizes it a piece at a time; all of it, whatever this rank has.
    pub(crate) fn stored_nf4(&self, checkpoint: &Checkpoint, tensor: usize) -> Result<Nf4> {
        let spec = &self.model.placement.tensors[tensor].spec;
        let (name, len) = (&spec.name, spec.elements());
        let stored = match checkpoint.read_nf4(name)? {
            None => checkpoint.quantize_shared(name, self.model.nested_scales)?,
            stored => stored,
        };
        if let Some(nf4) = stored {
            return Ok(nf4);
        }
        let (mut staging, mut builder) = (vec![0f32; PIECE.min(len)], Nf4Builder::default());
        for start in (0..len).step_by(PIECE) {
            let piece = &mut staging[..PIECE.min(len - start)];
            checkpoint.read_f32_part(name, start, piece)?;
            builder.push(piece);
        }
        Ok(builder.finish(self.model.nested_scales))
    }

    /// A tensor's values, quantized.
    pub(crate) fn quantized(&self, values: &[f32]) -> Nf4 {
        let mut builder = Nf4Builder::default();
        values.chunks(PIECE).for_each(|piece| builder.push(piece));
        builder.finish(self.model.nested_scales)
    }

    /// A parameter's values; it is one tensor, and, where ranks divide it, gathered.
    pub(crate) fn read_nf4(&mut self, param: Param, out: &mut [f32]) -> Result<()> {
        for (first, part) in self.nf4_parts(param) {
            read_back_nf4(&mut *self.backend, part)?.read(0, &mut out[first..first + part.len]);
        }
        Ok(())
    }

    /// Uploads what this rank has of a tensor, of which `nf4` is all.
    pub(crate) fn write_nf4(&mut self, tensor: usize, nf4: Nf4) -> Result<()> {
        let Tensor { spec, slice, param, .. } = &self.model.placement.tensors[tensor];
        let param = *param;
        let nf4 = if param.len == spec.elements() {
            nf4
        } else {
            // `Model::new` has refused what is no whole blocks.
            let cut = || Error::new(ErrorCode::Internal, format!("blocks of `{}` are cut", spec.name));
            nf4.gathered(slice.runs(0..param.len)).ok_or_else(cut)?
        };
        let Some(store) = self.model.store.quantized else { return Ok(()) };
        let nf4 = if store.is_nested() { nf4 } else { nf4.plain() };
        let (scales, factors) = match &nf4.scales {
            Nf4Scales::Nested { codes, largest, offset } if store.is_nested() => {
                (codes.as_slice(), [&[*offset], largest.as_slice()].concat())
            }
            Nf4Scales::Plain(scales) if !store.is_nested() => (bytemuck::cast_slice(scales), Vec::new()),
            _ => return Err(mixed()),
        };
        let arrays = [nf4.codes.as_slice(), scales, bytemuck::cast_slice(&factors)];
        let loaded = self.loaded.of(param.axis);
        for bytes in arrays {
            loaded.update(bytes);
        }
        let shards = self.model.shards().map(|shards| &shards.quantized);
        let kept = self.model.placement.quantized.kept(&store, shards, param);
        self.ranks.forget_gathered();
        self.ranks.settle_exchanges(&mut *self.backend);
        for (bytes, parts) in arrays.into_iter().zip(kept) {
            for (start, place) in parts {
                let first = start * place.dtype.bytes();
                self.backend.upload(&bytes[first..first + place.bytes()], place);
            }
        }
        let values = store.scale_values();
        values.into_iter().for_each(|place| self.backend.upload(bytemuck::cast_slice(nf4_scale_values()), place));
        Ok(())
    }

    /// Puts the tensors in NF4 of a part together on every rank, where ranks divide them. All of them call it.
    pub(crate) fn gather_nf4(&mut self, part: Part) -> Result<()> {
        if self.model.shards().is_none() {
            return Ok(());
        }
        self.check_joined()?;
        self.ranks.gather_quantized(&mut *self.backend, &self.model, part)
    }

    fn nf4_parts(&self, param: Param) -> Vec<(usize, Nf4Weights)> {
        let model = &self.model;
        model.store.quantized.map_or_else(Vec::new, |store| model.placement.quantized.parts(&store, param))
    }
}

/// Codes and scales of a tensor that the device has in NF4.
pub(crate) fn read_back_nf4<B: Backend + ?Sized>(backend: &mut B, part: Nf4Weights) -> Result<Nf4> {
    let mut nf4 = Nf4::zeros(part.len, part.nested.is_some());
    backend.read_back(part.codes, &mut nf4.codes)?;
    match (&mut nf4.scales, part.nested) {
        (Nf4Scales::Nested { codes, largest, offset }, Some(nested)) => {
            backend.read_back(part.scales, codes)?;
            let mut stored = vec![0f32; 1 + largest.len()];
            backend.read_back(nested.largest, bytemuck::cast_slice_mut(&mut stored))?;
            *offset = stored[0];
            largest.copy_from_slice(&stored[1..]);
        }
        (Nf4Scales::Plain(scales), _) => {
            backend.read_back(part.scales, bytemuck::cast_slice_mut(scales))?;
        }
        (Nf4Scales::Nested { .. }, None) => {}
    }
    Ok(nf4)
}

fn mixed() -> Error {
    let what = "some tensors in 4 bits have scales in 8 bits and others do not, or not as config.json says";
    Error::new(ErrorCode::Weights, what)
        .hint("bnb_4bit_use_double_quant of quantization_config says which; save the model again with transformers")
}
