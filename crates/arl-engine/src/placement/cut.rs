//! How ranks divide what they train. The optimizer's arena is cut into buckets, one after the other, of parameters of which the same
//! ranks have the same, and each of these ranks owns a piece of the bucket: moments, masters and sums of gradients exist for a rank's
//! own pieces alone. Pure; knows places and the ranks' numbers, no values and no messages. May import placements.

use std::ops::Range;

use arl_model::Block;

use super::arena::ALIGNMENT;
use super::shards::{Part, Shards};
use super::{Param, Placement, Run};
use crate::mesh::{Axis, Place};

/// Places for gradients that are divided: one for those that stay until the backward pass ends, and two that buckets take turns in,
/// so that the gradients of one layer travel while those of the next are computed.
pub(crate) const GRADIENT_PLACES: usize = 3;

/// Pieces are multiples of so many elements, which are at least two bytes each.
const STEP: usize = ALIGNMENT / 2;

/// When the backward pass has completed the gradients of a bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Complete {
    /// With the loss: a head of its own.
    Loss,
    /// With this layer.
    Layer(usize),
    /// With the embedding.
    End,
}

/// Elements of the optimizer's arena that the backward pass completes at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bucket {
    /// First element in the optimizer's arena.
    pub(crate) start: usize,
    pub(crate) len: usize,
    pub(crate) complete: Complete,
    /// What its weights are gathered with.
    pub(crate) part: Part,
    /// The ranks that have the same of it: they add its gradients, and each owns a piece.
    pub(crate) axis: Axis,
    /// The first stage has it too, and counts for both.
    pub(crate) copied: bool,
    /// Others have its place in the array of gradients before and after it.
    pub(crate) shared: bool,
    /// The number of the place that has it, of [`GRADIENT_PLACES`].
    pub(crate) place: usize,
    /// First element in the array of gradients.
    pub(crate) gradient: usize,
    /// First element in a rank's own arrays.
    pub(crate) own: usize,
}

/// A part of a parameter that a rank owns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Owned {
    /// First element within the parameter.
    pub(crate) start: usize,
    /// First element in the rank's own arrays.
    pub(crate) own: usize,
    pub(crate) len: usize,
}

/// The division of the optimizer's arena among ranks.
#[derive(Clone, Debug)]
pub(crate) struct Cut {
    /// Of this rank.
    pub(crate) place: Place,
    pub(crate) buckets: Vec<Bucket>,
    /// Gradients too are divided: only what several layers add to exists as a whole, buckets take turns in the rest of their
    /// array, and sums exist for own pieces alone.
    pub(crate) gradients: bool,
    /// Weights and gradients travel while others are computed with: they have a place more.
    pub(crate) overlaps: bool,
    /// Elements of the array of gradients.
    pub(crate) gradient_len: usize,
    /// Elements of a rank's own arrays; the same for every rank of a stage.
    pub(crate) own_len: usize,
    /// How weights are divided; none: every rank has all of them.
    pub(crate) weights: Option<Shards>,
}

impl Cut {
    /// Divides for the rank of the placement. `gradients`: these too.
    pub(crate) fn new(placement: &Placement, gradients: bool) -> Self {
        let mut buckets: Vec<Bucket> = Vec::new();
        for tensor in &placement.tensors {
            let Some(start) = tensor.param.trained else { continue };
            let (complete, shared) = match tensor.spec.block {
                // Every layer adds to norms and biases, and a tied head to the embedding.
                _ if !tensor.spec.decay || tensor.param.wide => (Complete::End, false),
                Block::Embedding => (Complete::End, !placement.tied),
                Block::Head => (Complete::Loss, true),
                block => block.layer().map_or((Complete::End, false), |layer| (Complete::Layer(layer), true)),
            };
            let (part, axis, copied) = (Part::of(&tensor.spec), tensor.param.axis, tensor.copied);
            let alike =
                |last: &Bucket| (last.complete, last.shared, last.part, last.axis) == (complete, shared, part, axis);
            if !buckets.last().is_some_and(alike) {
                let start = if buckets.is_empty() { 0 } else { start };
                let bucket =
                    Bucket { start, len: 0, complete, part, axis, copied, shared, place: 0, gradient: start, own: 0 };
                buckets.push(bucket);
            }
        }
        let (place, gradient_len) = (placement.place, placement.optimizer);
        let mut cut = Cut { place, buckets, gradients, overlaps: false, gradient_len, own_len: 0, weights: None };
        cut.measure(placement.optimizer);
        cut.place_gradients();
        cut
    }

