//! The gated delta rule by chunks. Kernels: `cuda/delta_*.cu`, whose headers have the formulas. What needs no state is computed of all
//! chunks at once, and only the states go along a sequence's chunks; what one kernel leaves for the next is in the operation's scratch.

use arl_kernels::constants::delta::{
    CHUNK, CHUNK_STRIDE, COLUMNS, COLUMNS_STRIDE, GATE_TOKENS, MOST_KEY_BYTES, MOST_KEY_DIM, PADDING, THREADS,
};
use arl_kernels::constants::{conv, gated_norm};
use arl_model::DeltaConfig;

use super::device::{Arg, Device, Launch, int, kernel, long};
use super::elementwise::add_parts;
use crate::backend::{Buffer, DType, DeltaHeads, GatedDelta};

const _: () = assert!(GatedDelta::CHUNK == CHUNK, "the chunks of the kernels");
const _: () = assert!(MOST_KEY_BYTES == 2 * MOST_KEY_DIM, "the largest key head in 16 bits");

const WARPS: usize = THREADS / 32;

/// What the kernels have no form for, with activations of a type; `None`: nothing.
pub(super) fn refused(delta: DeltaConfig, activations: DType) -> Option<String> {
    let most = MOST_KEY_BYTES / activations.bytes();
    let sizes = [
        ("linear_key_head_dim", delta.linear_key_head_dim, most),
        ("linear_value_head_dim", delta.linear_value_head_dim, gated_norm::MOST_DIM),
        ("linear_conv_kernel_dim", delta.linear_conv_kernel_dim, conv::TAPS),
    ];
    let (name, size, most) = sizes.into_iter().find(|(_, size, most)| size > most)?;
    let of = if activations == DType::F32 { "float32" } else { "16 bits" };
    Some(format!("{name} is {size}; in {of} at most {most} is possible"))
}

/// Places of chunks, of which each sequence has as many as it needs (`first_slot` in `delta.cuh`).
fn places(tokens: usize, sequences: usize) -> usize {
    tokens / CHUNK + sequences
}

/// Blocks of the backward pass of the gates, for each head.
fn gate_parts(tokens: usize) -> usize {
    tokens.div_ceil(GATE_TOKENS)
}

/// Elements of the first `len`, with what keeps the next ones at a multiple of 64 bytes.
fn room(len: usize) -> usize {
    len.next_multiple_of(16)
}

/// The scratch of the forward pass, f32.
struct Known {
    /// `[value, T]`: logarithm of the decay, strength of the write.
    g: Buffer,
    beta: Buffer,
    /// `[key, T]`: one over the lengths of queries and keys as they came.
    query_factors: Buffer,
    key_factors: Buffer,
    /// `[value, T]`: the decay from before the chunk to the token, and from the token to the chunk's end.
    from_start: Buffer,
    to_end: Buffer,
    /// `[places, value, CHUNK, CHUNK]`: the decays between two tokens, and the inverse.
    decays: Buffer,
    inverses: Buffer,
    /// `[places, value, K, V]`: the states before chunks.
    before: Buffer,
    /// `[T, value, V]`: what is written.
    written: Buffer,
}

/// What the backward pass has besides, f32.
struct Gradients {
    /// As [`Known::written`] and [`Known::before`].
    d_written: Buffer,
    d_after: Buffer,
    /// `[T, key, K]`: of queries and keys of unit length.
    d_queries: Buffer,
    d_keys: Buffer,
    /// `[value, T]`.
    d_g: Buffer,
    d_beta: Buffer,
    /// `[parts, value]`.
    of_log: Buffer,
    of_bias: Buffer,
}

/// Lengths of the gates' buffers, the first of [`Known`].
fn gate_sizes(heads: DeltaHeads, tokens: usize) -> [usize; 4] {
    let (values, keys) = (heads.value * tokens, heads.key * tokens);
    [values, values, keys, keys]
}

/// Lengths of the buffers of [`Known`] behind those of the gates.
fn known_sizes(heads: DeltaHeads, tokens: usize, sequences: usize) -> [usize; 6] {
    let (places, values) = (places(tokens, sequences), heads.value * tokens);
    let square = places * heads.value * CHUNK * CHUNK;
    [values, values, square, square, places * heads.state(), tokens * heads.value_columns()]
}

