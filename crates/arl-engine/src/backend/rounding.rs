//! Stochastic rounding of f32 to bf16: up or down at random, by how near either is, so that what is rounded away is kept on
//! average. The random bits are a hash of seed, step and parameter; the CPU and the kernels (`cuda/optimizer.cu`) have
//! the same.

/// The random bits of one step, for parameters from `first` on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StochasticRounding {
    /// Of seed and step.
    pub key: [u32; 2],
    /// The place of the first parameter among all of them.
    pub first: u64,
}

impl StochasticRounding {
    /// The bits of optimizer step `step` of a run with `seed`.
    pub fn new(seed: u64, step: u64) -> Self {
        let key = finalise(finalise(seed.wrapping_add(0x9e37_79b9_7f4a_7c15)) ^ step);
        StochasticRounding { key: [key as u32, (key >> 32) as u32], first: 0 }
    }

    /// The same for a run of parameters that begins `start` further.
    #[must_use]
    pub fn from(self, start: usize) -> Self {
        StochasticRounding { first: self.first + start as u64, ..self }
    }

    /// The bits of a bf16: the weight `value` of the parameter `offset` after the first, rounded.
    #[inline(always)]
    pub fn round(&self, value: f32, offset: usize) -> u16 {
        round(value, self.hash(offset) >> 16)
    }

    /// The random bits, 16 each, that round both moments of the parameter `offset` after the first. They are others than
    /// those of its weight.
    #[inline(always)]
    pub fn of_moments(&self, offset: usize) -> [u32; 2] {
        let random = mix(self.hash(offset) ^ MOMENTS);
        [random >> 16, random & 0xffff]
    }

    #[inline(always)]
    fn hash(&self, offset: usize) -> u32 {
        let index = self.first.wrapping_add(offset as u64);
        mix(mix(index as u32 ^ self.key[0]) ^ (index >> 32) as u32 ^ self.key[1])
    }
}

/// Makes the moments' bits others than the weight's: 2^32 over the golden ratio.
const MOMENTS: u32 = 0x9e37_79b9;

/// The bits of a bf16: `value` rounded by 16 random bits.
#[inline(always)]
pub(crate) fn round(value: f32, random: u32) -> u16 {
    // The 16 bits that are cut off, as a part of 2^16, are the probability of a carry.
    let bits = value.to_bits();
    let quiet = (bits >> 16) | 0x40;
    (if value.is_nan() { quiet } else { bits.wrapping_add(random) >> 16 }) as u16
}

/// Chris Wellons' `lowbias32`: every bit of the input changes each bit of the output with a probability of about a half.
#[inline(always)]
pub(super) fn mix(mut x: u32) -> u32 {
    x = (x ^ (x >> 16)).wrapping_mul(0x7feb_352d);
    x = (x ^ (x >> 15)).wrapping_mul(0x846c_a68b);
    x ^ (x >> 16)
}

/// The finaliser of splitmix64.
pub(super) fn finalise(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    const COUNT: usize = 1 << 16;

    /// The mean of `COUNT` roundings of `value` less `value`, in units of the distance between its neighbours.
    fn bias(value: f32, mut round: impl FnMut(usize) -> u16) -> f64 {
        let low = f32::from_bits(value.to_bits() & 0xffff_0000);
        let high = f32::from_bits((value.to_bits() & 0xffff_0000) + 0x1_0000);
        let mut sum = 0.0;
        for i in 0..COUNT {
            let rounded = bf16::from_bits(round(i)).to_f32();
            assert!(rounded == low || rounded == high, "{value} became {rounded}");
            sum += f64::from(rounded) - f64::from(value);
        }
        sum / COUNT as f64 / (f64::from(high) - f64::from(low))
    }

    /// Of a number `p` of the way up, each rounding has the variance `p (1 - p)`, at most 1/4: the mean of 2^16 of them
    /// has a deviation of 2^-9 at most. Five of them are exceeded by chance once in two million times.
    #[test]
    fn roundings_are_unbiased_over_parameters_and_over_steps() {
        let bound = 5.0 * 2f64.powi(-9);
        for value in [1.0, -1.003, 0.3, 1.0078, 3.1e-20, -7.77e7, 2f32.powi(-126) * 1.7] {
            for seed in [0, 42] {
                let over_parameters = bias(value, |i| StochasticRounding::new(seed, 7).from(123_456).round(value, i));
                let over_steps = bias(value, |i| StochasticRounding::new(seed, i as u64).round(value, 5));
                assert!(over_parameters.abs() <= bound && over_steps.abs() <= bound, "{value} {seed}: {over_steps}");
                for moment in [0, 1] {
                    let rounding = StochasticRounding::new(seed, 7);
                    let over_parameters = bias(value, |i| super::round(value, rounding.of_moments(i)[moment]));
                    let of_step = |i| StochasticRounding::new(seed, i as u64).of_moments(5);
                    let over_steps = bias(value, |i| super::round(value, of_step(i)[moment]));
                    assert!(over_parameters.abs() <= bound && over_steps.abs() <= bound, "{value} {seed} {moment}");
                }
            }
        }
    }

    /// Of independent bits, 2^16 products of deviations with the variance 1/12 each have a mean with a deviation of
    /// 2^-8 / 12.
    #[test]
    fn the_bits_of_a_weight_and_of_its_moments_are_independent() {
        let rounding = StochasticRounding::new(5, 11);
        let mut sums = [0.0; 3];
        for i in 0..COUNT {
            let [first, second] = rounding.of_moments(i);
            let parts = [rounding.hash(i) >> 16, first, second].map(|bits| f64::from(bits) / 65536.0 - 0.5);
            for (sum, (a, b)) in sums.iter_mut().zip([(0, 1), (0, 2), (1, 2)]) {
                *sum += parts[a] * parts[b] / COUNT as f64;
            }
        }
        assert!(sums.iter().all(|sum| sum.abs() < 5.0 / 256.0 / 12.0), "{sums:?}");
    }

    #[test]
    fn a_bf16_stays_what_it_is_and_what_is_no_number_stays_none() {
        let rounding = StochasticRounding::new(1, 1);
        for bits in (0..=u16::MAX).step_by(7) {
            let value = bf16::from_bits(bits);
            for offset in 0..20 {
                let rounded = bf16::from_bits(rounding.round(value.to_f32(), offset));
                assert!(rounded == value || (rounded.is_nan() && value.is_nan()), "{value:?} became {rounded:?}");
            }
        }
        assert!((0..1000).all(|i| bf16::from_bits(rounding.round(f32::from_bits(0x7fff_ffff), i)).is_nan()));
    }

    #[test]
    fn bits_differ_between_seeds_steps_and_parameters_beyond_32_bits() {
        let bits = |seed, step, first: usize| {
            let rounding = StochasticRounding::new(seed, step).from(first);
            (0..64).map(|i| rounding.round(1.003_906_3, i)).collect::<Vec<u16>>()
        };
        let one = bits(1, 1, 0);
        assert_eq!(bits(1, 1, 0), one);
        assert_eq!(bits(1, 1, 10)[..54], one[10..]);
        for other in [bits(2, 1, 0), bits(1, 2, 0), bits(1, 1, 1 << 32)] {
            assert_ne!(other, one);
        }
    }
}
