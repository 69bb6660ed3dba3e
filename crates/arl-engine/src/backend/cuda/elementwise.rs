//! Conversions, sums element by element, dot products. Kernels: `cuda/elementwise.cu`, `cuda/reduce.cu`.

use super::device::{Arg, Device, Launch, kernel, long};
use crate::backend::{Buffer, DType, Rows};

const THREADS: usize = 256;
/// Elements a thread.
const STEP: usize = 8;

fn blocks(len: usize) -> [usize; 3] {
    [len.div_ceil(THREADS * STEP), 1, 1]
}

/// `target = source`, in the target's type.
pub(super) fn copy<D: Device>(device: &mut D, source: Buffer, target: Buffer) {
    assert_eq!(source.len, target.len, "copy of {} elements", target.len);
    let kernel = match (source.dtype, target.dtype) {
        (a, b) if a == b => return device.copy(source, target),
        (DType::F32, DType::Bf16) => "convert_f32_bf16",
        (DType::Bf16, DType::F32) => "convert_bf16_f32",
        (a, b) => unreachable!("no leaf converts {a:?} to {b:?}"),
    };
    device.launch(&Launch {
        kernel,
        grid: blocks(source.len),
        threads: THREADS,
        shared_bytes: 0,
        args: &[Arg::Read(source), Arg::Write(target), long(source.len)],
    });
}

/// `x += delta`.
pub(super) fn add<D: Device>(device: &mut D, x: Buffer, delta: Buffer) {
    assert_eq!((x.len, x.dtype), (delta.len, delta.dtype), "add of unlike buffers");
    device.launch(&Launch {
        kernel: kernel!(x.dtype, "add"),
        grid: blocks(x.len),
        threads: THREADS,
        shared_bytes: 0,
        args: &[Arg::Update(x), Arg::Read(delta), long(x.len)],
    });
}

/// As the leaf of [`crate::backend::Backend`].
#[allow(clippy::too_many_arguments, reason = "the leaf's signature")]
pub(super) fn sum_rows<D: Device>(device: &mut D, scratch: Buffer, x: Rows, rows: usize, columns: usize, out: Buffer) {
    let _ = (device, scratch, x, rows, columns, out);
    unimplemented!("sum_rows")
}

/// As the leaf of [`crate::backend::Backend`].
#[allow(clippy::too_many_arguments, reason = "the leaf's signature")]
pub(super) fn dot<D: Device>(device: &mut D, scratch: Buffer, a: Buffer, b: Buffer, out: Buffer) {
    let _ = (device, scratch, a, b, out);
    unimplemented!("dot")
}