    /// With places for what travels while others are computed with, or without.
    pub(crate) fn overlapping(mut self, overlaps: bool) -> Self {
        self.overlaps = overlaps;
        self.place_gradients();
        self
    }

    /// Divides weights too.
    pub(crate) fn with_weights(self, placement: &Placement) -> Self {
        Cut { weights: Some(Shards::new(placement, &self)), ..self }
    }

    /// Lengths, and the places in the arrays.
    fn measure(&mut self, end: usize) {
        let starts: Vec<usize> = self.buckets.iter().map(|bucket| bucket.start).chain([end]).collect();
        for (bucket, pair) in self.buckets.iter_mut().zip(starts.windows(2)) {
            bucket.len = pair[1] - pair[0];
        }
        for i in 0..self.buckets.len() {
            self.buckets[i].own = self.own_len;
            self.own_len += self.piece_len(&self.buckets[i]);
        }
    }

    /// Gives buckets their places in the array of gradients, where these are divided.
    fn place_gradients(&mut self) {
        if !self.gradients {
            return;
        }
        let mut next = 0;
        for bucket in self.buckets.iter_mut().filter(|bucket| !bucket.shared) {
            bucket.gradient = next;
            next += bucket.len;
        }
        for place in 1..GRADIENT_PLACES {
            // What is completed at once is there at once.
            let mut most = 0;
            for i in 0..self.buckets.len() {
                let Bucket { complete, shared, len, .. } = self.buckets[i];
                if shared && self.turn(complete) == place {
                    let together = |other: &&Bucket| other.shared && other.complete == complete;
                    let before: usize = self.buckets[..i].iter().filter(together).map(|bucket| bucket.len).sum();
                    (self.buckets[i].place, self.buckets[i].gradient) = (place, next + before);
                    most = most.max(before + len);
                }
            }
            next += most;
        }
        self.gradient_len = next;
    }

    /// The place of buckets that take turns. Layers alternate; embedding and head, which are large, share the place of every second
    /// layer.
    fn turn(&self, complete: Complete) -> usize {
        let Complete::Layer(layer) = complete else { return 1 };
        let mut above: Vec<Complete> =
            self.buckets.iter().filter(|bucket| bucket.shared).map(|bucket| bucket.complete).collect();
        above.retain(|other| matches!(other, Complete::Layer(other) if *other > layer));
        above.sort_unstable();
        above.dedup();
        if self.overlaps && above.len().is_multiple_of(2) { 2 } else { 1 }
    }

    /// The places of gradients that are written from a point of the backward pass on; [`Complete::Loss`]: from its beginning.
    pub(crate) fn places(&self, from: Complete) -> impl Iterator<Item = usize> {
        let begins =
            move |bucket: &&Bucket| if bucket.shared { bucket.complete == from } else { from == Complete::Loss };
        self.buckets.iter().filter(begins).map(|bucket| bucket.place)
    }

    /// How many ranks have pieces of a bucket.
    pub(crate) fn ranks(&self, bucket: &Bucket) -> usize {
        self.place.size(bucket.axis)
    }

    /// Elements of each rank's piece of a bucket, padding included.
    pub(crate) fn piece_len(&self, bucket: &Bucket) -> usize {
        bucket.len.div_ceil(self.ranks(bucket)).next_multiple_of(STEP)
    }

    /// The piece of a bucket, in the optimizer's arena, of the rank that has this place along the bucket's axis; some may be shorter,
    /// or empty.
    pub(crate) fn piece(&self, bucket: &Bucket, index: usize) -> Range<usize> {
        let (len, end) = (self.piece_len(bucket), bucket.start + bucket.len);
        let start = bucket.start + self.place.piece(bucket.axis, index) * len;
        start.min(end)..(start + len).min(end)
    }

    /// This rank's piece of a bucket.
    pub(crate) fn own_piece(&self, bucket: &Bucket) -> Range<usize> {
        self.piece(bucket, self.place.index(bucket.axis))
    }

