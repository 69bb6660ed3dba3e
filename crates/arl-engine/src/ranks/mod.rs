//! Data parallelism: micro-batch `m` of a step is computed by rank `m % size`, in round `m / size`. After each round every
//! rank adds the round's gradients to its piece of their sums, in the order of the ranks: a sum is `((g0 + g1) + g2) + ...` in
//! the order of the step, and has the same bits for any number of ranks. Where a mesh divides the model, each parameter's gradients
//! are added over the ranks that have the same of it. Knows nothing of what moves the bytes.

mod accumulate;
mod experts;
mod export;
mod fingerprint;
mod gather;
mod norm;
mod overlap;
mod slices;
mod stages;
mod tied;
mod tokens;
mod traffic;
mod weights;
mod whole;

use std::collections::HashMap;
use std::ops::Deref;

use arl_comm::{Alone, Group, Part as GroupPart};
use arl_model::{Error, ErrorCode, Result};

use self::overlap::Overlap;
use crate::backend::comm::{EXCHANGED, Part};
use crate::backend::{Backend, Buffer};
use crate::engine::Engine;
use crate::mesh::{Axis, Mesh, Place};
use crate::model::Model;
use crate::placement::cut::Complete;
use crate::placement::shards::Held;

pub(crate) use fingerprint::Hashes;
pub use traffic::{Traffic, plan_traffic};

/// Elements of each rank's piece that are exchanged at a time.
const PART: usize = EXCHANGED;

