//! Weights in NF4: as elements, and products with them, which take them through a tile of bounded size. Kernels: `cuda/nf4.cu`.

use arl_kernels::constants::nf4::{BLOCK, ROWS, STEP, THREADS};

use super::device::{Arg, Device, Launch, int, kernel, long, read_or_null};
use super::matmul;
use crate::backend::{Buffer, DType, Layout, Matmul, Nf4Matmul, Nf4Weights, Rows};

/// Bytes of the tile: a product of its rows or columns keeps a large GPU busy.
const TILE_BYTES: usize = 32 << 20;
/// Rows or columns that a product of a tile has a multiple of, but for the last one's.
const ALIGNED: usize = 64;
/// Most tokens that are multiplied one by one, without a tile.
const MOST_VECTORS: usize = 4;

/// As [`crate::backend::DeviceKind::nf4_tile`].
pub(crate) fn nf4_tile(dtype: DType, rows: usize, columns: usize) -> usize {
    let least = ALIGNED * rows.max(columns);
    (TILE_BYTES / dtype.bytes()).max(least).min(rows * columns)
}

/// As [`crate::backend::Backend::dequantize`].
pub(super) fn dequantize<D: Device>(device: &mut D, weights: &Nf4Weights, first: usize, out: Buffer) {
    assert!(first + out.len <= weights.len, "{} of {} weights in NF4 from {first} on", out.len, weights.len);
    rectangle(device, weights, first, out.len, out.len, out);
}

/// Rows of `columns` weights of a matrix of `width` columns, the first of them weight `first`; `out` has whole rows.
fn rectangle<D: Device>(device: &mut D, weights: &Nf4Weights, first: usize, width: usize, columns: usize, out: Buffer) {
    if out.len == 0 {
        return;
    }
    let threads = out.len / columns * columns.div_ceil(STEP);
    let place = [long(first), long(width), long(columns), Arg::Write(out), long(out.len)];
    launch(
        device,
        weights,
        [kernel!(out.dtype, "nf4"), kernel!(out.dtype, "nf4_nested")],
        threads.div_ceil(THREADS),
        &place,
    );
}

/// A kernel over a tensor: that of plain scales, or of nested ones.
fn launch<D: Device>(device: &mut D, weights: &Nf4Weights, kernels: [&'static str; 2], blocks: usize, args: &[Arg]) {
    let (kernel, tables) = match weights.nested {
        None => (kernels[0], Vec::new()),
        Some(nested) => (kernels[1], vec![Arg::Read(nested.largest), Arg::Read(nested.values)]),
    };
    let arrays = [Arg::Read(weights.codes), Arg::Read(weights.scales)].into_iter().chain(tables);
    let args: Vec<Arg> = arrays.chain(args.iter().copied()).collect();
    device.launch(&Launch { kernel, grid: [blocks, 1, 1], threads: THREADS, shared_bytes: 0, args: &args });
}

/// As [`crate::backend::Backend::matmul_nf4`]: tokens one by one where they are few, else products with a part of the rows of the
/// weights each (`Nt`), or of the columns (`Nn`), so that no sum is divided.
pub(super) fn matmul<D: Device>(device: &mut D, scratch: Buffer, op: &Nf4Matmul<'_>) {
    if op.m == 0 || op.n == 0 {
        return;
    }
    if takes_vectors(op) {
        return vectors(device, op);
    }
    let (rows, columns) = op.shape();
    let (sides, other) = if op.layout == Layout::Nt { (rows, columns) } else { (columns, rows) };
    let most = op.tile.len / other.max(1);
    // Parts of about one size.
    let part = if most >= sides { sides } else { sides.div_ceil(sides.div_ceil(most / ALIGNED * ALIGNED)) };
    let part = if part < sides { part.next_multiple_of(ALIGNED) } else { part };
    for first in (0..sides).step_by(part) {
        let count = part.min(sides - first);
        let tile = op.tile.slice(0, count * other);
        for (weights, above, rows) in op.tensors() {
            if op.layout == Layout::Nt {
                let (from, to) = (first.max(above), (first + count).min(above + rows));
                if from < to {
                    let out = tile.slice((from - first) * columns, (to - from) * columns);
                    dequantize(device, weights, (from - above) * columns, out);
                }
            } else {
                rectangle(device, weights, first, columns, count, tile.slice(above * count, rows * count));
            }
        }
        let c = op.c.buffer.slice(first, op.c.buffer.len - first);
        let product = Matmul {
            layout: op.layout,
            m: op.m,
            n: count,
            k: op.k,
            a: op.a,
            b: Rows { buffer: tile, stride: if op.layout == Layout::Nt { columns } else { count } },
            c: Rows { buffer: c, stride: op.c.stride },
            accumulate: op.accumulate,
            bias: op.bias.map(|bias| bias.slice(first, count)),
        };
        matmul::matmul(device, scratch, &product);
    }
}

/// Whether the kernel for single tokens has this product: all of one type, in whole blocks, from aligned addresses.
fn takes_vectors(op: &Nf4Matmul<'_>) -> bool {
    let types = [op.a.buffer.dtype, op.c.buffer.dtype].into_iter().chain(op.bias.map(|bias| bias.dtype));
    let whole = op.k > 0 && op.k.is_multiple_of(BLOCK) && op.a.stride.is_multiple_of(STEP);
    let aligned = op.a.buffer.offset.is_multiple_of(16);
    let one_type = types.into_iter().all(|dtype| dtype == op.dtype);
    op.layout == Layout::Nt && op.m <= MOST_VECTORS && !op.accumulate && whole && aligned && one_type
}

fn vectors<D: Device>(device: &mut D, op: &Nf4Matmul<'_>) {
    for token in 0..op.m {
        let x = op.a.buffer.slice(token * op.a.stride, op.k);
        for (weights, above, rows) in op.tensors() {
            let out = op.c.buffer.slice(token * op.c.stride + above, rows);
            let bias = op.bias.map(|bias| bias.slice(above, rows));
            let kernels = [kernel!(op.dtype, "nf4_vector"), kernel!(op.dtype, "nf4_vector_nested")];
            let args = [int(rows), int(op.k), Arg::Read(x), read_or_null(bias), Arg::Write(out)];
            launch(device, weights, kernels, rows.div_ceil(ROWS), &args);
        }
    }
}
