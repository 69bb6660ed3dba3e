//! This rank's slice of a micro-batch. The ranks along [`Axis::Tokens`] are given the same whole micro-batch; each has as many of its
//! tokens, one slice behind the other in the order of the axis. Behind the last sequence a sequence without targets fills the last
//! slices up; it is in no figure. Pure.

use std::ops::Range;

use crate::batch::{MicroBatch, Shared};
use crate::mesh::{Axis, Place};
use crate::statistics::MicroBatchStats;

/// Which slice of each micro-batch a rank has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slicing {
    /// Slices of a micro-batch.
    pub(crate) count: usize,
    /// The number of this one.
    index: usize,
    /// Neighbours along [`Axis::Tensor`], which have the tokens of all of them in attention and products.
    tensor: usize,
}

impl Slicing {
    /// A rank has whole micro-batches.
    pub(crate) const WHOLE: Slicing = Slicing { count: 1, index: 0, tensor: 1 };

    /// Of the rank of this place.
    pub(crate) fn of(place: &Place) -> Self {
        Slicing { count: place.size(Axis::Tokens), index: place.index(Axis::Tokens), tensor: place.size(Axis::Tensor) }
    }

    /// Whether a rank has less than a whole micro-batch.
    pub(crate) fn divides(&self) -> bool {
        self.count > 1
    }

    /// Tokens of each slice of a micro-batch of so many.
    pub(crate) fn own(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.count)
    }

    /// The sizes that slices of a micro-batch of so many tokens share; see [`Shared`].
    pub(crate) fn shared(&self, tokens: usize) -> (usize, usize) {
        let own = self.own(tokens);
        (own * self.tensor, own * self.count)
    }
}

/// A micro-batch, and which slice of it a rank has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sliced<'a> {
    pub(crate) batch: &'a MicroBatch,
    pub(crate) slicing: Slicing,
}

impl Sliced<'_> {
    fn len(&self) -> usize {
        self.batch.input_ids.len()
    }

    /// This rank's tokens, those that fill the last slices up among them.
    pub(crate) fn padded(&self) -> Range<usize> {
        let own = self.slicing.own(self.len());
        self.slicing.index * own..(self.slicing.index + 1) * own
    }

    /// This rank's tokens of the micro-batch.
    pub(crate) fn tokens(&self) -> Range<usize> {
        let Range { start, end } = self.padded();
        start.min(self.len())..end.min(self.len())
    }

    /// The tokens that this rank and its neighbours along [`Axis::Tensor`] have together, filled up.
    pub(crate) fn of_neighbours(&self) -> Range<usize> {
        let Slicing { index, tensor, .. } = self.slicing;
        let own = self.slicing.own(self.len());
        let first = index / tensor * tensor * own;
        first..first + tensor * own
    }

    /// The first of this rank's tokens, and of those that it and its neighbours along [`Axis::Tensor`] have together.
    pub(crate) fn first(&self) -> [usize; 2] {
        [self.padded().start, self.of_neighbours().start]
    }

    /// Ends of the sequences of the whole micro-batch, filled up, from 0 on; and the tokens of the longest.
    pub(crate) fn sequences(&self) -> (Vec<i32>, usize) {
        let (_, filled) = self.slicing.shared(self.len());
        let mut ends = self.batch.cu_seqlens.clone();
        if filled > self.len() {
            ends.push(filled as i32);
        }
        (ends, self.batch.max_len().max(filled - self.len()))
    }

    /// The values of a range of tokens, of `values` of all of them for each axis; where tokens fill slices up that of the first one.
    pub(crate) fn part(&self, values: &[i32], range: &Range<usize>) -> Vec<i32> {
        let axes = values.chunks_exact(self.len());
        axes.flat_map(|axis| range.clone().map(|t| axis.get(t).copied().unwrap_or(axis[0]))).collect()
    }

    /// Targets of positive weight among these tokens.
    pub(crate) fn targets(&self, tokens: Range<usize>) -> usize {
        tokens.filter(|&t| self.batch.weight(t) > 0.0).count()
    }

    /// What is known of the slice before anything is computed.
    pub(crate) fn stats(&self) -> MicroBatchStats {
        let weights = || self.tokens().map(|t| self.batch.weight(t)).filter(|&w| w > 0.0);
        MicroBatchStats {
            tokens: self.tokens().len(),
            target_tokens: weights().count(),
            target_weight: weights().map(f64::from).sum(),
            ..MicroBatchStats::default()
        }
    }
}

