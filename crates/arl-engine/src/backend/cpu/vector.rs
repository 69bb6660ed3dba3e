//! Loops that the compiler turns into vector code: they are compiled once for each instruction set and chosen at run
//! time. Sums run in a fixed number of lanes, so that they are the same on every width.

use super::element::Element;
#[cfg(target_arch = "x86_64")]
use super::simd::{self, Level};

/// Lanes of a sum: enough independent additions to hide their latency in 256-bit registers.
pub(super) const LANES: usize = 32;

/// Evaluates a block compiled for the widest instruction set that the processor has. What it calls must be inlined
/// (`#[inline(always)]`) to profit; the block itself is, into one function for each set.
macro_rules! vectorise {
    ($body:expr) => {
        $crate::backend::cpu::vector::dispatch(
            #[inline(always)]
            || $body,
        )
    };
}
pub(super) use vectorise;

/// Calls `f` with the widest instruction set; see [`vectorise`].
#[inline(always)]
pub(super) fn dispatch<R>(f: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    match simd::level() {
        // SAFETY: the level says that the processor has these features.
        Level::Avx512 | Level::Avx512Bf16 => return unsafe { with_avx512(f) },
        // SAFETY: as above.
        Level::Avx2 => return unsafe { with_avx2(f) },
        Level::Portable => {}
    }
    f()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
fn with_avx512<R>(f: impl FnOnce() -> R) -> R {
    f()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn with_avx2<R>(f: impl FnOnce() -> R) -> R {
    f()
}

/// `e^x` to 2 units in the last place for `-87 <= x <= 88`; 0 below, `e^88` above; NaN for NaN.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // Comparisons are so chosen that NaN passes through.
    let clamped = if x > 88.0 { 88.0 } else { x };
    let clamped = if clamped < -87.0 { -87.0 } else { clamped };
    let value = exp_within(clamped);
    if x < -87.0 { 0.0 } else { value }
}

/// [`exp`] for `x <= 88`, but `e^-87` below -87, which no sum of probabilities feels.
#[inline(always)]
pub(super) fn exp_below(x: f32) -> f32 {
    exp_within(if x < -87.0 { -87.0 } else { x })
}

/// [`exp`] for `-87 <= x <= 88`.
///
/// `e^x = 2^n e^r` with `n` the nearest integer to `x / ln 2`, and a polynomial in `|r| <= ln(2) / 2`.
#[inline(always)]
fn exp_within(x: f32) -> f32 {
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
    const SHIFT: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let shifted = x.mul_add(std::f32::consts::LOG2_E, SHIFT);
    let n = shifted - SHIFT;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, x));
    // Taylor's coefficients but for the last ones, which spread the error of the truncation over the interval.
    let mut p = 1.987_569_2e-4_f32;
    p = p.mul_add(r, 1.398_2e-3);
    p = p.mul_add(r, 8.333_452e-3);
    p = p.mul_add(r, 4.166_579_6e-2);
    p = p.mul_add(r, 1.666_666_5e-1);
    p = p.mul_add(r, 0.5);
    let p = (r * r).mul_add(p, r) + 1.0;
    p * f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23))
}

/// `1 / (1 + e^-x)`; 0 or 1 to rounding where `|x| > 87`. NaN is taken for a number: a caller that multiplies by `x` as well
/// gets it back. Minimum and maximum instead of comparisons, because a compiler may make branches of those, and then
/// the loop around is not vectorised.
#[inline(always)]
#[allow(clippy::manual_clamp, reason = "clamp compares")]
pub(super) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp_within((-x).max(-87.0).min(87.0)))
}

/// [`sigmoid`] and its derivative `s (1 - s)`, which loses no places where `s` is near 1.
#[inline(always)]
pub(super) fn sigmoid_and_slope(x: f32) -> (f32, f32) {
    let e = exp_within((-x.abs()).max(-87.0));
    let s = 1.0 / (1.0 + e);
    (if x >= 0.0 { s } else { e * s }, e * s * s)
}

/// For `a >= 0`: the integral of the normal distribution's density from `a` to infinity, `erfc(a / sqrt(2)) / 2`, to 6 units in the
/// last place for `a <= 13`, beyond which it is smaller than any normal f32; and the density, `e^(-a^2 / 2) / sqrt(2 pi)`.
///
/// The integral is `e^(-a^2 / 2) R(a)`, where `R / t` is smooth in `t = 1 / (1 + 0.4 a)`: a polynomial through Chebyshev's nodes
/// for `0 <= a <= 13.2`.
#[inline(always)]
pub(super) fn normal_tail(a: f32) -> (f32, f32) {
    const INVERSE_ROOT: f32 = 0.398_942_3;
    let square = a * a;
    // What rounding took from the square: half of it is missing in the exponent.
    let rest = a.mul_add(a, -square);
    let e = exp_within((-0.5 * square).max(-87.0));
    let e = if square < 170.0 { e - 0.5 * rest * e } else { e };
    let t = 1.0 / a.mul_add(0.4, 1.0);
    let mut p = 3.177_977_4e-2_f32;
    p = p.mul_add(t, -1.746_030_3e-1);
    p = p.mul_add(t, 3.774_598_2e-1);
    p = p.mul_add(t, -3.680_347_5e-1);
    p = p.mul_add(t, 1.148_766_2e-1);
    p = p.mul_add(t, -2.455_887_6e-2);
    p = p.mul_add(t, 9.060_980_4e-2);
    p = p.mul_add(t, 1.332_822_1e-1);
    p = p.mul_add(t, 1.596_118e-1);
    p = p.mul_add(t, 1.595_766_2e-1);
    (e * (p * t), e * INVERSE_ROOT)
}

