//! Weights in NF4 (Dettmers et al., 2023, "QLoRA"), with the numbers of bitsandbytes: blocks of 64 along the flattened tensor, each
//! divided by its largest magnitude and rounded to the nearest of 16 values; and, with double quantization, these magnitudes in 8
//! bits. Knows values and bytes, nothing of models or devices.

mod stored;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::sync::LazyLock;

use rayon::prelude::*;

pub(crate) use stored::{StoredNf4, is_companion};

/// Elements that share a scale.
pub const NF4_BLOCK: usize = 64;
/// Scales that share one in turn.
pub const NF4_NESTED_BLOCK: usize = 256;

/// The values of the 16 codes, ascending: quantiles of a normal distribution, with 0 and both ends exact (QLoRA, appendix E).
#[allow(clippy::excessive_precision, reason = "as published")]
pub static NF4_VALUES: [f32; 16] = [
    -1.0,
    -0.696_192_800_998_687_7,
    -0.525_073_051_452_636_7,
    -0.394_917_488_098_144_5,
    -0.284_441_381_692_886_35,
    -0.184_773_430_228_233_34,
    -0.091_050_036_251_544_95,
    0.0,
    0.079_580_299_556_255_34,
    0.160_930_201_411_247_25,
    0.246_112_301_945_686_34,
    0.337_915_241_718_292_24,
    0.440_709_829_330_444_34,
    0.562_617_003_917_694_1,
    0.722_956_836_223_602_3,
    1.0,
];

/// The values of the 256 codes of a scale, ascending: bitsandbytes' signed dynamic map, in which the magnitudes between two powers
/// of ten are the middles of twice as many equal steps as one power below.
static DYNAMIC: LazyLock<[f32; 256]> = LazyLock::new(|| {
    let mut values = vec![0.0, 1.0];
    for exponent in 0..7 {
        let (steps, power) = (1usize << exponent, 10f64.powi(exponent - 6) as f32);
        let step = (1.0 - 0.1f32) / steps as f32;
        // Points of a line as torch.linspace rounds them: from the nearer end.
        let point = |k: usize| {
            let from_end = (steps - k.min(steps)) as f32;
            if 2 * k <= steps { step.mul_add(k as f32, 0.1) } else { (-step).mul_add(from_end, 1.0) }
        };
        for k in 0..steps {
            let middle = (point(k) + point(k + 1)) / 2.0;
            values.extend([power * middle, -(power * middle)]);
        }
    }
    values.sort_by(f32::total_cmp);
    std::array::from_fn(|code| values[code])
});

/// The values of the 256 codes of a scale in 8 bits, ascending.
pub fn nf4_scale_values() -> &'static [f32; 256] {
    &DYNAMIC
}

/// A tensor in NF4.
#[derive(Clone, Debug, PartialEq)]
pub struct Nf4 {
    /// Two codes a byte, the first in the high half.
    pub codes: Vec<u8>,
    /// Of each block.
    pub scales: Nf4Scales,
}

/// The scales of a tensor's blocks.
#[derive(Clone, Debug, PartialEq)]
pub enum Nf4Scales {
    /// As they are.
    Plain(Vec<f32>),
    /// In 8 bits: `values[code] * largest + offset`.
    Nested {
        /// A byte each.
        codes: Vec<u8>,
        /// Of each 256 of them.
        largest: Vec<f32>,
        /// Their mean.
        offset: f32,
    },
}

/// Quantizes a tensor whose elements come in pieces.
#[derive(Debug, Default)]
pub struct Nf4Builder {
    codes: Vec<u8>,
    scales: Vec<f32>,
}

impl Nf4Builder {
    /// Adds the elements that come next. All pieces but the last have whole blocks.
    pub fn push(&mut self, values: &[f32]) {
        let first = self.codes.len();
        self.codes.resize(first + values.len().div_ceil(2), 0);
        let blocks = values.par_chunks(NF4_BLOCK).zip(self.codes[first..].par_chunks_mut(NF4_BLOCK / 2));
        self.scales.par_extend(blocks.map(|(values, codes)| quantize_block(values, codes)));
    }

    /// The tensor; `nested`: with scales in 8 bits.
    pub fn finish(self, nested: bool) -> Nf4 {
        let scales = if nested { nest(&self.scales) } else { Nf4Scales::Plain(self.scales) };
        Nf4 { codes: self.codes, scales }
    }
}

