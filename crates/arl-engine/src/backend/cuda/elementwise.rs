//! Conversions, sums and multiples element by element, dot products. Kernels: `cuda/elementwise.cu`, `cuda/reduce.cu`.

use arl_kernels::constants::elementwise::{STEP, THREADS};
use arl_kernels::constants::reduce;

use super::PARTS;
use super::device::{Arg, Device, Launch, int, kernel, long, scratch_of};
use crate::backend::{Buffer, DType, Dropout, Rows};

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
        (DType::F32, DType::F16) => "convert_f32_f16",
        (DType::F16, DType::F32) => "convert_f16_f32",
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

/// As [`crate::backend::Backend::scale`].
pub(super) fn scale<D: Device>(device: &mut D, x: Buffer, factor: f32, dropout: Option<Dropout>, out: Buffer) {
    assert_eq!((x.len, x.dtype), (out.len, out.dtype), "scale of unlike buffers");
    // Nothing is below a threshold of 0.
    let none = Dropout { key: [0; 2], threshold: 0, first: 0, columns: [1; 2] };
    let Dropout { key, threshold, first, columns: [own, whole] } = dropout.unwrap_or(none);
    let word = |word: u32| Arg::Int(word.cast_signed());
    device.launch(&Launch {
        kernel: kernel!(x.dtype, "scale"),
        grid: blocks(x.len),
        threads: THREADS,
        shared_bytes: 0,
        args: &[
            Arg::Read(x),
            Arg::Float(factor),
            word(key[0]),
            word(key[1]),
            word(threshold),
            long(first),
            long(own),
            long(whole),
            Arg::Write(out),
            long(x.len),
        ],
    });
}

/// Rows that a block of `sum_rows` takes at least: eight of each of its warps.
const LEAST_ROWS: usize = 64;

/// As [`crate::backend::Backend::sum_rows`].
pub(super) fn sum_rows<D: Device>(device: &mut D, scratch: Buffer, x: Rows, rows: usize, columns: usize, out: Buffer) {
    assert_eq!(out.len, columns, "sums of {columns} columns");
    assert!(columns <= x.stride, "{columns} columns of rows of {}", x.stride);
    let tile = 32 * 16 / x.buffer.dtype.bytes();
    let parts = rows.div_ceil(LEAST_ROWS).min(PARTS);
    let partial = scratch_of(scratch, DType::F32, parts * columns);
    device.launch(&Launch {
        kernel: kernel!(x.buffer.dtype, "sum_rows"),
        grid: [columns.div_ceil(tile), parts, 1],
        threads: THREADS,
        shared_bytes: 0,
        args: &[Arg::Read(x.buffer), long(x.stride), Arg::Write(partial), int(rows), int(columns)],
    });
    add_parts(device, partial, parts, out);
}

/// The second stage of a sum: `out[c] += sum of parts[p, c]` over `count` rows of `parts`.
pub(super) fn add_parts<D: Device>(device: &mut D, parts: Buffer, count: usize, out: Buffer) {
    if count == 0 {
        return;
    }
    assert_eq!(parts.len, count * out.len, "{count} parts of {} columns", out.len);
    device.launch(&Launch {
        kernel: "add_parts",
        grid: [out.len.div_ceil(32), 1, 1],
        threads: reduce::THREADS,
        shared_bytes: 0,
        args: &[Arg::Read(parts), Arg::Update(out), int(count), int(out.len)],
    });
}

/// Most blocks of a scalar product. Their sums fit the smallest scratch; they fill large devices and run at once there.
const DOT_PARTS: usize = 768;
/// Elements that a block of a scalar product takes at once.
const DOT_STEP: usize = 4 * THREADS;

/// As [`crate::backend::Backend::dot`].
pub(super) fn dot<D: Device>(device: &mut D, scratch: Buffer, a: Buffer, b: Buffer, out: Buffer) {
    assert_eq!((a.len, out.len), (b.len, 1), "dot of buffers of one length");
    let parts = a.len.div_ceil(DOT_STEP).min(DOT_PARTS);
    if parts == 0 {
        return;
    }
    let partial = scratch_of(scratch, DType::F64, parts);
    device.launch(&Launch {
        kernel: "dot_parts",
        grid: [parts, 1, 1],
        threads: THREADS,
        shared_bytes: 0,
        args: &[Arg::Read(a), Arg::Read(b), Arg::Write(partial), long(a.len)],
    });
    device.launch(&Launch {
        kernel: "dot_sum",
        grid: [1, 1, 1],
        threads: THREADS,
        shared_bytes: 0,
        args: &[Arg::Read(partial), Arg::Update(out), int(parts)],
    });
}
