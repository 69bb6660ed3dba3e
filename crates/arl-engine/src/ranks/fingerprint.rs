//! A hash by which ranks that train together know that they have the same.

use arl_model::Result;

use super::{PART, read};
use crate::backend::{Backend, Buffer};
use crate::engine::Engine;
use crate::mesh::{Axis, Place};

/// The axes whose ranks have the same of a parameter.
const AXES: [Axis; 3] = Axis::SAME;

/// Hashes of values, by the axis whose ranks have the same.
#[derive(Clone, Default)]
pub(crate) struct Hashes([blake3::Hasher; AXES.len()]);

impl Hashes {
    /// That of an axis whose ranks have the same of a parameter.
    pub(crate) fn of(&mut self, axis: Axis) -> &mut blake3::Hasher {
        &mut self.0[AXES.iter().position(|other| *other == axis).unwrap_or(0)]
    }
}

impl<B: Backend + ?Sized> Engine<B> {
    /// A hash of all that ranks that train together have in common: weights, step count and loss scale, and moments and masters
    /// where they do not divide them. Where they divide weights, of all pieces of these, for which all ranks call it at once, and
    /// of the values that each rank has read. Where a mesh divides the model, all ranks call it at once, too, and it is the same on
    /// all of them if those that have the same of a parameter have the same values.
    pub fn fingerprint(&mut self) -> Result<String> {
        self.settle();
        self.complete_update();
        let (store, training) = (self.model.store, self.training()?);
        let mut hash = blake3::Hasher::new();
        if self.model.cut.is_none() {
            for array in store.masters.into_iter().chain([training.moment1, training.moment2]) {
                self.hash_array(&mut hash, array)?;
            }
        }
        let kept = self.model.shards().map(|shards| (shards.weights.pieces, shards.weights.kept));
        if let Some((pieces, _)) = kept {
            let mut own = blake3::Hasher::new();
            self.hash_array(&mut own, store.weights.slice(0, pieces))?;
            let own = own.finalize();
            let all: Vec<[u8; 32]> = read(&self.ranks.gather(own.as_bytes(), |sent| &mut sent.figures)?);
            // Of a rank's pieces those of its first counterpart count: then a rank whose own are others has another hash.
            let place = self.model.place;
            for rank in 0..all.len() {
                let first = Place { rank, ..place }.counterparts(Axis::Stage)[0];
                hash.update(if rank == place.rank { own.as_bytes() } else { &all[first] });
            }
        }
        match kept {
            _ if self.model.place.mesh.divides_model() => self.hash_slices(&mut hash)?,
            kept => {
                let (pieces, kept) = kept.unwrap_or((0, store.weights.len));
                self.hash_array(&mut hash, store.weights.slice(pieces, kept - pieces))?;
                hash.update(self.loaded.of(Axis::Stage).finalize().as_bytes());
            }
        }
        let scale = self.loss_scale.map(|scale| scale.scale());
        hash.update(format!("{} {scale:?}", self.steps).as_bytes());
        if self.model.tower.is_some() {
            hash.update(&self.vision_steps.to_le_bytes());
        }
        Ok(hash.finalize().to_hex().to_string())
    }

    /// Adds the hashes of the weights of every rank, each as the first rank that has the same gives it, but this rank's own, which
    /// differ where its weights do. Of divided weights, those that are whole count, and the values that were read.
    fn hash_slices(&mut self, hash: &mut blake3::Hasher) -> Result<()> {
        let divided = self.model.shards().is_some();
        let mut hashes = self.loaded.clone();
        for i in 0..self.model.placement.tensors.len() {
            let tensor = &self.model.placement.tensors[i];
            if divided && tensor.spec.decay || tensor.param.quantized {
                continue;
            }
            let (param, weights) = (tensor.param, self.model.store.weight(tensor.param));
            self.hash_array(hashes.of(param.axis), weights)?;
        }
        let own = AXES.map(|axis| *hashes.of(axis).finalize().as_bytes());
        let all: Vec<[u8; 32]> = read(&self.ranks.gather(own.as_flattened(), |sent| &mut sent.figures)?);
        for rank in 0..self.model.place.world() {
            let place = Place { rank, ..self.model.place };
            for (i, axis) in AXES.into_iter().enumerate() {
                let first = place.members(axis)[0];
                hash.update(if rank == self.model.place.rank { &own[i] } else { &all[first * AXES.len() + i] });
            }
        }
        Ok(())
    }

    fn hash_array(&mut self, hash: &mut blake3::Hasher, array: Buffer) -> Result<()> {
        for start in (0..array.len).step_by(PART) {
            let piece = array.slice(start, PART.min(array.len - start));
            let mut bytes = vec![0; piece.bytes()];
            self.backend.read_back(piece, &mut bytes)?;
            hash.update(&bytes);
        }
        Ok(())
    }
}
