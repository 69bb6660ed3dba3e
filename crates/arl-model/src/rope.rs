//! Rotary frequencies, cosines and sines as transformers computes them: in f32, step by step in the same order, for
//! every kind of scaling. The length of a sequence matters only for `dynamic` and `longrope`, and counts per sequence, as
//! in transformers for a batch of one (in a larger batch its longest row, and rows seen before, decide for all).

use std::f32::consts::TAU;

use crate::config::{ModelConfig, RopeAxes, RopeConfig, RopeScaling};

/// Half of the largest head that the configuration allows.
const MAX_HALF: usize = 512;

/// The rotary embedding of a model.
#[derive(Clone, Debug)]
pub struct RopeTable {
    half: usize,
    max_position_embeddings: usize,
    config: RopeConfig,
    /// `[half]` for sequences that are not long.
    short: Vec<f32>,
    /// `[half]` for long ones, where that is one set for all lengths.
    long: Vec<f32>,
    attention_scaling: f32,
}

impl RopeTable {
    /// Computes what does not depend on a sequence.
    pub fn new(config: &ModelConfig) -> Self {
        let half = config.rope.rotary_dim / 2;
        let rope = config.rope.clone();
        let length = config.max_position_embeddings;
        let plain = |base: f64| -> Vec<f32> { (0..half).map(|i| 1.0 / wavelength(base as f32, i, half)).collect() };
        let short = match &rope.scaling {
            RopeScaling::Default => plain(rope.theta),
            RopeScaling::Linear { factor } => plain(rope.theta).iter().map(|f| f / *factor as f32).collect(),
            RopeScaling::Dynamic { factor } => {
                let (length, dim) = (length as f64, 2.0 * half as f64);
                plain(rope.theta * (factor * length / length - (factor - 1.0)).powf(dim / (dim - 2.0)))
            }
            RopeScaling::Yarn { .. } => yarn(&rope, half),
            RopeScaling::Llama3 { .. } => llama3(&rope, &plain(rope.theta)),
            RopeScaling::LongRope { short_factor, .. } => longrope(rope.theta, short_factor, half),
        };
        let long = match &rope.scaling {
            RopeScaling::LongRope { long_factor, .. } => longrope(rope.theta, long_factor, half),
            _ => Vec::new(),
        };
        let attention_scaling = match rope.scaling {
            RopeScaling::Yarn { attention_factor, .. } | RopeScaling::LongRope { attention_factor, .. } => {
                attention_factor as f32
            }
            _ => 1.0,
        };
        Self { half, max_position_embeddings: length, config: rope, short, long, attention_scaling }
    }

    /// Half of the rotated part of a head: the number of frequencies.
    pub fn half(&self) -> usize {
        self.half
    }

    /// The factor on cosine and sine; [`RopeTable::fill`] has applied it.
    pub fn attention_scaling(&self) -> f32 {
        self.attention_scaling
    }

    /// How positions of three axes share the frequencies; `None`: positions have one axis.
    pub fn axes(&self) -> Option<RopeAxes> {
        self.config.axes
    }

    /// A length whose frequencies are those of `sequence_len`, the same for all such lengths; 0 for sequences that are not
    /// long.
    pub fn length_class(&self, sequence_len: usize) -> usize {
        match (self.longest_short(), &self.config.scaling) {
            (Some(longest), RopeScaling::LongRope { .. }) if sequence_len > longest => longest + 1,
            (Some(longest), _) if sequence_len > longest => sequence_len,
            _ => 0,
        }
    }

    /// Tokens of the longest sequence whose length does not matter; `None`: no length matters.
    pub fn longest_short(&self) -> Option<usize> {
        match self.config.scaling {
            RopeScaling::Dynamic { .. } => Some(self.max_position_embeddings),
            RopeScaling::LongRope { original_max_position_embeddings, .. } => Some(original_max_position_embeddings),
            _ => None,
        }
    }

    /// Writes the inverse frequencies for a sequence of that length to `out`, `[half]`.
    pub fn inv_freq(&self, sequence_len: usize, out: &mut [f32]) {
        match &self.config.scaling {
            RopeScaling::Dynamic { factor } if sequence_len > self.max_position_embeddings => {
                let factor = *factor;
                let base = self.config.theta as f32 * self.growth(factor, sequence_len);
                for (i, out) in out.iter_mut().enumerate().take(self.half) {
                    *out = 1.0 / wavelength(base, i, self.half);
                }
            }
            RopeScaling::LongRope { original_max_position_embeddings, .. }
                if sequence_len > *original_max_position_embeddings =>
            {
                out.copy_from_slice(&self.long);
            }
            _ => out.copy_from_slice(&self.short),
        }
    }

