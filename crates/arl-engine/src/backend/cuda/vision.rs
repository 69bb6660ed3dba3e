//! The leaves of vision towers. Kernels: `cuda/vision.cu`, `cuda/layer_norm.cu`.

use arl_kernels::constants::layer_norm::{BACKWARD_ELEMENTS, MOST_BACKWARD_THREADS, MOST_THREADS, PACKS};
use arl_kernels::constants::{gelu, vision};

use super::device::{Arg, Device, Launch, int, kernel, long, scratch_of};
use super::elementwise::add_parts;
use super::norm::aligned;
use super::{CudaBackend, PARTS};
use crate::backend::{Buffer, DType, Gelu, LayerNorm, Vision};

/// The widest rows that the kernels hold in registers, as RMSNorm's.
const MOST_WIDTH: usize = super::norm::MOST_WIDTH;
const _: () = assert!(4 * PACKS * MOST_THREADS == MOST_WIDTH, "packs of f32 of a block of the forward pass");
const _: () =
    assert!(BACKWARD_ELEMENTS * MOST_BACKWARD_THREADS == MOST_WIDTH, "elements of a block of the backward pass");

/// Threads that a block of the backward pass has for rows that need no more.
const BACKWARD_THREADS: usize = 512;
/// Rounds of rows that a block of the backward pass takes at least, before it sums what its threads have.
const ROUNDS: usize = 4;

fn check(op: &LayerNorm) {
    let LayerNorm { x, weight, bias, width, .. } = *op;
    assert_eq!((x.len, op.statistics.len), (op.rows() * width, 2 * op.rows()), "LayerNorm of rows of {width}");
    assert_eq!((weight.len, bias.len), (width, width), "LayerNorm of rows of {width}");
    assert_eq!((weight.dtype, bias.dtype), (x.dtype, x.dtype), "LayerNorm of one type");
    assert!(width <= MOST_WIDTH, "LayerNorm of rows of {width}, at most {MOST_WIDTH}");
}

/// The two buffers hold elements of one type, one for each other.
fn alike(a: Buffer, b: Buffer, what: &str) {
    assert_eq!((a.len, a.dtype), (b.len, b.dtype), "{what} of unlike buffers");
}

/// Blocks of GELU.
fn blocks(len: usize) -> [usize; 3] {
    [len.div_ceil(gelu::THREADS * gelu::STEP), 1, 1]
}

/// Four taps and as many weights a row of `rows`, which has `width` elements a row; their number.
fn tapped(taps: Buffer, weights: Buffer, rows: Buffer, width: usize) -> usize {
    let count = taps.len / vision::TAPS;
    let expected = (count * vision::TAPS, count * vision::TAPS, count * width);
    assert_eq!((taps.len, weights.len, rows.len), expected, "interpolation of rows of {width}");
    count
}

impl<D: Device> Vision for CudaBackend<D> {
    fn layer_norm(&mut self, op: &LayerNorm) {
        check(op);
        alike(op.x, op.out, "LayerNorm");
        let LayerNorm { x, weight, bias, width, out, .. } = *op;
        let packs = width.div_ceil(16 / x.dtype.bytes());
        self.device.launch(&Launch {
            kernel: if aligned(width, &[x, weight, bias, out]) {
                kernel!(x.dtype, "layer_norm")
            } else {
                kernel!(x.dtype, "layer_norm_unaligned")
            },
            grid: [op.rows(), 1, 1],
            threads: packs.div_ceil(PACKS).next_multiple_of(32),
            shared_bytes: 0,
            args: &[
                Arg::Read(x),
                Arg::Read(weight),
                Arg::Read(bias),
                Arg::Float(op.epsilon),
                Arg::Write(out),
                Arg::Write(op.statistics),
                int(width),
            ],
        });
    }

