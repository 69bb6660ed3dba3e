//! A head that is the embedding, where the first stage of a pipeline has the look-up and the last one the head: both have the table,
//! and the sums of both stages' gradients are added, so that both make the same update of it.

use arl_comm::{Group, Part};
use arl_model::Result;

use super::{PART, read, read_f32};
use crate::backend::{Backend, Buffer};
use crate::engine::Engine;
use crate::mesh::{Axis, Place};
use crate::model::Model;
use crate::placement::cut::Bucket;
use crate::placement::shards;

impl Model {
    /// The table's bucket, on a rank that has to add its gradients to those of another stage.
    pub(super) fn tied_bucket(&self) -> Option<&Bucket> {
        let at_end = self.place.is_first_stage() != self.place.is_last_stage();
        let tied = self.placement.tied && at_end;
        self.cut.as_ref().filter(|_| tied)?.buckets.iter().find(|bucket| bucket.part == shards::Part::Embedding)
    }
}

/// The rank of the first stage and that of the last which have the same piece.
fn pair(place: &Place) -> Vec<usize> {
    let all = place.members(Axis::Pipeline);
    [0, all.len() - 1].map(|stage| all[stage]).to_vec()
}

impl<B: Backend + ?Sized> Engine<B> {
    /// Makes the gradients of a tied embedding, of which `sums` has those of this stage, those of both stages.
    pub(crate) fn add_tied(&mut self, sums: Buffer) -> Result<()> {
        let Some((cut, bucket)) = self.model.cut.as_deref().zip(self.model.tied_bucket()) else { return Ok(()) };
        let all = sums.slice(bucket.own, cut.piece_len(bucket));
        for start in (0..all.len).step_by(PART) {
            let piece = all.slice(start, PART.min(all.len - start));
            let own = read_f32(&mut *self.backend, piece)?;
            let bytes: &[u8] = bytemuck::cast_slice(&own);
            let mut received = vec![vec![0; bytes.len()]; 2];
            Part::new(self.ranks.group(), pair(&self.ranks.place))?.exchange(&[bytes, bytes], &mut received)?;
            let [first, last] = [0, 1].map(|stage| read::<f32>(&received[stage]));
            let total: Vec<f32> = first.iter().zip(&last).map(|(first, last)| first + last).collect();
            self.backend.upload(bytemuck::cast_slice(&total), piece);
            self.ranks.sent.gradients += piece.bytes() as u64;
        }
        Ok(())
    }
}
