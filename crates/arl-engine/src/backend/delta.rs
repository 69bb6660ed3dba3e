//! The leaves of the gated delta rule (Yang et al., 2024, arXiv 2412.06464), as a trait of their own: the convolution before it,
//! the rule itself, the gated norm behind it, and what each keeps of a sequence that is being generated.

use arl_model::DeltaConfig;

use super::{Buffer, DeviceKind, Rows, Sequences, cuda};

/// The heads of a delta rule. Value head `h` reads the query and the key of head `h / (value / key)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeltaHeads {
    /// Heads of queries and of keys; a divisor of `value`.
    pub key: usize,
    /// Heads of values.
    pub value: usize,
    /// Elements of a query head, and of a key head.
    pub key_dim: usize,
    /// Elements of a value head.
    pub value_dim: usize,
}

impl From<&DeltaConfig> for DeltaHeads {
    fn from(config: &DeltaConfig) -> Self {
        DeltaHeads {
            key: config.linear_num_key_heads,
            value: config.linear_num_value_heads,
            key_dim: config.linear_key_head_dim,
            value_dim: config.linear_value_head_dim,
        }
    }
}

impl DeltaHeads {
    /// Columns of all queries, or of all keys.
    pub fn key_columns(self) -> usize {
        self.key * self.key_dim
    }

    /// Columns of all values.
    pub fn value_columns(self) -> usize {
        self.value * self.value_dim
    }

    /// Columns of queries, keys and values together.
    pub fn channels(self) -> usize {
        2 * self.key_columns() + self.value_columns()
    }

    /// Elements of the states of all heads of one sequence.
    pub fn state(self) -> usize {
        self.value * self.key_dim * self.value_dim
    }
}

/// `out[t, c] = silu(sum over j of weight[c, j] x[t - (taps - 1) + j, c])`, where `x` before the first token of a sequence is 0.
#[derive(Clone, Copy, Debug)]
pub struct CausalConv {
    /// The sequences; no token sees one of another sequence.
    pub sequences: Sequences,
    /// `T`.
    pub tokens: usize,
    /// `C`.
    pub channels: usize,
    /// Taps; the last one meets the token itself.
    pub taps: usize,
    /// `[T, C]`.
    pub x: Rows,
    /// `[C, taps]`.
    pub weight: Buffer,
}

/// The gated delta rule within each sequence. With `q`, `k` of unit length (`x / sqrt(sum x^2 + 1e-6)`), `q` over the root of
/// `key_dim`, `beta = sigmoid(b)` and `g = -exp(a_log) softplus(a + dt_bias)`, from a state `S` `[key_dim, value_dim]` of zeros:
/// `S = e^g S`, `S += k (beta (v - S^T k))^T`, `out = S^T q`.
#[derive(Clone, Copy, Debug)]
pub struct GatedDelta {
    /// Head counts and sizes.
    pub heads: DeltaHeads,
    /// The sequences; each begins with a state of zeros.
    pub sequences: Sequences,
    /// `T`.
    pub tokens: usize,
    /// `[T, channels]`: queries of all heads, keys, values.
    pub qkv: Buffer,
    /// `[T, 2 value]`: how strongly a token is written, before the sigmoid (`b`), then how much is forgotten, before the
    /// softplus (`a`).
    pub gates: Rows,
    /// `[value]`: logarithm of the rate of decay.
    pub a_log: Buffer,
    /// `[value]`: added to `a`.
    pub dt_bias: Buffer,
    /// f32 of [`GatedDelta::forward_scratch`], [`GatedDelta::backward_scratch`] or [`GatedDelta::step_scratch`] elements.
    pub scratch: Buffer,
}

impl GatedDelta {
    /// Tokens that are computed together.
    pub const CHUNK: usize = 64;

