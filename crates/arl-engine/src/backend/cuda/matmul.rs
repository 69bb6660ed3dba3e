//! Matrix products: the device's own where it has one, or where an f32 operand can be split into two that it has one for, else by
//! tiles; and those of a mixture of experts. Kernels: `cuda/matmul.cu`, `cuda/grouped.cu`.

use arl_kernels::constants::matmul::{SPLIT_STEP, SPLIT_THREADS};
use arl_kernels::constants::{grouped, tile};

use super::device::{Arg, Device, Launch, int, kernel, long, scratch_of};
use crate::backend::{Buffer, DType, GroupedMatmul, Layout, Matmul, Rows};

/// Blocks up to which a long sum is split; about two for each multiprocessor of a large GPU. Fixed, so that sums do not
/// depend on the device.
const BLOCKS: usize = 256;
/// The shortest part of a sum that is worth its place in the scratch.
const SHORTEST_PART: usize = 256;
/// What the parts of split sums need: no more tiles than blocks.
pub(super) const SCRATCH_BYTES: usize = BLOCKS * tile::BLOCK_M * tile::BLOCK_N * 4;

/// As [`crate::backend::Backend::matmul`].
pub(super) fn matmul<D: Device>(device: &mut D, scratch: Buffer, op: &Matmul) {
    if op.m == 0 || op.n == 0 {
        return;
    }
    let (a, b, c) = (op.a.buffer.dtype, op.b.buffer.dtype, op.c.buffer.dtype);
    if op.k == 0 {
        // A sum of no parts.
        return sum(device, op, None, 0);
    }
    if split(device, scratch, op) {
        return;
    }
    let name = match (a, b, c) {
        (DType::F32, DType::F32, DType::F32)
        | (DType::Bf16, DType::Bf16, DType::F32 | DType::Bf16)
        | (DType::F16, DType::F16, DType::F32 | DType::F16) => return device.matmul(op),
        (DType::F32, DType::Bf16, DType::F32) => "matmul_f32_bf16_f32",
        (DType::F32, DType::Bf16, DType::Bf16) => "matmul_f32_bf16_bf16",
        (DType::F32, DType::F16, DType::F32) => "matmul_f32_f16_f32",
        (DType::F32, DType::F16, DType::F16) => "matmul_f32_f16_f16",
        types => unreachable!("no step has a product of {types:?}"),
    };
    let tiles = op.m.div_ceil(tile::BLOCK_M) * op.n.div_ceil(tile::BLOCK_N);
    let parts = (BLOCKS / tiles).min(op.k.div_ceil(SHORTEST_PART)).max(1);
    let k_per_part = op.k.div_ceil(parts).next_multiple_of(tile::BLOCK_K);
    let parts = op.k.div_ceil(k_per_part);
    let sums = (parts > 1).then(|| scratch_of(scratch, DType::F32, parts * op.m * op.n));
    let (bias, bias_type) = bias(op);
    device.launch(&Launch {
        kernel: name,
        grid: [tiles, parts, 1],
        threads: tile::THREADS,
        shared_bytes: 0,
        args: &[
            Arg::Read(op.a.buffer),
            long(op.a.stride),
            flag(op.layout != Layout::Tn),
            Arg::Read(op.b.buffer),
            long(op.b.stride),
            flag(op.layout == Layout::Nt),
            if sums.is_some() { Arg::Null } else { result(op) },
            long(op.c.stride),
            int(op.m),
            int(op.n),
            int(op.k),
            flag(op.accumulate),
            bias,
            bias_type,
            sums.map_or(Arg::Null, Arg::Write),
            int(k_per_part),
        ],
    });
    if sums.is_some() {
        sum(device, op, sums, parts);
    }
}

/// Fewest rows that are worth being split at a time.
const FEWEST_SPLIT: usize = 256;

/// The product of an f32 `a` (a router's gradient) and bf16 by the device's own products: the rows of `a` become `[high, low]`, and
/// `[high, low] [b; b] = high b + low b` is one sum in f32; so is `high^T b + low^T b` where `c` is f32. What the split loses is
/// 2^-17 of each element of `a`. Rows go through the scratch in pieces, whose sizes depend on shapes alone. False, and nothing
/// is queued, for other products.
fn split<D: Device>(device: &mut D, scratch: Buffer, op: &Matmul) -> bool {
    let types = (op.a.buffer.dtype, op.b.buffer.dtype, op.c.buffer.dtype);
    let (rows, columns, doubled) = match (op.layout, types) {
        (Layout::Nn, (DType::F32, DType::Bf16, DType::F32 | DType::Bf16)) if op.b.stride == op.n => {
            (op.m, op.k, 2 * op.k * op.n)
        }
        (Layout::Tn, (DType::F32, DType::Bf16, DType::F32)) => (op.k, op.m, 0),
        _ => return false,
    };
    let room = (SCRATCH_BYTES / DType::Bf16.bytes()).saturating_sub(doubled);
    let most = room / (2 * columns);
    if op.bias.is_some()
        || !columns.is_multiple_of(SPLIT_STEP)
        || !op.n.is_multiple_of(SPLIT_STEP)
        || most < FEWEST_SPLIT.min(rows)
    {
        return false;
    }
    let scratch = scratch_of(scratch, DType::Bf16, SCRATCH_BYTES / DType::Bf16.bytes());
    let twice = scratch.slice(0, doubled);
    if doubled > 0 {
        for half in [0, doubled / 2] {
            device.copy(op.b.buffer.slice(0, doubled / 2), twice.slice(half, doubled / 2));
        }
    }
    let piece_of = |x: Rows, first: usize, count: usize| Rows {
        buffer: x.buffer.slice(first * x.stride, (count * x.stride).min(x.buffer.len - first * x.stride)),
        stride: x.stride,
    };
    for first in (0..rows).step_by(most) {
        let count = most.min(rows - first);
        let a = piece_of(op.a, first, count);
        let parts = scratch.slice(doubled, count * 2 * columns);
        device.launch(&Launch {
            kernel: "split_f32_bf16",
            grid: [(count * (columns / SPLIT_STEP)).div_ceil(SPLIT_THREADS), 1, 1],
            threads: SPLIT_THREADS,
            shared_bytes: 0,
            args: &[Arg::Read(a.buffer), long(a.stride), Arg::Write(parts), int(count), int(columns)],
        });
        let stride = 2 * columns;
        if op.layout == Layout::Nn {
            let (a, b) = (Rows { buffer: parts, stride }, Rows { buffer: twice, stride: op.n });
            device.matmul(&Matmul { m: count, k: stride, a, b, c: piece_of(op.c, first, count), ..*op });
            continue;
        }
        for part in [0, columns] {
            let a = Rows { buffer: parts.slice(part, parts.len - columns), stride };
            let accumulate = op.accumulate || first + part > 0;
            device.matmul(&Matmul { k: count, a, b: piece_of(op.b, first, count), accumulate, ..*op });
        }
    }
    true
}

