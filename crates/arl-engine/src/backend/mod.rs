//! The leaf operations that a training step is made of, as a trait that each device implements.
//!
//! A [`Buffer`] is plain data: a place in a pool of the device's memory. It is no slice, because a device's memory need
//! not be the host's. Leaves are asynchronous: they are queued in order and return nothing; the only way to see a value
//! on the host is [`Backend::read_back`]. Shapes are row-major; `T` is the tokens of a micro-batch.

use arl_model::Result;

pub mod cpu;
pub mod cuda;
pub mod plan;
pub mod profile;

/// The type of a buffer's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// 32-bit float.
    F32,
    /// bfloat16: the upper half of an f32.
    Bf16,
    /// 64-bit float; for sums that the host reads.
    F64,
    /// 32-bit integer; ids, positions, row numbers.
    I32,
    /// 16-bit integer; the lower half of a split master weight.
    U16,
}

impl DType {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            DType::F64 => 8,
            DType::F32 | DType::I32 => 4,
            DType::Bf16 | DType::U16 => 2,
        }
    }
}

/// What sort of device a backend computes on; what a plan needs to know of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// The host's processor.
    Cpu,
    /// A CUDA device.
    Cuda,
}

impl DeviceKind {
    /// Bytes of logits at a time where the caller does not say: on a processor what stays near its caches, on a GPU what
    /// makes its products large enough.
    pub(crate) fn default_logits_bytes(self) -> usize {
        match self {
            DeviceKind::Cpu => 32 << 20,
            DeviceKind::Cuda => 1200 << 20,
        }
    }

    /// Refuses a model whose sizes the device's leaves do not have.
    pub(crate) fn check(self, heads: Heads, experts: usize) -> Result<()> {
        match self {
            DeviceKind::Cpu => Ok(()),
            DeviceKind::Cuda => cuda::check(heads, experts),
        }
    }

    /// What a user should know of how a model runs on such a device.
    pub(crate) fn notice(self, heads: Heads, activations: DType) -> Option<String> {
        match self {
            DeviceKind::Cpu => None,
            DeviceKind::Cuda => cuda::notice(heads, activations),
        }
    }

    /// Bytes that the device's leaves need for themselves, over matrices of at most so many columns and micro-batches
    /// of at most so many tokens; its libraries' included.
    pub(crate) fn own_bytes(self, columns: usize, tokens: usize) -> usize {
        match self {
            DeviceKind::Cpu => 0,
            DeviceKind::Cuda => cuda::scratch_bytes(columns, tokens) + cuda::LIBRARY_BYTES,
        }
    }
}

/// Memory that is reserved as one piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pool {
    /// Weights, gradients and optimizer moments: as long as the engine lives.
    State,
    /// Inputs, activations and scratch of one micro-batch.
    Step,
    /// A leaf's own, while it runs: partial sums. See [`Backend::scratch_bytes`].
    Scratch,
    /// Host memory that lasts as long as the engine: masters and moments that are not on the device. Only
    /// [`Backend::transfer`], [`Backend::upload`] and [`Backend::read_back`] reach it, as [`Pool::HostStep`].
    HostState,
    /// Host memory of one micro-batch: activations that are not on the device.
    HostStep,
}

/// A queue of work. Leaves run in order on [`Stream::Compute`], copies to and from host memory beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// All leaves.
    Compute,
    /// Copies to host memory.
    ToHost,
    /// Copies from host memory.
    FromHost,
}

impl Stream {
    /// All of them, in the order of their numbers.
    pub const ALL: [Stream; 3] = [Stream::Compute, Stream::ToHost, Stream::FromHost];
}

/// A point in a stream's work that another stream waits for. It may be recorded again; who waits, waits for the last
/// record that was queued before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event(pub u32);

/// `len` elements of `dtype`, from byte `offset` of `pool` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// The pool it lies in.
    pub pool: Pool,
    /// First byte within the pool; a multiple of the element's size.
    pub offset: usize,
    /// Elements.
    pub len: usize,
    /// Type of the elements.
    pub dtype: DType,
}

