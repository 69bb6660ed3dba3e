//! Attention by the device's own library, cuDNN: how shapes are rounded up so that plans are few, the layout of the
//! scratch, and the kernels before and after (`cuda/attention_packed.cu`). Knows nothing of how the library is called.

use arl_cudnn::{DETERMINISTIC_BACKWARD, ENGINE_BYTES, Pass, Shape, Type, backward_workspace};
pub(super) use arl_kernels::constants::attention_packed::OPERANDS;
use arl_kernels::constants::attention_packed::THREADS;

use super::attention::aligned;
use super::device::{Arg, Device, Launch, int, long};
use crate::backend::{Attention, AttentionLibrary, Buffer, DType, Heads, Rows};

/// The first operand that the backward pass alone has.
const GRADIENTS: usize = 5;

/// Every part of the scratch begins at a multiple of this many bytes.
const ALIGNMENT: usize = 256;
/// Scratch of the forward pass, of [`crate::backend::Pool::Scratch`].
pub(super) const FORWARD_BYTES: usize = 4 << 20;

/// What the library makes a plan for, in both passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PackedShape {
    /// Query heads.
    pub query: usize,
    /// Key and value heads.
    pub key_value: usize,
    /// Elements of a head.
    pub dim: usize,
    /// Keys that a query may see, itself included; `None`: all before it.
    pub window: Option<usize>,
    /// Bits of the factor on the products of queries and keys.
    pub scale: u32,
    /// Places for sequences: their number rounded up. The others are empty.
    pub sequences: usize,
    /// Tokens of the longest sequence, rounded up.
    pub max_len: usize,
    /// Tokens of all, rounded up.
    pub tokens: usize,
    /// Elements from one token to the next, by operand.
    pub strides: [usize; OPERANDS],
}

/// A pass for the library to queue.
#[derive(Clone, Copy, Debug)]
pub struct PackedAttention {
    /// The plan's.
    pub shape: PackedShape,
    /// Whether it is the backward pass.
    pub backward: bool,
    /// From the first token on; the forward pass has the first five.
    pub operands: [Buffer; OPERANDS],
    /// i32 `[sequences]`.
    pub lengths: Buffer,
    /// i32 `[sequences + 1]` each: the first element of every place in an operand, and what follows the last.
    pub offsets: [Buffer; OPERANDS],
    /// For the library, as it likes.
    pub workspace: Buffer,
}

impl PackedAttention {
    /// What is read, and what is written.
    pub fn uses(&self) -> (Vec<Buffer>, Vec<Buffer>) {
        let (inputs, outputs) = if self.backward {
            ([0, 1, 2, 3, 4, 5].as_slice(), [6, 7, 8].as_slice())
        } else {
            ([0, 1, 2].as_slice(), [3, 4].as_slice())
        };
        let operands = |numbers: &[usize]| numbers.iter().map(|i| self.operands[*i]).collect::<Vec<_>>();
        let count = if self.backward { OPERANDS } else { GRADIENTS };
        let read = operands(inputs).into_iter().chain([self.lengths]).chain(self.offsets[..count].iter().copied());
        (read.collect(), operands(outputs).into_iter().chain([self.workspace]).collect())
    }
}

/// `tokens` rounded up to a quarter of its power of two, so that there are few plans and little room is lost.
fn rounded(tokens: usize) -> usize {
    tokens.next_multiple_of((tokens.next_power_of_two() / 8).max(1024))
}

/// Queries of a block of the library's kernels.
const TILE: usize = 128;

/// How many times as many blocks as have work the library may launch. Where sequences are alike, rounding up makes it four
/// at most.
const MOST_BLOCKS: usize = 8;

impl AttentionLibrary {
    /// Whether most of the library's blocks would find nothing to do: it launches for every place of a sequence as many as
    /// the longest sequence needs, and so for one long and many short ones thousands. This project's own kernels, which then
    /// compute, launch at most twice as many as have work.
    pub fn is_sparse(&self) -> bool {
        let launched = self.sequences.next_power_of_two() * self.max_len.next_power_of_two().div_ceil(TILE);
        launched > MOST_BLOCKS * (self.tokens / TILE + self.sequences)
    }
}

impl PackedShape {
    /// The shape of an operation whose gradients are laid out as in the step: that of the output without gaps, those of
    /// queries, keys and values in one row. `None`: the library is not asked.
    pub(super) fn of(op: &Attention) -> Option<Self> {
        let Attention { q, k, v, out, heads, sequences, .. } = *op;
        let inputs = [q, k, v, out];
        let served = inputs.iter().all(|rows| rows.buffer.dtype == DType::Bf16 && aligned(*rows));
        let asked = AttentionLibrary {
            heads,
            window: op.window,
            scale: op.scale,
            tokens: op.tokens(),
            sequences: sequences.count,
            max_len: sequences.max_len,
            strides: inputs.map(|rows| rows.stride),
        };
        // The library's plans are of causal attention.
        if !served || !op.causal || asked.is_sparse() {
            return None;
        }
        Self::new(&asked)
    }

