//! The two passes in plain Rust: for processors without a faster way, and for the ends of rows.

use super::weights::Weights;

/// One row along the width, from output pixel `start` on.
pub(super) fn across(weights: &Weights, start: usize, from: &[u8], to: &mut [u8]) {
    let half = 1 << weights.bits() >> 1;
    for (x, to) in to.chunks_exact_mut(3).enumerate().skip(start) {
        let range = weights.range(x);
        let mut sums = [half; 3];
        for (pixel, weight) in from[3 * range.start..3 * range.end].chunks_exact(3).zip(weights.values(x)) {
            for (sum, value) in sums.iter_mut().zip(pixel) {
                *sum += i32::from(*value) * i32::from(*weight);
            }
        }
        for (to, sum) in to.iter_mut().zip(sums) {
            *to = clamp(sum >> weights.bits());
        }
    }
}

/// Output row `y` of its input rows, from byte `start` on.
pub(super) fn down(weights: &Weights, y: usize, start: usize, rows: &[&[u8]], to: &mut [u8]) {
    let half = 1 << weights.bits() >> 1;
    for (x, to) in to.iter_mut().enumerate().skip(start) {
        let sum: i32 =
            rows.iter().zip(weights.values(y)).map(|(row, weight)| i32::from(row[x]) * i32::from(*weight)).sum();
        *to = clamp((half + sum) >> weights.bits());
    }
}

fn clamp(value: i32) -> u8 {
    value.clamp(0, 255) as u8
}
