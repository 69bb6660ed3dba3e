//! Frozen weights in NF4, in and out of the device: from a folder that has them so, or quantized as they are read.

use arl_model::{Checkpoint, Nf4, Nf4Builder, Nf4Scales, Result, nf4_scale_values};

use crate::backend::{Backend, Nf4Weights};
use crate::engine::Engine;
use crate::placement::Param;
use crate::weights::PIECE;

impl<B: Backend + ?Sized> Engine<B> {
    /// Reads a parameter of a checkpoint in NF4, or quantizes it a piece at a time.
    pub(crate) fn load_nf4(&mut self, checkpoint: &Checkpoint, name: &str, param: Param) -> Result<()> {
        let stored = match checkpoint.read_nf4(name)? {
            None => checkpoint.quantize_shared(name, self.model.nested_scales)?,
            stored => stored,
        };
        let nf4 = match stored {
            Some(nf4) => nf4,
            None => {
                let (mut staging, mut builder) = (vec![0f32; PIECE.min(param.len)], Nf4Builder::default());
                for start in (0..param.len).step_by(PIECE) {
                    let piece = &mut staging[..PIECE.min(param.len - start)];
                    checkpoint.read_f32_part(name, start, piece)?;
                    builder.push(piece);
                }
                builder.finish(self.model.nested_scales)
            }
        };
        self.write_nf4(param, nf4)
    }

    /// Quantizes values.
    pub(crate) fn quantize(&mut self, param: Param, values: &[f32]) -> Result<()> {
        let mut builder = Nf4Builder::default();
        values.chunks(PIECE).for_each(|piece| builder.push(piece));
        self.write_nf4(param, builder.finish(self.model.nested_scales))
    }

    /// A parameter's values; it is one tensor.
    pub(crate) fn read_nf4(&mut self, param: Param, out: &mut [f32]) -> Result<()> {
        for (first, part) in self.nf4_parts(param) {
            read_back_nf4(&mut *self.backend, part)?.read(0, &mut out[first..first + part.len]);
        }
        Ok(())
    }

    fn write_nf4(&mut self, param: Param, nf4: Nf4) -> Result<()> {
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

fn mixed() -> arl_model::Error {
    let what = "some tensors in 4 bits have scales in 8 bits and others do not, or not as config.json says";
    arl_model::Error::new(arl_model::ErrorCode::Weights, what)
        .hint("bnb_4bit_use_double_quant of quantization_config says which; save the model again with transformers")
}
