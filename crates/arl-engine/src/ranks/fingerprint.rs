//! A hash by which ranks that train together know that they have the same.

use arl_model::Result;

use super::PART;
use crate::backend::{Backend, Buffer};
use crate::engine::Engine;

impl<B: Backend + ?Sized> Engine<B> {
    /// A hash of all that ranks that train together have in common: weights, step count and loss scale, and moments and masters
    /// where they do not divide them. Where they divide weights, of all pieces of these, for which all ranks call it at once, and
    /// of the values that each rank has read.
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
        match self.model.shards().map(|shards| (shards.pieces, shards.kept)) {
            None => self.hash_array(&mut hash, store.weights)?,
            Some((pieces, kept)) => {
                let mut own = blake3::Hasher::new();
                self.hash_array(&mut own, store.weights.slice(0, pieces))?;
                let all = self.ranks.figures(own.finalize().as_bytes())?;
                hash.update(&all);
                self.hash_array(&mut hash, store.weights.slice(pieces, kept - pieces))?;
                hash.update(self.loaded.finalize().as_bytes());
            }
        }
        let scale = self.loss_scale.map(|scale| scale.scale());
        hash.update(format!("{} {scale:?}", self.steps).as_bytes());
        if self.model.tower.is_some() {
            hash.update(&self.vision_steps.to_le_bytes());
        }
        Ok(hash.finalize().to_hex().to_string())
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