    pub(super) fn new(asked: &AttentionLibrary) -> Option<Self> {
        let Heads { query, key_value, dim } = asked.heads;
        let [q, k, v, out] = asked.strides;
        let width = key_value * dim;
        let strides = [q, k, v, out, query, query * dim, query * dim + 2 * width, width, width];
        let max_len = asked.max_len.next_power_of_two().max(128);
        let shape = PackedShape {
            query,
            key_value,
            dim,
            window: asked.window.filter(|window| *window < max_len),
            scale: asked.scale.to_bits(),
            sequences: asked.sequences.next_power_of_two(),
            max_len,
            tokens: rounded(asked.tokens),
            strides,
        };
        // Offsets are ints.
        let widest = strides.into_iter().max().unwrap_or(0);
        let countable = shape.tokens.checked_mul(widest).is_some_and(|last| i32::try_from(last).is_ok());
        let roomy = Parts::forward(&shape).bytes <= FORWARD_BYTES;
        (matches!(dim, 64 | 128) && asked.tokens > 0 && countable && roomy).then_some(shape)
    }

    /// The shape in the library's terms, on a GPU of this compute capability.
    pub fn of_library(&self, pass: Pass, capability: (i32, i32)) -> Shape {
        // Sizes were checked to be ints.
        let [q, k, v, out, _, d_out, d_q, d_k, d_v] = self.strides.map(|stride| stride as i64);
        Shape {
            pass,
            dtype: Type::Bf16,
            capability: 10 * capability.0 + capability.1,
            deterministic: i32::from(DETERMINISTIC_BACKWARD && pass == Pass::Backward),
            scale: f32::from_bits(self.scale),
            sequences: self.sequences as i64,
            max_len: self.max_len as i64,
            tokens: self.tokens as i64,
            query_heads: self.query as i64,
            key_value_heads: self.key_value as i64,
            dim: self.dim as i64,
            window: self.window.map_or(0, |window| window as i64),
            q_stride: q,
            k_stride: k,
            v_stride: v,
            out_stride: out,
            d_out_stride: d_out,
            d_q_stride: d_q,
            d_k_stride: d_k,
            d_v_stride: d_v,
        }
    }

    /// Bytes of workspace that the leaf has for a plan.
    pub fn workspace_bytes(&self, pass: Pass) -> usize {
        let PackedShape { query, key_value, dim, tokens, .. } = *self;
        match pass {
            Pass::Forward => ENGINE_BYTES,
            Pass::Backward => backward_bytes(Heads { query, key_value, dim }, tokens),
        }
    }
}

/// f32 elements of scratch of attention's backward pass where the device's own library may compute it, over micro-batches
/// of at most so many tokens and sequences.
pub fn attention_library_scratch(heads: Heads, tokens: usize, sequences: usize) -> usize {
    // This project's own kernels need one number a query and head, which is less.
    Parts::backward(heads, rounded(tokens), sequences.next_power_of_two()).bytes / DType::F32.bytes()
}

/// Bytes of the library's workspace in the backward pass. The queries' gradient is in rows of all three.
fn backward_bytes(Heads { query, key_value, dim }: Heads, tokens: usize) -> usize {
    backward_workspace(tokens, query, key_value, dim, (query + 2 * key_value) * dim)
}

/// The layout of the scratch: first bytes.
struct Parts {
    offsets: usize,
    d_k: usize,
    d_v: usize,
    workspace: usize,
    bytes: usize,
}

impl Parts {
    fn forward(shape: &PackedShape) -> Self {
        Self::lay(shape.sequences, GRADIENTS, 0, ENGINE_BYTES)
    }

    fn backward(heads: Heads, tokens: usize, sequences: usize) -> Self {
        let gradient = tokens * heads.key_value * heads.dim * DType::Bf16.bytes();
        Self::lay(sequences, OPERANDS, gradient, backward_bytes(heads, tokens))
    }

    fn lay(sequences: usize, operands: usize, gradient_bytes: usize, workspace_bytes: usize) -> Self {
        let mut end = 0;
        let mut take = |bytes: usize| {
            let start = end;
            end = (start + bytes).next_multiple_of(ALIGNMENT);
            start
        };
        take(sequences * DType::I32.bytes());
        let offsets = take(operands * (sequences + 1) * DType::I32.bytes());
        let (d_k, d_v) = (take(gradient_bytes), take(gradient_bytes));
        let workspace = take(workspace_bytes);
        // The scratch itself may begin anywhere that is a multiple of the arena's alignment.
        Parts { offsets, d_k, d_v, workspace, bytes: end + ALIGNMENT }
    }
}

