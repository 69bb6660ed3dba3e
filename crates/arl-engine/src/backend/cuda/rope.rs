//! Per-head norm and rotary embedding. Kernels: `cuda/rope.cu`.

use arl_kernels::constants::rope::THREADS;

use super::PARTS;
use super::device::{Arg, Device, Launch, int, kernel, read_or_null, scratch_of};
use super::elementwise::add_parts;
use crate::backend::{Angles, Buffer, DType, NormRope, NormWeight};

const WARPS: usize = THREADS / 32;
/// Rounds of heads that a block takes at least, before it sums what its lanes have.
const ROUNDS: usize = 4;

/// Heads that a block has at once, if they are read in packs; else it has fewer, and repeats more often.
fn heads_at_once(dim: usize, dtype: DType) -> usize {
    let pack = 16 / dtype.bytes();
    let lanes = (dim / 2).div_ceil(pack).next_power_of_two();
    if (dim / 2).is_multiple_of(pack) && lanes <= 32 { THREADS / lanes } else { WARPS }
}

fn check(op: &NormRope, qkv: Buffer) {
    let heads = op.heads;
    assert!(heads.dim.is_multiple_of(2) && heads.dim <= super::MOST_HEAD, "rotary embedding of heads of {}", heads.dim);
    let width = (heads.query + 2 * heads.key_value) * heads.dim;
    assert!(op.rotary.is_multiple_of(2) && op.rotary <= heads.dim, "{} of {} rotated", op.rotary, heads.dim);
    assert_eq!(qkv.len, op.tokens * width, "queries, keys and values of {} tokens", op.tokens);
    let axes = if op.angles.axes.is_some() { 3 } else { 1 };
    assert_eq!(op.angles.rows.len, axes * op.tokens, "angles of {} tokens", op.tokens);
}

/// `ANGLES` of the kernels.
fn angles(Angles { cos, sin, rows, axes }: Angles) -> [Arg; 4] {
    [Arg::Read(cos), Arg::Read(sin), Arg::Read(rows), read_or_null(axes)]
}

/// The weights of both norms, and what is added to them.
fn weights(query: NormWeight, key: NormWeight) -> [Arg; 3] {
    assert_eq!(query.offset.to_bits(), key.offset.to_bits(), "norms of queries and keys of one kind");
    [Arg::Read(query.weight), Arg::Read(key.weight), Arg::Float(query.offset)]
}

/// As [`crate::backend::Backend::norm_rope`].
pub(super) fn norm_rope<D: Device>(device: &mut D, op: &NormRope, qkv: Buffer, qk: Buffer) {
    check(op, qkv);
    let heads = op.heads;
    let rotated = heads.query + heads.key_value;
    assert_eq!((qk.len, qk.dtype), (op.tokens * rotated * heads.dim, qkv.dtype), "norm_rope into another shape");
    let ([query, key, offset], epsilon) = match op.norm {
        Some((query, key, epsilon)) => (weights(query, key), epsilon),
        None => ([Arg::Null, Arg::Null, Arg::Float(0.0)], 0.0),
    };
    let [cos, sin, rows, axes] = angles(op.angles);
    device.launch(&Launch {
        kernel: kernel!(qkv.dtype, "norm_rope"),
        grid: [(op.tokens * rotated).div_ceil(heads_at_once(heads.dim, qkv.dtype)), 1, 1],
        threads: THREADS,
        shared_bytes: 0,
        args: &[
            Arg::Read(qkv),
            Arg::Write(qk),
            query,
            key,
            offset,
            Arg::Float(epsilon),
            cos,
            sin,
            rows,
            axes,
            int(op.tokens),
            int(heads.query),
            int(heads.key_value),
            int(heads.dim),
            int(op.rotary),
        ],
    });
}

/// As [`crate::backend::Backend::norm_rope_backward`].
pub(super) fn norm_rope_backward<D: Device>(
    device: &mut D,
    scratch: Buffer,
    op: &NormRope,
    qkv: Buffer,
    d_qkv: Buffer,
    d_norm: Option<(Buffer, Buffer)>,
) {
    check(op, qkv);
    let heads = op.heads;
    assert_eq!((d_qkv.len, d_qkv.dtype), (qkv.len, qkv.dtype), "the gradient is laid out as the values");
    assert_eq!(op.norm.is_some(), d_norm.is_some(), "gradients of the norms, if there are norms");
    let at_once = heads_at_once(heads.dim, qkv.dtype);
    let rotated = op.tokens * (heads.query + heads.key_value);
    let sizes = [op.tokens, heads.query, heads.key_value, heads.dim, op.rotary];
    let [tokens, query, key_value, dim, rotary] = sizes.map(int);
    let [cos, sin, rows, axes] = angles(op.angles);
    let (Some((query_norm, key_norm, epsilon)), Some((d_query_norm, d_key_norm))) = (op.norm, d_norm) else {
        device.launch(&Launch {
            kernel: kernel!(qkv.dtype, "rope_backward"),
            grid: [rotated.div_ceil(at_once), 1, 1],
            threads: THREADS,
            shared_bytes: 0,
            args: &[Arg::Update(d_qkv), cos, sin, rows, axes, tokens, query, key_value, dim, rotary],
        });
        return;
    };
    // The scratch has room for 2 PARTS rows as wide as queries, keys and values. Small parts fill any device evenly.
    let most = PARTS * (heads.query + 2 * heads.key_value).min(8);
    let parts = rotated.div_ceil(at_once * ROUNDS).min(most);
    let of_both = scratch_of(scratch, DType::F32, 2 * parts * heads.dim);
    let of_queries = of_both.slice(0, parts * heads.dim);
    let of_keys = of_both.slice(parts * heads.dim, parts * heads.dim);
    let [query_weight, key_weight, offset] = weights(query_norm, key_norm);
    device.launch(&Launch {
        kernel: kernel!(qkv.dtype, "norm_rope_backward"),
        grid: [parts, 1, 1],
        threads: THREADS,
        shared_bytes: WARPS * heads.dim * DType::F32.bytes(),
        args: &[
            Arg::Read(qkv),
            Arg::Update(d_qkv),
            query_weight,
            key_weight,
            offset,
            Arg::Float(epsilon),
            cos,
            sin,
            rows,
            axes,
            tokens,
            query,
            key_value,
            dim,
            rotary,
            Arg::Write(of_queries),
            Arg::Write(of_keys),
        ],
    });
    add_parts(device, of_queries, parts, d_query_norm);
    add_parts(device, of_keys, parts, d_key_norm);
}
