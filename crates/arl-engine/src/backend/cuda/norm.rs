//! RMSNorm. Kernels: `cuda/norm.cu`.

use arl_kernels::constants::rms_norm::{BACKWARD_ELEMENTS, MOST_BACKWARD_THREADS, MOST_THREADS, PACKS};

use super::PARTS;
use super::device::{Arg, Device, Launch, int, kernel, scratch_of};
use super::elementwise::add_parts;
use crate::backend::{Buffer, DType, NormWeight};

/// The widest rows that the kernels hold in registers: in f32 the forward pass's, in all types the backward pass's.
pub(super) const MOST_WIDTH: usize = 8192;
const _: () = assert!(4 * PACKS * MOST_THREADS == MOST_WIDTH, "packs of f32 of a block of the forward pass");
const _: () =
    assert!(BACKWARD_ELEMENTS * MOST_BACKWARD_THREADS == MOST_WIDTH, "elements of a block of the backward pass");

/// Threads that a block of the backward pass has for rows that need no more.
const BACKWARD_THREADS: usize = 512;
/// Rounds of rows that a block of the backward pass takes at least, before it sums what its threads have.
const ROUNDS: usize = 4;

/// Threads of a row of the forward pass: as few as hold it.
fn threads(width: usize, dtype: DType) -> usize {
    let packs = width.div_ceil(16 / dtype.bytes());
    packs.div_ceil(PACKS).next_multiple_of(32)
}

/// Whether rows of `width` elements of all these buffers are at multiples of the kernels' accesses, 16 bytes.
pub(super) fn aligned(width: usize, buffers: &[Buffer]) -> bool {
    buffers.iter().all(|buffer| (width * buffer.dtype.bytes()).is_multiple_of(16) && buffer.offset.is_multiple_of(16))
}

/// The kernel for rows that are aligned, or for others.
macro_rules! norm_kernel {
    ($dtype:expr, $aligned:literal, $unaligned:literal, $is_aligned:expr) => {
        if $is_aligned { kernel!($dtype, $aligned) } else { kernel!($dtype, $unaligned) }
    };
}

/// The weight, after a check of the sizes.
fn check(x: Buffer, NormWeight { weight, .. }: NormWeight, inverse_rms: Buffer) -> Buffer {
    assert_eq!((x.len, x.dtype), (inverse_rms.len * weight.len, weight.dtype), "RMSNorm of rows of {}", weight.len);
    assert!(weight.len <= MOST_WIDTH, "RMSNorm of rows of {}, at most {MOST_WIDTH}", weight.len);
    weight
}

/// As [`crate::backend::Backend::rms_norm`].
pub(super) fn rms_norm<D: Device>(
    device: &mut D,
    x: Buffer,
    weight: NormWeight,
    epsilon: f32,
    out: Buffer,
    inverse_rms: Buffer,
) {
    let offset = Arg::Float(weight.offset);
    let weight = check(x, weight, inverse_rms);
    device.launch(&Launch {
        kernel: norm_kernel!(x.dtype, "rms_norm", "rms_norm_unaligned", aligned(weight.len, &[x, weight, out])),
        grid: [inverse_rms.len, 1, 1],
        threads: threads(weight.len, x.dtype),
        shared_bytes: 0,
        args: &[
            Arg::Read(x),
            Arg::Read(weight),
            offset,
            Arg::Float(epsilon),
            Arg::Write(out),
            Arg::Write(inverse_rms),
            int(weight.len),
        ],
    });
}

/// As [`crate::backend::Backend::add_rms_norm`].
#[allow(clippy::too_many_arguments, reason = "the leaf's signature")]
pub(super) fn add_rms_norm<D: Device>(
    device: &mut D,
    x: Buffer,
    delta: Buffer,
    sum: Buffer,
    weight: NormWeight,
    epsilon: f32,
    out: Buffer,
    inverse_rms: Buffer,
) {
    let offset = Arg::Float(weight.offset);
    let weight = check(x, weight, inverse_rms);
    assert_eq!((x.len, x.len), (delta.len, sum.len), "the sum is as long as its terms");
    device.launch(&Launch {
        kernel: norm_kernel!(
            x.dtype,
            "add_rms_norm",
            "add_rms_norm_unaligned",
            aligned(weight.len, &[x, delta, sum, weight, out])
        ),
        grid: [inverse_rms.len, 1, 1],
        threads: threads(weight.len, x.dtype),
        shared_bytes: 0,
        args: &[
            Arg::Read(x),
            Arg::Read(delta),
            Arg::Write(sum),
            Arg::Read(weight),
            offset,
            Arg::Float(epsilon),
            Arg::Write(out),
            Arg::Write(inverse_rms),
            int(weight.len),
        ],
    });
}

/// As [`crate::backend::Backend::rms_norm_recompute`].
pub(super) fn rms_norm_recompute<D: Device>(
    device: &mut D,
    x: Buffer,
    weight: NormWeight,
    inverse_rms: Buffer,
    out: Buffer,
) {
    let offset = Arg::Float(weight.offset);
    let weight = check(x, weight, inverse_rms);
    device.launch(&Launch {
        kernel: norm_kernel!(
            x.dtype,
            "rms_norm_recompute",
            "rms_norm_recompute_unaligned",
            aligned(weight.len, &[x, weight, out])
        ),
        grid: [inverse_rms.len, 1, 1],
        threads: threads(weight.len, x.dtype),
        shared_bytes: 0,
        args: &[Arg::Read(x), Arg::Read(weight), offset, Arg::Read(inverse_rms), Arg::Write(out), int(weight.len)],
    });
}

/// As [`crate::backend::Backend::rms_norm_backward`].
#[allow(clippy::too_many_arguments, reason = "the leaf's signature")]
pub(super) fn rms_norm_backward<D: Device>(
    device: &mut D,
    scratch: Buffer,
    d_out: Buffer,
    x: Buffer,
    weight: NormWeight,
    inverse_rms: Buffer,
    d_x: Buffer,
    d_weight: Buffer,
) {
    let offset = Arg::Float(weight.offset);
    let weight = check(x, weight, inverse_rms);
    let (rows, width) = (inverse_rms.len, weight.len);
    assert_eq!((d_out.len, d_x.len, d_weight.len), (x.len, x.len, width), "gradients of rows of {width}");
    let warps = width.div_ceil(32 * BACKWARD_ELEMENTS);
    let rows_at_once = (BACKWARD_THREADS / 32 / warps).max(1);
    // The scratch has room for so many rows: about two blocks a multiprocessor of a large device.
    let parts = rows.div_ceil(rows_at_once * ROUNDS).min(2 * PARTS);
    let partial = scratch_of(scratch, DType::F32, parts * width);
    device.launch(&Launch {
        kernel: norm_kernel!(
            x.dtype,
            "rms_norm_backward",
            "rms_norm_backward_unaligned",
            aligned(width, &[d_out, x, weight, d_x])
        ),
        grid: [parts, 1, 1],
        threads: 32 * warps * rows_at_once,
        shared_bytes: rows_at_once * width * DType::F32.bytes(),
        args: &[
            Arg::Read(d_out),
            Arg::Read(x),
            Arg::Read(weight),
            offset,
            Arg::Read(inverse_rms),
            Arg::Update(d_x),
            Arg::Write(partial),
            int(rows),
            int(width),
        ],
    });
    add_parts(device, partial, parts, d_weight);
}
