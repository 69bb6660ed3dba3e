//! The leaf operations that a training step is made of, as a trait that each device implements.
//!
//! A [`Buffer`] is plain data: a place in a pool of the device's memory. It is no slice, because a device's memory need
//! not be the host's. Leaves are asynchronous: they are queued in order and return nothing; a value is seen on the host by
//! [`Backend::read_back`], which waits, or [`Backend::queue_read`], which does not. Shapes are row-major; `T` is the tokens
//! of a micro-batch.

use std::path::Path;

use arl_model::Result;

mod adapters;
mod buffer;
pub mod comm;
pub mod cpu;
pub mod cuda;
mod delta;
mod dropout;
pub mod gates;
mod kind;
mod low_rank;
mod operations;
pub mod plan;
pub mod profile;
mod rounding;
pub mod timeline;
mod vision;

pub use self::adapters::{Magnitude, Nf4Matmul, Nf4Nested, Nf4Weights};
pub use self::buffer::{Buffer, DType, Event, Pool, Rows, Stream};
pub use self::cuda::attention_library_scratch;
pub use self::delta::{CausalConv, DeltaHeads, DeltaRule, GatedDelta, GatedNorm};
pub use self::dropout::Dropout;
pub use self::kind::DeviceKind;
pub use self::low_rank::{LowRankFactor, LowRankMatmul, Product};
pub use self::operations::{
    AdamW, Angles, Attention, AttentionLibrary, CrossEntropy, GroupedMatmul, Heads, Layout, Matmul, NormRope,
    NormWeight, Permutation, Router, Sequences, join_master, split_master,
};
pub use self::rounding::StochasticRounding;
pub use self::vision::{Gelu, LayerNorm, Vision};

/// A device's choice among several algorithms for the same matrix product.
pub trait MatmulAlgorithms {
    /// From here on, large products are computed by the algorithm that measured fastest, at the first use of each shape. Choices
    /// are kept in `cache`, for later runs on such a device. Gives what a user should know.
    fn autotune(&mut self, cache: Option<&Path>) -> Option<String>;

    /// The choices so far, for a saved state: JSON with the time of the first proposal and of the chosen one. `None`: there are
    /// none.
    fn chosen(&self) -> Option<String>;

    /// Takes the choices of a saved state, before those of the cache. Gives what a user should know: that some cannot be
    /// used, and results differ in bits.
    fn restore(&mut self, saved: &str) -> Option<String>;
}

/// A device's leaf operations.
///
/// Where an argument says "added to", the leaf accumulates; otherwise it assigns. No output may overlap an input unless
/// the leaf says that it works in place. Results do not depend on the number of threads.
pub trait Backend: DeltaRule + gates::Gates + Vision + comm::Collectives + Send {
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

    /// Has the device's own library compute attention from here on, in both passes, wherever it has a plan; `asked` are what
    /// is to be expected. Then [`Backend::attention_backward`] wants `scratch` of [`attention_library_scratch`], and an
    /// output's gradient without gaps. Fails with the reason, in a sentence, where it has none for one of them; then nothing changes.
    fn use_attention_library(&mut self, asked: &[AttentionLibrary]) -> std::result::Result<(), String> {
        let _ = asked;
        Err("this device has no library for attention".into())
    }

    /// Announces attention of the micro-batches that come next, so that what the device's own library needs for it is made
    /// on other threads, while the device computes what was queued before.
    fn expect_attention(&mut self, asked: &[AttentionLibrary]) {
        let _ = asked;
    }

    /// The choice of algorithms for matrix products; `None` where there is one for each.
    fn matmul_algorithms(&mut self) -> Option<&mut dyn MatmulAlgorithms> {
        None
    }

    /// Makes `pool` hold `bytes`, zeroed. What it held before is gone. Fails with `Oom`.
    fn reserve(&mut self, pool: Pool, bytes: usize) -> Result<()>;

    /// Copies host bytes to the device; `source.len() == target.bytes()`. The source may be reused on return.
    fn upload(&mut self, source: &[u8], target: Buffer);

    /// Waits for all queued leaves, then copies to the host; `target.len() == source.bytes()`. Reports what failed.
    fn read_back(&mut self, source: Buffer, target: &mut [u8]) -> Result<()>;

    /// Queues a copy of `sources`, one behind the other, to a place of the host, behind all leaves queued so far. There is
    /// one such place: [`Backend::finish_read`] comes before the next.
    fn queue_read(&mut self, sources: &[Buffer]);

    /// Whether [`Backend::finish_read`] would not wait.
    fn read_arrived(&mut self) -> bool {
        true
    }

    /// Waits for what [`Backend::queue_read`] queued, and for nothing behind it; `target` has the bytes of all its sources.
    /// Reports what failed up to there.
    fn finish_read(&mut self, target: &mut [u8]) -> Result<()>;

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

    /// Marks the present end of [`Stream::Compute`] with the device's own clock, and waits for nothing. False where the
    /// device has no such clock: its leaves are done when they return. For measurements.
    fn timestamp(&mut self) -> bool {
        false
    }

    /// Waits for all queued leaves; the time of each timestamp since the last call, in seconds after the first of them.
    fn timestamps(&mut self) -> Result<Vec<f64>> {
        Ok(Vec::new())
    }

    /// Free and total memory of the device, in bytes; `None` where it is the host's.
    fn memory(&self) -> Result<Option<(usize, usize)>> {
        Ok(None)
    }

