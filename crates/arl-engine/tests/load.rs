//! What loading a checkpoint costs. A process of its own: it measures the memory of all of it.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(clippy::print_stderr, reason = "a skip is reported")]

mod common;

use std::fs;

use arl_engine::backend::DType;
use arl_engine::backend::cpu::CpuBackend;
use arl_engine::{Engine, Recompute, Weights};
use arl_model::WeightDtype;
use common::{TYPES, all, options};

/// Some 18 million parameters, of which one tensor is half: a copy of it next to the weights would show.
const CONFIG: &str = r#"{
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 37000, "hidden_size": 256,
    "intermediate_size": 2048, "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "tie_word_embeddings": true, "hidden_act": "silu", "torch_dtype": "bfloat16"
}"#;

/// Bytes of a line of `/proc/self/status`.
fn status(key: &str) -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(key)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
}

#[test]
fn loading_takes_at_most_a_fifth_more_than_the_weights() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("config.json"), CONFIG).unwrap();
    for stored in [WeightDtype::F32, WeightDtype::Bf16] {
        let model = folder.path().join(format!("{stored:?}"));
        {
            let options = options(DType::F32, Recompute::Norms, 33);
            let mut engine =
                Engine::open(Box::new(CpuBackend::new()), folder.path(), Weights::Random(1), &options).unwrap();
            engine.export_model(&model, Some(stored)).unwrap();
        }
        for dtype in TYPES {
            // Sets the peak back to what is used now.
            if fs::write("/proc/self/clear_refs", "5").is_err() {
                eprintln!("SKIPPED: the peak of memory while loading: /proc/self/clear_refs cannot be written");
                return;
            }
            let before = status("VmRSS:");
            let options = options(dtype, Recompute::Norms, 33);
            let mut engine = Engine::open(Box::new(CpuBackend::new()), &model, Weights::Checkpoint, &options).unwrap();
            let peak = status("VmHWM:") - before;
            // With bf16 weights their exact f32 masters are there too: two halves of 16 bits. With f16 weights f32 masters
            // lie next to them.
            let bytes = if dtype == DType::F16 { 6 } else { 4 };
            let weights = bytes * all(&mut engine, arl_engine::Kind::Weights).len();
            assert!(weights > 64 << 20, "{weights} bytes are too few to tell from everything else");
            assert!(peak >= weights, "{peak} bytes hold {weights}");
            assert!(peak * 10 <= weights * 12, "{stored:?} to {dtype:?}: {peak} bytes at the peak for {weights}");
        }
    }
}