impl Buffer {
    /// The part `[start, start + len)`, counted in elements. The caller's indices come from shapes, never from data.
    #[must_use]
    pub fn slice(self, start: usize, len: usize) -> Buffer {
        assert!(start + len <= self.len, "slice [{start}, {start} + {len}) of a buffer of {}", self.len);
        Buffer { offset: self.offset + start * self.dtype.bytes(), len, ..self }
    }

    /// Size in bytes.
    pub fn bytes(self) -> usize {
        self.len * self.dtype.bytes()
    }

    /// The same bytes as elements of another type, which must fill them.
    #[must_use]
    pub fn view(self, dtype: DType) -> Buffer {
        assert!(self.bytes().is_multiple_of(dtype.bytes()), "{self:?} as {dtype:?}");
        Buffer { len: self.bytes() / dtype.bytes(), dtype, ..self }
    }
}

/// Rows of a matrix that lie `stride` elements apart; `buffer` begins at the first element of row 0 and ends with, or
/// after, the last element of the last row.
#[derive(Clone, Copy, Debug)]
pub struct Rows {
    /// From the first element of the first row on.
    pub buffer: Buffer,
    /// Elements from one row's start to the next one's.
    pub stride: usize,
}

/// Which operands of a matrix product are transposed, named as BLAS does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Layout {
    /// `c[m, n] = a[m, k] b[n, k]^T`: a layer's output from its input and its weight.
    Nt,
    /// `c[m, n] = a[m, k] b[k, n]`: the gradient of a layer's input.
    Nn,
    /// `c[m, n] = a[k, m]^T b[k, n]`: the gradient of a layer's weight.
    Tn,
}

/// One matrix product. `a` and `b` may each be f32 or bf16, and `c` either; sums are in f32.
#[derive(Clone, Copy, Debug)]
pub struct Matmul {
    /// Which operands are transposed.
    pub layout: Layout,
    /// Rows of `c`.
    pub m: usize,
    /// Columns of `c`.
    pub n: usize,
    /// Length of the sums.
    pub k: usize,
    /// Left operand as it lies in memory (before transposition).
    pub a: Rows,
    /// Right operand as it lies in memory (before transposition).
    pub b: Rows,
    /// Result.
    pub c: Rows,
    /// Add to `c` (true) or assign it (false).
    pub accumulate: bool,
    /// `[n]`, added to each row of `c`.
    pub bias: Option<Buffer>,
}

/// Matrix products of a mixture of experts: expert `e` owns rows `offsets[e] .. offsets[e + 1]` of the token side.
#[derive(Clone, Copy, Debug)]
pub struct GroupedMatmul {
    /// `Nt`: `c[rows e] = a[rows e] b_e^T`, `Nn`: `c[rows e] = a[rows e] b_e`, `Tn`: `c_e += a[rows e]^T b[rows e]`.
    pub layout: Layout,
    /// Number of experts.
    pub experts: usize,
    /// i32 `[experts + 1]`, ascending, from 0 to `rows`.
    pub offsets: Buffer,
    /// Rows on the token side, all experts together.
    pub rows: usize,
    /// Columns of `c`, and for `Tn` `m` is its rows (both of one expert).
    pub n: usize,
    /// Columns of `a` (for `Tn`: rows of one expert's `c`).
    pub k: usize,
    /// Token side.
    pub a: Rows,
    /// `Nt`, `Nn`: the experts' weights one after the other, `Tn`: token side.
    pub b: Rows,
    /// `Nt`, `Nn`: token side, `Tn`: the experts' gradients one after the other; added to.
    pub c: Rows,
}

/// The sequences that share a micro-batch.
#[derive(Clone, Copy, Debug)]
pub struct Sequences {
    /// i32 `[count + 1]`: sequence `s` is tokens `cu_seqlens[s] .. cu_seqlens[s + 1]`.
    pub cu_seqlens: Buffer,
    /// Number of sequences.
    pub count: usize,
    /// Tokens of the longest one.
    pub max_len: usize,
}