impl MicroBatch {
    /// All of it.
    pub(crate) fn whole(&self) -> Sliced<'_> {
        Sliced { batch: self, slicing: Slicing::WHOLE }
    }

    /// Whether any of its targets is trained.
    pub(crate) fn has_targets(&self) -> bool {
        (0..self.input_ids.len()).any(|t| self.weight(t) > 0.0)
    }
}

impl Shared {
    /// Ranks along [`Axis::Context`] among which the micro-batch's tokens are divided.
    pub(crate) fn contexts(&self) -> usize {
        self.tokens / self.tensor_tokens
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::IGNORED;
    use crate::mesh::Mesh;

    /// 5 tokens, 3 of them targets.
    fn batch() -> MicroBatch {
        MicroBatch {
            input_ids: vec![11, 12, 13, 14, 15],
            targets: vec![2, IGNORED, 4, 5, IGNORED],
            positions: vec![0, 1, 0, 1, 2],
            cu_seqlens: vec![0, 2, 5],
            weights: Some(vec![1.0, 1.0, 0.5, 2.0, 2.0]),
            images: None,
        }
    }

    #[test]
    fn slices_are_equally_long_and_together_the_whole() {
        let batch = batch();
        let all: Vec<usize> = (0..5).collect();
        for (cp, tp) in [(1, 1), (2, 1), (3, 1), (2, 2), (1, 4), (3, 2), (7, 1), (4, 2)] {
            let mesh = Mesh { cp, tp, ..Mesh::default() };
            let slices: Vec<Sliced<'_>> = (0..cp * tp)
                .map(|rank| Sliced { batch: &batch, slicing: Slicing::of(&Place::new(mesh, 1, rank).unwrap()) })
                .collect();
            let own = 5usize.div_ceil(cp * tp);
            let tokens: Vec<usize> = slices.iter().flat_map(Sliced::tokens).collect();
            assert_eq!(tokens, all, "{mesh:?}");
            assert!(slices.iter().all(|slice| slice.padded().len() == own));
            let stats: Vec<MicroBatchStats> = slices.iter().map(Sliced::stats).collect();
            assert_eq!(stats.iter().map(|stat| stat.target_tokens).sum::<usize>(), 3);
            assert_eq!(stats.iter().map(|stat| stat.target_weight).sum::<f64>(), 3.5);
            for (rank, slice) in slices.iter().enumerate() {
                let neighbours = slice.of_neighbours();
                assert_eq!(neighbours.len(), own * tp);
                assert!(neighbours.start <= slice.padded().start && slice.padded().end <= neighbours.end, "{rank}");
                let (ends, longest) = slice.sequences();
                assert_eq!(ends.last(), Some(&((own * cp * tp) as i32)));
                assert_eq!(longest, 3.max(own * cp * tp - 5));
                assert_eq!(slice.slicing.shared(5), (own * tp, own * cp * tp));
            }
        }
    }

    #[test]
    fn tokens_that_fill_a_slice_up_have_a_value_of_the_first() {
        let batch = batch();
        let place = Place::new(Mesh { cp: 2, ..Mesh::default() }, 1, 1).unwrap();
        let slice = Sliced { batch: &batch, slicing: Slicing::of(&place) };
        assert_eq!((slice.padded(), slice.tokens(), slice.targets(slice.tokens())), (3..6, 3..5, 1));
        assert_eq!(slice.part(&batch.input_ids, &slice.padded()), [14, 15, 11]);
        let three: Vec<i32> = (0..15).collect();
        assert_eq!(slice.part(&three, &slice.padded()), [3, 4, 0, 8, 9, 5, 13, 14, 10]);
        assert_eq!(slice.sequences(), (vec![0, 2, 5, 6], 3));
        assert_eq!(batch.whole().part(&three, &batch.whole().padded()), three);
    }
}