    /// What a rank, of those that have the same elements, owns of elements of the optimizer's arena.
    pub(crate) fn owned(&self, elements: Range<usize>, rank: usize) -> Vec<Owned> {
        let place = Place { rank, ..self.place };
        let part = |bucket: &Bucket| {
            let piece = self.piece(bucket, place.index(bucket.axis));
            let (start, end) = (piece.start.max(elements.start), piece.end.min(elements.end));
            (start < end).then(|| Owned {
                start: start - elements.start,
                own: bucket.own + start - piece.start,
                len: end - start,
            })
        };
        let first = self.buckets.partition_point(|bucket| bucket.start + bucket.len <= elements.start);
        self.buckets[first..].iter().take_while(|bucket| bucket.start < elements.end).filter_map(part).collect()
    }

    /// The parts of runs that a rank updates.
    pub(crate) fn runs(&self, runs: &[Run], rank: usize) -> Vec<Run> {
        let parts = |run: &Run| {
            let owned = self.owned(run.optimizer..run.optimizer + run.len, rank);
            let run = *run;
            owned.into_iter().map(move |Owned { start, own, len }| {
                let part = Run { own, ..run.part(start, len) };
                let weights = self.weights.as_ref().map_or(part.weights, |shards| shards.own_place(part.optimizer));
                Run { weights, ..part }
            })
        };
        runs.iter().flat_map(parts).collect()
    }

    /// The place of an element of the optimizer's arena in the array of gradients.
    pub(crate) fn gradient(&self, element: usize) -> usize {
        let holds = |bucket: &&Bucket| (bucket.start..bucket.start + bucket.len).contains(&element);
        self.buckets.iter().find(holds).map_or(element, |bucket| bucket.gradient + element - bucket.start)
    }

    /// What the backward pass completes at a point.
    pub(crate) fn completed(&self, at: Complete) -> impl Iterator<Item = &Bucket> {
        self.buckets.iter().filter(move |bucket| bucket.complete == at)
    }
}