/// Lengths of the buffers of [`Gradients`].
fn gradient_sizes(heads: DeltaHeads, tokens: usize, sequences: usize) -> [usize; 8] {
    let (values, keys) = (heads.value * tokens, tokens * heads.key_columns());
    let (states, parts) = (places(tokens, sequences) * heads.state(), gate_parts(tokens) * heads.value);
    [tokens * heads.value_columns(), states, keys, keys, values, values, parts, parts]
}

/// Elements of scratch of one token a sequence.
pub(crate) fn step_scratch(heads: DeltaHeads, tokens: usize) -> usize {
    gate_sizes(heads, tokens).into_iter().map(room).sum()
}

/// Elements of scratch of the forward pass.
pub(crate) fn forward_scratch(heads: DeltaHeads, tokens: usize, sequences: usize) -> usize {
    step_scratch(heads, tokens) + known_sizes(heads, tokens, sequences).into_iter().map(room).sum::<usize>()
}

/// Elements of scratch of the backward pass.
pub(crate) fn backward_scratch(heads: DeltaHeads, tokens: usize, sequences: usize) -> usize {
    forward_scratch(heads, tokens, sequences)
        + gradient_sizes(heads, tokens, sequences).into_iter().map(room).sum::<usize>()
}

/// The scratch from `first` on, cut into buffers of these lengths.
fn cut<const N: usize>(scratch: Buffer, first: usize, sizes: [usize; N]) -> [Buffer; N] {
    assert!(scratch.offset.is_multiple_of(16) && scratch.dtype == DType::F32, "a scratch at a multiple of 16 bytes");
    let mut next = first;
    sizes.map(|len| {
        let buffer = scratch.slice(next, len);
        next += room(len);
        buffer
    })
}

impl Known {
    fn of(op: &GatedDelta) -> Known {
        let [g, beta, query_factors, key_factors] = cut(op.scratch, 0, gate_sizes(op.heads, op.tokens));
        let sizes = known_sizes(op.heads, op.tokens, op.sequences.count);
        let [from_start, to_end, decays, inverses, before, written] =
            cut(op.scratch, step_scratch(op.heads, op.tokens), sizes);
        Known { g, beta, query_factors, key_factors, from_start, to_end, decays, inverses, before, written }
    }
}

impl Gradients {
    fn of(op: &GatedDelta) -> Gradients {
        let first = forward_scratch(op.heads, op.tokens, op.sequences.count);
        let sizes = gradient_sizes(op.heads, op.tokens, op.sequences.count);
        let [d_written, d_after, d_queries, d_keys, d_g, d_beta, of_log, of_bias] = cut(op.scratch, first, sizes);
        Gradients { d_written, d_after, d_queries, d_keys, d_g, d_beta, of_log, of_bias }
    }
}

/// Bytes of shared memory of a chunk's rows of queries or keys.
fn row_bytes(op: &GatedDelta) -> usize {
    let size = op.qkv.dtype.bytes();
    CHUNK * (op.heads.key_dim.next_multiple_of(PADDING) * size + 16)
}

const SQUARE: usize = CHUNK * CHUNK_STRIDE;
const TILE: usize = CHUNK * COLUMNS_STRIDE;

/// Elements of f32 of a block's columns of a state.
fn state_floats(op: &GatedDelta) -> usize {
    op.heads.key_dim.next_multiple_of(PADDING) * COLUMNS_STRIDE
}

/// The factor on a query of unit length.
fn scale(heads: DeltaHeads) -> Arg {
    Arg::Float(1.0 / (heads.key_dim as f32).sqrt())
}

fn check(op: &GatedDelta) {
    let (heads, tokens) = (op.heads, op.tokens);
    assert_eq!(heads.value % heads.key, 0, "value heads are a multiple of key heads");
    assert_eq!(op.qkv.len, tokens * heads.channels(), "queries, keys and values of {tokens} tokens");
    let types = [op.gates.buffer, op.a_log, op.dt_bias].map(|buffer| buffer.dtype);
    assert_eq!(types, [op.qkv.dtype; 3], "a delta rule of one type");
    let most = MOST_KEY_BYTES / op.qkv.dtype.bytes();
    assert!(heads.key_dim.next_multiple_of(PADDING) <= most, "key heads of {}, at most {most}", heads.key_dim);
}

