//! Weights of which each rank has a piece, put together where a pass needs them. In a step all ranks ask for the same parts in the
//! same order ([`Turn`]), also one without a micro-batch. Beyond that, rank 0 alone computes: it asks for a part when it needs it,
//! and the others send theirs until it says that it needs no more.

use arl_model::{Error, ErrorCode, Result};

use super::{Along, PART, Ranks};
use crate::backend::{Backend, Buffer};
use crate::engine::Engine;
use crate::mesh::Axis;
use crate::model::Model;
use crate::placement::cut::Complete;
use crate::placement::divided::Shard;
use crate::placement::shards::{Held, Part, Shards};
use crate::vision::Tower;

/// What the passes over a micro-batch ask of all ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// To gather weights, where they are not held from before.
    Gather(Part),
    /// To add gradients that are complete.
    Collect(Complete),
}

impl Model {
    /// What the passes over a micro-batch ask of all ranks, in their order. `sees`: any of the round's has images.
    pub(crate) fn turns(&self, sees: bool) -> Vec<Turn> {
        let layers = 0..self.layers.len();
        let mut turns = Vec::new();
        turns.extend(sees.then_some(Turn::Gather(Part::Tower)));
        turns.push(Turn::Gather(Part::Embedding));
        turns.extend(layers.clone().map(|layer| Turn::Gather(Part::Layer(layer))));
        turns.extend([Turn::Gather(self.head_part()), Turn::Collect(Complete::Loss)]);
        for layer in layers.rev().take_while(|layer| *layer >= self.lowest_layer) {
            turns.extend([Turn::Gather(Part::Layer(layer)), Turn::Collect(Complete::Layer(layer))]);
        }
        turns.extend(self.embedding_adapter.map(|_| Turn::Gather(Part::Embedding)));
        let trained = self.tower.as_ref().is_some_and(Tower::is_trained);
        turns.extend((sees && trained).then_some(Turn::Gather(Part::Tower)));
        turns.push(Turn::Collect(Complete::End));
        turns
    }

    /// The part that the head's weights belong to.
    pub(crate) fn head_part(&self) -> Part {
        if self.placement.tied { Part::Embedding } else { Part::Head }
    }

    /// Bytes that a rank sends for the weights of a step of `rounds` micro-batches a rank, and behind its update. `sees`: each round
    /// has images.
    pub(super) fn gathered_bytes(&self, rounds: u64, sees: bool) -> u64 {
        let Some(shards) = self.shards() else { return 0 };
        let mut held = Held::default();
        let turns = self.turns(sees);
        let all = (0..rounds).flat_map(|_| turns.iter());
        let gathered = all.filter_map(|turn| match *turn {
            Turn::Gather(part) if shards.claim(&mut held, part) => Some(part),
            _ => None,
        });
        let updated = self.shards_of(Part::Whole).into_iter().filter(|(_, shard)| shard.trained);
        let sent = |(array, shard): (Buffer, Shard)| shard.sent_bytes(array);
        gathered.flat_map(|part| self.shards_of(part)).chain(updated).map(sent).sum()
    }

    /// Bytes that a rank sends to its counterparts behind an update.
    pub(super) fn replicated_bytes(&self) -> u64 {
        let trained = self.shards().into_iter().flat_map(|shards| &shards.weights.all).filter(|shard| shard.trained);
        let others = self.place.mesh.dp_replicate - 1;
        trained.map(|shard| (others * self.updated(shard).0.bytes()) as u64).sum()
    }

    /// What this rank updates of a shard's weights, and what it keeps of them.
    pub(super) fn updated(&self, shard: &Shard) -> (Buffer, Buffer) {
        shard.updated(self.store.weights, (self.place.mesh.dp_replicate, self.place.replica()))
    }

    /// The shards of a part, each with the array that it is in.
    fn shards_of(&self, part: Part) -> Vec<(Buffer, Shard)> {
        let Some(shards) = self.shards() else { return Vec::new() };
        let weights = shards.weights.of(part).map(|shard| (self.store.weights, *shard));
        weights.chain(self.quantized_shards_of(part)).collect()
    }

    /// Those of them that are in NF4.
    fn quantized_shards_of(&self, part: Part) -> Vec<(Buffer, Shard)> {
        let (Some(shards), Some(store)) = (self.shards(), self.store.quantized) else { return Vec::new() };
        let arrays = store.arrays().zip(&shards.quantized);
        arrays.flat_map(|(array, divided)| divided.of(part).map(move |shard| (array, *shard))).collect()
    }
}

impl Ranks {
    /// From here on all ranks compute a step together. No part counts as held, because rank 0 may hold others than the rest.
    pub(super) fn begin_together<B: Backend + ?Sized>(&mut self, backend: &mut B, model: &Model) {
        self.together = true;
        self.forget_gathered();
        if model.shards().is_some() {
            self.overlap.begin(backend);
        }
    }

