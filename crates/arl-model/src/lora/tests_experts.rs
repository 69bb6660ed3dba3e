//! Experts and routers by the names that PEFT converts, and adapters of experts that were modules of their own.

use std::path::Path;

use safetensors::Dtype;
use serde_json::{Value, json};

use super::*;
use crate::weights::{SafetensorsWriter, TensorDecl};

fn model() -> ModelConfig {
    let config = json!({
        "model_type": "qwen3_moe", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": false, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 6, "mlp_only_layers": [1],
    });
    ModelConfig::from_json(&config.to_string(), Path::new("config.json")).unwrap()
}

fn lora(text: Value) -> Lora {
    let config = LoraConfig::from_json(&text.to_string(), Path::new("adapter_config.json")).unwrap();
    Lora::new(&model(), &config).unwrap()
}

fn counts(lora: &Lora) -> Vec<(String, usize)> {
    let mut counts = lora.counts();
    counts.sort();
    counts
}

fn numbered(names: &[(&str, usize)]) -> Vec<(String, usize)> {
    names.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect()
}

#[test]
fn all_linear_is_attention_the_experts_and_the_router_as_parameters() {
    let found = lora(json!({ "target_modules": "all-linear", "r": 3, "lora_alpha": 5 }));
    // The dense layer in between has these names too, and is left alone, as in PEFT.
    let expected = [
        ("down_proj", 2),
        ("gate", 2),
        ("gate_up_proj", 2),
        ("k_proj", 3),
        ("o_proj", 3),
        ("q_proj", 3),
        ("v_proj", 3),
    ];
    assert_eq!(counts(&found), numbered(&expected));
    let rank = |end: &str| {
        let adapter = found.adapters.iter().find(|adapter| adapter.module.ends_with(end)).unwrap();
        (adapter.rank, adapter.factor)
    };
    // Twice the rank and twice the alpha: the same factor.
    let factor = (5.0f64 / 3.0) as f32;
    assert_eq!(
        [rank("gate_up_proj"), rank("experts.down_proj"), rank("mlp.gate")],
        [(6, factor), (3, factor), (3, factor)]
    );
    let stored: Vec<String> = found.stored().into_iter().map(|(name, _)| name).collect();
    for name in ["gate.lora_A.weight", "experts.base_layer.lora_B.weight", "experts.lora_A.weight"] {
        assert!(stored.contains(&format!("base_model.model.model.layers.2.mlp.{name}")), "{name} {stored:?}");
    }
    // What is written names parameters, as PEFT's converted configuration, and means the same again.
    let written = found.config.to_json(None, &targets::target_names(&found));
    let json: Value = serde_json::from_str(&written).unwrap();
    assert_eq!(json["target_modules"], json!(["k_proj", "o_proj", "q_proj", "v_proj"]));
    assert_eq!(json["target_parameters"], json!(["gate.weight", "gate_up_proj", "down_proj"]));
    assert_eq!(
        (&json["rank_pattern"], &json["alpha_pattern"]),
        (&json!({ r".*\.gate_up_proj": 6 }), &json!({ r".*\.gate_up_proj": 10 }))
    );
    assert_eq!(lora(json).adapters, found.adapters);
}

#[test]
fn names_and_patterns_of_experts_are_converted_and_others_stay() {
    let of = |targets: Value| counts(&lora(json!({ "target_modules": targets })));
    let experts = [("down_proj", 2), ("gate_up_proj", 2)];
    assert_eq!(of(json!(["gate_proj", "up_proj", "down_proj"])), numbered(&experts));
    assert_eq!(of(json!(r".*experts\.(gate|up|down)_proj")), numbered(&experts));
    assert_eq!(of(json!(["mlp.gate", "q_proj"])), numbered(&[("gate", 2), ("q_proj", 3)]));
    assert_eq!(of(json!(r".*q_proj")), numbered(&[("q_proj", 3)]));
    let only = counts(&lora(json!({ "target_modules": [], "target_parameters": ["experts.down_proj"] })));
    assert_eq!(only, numbered(&[("down_proj", 2)]));
}

#[test]
fn adapters_of_experts_as_modules_are_joined() {
    let (rank, experts) = (2, 4);
    let found = lora(json!({ "target_modules": ["gate_proj", "up_proj", "down_proj"], "r": rank }));
    // The old layout, of values that are known by name and place.
    let value = |name: &str, place: usize| {
        ((name.len() * 31 + name.as_bytes().iter().map(|b| usize::from(*b)).sum::<usize>() + place * 7) % 97) as f32
            / 97.0
    };
    let shape = |part: &str, matrix: &str| match (part, matrix) {
        ("down_proj", "lora_A") => [rank, 6],
        ("down_proj", _) => [16, rank],
        (_, "lora_A") => [rank, 16],
        _ => [6, rank],
    };
    let mut declared = Vec::new();
    for layer in [0, 2] {
        for expert in 0..experts {
            for part in ["gate_proj", "up_proj", "down_proj"] {
                for matrix in ["lora_A", "lora_B"] {
                    let name =
                        format!("base_model.model.model.layers.{layer}.mlp.experts.{expert}.{part}.{matrix}.weight");
                    declared.push(TensorDecl { name, dtype: Dtype::F32, shape: shape(part, matrix).to_vec() });
                }
            }
        }
    }
    let write = |declared: &[TensorDecl]| {
        let dir = tempfile::tempdir().unwrap();
        let mut writer =
            SafetensorsWriter::create(&dir.path().join("adapter_model.safetensors"), &[], declared).unwrap();
        for decl in declared {
            let values = (0..decl.shape.iter().product()).map(|place| value(&decl.name, place));
            writer.append(&values.flat_map(f32::to_le_bytes).collect::<Vec<u8>>()).unwrap();
        }
        writer.finish().unwrap();
        dir
    };
    let dir = write(&declared);
    let file = AdapterFile::open(dir.path(), &found).unwrap();
    for adapter in &found.adapters {
        let (input, output) = adapter.sides(&found.model);
        let read = |matrix: &str, len: usize| {
            let mut values = vec![0f32; len];
            file.read_f32(&format!("{}.{matrix}.weight", adapter.module), &mut values).unwrap();
            values
        };
        let a = read("lora_A", experts * adapter.rank * input);
        let b = read("lora_B", experts * output * adapter.rank);
        let parts: &[&str] = if adapter.rank > rank { &["gate_proj", "up_proj"] } else { &["down_proj"] };
        let rows = output / parts.len();
        for expert in 0..experts {
            for row in 0..output {
                let module = adapter.module.rsplit_once('.').unwrap().0;
                let own =
                    |matrix: &str| format!("base_model.model.{module}.{expert}.{}.{matrix}.weight", parts[row / rows]);
                let (own_a, own_b) = (own("lora_A"), own("lora_B"));
                for column in 0..input {
                    let joined: f32 = (0..adapter.rank)
                        .map(|j| {
                            b[(expert * output + row) * adapter.rank + j]
                                * a[(expert * adapter.rank + j) * input + column]
                        })
                        .sum();
                    let alone: f32 = (0..rank)
                        .map(|j| value(&own_b, row % rows * rank + j) * value(&own_a, j * input + column))
                        .sum();
                    assert!((joined - alone).abs() < 1e-5, "{} {expert} {row} {column}", adapter.module);
                }
            }
        }
    }
    declared.pop();
    let message = AdapterFile::open(write(&declared).path(), &found).unwrap_err().message;
    assert!(
        message.contains("has no `base_model.model.model.layers.2.mlp.experts.3.down_proj.lora_B.weight`"),
        "{message}"
    );
}