/// The ranks along an axis, as a group.
enum Along<'a> {
    All(&'a dyn Group),
    Some(GroupPart<'a>),
}

impl<'a> Deref for Along<'a> {
    type Target = dyn Group + 'a;

    fn deref(&self) -> &(dyn Group + 'a) {
        match self {
            Along::All(group) => *group,
            Along::Some(part) => part,
        }
    }
}

/// The ranks of an engine.
pub(crate) struct Ranks {
    /// All ranks. None: this one alone, or the others have not joined yet.
    group: Option<Box<dyn Group>>,
    /// Where this one is among them.
    place: Place,
    /// How many there must be in this one's stage.
    size: usize,
    /// The number of this one in its stage.
    rank: usize,
    /// Bytes sent to others.
    sent: Traffic,
    /// All ranks compute a step, and gather weights for it at once; else rank 0 gathers them alone.
    together: bool,
    /// Any of the round's micro-batches has images.
    round_sees: bool,
    /// Tokens that the ranks which divide experts have together in the round.
    pub(crate) round_tokens: usize,
    /// How many rows each rank that divides experts has for each, of the layers of the round's micro-batch: by the places of these
    /// numbers on the device.
    pub(crate) routes: HashMap<usize, Vec<Vec<usize>>>,
    /// Gathered weights.
    held: Held,
    /// Those of the whole model, where a mesh divides it.
    whole: Held,
    /// What is on its way while leaves compute.
    overlap: Overlap,
}

impl Ranks {
    /// This rank, before any other has joined it.
    pub(crate) fn alone(place: Place) -> Self {
        Ranks {
            group: None,
            place,
            size: place.stage(),
            rank: place.index(Axis::Stage),
            sent: Traffic::default(),
            together: false,
            round_sees: false,
            round_tokens: 0,
            routes: HashMap::new(),
            held: Held::default(),
            whole: Held::default(),
            overlap: Overlap::new(),
        }
    }

    /// Elements `[start, start + PART)` of the piece of a number, `piece` long, of the gradients; the last pieces may be shorter.
    fn part(&self, gradients: Buffer, piece: usize, number: usize, start: usize) -> Buffer {
        let (first, end) = (number * piece + start, number * piece + piece.min(start + PART));
        let (first, end) = (gradients.len.min(first), gradients.len.min(end));
        gradients.slice(first, end - first)
    }

    fn group(&self) -> &dyn Group {
        self.group.as_deref().unwrap_or(&Alone)
    }

    /// The ranks along an axis.
    fn part_of(&self, axis: Axis) -> Result<GroupPart<'_>> {
        GroupPart::new(self.group(), self.place.members(axis))
    }

    /// As [`Ranks::part_of`]; where these are all ranks, as their own group has its operations.
    fn along(&self, axis: Axis) -> Result<Along<'_>> {
        self.among(self.place.members(axis))
    }

    /// These ranks, as [`Ranks::along`] has them.
    fn among(&self, members: Vec<usize>) -> Result<Along<'_>> {
        let group = self.group();
        let all = members.len() == group.size();
        Ok(if all { Along::All(group) } else { Along::Some(GroupPart::new(group, members)?) })
    }

    /// As [`crate::backend::comm::Collectives::start_all_gather`], over the ranks along an axis; the caller orders it. `sent`: where bytes
    /// are counted.
    fn gather_parts_along<B: Backend + ?Sized>(
        &mut self,
        axis: Axis,
        backend: &mut B,
        bytes: usize,
        own: &[Part],
        all: &[Vec<Part>],
        sent: fn(&mut Traffic) -> &mut u64,
    ) -> Result<()> {
        backend.start_all_gather(&*self.along(axis)?, bytes, own, all)?;
        *sent(&mut self.sent) += ((self.place.size(axis) - 1) * bytes) as u64;
        Ok(())
    }

    /// The bytes of every rank, in their order; all give equally many. `sent`: where they are counted.
    pub(crate) fn gather(&mut self, bytes: &[u8], sent: fn(&mut Traffic) -> &mut u64) -> Result<Vec<u8>> {
        let Some(group) = &self.group else { return Ok(bytes.to_vec()) };
        let mut all = vec![0; group.size() * bytes.len()];
        group.all_gather(bytes, &mut all)?;
        *sent(&mut self.sent) += ((group.size() - 1) * bytes.len()) as u64;
        Ok(all)
    }

    /// As [`Ranks::gather`], of the ranks of this one's stage.
    fn gather_in_stage(&mut self, bytes: &[u8], sent: fn(&mut Traffic) -> &mut u64) -> Result<Vec<u8>> {
        let mut all = vec![0; self.size * bytes.len()];
        self.along(Axis::Stage)?.all_gather(bytes, &mut all)?;
        *sent(&mut self.sent) += ((self.size - 1) * bytes.len()) as u64;
        Ok(all)
    }

    /// What every rank sends to this one: `sends[r]` is for rank `r`, and `lengths[r]` bytes come from it.
    fn exchange(
        &mut self,
        sends: &[&[u8]],
        lengths: &[usize],
        sent: fn(&mut Traffic) -> &mut u64,
    ) -> Result<Vec<Vec<u8>>> {
        let Some(group) = &self.group else { return Ok(sends.iter().map(|bytes| bytes.to_vec()).collect()) };
        let mut receives: Vec<Vec<u8>> = lengths.iter().map(|&length| vec![0; length]).collect();
        group.exchange(sends, &mut receives)?;
        let others = sends.iter().enumerate().filter(|(rank, _)| *rank != self.place.rank);
        *sent(&mut self.sent) += others.map(|(_, bytes)| bytes.len() as u64).sum::<u64>();
        Ok(receives)
    }

    /// Fails on every rank where one has failed: on that one with its error.
    pub(crate) fn agree<T>(&mut self, result: Result<T>) -> Result<T> {
        let all = self.gather(&[u8::from(result.is_ok())], |sent| &mut sent.figures)?;
        let value = result?;
        match all.iter().position(|&ok| ok == 0) {
            None => Ok(value),
            Some(rank) => {
                Err(Error::new(ErrorCode::Interrupted, format!("ended because rank {rank} failed to do the same")))
            }
        }
    }

    /// Adds the gradients of all ranks of a stage to this one's piece of their sums; `piece` is the length of all but the last pieces.
    /// On GPUs leaves that follow do not wait for it.
    fn add_round<B: Backend + ?Sized>(
        &mut self,
        backend: &mut B,
        gradients: Buffer,
        piece: usize,
        sums: Buffer,
    ) -> Result<()> {
        self.overlap.gradients[0].give(backend);
        self.overlap.gradients[0].begin(backend);
        self.add_along(Axis::Stage, backend, gradients, piece, sums)?;
        self.overlap.gradients[0].end(backend);
        Ok(())
    }

    /// As [`Ranks::add_round`], over the ranks along an axis, and not ordered.
    fn add_along<B: Backend + ?Sized>(
        &mut self,
        axis: Axis,
        backend: &mut B,
        gradients: Buffer,
        piece: usize,
        sums: Buffer,
    ) -> Result<()> {
        let (size, own) = (self.place.size(axis), self.place.index(axis));
        for start in (0..piece).step_by(PART) {
            let part = |index| self.part(gradients, piece, self.place.piece(axis, index), start);
            let parts: Vec<Buffer> = (0..size).map(part).collect();
            backend.start_exchange_sum(&*self.along(axis)?, &parts, sums.slice(start, parts[own].len))?;
            let others = parts.iter().enumerate().filter(|(rank, _)| *rank != own);
            self.sent.gradients += others.map(|(_, part)| part.bytes() as u64).sum::<u64>();
        }
        Ok(())
    }

    /// Adds the gradients that the backward pass completes at a point to their sums, where ranks divide gradients. On GPUs leaves that
    /// follow do not wait for it, until they need the place.
    pub(crate) fn collect<B: Backend + ?Sized>(
        &mut self,
        backend: &mut B,
        model: &Model,
        complete: Complete,
    ) -> Result<()> {
        let Some(cut) = model.cut.as_ref().filter(|cut| cut.gradients) else { return Ok(()) };
        let Some((gradients, sums)) = model.store.training.and_then(|store| Some((store.gradients, store.sums?)))
        else {
            return Ok(());
        };
        let mut places: Vec<usize> = cut.completed(complete).map(|bucket| bucket.place).collect();
        places.sort_unstable();
        places.dedup();
        let Some(&first) = places.first() else { return Ok(()) };
        self.overlap.gradients[first].give(backend);
        self.overlap.gradients[first].begin(backend);
        for bucket in cut.completed(complete) {
            let piece = cut.piece_len(bucket);
            let (gradients, sums) = (gradients.slice(bucket.gradient, bucket.len), sums.slice(bucket.own, piece));
            self.add_along(bucket.axis, backend, gradients, piece, sums)?;
        }
        places.into_iter().for_each(|place| self.overlap.gradients[place].end(backend));
        Ok(())
    }

    /// Exchanges that come behind all leaves so far, and in front of all that follow.
    fn in_line<B: Backend + ?Sized>(
        &mut self,
        backend: &mut B,
        exchange: impl FnOnce(&mut Self, &mut B) -> Result<()>,
    ) -> Result<()> {
        self.overlap.all.give(backend);
        self.overlap.all.begin(backend);
        exchange(self, backend)?;
        self.overlap.all.end(backend);
        self.overlap.all.claim(backend);
        Ok(())
    }
}

