//! Small models that see, for the tests.

#![allow(dead_code, reason = "each test takes some of it")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

use std::path::Path;

use arl_model::{Family, ModelConfig};
use serde_json::{Value, json};

/// The families with a vision tower.
pub(crate) const FAMILIES: [Family; 5] =
    [Family::Qwen2_5Vl, Family::Qwen3Vl, Family::Qwen3VlMoe, Family::Qwen3_5, Family::Qwen3_5Moe];

fn text(family: Family) -> Value {
    let mut text = json!({
        "vocab_size": 11, "hidden_size": 12, "intermediate_size": 10, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 6, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 1]},
    });
    if matches!(family, Family::Qwen3VlMoe | Family::Qwen3_5Moe) {
        for (key, size) in [("num_experts", 3), ("num_experts_per_tok", 2), ("moe_intermediate_size", 4)] {
            text[key] = json!(size);
        }
    }
    if matches!(family, Family::Qwen3_5 | Family::Qwen3_5Moe) {
        text["full_attention_interval"] = json!(2);
        text["head_dim"] = json!(8);
        let sizes = [("num_key_heads", 2), ("num_value_heads", 4), ("key_head_dim", 3), ("value_head_dim", 2)];
        for (key, size) in sizes {
            text[format!("linear_{key}")] = json!(size);
        }
    }
    if family == Family::Qwen3_5Moe {
        text["shared_expert_intermediate_size"] = json!(5);
    }
    text
}

fn vision(family: Family) -> Value {
    let mut vision = json!({
        "depth": 2, "hidden_size": 8, "num_heads": 2, "intermediate_size": 6, "patch_size": 2, "out_hidden_size": 12,
    });
    match family {
        Family::Qwen2_5Vl => {
            vision["window_size"] = json!(8);
            vision["fullatt_block_indexes"] = json!([1]);
            vision["tokens_per_second"] = json!(2);
        }
        _ => vision["num_position_embeddings"] = json!(9),
    }
    if matches!(family, Family::Qwen3Vl | Family::Qwen3VlMoe) {
        vision["deepstack_visual_indexes"] = json!([0, 1]);
    }
    vision
}

/// A `config.json` that nests its text part, or has it flat.
pub(crate) fn config(family: Family, nested: bool, tied: bool) -> Value {
    let mut whole = json!({
        "model_type": family.as_str(), "tie_word_embeddings": tied, "dtype": "bfloat16", "vision_config": vision(family),
        "image_token_id": 9, "video_token_id": 8, "vision_start_token_id": 7, "vision_end_token_id": 6,
    });
    let mut text = text(family);
    if nested {
        text["model_type"] = json!(format!("{family}_text"));
        whole["text_config"] = text;
    } else {
        whole.as_object_mut().unwrap().extend(text.as_object().unwrap().clone());
    }
    whole
}

pub(crate) fn parse(value: &Value) -> arl_model::Result<ModelConfig> {
    ModelConfig::from_json(&value.to_string(), Path::new("dir/config.json"))
}

/// The nested configuration of a family.
pub(crate) fn model(family: Family, tied: bool) -> ModelConfig {
    parse(&config(family, true, tied)).unwrap()
}
