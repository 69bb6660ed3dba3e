//! Weights after an update of which each rank has done its own pieces, and values of parameters of which each rank has some.

use arl_model::Result;

use super::PART;
use crate::backend::Backend;
use crate::backend::comm::Part;
use crate::engine::Engine;
use crate::placement::Param;
use crate::placement::cut::{Bucket, Cut, owned};
use crate::placement::shards;
use crate::placement::store::Store;

impl<B: Backend + ?Sized> Engine<B> {
    /// Gives every rank the weights that the others have updated, where ranks divide moments; where they divide weights too, what it
    /// keeps and its counterparts have updated, and of what stays whole all. Parts come in the order in which a forward pass needs them, which on GPUs waits for each when it needs it; whatever else
    /// reads weights calls [`Engine::complete_update`] first.
    pub(crate) fn gather_weights(&mut self) -> Result<()> {
        let Some(cut) = self.model.cut.clone() else { return Ok(()) };
        self.check_joined()?;
        self.complete_update();
        if let Some(shards) = &cut.weights {
            self.ranks.forget_gathered();
            let weights = self.model.store.weights;
            let model = &self.model;
            return self.ranks.in_line(&mut *self.backend, |ranks, backend| {
                let mut trained = shards.weights.all.iter().filter(|shard| shard.trained);
                trained.try_for_each(|shard| ranks.gather_updated(backend, model, shard))?;
                let mut whole = shards.weights.of(shards::Part::Whole).filter(|shard| shard.trained);
                whole.try_for_each(|shard| ranks.gather_shard(backend, weights, *shard, true))
            });
        }
        let width = self.model.weight_bytes();
        let mut buckets: Vec<&Bucket> = cut.buckets.iter().collect();
        buckets.sort_by_key(|bucket| bucket.part);
        self.ranks.begin_exchanges(&mut *self.backend);
        for (i, bucket) in buckets.iter().enumerate() {
            let piece = cut.piece_len(bucket);
            for start in (0..piece).step_by(PART) {
                let bytes = PART.min(piece - start) * width;
                let all: Vec<_> = (0..cut.ranks(bucket)).map(|rank| self.places(&cut, bucket, rank, start)).collect();
                let (axis, backend, own) = (bucket.axis, &mut *self.backend, &all[cut.place.index(bucket.axis)]);
                self.ranks.gather_parts_along(axis, backend, bytes, own, &all, |sent| &mut sent.weights)?;
            }
            if buckets.get(i + 1).is_none_or(|next| next.part != bucket.part) {
                self.ranks.end_updated(&mut *self.backend, bucket.part);
            }
        }
        Ok(())
    }

    /// The weights of elements `[start, start + PART)` of a rank's piece of a bucket.
    fn places(&self, cut: &Cut, bucket: &Bucket, rank: usize, start: usize) -> Vec<Part> {
        let piece = cut.piece(bucket, rank);
        let (first, end) = ((piece.start + start).min(piece.end), (piece.start + start + PART).min(piece.end));
        let (store, width) = (self.model.store, self.model.weight_bytes());
        let part = |run: &crate::placement::Run| {
            let (from, to) = (run.optimizer.max(first), (run.optimizer + run.len).min(end));
            (from < to).then(|| Part {
                buffer: Store::of_run(store.weights, run.part(from - run.optimizer, to - from)),
                at: (from - first) * width,
            })
        };
        self.model.placement.runs.iter().filter_map(part).collect()
    }

    /// The values of the parameter of a name, which has so many elements and of which this rank has `param`, possibly nothing. All
    /// ranks call it, for the same parameters in the same order. `read` as in [`Engine::gather_values`].
    pub(crate) fn gather_tensor(
        &mut self,
        name: &str,
        elements: usize,
        param: Param,
        read: impl FnMut(&mut Self, Param, usize, &mut [f32]) -> Result<()>,
    ) -> Result<Vec<f32>> {
        if self.model.place.mesh.divides_model() {
            return self.gather_slices(name, elements, read);
        }
        self.gather_values(param, read)
    }

    /// The values of a parameter, all of which every rank has or divides, of which each reads what it owns. All ranks call it, for the same parameters in the same
    /// order. `read` fills in the values of a part of the parameter, which begins at the given place in this rank's own arrays.
    pub(crate) fn gather_values(
        &mut self,
        param: Param,
        mut read: impl FnMut(&mut Self, Param, usize, &mut [f32]) -> Result<()>,
    ) -> Result<Vec<f32>> {
        let mut values = vec![0f32; param.len];
        let Some(cut) = self.model.cut.clone() else {
            read(self, param, param.trained.unwrap_or(0), &mut values)?;
            return Ok(values);
        };
        self.check_joined()?;
        let parts = |rank: usize| owned(Some(&*cut), param, rank);
        let len = |rank: usize| parts(rank).iter().map(|part| part.len).sum::<usize>();
        let mut own = Vec::new();
        for part in parts(cut.place.rank) {
            let start = own.len();
            own.resize(start + part.len, 0f32);
            read(self, param.part(part.start, part.len), part.own, &mut own[start..])?;
        }
        let ranks = cut.place.world();
        let most = (0..ranks).map(len).max().unwrap_or(0);
        own.resize(most, 0.0);
        let all: Vec<f32> = super::read(&self.ranks.gather(bytemuck::cast_slice(&own), |sent| &mut sent.figures)?);
        for rank in 0..ranks {
            let mut at = rank * most;
            for part in parts(rank) {
                values[part.start..part.start + part.len].copy_from_slice(&all[at..at + part.len]);
                at += part.len;
            }
        }
        Ok(values)
    }
}
