//! Frozen weights in NF4, in and out of the device: from a folder that has them so, or quantized as they are read.

use arl_model::{Checkpoint, Error, ErrorCode, Nf4, Nf4Builder, Nf4Scales, Result, nf4_scale_values};

use crate::backend::{Backend, Nf4Weights};
use crate::engine::Engine;
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

    /// A parameter's values; it is one tensor.
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
        let nested = self.model.store.quantized.is_some_and(|store| store.is_nested());
        let nf4 = if nested { nf4 } else { nf4.plain() };
        for (_, part) in self.nf4_parts(param) {
            self.backend.upload(&nf4.codes, part.codes);
            match (&nf4.scales, part.nested) {
                (Nf4Scales::Nested { codes, largest, offset }, Some(nested)) => {
                    let stored = [&[*offset], largest.as_slice()].concat();
                    self.backend.upload(codes, part.scales);
                    self.backend.upload(bytemuck::cast_slice(&stored), nested.largest);
                    self.backend.upload(bytemuck::cast_slice(nf4_scale_values()), nested.values);
                }
                (Nf4Scales::Plain(scales), None) => self.backend.upload(bytemuck::cast_slice(scales), part.scales),
                _ => return Err(mixed()),
            }
        }
        Ok(())
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