    /// Sets every element to zero.
    fn zero(&mut self, target: Buffer);

    /// Copies, converting between f32 and a type of 16 bits where the types differ.
    fn copy(&mut self, source: Buffer, target: Buffer);

    /// Weights in NF4 from number `first` on, as elements of `out`'s type: of each code its value times its block's scale, rounded
    /// once.
    fn dequantize(&mut self, weights: &Nf4Weights, first: usize, out: Buffer);

    /// Norms, scaling or gradient of the magnitudes of a layer's rows.
    fn magnitude(&mut self, op: &Magnitude);

    /// A matrix product.
    fn matmul(&mut self, op: &Matmul);

    /// A matrix product with weights in NF4.
    fn matmul_nf4(&mut self, op: &Nf4Matmul<'_>);

    /// A matrix product with weights, and what adapters add to it.
    fn matmul_low_rank(&mut self, op: &LowRankMatmul<'_>) {
        low_rank::apart(self, op);
    }

    /// The matrix products of all experts.
    fn grouped_matmul(&mut self, op: &GroupedMatmul);

    /// `out[n] += sum over rows of x[r, n]`; `out` is f32. The gradient of a bias.
    fn sum_rows(&mut self, x: Rows, rows: usize, columns: usize, out: Buffer);

    /// `out[t] = table[ids[t]]`, `width` elements a row.
    fn embedding(&mut self, ids: Buffer, table: Buffer, width: usize, out: Buffer);

    /// `table_gradient[ids[t]] += d_out[t]`; f32, in the order of `t`.
    fn embedding_backward(&mut self, ids: Buffer, d_out: Buffer, width: usize, table_gradient: Buffer);

    /// `out = (weight + offset) * x / sqrt(mean(x^2) + epsilon)` by rows; `inverse_rms` (f32 `[rows]`) keeps the factor.
    fn rms_norm(&mut self, x: Buffer, weight: NormWeight, epsilon: f32, out: Buffer, inverse_rms: Buffer);

    /// `sum = x + delta`, then [`Backend::rms_norm`] of it. `sum` may be `x` or `delta` (in place).
    #[allow(clippy::too_many_arguments, reason = "one fused pass; a struct would have one caller")]
    fn add_rms_norm(
        &mut self,
        x: Buffer,
        delta: Buffer,
        sum: Buffer,
        weight: NormWeight,
        epsilon: f32,
        out: Buffer,
        inverse_rms: Buffer,
    );

    /// Applies the norm again from the kept factor. Equal in bits to the forward pass.
    fn rms_norm_recompute(&mut self, x: Buffer, weight: NormWeight, inverse_rms: Buffer, out: Buffer);

    /// `d_x` is added to, `d_weight` (f32) is added to.
    fn rms_norm_backward(
        &mut self,
        d_out: Buffer,
        x: Buffer,
        weight: NormWeight,
        inverse_rms: Buffer,
        d_x: Buffer,
        d_weight: Buffer,
    );

    /// `x += delta`.
    fn add(&mut self, x: Buffer, delta: Buffer);

    /// `out = factor * x`, and 0 for the elements that `dropout` drops.
    fn scale(&mut self, x: Buffer, factor: f32, dropout: Option<Dropout>, out: Buffer);

    /// Reads queries and keys from `qkv` `[T, (query + 2 key_value) dim]` (queries, keys, values side by side) and
    /// writes them normed and rotated to `qk` `[T, (query + key_value) dim]`.
    fn norm_rope(&mut self, op: &NormRope, qkv: Buffer, qk: Buffer);

    /// In place on the query and key columns of `d_qkv`: from the gradient of what `norm_rope` wrote to that of what it
    /// read. `d_norm` are the f32 gradients of the two norm weights, added to; `None` where `op.norm` is.
    fn norm_rope_backward(&mut self, op: &NormRope, qkv: Buffer, d_qkv: Buffer, d_norm: Option<(Buffer, Buffer)>);

    /// Attention, packed. Writes `op.out` and `op.log_sum_exp`.
    fn attention(&mut self, op: &Attention);

    /// From `d_out` (laid out as `op.out`) and what the forward pass read and wrote, the gradients of q, k and v,
    /// side by side in `d_qkv` `[T, (query + 2 key_value) dim]`. `scratch` is f32, of [`DeviceKind::attention_scratch`] at least.
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

    /// The first `columns` elements of each of so many rows of `source` to those of `target`, of the same type.
    fn copy_columns(&mut self, source: Rows, target: Rows, rows: usize, columns: usize) {
        let row = |of: Rows, r: usize| of.buffer.slice(r * of.stride, columns);
        (0..rows).for_each(|r| self.copy(row(source, r), row(target, r)));
    }

    /// The classifier pass: loss, gradient, accuracy and entropy in one reading of the logits.
    fn cross_entropy(&mut self, op: &CrossEntropy);

    /// `out[0] += sum a[i] b[i]`; `a`, `b` are f32, `out` is f64. Sums in a fixed order.
    fn dot(&mut self, a: Buffer, b: Buffer, out: Buffer);

    /// `norm_squared` (f64 `[1]`) becomes NaN where the first element of a row of f64 `losses`, or one of f32 `balances`, is
    /// not finite, so that [`Backend::adamw`] changes nothing.
    fn guard(&mut self, losses: Rows, balances: Option<Buffer>, norm_squared: Buffer);

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
