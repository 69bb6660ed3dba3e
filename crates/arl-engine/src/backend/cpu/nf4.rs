//! Weights in NF4, as elements that products take.

use arl_model::{NF4_BLOCK, NF4_NESTED_BLOCK, NF4_VALUES};
use rayon::prelude::*;

use super::element::{Element, with_element};
use super::memory::Lease;
use crate::backend::{Buffer, Nf4Weights};

/// Blocks that one task takes.
const BLOCKS: usize = 256;

/// The scales of blocks.
#[derive(Clone, Copy)]
enum Scales<'a> {
    Plain(&'a [f32]),
    Nested {
        codes: &'a [u8],
        /// The offset, then the largest of each 256 scales.
        largest: &'a [f32],
        /// Of the 256 codes.
        values: &'a [f32],
    },
}

impl Scales<'_> {
    #[inline(always)]
    fn of(&self, block: usize) -> f32 {
        match *self {
            Scales::Plain(scales) => scales[block],
            Scales::Nested { codes, largest, values } => {
                values[usize::from(codes[block])] * largest[1 + block / NF4_NESTED_BLOCK] + largest[0]
            }
        }
    }
}

/// As [`crate::backend::Backend::dequantize`].
pub(super) fn dequantize(lease: &mut Lease<'_>, weights: &Nf4Weights, out: Buffer) {
    let codes = lease.read(weights.codes);
    let scales = match weights.nested {
        None => Scales::Plain(lease.read(weights.scales)),
        Some(nested) => Scales::Nested {
            codes: lease.read(weights.scales),
            largest: lease.read(nested.largest),
            values: lease.read(nested.values),
        },
    };
    with_element!(out.dtype, T => decode(codes, scales, lease.write::<T>(out)));
}

/// `out = values[code] * scale`, rounded once.
fn decode<T: Element>(codes: &[u8], scales: Scales<'_>, out: &mut [T]) {
    assert_eq!(codes.len(), out.len().div_ceil(2), "codes of {} weights", out.len());
    let tasks = out.par_chunks_mut(BLOCKS * NF4_BLOCK).zip(codes.par_chunks(BLOCKS * NF4_BLOCK / 2));
    tasks.enumerate().for_each(|(task, (out, codes))| {
        let blocks = out.chunks_mut(NF4_BLOCK).zip(codes.chunks(NF4_BLOCK / 2));
        for (block, (out, codes)) in blocks.enumerate() {
            let scale = scales.of(task * BLOCKS + block);
            // The block's sixteen values, each of which is then one reading.
            let table: [T; 16] = std::array::from_fn(|code| T::store(NF4_VALUES[code] * scale));
            for (out, byte) in out.chunks_mut(2).zip(codes) {
                out[0] = table[usize::from(byte >> 4)];
                if let Some(second) = out.get_mut(1) {
                    *second = table[usize::from(byte & 15)];
                }
            }
        }
    });
}
