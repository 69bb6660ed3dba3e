//! The mixture of experts: the router, the sorting of pairs by expert, weighted sums. Kernels: `cuda/moe.cu`.

pub(super) use arl_kernels::constants::moe::MOST_EXPERTS;
use arl_kernels::constants::moe::{COMBINE_THREADS, THREADS};

use super::PARTS;
use super::device::{Arg, Device, Launch, int, kernel, read_or_null, scratch_of};
use crate::backend::{Buffer, DType, Permutation, Router};

const WARPS: usize = THREADS / 32;
/// Fewest tokens whose balance a block sums.
const SHORTEST_RUN: usize = 64;
/// Fewest pairs that a block sorts.
const SHORTEST_SORT: usize = 2048;
/// Most blocks that sort.
const SORT_BLOCKS: usize = 1024;
/// A count for each expert in each block that sorts, and in all.
pub(super) const SCRATCH_BYTES: usize = (SORT_BLOCKS + 1) * MOST_EXPERTS * 4;

fn check(op: &Router) {
    let Router { tokens, experts, top_k, .. } = *op;
    assert!(0 < top_k && top_k <= experts && experts <= MOST_EXPERTS, "{top_k} of {experts} experts");
    assert_eq!(op.probabilities.len, tokens * experts, "router of {tokens} tokens");
    assert_eq!((op.experts_chosen.len, op.weights.len), (tokens * top_k, tokens * top_k), "router of {tokens} tokens");
}

/// As [`crate::backend::Backend::router`].
pub(super) fn router<D: Device>(device: &mut D, scratch: Buffer, op: &Router, logits: Buffer, balance: Option<Buffer>) {
    check(op);
    assert_eq!(logits.len, op.probabilities.len, "router of {} tokens", op.tokens);
    device.launch(&Launch {
        kernel: if op.experts <= 128 { "router_128" } else { "router_512" },
        grid: [op.tokens.div_ceil(WARPS), 1, 1],
        threads: THREADS,
        shared_bytes: 0,
        args: &[
            Arg::Read(logits),
            int(op.tokens),
            int(op.experts),
            int(op.top_k),
            Arg::Int(op.normalise.into()),
            Arg::Write(op.probabilities),
            Arg::Write(op.experts_chosen),
            Arg::Write(op.weights),
        ],
    });
    if let Some(balance) = balance {
        add_balance(device, scratch, op, balance);
    }
}

/// Adds the choices' counts and the probabilities' sums to `balance` `[2, experts]`.
fn add_balance<D: Device>(device: &mut D, scratch: Buffer, op: &Router, balance: Buffer) {
    let columns = 2 * op.experts;
    assert_eq!(balance.len, columns, "balance of {} experts", op.experts);
    let run = op.tokens.div_ceil(PARTS).max(SHORTEST_RUN);
    let count = op.tokens.div_ceil(run);
    let parts = scratch_of(scratch, DType::F32, count * columns);
    device.launch(&Launch {
        kernel: "router_balance_parts",
        grid: [count, 1, 1],
        threads: THREADS,
        shared_bytes: 0,
        args: &[
            Arg::Read(op.probabilities),
            Arg::Read(op.experts_chosen),
            int(op.tokens),
            int(op.experts),
            int(op.top_k),
            int(run),
            Arg::Write(parts),
        ],
    });
    device.launch(&Launch {
        kernel: "router_balance",
        grid: [columns.div_ceil(THREADS), 1, 1],
        threads: THREADS,
        shared_bytes: 0,
        args: &[Arg::Read(parts), int(count), int(columns), Arg::Update(balance)],
    });
}

/// As [`crate::backend::Backend::router_backward`].
pub(super) fn router_backward<D: Device>(
    device: &mut D,
    op: &Router,
    d_weights: Buffer,
    balance: Option<(Buffer, f32)>,
    d_logits: Buffer,
) {
    check(op);
    assert_eq!((d_weights.len, d_logits.len), (op.weights.len, op.probabilities.len), "router_backward");
    let (counts, factor) = balance.map_or((None, 0.0), |(counts, factor)| (Some(counts), factor));
    device.launch(&Launch {
        kernel: if op.experts <= 128 { "router_backward_128" } else { "router_backward_512" },
        grid: [op.tokens.div_ceil(WARPS), 1, 1],
        threads: THREADS,
        shared_bytes: 0,
        args: &[
            Arg::Read(op.probabilities),
            Arg::Read(op.experts_chosen),
            Arg::Read(op.weights),
            Arg::Read(d_weights),
            read_or_null(counts),
            Arg::Float(factor),
            int(op.tokens),
            int(op.experts),
            int(op.top_k),
            Arg::Int(op.normalise.into()),
            Arg::Write(d_logits),
        ],
    });
}

