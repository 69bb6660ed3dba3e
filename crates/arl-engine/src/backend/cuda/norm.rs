//! RMSNorm. Kernels: `cuda/norm.cu`.

use super::device::{Arg, Device, Launch, int, kernel};
use crate::backend::Buffer;

const THREADS: usize = 256;

/// As [`crate::backend::Backend::rms_norm`].
pub(super) fn rms_norm<D: Device>(
    device: &mut D,
    x: Buffer,
    weight: Buffer,
    epsilon: f32,
    out: Buffer,
    inverse_rms: Buffer,
) {
    device.launch(&Launch {
        kernel: kernel!(x.dtype, "rms_norm"),
        grid: [inverse_rms.len, 1, 1],
        threads: THREADS,
        shared_bytes: 0,
        args: &[
            Arg::Read(x),
            Arg::Read(weight),
            Arg::Float(epsilon),
            Arg::Write(out),
            Arg::Write(inverse_rms),
            int(weight.len),
        ],
    });
}

/// As the leaf of [`crate::backend::Backend`].
#[allow(clippy::too_many_arguments, reason = "the leaf's signature")]
pub(super) fn add_rms_norm<D: Device>(
    device: &mut D,
    x: Buffer,
    delta: Buffer,
    sum: Buffer,
    weight: Buffer,
    epsilon: f32,
    out: Buffer,
    inverse_rms: Buffer,
) {
    let _ = (device, x, delta, sum, weight, epsilon, out, inverse_rms);
    unimplemented!("add_rms_norm")
}

/// As the leaf of [`crate::backend::Backend`].
#[allow(clippy::too_many_arguments, reason = "the leaf's signature")]
pub(super) fn rms_norm_again<D: Device>(device: &mut D, x: Buffer, weight: Buffer, inverse_rms: Buffer, out: Buffer) {
    let _ = (device, x, weight, inverse_rms, out);
    unimplemented!("rms_norm_again")
}

/// As the leaf of [`crate::backend::Backend`].
#[allow(clippy::too_many_arguments, reason = "the leaf's signature")]
pub(super) fn rms_norm_backward<D: Device>(
    device: &mut D,
    scratch: Buffer,
    d_out: Buffer,
    x: Buffer,
    weight: Buffer,
    inverse_rms: Buffer,
    d_x: Buffer,
    d_weight: Buffer,
) {
    let _ = (device, scratch, d_out, x, weight, inverse_rms, d_x, d_weight);
    unimplemented!("rms_norm_backward")
}