/// `c` from the parts of its sums `[parts, m, n]`.
fn sum<D: Device>(device: &mut D, op: &Matmul, sums: Option<Buffer>, parts: usize) {
    let (bias, bias_type) = bias(op);
    device.launch(&Launch {
        kernel: kernel!(op.c.buffer.dtype, "matmul_sum"),
        grid: [(op.m * op.n).div_ceil(tile::THREADS), 1, 1],
        threads: tile::THREADS,
        shared_bytes: 0,
        args: &[
            sums.map_or(Arg::Null, Arg::Read),
            int(parts),
            result(op),
            long(op.c.stride),
            int(op.m),
            int(op.n),
            flag(op.accumulate),
            bias,
            bias_type,
        ],
    });
}

/// The bias's bytes, and the number of their type (`Bias` in `matmul.cu`).
fn bias(op: &Matmul) -> (Arg, Arg) {
    let number = match op.bias.map(|bias| bias.dtype) {
        Some(DType::Bf16) => 1,
        Some(DType::F16) => 2,
        _ => 0,
    };
    (op.bias.map_or(Arg::Null, Arg::Read), Arg::Int(number))
}

/// `c`, which is read where it is added to, and keeps what is between its rows.
fn result(op: &Matmul) -> Arg {
    if op.accumulate || op.c.stride != op.n { Arg::Update(op.c.buffer) } else { Arg::Write(op.c.buffer) }
}

fn flag(value: bool) -> Arg {
    Arg::Int(value.into())
}

/// As [`crate::backend::Backend::grouped_matmul`]. `a` and `b` are of one type, `c` of that type or, for `Tn`, f32.
pub(super) fn grouped_matmul<D: Device>(device: &mut D, op: &GroupedMatmul) {
    let dtype = op.a.buffer.dtype;
    let c = if op.layout == Layout::Tn { DType::F32 } else { dtype };
    assert_eq!((op.b.buffer.dtype, op.c.buffer.dtype), (dtype, c), "grouped_matmul {:?} of {dtype:?}", op.layout);
    assert_eq!((op.offsets.dtype, op.offsets.len), (DType::I32, op.experts + 1), "grouped_matmul's offsets");
    let (tile_n, threads, shared_bytes) = match dtype {
        DType::Bf16 | DType::F16 => (grouped::BLOCK, grouped::THREADS, grouped::STAGES_BYTES + grouped::SEARCH_BYTES),
        _ => (tile::BLOCK_N, tile::THREADS, 0),
    };
    let tiles_m = match op.layout {
        Layout::Tn => op.experts * op.k.div_ceil(tile::BLOCK_M),
        // Each expert that has rows may have one tile that is not full. What is too much finds no expert and ends.
        Layout::Nt | Layout::Nn => (op.rows + op.experts.min(op.rows) * (tile::BLOCK_M - 1)) / tile::BLOCK_M,
    };
    let name = match op.layout {
        Layout::Nt => kernel!(dtype, "grouped_nt"),
        Layout::Nn => kernel!(dtype, "grouped_nn"),
        Layout::Tn => kernel!(dtype, "grouped_tn"),
    };
    let c = match op.layout {
        Layout::Nt | Layout::Nn if op.c.stride == op.n => Arg::Write(op.c.buffer),
        _ => Arg::Update(op.c.buffer),
    };
    let side = |rows: Rows| [Arg::Read(rows.buffer), long(rows.stride)];
    let [a, a_stride] = side(op.a);
    let [b, b_stride] = side(op.b);
    let offsets = Arg::Read(op.offsets);
    let args = [int(op.experts), offsets, a, a_stride, b, b_stride, c, long(op.c.stride), int(op.n), int(op.k)];
    device.launch(&Launch {
        kernel: name,
        grid: [tiles_m * op.n.div_ceil(tile_n), 1, 1],
        threads,
        shared_bytes,
        // The gradients' blocks know their experts without a search.
        args: if op.layout == Layout::Tn { &args[1..] } else { &args },
    });
}