/// Quantizes a block; gives its scale.
fn quantize_block(values: &[f32], codes: &mut [u8]) -> f32 {
    let scale = largest(values);
    let factor = 1.0 / scale;
    let code = |value: f32| {
        // Of a block of zeros nothing else would decode to zero: bitsandbytes' code for it stands for minus its scale.
        let value = if scale == 0.0 { 0.0 } else { (value * factor).clamp(-1.0, 1.0) };
        nearest(&NF4_VALUES, value)
    };
    for (pair, byte) in values.chunks(2).zip(codes) {
        *byte = (code(pair[0]) << 4) | pair.get(1).map_or(0, |&value| code(value));
    }
    scale
}

/// Scales in 8 bits. bitsandbytes sums their mean in f32, in an order of the device's; this one's is in f64, at most a few units of
/// the last place apart.
fn nest(scales: &[f32]) -> Nf4Scales {
    let sum: f64 = scales.iter().map(|&scale| f64::from(scale)).sum();
    let offset = (sum / scales.len().max(1) as f64) as f32;
    let centred: Vec<f32> = scales.iter().map(|scale| scale - offset).collect();
    let (mut codes, mut of_blocks) = (Vec::with_capacity(scales.len()), Vec::new());
    for block in centred.chunks(NF4_NESTED_BLOCK) {
        let scale = largest(block);
        let factor = 1.0 / scale;
        let value = |value: &f32| if scale == 0.0 { 0.0 } else { (value * factor).clamp(-1.0, 1.0) };
        codes.extend(block.iter().map(|centred| nearest(&*DYNAMIC, value(centred))));
        of_blocks.push(scale);
    }
    Nf4Scales::Nested { codes, largest: of_blocks, offset }
}

fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0f32, |most, value| most.max(value.abs()))
}

/// The code of the nearest value, the lower of two that are as near.
fn nearest(values: &[f32], value: f32) -> u8 {
    let above = values.partition_point(|&other| other < value).min(values.len() - 1);
    let below = above.saturating_sub(1);
    let code = if (value - values[below]).abs() <= (values[above] - value).abs() { below } else { above };
    code as u8
}

impl Nf4 {
    /// A tensor of so many elements, all zero.
    pub fn zeros(elements: usize, nested: bool) -> Self {
        let mut builder = Nf4Builder::default();
        builder.push(&vec![0.0; elements]);
        builder.finish(nested)
    }

    /// The scale of a block.
    fn scale(&self, block: usize) -> f32 {
        match &self.scales {
            Nf4Scales::Plain(scales) => scales[block],
            Nf4Scales::Nested { codes, largest, offset } => {
                DYNAMIC[usize::from(codes[block])] * largest[block / NF4_NESTED_BLOCK] + offset
            }
        }
    }

    /// The same with its blocks' scales as they are.
    #[must_use]
    pub fn plain(self) -> Self {
        let scales = match self.scales {
            Nf4Scales::Plain(scales) => scales,
            Nf4Scales::Nested { ref codes, .. } => (0..codes.len()).map(|block| self.scale(block)).collect(),
        };
        Nf4 { codes: self.codes, scales: Nf4Scales::Plain(scales) }
    }

    /// The elements of these ranges, one behind the other, with their blocks' scales as they are; `None` where a range does not
    /// consist of whole blocks.
    pub fn gathered(&self, ranges: impl IntoIterator<Item = Range<usize>>) -> Option<Self> {
        let (mut codes, mut scales) = (Vec::new(), Vec::new());
        for Range { start, end } in ranges {
            if start % NF4_BLOCK != 0 || end % NF4_BLOCK != 0 {
                return None;
            }
            codes.extend_from_slice(self.codes.get(start / 2..end / 2)?);
            scales.extend((start / NF4_BLOCK..end / NF4_BLOCK).map(|block| self.scale(block)));
        }
        Some(Nf4 { codes, scales: Nf4Scales::Plain(scales) })
    }

    /// The values from element `start` on.
    pub fn read(&self, start: usize, out: &mut [f32]) {
        for (element, out) in (start..).zip(out) {
            let byte = self.codes[element / 2];
            let code = if element % 2 == 0 { byte >> 4 } else { byte & 15 };
            *out = NF4_VALUES[usize::from(code)] * self.scale(element / NF4_BLOCK);
        }
    }
}