/// What a rank, of those that have the same of a parameter, owns of it: with a cut, that of the cut; without, all of it. The first of
/// them owns what is frozen, unless weights are cut.
pub(crate) fn owned(cut: Option<&Cut>, param: Param, rank: usize) -> Vec<Owned> {
    match (cut, param.trained) {
        (None, trained) => vec![Owned { start: 0, own: trained.unwrap_or(0), len: param.len }],
        (Some(cut), Some(first)) => cut.owned(first..first + param.len, rank),
        (Some(Cut { weights: Some(shards), .. }), None) if !param.quantized => shards.owned_frozen(param, rank),
        (Some(cut), None) if (Place { rank, ..cut.place }).index(param.axis) == 0 => {
            vec![Owned { start: 0, own: 0, len: param.len }]
        }
        (Some(_), None) => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use arl_model::ModelConfig;

    use super::*;
    use crate::mesh::Mesh;

    fn placement(name: &str, frozen: &[&str], ranks: usize) -> Placement {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../__test__/golden").join(name);
        let frozen: Vec<String> = frozen.iter().map(|pattern| (*pattern).to_owned()).collect();
        let place = Place::new(Mesh::default(), ranks, 0).unwrap();
        Placement::new(&ModelConfig::from_dir(&dir).unwrap(), &frozen, false, &place).unwrap()
    }

    fn cuts() -> Vec<(Placement, Cut)> {
        let mut all = Vec::new();
        for name in ["moe-balance", "window-bias", "qwen2-window"] {
            for frozen in [&[][..], &["*embed*", "model.layers.0.*", "*.o_proj.weight"]] {
                for (ranks, gradients) in [(1, true), (2, false), (2, true), (3, true), (7, true), (4096, false)] {
                    let placement = placement(name, frozen, ranks);
                    let cut = Cut::new(&placement, gradients);
                    let overlapping = cut.clone().overlapping(true);
                    all.extend([(placement.clone(), cut), (placement, overlapping)]);
                }
            }
        }
        all
    }

    #[test]
    fn every_element_is_owned_once_and_has_a_place_of_its_own_there() {
        for (placement, cut) in cuts() {
            let mut owners = vec![0; placement.optimizer];
            for rank in 0..cut.place.data {
                let mut used = vec![false; cut.own_len];
                for Owned { start, own, len } in cut.owned(0..placement.optimizer, rank) {
                    owners[start..start + len].iter_mut().for_each(|count| *count += 1);
                    assert!(own.is_multiple_of(STEP));
                    used[own..own + len].iter_mut().for_each(|used| assert!(!std::mem::replace(used, true)));
                }
            }
            assert!(owners.iter().all(|&count| count == 1));
        }
    }

    #[test]
    fn runs_of_all_ranks_are_those_of_one() {
        for (placement, cut) in cuts() {
            let decay = |runs: &[Run]| {
                let mut of = vec![None; placement.optimizer];
                for run in runs {
                    for i in 0..run.len {
                        assert_eq!(of[run.optimizer + i].replace((run.weights + i, run.decay)), None);
                    }
                }
                of
            };
            let parts: Vec<Run> = (0..cut.place.data).flat_map(|rank| cut.runs(&placement.runs, rank)).collect();
            assert_eq!(decay(&parts), decay(&placement.runs));
        }
    }

    #[test]
    fn what_a_parameters_parts_hold_is_the_parameter() {
        for (placement, cut) in cuts() {
            for tensor in &placement.tensors {
                let mut covered = vec![0; tensor.param.len];
                for rank in 0..cut.place.data {
                    for part in owned(Some(&cut), tensor.param, rank) {
                        covered[part.start..part.start + part.len].iter_mut().for_each(|count| *count += 1);
                    }
                }
                assert!(covered.iter().all(|&count| count == 1), "{}", tensor.spec.name);
            }
        }
    }

    /// Whether one of them may travel while the other is computed: layers of which one follows the other, and the head and the layer behind it.
    fn follow(cut: &Cut, a: &Bucket, b: &Bucket) -> bool {
        let mut order: Vec<Complete> =
            cut.buckets.iter().filter(|bucket| bucket.shared).map(|bucket| bucket.complete).collect();
        order.sort_unstable_by_key(|complete| match complete {
            Complete::Loss => 0,
            Complete::Layer(layer) => 1000 - layer,
            Complete::End => 2000,
        });
        order.dedup();
        let at = |bucket: &Bucket| order.iter().position(|complete| *complete == bucket.complete);
        let end = a.complete == Complete::End || b.complete == Complete::End;
        cut.overlaps && !end && at(a).zip(at(b)).is_some_and(|(a, b)| a.abs_diff(b) == 1)
    }

    #[test]
    fn gradients_that_are_wanted_at_once_are_apart_and_parameters_of_a_product_stay_together() {
        for (placement, cut) in cuts().into_iter().filter(|(_, cut)| cut.gradients) {
            let places = |bucket: &Bucket| bucket.gradient..bucket.gradient + bucket.len;
            for (i, a) in cut.buckets.iter().enumerate() {
                assert!(places(a).end <= cut.gradient_len);
                for b in &cut.buckets[..i] {
                    let at_once = !a.shared || !b.shared || a.complete == b.complete || follow(&cut, a, b);
                    let apart = places(a).end <= places(b).start || places(b).end <= places(a).start;
                    assert!(!at_once || apart, "{a:?} {b:?}");
                }
            }
            for tensor in &placement.tensors {
                let Some(first) = tensor.param.trained else { continue };
                assert_eq!(cut.gradient(first + tensor.param.len - 1), cut.gradient(first) + tensor.param.len - 1);
            }
        }
    }

    #[test]
    fn gradients_of_one_layer_at_a_time_take_less_than_those_of_all() {
        let placement = placement("moe-balance", &[], 2);
        let cut = Cut::new(&placement, true);
        assert!(cut.gradient_len < placement.optimizer, "{} of {}", cut.gradient_len, placement.optimizer);
        let two = cut.clone().overlapping(true);
        let (one, two) = (cut.gradient_len, two.gradient_len);
        assert!(one < two && two <= placement.optimizer, "{one} {two} of {}", placement.optimizer);
        let whole = Cut::new(&placement, false);
        assert_eq!(whole.gradient_len, placement.optimizer);
        assert_eq!(whole.gradient(77), 77);
    }
}
