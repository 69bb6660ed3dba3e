//! How the ranks of a replica divide weights, trained and frozen ones. Each rank keeps a piece of every shard for good; all pieces
//! are gathered, one behind the other, into a place that shards take turns in, when a pass needs them. What is small stays whole. Pure; knows places, no values and no messages. May import placements.

use std::iter;

use arl_model::{Block, TensorSpec};

use super::arena::ALIGNMENT;
use super::cut::{Cut, Owned};
use super::divided::{Divided, Shard, extend};
use super::quantized::NF4_ARRAYS;
use super::{Param, Placement};
use crate::backend::Buffer;
use crate::mesh::Place;

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

/// A parameter that is frozen.
#[derive(Clone, Copy, Debug)]
struct Frozen {
    /// In the weights' arena.
    offset: usize,
    len: usize,
    /// Counted over all that are frozen.
    first: usize,
}

/// The division of weights among ranks.
#[derive(Clone, Debug)]
pub(crate) struct Shards {
    /// The array of all weights but those in NF4.
    pub(crate) weights: Divided,
    /// The arrays of those in NF4.
    pub(crate) quantized: [Divided; NF4_ARRAYS],
    /// In the order of the weights' arena. Those in NF4 are none of them.
    frozen: Vec<Frozen>,
    /// Places for layers.
    slots: usize,
    place: Place,
}

impl Shards {
    /// Divides among the ranks of a cut, for its rank.
    pub(super) fn new(placement: &Placement, cut: &Cut) -> Self {
        let trained = cut.buckets.iter().map(|bucket| Shard {
            part: bucket.part,
            trained: true,
            axis: bucket.axis,
            ranks: cut.place.sharing(bucket.axis),
            rank: cut.place.share(bucket.axis),
            start: bucket.start,
            len: bucket.len,
            // What its counterparts update is kept with what this rank does.
            piece: cut.place.mesh.dp_replicate * cut.piece_len(bucket),
            own: 0,
            place: 0,
        });
        let (frozen, of_frozen) = frozen(placement);
        let slots = WEIGHT_SLOTS[usize::from(cut.overlaps)];
        Shards {
            weights: Divided::placed(trained.chain(of_frozen).collect(), slots),
            quantized: placement.quantized.shards(placement).map(|shards| Divided::placed(shards, slots)),
            frozen,
            slots,
            place: cut.place,
        }
    }

    /// Whether a part has to be gathered; from now on it counts as held.
    pub(crate) fn claim(&self, held: &mut Held, part: Part) -> bool {
        let mut arrays = iter::once(&self.weights).chain(&self.quantized);
        part != Part::Whole && arrays.any(|array| array.of(part).next().is_some()) && held.claim(part, self.slots)
    }

    /// The number of the place that a part is gathered in.
    pub(crate) fn place_of(&self, part: Part) -> usize {
        place_of(part, self.slots)
    }

    /// A parameter's elements, as shards count them; none: it is in NF4.
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

    /// Where a parameter is while its part is gathered.
    pub(super) fn place(&self, param: Param) -> usize {
        let Some((first, _)) = self.elements(param) else { return 0 };
        let shard = self.weights.starting_at(param.trained.is_some(), first).first();
        shard.map_or(0, |shard| shard.gathered(first))
    }

    /// Where an element of the optimizer's arena is that this rank owns.
    pub(super) fn own_place(&self, element: usize) -> usize {
        let shard = self.weights.starting_at(true, element).first();
        shard.map_or(0, |shard| shard.own + (element - shard.start) % shard.piece)
    }

    /// What this rank has of a parameter for good: first elements within it, and their places in the array of weights.
    pub(crate) fn parts(&self, param: Param, weights: Buffer) -> Vec<(usize, Buffer)> {
        let Some(elements) = self.elements(param) else { return Vec::new() };
        self.weights.kept_of(param.trained.is_some(), elements, weights)
    }

    /// What a rank, of those that have the same of a frozen parameter, owns of it.
    pub(super) fn owned_frozen(&self, param: Param, rank: usize) -> Vec<Owned> {
        let Some((first, end)) = self.elements(param) else { return Vec::new() };
        let place = Place { rank, ..self.place };
        let owned = |shard: &Shard| {
            let (from, to) = shard.within((first, end), Some(place.share(shard.axis)))?;
            (place.replica() == 0).then_some(Owned { start: from - first, own: 0, len: to - from })
        };
        self.weights.overlapping(false, (first, end)).filter_map(owned).collect()
    }
}

/// Counts what is frozen, and divides it. What one product takes stays together, and begins as well aligned as in the weights' arena.
fn frozen(placement: &Placement) -> (Vec<Frozen>, Vec<Shard>) {
    let (mut frozen, mut shards): (Vec<Frozen>, Vec<Shard>) = (Vec::new(), Vec::new());
    let (mut next, mut behind) = (0, None);
    for tensor in &placement.tensors {
        let Param { offset, len, trained, quantized, axis, .. } = tensor.param;
        if trained.is_some() || quantized {
            continue;
        }
        if behind != Some(offset) {
            next = usize::next_multiple_of(next, STEP);
        }
        frozen.push(Frozen { offset, len, first: next });
        extend(&mut shards, &placement.place, (Part::of(&tensor.spec), axis), (next, next + len));
        (next, behind) = (next + len, Some(offset + len));
    }
    let divided = shards.into_iter().map(|shard| shard.in_pieces(STEP));
    (frozen, divided.collect())
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