/// `len` elements from byte `start` of a scratch on, whose parts are aligned.
fn part(scratch: Buffer, start: usize, dtype: DType, len: usize) -> Buffer {
    let base = scratch.offset.next_multiple_of(ALIGNMENT);
    let buffer = Buffer { offset: base + start, len, dtype, ..scratch };
    let end = scratch.offset + scratch.bytes();
    assert!(buffer.offset + buffer.bytes() <= end, "{len} of {dtype:?} at {start} of a scratch of {}", scratch.bytes());
    buffer
}

/// Queues what describes the sequences to the library; lengths and offsets.
fn describe<D: Device>(
    device: &mut D,
    op: &Attention,
    shape: &PackedShape,
    operands: usize,
    scratch: Buffer,
    parts: &Parts,
) -> (Buffer, [Buffer; OPERANDS]) {
    let places = shape.sequences + 1;
    let lengths = part(scratch, 0, DType::I32, shape.sequences);
    let all = part(scratch, parts.offsets, DType::I32, operands * places);
    let mut args = vec![Arg::Read(op.sequences.cu_seqlens), int(op.sequences.count), int(shape.sequences)];
    args.extend(shape.strides.map(int));
    args.extend([int(operands), Arg::Write(lengths), Arg::Write(all)]);
    device.launch(&Launch {
        kernel: "attention_offsets",
        grid: [places.div_ceil(THREADS), 1, 1],
        threads: THREADS,
        shared_bytes: 0,
        args: &args,
    });
    let offsets = std::array::from_fn(|i| if i < operands { all.slice(i * places, places) } else { all.slice(0, 0) });
    (lengths, offsets)
}

/// As [`crate::backend::Backend::expect_attention`].
pub(super) fn expect<D: Device>(device: &mut D, asked: &[AttentionLibrary]) {
    let served = asked.iter().filter(|asked| !asked.is_sparse()).filter_map(PackedShape::new);
    served.for_each(|shape| device.expect_attention(&shape));
}

/// The forward pass, where the library has a plan. It writes statistics `[T, query]`.
pub(super) fn forward<D: Device>(device: &mut D, op: &Attention, scratch: Buffer) -> bool {
    let Some(shape) = PackedShape::of(op) else { return false };
    if device.plan_attention(&shape).is_err() {
        return false;
    }
    let parts = Parts::forward(&shape);
    let (lengths, offsets) = describe(device, op, &shape, GRADIENTS, scratch, &parts);
    let none = op.log_sum_exp.slice(0, 0);
    let operands = [op.q.buffer, op.k.buffer, op.v.buffer, op.out.buffer, op.log_sum_exp, none, none, none, none];
    let workspace = part(scratch, parts.workspace, DType::F32, ENGINE_BYTES / DType::F32.bytes());
    device.packed_attention(&PackedAttention { shape, backward: false, operands, lengths, offsets, workspace });
    true
}

/// The backward pass, where the forward pass was the library's: by the same rule.
pub(super) fn backward<D: Device>(device: &mut D, op: &Attention, d_out: Rows, d_qkv: Buffer, scratch: Buffer) -> bool {
    let Some(shape) = PackedShape::of(op) else { return false };
    if device.plan_attention(&shape).is_err() {
        return false;
    }
    let PackedShape { query, key_value, dim, .. } = shape;
    let (width, row) = (key_value * dim, (query + 2 * key_value) * dim);
    assert_eq!(d_out.stride, query * dim, "the output's gradient has no gaps");
    let parts = Parts::backward(op.heads, shape.tokens, shape.sequences);
    let (lengths, offsets) = describe(device, op, &shape, OPERANDS, scratch, &parts);
    let count = op.tokens();
    let d_k = part(scratch, parts.d_k, DType::Bf16, count * width);
    let d_v = part(scratch, parts.d_v, DType::Bf16, count * width);
    let operands =
        [op.q.buffer, op.k.buffer, op.v.buffer, op.out.buffer, op.log_sum_exp, d_out.buffer, d_qkv, d_k, d_v];
    let bytes = shape.workspace_bytes(Pass::Backward);
    let workspace = part(scratch, parts.workspace, DType::F32, bytes / DType::F32.bytes());
    device.packed_attention(&PackedAttention { shape, backward: true, operands, lengths, offsets, workspace });
    let packs = 2 * width / 8;
    device.launch(&Launch {
        kernel: "attention_place_bf16",
        grid: [(count * packs).div_ceil(THREADS), 1, 1],
        threads: THREADS,
        shared_bytes: 0,
        args: &[
            Arg::Read(d_k),
            Arg::Read(d_v),
            int(width),
            Arg::Update(d_qkv),
            long(row),
            int(query * dim),
            long(count),
        ],
    });
    true
}
