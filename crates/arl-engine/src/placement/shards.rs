//! How data-parallel ranks divide weights, trained and frozen ones. Each rank keeps a piece of every shard for good; all pieces
//! are gathered, one behind the other, into a place that shards take turns in, when a pass needs them. What is small stays whole. Pure; knows places, no values and no messages. May import placements.

use arl_model::{Block, TensorSpec};

use super::arena::ALIGNMENT;
use super::cut::{Cut, Owned};
use super::{Param, Placement};
use crate::backend::Buffer;
use crate::mesh::{Axis, Place};

/// Pieces are multiples of so many elements, which are at least two bytes each.
const STEP: usize = ALIGNMENT / 2;

/// Places for the weights of a layer, of which layer `l` has number `l % slots`, without and with gathers that run while a layer is
/// computed: the next one's weights then come to a third place, without waiting for the layer before to give up its own. The last
/// layers of the forward pass are still there when the backward pass begins.
pub(super) const WEIGHT_SLOTS: [usize; 2] = [2, 3];

/// Places for what is gathered: those of layers, and one for tower, embedding and head.
pub(crate) const WEIGHT_PLACES: usize = WEIGHT_SLOTS[1] + 1;

/// What a pass needs at once; in the order in which a forward pass does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Part {
    /// Norms and biases: whole all the time.
    Whole,
    /// The decayed parameters of the vision tower, with their adapters.
    Tower,
    /// The look-up of tokens, with its adapter.
    Embedding,
    /// The decayed parameters of a layer, with their adapters.
    Layer(usize),
    /// A head of its own, with its adapter.
    Head,
}

impl Part {
    /// The part that a parameter belongs to.
    pub(crate) fn of(spec: &TensorSpec) -> Self {
        match spec.block {
            _ if !spec.decay => Part::Whole,
            Block::Embedding => Part::Embedding,
            Block::Head => Part::Head,
            block if block.is_vision() => Part::Tower,
            block => block.layer().map_or(Part::Whole, Part::Layer),
        }
    }

    /// A number for messages, from 1 on.
    pub(crate) fn number(self) -> u64 {
        match self {
            Part::Whole => 1,
            Part::Tower => 2,
            Part::Embedding => 3,
            Part::Head => 4,
            Part::Layer(layer) => 5 + layer as u64,
        }
    }

    /// The part of that number; none: 0.
    pub(crate) fn from_number(number: u64) -> Option<Self> {
        match number {
            0 => None,
            1 => Some(Part::Whole),
            2 => Some(Part::Tower),
            3 => Some(Part::Embedding),
            4 => Some(Part::Head),
            layer => Some(Part::Layer((layer - 5) as usize)),
        }
    }
}

/// Weights of a part that are all trained, or all frozen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shard {
    pub(crate) part: Part,
    pub(crate) trained: bool,
    /// The ranks that have pieces of it, how many they are, and the number of this one among them.
    pub(crate) axis: Axis,
    pub(crate) ranks: usize,
    rank: usize,
    /// First element in the optimizer's arena; of frozen ones, counted over all that are frozen.
    start: usize,
    len: usize,
    /// Elements of each rank's piece, padding included.
    pub(crate) piece: usize,
    /// First element of this rank's piece in the array of weights.
    pub(crate) own: usize,
    /// Where the pieces of all ranks are gathered in the array of weights. That of what stays whole has this rank's own in it.
    pub(crate) place: usize,
}

impl Shard {
    /// Its elements within `[first, end)` of its arena: all of them, or those in a rank's piece.
    fn within(&self, (first, end): (usize, usize), rank: Option<usize>) -> Option<(usize, usize)> {
        let (start, last) = (self.start, self.start + self.len);
        let (start, last) = match rank {
            None => (start, last),
            Some(rank) => ((start + rank * self.piece).min(last), (start + (rank + 1) * self.piece).min(last)),
        };
        let (from, to) = (start.max(first), last.min(end));
        (from < to).then_some((from, to))
    }
}

/// A parameter that is frozen.
#[derive(Clone, Copy, Debug)]
struct Frozen {
    /// In the weights' arena.
    offset: usize,
    len: usize,
    /// Counted over all that are frozen.
    first: usize,
}

