//! Dropout by a counter: whether an element is dropped is a hash of a key and of the element's place, so that a mask needs no memory
//! and is the same on every device, in both passes and after resuming. The CPU and the kernels (`cuda/elementwise.cu`) have the
//! same.

use super::rounding::{finalise, mix};

/// Which elements of a buffer are dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dropout {
    /// Distinguishes the masks of seeds, steps and layers.
    pub key: [u32; 2],
    /// An element is dropped where its hash is below; `probability 2^32`.
    pub threshold: u32,
    /// The place of a buffer's first element.
    pub first: usize,
    /// Elements of the buffer's rows, and of the rows that they are parts of: a row begins so many places behind the one before.
    pub columns: [usize; 2],
}

impl Dropout {
    /// Drops with this probability, 0 or more and below 1; each sequence of words has a mask of its own.
    pub fn new(probability: f32, words: &[u64]) -> Self {
        let key = words.iter().fold(0x6c62_272e_07bb_0142, |key, word| {
            finalise(finalise(key ^ word).wrapping_add(0x9e37_79b9_7f4a_7c15))
        });
        let threshold = (f64::from(probability) * 4_294_967_296.0) as u32;
        Dropout { key: [key as u32, (key >> 32) as u32], threshold, first: 0, columns: [1; 2] }
    }

    /// The places of an element of a buffer and of those that follow it there: the first one, and of how many they are consecutive.
    #[inline(always)]
    pub(crate) fn run(self, element: usize) -> (usize, usize) {
        let [own, whole] = self.columns;
        if own == whole {
            return (self.first + element, usize::MAX);
        }
        let (row, column) = (element / own, element % own);
        (self.first + row * whole + column, own - column)
    }

    /// Whether the element at a place is dropped.
    #[inline(always)]
    pub fn drops(self, place: usize) -> bool {
        let place = place as u64;
        mix(mix(place as u32 ^ self.key[0]) ^ (place >> 32) as u32 ^ self.key[1]) < self.threshold
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COUNT: usize = 1 << 16;

    fn mask(probability: f32, words: &[u64]) -> Vec<bool> {
        let dropout = Dropout::new(probability, words);
        (0..COUNT).map(|place| dropout.drops(place)).collect()
    }

    fn count(mask: &[bool]) -> f64 {
        mask.iter().filter(|dropped| **dropped).count() as f64
    }

    /// The number of dropped elements has the deviation `sqrt(n p (1 - p))`; five of them are exceeded by chance once in two
    /// million times.
    #[test]
    fn as_many_are_dropped_as_the_probability_says() {
        for probability in [0.0, 0.05, 0.5, 0.9] {
            for seed in 0..4 {
                let (n, p) = (COUNT as f64, f64::from(probability));
                let dropped = count(&mask(probability, &[seed, 3, 0, 7]));
                assert!((dropped - n * p).abs() <= 5.0 * (n * p * (1.0 - p)).sqrt(), "{probability} {seed}: {dropped}");
            }
        }
    }

    #[test]
    fn a_part_of_a_tensor_has_the_mask_of_its_places_in_the_whole() {
        let whole = Dropout::new(0.5, &[3]);
        // Columns 4 to 7 of rows of 12, from the third row on.
        let part = Dropout { first: 2 * 12 + 4, columns: [3, 12], ..whole };
        let places: Vec<usize> = (2..6).flat_map(|row| (4..7).map(move |column| row * 12 + column)).collect();
        for (element, &place) in places.iter().enumerate() {
            assert_eq!(part.run(element), (place, 3 - element % 3));
            assert_eq!(Dropout { first: 7, ..whole }.run(element), (7 + element, usize::MAX));
        }
    }

    /// Of independent masks, as many elements are dropped by both as the product of the probabilities says.
    #[test]
    fn masks_of_other_seeds_steps_micro_batches_and_layers_are_independent() {
        let words = [5, 11, 0, 3];
        let one = mask(0.25, &words);
        assert_eq!(mask(0.25, &words), one);
        for i in 0..words.len() {
            let mut other = words;
            other[i] += 1;
            let both: Vec<bool> = mask(0.25, &other).iter().zip(&one).map(|(a, b)| *a && *b).collect();
            let (n, p) = (COUNT as f64, 0.0625);
            assert!((count(&both) - n * p).abs() <= 5.0 * (n * p * (1.0 - p)).sqrt(), "{i}: {}", count(&both));
        }
    }
}
