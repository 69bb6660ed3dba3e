//! Weights in NF4: their arrays, and what they stand for as elements.

use arl_model::NF4_BLOCK;
use rayon::prelude::*;

use super::element::with_element;
use super::gemm::{Nf4Scales, Nf4Tensor};
use super::memory::Lease;
use crate::backend::{Buffer, Nf4Weights};

/// Elements that one task takes.
const TASK: usize = 256 * NF4_BLOCK;

/// A tensor's codes and scales.
pub(super) fn tensor<'m>(lease: &mut Lease<'m>, weights: &Nf4Weights) -> Nf4Tensor<'m> {
    let codes = lease.read(weights.codes);
    assert_eq!(codes.len(), weights.len.div_ceil(2), "codes of {} weights", weights.len);
    let scales = match weights.nested {
        None => Nf4Scales::Plain(lease.read(weights.scales)),
        Some(nested) => Nf4Scales::Nested {
            codes: lease.read(weights.scales),
            largest: lease.read(nested.largest),
            values: lease.read(nested.values),
        },
    };
    Nf4Tensor { len: weights.len, codes, scales }
}

/// As [`crate::backend::Backend::dequantize`].
pub(super) fn dequantize(lease: &mut Lease<'_>, weights: &Nf4Weights, first: usize, out: Buffer) {
    let tensor = tensor(lease, weights);
    assert!(first + out.len <= tensor.len, "{} of {} weights from {first} on", out.len, tensor.len);
    with_element!(out.dtype, T => {
        let tasks = lease.write::<T>(out).par_chunks_mut(TASK).enumerate();
        tasks.for_each(|(task, out)| tensor.decode(first + task * TASK, out));
    });
}