/// The division of weights among ranks: the array of weights has this rank's pieces, then what stays whole, then the places for
/// what is gathered.
#[derive(Clone, Debug)]
pub(crate) struct Shards {
    pub(crate) all: Vec<Shard>,
    /// In the order of the weights' arena. Those in NF4 are none of them.
    frozen: Vec<Frozen>,
    /// Places for layers.
    slots: usize,
    place: Place,
    /// Elements of this rank's pieces.
    pub(crate) pieces: usize,
    /// Elements of these and of what stays whole.
    pub(crate) kept: usize,
    /// Elements of the array of weights.
    pub(crate) len: usize,
}

impl Shards {
    /// Divides among the ranks of a cut, for its rank.
    pub(super) fn new(placement: &Placement, cut: &Cut) -> Self {
        let trained = cut.buckets.iter().map(|bucket| Shard {
            part: bucket.part,
            trained: true,
            axis: bucket.axis,
            ranks: cut.ranks(bucket),
            rank: cut.place.index(bucket.axis),
            start: bucket.start,
            len: bucket.len,
            piece: cut.piece_len(bucket),
            own: 0,
            place: 0,
        });
        let mut shards = Shards {
            all: trained.collect(),
            frozen: Vec::new(),
            slots: WEIGHT_SLOTS[usize::from(cut.overlaps)],
            place: cut.place,
            pieces: 0,
            kept: 0,
            len: 0,
        };
        shards.add_frozen(placement);
        shards.place_all();
        shards
    }

    /// Counts what is frozen. What one product takes stays together, and begins as well aligned as in the weights' arena.
    fn add_frozen(&mut self, placement: &Placement) {
        let (mut next, mut behind) = (0, None);
        for tensor in &placement.tensors {
            let Param { offset, len, trained, quantized, axis, .. } = tensor.param;
            if trained.is_some() || quantized {
                continue;
            }
            if behind != Some(offset) {
                next = usize::next_multiple_of(next, STEP);
            }
            let part = Part::of(&tensor.spec);
            if self.all.last().is_none_or(|last| last.trained || (last.part, last.axis) != (part, axis)) {
                let (ranks, rank) = (self.place.size(axis), self.place.index(axis));
                let at =
                    Shard { part, trained: false, axis, ranks, rank, start: next, len: 0, piece: 0, own: 0, place: 0 };
                self.all.push(at);
            }
            self.frozen.push(Frozen { offset, len, first: next });
            (next, behind) = (next + len, Some(offset + len));
            if let Some(shard) = self.all.last_mut() {
                shard.len = next - shard.start;
            }
        }
        for shard in self.all.iter_mut().filter(|shard| !shard.trained) {
            shard.piece = shard.len.div_ceil(shard.ranks).next_multiple_of(STEP);
        }
    }

    /// Gives every shard its places.
    fn place_all(&mut self) {
        for shard in self.all.iter_mut().filter(|shard| shard.part != Part::Whole) {
            shard.own = self.pieces;
            self.pieces += shard.piece;
        }
        self.kept = self.place_part(Part::Whole, self.pieces);
        for shard in self.all.iter_mut().filter(|shard| shard.part == Part::Whole) {
            shard.own = shard.place + shard.rank * shard.piece;
        }
        // The tower sees before the look-up, and again behind everything else; a head of its own is needed behind the look-up.
        let ends = [Part::Tower, Part::Embedding, Part::Head].map(|part| self.place_part(part, self.kept));
        let first = ends.into_iter().max().unwrap_or(self.kept);
        let layers: Vec<usize> = self.layers();
        let slot = layers.iter().map(|&layer| self.place_part(Part::Layer(layer), 0)).max().unwrap_or(0);
        let slots = self.slots.min(layers.len());
        for layer in layers {
            self.place_part(Part::Layer(layer), first + layer % self.slots * slot);
        }
        self.len = first + slots * slot;
    }

    /// The layers that have shards.
    fn layers(&self) -> Vec<usize> {
        let layer = |shard: &Shard| if let Part::Layer(layer) = shard.part { Some(layer) } else { None };
        let mut layers: Vec<usize> = self.all.iter().filter_map(layer).collect();
        layers.sort_unstable();
        layers.dedup();
        layers
    }

    /// Places the shards of a part from `next` on; gives the place behind them.
    fn place_part(&mut self, part: Part, mut next: usize) -> usize {
        for shard in self.all.iter_mut().filter(|shard| shard.part == part) {
            shard.place = next;
            next += shard.ranks * shard.piece;
        }
        next
    }

