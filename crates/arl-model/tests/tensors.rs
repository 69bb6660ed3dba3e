//! The table of tensors: order, decay, counts; and random weights.

use std::path::Path;

use arl_model::{ModelConfig, Role, TensorSpec, init_f32, tensor_table};
use serde_json::{Value, json};

fn config(extra: Value) -> ModelConfig {
    let mut config = json!({
        "vocab_size": 400, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "num_experts": 3, "num_experts_per_tok": 2,
        "moe_intermediate_size": 24, "decoder_sparse_step": 2, "initializer_range": 0.08,
    });
    for (key, value) in extra.as_object().unwrap() {
        config[key] = value.clone();
    }
    ModelConfig::from_json(&config.to_string(), Path::new("config.json")).unwrap()
}

fn names(config: &ModelConfig) -> Vec<String> {
    tensor_table(config).into_iter().map(|spec| spec.name).collect()
}

#[test]
fn what_one_product_takes_together_is_adjacent() {
    let names = names(&config(json!({"model_type": "qwen3_moe", "attention_bias": true})));
    let expected = "model.embed_tokens.weight
        0.input_layernorm.weight 0.self_attn.q_proj.weight 0.self_attn.k_proj.weight 0.self_attn.v_proj.weight
        0.self_attn.q_proj.bias 0.self_attn.k_proj.bias 0.self_attn.v_proj.bias
        0.self_attn.q_norm.weight 0.self_attn.k_norm.weight 0.self_attn.o_proj.weight 0.self_attn.o_proj.bias
        0.post_attention_layernorm.weight 0.mlp.gate_proj.weight 0.mlp.up_proj.weight 0.mlp.down_proj.weight
        1.input_layernorm.weight 1.self_attn.q_proj.weight 1.self_attn.k_proj.weight 1.self_attn.v_proj.weight
        1.self_attn.q_proj.bias 1.self_attn.k_proj.bias 1.self_attn.v_proj.bias
        1.self_attn.q_norm.weight 1.self_attn.k_norm.weight 1.self_attn.o_proj.weight 1.self_attn.o_proj.bias
        1.post_attention_layernorm.weight 1.mlp.gate.weight
        1.mlp.experts.0.gate_proj.weight 1.mlp.experts.0.up_proj.weight
        1.mlp.experts.1.gate_proj.weight 1.mlp.experts.1.up_proj.weight
        1.mlp.experts.2.gate_proj.weight 1.mlp.experts.2.up_proj.weight
        1.mlp.experts.0.down_proj.weight 1.mlp.experts.1.down_proj.weight 1.mlp.experts.2.down_proj.weight
        model.norm.weight lm_head.weight";
    let expected: Vec<String> = expected
        .split_whitespace()
        .map(|name| if name.starts_with(['0', '1']) { format!("model.layers.{name}") } else { name.to_owned() })
        .collect();
    assert_eq!(names, expected);
}

#[test]
fn families_differ_in_biases_and_norms_and_tied_models_have_no_head() {
    let qwen2 = names(&config(json!({"model_type": "qwen2", "tie_word_embeddings": true})));
    assert!(qwen2.contains(&"model.layers.1.self_attn.v_proj.bias".to_owned()));
    assert!(
        !qwen2.iter().any(|name| name.contains("o_proj.bias") || name.contains("q_norm") || name.contains("lm_head"))
    );
    let qwen3 = names(&config(json!({"model_type": "qwen3"})));
    assert!(qwen3.contains(&"model.layers.0.self_attn.k_norm.weight".to_owned()));
    assert!(!qwen3.iter().any(|name| name.contains("bias")));
    assert_eq!(qwen3.last().map(String::as_str), Some("lm_head.weight"));
}

#[test]
fn weight_decay_spares_biases_and_norms_only() {
    for spec in tensor_table(&config(json!({"model_type": "qwen3_moe", "attention_bias": true}))) {
        // The patterns of Hugging Face's Trainer.
        let spared = ["bias", "layernorm", "_norm.", ".norm."].iter().any(|part| spec.name.contains(part));
        assert_eq!(spec.decay, !spared, "{}", spec.name);
        assert_eq!(spec.block.layer().is_some(), spec.name.contains(".layers."));
    }
}

#[test]
fn the_number_of_parameters_is_that_of_the_table() {
    for extra in [
        json!({"model_type": "qwen2"}),
        json!({"model_type": "qwen3", "tie_word_embeddings": true}),
        json!({"model_type": "qwen3_moe"}),
    ] {
        let config = config(extra);
        let counted: usize = tensor_table(&config).iter().map(TensorSpec::elements).sum();
        assert_eq!(config.num_parameters(), counted as u128);
    }
}

fn init(config: &ModelConfig, spec: &TensorSpec, seed: u64) -> Vec<f32> {
    let mut values = vec![f32::NAN; spec.elements()];
    init_f32(config, spec, seed, &mut values);
    values
}

#[test]
fn random_weights_have_the_moments_of_hugging_face() {
    let config = config(json!({"model_type": "qwen3_moe", "attention_bias": true, "pad_token_id": 5}));
    for spec in tensor_table(&config) {
        let values = init(&config, &spec, 1);
        if spec.role.is_norm() {
            assert!(values.iter().all(|&value| value == 1.0));
        } else if spec.role.is_bias() {
            assert!(values.iter().all(|&value| value == 0.0));
        } else {
            let padded = if spec.role == Role::Embedding { config.hidden_size } else { 0 };
            let count = (values.len() - padded) as f64;
            let moment = |power: i32| values.iter().map(|&value| f64::from(value).powi(power)).sum::<f64>() / count;
            let standard = moment(2).sqrt() / 0.08;
            assert!(moment(1).abs() < 0.08 * 5.0 / count.sqrt(), "{}: mean {}", spec.name, moment(1));
            assert!((standard - 1.0).abs() < 5.0 / (2.0 * count).sqrt(), "{}: deviation {standard}", spec.name);
            let fourth = moment(4) / moment(2).powi(2);
            assert!((fourth - 3.0).abs() < 5.0 * (24.0 / count).sqrt() + 0.02, "{}: kurtosis {fourth}", spec.name);
        }
        if spec.role == Role::Embedding {
            assert!(values[5 * 64..6 * 64].iter().all(|&value| value == 0.0));
            assert!(values[6 * 64..7 * 64].iter().all(|&value| value != 0.0));
        }
    }
}

#[test]
fn random_weights_depend_on_seed_and_name_only() {
    let config = config(json!({"model_type": "qwen3"}));
    let table = tensor_table(&config);
    let find = |name: &str| table.iter().find(|spec| spec.name == name).unwrap();
    let q = find("model.layers.0.self_attn.q_proj.weight");
    assert_eq!(init(&config, q, 1), init(&config, q, 1));
    assert_ne!(init(&config, q, 1), init(&config, q, 2));
    assert_ne!(init(&config, q, 1), init(&config, find("model.layers.1.self_attn.q_proj.weight"), 1));
    // The same formula computed in Python: a seed gives the same model in every version.
    let first: Vec<u32> = init(&config, q, 42)[..4].iter().map(|value| value.to_bits()).collect();
    assert_eq!(first, [3156380931, 3180641579, 3181827039, 1032410589]);
}
