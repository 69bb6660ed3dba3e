//! Parts of a tensor in several places: which bytes of which place a wanted range consists of. Pure.

use std::ops::Range;

/// Elements that one place has of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Held {
    /// The place, for the caller.
    pub(super) place: usize,
    /// First element within the tensor.
    pub(super) start: usize,
    pub(super) len: usize,
    /// First element within what the place has of the tensor.
    pub(super) from: usize,
}

/// Elements that are copied from a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Copied {
    pub(super) place: usize,
    /// First element within what the place holds.
    pub(super) from: usize,
    /// First element within what is wanted.
    pub(super) to: usize,
    pub(super) len: usize,
}

/// All that places have of a tensor: in the order of the elements, each once.
#[derive(Debug, Default)]
pub(super) struct Cover(Vec<Held>);

impl Cover {
    /// Of what places have, in any order; some of it may be in several.
    pub(super) fn new(mut held: Vec<Held>) -> Self {
        held.sort_unstable_by_key(|held| held.start);
        let mut next = 0;
        held.retain_mut(|held| {
            let known = next.max(held.start) - held.start;
            if held.len <= known {
                return false;
            }
            (held.start, held.from, held.len) = (held.start + known, held.from + known, held.len - known);
            next = held.start + held.len;
            true
        });
        Cover(held)
    }

    /// What to copy for the elements `wanted`, in their order. Fails with the first elements that no place has.
    pub(super) fn intersect(&self, wanted: Range<usize>) -> Result<Vec<Copied>, Range<usize>> {
        let (mut copies, mut at) = (Vec::new(), wanted.start);
        let first = self.0.partition_point(|held| held.start + held.len <= wanted.start);
        for &Held { place, start, len, from } in &self.0[first..] {
            if at >= wanted.end {
                break;
            }
            if start > at {
                return Err(at..start.min(wanted.end));
            }
            let end = (start + len).min(wanted.end);
            copies.push(Copied { place, from: from + at - start, to: at - wanted.start, len: end - at });
            at = end;
        }
        if at < wanted.end { Err(at..wanted.end) } else { Ok(copies) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A reproducible sequence of numbers below a bound.
    fn numbers(seed: u64) -> impl FnMut(usize) -> usize {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        move |below| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % below.max(1)
        }
    }

    /// `len` elements, cut at random into pieces, some of them empty.
    fn cut(len: usize, random: &mut impl FnMut(usize) -> usize) -> Vec<Held> {
        let mut ends: Vec<usize> = (0..random(7)).map(|_| random(len + 1)).chain([0, len]).collect();
        ends.sort_unstable();
        let piece = |(place, pair): (usize, &[usize])| Held { place, start: pair[0], len: pair[1] - pair[0], from: 0 };
        ends.windows(2).enumerate().map(piece).collect()
    }

    #[test]
    fn whatever_was_written_in_pieces_is_read_in_any_others() {
        for seed in 0..2000 {
            let mut random = numbers(seed);
            let len = 1 + random(200);
            let tensor: Vec<usize> = (0..len).map(|_| random(1 << 20)).collect();
            let mut held = cut(len, &mut random);
            let written: Vec<&[usize]> = held.iter().map(|held| &tensor[held.start..held.start + held.len]).collect();
            // In any order, some of it twice.
            if random(2) == 0 {
                held.reverse();
            }
            if random(2) == 0 {
                held.push(held[random(held.len())]);
            }
            let cover = Cover::new(held);
            for wanted in cut(len, &mut random) {
                let mut read = vec![usize::MAX; wanted.len];
                for Copied { place, from, to, len } in cover.intersect(wanted.start..wanted.start + wanted.len).unwrap()
                {
                    read[to..to + len].copy_from_slice(&written[place][from..from + len]);
                }
                assert_eq!(read, tensor[wanted.start..wanted.start + wanted.len], "seed {seed}");
            }
        }
    }

    #[test]
    fn elements_that_are_nowhere_are_named() {
        for seed in 0..2000 {
            let mut random = numbers(seed);
            let len = 2 + random(100);
            let mut held = cut(len, &mut random);
            held.retain(|held| held.len > 0);
            let lost = held.remove(random(held.len()));
            let gap = lost.start..lost.start + lost.len;
            let cover = Cover::new(held);
            assert_eq!(cover.intersect(0..len), Err(gap.clone()), "seed {seed}");
            assert!(cover.intersect(0..gap.start).is_ok() && cover.intersect(gap.end..len).is_ok());
        }
    }
}