    /// The shards of a part.
    pub(crate) fn of(&self, part: Part) -> impl Iterator<Item = &Shard> {
        self.all.iter().filter(move |shard| shard.part == part)
    }

    /// Whether a part has to be gathered; from now on it counts as held.
    pub(crate) fn claim(&self, held: &mut Held, part: Part) -> bool {
        part != Part::Whole && self.of(part).next().is_some() && held.claim(part, self.slots)
    }

    /// The number of the place that a part is gathered in.
    pub(crate) fn place_of(&self, part: Part) -> usize {
        place_of(part, self.slots)
    }

    /// A parameter's elements in its arena; none: it is in NF4.
    fn elements(&self, param: Param) -> Option<(usize, usize)> {
        let first = match param.trained {
            _ if param.quantized => return None,
            Some(first) => first,
            None => {
                let behind = self.frozen.partition_point(|frozen| frozen.offset <= param.offset);
                let frozen = self.frozen[..behind].last().filter(|one| param.offset < one.offset + one.len)?;
                frozen.first + param.offset - frozen.offset
            }
        };
        Some((first, first + param.len))
    }

    /// The shards of an arena from the one with an element on: they are in the order of their elements, trained ones first.
    fn starting_at(&self, trained: bool, element: usize) -> &[Shard] {
        let (of_trained, of_frozen) = self.all.split_at(self.all.partition_point(|shard| shard.trained));
        let shards = if trained { of_trained } else { of_frozen };
        &shards[shards.partition_point(|shard| shard.start + shard.len <= element)..]
    }

    /// Where a parameter is while its part is gathered.
    pub(super) fn place(&self, param: Param) -> usize {
        let Some((first, _)) = self.elements(param) else { return 0 };
        let shard = self.starting_at(param.trained.is_some(), first).first();
        shard.map_or(0, |shard| shard.place + first - shard.start)
    }

    /// Where an element of the optimizer's arena is that this rank owns.
    pub(super) fn own_place(&self, element: usize) -> usize {
        let shard = self.starting_at(true, element).first();
        shard.map_or(0, |shard| shard.own + (element - shard.start) % shard.piece)
    }

    /// What this rank has of a parameter for good: first elements within it, and their places in the array of weights.
    pub(crate) fn parts(&self, param: Param, weights: Buffer) -> Vec<(usize, Buffer)> {
        let Some((first, end)) = self.elements(param) else { return Vec::new() };
        let part = |shard: &Shard| {
            let whole = shard.part == Part::Whole;
            let (from, to) = shard.within((first, end), (!whole).then_some(shard.rank))?;
            let in_shard = from - shard.start;
            let place = if whole { shard.place + in_shard } else { shard.own + in_shard % shard.piece };
            Some((from - first, weights.slice(place, to - from)))
        };
        self.overlapping(param, (first, end)).filter_map(part).collect()
    }

    fn overlapping(&self, param: Param, (first, end): (usize, usize)) -> impl Iterator<Item = &Shard> {
        self.starting_at(param.trained.is_some(), first).iter().take_while(move |shard| shard.start < end)
    }

    /// What a rank, of those that have the same of a frozen parameter, owns of it.
    pub(super) fn owned_frozen(&self, param: Param, rank: usize) -> Vec<Owned> {
        let Some((first, end)) = self.elements(param) else { return Vec::new() };
        let place = Place { rank, ..self.place };
        let owned = |shard: &Shard| {
            let (from, to) = shard.within((first, end), Some(place.index(shard.axis)))?;
            Some(Owned { start: from - first, own: 0, len: to - from })
        };
        self.overlapping(param, (first, end)).filter_map(owned).collect()
    }
}

/// The number of a part's place, where layers have so many; what stays whole has the last one.
fn place_of(part: Part, slots: usize) -> usize {
    match part {
        Part::Layer(layer) => layer % slots,
        Part::Tower | Part::Embedding | Part::Head => WEIGHT_PLACES - 1,
        Part::Whole => WEIGHT_PLACES,
    }
}

/// Which parts are in their places.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Held([Option<Part>; WEIGHT_PLACES + 1]);

impl Held {
    /// Whether a part has to be gathered. From now on it counts as being in its place, and what was there before does not.
    pub(super) fn claim(&mut self, part: Part, slots: usize) -> bool {
        self.0[place_of(part, slots)].replace(part) != Some(part)
    }
}

#[cfg(test)]
mod tests;
