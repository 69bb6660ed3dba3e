//! Where whole parameters are while rank 0 computes alone and no rank has all of the model: norms and biases all the time, the rest,
//! as in [`super::shards`], in places that parts take turns in. Pure; knows places, no values and no messages.

use super::shards::{Held, Part, WEIGHT_SLOTS};
use super::{Param, Placement, STEP, Tensor, width};

/// Places for layers: weights are waited for, so that none travel while a layer is computed.
const SLOTS: usize = WEIGHT_SLOTS[0];

/// Elements of the weights' arena, one behind the other, that belong to one part.
#[derive(Clone, Copy, Debug)]
struct Segment {
    part: Part,
    /// First element in the weights' arena.
    start: usize,
    len: usize,
    /// Where they are in the array of weights, while their part is there.
    place: usize,
}

/// The places of all parts.
#[derive(Clone, Debug)]
pub(crate) struct WholeParts {
    /// In the order of the weights' arena.
    segments: Vec<Segment>,
    /// Elements of the array of weights.
    pub(crate) len: usize,
}

impl WholeParts {
    /// The places of a placement that has all of every parameter.
    fn new(placement: &Placement) -> Self {
        let mut segments: Vec<Segment> = Vec::new();
        for Tensor { spec, param, .. } in &placement.tensors {
            let (part, end) = (Part::of(spec), param.offset + param.len * width(param.wide));
            match segments.last_mut().filter(|last| last.part == part) {
                Some(last) => last.len = end - last.start,
                None => segments.push(Segment { part, start: param.offset, len: end - param.offset, place: 0 }),
            }
        }
        let mut parts = WholeParts { segments, len: 0 };
        parts.len = parts.place_all(placement.layer_ends.len());
        parts
    }

    /// Gives every segment its place; gives the place behind all of them.
    fn place_all(&mut self, layers: usize) -> usize {
        let kept = self.place_part(Part::Whole, 0);
        // As `Shards` has them: the tower sees before the look-up, and a head of its own is needed behind it.
        let ends = [Part::Tower, Part::Embedding, Part::Head].map(|part| self.place_part(part, kept));
        let first = ends.into_iter().max().unwrap_or(kept);
        let slot = (0..layers).map(|layer| self.place_part(Part::Layer(layer), 0)).max().unwrap_or(0);
        for layer in 0..layers {
            self.place_part(Part::Layer(layer), first + layer % SLOTS * slot);
        }
        first + SLOTS.min(layers) * slot
    }

    /// Places the segments of a part from `next` on; gives the place behind them.
    fn place_part(&mut self, part: Part, mut next: usize) -> usize {
        for segment in self.segments.iter_mut().filter(|segment| segment.part == part) {
            segment.place = next;
            next += segment.len.next_multiple_of(STEP);
        }
        next
    }

    /// Where a parameter is while its part is there.
    fn place(&self, param: Param) -> usize {
        let behind = self.segments.partition_point(|segment| segment.start <= param.offset);
        self.segments[..behind].last().map_or(0, |segment| segment.place + param.offset - segment.start)
    }

    /// Whether a part has to be put together; from now on it counts as held.
    pub(crate) fn claim(&self, held: &mut Held, part: Part) -> bool {
        self.segments.iter().any(|segment| segment.part == part) && held.claim(part, SLOTS)
    }
}

impl Placement {
    /// Has parts take turns in the array of weights.
    pub(crate) fn take_turns(&mut self) -> WholeParts {
        let parts = WholeParts::new(self);
        self.move_params(|param| param.weight = parts.place(*param));
        parts
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use arl_model::ModelConfig;

    use super::*;
    use crate::mesh::{Mesh, Place};

    #[test]
    fn what_is_there_at_once_has_places_of_its_own_and_products_stay_together() {
        for name in ["window-bias", "moe-balance", "qwen2-window"] {
            let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../__test__/golden").join(name);
            let place = Place::new(Mesh::default(), 1, 0).unwrap();
            let config = ModelConfig::from_dir(&dir).unwrap();
            let mut placement = Placement::new(&config, &[], false, &place).unwrap();
            let before: Vec<Param> = placement.tensors.iter().map(|tensor| tensor.param).collect();
            let parts = placement.take_turns();
            let layer = |part: Part| if let Part::Layer(layer) = part { Some(layer) } else { None };
            let ends = |part: Part| matches!(part, Part::Tower | Part::Embedding | Part::Head);
            for (i, (a, was)) in placement.tensors.iter().zip(&before).enumerate() {
                assert!(a.param.weight + a.param.len <= parts.len);
                for (b, other) in placement.tensors[..i].iter().zip(&before) {
                    let (of_a, of_b) = (Part::of(&a.spec), Part::of(&b.spec));
                    let takes_turns = of_a != of_b
                        && (ends(of_a) && ends(of_b)
                            || layer(of_a).zip(layer(of_b)).is_some_and(|(a, b)| a % SLOTS == b % SLOTS));
                    let apart = a.param.weight + a.param.len <= b.param.weight
                        || b.param.weight + b.param.len <= a.param.weight;
                    assert!(takes_turns || apart, "{name}: {} and {}", a.spec.name, b.spec.name);
                    if of_a == of_b && of_a != Part::Whole {
                        let distance = |a: usize, b: usize| a as isize - b as isize;
                        assert_eq!(distance(a.param.weight, b.param.weight), distance(was.offset, other.offset));
                    }
                }
            }
        }
    }
}
