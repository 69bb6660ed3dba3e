//! What mixes a layer's tokens: attention or the gated delta rule, and the sizes of the latter.

use serde_json::Value;

use super::keys::{self, Keys};
use super::{MAX_HEAD_DIM, MAX_HEADS, MAX_LAYERS};
use crate::Result;

/// What mixes a layer's tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mixer {
    /// Causal attention.
    Attention {
        /// Sliding window: a token sees itself and the `window - 1` tokens before it. None: all tokens before it.
        window: Option<usize>,
    },
    /// The gated delta rule (Yang et al., 2024, arXiv 2412.06464).
    Delta(DeltaConfig),
}

/// The sizes of the gated delta rule. Value head `h` reads key head `h / (value heads / key heads)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeltaConfig {
    /// Heads of queries and of keys.
    pub linear_num_key_heads: usize,
    /// Heads of values; a multiple of `linear_num_key_heads`.
    pub linear_num_value_heads: usize,
    /// Elements of a query head, and of a key head.
    pub linear_key_head_dim: usize,
    /// Elements of a value head.
    pub linear_value_head_dim: usize,
    /// Taps of the convolution; the last one meets the token itself.
    pub linear_conv_kernel_dim: usize,
}

impl DeltaConfig {
    /// Columns of all queries, and of all keys.
    pub fn key_columns(&self) -> usize {
        self.linear_num_key_heads * self.linear_key_head_dim
    }

    /// Columns of all values.
    pub fn value_columns(&self) -> usize {
        self.linear_num_value_heads * self.linear_value_head_dim
    }

    /// Channels of the convolution: queries, keys, values.
    pub fn channels(&self) -> usize {
        2 * self.key_columns() + self.value_columns()
    }
}

/// The sizes of a hybrid family's delta rule.
pub(super) fn delta(keys: &mut Keys<'_>) -> Result<DeltaConfig> {
    let delta = DeltaConfig {
        linear_num_key_heads: keys.size("linear_num_key_heads", 16, 1, MAX_HEADS)?,
        linear_num_value_heads: keys.size("linear_num_value_heads", 32, 1, MAX_HEADS)?,
        linear_key_head_dim: keys.size("linear_key_head_dim", 128, 1, MAX_HEAD_DIM)?,
        linear_value_head_dim: keys.size("linear_value_head_dim", 128, 1, MAX_HEAD_DIM)?,
        linear_conv_kernel_dim: keys.size("linear_conv_kernel_dim", 4, 1, 64)?,
    };
    let (key, value) = (delta.linear_num_key_heads, delta.linear_num_value_heads);
    if value % key != 0 {
        return Err(keys.error(
            "linear_num_value_heads",
            format_args!("({value}) is not a multiple of `linear_num_key_heads` ({key})"),
        ));
    }
    Ok(delta)
}

/// The mixer of each layer of a hybrid family: by `layer_types`, or else every `full_attention_interval`-th is attention.
pub(super) fn hybrid(keys: &mut Keys<'_>, count: usize, delta: DeltaConfig) -> Result<Vec<Mixer>> {
    let (full, delta) = (Mixer::Attention { window: None }, Mixer::Delta(delta));
    let interval = keys.size("full_attention_interval", 4, 1, MAX_LAYERS)?;
    let Some(types) = keys.optional_list("layer_types")? else {
        return Ok((1..=count).map(|number| if number % interval == 0 { full } else { delta }).collect());
    };
    if types.len() != count {
        let what = format_args!("has {} entries, but `num_hidden_layers` is {count}", types.len());
        return Err(keys.error("layer_types", what));
    }
    let mixer = |value: &Value| match value.as_str() {
        Some("full_attention" | "attention") => Ok(full),
        Some("linear_attention") => Ok(delta),
        _ => Err(keys
            .error("layer_types", format_args!("holds {}, which is not supported", keys::shown(value)))
            .hint("supported are linear_attention and full_attention")),
    };
    types.iter().map(mixer).collect()
}
