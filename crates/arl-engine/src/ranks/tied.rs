//! A head that is the embedding, where the first stage of a pipeline has the look-up and the last one the head: both have the table,
//! and the sums of both stages' gradients are added, so that both make the same update of it.

use arl_model::Result;

use super::PART;
use crate::backend::{Backend, Buffer, DType};
use crate::engine::Engine;
use crate::mesh::Axis;
use crate::model::Model;
use crate::placement::arena::Category;
use crate::placement::cut::{Bucket, Cut};
use crate::placement::shards;

impl Model {
    /// The table's bucket, on a rank that has to add its gradients to those of another stage.
    fn tied(&self) -> Option<(&Cut, &Bucket)> {
        let at_end = self.place.is_first_stage() != self.place.is_last_stage();
        let tied = self.placement.tied && at_end;
        let cut = self.cut.as_deref().filter(|_| tied)?;
        let bucket = cut.buckets.iter().find(|bucket| bucket.part == shards::Part::Embedding)?;
        Some((cut, bucket))
    }

    /// Elements of this rank's piece of the table, where it has to add their gradients to those of another stage; else 0.
    pub(crate) fn tied_elements(&self) -> usize {
        self.tied().map_or(0, |(cut, bucket)| cut.piece_len(bucket))
    }

    /// Elements of what comes of the other stage's at a time.
    pub(crate) fn tied_workspace(&self) -> usize {
        self.tied_elements().min(PART)
    }
}

impl<B: Backend + ?Sized> Engine<B> {
    /// Makes the gradients of a tied embedding, of which `sums` has those of this stage, those of both stages.
    pub(crate) fn add_tied(&mut self, sums: Buffer) -> Result<()> {
        let Some((cut, bucket)) = self.model.tied() else { return Ok(()) };
        let all = sums.slice(bucket.own, cut.piece_len(bucket));
        let place = self.model.place;
        let stages = place.size(Axis::Pipeline);
        let other = if place.is_first_stage() { stages - 1 } else { 0 };
        let top = self.arena.mark();
        let theirs = self.arena.take(Category::Workspace, DType::F32, self.model.tied_workspace());
        for start in (0..all.len).step_by(PART) {
            let piece = all.slice(start, PART.min(all.len - start));
            let theirs = theirs.slice(0, piece.len);
            let with_other = |buffer: Buffer| {
                let mut of_stages = vec![Vec::new(); stages];
                of_stages[other].push(buffer);
                of_stages
            };
            let group = self.ranks.part_of(Axis::Pipeline)?;
            self.backend.exchange(&group, &with_other(piece), &with_other(theirs))?;
            // Both stages add the same two numbers, so that they have the same sum.
            self.backend.add(piece, theirs);
            self.ranks.sent.gradients += piece.bytes() as u64;
        }
        self.arena.release(top);
        Ok(())
    }
}