    /// Writes cosine and sine of the tokens of one sequence of `sequence_len` tokens, both `[positions, half]`.
    /// `positions` may be a part of the sequence. Allocates nothing.
    pub fn fill(&self, sequence_len: usize, positions: &[i32], cos: &mut [f32], sin: &mut [f32]) {
        self.fill_axes(sequence_len, [positions; 3], cos, sin);
    }

    /// [`RopeTable::fill`] with positions of three axes: time, height, width.
    pub fn fill_axes(&self, sequence_len: usize, positions: [&[i32]; 3], cos: &mut [f32], sin: &mut [f32]) {
        let mut frequencies = [0f32; MAX_HALF];
        let Some(frequencies) = frequencies.get_mut(..self.half) else { return };
        self.inv_freq(sequence_len, frequencies);
        let rows = cos.chunks_exact_mut(self.half).zip(sin.chunks_exact_mut(self.half));
        let positions = positions[0].iter().zip(positions[1]).zip(positions[2]);
        for (((&time, &height), &width), (cos, sin)) in positions.zip(rows) {
            let position = [time as f32, height as f32, width as f32];
            for (i, (frequency, (cos, sin))) in frequencies.iter().zip(cos.iter_mut().zip(sin.iter_mut())).enumerate() {
                let axis = self.config.axes.map_or(0, |axes| axes.axis(i));
                let (s, c) = (position[axis] * frequency).sin_cos();
                *cos = c * self.attention_scaling;
                *sin = s * self.attention_scaling;
            }
        }
    }

    /// The factor by which the base grows for a long sequence. transformers has the length in an f32 tensor here.
    fn growth(&self, factor: f64, sequence_len: usize) -> f32 {
        let dim = 2.0 * self.half as f64;
        let stretched = factor as f32 * sequence_len as f32 / self.max_position_embeddings as f32;
        power(stretched - (factor - 1.0) as f32, (dim / (dim - 2.0)) as f32)
    }
}

/// `base ^ (2 i / dim)` in f32.
fn wavelength(base: f32, i: usize, half: usize) -> f32 {
    power(base, (2 * i) as f32 / (2 * half) as f32)
}

/// A power, rounded once.
fn power(base: f32, exponent: f32) -> f32 {
    f64::from(base).powf(f64::from(exponent)) as f32
}

fn yarn(rope: &RopeConfig, half: usize) -> Vec<f32> {
    let RopeScaling::Yarn { factor, original_max_position_embeddings, beta_fast, beta_slow, truncate, .. } =
        rope.scaling
    else {
        return Vec::new();
    };
    let dim = 2.0 * half as f64;
    // The dimension whose frequency makes that many rotations over the original length.
    let dimension = |rotations: f64| {
        let length = original_max_position_embeddings as f64;
        dim * (length / (rotations * 2.0 * std::f64::consts::PI)).ln() / (2.0 * rope.theta.ln())
    };
    let (mut low, mut high) = (dimension(beta_fast), dimension(beta_slow));
    if truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    (low, high) = (low.max(0.0), high.min(dim - 1.0));
    if low == high {
        high += 0.001;
    }
    let frequency = |i: usize| {
        let wavelength = wavelength(rope.theta as f32, i, half);
        let kept = 1.0 / wavelength;
        let divided = 1.0 / (factor as f32 * wavelength);
        let ramp = ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
        let keep = 1.0 - ramp;
        divided * (1.0 - keep) + kept * keep
    };
    (0..half).map(frequency).collect()
}

fn llama3(rope: &RopeConfig, plain: &[f32]) -> Vec<f32> {
    let RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } =
        rope.scaling
    else {
        return Vec::new();
    };
    let length = original_max_position_embeddings as f64;
    let longest = (length / low_freq_factor) as f32;
    let shortest = (length / high_freq_factor) as f32;
    let scale = |&frequency: &f32| {
        // torch divides a number by a tensor as reciprocal times number.
        let wavelength = (1.0 / frequency) * TAU;
        if wavelength > longest {
            return frequency / factor as f32;
        }
        if wavelength < shortest {
            return frequency;
        }
        let turns = (1.0 / wavelength) * length as f32;
        let smooth = (turns - low_freq_factor as f32) / (high_freq_factor - low_freq_factor) as f32;
        (1.0 - smooth) * frequency / factor as f32 + smooth * frequency
    };
    plain.iter().map(scale).collect()
}

fn longrope(theta: f64, factors: &[f64], half: usize) -> Vec<f32> {
    let frequency = |(i, &factor): (usize, &f64)| 1.0 / (factor as f32 * wavelength(theta as f32, i, half));
    factors.iter().enumerate().map(frequency).collect()
}