/// The heads of an attention layer.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    /// Query heads.
    pub query: usize,
    /// Key and value heads; a divisor of `query`. Query head `h` reads key head `h / (query / key_value)`.
    pub key_value: usize,
    /// Elements of a head; even.
    pub dim: usize,
}

/// Causal attention within each sequence: `softmax(scale q k^T) v` over keys `j` with `i - window < j <= i`.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    /// Head counts and size.
    pub heads: Heads,
    /// The sequences; no query sees a key of another one.
    pub sequences: Sequences,
    /// Keys that a query may see, itself included; `None`: all before it.
    pub window: Option<usize>,
    /// Factor on `q k^T`.
    pub scale: f32,
    /// `[T, query * dim]`.
    pub q: Rows,
    /// `[T, key_value * dim]`.
    pub k: Rows,
    /// `[T, key_value * dim]`.
    pub v: Rows,
    /// `[T, query * dim]`.
    pub out: Rows,
    /// f32 `[query, T]`: log of the sum of the exponentials of a row's scores, kept for the backward pass.
    pub log_sum_exp: Buffer,
}

/// Per-head RMSNorm of queries and keys (Qwen3), if any, then rotary position embedding:
/// `out[i] = x[i] cos[i] - x[i + d/2] sin[i]`, `out[i + d/2] = x[i + d/2] cos[i] + x[i] sin[i]` for `i < d/2`.
#[derive(Clone, Copy, Debug)]
pub struct NormRope {
    /// Head counts and size.
    pub heads: Heads,
    /// Tokens.
    pub tokens: usize,
    /// Weights `[dim]` of the norms of queries and keys, and their epsilon; `None` where the model has none.
    pub norm: Option<(Buffer, Buffer, f32)>,
    /// f32 `[T, dim / 2]`, attention scaling included.
    pub cos: Buffer,
    /// f32 `[T, dim / 2]`, attention scaling included.
    pub sin: Buffer,
}

/// How a router of experts chooses.
#[derive(Clone, Copy, Debug)]
pub struct Router {
    /// Tokens.
    pub tokens: usize,
    /// Experts to choose from.
    pub experts: usize,
    /// Experts chosen a token.
    pub top_k: usize,
    /// Divide the chosen probabilities by their sum.
    pub normalise: bool,
    /// f32 `[T, experts]`: softmax of the router's logits.
    pub probabilities: Buffer,
    /// i32 `[T, top_k]`: the chosen experts, most probable first, the lower index first among equals.
    pub experts_chosen: Buffer,
    /// f32 `[T, top_k]`: their weights.
    pub weights: Buffer,
}

/// Where each chosen (token, expert) pair stands once pairs are sorted by expert. Pair `p` is slot `p % top_k` of
/// token `p / top_k`; the order within an expert is that of the pairs.
#[derive(Clone, Copy, Debug)]
pub struct Permutation {
    /// i32 `[experts + 1]`.
    pub offsets: Buffer,
    /// i32 `[T * top_k]`: the pair at each sorted row.
    pub pairs: Buffer,
    /// i32 `[T * top_k]`: the sorted row of each pair.
    pub rows: Buffer,
}

/// What the classifier pass reads and writes; `rows` of logits at a time.
#[derive(Clone, Copy, Debug)]
pub struct CrossEntropy {
    /// Rows of this chunk.
    pub rows: usize,
    /// Columns: the vocabulary.
    pub vocab: usize,
    /// f32 or bf16 `[rows, vocab]`; left as they are where no gradient is asked for.
    pub logits: Buffer,
    /// i32 `[rows]`.
    pub targets: Buffer,
    /// f32 `[rows]`: weight of each target.
    pub weights: Buffer,
    /// Factor of the gradient: one over the weight of all targets of the optimizer step.
    pub scale: f32,
    /// `[rows, vocab]` out: `d(loss) / d(logits)`, in the logits' own memory. Either the logits' rows themselves, or, of
    /// type [`Backend::logits_gradient`], rows that begin where the logits' begin.
    pub gradient: Option<Rows>,
    /// f32 `[rows]` out: negative log-likelihood of the target (unweighted).
    pub nll: Buffer,
    /// f32 `[rows]` out: 1 where the target has the greatest logit (the first such index), else 0.
    pub correct: Buffer,
    /// f32 `[rows]` out: entropy of the predicted distribution, in nats.
    pub entropy: Buffer,
}

