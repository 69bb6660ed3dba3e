//! Rotary embeddings of every kind against what transformers computed (`data/rope.json`, made by `data/make_rope.py`).

#![allow(clippy::unwrap_used)] // helpers of tests

use std::path::Path;

use arl_model::{ModelConfig, RopeTable};
use serde_json::{Value, json};

fn floats(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|bits| f32::from_bits(bits.as_i64().unwrap() as i32 as u32)).collect()
}

/// Largest distance in units of the last place.
fn ulps(left: &[f32], right: &[f32]) -> i64 {
    assert_eq!(left.len(), right.len());
    let distance = |(a, b): (&f32, &f32)| (i64::from(a.to_bits() as i32) - i64::from(b.to_bits() as i32)).abs();
    left.iter().zip(right).map(distance).max().unwrap()
}

fn config(head_dim: usize, max_position_embeddings: usize, rope: &Value) -> ModelConfig {
    let config = json!({
        "model_type": "qwen3", "head_dim": head_dim, "max_position_embeddings": max_position_embeddings,
        "rope_parameters": rope,
    });
    ModelConfig::from_json(&config.to_string(), Path::new("config.json")).unwrap()
}

#[test]
fn every_kind_of_scaling_is_that_of_transformers_at_every_length() {
    let data: Value = serde_json::from_str(include_str!("data/rope.json")).unwrap();
    let (head_dim, longest) = (data["head_dim"].as_u64().unwrap(), data["max_position_embeddings"].as_u64().unwrap());
    let half = head_dim as usize / 2;
    for case in data["cases"].as_array().unwrap() {
        let length = case["length"].as_u64().unwrap() as usize;
        let what = format!("{} at {length}", case["name"]);
        let config = config(head_dim as usize, longest as usize, &case["rope_parameters"]);
        assert_eq!(config.unknown_keys, Vec::<String>::new(), "{what}");
        let table = RopeTable::new(&config);
        let mut inv_freq = vec![0f32; half];
        table.inv_freq(length, &mut inv_freq);
        // torch's vectorised power is good to one unit in the last place, and the formulas have a few steps after it.
        let apart = ulps(&inv_freq, &floats(&case["inv_freq"]));
        assert!(apart <= 2, "{what}: inverse frequencies are {apart} units apart");
        let scaling = case["attention_scaling"].as_f64().unwrap() as f32;
        assert_eq!(table.attention_scaling(), scaling, "{what}");

        let positions: Vec<i32> =
            case["rows"].as_array().unwrap().iter().map(|row| row.as_i64().unwrap() as i32).collect();
        let (mut cos, mut sin) = (vec![0f32; positions.len() * half], vec![0f32; positions.len() * half]);
        table.fill(length, &positions, &mut cos, &mut sin);
        for (ours, theirs) in [(&cos, floats(&case["cos"])), (&sin, floats(&case["sin"]))] {
            for (i, (a, b)) in ours.iter().zip(&theirs).enumerate() {
                // Two units in a frequency turn the last position's angle by up to position * frequency * 2^-22.
                let bound = 4e-7 + positions[i / half] as f32 * inv_freq[i % half] * 2.5e-7;
                assert!((a - b).abs() <= bound * scaling.max(1.0), "{what}: {a} and {b} at {i}");
            }
        }
    }
}

#[test]
fn frequencies_of_a_real_head_are_those_of_transformers() {
    let data: Value = serde_json::from_str(include_str!("data/rope.json")).unwrap();
    let table = RopeTable::new(&config(128, 40_960, &json!({"rope_theta": 1_000_000.0})));
    let mut inv_freq = [0f32; 64];
    table.inv_freq(1, &mut inv_freq);
    let apart = ulps(&inv_freq, &floats(&data["inv_freq_128_1e6"]));
    assert!(apart <= 1, "{apart} units apart");
}

#[test]
fn only_lengths_beyond_the_bound_change_the_frequencies() {
    let at = |rope: &Value, length: usize| {
        let mut inv_freq = [0f32; 8];
        RopeTable::new(&config(16, 128, rope)).inv_freq(length, &mut inv_freq);
        inv_freq
    };
    let dynamic = json!({"rope_type": "dynamic", "factor": 2.0});
    assert_eq!(at(&dynamic, 1), at(&dynamic, 128));
    assert_ne!(at(&dynamic, 128), at(&dynamic, 129));
    let factors = |by: f64| vec![by; 8];
    let longrope = json!({"rope_type": "longrope", "short_factor": factors(1.0), "long_factor": factors(2.0),
        "original_max_position_embeddings": 64});
    assert_eq!(at(&longrope, 1), at(&longrope, 64));
    assert_ne!(at(&longrope, 64), at(&longrope, 65));
}