/// As [`crate::backend::Backend::permute`].
pub(super) fn permute<D: Device>(device: &mut D, scratch: Buffer, op: &Router, permutation: &Permutation) {
    let (pairs, experts) = (op.experts_chosen.len, op.experts);
    assert!(experts <= MOST_EXPERTS, "permute by {experts} experts");
    assert_eq!(permutation.offsets.len, experts + 1, "permute by {experts} experts");
    assert_eq!((permutation.pairs.len, permutation.rows.len), (pairs, pairs), "permute of {pairs} pairs");
    // Each warp of a block has an equal part of the block's run.
    let run = pairs.div_ceil(SORT_BLOCKS).max(SHORTEST_SORT).next_multiple_of(THREADS);
    // One block at least, as it writes the offsets.
    let blocks = pairs.div_ceil(run).max(1);
    let counted = scratch_of(scratch, DType::I32, (blocks + 1) * experts);
    let (counts, totals) = (counted.slice(0, blocks * experts), counted.slice(blocks * experts, experts));
    let chosen = [Arg::Read(op.experts_chosen), int(pairs), int(experts), int(run)];
    let [c0, c1, c2, c3] = chosen;
    let mut launch = |kernel, blocks, args: &[Arg]| {
        device.launch(&Launch { kernel, grid: [blocks, 1, 1], threads: THREADS, shared_bytes: 0, args });
    };
    launch("permute_count", blocks, &[c0, c1, c2, c3, Arg::Write(counts)]);
    launch(
        "permute_scan",
        experts.div_ceil(WARPS),
        &[Arg::Update(counts), int(blocks), int(experts), Arg::Write(totals)],
    );
    launch(
        "permute_place",
        blocks,
        &[
            c0,
            c1,
            c2,
            c3,
            Arg::Read(counts),
            Arg::Read(totals),
            Arg::Write(permutation.offsets),
            Arg::Write(permutation.pairs),
            Arg::Write(permutation.rows),
        ],
    );
}

/// As [`crate::backend::Backend::combine`].
pub(super) fn combine<D: Device>(
    device: &mut D,
    x: Buffer,
    permutation: &Permutation,
    weights: Option<Buffer>,
    top_k: usize,
    width: usize,
    out: Buffer,
) {
    assert_eq!(permutation.rows.len * width, out.len * top_k, "combine of {top_k} rows of {width}");
    assert_eq!((x.len, x.dtype), (permutation.rows.len * width, out.dtype), "combine of rows of {width}");
    device.launch(&Launch {
        kernel: kernel!(x.dtype, "combine"),
        grid: [permutation.rows.len / top_k, 1, 1],
        threads: COMBINE_THREADS,
        shared_bytes: 0,
        args: &[
            Arg::Read(x),
            Arg::Read(permutation.rows),
            read_or_null(weights),
            int(top_k),
            int(width),
            Arg::Write(out),
        ],
    });
}

/// As the leaf of [`crate::backend::Backend`].
#[allow(clippy::too_many_arguments, reason = "the leaf's signature")]
pub(super) fn combine_backward<D: Device>(
    device: &mut D,
    d_out: Buffer,
    x: Buffer,
    permutation: &Permutation,
    weights: Buffer,
    top_k: usize,
    width: usize,
    d_x: Buffer,
    d_weights: Buffer,
) {
    let pairs = permutation.rows.len;
    assert_eq!((weights.len, d_weights.len), (pairs, pairs), "combine_backward of {top_k} rows");
    assert_eq!((x.len, d_x.len, d_out.len * top_k), (pairs * width, x.len, x.len), "combine_backward of {width}");
    assert_eq!((x.dtype, x.dtype), (d_out.dtype, d_x.dtype), "combine_backward of one type");
    device.launch(&Launch {
        kernel: kernel!(x.dtype, "combine_backward"),
        grid: [pairs.div_ceil(WARPS), 1, 1],
        threads: THREADS,
        shared_bytes: 0,
        args: &[
            Arg::Read(d_out),
            Arg::Read(x),
            Arg::Read(permutation.rows),
            Arg::Read(weights),
            int(pairs),
            int(top_k),
            int(width),
            Arg::Write(d_x),
            Arg::Write(d_weights),
        ],
    });
}