/// `DELTA_SHAPE` of the kernels.
fn shape(op: &GatedDelta) -> [Arg; 7] {
    let DeltaHeads { key, value, key_dim, value_dim } = op.heads;
    let sizes = [op.sequences.count, op.tokens, key, value, key_dim, value_dim];
    let [count, tokens, key, value, key_dim, value_dim] = sizes.map(int);
    [Arg::Read(op.sequences.cu_seqlens), count, tokens, key, value, key_dim, value_dim]
}

/// Queues a kernel whose arguments are `before`, the shape, and `behind`.
fn launch<D: Device>(
    device: &mut D,
    op: &GatedDelta,
    kernel: &'static str,
    (blocks, shared_bytes): (usize, usize),
    (before, behind): (&[Arg], &[Arg]),
) {
    let args = [before, &shape(op), behind].concat();
    device.launch(&Launch { kernel, grid: [blocks, 1, 1], threads: THREADS, shared_bytes, args: &args });
}

fn gates<D: Device>(device: &mut D, op: &GatedDelta, known: [Buffer; 4]) {
    let inputs = [
        Arg::Read(op.qkv),
        Arg::Read(op.gates.buffer),
        long(op.gates.stride),
        Arg::Read(op.a_log),
        Arg::Read(op.dt_bias),
    ];
    let name = kernel!(op.qkv.dtype, "gated_delta_gates");
    launch(device, op, name, (op.tokens.div_ceil(WARPS), 0), (&inputs, &known.map(Arg::Write)));
}

/// Blocks of the passes along the chunks.
fn parts(op: &GatedDelta) -> usize {
    op.sequences.count * op.heads.value * op.heads.value_dim.div_ceil(COLUMNS)
}

/// Shared memory of the passes along the chunks.
fn states_bytes(op: &GatedDelta) -> usize {
    4 * (SQUARE + state_floats(op) + TILE + 3 * CHUNK) + row_bytes(op)
}

/// All of [`Known`]; `states` gets those after each sequence.
fn known<D: Device>(device: &mut D, op: &GatedDelta, states: Option<Buffer>) -> Known {
    let known = Known::of(op);
    let (dtype, places) = (op.qkv.dtype, places(op.tokens, op.sequences.count));
    gates(device, op, [known.g, known.beta, known.query_factors, known.key_factors]);
    let inputs = [op.qkv, known.g, known.beta, known.key_factors].map(Arg::Read);
    let outputs = [known.decays, known.inverses, known.from_start, known.to_end].map(Arg::Write);
    let room = (places * op.heads.key, 4 * (3 * SQUARE + 3 * CHUNK) + row_bytes(op));
    launch(device, op, kernel!(dtype, "gated_delta_chunks"), room, (&inputs, &outputs));
    let inputs = along(op, &known);
    let outputs = [Arg::Write(known.written), Arg::Write(known.before), states.map_or(Arg::Null, Arg::Write)];
    let room = (parts(op), states_bytes(op));
    launch(device, op, kernel!(dtype, "gated_delta_states"), room, (&inputs, &outputs));
    known
}

/// What both passes along the chunks read.
fn along(op: &GatedDelta, known: &Known) -> [Arg; 6] {
    [op.qkv, known.beta, known.key_factors, known.from_start, known.to_end, known.inverses].map(Arg::Read)
}

/// As [`crate::backend::DeltaRule::gated_delta`].
pub(super) fn forward<D: Device>(device: &mut D, op: &GatedDelta, out: Buffer, states: Option<Buffer>) {
    check(op);
    assert_eq!(out.len, op.tokens * op.heads.value_columns(), "gated_delta of {} tokens", op.tokens);
    let state = op.sequences.count * op.heads.state();
    assert!(states.is_none_or(|states| states.len == state), "a state a sequence");
    let known = known(device, op, states);
    let inputs =
        [op.qkv, known.query_factors, known.key_factors, known.decays, known.from_start, known.before, known.written];
    let room = (
        places(op.tokens, op.sequences.count) * op.heads.value,
        4 * (SQUARE + 3 * CHUNK) + row_bytes(op) + row_bytes(op).max(4 * (TILE + state_floats(op))),
    );
    let name = kernel!(op.qkv.dtype, "gated_delta_outputs");
    launch(device, op, name, room, (&inputs.map(Arg::Read), &[scale(op.heads), Arg::Write(out)]));
}