    /// Whether a pass over a micro-batch gathers the tower: in a step, where any of the round's has images; `own`: this one has.
    pub(crate) fn sees(&self, own: bool) -> bool {
        own || (self.together && self.round_sees)
    }

    /// What this rank computes from here on it computes alone, behind all that was exchanged.
    pub(crate) fn end_together<B: Backend + ?Sized>(&mut self, backend: &mut B) {
        self.together = false;
        self.overlap.end(backend);
    }

    /// Weights have changed, or the memory has that they are gathered in: what was gathered is not there any more.
    pub(crate) fn forget_gathered(&mut self) {
        (self.held, self.whole) = (Held::default(), Held::default());
    }

    /// The memory has something else in it that the whole model's weights are put together in.
    pub(crate) fn forget_whole(&mut self) {
        self.whole = Held::default();
    }

    /// Called before the weights of a part are used. Waits for those that others have updated. Puts the part together, where ranks
    /// divide weights and it is not there from before: in a step on GPUs that was queued when the part before was needed; leaves wait for it
    /// here, and the part that comes next is queued.
    pub(crate) fn need<B: Backend + ?Sized>(&mut self, backend: &mut B, model: &Model, part: Part) -> Result<()> {
        let gathered = match (&model.whole, model.shards()) {
            (Some(whole), _) => self.need_whole(backend, model, whole, part),
            (None, Some(shards)) if self.together => self.gather_in_turn(backend, model, shards, part),
            (None, Some(shards)) => self.gather_alone(backend, model, shards, part),
            (None, None) => {
                self.overlap.claim_updated(backend, part);
                Ok(())
            }
        };
        if gathered.is_err() {
            self.forget_gathered();
        }
        gathered
    }

    /// Puts a part together in a step, where all ranks ask for the same parts.
    fn gather_in_turn<B: Backend + ?Sized>(
        &mut self,
        backend: &mut B,
        model: &Model,
        shards: &Shards,
        part: Part,
    ) -> Result<()> {
        let place = shards.place_of(part);
        self.overlap.need(backend, place);
        self.start_gather(backend, model, shards, part)?;
        self.overlap.weights[place].claim(backend);
        match self.overlap.next(part) {
            Some(next) if shards.place_of(next) != place => self.start_gather(backend, model, shards, next),
            _ => Ok(()),
        }
    }

    /// Queues the gathering of a part, where it is not there or on its way.
    fn start_gather<B: Backend + ?Sized>(
        &mut self,
        backend: &mut B,
        model: &Model,
        shards: &Shards,
        part: Part,
    ) -> Result<()> {
        if !shards.claim(&mut self.held, part) {
            return Ok(());
        }
        let place = shards.place_of(part);
        self.overlap.weights[place].begin(backend);
        self.gather_part(backend, model, part, true)?;
        self.overlap.weights[place].end(backend);
        Ok(())
    }

    /// Puts a part together for what rank 0 computes alone.
    fn gather_alone<B: Backend + ?Sized>(
        &mut self,
        backend: &mut B,
        model: &Model,
        shards: &Shards,
        part: Part,
    ) -> Result<()> {
        if !shards.claim(&mut self.held, part) {
            return Ok(());
        }
        self.check_first()?;
        self.ask(part.number())?;
        self.gather_part(backend, model, part, false)
    }

    /// Sends pieces to all ranks, and takes theirs; or to rank 0 alone.
    fn gather_part<B: Backend + ?Sized>(
        &mut self,
        backend: &mut B,
        model: &Model,
        part: Part,
        all: bool,
    ) -> Result<()> {
        let mut shards = model.shards_of(part).into_iter();
        shards.try_for_each(|(array, shard)| self.gather_shard(backend, array, shard, all))
    }

    /// Puts what is in NF4 of a part together on every rank, outside of steps, which counts as figures; all ranks call it.
    pub(crate) fn gather_quantized<B: Backend + ?Sized>(
        &mut self,
        backend: &mut B,
        model: &Model,
        part: Part,
    ) -> Result<()> {
        let mut shards = model.quantized_shards_of(part).into_iter().peekable();
        if shards.peek().is_none() {
            return Ok(());
        }
        // They come where those of other parts may have been.
        self.held = Held::default();
        self.in_line(backend, |ranks, backend| {
            shards.try_for_each(|(array, shard)| {
                let (own, place) = shard.buffers(array);
                backend.start_gather(&*ranks.sharers(shard.axis)?, own, place)?;
                ranks.sent.figures += shard.sent_bytes(array);
                Ok(())
            })
        })
    }