    fn layer_norm_backward(&mut self, op: &LayerNorm, d_out: Buffer, d_x: Buffer, d_weight: Buffer, d_bias: Buffer) {
        check(op);
        alike(op.x, d_out, "LayerNorm's gradients");
        alike(op.x, d_x, "LayerNorm's gradients");
        let (rows, width) = (op.rows(), op.width);
        assert_eq!((d_weight.len, d_bias.len), (width, width), "gradients of rows of {width}");
        let warps = width.div_ceil(32 * BACKWARD_ELEMENTS);
        let rows_at_once = (BACKWARD_THREADS / 32 / warps).max(1);
        // The scratch has room for so many rows of both sums.
        let parts = rows.div_ceil(rows_at_once * ROUNDS).min(PARTS);
        let partial = scratch_of(self.scratch, DType::F32, 2 * parts * width);
        let (of_weight, of_bias) = (partial.slice(0, parts * width), partial.slice(parts * width, parts * width));
        self.device.launch(&Launch {
            kernel: if aligned(width, &[d_out, op.x, op.weight, d_x]) {
                kernel!(op.x.dtype, "layer_norm_backward")
            } else {
                kernel!(op.x.dtype, "layer_norm_backward_unaligned")
            },
            grid: [parts, 1, 1],
            threads: 32 * warps * rows_at_once,
            shared_bytes: rows_at_once * width * DType::F32.bytes(),
            args: &[
                Arg::Read(d_out),
                Arg::Read(op.x),
                Arg::Read(op.weight),
                Arg::Read(op.statistics),
                Arg::Update(d_x),
                Arg::Write(of_weight),
                Arg::Write(of_bias),
                int(rows),
                int(width),
            ],
        });
        add_parts(&mut self.device, of_weight, parts, d_weight);
        add_parts(&mut self.device, of_bias, parts, d_bias);
    }

    fn gelu(&mut self, kind: Gelu, x: Buffer, out: Buffer) {
        alike(x, out, "gelu");
        self.device.launch(&Launch {
            kernel: match kind {
                Gelu::Tanh => kernel!(x.dtype, "gelu_tanh"),
                Gelu::Erf => kernel!(x.dtype, "gelu_erf"),
            },
            grid: blocks(x.len),
            threads: gelu::THREADS,
            shared_bytes: 0,
            args: &[Arg::Read(x), Arg::Write(out), long(x.len)],
        });
    }

    fn gelu_backward(&mut self, kind: Gelu, x: Buffer, d_x: Buffer) {
        alike(x, d_x, "gelu_backward");
        self.device.launch(&Launch {
            kernel: match kind {
                Gelu::Tanh => kernel!(x.dtype, "gelu_tanh_backward"),
                Gelu::Erf => kernel!(x.dtype, "gelu_erf_backward"),
            },
            grid: blocks(x.len),
            threads: gelu::THREADS,
            shared_bytes: 0,
            args: &[Arg::Read(x), Arg::Update(d_x), long(x.len)],
        });
    }

    fn interpolate(&mut self, table: Buffer, taps: Buffer, weights: Buffer, width: usize, out: Buffer) {
        let count = tapped(taps, weights, out, width);
        assert_eq!(table.dtype, out.dtype, "interpolate of one type as another");
        self.device.launch(&Launch {
            kernel: kernel!(out.dtype, "interpolate"),
            grid: [count.div_ceil(vision::ROWS), 1, 1],
            threads: vision::THREADS,
            shared_bytes: 0,
            args: &[
                Arg::Read(table),
                Arg::Read(taps),
                Arg::Read(weights),
                Arg::Update(out),
                long(count),
                long(table.len / width),
                int(width),
            ],
        });
    }

    fn interpolate_backward(&mut self, d_out: Buffer, taps: Buffer, weights: Buffer, width: usize, d_table: Buffer) {
        let count = tapped(taps, weights, d_out, width);
        if count == 0 {
            return;
        }
        self.device.launch(&Launch {
            kernel: kernel!(d_out.dtype, "interpolate_backward"),
            grid: [d_table.len / width, width.div_ceil(vision::TAP_THREADS * vision::COLUMNS), 1],
            threads: vision::TAP_THREADS,
            shared_bytes: 0,
            args: &[
                Arg::Read(d_out),
                Arg::Read(taps),
                Arg::Read(weights),
                Arg::Update(d_table),
                int(count),
                int(width),
            ],
        });
    }

    fn add_rows(&mut self, x: Buffer, rows: Buffer, width: usize, out: Buffer) {
        assert_eq!((x.len, x.dtype), (rows.len * width, out.dtype), "add_rows of rows of {width}");
        self.device.launch(&Launch {
            kernel: kernel!(x.dtype, "add_rows"),
            grid: [rows.len.div_ceil(vision::ROWS), 1, 1],
            threads: vision::THREADS,
            shared_bytes: 0,
            args: &[Arg::Read(x), Arg::Read(rows), Arg::Update(out), long(rows.len), long(out.len / width), int(width)],
        });
    }

    fn zero_rows(&mut self, rows: Buffer, width: usize, x: Buffer) {
        self.device.launch(&Launch {
            kernel: kernel!(x.dtype, "zero_rows"),
            grid: [rows.len.div_ceil(vision::ROWS), 1, 1],
            threads: vision::THREADS,
            shared_bytes: 0,
            args: &[Arg::Read(rows), Arg::Update(x), long(rows.len), long(x.len / width), int(width)],
        });
    }
}
