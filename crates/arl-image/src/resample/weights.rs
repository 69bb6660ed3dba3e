//! Which pixels of a row or column make a pixel of the resized one, and with what weights.

use std::ops::Range;

/// Half the width of the cubic filter, in pixels of the smaller of both images.
const SUPPORT: f64 = 2.0;
/// Most bits after the point that weights may have, whatever their size.
const MOST_BITS: u32 = 22;

/// The weights of one axis.
#[derive(Debug)]
pub(super) struct Weights {
    /// The first input pixel of each output pixel.
    first: Vec<u32>,
    /// How many input pixels it has.
    count: Vec<u32>,
    /// `[output, taps]`, multiplied by `2^bits` and rounded; zero beyond an output pixel's count.
    values: Vec<i16>,
    /// Weights that each output pixel has, with the zeros: a multiple of 4.
    taps: usize,
    bits: u32,
}

impl Weights {
    /// The weights that make `output` pixels of `input`. Where both are equal, a pixel is itself.
    pub(super) fn new(input: u32, output: u32) -> Self {
        assert!(input > 0 && output > 0, "{input} pixels to {output}");
        let scale = f64::from(input) / f64::from(output);
        let (support, inverse) = if scale >= 1.0 { (SUPPORT * scale, 1.0 / scale) } else { (SUPPORT, 1.0) };
        let most = Self::most_taps(input, output);
        let (mut first, mut count) = (Vec::with_capacity(output as usize), Vec::with_capacity(output as usize));
        let mut window = Vec::with_capacity(most);
        let mut taps = 0;
        let mut greatest: f64 = 0.0;
        // Once for the greatest weight, which decides on the bits, and again to round: f64 for all would be four times as much.
        let each = |i: u32, window: &mut Vec<f64>| {
            let center = scale * (f64::from(i) + 0.5);
            // A conversion to an integer cuts the fraction off; what is negative becomes 0 next.
            let start = ((center - support + 0.5) as i64).max(0);
            let end = ((center + support + 0.5) as i64).min(i64::from(input));
            window.clear();
            let len = (end - start).clamp(0, most as i64);
            window.extend((0..len).map(|j| cubic(((j + start) as f64 - center + 0.5) * inverse)));
            let total: f64 = window.iter().fold(0.0, |sum, weight| sum + weight);
            if total != 0.0 {
                window.iter_mut().for_each(|weight| *weight /= total);
            }
            start as u32
        };
        for i in 0..output {
            first.push(each(i, &mut window));
            count.push(window.len() as u32);
            taps = taps.max(window.len());
            greatest = window.iter().fold(greatest, |greatest, weight| greatest.max(*weight));
        }
        let taps = taps.next_multiple_of(4);
        let bits = bits(greatest);
        let mut values = vec![0; taps * output as usize];
        for (i, values) in (0..output).zip(values.chunks_exact_mut(taps)) {
            each(i, &mut window);
            for (value, weight) in values.iter_mut().zip(&window) {
                let scaled = weight * f64::from(1u32 << bits);
                *value = (scaled + if scaled < 0.0 { -0.5 } else { 0.5 }) as i16;
            }
        }
        Self { first, count, values, taps, bits }
    }

    /// Input pixels that an output pixel has at most.
    pub(super) fn most_taps(input: u32, output: u32) -> usize {
        let scale = (f64::from(input) / f64::from(output)).max(1.0);
        2 * (SUPPORT * scale).ceil() as usize + 1
    }

    /// Output pixels.
    pub(super) fn len(&self) -> usize {
        self.first.len()
    }

    /// Weights that each output pixel has, a multiple of 4.
    pub(super) fn taps(&self) -> usize {
        self.taps
    }

    /// Bits after the point.
    pub(super) fn bits(&self) -> u32 {
        self.bits
    }

    /// The input pixels of output pixel `i`.
    pub(super) fn range(&self, i: usize) -> Range<usize> {
        let first = self.first[i] as usize;
        first..first + self.count[i] as usize
    }

    /// How many output pixels, from the first on, have a first input pixel of at most `last`.
    pub(super) fn starting_by(&self, last: usize) -> usize {
        self.first.partition_point(|first| *first as usize <= last)
    }

    /// Its weights, with the zeros after those of its input pixels.
    pub(super) fn values(&self, i: usize) -> &[i16] {
        &self.values[i * self.taps..(i + 1) * self.taps]
    }
}

/// The cubic filter with a = -0.5 (Keys, 1981), as Pillow and PyTorch write it.
fn cubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A
    } else {
        0.0
    }
}

/// The most bits with which the greatest weight of an axis, rounded, is still an i16.
fn bits(greatest: f64) -> u32 {
    let fits = |bits: u32| (0.5 + greatest * f64::from(1u32 << bits)) as i32 <= i32::from(i16::MAX);
    (0..MOST_BITS).find(|bits| !fits(bits + 1)).unwrap_or(MOST_BITS)
}
