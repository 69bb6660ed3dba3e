//! The gated activation. Kernels: `cuda/swiglu.cu`.

use arl_kernels::constants::swiglu::MOST_THREADS;

use super::device::{Arg, Device, Launch, int, kernel};
use crate::backend::{Buffer, DType};

/// Threads of a block, blocks a row.
fn blocks(width: usize, dtype: DType) -> (usize, usize) {
    let packs = width.div_ceil(16 / dtype.bytes());
    let threads = packs.next_multiple_of(32).clamp(32, MOST_THREADS);
    (threads, packs.div_ceil(threads))
}

/// As [`crate::backend::Backend::swiglu`].
pub(super) fn swiglu<D: Device>(device: &mut D, gate_up: Buffer, width: usize, out: Buffer) {
    assert_eq!((gate_up.len, gate_up.dtype), (2 * out.len, out.dtype), "swiglu of rows of {width}");
    let (threads, chunks) = blocks(width, out.dtype);
    device.launch(&Launch {
        kernel: kernel!(out.dtype, "swiglu"),
        grid: [out.len / width * chunks, 1, 1],
        threads,
        shared_bytes: 0,
        args: &[Arg::Read(gate_up), Arg::Write(out), int(width), int(chunks)],
    });
}

/// As [`crate::backend::Backend::swiglu_backward`].
pub(super) fn swiglu_backward<D: Device>(device: &mut D, gate_up: Buffer, width: usize, d_out: Buffer) {
    assert_eq!((gate_up.len, gate_up.dtype), (2 * d_out.len, d_out.dtype), "swiglu_backward of rows of {width}");
    let (threads, chunks) = blocks(width, d_out.dtype);
    device.launch(&Launch {
        kernel: kernel!(d_out.dtype, "swiglu_backward"),
        grid: [d_out.len / width * chunks, 1, 1],
        threads,
        shared_bytes: 0,
        args: &[Arg::Update(gate_up), Arg::Read(d_out), int(width), int(chunks)],
    });
}
