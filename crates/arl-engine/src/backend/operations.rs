//! What the leaves work on: one struct for each operation that has more to it than a few buffers.

use std::ops::Range;

use super::{Buffer, Rows, StochasticRounding};

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

/// One matrix product. Each of `a`, `b` and `c` may be f32, or the one type of 16 bits that a model has; sums are in f32.
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
    /// Left operand, as stored (before transposition).
    pub a: Rows,
    /// Right operand, as stored (before transposition).
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

impl Heads {
    /// Columns of queries.
    pub fn query_columns(self) -> usize {
        self.query * self.dim
    }

    /// Columns of keys, or of values.
    pub fn key_columns(self) -> usize {
        self.key_value * self.dim
    }

    /// Columns of queries and keys together.
    pub fn qk_columns(self) -> usize {
        self.query_columns() + self.key_columns()
    }

    /// Columns of queries, keys and values together.
    pub fn qkv_columns(self) -> usize {
        self.qk_columns() + self.key_columns()
    }

    /// Factor on the products of queries and keys: one over the root of a head's size.
    pub fn scale(self) -> f32 {
        1.0 / (self.dim as f32).sqrt()
    }
}

/// Attention within each sequence: `softmax(scale q k^T) v`, where it is causal over keys `j` with `i - window < j <= i`, else over
/// all keys of the sequence.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    /// Head counts and size.
    pub heads: Heads,
    /// The sequences; no query sees a key of another one.
    pub sequences: Sequences,
    /// A query sees no key after its own. False in vision towers, whose patches see all patches of their sequence.
    pub causal: bool,
    /// Keys that a query may see, itself included; `None`: all before it. `None` where attention is not causal.
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
    /// f32 `[query, T]`: log of the sum of the exponentials of a row's scores, kept for the backward pass. A device's own
    /// library may keep something else here.
    pub log_sum_exp: Buffer,
}

impl Attention {
    /// Tokens of all sequences.
    pub(crate) fn tokens(&self) -> usize {
        self.log_sum_exp.len / self.heads.query
    }
}

/// What attention a device's own library is to compute; see [`super::Backend::use_attention_library`].
#[derive(Clone, Copy, Debug)]
pub struct AttentionLibrary {
    /// Head counts and size.
    pub heads: Heads,
    /// As [`Attention::window`].
    pub window: Option<usize>,
    /// As [`Attention::scale`].
    pub scale: f32,
    /// Tokens of all sequences.
    pub tokens: usize,
    /// Number of sequences.
    pub sequences: usize,
    /// Tokens of the longest one.
    pub max_len: usize,
    /// Elements from one token to the next: of queries, keys, values and output.
    pub strides: [usize; 4],
}

/// The weight of an RMSNorm.
#[derive(Clone, Copy, Debug)]
pub struct NormWeight {
    /// `[width]`.
    pub weight: Buffer,
    /// What the norm multiplies by is `weight + offset`. Where it is 0, the normed value is rounded to the activations' type
    /// before it meets the weight, as Qwen2 and Qwen3 do; else the product alone is rounded, as Qwen3-Next does.
    pub offset: f32,
}

impl From<Buffer> for NormWeight {
    /// Without an offset.
    fn from(weight: Buffer) -> Self {
        NormWeight { weight, offset: 0.0 }
    }
}

/// Per-head RMSNorm of queries and keys (Qwen3), if any, then rotary position embedding of the first `rotary` elements of
/// each head: `out[i] = x[i] cos[i] - x[i + rotary/2] sin[i]`, `out[i + rotary/2] = x[i + rotary/2] cos[i] + x[i] sin[i]`
/// for `i < rotary/2`. The others pass.
#[derive(Clone, Copy, Debug)]
pub struct NormRope {
    /// Head counts and size.
    pub heads: Heads,
    /// Elements of a head that are rotated; even.
    pub rotary: usize,
    /// Tokens.
    pub tokens: usize,
    /// Weights `[dim]` of the norms of queries and keys, and their epsilon; `None` where the model has none.
    pub norm: Option<(NormWeight, NormWeight, f32)>,
    /// What the heads are rotated by.
    pub angles: Angles,
}

/// Cosines and sines of the rotary embedding as tables, and each token's row of them.
#[derive(Clone, Copy, Debug)]
pub struct Angles {
    /// f32 `[rows, rotary / 2]`, attention scaling included.
    pub cos: Buffer,
    /// f32 `[rows, rotary / 2]`, attention scaling included.
    pub sin: Buffer,
    /// i32 `[T]`: the row of each token, in both tables; with `axes` `[3, T]`: one for time, one for height, one for width.
    pub rows: Buffer,
    /// i32 `[rotary / 2]`: which of a token's three rows each column is read from. `None`: positions have one axis.
    pub axes: Option<Buffer>,
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

impl Router {
    /// The same for some of its tokens.
    pub(crate) fn part(&self, tokens: Range<usize>) -> Self {
        let rows = |buffer: Buffer, width: usize| buffer.slice(tokens.start * width, tokens.len() * width);
        Router {
            tokens: tokens.len(),
            probabilities: rows(self.probabilities, self.experts),
            experts_chosen: rows(self.experts_chosen, self.top_k),
            weights: rows(self.weights, self.top_k),
            ..*self
        }
    }
}

/// The place of each chosen (token, expert) pair once pairs are sorted by expert. Pair `p` is slot `p % top_k` of
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
    /// f32, bf16 or f16 `[rows, vocab]`; left as they are where no gradient is asked for.
    pub logits: Buffer,
    /// i32 `[rows]`.
    pub targets: Buffer,
    /// f32 `[rows]`: weight of each target.
    pub weights: Buffer,
    /// Factor of the gradient: the loss scale over the weight of all targets of the optimizer step.
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
    /// f32; bf16 with `masters` or without; or f16 with `masters`.
    pub weights: Buffer,
    /// With bf16 weights u16: what is left of the exact f32 master (see [`split_master`]). With f16 weights f32: the master
    /// itself, which the weight is the rounding of.
    pub masters: Option<Buffer>,
    /// How bf16 weights without masters, and bf16 moments, are rounded; others do not look at it.
    pub rounding: StochasticRounding,
    /// f32.
    pub gradients: Buffer,
    /// First moment: f32 or bf16. The weight is updated by what it was before it was rounded.
    pub moment1: Buffer,
    /// Second moment, of the first one's type.
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
    /// f64 `[1]`: the sum of squares of all gradients, before they are divided. Where it is not finite, nothing is updated.
    pub grad_norm_squared: Buffer,
    /// What the gradients are to be divided by: the loss scale, or 1.
    pub gradient_scale: f32,
    /// Gradients are scaled by `min(1, max_grad_norm / (norm + 1e-6))`, with the norm of the divided ones; not at all where
    /// this is 0.
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
