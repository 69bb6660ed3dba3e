//! What the engine's tests share: small models, batches of random ids, comparisons.

#![allow(dead_code, unreachable_pub, reason = "each test file uses a part of it")]

pub mod adapters;
pub mod alone;
pub mod ranks;
pub mod vision;

use std::path::{Path, PathBuf};

use arl_engine::backend::DType;
use arl_engine::backend::cpu::CpuBackend;
use arl_engine::{Adam, BatchSize, Engine, EngineOptions, Hyper, IGNORED, Kind, MicroBatch, Recompute, Weights};
use serde_json::{Value, json};

pub const HYPER: Hyper = Hyper { learning_rate: 1e-2, max_grad_norm: 1.0 };

/// A dense model with windows and biases, and one with experts, a balance loss and a dense layer.
pub const MODELS: [&str; 2] = ["window-bias", "moe-balance"];

/// The types of weights and activations.
pub const TYPES: [DType; 3] = [DType::F32, DType::Bf16, DType::F16];

pub fn model(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../__test__/golden").join(name)
}

pub fn options(dtype: DType, recompute: Recompute, tokens: usize) -> EngineOptions {
    EngineOptions {
        dtype,
        recompute,
        max_batch: BatchSize { tokens, sequences: 8.min(tokens), ..BatchSize::default() },
        adam: Adam { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1 },
        ..EngineOptions::default()
    }
}

pub fn open(name: &str, options: &EngineOptions) -> Engine<CpuBackend> {
    Engine::open(Box::new(CpuBackend::new()), &model(name), Weights::Checkpoint, options).unwrap()
}

/// Sequences of these lengths, of random ids; the first third of each is not trained.
pub fn batch(lengths: &[usize], seed: u64) -> MicroBatch {
    let mut batch = MicroBatch { cu_seqlens: vec![0], weights: Some(Vec::new()), ..MicroBatch::default() };
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut random = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    for &length in lengths {
        let ids: Vec<i32> = (0..length).map(|_| random(32) as i32).collect();
        for t in 0..length {
            let trained = t >= length / 3 && t + 1 < length;
            batch.targets.push(if trained { ids[t + 1] } else { IGNORED });
            batch.positions.push(t as i32);
            batch.weights.as_mut().unwrap().push([1.0, 0.5, 2.0][random(3)]);
        }
        batch.input_ids.extend(ids);
        batch.cu_seqlens.push(batch.input_ids.len() as i32);
    }
    batch
}

/// The sequences of a batch, each a batch of its own.
pub fn split(batch: &MicroBatch) -> Vec<MicroBatch> {
    let sequences = batch.cu_seqlens.windows(2);
    sequences
        .map(|ends| {
            let part = ends[0] as usize..ends[1] as usize;
            MicroBatch {
                input_ids: batch.input_ids[part.clone()].to_vec(),
                targets: batch.targets[part.clone()].to_vec(),
                positions: batch.positions[part.clone()].to_vec(),
                cu_seqlens: vec![0, part.len() as i32],
                weights: batch.weights.as_ref().map(|w| w[part].to_vec()),
                ..MicroBatch::default()
            }
        })
        .collect()
}

/// Every tensor of a kind, one after the other.
pub fn all(engine: &mut Engine<CpuBackend>, kind: Kind) -> Vec<f32> {
    engine.tensor_names().iter().flat_map(|name| engine.read_tensor(name, kind).unwrap()).collect()
}

/// Weights and moments, as bits.
pub fn state_bits(engine: &mut Engine<CpuBackend>) -> Vec<u32> {
    [Kind::Weights, Kind::Moment1, Kind::Moment2]
        .into_iter()
        .flat_map(|kind| all(engine, kind))
        .map(f32::to_bits)
        .collect()
}

/// `|a - b| / |b|`.
pub fn difference(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let sum = |f: &dyn Fn(f64, f64) -> f64| -> f64 {
        a.iter().zip(b).map(|(&a, &b)| f(f64::from(a), f64::from(b))).sum::<f64>()
    };
    (sum(&|a, b| (a - b) * (a - b)) / sum(&|_, b| b * b)).sqrt()
}

/// A folder with a model's configuration, of another number of layers; it has no weights.
pub fn deeper(name: &str, layers: usize) -> tempfile::TempDir {
    let text = std::fs::read_to_string(model(name).join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
    config["num_hidden_layers"] = layers.into();
    if let Some(types) = config["layer_types"].as_array() {
        config["layer_types"] = types.iter().cycle().take(layers).cloned().collect();
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    dir
}

/// A folder with a model's configuration, some values of which are others; it has no weights.
pub fn altered(name: &str, values: Value) -> tempfile::TempDir {
    let text = std::fs::read_to_string(model(name).join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    config.as_object_mut().unwrap().extend(values.as_object().unwrap().clone());
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    dir
}

/// What the two hybrids have in common: three layers of the delta rule and one of attention, value heads that share key heads.
pub fn hybrid_config(model_type: &str, more: Value) -> Value {
    let mut config = json!({
        "model_type": model_type, "vocab_size": 32, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 12, "linear_value_head_dim": 20,
        "linear_conv_kernel_dim": 4, "rms_norm_eps": 1e-6, "tie_word_embeddings": true, "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    });
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    config
}

/// A dense hybrid, and one with experts, of which one is shared.
pub fn hybrids() -> [(&'static str, tempfile::TempDir); 2] {
    let experts = json!({
        "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 16,
        "norm_topk_prob": true, "mlp_only_layers": [1], "decoder_sparse_step": 1, "tie_word_embeddings": false,
    });
    let dense = ("dense", hybrid_config("qwen3_5_text", json!({})));
    [dense, ("experts", hybrid_config("qwen3_next", experts))].map(|(name, config)| {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        (name, dir)
    })
}