/// A run of parameters that are updated alike. All buffers have the same length.
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    /// f32, or bf16 with `weights_low`.
    pub weights: Buffer,
    /// u16: with bf16 weights, what is left of the exact f32 master (see [`split_master`]).
    pub weights_low: Option<Buffer>,
    /// f32.
    pub gradients: Buffer,
    /// f32: first moment.
    pub moment1: Buffer,
    /// f32: second moment.
    pub moment2: Buffer,
    /// Learning rate of this step.
    pub learning_rate: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub epsilon: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// `1 - beta1^t` for this step `t`, counted from 1.
    pub bias_correction1: f32,
    /// `1 - beta2^t`.
    pub bias_correction2: f32,
    /// f64 `[1]`: the sum of squares of all gradients. Where it is not finite, nothing is updated.
    pub grad_norm_squared: Buffer,
    /// Gradients are scaled by `min(1, max_grad_norm / (norm + 1e-6))`; not at all where this is 0.
    pub max_grad_norm: f32,
}

impl AdamW {
    /// Factor on the weights: `1 - learning_rate * weight_decay`.
    pub fn keep(&self) -> f32 {
        (1.0 - f64::from(self.learning_rate) * f64::from(self.weight_decay)) as f32
    }

    /// Factor on the first moment: `learning_rate / bias_correction1`.
    pub fn step_size(&self) -> f32 {
        (f64::from(self.learning_rate) / f64::from(self.bias_correction1)) as f32
    }

    /// Factor on the root of the second moment: `1 / sqrt(bias_correction2)`.
    pub fn root_correction(&self) -> f32 {
        (1.0 / f64::from(self.bias_correction2).sqrt()) as f32
    }
}

/// Splits an f32 into a bf16 that is its rounding (halves away from zero) and 16 bits that make it exact again:
/// `bits = (high << 16) + low - 0x8000`, in wrapping arithmetic.
pub fn split_master(value: f32) -> (u16, u16) {
    let shifted = value.to_bits().wrapping_add(0x8000);
    ((shifted >> 16) as u16, shifted as u16)
}

/// The f32 that [`split_master`] split.
pub fn join_master(high: u16, low: u16) -> f32 {
    f32::from_bits(((u32::from(high) << 16) | u32::from(low)).wrapping_sub(0x8000))
}

/// A device's leaf operations.
///
/// Where an argument says "added to", the leaf accumulates; otherwise it assigns. No output may overlap an input unless
/// the leaf says that it works in place. Results do not depend on the number of threads.
pub trait Backend: Send {
    /// A name for messages, for example `cpu (AVX2, 2 threads)`.
    fn name(&self) -> String;

    /// The sort of device.
    fn kind(&self) -> DeviceKind {
        DeviceKind::Cpu
    }

    /// Bytes of [`Pool::Scratch`] that the leaves need over matrices of at most so many columns and micro-batches of at
    /// most so many tokens.
    fn scratch_bytes(&self, columns: usize, tokens: usize) -> usize {
        let _ = (columns, tokens);
        0
    }

    /// The type in which the classifier pass writes the gradient of f32 logits, in a model with these activations.
    fn logits_gradient(&self, activations: DType) -> DType {
        let _ = activations;
        DType::F32
    }

    /// Makes `pool` hold `bytes`, zeroed. What it held before is gone. Fails with `Oom`.
    fn reserve(&mut self, pool: Pool, bytes: usize) -> Result<()>;

