//! One array that ranks divide: each has a piece of every shard for good, and all pieces are gathered, one behind the other, into a
//! place that shards take turns in. What is small stays whole. Pure; knows places, no values and no messages.

use super::shards::Part;
use crate::backend::Buffer;
use crate::mesh::{Axis, Place};

/// Neighbours in an array that belong to one part, and that the same ranks have the same of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shard {
    pub(crate) part: Part,
    /// Whether they are trained: they are counted in the optimizer's arena then.
    pub(crate) trained: bool,
    /// The ranks that have the same of it; how many of them, those of a replica, have pieces, and the number of this one among these.
    pub(crate) axis: Axis,
    pub(crate) ranks: usize,
    pub(super) rank: usize,
    /// First element, counted as all of its kind are before they are divided.
    pub(super) start: usize,
    pub(super) len: usize,
    /// Elements of each rank's piece, padding included.
    pub(crate) piece: usize,
    /// First element of this rank's piece in the array.
    pub(crate) own: usize,
    /// Where the pieces of all ranks are gathered in the array. That of what stays whole has this rank's own in it.
    pub(crate) place: usize,
}

impl Shard {
    /// Its elements within `[first, end)`: all of them, or those in a rank's piece.
    pub(super) fn within(&self, (first, end): (usize, usize), rank: Option<usize>) -> Option<(usize, usize)> {
        let (start, last) = (self.start, self.start + self.len);
        let (start, last) = match rank {
            None => (start, last),
            Some(rank) => ((start + rank * self.piece).min(last), (start + (rank + 1) * self.piece).min(last)),
        };
        let (from, to) = (start.max(first), last.min(end));
        (from < to).then_some((from, to))
    }

    /// What this rank has for good of the elements `[first, end)`: the first of them, and where they are in the array.
    pub(super) fn kept(&self, (first, end): (usize, usize), array: Buffer) -> Option<(usize, Buffer)> {
        let whole = self.part == Part::Whole;
        let (from, to) = self.within((first, end), (!whole).then_some(self.rank))?;
        let in_shard = from - self.start;
        let place = if whole { self.place + in_shard } else { self.own + in_shard % self.piece };
        Some((from, array.slice(place, to - from)))
    }

    /// Where an element of it is while its part is gathered.
    pub(super) fn gathered(&self, element: usize) -> usize {
        self.place + element - self.start
    }

    /// Divided, into pieces that are multiples of `step`.
    pub(super) fn in_pieces(self, step: usize) -> Self {
        Shard { piece: self.len.div_ceil(self.ranks).next_multiple_of(step), ..self }
    }

    /// In `array`: this rank's piece, and where those of all ranks are gathered.
    pub(crate) fn buffers(&self, array: Buffer) -> (Buffer, Buffer) {
        (array.slice(self.own, self.piece), array.slice(self.place, self.ranks * self.piece))
    }

    /// In `array`, where there are so many replicas, of which this rank's has this number: what this rank updates of its piece, and the
    /// piece.
    pub(crate) fn updated(&self, array: Buffer, (replicas, replica): (usize, usize)) -> (Buffer, Buffer) {
        let len = self.piece / replicas;
        (array.slice(self.own + replica * len, len), array.slice(self.own, self.piece))
    }

    /// Bytes that this rank sends when all ranks gather it in `array`.
    pub(crate) fn sent_bytes(&self, array: Buffer) -> u64 {
        ((self.ranks - 1) * self.piece * array.dtype.bytes()) as u64
    }
}

/// Adds frozen elements `[start, end)` to the last shard if it is of the same part and axis, else to a new one.
pub(super) fn extend(shards: &mut Vec<Shard>, place: &Place, (part, axis): (Part, Axis), (start, end): (usize, usize)) {
    match shards.last_mut().filter(|last| (last.part, last.axis) == (part, axis)) {
        Some(last) => last.len = end - last.start,
        None => {
            let (ranks, rank) = (place.sharing(axis), place.share(axis));
            let len = end - start;
            shards.push(Shard { part, trained: false, axis, ranks, rank, start, len, piece: 0, own: 0, place: 0 });
        }
    }
}

/// An array of shards: this rank's pieces, then what stays whole, then the places for what is gathered.
#[derive(Clone, Debug, Default)]
pub(crate) struct Divided {
    /// In the order of their elements, trained ones first.
    pub(crate) all: Vec<Shard>,
    /// Elements of this rank's pieces.
    pub(crate) pieces: usize,
    /// Elements of these and of what stays whole.
    pub(crate) kept: usize,
    /// Elements of the array.
    pub(crate) len: usize,
}

impl Divided {
    /// Gives every shard its places; `slots` are those that layers take turns in.
    pub(super) fn placed(mut all: Vec<Shard>, slots: usize) -> Self {
        let mut pieces = 0;
        for shard in all.iter_mut().filter(|shard| shard.part != Part::Whole) {
            shard.own = pieces;
            pieces += shard.piece;
        }
        let mut divided = Divided { all, pieces, kept: 0, len: 0 };
        divided.kept = divided.place_part(Part::Whole, pieces);
        for shard in divided.all.iter_mut().filter(|shard| shard.part == Part::Whole) {
            shard.own = shard.place + shard.rank * shard.piece;
        }
        // The tower sees before the look-up, and again behind everything else; a head of its own is needed behind the look-up.
        let kept = divided.kept;
        let ends = [Part::Tower, Part::Embedding, Part::Head].map(|part| divided.place_part(part, kept));
        let first = ends.into_iter().max().unwrap_or(kept);
        let layers = divided.layers();
        let slot = layers.iter().map(|&layer| divided.place_part(Part::Layer(layer), 0)).max().unwrap_or(0);
        // Not every layer has something in each array.
        let places = layers.iter().map(|layer| layer % slots + 1).max().unwrap_or(0);
        divided.len = first + places * slot;
        for layer in layers {
            divided.place_part(Part::Layer(layer), first + layer % slots * slot);
        }
        divided
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

    /// The shards of trained elements, or of others, from the one with an element on.
    pub(super) fn starting_at(&self, trained: bool, element: usize) -> &[Shard] {
        let (of_trained, of_frozen) = self.all.split_at(self.all.partition_point(|shard| shard.trained));
        let shards = if trained { of_trained } else { of_frozen };
        &shards[shards.partition_point(|shard| shard.start + shard.len <= element)..]
    }

    /// Those of them that have any of the elements `[first, end)`.
    pub(super) fn overlapping(&self, trained: bool, (first, end): (usize, usize)) -> impl Iterator<Item = &Shard> {
        self.starting_at(trained, first).iter().take_while(move |shard| shard.start < end)
    }

    /// What this rank has for good of the elements `[first, end)`: first elements within them, and places in the array.
    pub(super) fn kept_of(&self, trained: bool, range: (usize, usize), array: Buffer) -> Vec<(usize, Buffer)> {
        let kept = self.overlapping(trained, range).filter_map(|shard| shard.kept(range, array));
        kept.map(|(from, place)| (from - range.0, place)).collect()
    }
}
