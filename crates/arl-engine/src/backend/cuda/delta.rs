//! The leaves of the delta rule's family: the convolution before it and the gated norm behind it. Kernels: `cuda/conv.cu`,
//! `cuda/gated_norm.cu`. The rule itself is in `gated_delta.rs`.

use arl_kernels::constants::{conv, gated_norm};

use super::device::{Arg, Device, Launch, int, kernel, long, scratch_of};
use super::elementwise::add_parts;
use super::{CudaBackend, PARTS, gated_delta};
use crate::backend::{Buffer, CausalConv, DType, DeltaRule, GatedDelta, GatedNorm};

/// Rows of f32 that a tile of the convolution's backward pass has in the scratch: of x on both sides of it, and of the gradient of
/// each tap.
const ROWS_A_TILE: usize = 2 * (conv::TAPS - 1) + conv::TAPS;
/// Tiles at most: the scratch has room for `2 * PARTS` rows.
const TILES: usize = 2 * PARTS / ROWS_A_TILE;

/// Heads of a block of the gated norm.
const HEADS: usize = gated_norm::THREADS / 32;

fn check_conv(op: &CausalConv) {
    let (most, taps) = (conv::TAPS, op.taps);
    assert!((1..=most).contains(&taps), "a convolution of {taps} taps, at most {most}");
    assert_eq!(op.weight.len, op.channels * taps, "causal_conv of {} channels", op.channels);
    assert_eq!(op.weight.dtype, op.x.buffer.dtype, "causal_conv of one type");
}

/// Blocks along the channels.
fn channel_blocks(op: &CausalConv) -> usize {
    op.channels.div_ceil(conv::THREADS)
}

/// Heads of all tokens, after a check of their sizes.
fn heads(op: &GatedNorm, alike: Buffer) -> usize {
    let (rows, dim) = (op.tokens * op.heads, op.weight.len);
    assert_eq!((op.x.len, alike.len), (rows * dim, rows * dim), "gated_norm of {} heads of {dim}", op.heads);
    assert!(dim <= gated_norm::MOST_DIM, "gated_norm of heads of {dim}, at most {}", gated_norm::MOST_DIM);
    rows
}

impl<D: Device> DeltaRule for CudaBackend<D> {
    fn causal_conv(&mut self, op: &CausalConv, out: Buffer) {
        check_conv(op);
        assert_eq!(out.len, op.tokens * op.channels, "causal_conv of {} tokens", op.tokens);
        self.device.launch(&Launch {
            kernel: kernel!(out.dtype, "causal_conv"),
            grid: [op.tokens.div_ceil(conv::TOKENS), channel_blocks(op), 1],
            threads: conv::THREADS,
            shared_bytes: 0,
            args: &[
                Arg::Read(op.x.buffer),
                long(op.x.stride),
                Arg::Read(op.weight),
                Arg::Read(op.sequences.cu_seqlens),
                int(op.sequences.count),
                Arg::Write(out),
                int(op.tokens),
                int(op.channels),
                int(op.taps),
            ],
        });
    }

    fn causal_conv_backward(&mut self, op: &CausalConv, d_out: Buffer, d_weight: Buffer) {
        check_conv(op);
        assert_eq!(d_out.len, op.tokens * op.channels, "causal_conv_backward of {} tokens", op.tokens);
        if op.tokens == 0 {
            return;
        }
        let size = op.tokens.div_ceil(TILES).max(conv::TOKENS);
        let tiles = op.tokens.div_ceil(size);
        let of_edges = tiles * 2 * (conv::TAPS - 1) * op.channels;
        let all = scratch_of(self.scratch, DType::F32, of_edges + tiles * d_weight.len);
        let (edges, parts) = (all.slice(0, of_edges), all.slice(of_edges, tiles * d_weight.len));
        let grid = [tiles, channel_blocks(op), 1];
        self.device.launch(&Launch {
            kernel: kernel!(d_out.dtype, "causal_conv_edges"),
            grid,
            threads: conv::THREADS,
            shared_bytes: 0,
            args: &[
                Arg::Read(op.x.buffer),
                long(op.x.stride),
                Arg::Write(edges),
                int(size),
                int(op.tokens),
                int(op.channels),
            ],
        });
        self.device.launch(&Launch {
            kernel: kernel!(d_out.dtype, "causal_conv_backward"),
            grid,
            threads: conv::THREADS,
            shared_bytes: 0,
            args: &[
                Arg::Update(op.x.buffer),
                long(op.x.stride),
                Arg::Read(op.weight),
                Arg::Read(op.sequences.cu_seqlens),
                int(op.sequences.count),
                Arg::Read(d_out),
                Arg::Read(edges),
                Arg::Write(parts),
                int(size),
                int(op.tokens),
                int(op.channels),
                int(op.taps),
            ],
        });
        add_parts(&mut self.device, parts, tiles, d_weight);
    }