impl<B: Backend + ?Sized> Engine<B> {
    /// Has the ranks of `group` compute each step together with this one, from [`Engine::submit`] on: each is given its own
    /// micro-batches, in the order of the step, and all return the figures of the whole step. Their weights, or where they divide
    /// these the folders that they have read, must be equal. The number of ranks is [`EngineOptions::data_parallel`](crate::EngineOptions::data_parallel).
    pub fn join(&mut self, group: Box<dyn Group>) -> Result<()> {
        let planned = self.training()?.sums.map_or(0, |_| self.ranks.place.world());
        if group.size() != planned {
            let message = format!("{} ranks join an engine that was opened for {planned}", group.size());
            return Err(Error::new(ErrorCode::Internal, message));
        }
        let numbered = self.model.cut.is_some() || self.ranks.place.mesh != Mesh::default();
        let opened = self.ranks.place.rank;
        if numbered && group.rank() != opened {
            let message = format!("rank {} joins with an engine that was opened for rank {opened}", group.rank());
            return Err(Error::new(ErrorCode::Internal, message));
        }
        self.backend.join_ranks(&*group)?;
        self.ranks.place.rank = group.rank();
        self.backend.join_groups(&*group, &self.ranks.place.groups())?;
        self.ranks.rank = self.ranks.place.index(Axis::Stage);
        self.ranks.group = Some(group);
        Ok(())
    }

    /// Whether ranks divide moments and masters: then saving, too, is done by all of them at once.
    pub fn is_divided(&self) -> bool {
        self.model.cut.is_some()
    }

    /// Bytes that this rank has sent to others since it was opened.
    pub fn sent(&self) -> Traffic {
        self.ranks.sent
    }

    /// Fails where the other ranks have not joined yet.
    pub(crate) fn check_joined(&self) -> Result<()> {
        if self.ranks.place.world() > 1 && self.ranks.group.is_none() {
            return Err(Error::new(ErrorCode::Internal, "the other ranks have not joined this engine"));
        }
        Ok(())
    }
}

/// Values of bytes that need not be aligned.
fn read<T: bytemuck::AnyBitPattern>(bytes: &[u8]) -> Vec<T> {
    bytes.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect()
}

fn read_f32<B: Backend + ?Sized>(backend: &mut B, buffer: Buffer) -> Result<Vec<f32>> {
    let mut values = vec![0f32; buffer.len];
    backend.read_back(buffer, bytemuck::cast_slice_mut(&mut values))?;
    Ok(values)
}

#[cfg(test)]
mod tests;
