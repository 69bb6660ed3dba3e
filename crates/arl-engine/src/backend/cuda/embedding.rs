//! Rows by index: the embedding and its gradient, gathering and scattering. Kernels: `cuda/embedding.cu`.

use arl_kernels::constants::embedding::{ADD_THREADS, COLUMNS, ROWS, SORTED, THREADS};

use super::device::{Arg, Device, Launch, int, kernel, long, scratch_of};
use crate::backend::{Buffer, DType, Rows};

/// `out[r] = x[rows[r] / divisor]`.
pub(super) fn gather<D: Device>(device: &mut D, x: Buffer, rows: Buffer, divisor: usize, width: usize, out: Buffer) {
    assert_eq!(out.len, rows.len * width, "gather of rows of {width}");
    device.launch(&Launch {
        kernel: match (x.dtype, out.dtype) {
            (DType::F32, DType::Bf16) => "gather_f32_bf16",
            (DType::Bf16, DType::F32) => "gather_bf16_f32",
            (DType::F32, DType::F16) => "gather_f32_f16",
            (DType::F16, DType::F32) => "gather_f16_f32",
            (a, b) => {
                assert_eq!(a, b, "gather of one type as another");
                kernel!(a, "gather")
            }
        },
        grid: [rows.len.div_ceil(ROWS), 1, 1],
        threads: THREADS,
        shared_bytes: 0,
        args: &[
            Arg::Read(x),
            Arg::Read(rows),
            int(divisor),
            Arg::Write(out),
            long(rows.len),
            long(x.len / width),
            int(width),
        ],
    });
}

/// `out[rows[r]] = x[r]` for distinct rows.
pub(super) fn scatter<D: Device>(device: &mut D, x: Buffer, rows: Buffer, width: usize, out: Buffer) {
    assert_eq!(x.len, rows.len * width, "scatter of rows of {width}");
    device.launch(&Launch {
        kernel: match (x.dtype, out.dtype) {
            (DType::F32, DType::Bf16) => "scatter_f32_bf16",
            (DType::Bf16, DType::F32) => "scatter_bf16_f32",
            (DType::F32, DType::F16) => "scatter_f32_f16",
            (DType::F16, DType::F32) => "scatter_f16_f32",
            (a, b) => {
                assert_eq!(a, b, "scatter of one type as another");
                kernel!(a, "scatter")
            }
        },
        grid: [rows.len.div_ceil(ROWS), 1, 1],
        threads: THREADS,
        shared_bytes: 0,
        args: &[Arg::Read(x), Arg::Read(rows), Arg::Update(out), long(rows.len), long(out.len / width), int(width)],
    });
}

/// The first `columns` elements of each of so many rows.
pub(super) fn copy_columns<D: Device>(device: &mut D, source: Rows, target: Rows, rows: usize, columns: usize) {
    assert_eq!(source.buffer.dtype, target.buffer.dtype, "columns of one type as another");
    assert!(columns <= source.stride.min(target.stride), "{columns} columns of {source:?} and {target:?}");
    if rows * columns == 0 {
        return;
    }
    // Up to the last element that is copied.
    let used = |of: Rows| of.buffer.slice(0, (rows - 1) * of.stride + columns);
    device.launch(&Launch {
        kernel: kernel!(source.buffer.dtype, "copy_columns"),
        grid: [rows.div_ceil(ROWS), 1, 1],
        threads: THREADS,
        shared_bytes: 0,
        args: &[
            Arg::Read(used(source)),
            long(source.stride),
            if columns == target.stride { Arg::Write(used(target)) } else { Arg::Columns(used(target)) },
            long(target.stride),
            long(rows),
            int(columns),
        ],
    });
}

/// `table_gradient[ids[t]] += d_out[t]`, in the order of `t`.
pub(super) fn embedding_backward<D: Device>(
    device: &mut D,
    scratch: Buffer,
    ids: Buffer,
    d_out: Buffer,
    width: usize,
    table_gradient: Buffer,
) {
    let tokens = ids.len;
    assert_eq!(d_out.len, tokens * width, "embedding_backward of rows of {width}");
    let order = scratch_of(scratch, DType::I32, tokens);
    device.launch(&Launch {
        kernel: "sort_ids",
        grid: [tokens.div_ceil(SORTED), 1, 1],
        threads: THREADS,
        shared_bytes: 0,
        args: &[Arg::Read(ids), Arg::Write(order), int(tokens), long(table_gradient.len / width)],
    });
    device.launch(&Launch {
        kernel: kernel!(d_out.dtype, "embedding_backward"),
        grid: [tokens, width.div_ceil(ADD_THREADS * COLUMNS), 1],
        threads: ADD_THREADS,
        shared_bytes: 0,
        args: &[
            Arg::Read(ids),
            Arg::Read(order),
            Arg::Read(d_out),
            Arg::Update(table_gradient),
            int(tokens),
            int(width),
        ],
    });
}