    /// Elements of scratch of one token a sequence. On a CPU `g` and `beta` of each token.
    pub fn step_scratch(kind: DeviceKind, heads: DeltaHeads, tokens: usize) -> usize {
        match kind {
            DeviceKind::Cpu => 2 * tokens * heads.value,
            DeviceKind::Cuda => cuda::delta_step_scratch(heads, tokens),
        }
    }

    /// Elements of scratch of the forward pass. On a CPU `g` and `beta` of each token.
    pub fn forward_scratch(kind: DeviceKind, heads: DeltaHeads, tokens: usize, sequences: usize) -> usize {
        match kind {
            DeviceKind::Cpu => 2 * tokens * heads.value,
            DeviceKind::Cuda => cuda::delta_forward_scratch(heads, tokens, sequences),
        }
    }

    /// Elements of scratch of the backward pass. On a CPU `g`, `beta` and their gradients, and the state before each chunk but the
    /// first of each sequence. Its rows end with whole panels of products.
    pub fn backward_scratch(kind: DeviceKind, heads: DeltaHeads, tokens: usize, sequences: usize) -> usize {
        match kind {
            DeviceKind::Cpu => {
                4 * tokens * heads.value
                    + tokens / Self::CHUNK * heads.value * heads.key_dim * heads.value_dim.next_multiple_of(32)
            }
            DeviceKind::Cuda => cuda::delta_backward_scratch(heads, tokens, sequences),
        }
    }
}

/// A norm over each head with a gate: `out = weight * x / sqrt(mean(x^2) + epsilon) * silu(gate)`.
#[derive(Clone, Copy, Debug)]
pub struct GatedNorm {
    /// `T`.
    pub tokens: usize,
    /// Heads a token.
    pub heads: usize,
    /// `[T, heads * dim]`.
    pub x: Buffer,
    /// `[T, heads * dim]`.
    pub gate: Rows,
    /// `[dim]`.
    pub weight: Buffer,
    /// Added to the mean of squares.
    pub epsilon: f32,
}

/// The leaves of the gated delta rule. A device without them refuses the families that have it before anything is queued.
pub trait DeltaRule {
    /// The convolution, `out` is `[T, C]`.
    fn causal_conv(&mut self, op: &CausalConv, out: Buffer);

    /// From `d_out` `[T, C]`: `op.x` becomes its own gradient, `d_weight` (f32 `[C, taps]`) is added to.
    fn causal_conv_backward(&mut self, op: &CausalConv, d_out: Buffer, d_weight: Buffer);

    /// Keeps the last `taps - 1` inputs of each sequence, zeros before its start: `inputs` is `[sequences, taps - 1, C]`.
    fn causal_conv_keep(&mut self, op: &CausalConv, inputs: Buffer);

    /// The convolution of one new token a sequence, which joins the kept `inputs` `[T, taps - 1, C]`.
    fn causal_conv_step(&mut self, op: &CausalConv, inputs: Buffer, out: Buffer);

    /// The rule, `out` is `[T, value * value_dim]`. `states`, f32 `[sequences, value, key_dim, value_dim]`, gets those after the
    /// last token of each sequence.
    fn gated_delta(&mut self, op: &GatedDelta, out: Buffer, states: Option<Buffer>);

    /// From `d_out`: `op.qkv` and `op.gates` become their own gradients, `d_a_log` and `d_dt_bias` (f32 `[value]`) are added to.
    fn gated_delta_backward(&mut self, op: &GatedDelta, d_out: Buffer, d_a_log: Buffer, d_dt_bias: Buffer);

    /// The rule for one new token a sequence, whose `states` it updates.
    fn gated_delta_step(&mut self, op: &GatedDelta, states: Buffer, out: Buffer);

    /// The gated norm, `out` is as `op.x`.
    fn gated_norm(&mut self, op: &GatedNorm, out: Buffer);

    /// `d`, the gradient of the output, becomes that of `op.x`, and `op.gate` its own; `d_weight` (f32 `[dim]`) is added to.
    fn gated_norm_backward(&mut self, op: &GatedNorm, d: Buffer, d_weight: Buffer);
}
