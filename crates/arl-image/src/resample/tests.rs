//! Against a reference that is written in another way: every input pixel has a weight, most of them 0, and sums are i64.

use proptest::prelude::*;

use super::*;
use property::holds;

#[path = "../../tests/common/property.rs"]
mod property;

/// Weights of all input pixels for each output pixel, and their bits.
fn reference_weights(input: usize, output: usize) -> (Vec<Vec<i64>>, u32) {
    let scale = input as f64 / output as f64;
    let inverse = if scale < 1.0 { 1.0 } else { 1.0 / scale };
    let filter = |x: f64| match x.abs() {
        x if x < 1.0 => 1.5 * x.powi(3) - 2.5 * x.powi(2) + 1.0,
        x if x < 2.0 => -0.5 * x.powi(3) + 2.5 * x.powi(2) - 4.0 * x + 2.0,
        _ => 0.0,
    };
    let mut all = Vec::new();
    for i in 0..output {
        let center = scale * (i as f64 + 0.5);
        let line: Vec<f64> = (0..input).map(|j| filter((j as f64 - center + 0.5) * inverse)).collect();
        let sum: f64 = line.iter().sum();
        all.push(line.into_iter().map(|weight| weight / sum).collect::<Vec<f64>>());
    }
    let greatest = all.iter().flatten().copied().fold(0.0, f64::max);
    let mut bits = 22;
    while (greatest * 2f64.powi(bits) + 0.5).floor() > 32767.0 {
        bits -= 1;
    }
    // f64::round takes halves away from zero.
    let rounded = |line: &Vec<f64>| line.iter().map(|weight| (weight * 2f64.powi(bits)).round() as i64).collect();
    (all.iter().map(rounded).collect(), bits as u32)
}

/// One channel, `[height][width]`, along its last axis.
fn reference_across(plane: &[Vec<u8>], output: usize) -> Vec<Vec<u8>> {
    let (weights, bits) = reference_weights(plane[0].len(), output);
    let sum =
        |row: &Vec<u8>, weights: &Vec<i64>| -> i64 { row.iter().zip(weights).map(|(v, w)| i64::from(*v) * w).sum() };
    let pixel = |row, weights| ((sum(row, weights) + (1 << (bits - 1))) >> bits).clamp(0, 255) as u8;
    plane.iter().map(|row| weights.iter().map(|weights| pixel(row, weights)).collect()).collect()
}

fn transposed(plane: &[Vec<u8>]) -> Vec<Vec<u8>> {
    (0..plane[0].len()).map(|x| plane.iter().map(|row| row[x]).collect()).collect()
}

fn reference(pixels: &[u8], from: (u32, u32), to: (u32, u32)) -> Vec<u8> {
    let mut resized = vec![0; 3 * to.0 as usize * to.1 as usize];
    for channel in 0..3 {
        let row = |row: &[u8]| row.iter().skip(channel).step_by(3).copied().collect::<Vec<u8>>();
        let plane: Vec<Vec<u8>> = pixels.chunks_exact(3 * from.1 as usize).map(row).collect();
        let plane = reference_across(&plane, to.1 as usize);
        let plane = transposed(&reference_across(&transposed(&plane), to.0 as usize));
        for (at, value) in plane.iter().flatten().enumerate() {
            resized[3 * at + channel] = *value;
        }
    }
    resized
}

fn kernels() -> Vec<Kernel> {
    let best = Kernel::best();
    if best == Kernel::Scalar {
        println!("SKIPPED: resizing with vectors, which this processor lacks");
        return vec![best];
    }
    vec![Kernel::Scalar, best]
}

/// Noise, which uses every weight, and with extremes, so that sums leave 0..=255 and are clamped.
fn noise(len: usize, seed: u32) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state
    };
    (0..len).map(|_| if next() % 3 == 0 { (next() % 2 * 255) as u8 } else { next() as u8 }).collect()
}

fn agrees(from: (u32, u32), to: (u32, u32), seed: u32) -> Result<(), TestCaseError> {
    let pixels = noise(3 * from.0 as usize * from.1 as usize, seed);
    let expected = reference(&pixels, from, to);
    for kernel in kernels() {
        let resized = resize_with(kernel, &pixels, from, to);
        prop_assert!(resized == expected, "{:?} from {:?} to {:?}", kernel, from, to);
    }
    prop_assert_eq!(resize(pixels, from, to), expected);
    Ok(())
}

#[test]
fn pictures_of_any_size_are_resized_as_the_reference_does() {
    holds(200, ((1..40u32, 1..40u32), (1..40u32, 1..40u32), any::<u32>()), |(from, to, seed)| agrees(from, to, seed));
}

#[test]
fn long_sides_are_resized_as_the_reference_does() {
    // Wide windows down, narrow ones up, and scales near 1, at which a window has four pixels or five.
    let side = prop_oneof![1..8u32, 90..110u32, 250..400u32];
    holds(40, (side.clone(), side, 1..4u32, any::<u32>()), |(from, to, other, seed)| {
        agrees((other, from), (other, to), seed)?;
        agrees((from, other), (to, other), seed)
    });
}

#[test]
fn multiples_and_divisors_whose_weights_lie_between_two_integers_are_rounded_alike() {
    for (from, to) in [(64, 32), (96, 32), (32, 64), (28, 56), (128, 16), (7, 7), (56, 28), (1, 256), (256, 1)] {
        agrees((from, 8), (to, 8), from).unwrap();
        agrees((8, from), (8, to), to).unwrap();
    }
}

#[test]
fn a_picture_of_one_colour_keeps_it() {
    for value in [0, 1, 127, 254, 255] {
        for (from, to) in [((30, 50), (28, 56)), ((5, 7), (60, 44)), ((100, 90), (8, 4))] {
            let pixels = vec![value; 3 * from.0 as usize * from.1 as usize];
            let resized = resize(pixels, from, to);
            assert!(resized.iter().all(|got| *got == value), "{value} from {from:?} to {to:?}");
        }
    }
}

#[test]
fn the_same_size_changes_nothing_even_where_it_is_computed() {
    let pixels = noise(3 * 31 * 45, 5);
    for kernel in kernels() {
        assert_eq!(resize_with(kernel, &pixels, (31, 45), (31, 45)), pixels);
    }
    assert_eq!(resize(pixels.clone(), (31, 45), (31, 45)), pixels);
}

#[test]
fn weights_use_all_of_their_16_bits() {
    for (from, to) in [(1000, 999), (999, 1000), (4000, 3000), (5000, 28), (28, 5000), (3, 3)] {
        let weights = Weights::new(from, to);
        let greatest = (0..weights.len()).flat_map(|i| weights.values(i)).max().unwrap();
        assert!(*greatest >= 1 << 14 || weights.bits() == 22, "{from} to {to}: {greatest}");
        for i in 0..weights.len() {
            let range = weights.range(i);
            assert!(range.end <= from as usize && range.len() <= Weights::most_taps(from, to));
            assert!(weights.values(i)[range.len()..].iter().all(|weight| *weight == 0));
            // They sum to 1, but for the rounding of each.
            let sum: i32 = weights.values(i).iter().map(|weight| i32::from(*weight)).sum();
            assert!((sum - (1 << weights.bits())).unsigned_abs() as usize <= range.len(), "{from} to {to}: {sum}");
        }
    }
}