    fn causal_conv_keep(&mut self, op: &CausalConv, inputs: Buffer) {
        check_conv(op);
        let rows = op.sequences.count * (op.taps - 1);
        assert_eq!(inputs.len, rows * op.channels, "causal_conv_keep of {} sequences", op.sequences.count);
        self.device.launch(&Launch {
            kernel: kernel!(inputs.dtype, "causal_conv_keep"),
            grid: [rows, channel_blocks(op), 1],
            threads: conv::THREADS,
            shared_bytes: 0,
            args: &[
                Arg::Read(op.x.buffer),
                long(op.x.stride),
                Arg::Read(op.sequences.cu_seqlens),
                Arg::Write(inputs),
                int(op.channels),
                int(op.taps),
            ],
        });
    }

    fn causal_conv_step(&mut self, op: &CausalConv, inputs: Buffer, out: Buffer) {
        check_conv(op);
        let expected = (op.tokens * (op.taps - 1) * op.channels, op.tokens * op.channels);
        assert_eq!((inputs.len, out.len), expected, "causal_conv_step of {} sequences", op.tokens);
        self.device.launch(&Launch {
            kernel: kernel!(out.dtype, "causal_conv_step"),
            grid: [op.tokens, channel_blocks(op), 1],
            threads: conv::THREADS,
            shared_bytes: 0,
            args: &[
                Arg::Read(op.x.buffer),
                long(op.x.stride),
                Arg::Read(op.weight),
                Arg::Update(inputs),
                Arg::Write(out),
                int(op.channels),
                int(op.taps),
            ],
        });
    }

    fn gated_norm(&mut self, op: &GatedNorm, out: Buffer) {
        let rows = heads(op, out);
        self.device.launch(&Launch {
            kernel: kernel!(out.dtype, "gated_norm"),
            grid: [rows.div_ceil(HEADS), 1, 1],
            threads: gated_norm::THREADS,
            shared_bytes: 0,
            args: &[
                Arg::Read(op.x),
                Arg::Read(op.gate.buffer),
                long(op.gate.stride),
                Arg::Read(op.weight),
                Arg::Float(op.epsilon),
                Arg::Write(out),
                long(rows),
                int(op.heads),
                int(op.weight.len),
            ],
        });
    }

    fn gated_norm_backward(&mut self, op: &GatedNorm, d: Buffer, d_weight: Buffer) {
        let rows = heads(op, d);
        let parts = rows.div_ceil(4 * HEADS).min(2 * PARTS);
        let partial = scratch_of(self.scratch, DType::F32, parts * d_weight.len);
        self.device.launch(&Launch {
            kernel: kernel!(d.dtype, "gated_norm_backward"),
            grid: [parts, 1, 1],
            threads: gated_norm::THREADS,
            shared_bytes: 0,
            args: &[
                Arg::Read(op.x),
                Arg::Update(op.gate.buffer),
                long(op.gate.stride),
                Arg::Read(op.weight),
                Arg::Float(op.epsilon),
                Arg::Update(d),
                Arg::Write(partial),
                long(rows),
                int(op.heads),
                int(op.weight.len),
            ],
        });
        add_parts(&mut self.device, partial, parts, d_weight);
    }

    fn gated_delta(&mut self, op: &GatedDelta, out: Buffer, states: Option<Buffer>) {
        gated_delta::forward(&mut self.device, op, out, states);
    }

    fn gated_delta_backward(&mut self, op: &GatedDelta, d_out: Buffer, d_a_log: Buffer, d_dt_bias: Buffer) {
        gated_delta::backward(&mut self.device, op, d_out, d_a_log, d_dt_bias);
    }

    fn gated_delta_step(&mut self, op: &GatedDelta, states: Buffer, out: Buffer) {
        gated_delta::step(&mut self.device, op, states, out);
    }
}