    /// Copies host bytes to the device; `source.len() == target.bytes()`. The source may be reused on return.
    fn upload(&mut self, source: &[u8], target: Buffer);

    /// Waits for all queued leaves, then copies to the host; `target.len() == source.bytes()`. Reports what failed.
    fn read_back(&mut self, source: Buffer, target: &mut [u8]) -> Result<()>;

    /// Queues a copy of bytes on `stream`; one of the two buffers is in host memory.
    fn transfer(&mut self, stream: Stream, source: Buffer, target: Buffer);

    /// Marks the present end of `stream`.
    fn record(&mut self, stream: Stream, event: Event);

    /// What is queued on `stream` from here on begins when `event` has been reached.
    fn wait(&mut self, stream: Stream, event: Event);

    /// What `buffer` holds is of no use any more; nothing reads it before it is written. For checks.
    fn discard(&mut self, buffer: Buffer) {
        let _ = buffer;
    }

    /// Sets every element to zero.
    fn zero(&mut self, target: Buffer);

    /// Copies, converting between f32 and bf16 where the types differ.
    fn copy(&mut self, source: Buffer, target: Buffer);

    /// A matrix product.
    fn matmul(&mut self, op: &Matmul);

    /// The matrix products of all experts.
    fn grouped_matmul(&mut self, op: &GroupedMatmul);

    /// `out[n] += sum over rows of x[r, n]`; `out` is f32. The gradient of a bias.
    fn sum_rows(&mut self, x: Rows, rows: usize, columns: usize, out: Buffer);

    /// `out[t] = table[ids[t]]`, `width` elements a row.
    fn embedding(&mut self, ids: Buffer, table: Buffer, width: usize, out: Buffer);

    /// `table_gradient[ids[t]] += d_out[t]`; f32, in the order of `t`.
    fn embedding_backward(&mut self, ids: Buffer, d_out: Buffer, width: usize, table_gradient: Buffer);

    /// `out = weight * x / sqrt(mean(x^2) + epsilon)` by rows; `inverse_rms` (f32 `[rows]`) keeps the factor.
    fn rms_norm(&mut self, x: Buffer, weight: Buffer, epsilon: f32, out: Buffer, inverse_rms: Buffer);

    /// `sum = x + delta`, then [`Backend::rms_norm`] of it. `sum` may be `x` or `delta` (in place).
    #[allow(clippy::too_many_arguments, reason = "one fused pass; a struct would have one caller")]
    fn add_rms_norm(
        &mut self,
        x: Buffer,
        delta: Buffer,
        sum: Buffer,
        weight: Buffer,
        epsilon: f32,
        out: Buffer,
        inverse_rms: Buffer,
    );

    /// Applies the norm again from the kept factor: `out = weight * x * inverse_rms`. Equal in bits to the forward pass.
    fn rms_norm_again(&mut self, x: Buffer, weight: Buffer, inverse_rms: Buffer, out: Buffer);

    /// `d_x` is added to, `d_weight` (f32) is added to.
    fn rms_norm_backward(
        &mut self,
        d_out: Buffer,
        x: Buffer,
        weight: Buffer,
        inverse_rms: Buffer,
        d_x: Buffer,
        d_weight: Buffer,
    );

    /// `x += delta`.
    fn add(&mut self, x: Buffer, delta: Buffer);

    /// Reads queries and keys from `qkv` `[T, (query + 2 key_value) dim]` (queries, keys, values side by side) and
    /// writes them normed and rotated to `qk` `[T, (query + key_value) dim]`.
    fn norm_rope(&mut self, op: &NormRope, qkv: Buffer, qk: Buffer);

    /// In place on the query and key columns of `d_qkv`: from the gradient of what `norm_rope` wrote to that of what it
    /// read. `d_norm` are the f32 gradients of the two norm weights, added to; `None` where `op.norm` is.
    fn norm_rope_backward(&mut self, op: &NormRope, qkv: Buffer, d_qkv: Buffer, d_norm: Option<(Buffer, Buffer)>);

