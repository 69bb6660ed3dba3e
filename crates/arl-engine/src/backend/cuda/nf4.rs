//! Weights in NF4, as elements that products take. Kernels: `cuda/nf4.cu`.

use arl_kernels::constants::nf4::{STEP, THREADS};

use super::device::{Arg, Device, Launch, kernel, long};
use crate::backend::{Buffer, Nf4Weights};

/// As [`crate::backend::Backend::dequantize`].
pub(super) fn dequantize<D: Device>(device: &mut D, weights: &Nf4Weights, out: Buffer) {
    assert_eq!(weights.len, out.len, "weights in NF4");
    let grid = [out.len.div_ceil(THREADS * STEP), 1, 1];
    let (codes, scales, len) = (Arg::Read(weights.codes), Arg::Read(weights.scales), long(out.len));
    match weights.nested {
        None => device.launch(&Launch {
            kernel: kernel!(out.dtype, "nf4"),
            grid,
            threads: THREADS,
            shared_bytes: 0,
            args: &[codes, scales, Arg::Write(out), len],
        }),
        Some(nested) => device.launch(&Launch {
            kernel: kernel!(out.dtype, "nf4_nested"),
            grid,
            threads: THREADS,
            shared_bytes: 0,
            args: &[codes, scales, Arg::Read(nested.largest), Arg::Read(nested.values), Arg::Write(out), len],
        }),
    }
}
