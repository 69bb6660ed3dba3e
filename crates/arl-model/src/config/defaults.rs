//! What absent keys of the text part mean, as in transformers' configuration classes.

use super::Family;

/// What differs between the families where a key is absent, as in transformers' configuration classes.
pub(super) struct Defaults {
    pub(super) vocab_size: usize,
    pub(super) hidden_size: usize,
    pub(super) intermediate_size: usize,
    pub(super) num_hidden_layers: usize,
    pub(super) num_attention_heads: usize,
    pub(super) num_key_value_heads: usize,
    pub(super) max_position_embeddings: usize,
    pub(super) rms_norm_eps: f64,
    pub(super) rope_theta: f64,
}

impl Defaults {
    pub(super) fn of(family: Family) -> Self {
        let [hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads] = match family
        {
            Family::Qwen2 | Family::Qwen3 | Family::Qwen3Vl => [4096, 22_016, 32, 32, 32],
            Family::Qwen3Moe => [2048, 6144, 24, 32, 4],
            Family::Qwen3Next => [2048, 5632, 48, 16, 2],
            Family::Qwen3_5 => [4096, 12_288, 32, 16, 4],
            // No layer is dense.
            Family::Qwen3_5Moe => [2048, 1, 40, 16, 2],
            Family::Qwen2_5Vl => [8192, 29_568, 80, 64, 8],
            Family::Qwen3VlMoe => [2048, 5632, 24, 16, 16],
        };
        let (vocab_size, rope_theta) = match family {
            Family::Qwen3_5 | Family::Qwen3_5Moe => (248_320, 1e4),
            Family::Qwen2_5Vl => (152_064, 1e6),
            Family::Qwen3Vl | Family::Qwen3VlMoe => (151_936, 5e5),
            Family::Qwen2 | Family::Qwen3 | Family::Qwen3Moe | Family::Qwen3Next => (151_936, 1e4),
        };
        let long = matches!(family, Family::Qwen3Vl | Family::Qwen3VlMoe);
        Defaults {
            vocab_size,
            hidden_size,
            intermediate_size,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
            max_position_embeddings: if long { 128_000 } else { 32_768 },
            rms_norm_eps: if family == Family::Qwen2_5Vl { 1e-5 } else { 1e-6 },
            rope_theta,
        }
    }
}
