//! A model's folder and an adapter's, of which each rank has a part of the exact weights.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use arl_model::{Error, ErrorCode, Lora, MAX_SHARD_BYTES, Result, SharedModel, WeightDtype, save_adapter};

use crate::backend::Backend;
use crate::engine::Engine;
use crate::placement::{Param, Tensor};

/// What a rank owns of a parameter.
struct OwnedRuns {
    param: Param,
    /// Ranges of the whole parameter, ascending, and the first element of each within what the rank has.
    runs: Vec<(Range<usize>, usize)>,
}

impl OwnedRuns {
    /// `len` elements of the whole parameter from `start` on, which are in one run.
    fn part(&self, start: usize, len: usize) -> Option<Param> {
        let (run, first) = self.runs.get(self.runs.partition_point(|(run, _)| run.end <= start))?;
        (run.start <= start && start + len <= run.end).then(|| self.param.part(first + start - run.start, len))
    }
}

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
        let laid_out = match self.ranks.place.rank {
            0 => std::fs::create_dir_all(dir).map_err(|e| Error::io(dir, &e)).and_then(|()| model.lay_out()),
            _ => Ok(()),
        };
        self.ranks.agree(laid_out)?;
        let tensors = self.model.placement.tensors.iter().filter(|tensor| !tensor.copied);
        let owned: HashMap<String, OwnedRuns> =
            tensors.map(|tensor| (tensor.spec.name.clone(), self.owned_runs(tensor))).collect();
        let runs = |name: &str| owned.get(name).into_iter().flat_map(|owned| owned.runs.iter());
        let of = |name: &str| runs(name).map(|(run, _)| run.clone()).collect();
        let filled = model.fill(of, |name, start, out| {
            let held = owned.get(name).and_then(|owned| owned.part(start, out.len()));
            let missing =
                || Error::new(ErrorCode::Internal, format!("this rank does not own what is read of `{name}`"));
            self.read_weights(held.ok_or_else(missing)?, out)
        });
        self.ranks.agree(filled)
    }

    fn owned_runs(&self, tensor: &Tensor) -> OwnedRuns {
        let mut runs = Vec::new();
        for part in self.model.owned(tensor.param) {
            let mut at = part.start;
            for run in tensor.slice.runs(part.start..part.start + part.len) {
                let len = run.len();
                runs.push((run, at));
                at += len;
            }
        }
        OwnedRuns { param: tensor.param, runs }
    }

    /// As [`Engine::export_adapter`], by all ranks at once: rank 0 writes it, for an adapter is small.
    pub(crate) fn export_gathered(&mut self, dir: &Path, lora: &Lora, base: Option<&str>) -> Result<()> {
        let trained = self.model.placement.table().into_iter().filter(|spec| spec.trainable);
        let trained: Vec<(String, usize)> = trained.map(|spec| (spec.name.clone(), spec.elements())).collect();
        let tensors = self.model.placement.tensors.iter();
        let places: HashMap<String, Param> = tensors.map(|tensor| (tensor.spec.name.clone(), tensor.param)).collect();
        let mut values: HashMap<&str, Vec<f32>> = HashMap::with_capacity(trained.len());
        for (name, elements) in &trained {
            // Of another stage's this rank has nothing.
            let own = places.get(name).copied().unwrap_or_default();
            let gathered =
                self.gather_tensor(name, *elements, own, |engine, part, _, out| engine.read_weights(part, out))?;
            values.insert(name, gathered);
        }
        let written = match self.ranks.place.rank {
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