/// As [`crate::backend::DeltaRule::gated_delta_backward`].
pub(super) fn backward<D: Device>(device: &mut D, op: &GatedDelta, d_out: Buffer, d_a_log: Buffer, d_dt_bias: Buffer) {
    check(op);
    assert_eq!(d_out.len, op.tokens * op.heads.value_columns(), "gated_delta_backward of {} tokens", op.tokens);
    let (known, d) = (known(device, op, None), Gradients::of(op));
    let (dtype, heads, places) = (op.qkv.dtype, op.heads, places(op.tokens, op.sequences.count));
    let Known { query_factors, key_factors, beta, decays, from_start, to_end, written, before, .. } = known;

    let inputs = [op.qkv, d_out, query_factors, key_factors, decays, from_start].map(Arg::Read);
    let outputs = [scale(heads), Arg::Write(d.d_written), Arg::Write(d.d_after)];
    let shared_bytes = 4 * (SQUARE + 3 * CHUNK) + row_bytes(op) + row_bytes(op).max(4 * TILE);
    let room = (places * heads.value, shared_bytes);
    launch(device, op, kernel!(dtype, "gated_delta_local"), room, (&inputs, &outputs));

    let outputs = [d.d_written, d.d_after].map(Arg::Update);
    let room = (parts(op), states_bytes(op));
    launch(device, op, kernel!(dtype, "gated_delta_states_backward"), room, (&along(op, &known), &outputs));

    let gradients = [d.d_queries, d.d_keys, d.d_g, d.d_beta];
    let inputs = [d_out, query_factors, key_factors, beta, decays, written, d.d_written].map(Arg::Read);
    let inputs = [&[Arg::Update(op.qkv)], &inputs[..]].concat();
    let outputs = [&[scale(heads)], &gradients.map(Arg::Write)[..]].concat();
    let room = (places * heads.key, 4 * (12 * CHUNK + 3 * TILE) + 2 * row_bytes(op));
    launch(device, op, kernel!(dtype, "gated_delta_within"), room, (&inputs, &outputs));

    let inputs = [d_out, query_factors, key_factors, beta, from_start, to_end, written, d.d_written, before, d.d_after];
    let inputs = [&[Arg::Update(op.qkv)], &inputs.map(Arg::Read)[..]].concat();
    let outputs = [&[scale(heads)], &gradients.map(Arg::Update)[..]].concat();
    let room = (places * heads.key, 4 * (5 * TILE + 13 * CHUNK + WARPS));
    launch(device, op, kernel!(dtype, "gated_delta_between"), room, (&inputs, &outputs));

    let inputs = [
        Arg::Update(op.gates.buffer),
        long(op.gates.stride),
        Arg::Read(op.a_log),
        Arg::Read(op.dt_bias),
        Arg::Read(known.g),
        Arg::Read(beta),
        Arg::Read(d.d_g),
        Arg::Read(d.d_beta),
    ];
    let (outputs, parts) = ([d.of_log, d.of_bias].map(Arg::Write), gate_parts(op.tokens));
    let name = kernel!(dtype, "gated_delta_gates_backward");
    launch(device, op, name, (parts * heads.value, 0), (&inputs, &outputs));
    add_parts(device, d.of_log, parts, d_a_log);
    add_parts(device, d.of_bias, parts, d_dt_bias);
}

/// As [`crate::backend::DeltaRule::gated_delta_step`].
pub(super) fn step<D: Device>(device: &mut D, op: &GatedDelta, states: Buffer, out: Buffer) {
    check(op);
    assert_eq!(out.len, op.tokens * op.heads.value_columns(), "gated_delta_step of {} sequences", op.tokens);
    assert_eq!(states.len, op.tokens * op.heads.state(), "gated_delta_step of {} sequences", op.tokens);
    let known = cut(op.scratch, 0, gate_sizes(op.heads, op.tokens));
    gates(device, op, known);
    let inputs = [&[Arg::Read(op.qkv)], &known.map(Arg::Read)[..]].concat();
    let outputs = [scale(op.heads), Arg::Update(states), Arg::Write(out)];
    let blocks = op.tokens * op.heads.value * op.heads.value_dim.div_ceil(COLUMNS);
    launch(device, op, kernel!(op.qkv.dtype, "gated_delta_step"), (blocks, 0), (&inputs, &outputs));
}
