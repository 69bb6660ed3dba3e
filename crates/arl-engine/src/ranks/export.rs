//! A model's folder and an adapter's, of which each rank has a part of the exact weights.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use arl_model::{Error, ErrorCode, Lora, MAX_SHARD_BYTES, Result, SharedModel, WeightDtype, save_adapter};

use crate::backend::Backend;
use crate::engine::Engine;
use crate::placement::Param;

impl<B: Backend + ?Sized> Engine<B> {
    /// As [`Engine::export_model`], by all ranks at once: rank 0 makes the files, and each writes what it owns.
    pub(crate) fn export_pieces(&mut self, dir: &Path, dtype: Option<WeightDtype>) -> Result<()> {
        self.check_joined()?;
        let (config, files, format) = (self.config.clone(), self.files.clone(), self.format.clone());
        let model = SharedModel {
            dir,
            files: &files,
            config: &config,
            format: &format,
            dtype,
            max_shard_bytes: MAX_SHARD_BYTES,
        };
        let laid_out = match self.ranks.rank {
            0 => std::fs::create_dir_all(dir).map_err(|e| Error::io(dir, &e)).and_then(|()| model.lay_out()),
            _ => Ok(()),
        };
        self.ranks.agree(laid_out)?;
        let places: HashMap<String, Param> =
            self.model.placement.tensors.iter().map(|t| (t.spec.name.clone(), t.param)).collect();
        let owned: HashMap<String, Vec<Range<usize>>> =
            places.iter().map(|(name, &param)| (name.clone(), self.owned_ranges(param))).collect();
        let of = |name: &str| owned.get(name).cloned().unwrap_or_default();
        let filled = model.fill(of, |name, start, out| match places.get(name) {
            Some(param) => self.read_weights(param.part(start, out.len()), out),
            None => Err(Error::new(ErrorCode::Internal, format!("the model has no tensor `{name}`"))),
        });
        self.ranks.agree(filled)
    }

    fn owned_ranges(&self, param: Param) -> Vec<Range<usize>> {
        self.model.owned(param).into_iter().map(|part| part.start..part.start + part.len).collect()
    }

    /// As [`Engine::export_adapter`], by all ranks at once: rank 0 writes it, for an adapter is small.
    pub(crate) fn export_gathered(
        &mut self,
        dir: &Path,
        lora: &Lora,
        base: Option<&str>,
        places: &[(String, Param)],
    ) -> Result<()> {
        let mut values: HashMap<&str, Vec<f32>> = HashMap::with_capacity(places.len());
        for (name, param) in places {
            let gathered = self.gather_values(*param, |engine, part, _, out| engine.read_weights(part, out))?;
            values.insert(name, gathered);
        }
        let written = match self.ranks.rank {
            0 => std::fs::create_dir_all(dir).map_err(|e| Error::io(dir, &e)).and_then(|()| {
                save_adapter(dir, &self.files, lora, base, |name, out| match values.get(name) {
                    Some(values) => {
                        out.copy_from_slice(values);
                        Ok(())
                    }
                    None => Err(Error::new(ErrorCode::Internal, format!("the engine trains no tensor `{name}`"))),
                })
            }),
            _ => Ok(()),
        };
        self.ranks.agree(written)
    }
}