/// The sum of the lanes, pairwise.
#[inline(always)]
pub(super) fn sum_lanes(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// The sum of `f(i)` for `i < len`.
#[inline(always)]
pub(super) fn sum(len: usize, f: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let whole = len / LANES * LANES;
    for start in (0..whole).step_by(LANES) {
        for (lane, total) in lanes.iter_mut().enumerate() {
            *total += f(start + lane);
        }
    }
    for i in whole..len {
        lanes[i - whole] += f(i);
    }
    sum_lanes(lanes)
}

/// The greatest element, -inf if there is none; NaN is passed over.
#[inline(always)]
pub(super) fn max<T: Element>(values: &[T]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = values.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for lane in 0..LANES {
            let x = chunk[lane].load();
            lanes[lane] = if x > lanes[lane] { x } else { lanes[lane] };
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane = if x.load() > *lane { x.load() } else { *lane };
    }
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] = if lanes[i + half] > lanes[i] { lanes[i + half] } else { lanes[i] };
        }
        half /= 2;
    }
    lanes[0]
}

/// The scalar product of two rows.
#[inline(always)]
pub(super) fn dot<A: Element, B: Element>(a: &[A], b: &[B]) -> f32 {
    let mut lanes = [0.0; LANES];
    let b = &b[..a.len()];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let (a_rest, b_rest) = (a_chunks.remainder(), b_chunks.remainder());
    for (a, b) in a_chunks.zip(b_chunks) {
        for lane in 0..LANES {
            lanes[lane] = a[lane].load().mul_add(b[lane].load(), lanes[lane]);
        }
    }
    for (lane, (a, b)) in lanes.iter_mut().zip(a_rest.iter().zip(b_rest)) {
        *lane = a.load().mul_add(b.load(), *lane);
    }
    sum_lanes(lanes)
}

/// Rows of `width` elements that one task takes: some 64 KiB of f32, by the shape alone.
pub(super) fn rows_a_task(width: usize) -> usize {
    (16_384 / width.max(1)).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::tests::vision::normal_tail as exact_tail;

    #[test]
    fn exp_is_exact_to_two_units_in_the_last_place() {
        let mut worst = 0.0_f64;
        let (low, high) = ((-87.0_f32).to_bits(), 88.0_f32.to_bits());
        let negative = ((-0.0_f32).to_bits()..=low).step_by(97);
        let positive = (0..=high).step_by(97);
        for x in negative.chain(positive).map(f32::from_bits) {
            let exact = f64::from(x).exp();
            let unit = f64::from(f32::from_bits((exact as f32).to_bits() + 1)) - f64::from(exact as f32);
            worst = worst.max((f64::from(exp(x)) - exact).abs() / unit);
        }
        assert!(worst <= 2.0, "{worst} units");
    }

    #[test]
    fn exp_at_the_ends() {
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1000.0), 0.0);
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::INFINITY) > 1.6e38);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn the_normal_tail_is_exact_to_six_units_in_the_last_place() {
        let (mut worst, mut worst_density) = (0.0_f64, 0.0_f64);
        for x in (0..13.0_f32.to_bits()).step_by(397).map(f32::from_bits) {
            let unit = |exact: f64| f64::from(f32::from_bits((exact as f32).to_bits() + 1)) - f64::from(exact as f32);
            let (tail, density) = normal_tail(x);
            let a = f64::from(x);
            let exact = exact_tail(a);
            worst = worst.max((f64::from(tail) - exact).abs() / unit(exact));
            let exact = (-0.5 * a * a).exp() / (2.0 * std::f64::consts::PI).sqrt();
            worst_density = worst_density.max((f64::from(density) - exact).abs() / unit(exact));
        }
        assert!(worst <= 6.0, "{worst} units");
        assert!(worst_density <= 6.0, "{worst_density} units of the density");
        assert_eq!(normal_tail(0.0).0, 0.5);
        for beyond in [14.0, 100.0, 1e10, 1e20] {
            let (tail, density) = normal_tail(beyond);
            assert!((0.0..1e-37).contains(&tail) && (0.0..1e-37).contains(&density), "{beyond}: {tail}, {density}");
        }
    }

    #[test]
    fn a_sigmoids_slope_loses_no_places() {
        let mut worst = 0.0_f64;
        for x in (-800..=800).map(|x| x as f32 / 10.0) {
            let (s, slope) = sigmoid_and_slope(x);
            let exact = 1.0 / (1.0 + (-f64::from(x)).exp());
            let exact_slope = exact * (1.0 / (1.0 + f64::from(x).exp()));
            worst = worst.max((f64::from(s) - exact).abs() / exact);
            worst = worst.max((f64::from(slope) - exact_slope).abs() / exact_slope);
        }
        assert!(worst < 6e-7, "{worst}");
    }

    #[test]
    fn sums_take_every_element_once() {
        for len in [0, 1, 31, 32, 33, 100] {
            assert_eq!(sum(len, |i| i as f32), (0..len).sum::<usize>() as f32);
            let ones = vec![1.0_f32; len];
            assert_eq!(dot(&ones, &ones), len as f32);
        }
    }
}