    /// With `all` it is ordered by the caller.
    pub(super) fn gather_shard<B: Backend + ?Sized>(
        &mut self,
        backend: &mut B,
        array: Buffer,
        shard: Shard,
        all: bool,
    ) -> Result<()> {
        if all {
            let (own, place) = shard.buffers(array);
            backend.start_gather(&*self.sharers(shard.axis)?, own, place)?;
            self.sent.weights += shard.sent_bytes(array);
            return Ok(());
        }
        for start in (0..shard.piece).step_by(PART) {
            let own = array.slice(shard.own + start, PART.min(shard.piece - start));
            let mut bytes = vec![0; own.bytes()];
            backend.read_back(own, &mut bytes)?;
            for (rank, piece) in self.gather_to_first(shard.ranks, &bytes)?.chunks_exact(bytes.len()).enumerate() {
                let place = shard.place + rank * shard.piece + start;
                backend.upload(piece, array.slice(place, own.len));
            }
        }
        Ok(())
    }

    /// The bytes of so many ranks, the first ones, all of which give equally many, at rank 0; at the others nothing.
    fn gather_to_first(&mut self, ranks: usize, bytes: &[u8]) -> Result<Vec<u8>> {
        let given = |rank: usize| if rank < ranks { bytes.len() } else { 0 };
        let lengths: Vec<usize> = (0..self.place.world()).map(given).collect();
        let own = &bytes[..given(self.place.rank)];
        Ok(self.gather_lengths_to_first(own, &lengths)?.concat())
    }

    /// The ranks along an axis that divide weights with this one.
    fn sharers(&self, axis: Axis) -> Result<Along<'_>> {
        self.among(self.place.sharers(axis))
    }

    /// Gives this rank's counterparts what it has updated of a shard, and takes what they have; the caller orders it.
    pub(super) fn gather_updated<B: Backend + ?Sized>(
        &mut self,
        backend: &mut B,
        model: &Model,
        shard: &Shard,
    ) -> Result<()> {
        let counterparts = self.place.counterparts(shard.axis);
        if counterparts.len() > 1 {
            let (own, kept) = model.updated(shard);
            self.sent.replicas += ((counterparts.len() - 1) * own.bytes()) as u64;
            backend.start_gather(&*self.among(counterparts)?, own, kept)?;
        }
        Ok(())
    }

    /// The bytes of every rank, so many of each, at rank 0; at the others nothing, and lengths do not count.
    pub(super) fn gather_lengths_to_first(&mut self, bytes: &[u8], lengths: &[usize]) -> Result<Vec<Vec<u8>>> {
        let (first, world) = (self.place.rank == 0, self.place.world());
        let mut sends = vec![&[][..]; world];
        sends[0] = bytes;
        let nothing = vec![0; world];
        self.exchange(&sends, if first { lengths } else { &nothing }, |sent| &mut sent.weights)
    }

    pub(super) fn check_first(&self) -> Result<()> {
        let what = match (self.group.is_none() && self.place.world() > 1, self.place.rank) {
            (true, _) => "the other ranks have not joined this engine".to_owned(),
            (false, 0) => return Ok(()),
            (false, rank) => format!("rank {rank} computes alone with weights that ranks divide; only rank 0 may"),
        };
        Err(Error::new(ErrorCode::Internal, what))
    }

    /// Tells the other ranks the number of the part that rank 0 needs, or 0; gives what rank 0 has told.
    pub(super) fn ask(&self, number: u64) -> Result<u64> {
        let mut bytes = number.to_ne_bytes();
        if let Some(group) = &self.group {
            group.broadcast(0, &mut bytes)?;
        }
        Ok(u64::from_ne_bytes(bytes))
    }
}

impl<B: Backend + ?Sized> Engine<B> {
    /// Has rank 0 compute something of its own with weights that ranks divide: evaluate, generate, inspect. Every other rank calls
    /// it meanwhile, and sends the weights that rank 0 asks for until [`Engine::end_serving`].
    pub fn serve_weights(&mut self) -> Result<()> {
        if !self.serves() {
            return Ok(());
        }
        self.check_joined()?;
        self.complete_update();
        while let Some(part) = Part::from_number(self.ranks.ask(0)?) {
            let (backend, model) = (&mut *self.backend, &self.model);
            if model.place.mesh.divides_model() {
                let nowhere = |_| Err(Error::new(ErrorCode::Internal, "weights are given to rank 0 alone"));
                self.ranks.give(backend, model, part, nowhere)?;
            } else {
                self.ranks.gather_part(backend, model, part, false)?;
            }
        }
        Ok(())
    }

    /// Whether no rank has all weights.
    fn serves(&self) -> bool {
        let divides = self.model.shards().is_some() || self.model.place.mesh.divides_model();
        divides && self.ranks.place.world() > 1
    }

    /// Ends [`Engine::serve_weights`] on the other ranks; rank 0 calls it, whatever has become of its own computation.
    pub fn end_serving(&mut self) -> Result<()> {
        if !self.serves() {
            return Ok(());
        }
        self.ranks.check_first()?;
        self.ranks.ask(0).map(drop)
    }
}