    /// Causal attention, packed. Writes `op.out` and `op.log_sum_exp`.
    fn attention(&mut self, op: &Attention);

    /// From `d_out` (laid out as `op.out`) and what the forward pass read and wrote, the gradients of q, k and v,
    /// side by side in `d_qkv` `[T, (query + 2 key_value) dim]`. `scratch` is f32 `[query, T]`.
    fn attention_backward(&mut self, op: &Attention, d_out: Rows, d_qkv: Buffer, scratch: Buffer);

    /// One new token a sequence against its cached keys and values: `q` is `[S, query * dim]`, caches are
    /// `[S, capacity, key_value * dim]`, sequence `s` has `lengths[s]` (i32) entries, its own among them.
    #[allow(clippy::too_many_arguments, reason = "one kernel; a struct would have one caller")]
    fn attention_cached(
        &mut self,
        heads: Heads,
        window: Option<usize>,
        scale: f32,
        q: Rows,
        k_cache: Buffer,
        v_cache: Buffer,
        capacity: usize,
        lengths: Buffer,
        out: Buffer,
    );

    /// `out[t, i] = silu(gate_up[t, i]) * gate_up[t, width + i]`; `gate_up` is `[T, 2 width]`.
    fn swiglu(&mut self, gate_up: Buffer, width: usize, out: Buffer);

    /// In place: `gate_up` becomes its own gradient, given `d_out` `[T, width]`.
    fn swiglu_backward(&mut self, gate_up: Buffer, width: usize, d_out: Buffer);

    /// `out[r] = x[rows[r] / divisor]`, `width` elements a row; `rows` is i32.
    fn gather_rows(&mut self, x: Buffer, rows: Buffer, divisor: usize, width: usize, out: Buffer);

    /// `out[rows[r]] = x[r]` for distinct rows; the others are left.
    fn scatter_rows(&mut self, x: Buffer, rows: Buffer, width: usize, out: Buffer);

    /// The classifier pass: loss, gradient, accuracy and entropy in one reading of the logits.
    fn cross_entropy(&mut self, op: &CrossEntropy);

    /// `out[0] += sum a[i] b[i]`; `a`, `b` are f32, `out` is f64. Sums in a fixed order.
    fn dot(&mut self, a: Buffer, b: Buffer, out: Buffer);

    /// One AdamW update of a run of parameters.
    fn adamw(&mut self, op: &AdamW);

    /// From f32 `logits` `[T, experts]`: probabilities, choice and weights. With `balance`, adds to its f32
    /// `[2, experts]`: the number of choices of each expert, and the sum of its probabilities.
    fn router(&mut self, op: &Router, logits: Buffer, balance: Option<Buffer>);

    /// From the gradient of the weights (f32 `[T, top_k]`) that of the logits (f32 `[T, experts]`). With `balance`
    /// (the choices' counts, and a factor), `factor * counts[e]` is added to the gradient of each probability first.
    fn router_backward(&mut self, op: &Router, d_weights: Buffer, balance: Option<(Buffer, f32)>, d_logits: Buffer);

    /// Sorts the router's choices by expert.
    fn permute(&mut self, op: &Router, permutation: &Permutation);

    /// `out[t] = sum over j of weights[t, j] * x[rows[t, j]]`, in the order of `j`; without `weights`, plain sums.
    fn combine(
        &mut self,
        x: Buffer,
        permutation: &Permutation,
        weights: Option<Buffer>,
        top_k: usize,
        width: usize,
        out: Buffer,
    );

    /// Backward of [`Backend::combine`]: `d_x[rows[t, j]] = weights[t, j] d_out[t]`, `d_weights[t, j] = x[rows[t, j]] . d_out[t]`.
    #[allow(clippy::too_many_arguments, reason = "one kernel; a struct would have one caller")]
    fn combine_backward(
        &mut self,
        d_out: Buffer,
        x: Buffer,
        permutation: &Permutation,
        weights: Buffer,
        top_k: usize,
        width: usize,
        d_x: Buffer,
        d_weights: Buffer,
    );
}
