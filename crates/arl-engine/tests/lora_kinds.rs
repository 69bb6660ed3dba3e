//! Adapters of more kinds of layers: of routers and experts by PEFT's conversion, and of both ends; and DoRA's magnitudes.

#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::collections::HashMap;
use std::path::Path;

use arl_engine::backend::DType;
use arl_engine::backend::cpu::CpuBackend;
use arl_engine::{Engine, EngineOptions, GenerateOptions, Kind, Recompute, Weights};
use arl_model::{LoraConfig, merge_adapter};
use common::adapters::{LEVELS, adapter_of, batches, bits, open, scattered, trained, with};
use common::{HYPER, TYPES, difference, model, options};
use serde_json::{Value, json};

/// All layers of a mixture of experts, and both ends with some of a dense model's layers.
fn kinds() -> [(&'static str, Value); 2] {
    [
        ("moe-balance", json!({ "target_modules": "all-linear", "r": 2, "lora_alpha": 3 })),
        (
            "qwen2-window",
            json!({ "target_modules": ["lm_head", "embed_tokens", "k_proj", "down_proj"], "r": 3, "lora_alpha": 4 }),
        ),
    ]
}

fn dora() -> Value {
    json!({ "target_modules": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"], "r": 3, "lora_alpha": 6, "use_dora": true })
}

fn merged(name: &str, adapter: &Path, base: &EngineOptions) -> Engine<CpuBackend> {
    let dir = tempfile::tempdir().unwrap();
    merge_adapter(&model(name), adapter, dir.path(), None).unwrap();
    Engine::open(Box::new(CpuBackend::new()), dir.path(), Weights::Checkpoint, base).unwrap()
}

#[test]
fn they_compute_and_generate_what_the_merged_model_does() {
    let others = [("window-bias", dora()), ("qwen2-window", dora())];
    for (name, text) in kinds().into_iter().chain(others) {
        let adapter = adapter_of(name, &text, |tensor, place| {
            // Magnitudes of about the size of the rows.
            if tensor.ends_with("vector") { 0.5 + 0.2 * scattered(tensor, place) } else { scattered(tensor, place) }
        });
        let base = options(DType::F32, Recompute::Norms, 33);
        let mut full = merged(name, adapter.path(), &base);
        let mut adapted = open(name, &with(base.clone(), &text));
        adapted.load_adapter(adapter.path()).unwrap();
        let (actual, expected) = (adapted.inspect(&batches()[0]).unwrap(), full.inspect(&batches()[0]).unwrap());
        let apart = difference(&actual.logits, &expected.logits);
        assert!(apart < 2e-5, "{name} {text}: {apart:e}");

        let base = EngineOptions { inference_only: true, ..base };
        let mut full = merged(name, adapter.path(), &base);
        let mut adapted = open(name, &with(base, &text));
        adapted.load_adapter(adapter.path()).unwrap();
        let (options, prompts) = (GenerateOptions::greedy(12), [vec![1, 2, 3], vec![7; 40], vec![30]]);
        assert_eq!(adapted.generate(&prompts, &options).unwrap(), full.generate(&prompts, &options).unwrap());
    }
}

/// The loss at a shift of everything that is trained along the gradient, but for tensors that are left out.
fn slope_and_square(name: &str, text: &Value, of: impl Fn(&str) -> bool) -> (f64, f64) {
    let value = |tensor: &str, place: usize| {
        if tensor.ends_with("vector") { 0.5 + 0.2 * scattered(tensor, place) } else { scattered(tensor, place) }
    };
    let adapter = adapter_of(name, text, value);
    let mut engine = open(name, &with(options(DType::F32, Recompute::Norms, 33), text));
    let loss = |engine: &mut Engine<CpuBackend>, dir: &Path| {
        engine.load_adapter(dir).unwrap();
        let stats = engine.gradients(&batches()).unwrap();
        let sum = |of: fn(&arl_engine::MicroBatchStats) -> f64| stats.iter().map(of).sum::<f64>();
        sum(|s| s.loss_sum) / sum(|s| s.target_weight) + sum(|s| s.balance_loss)
    };
    loss(&mut engine, adapter.path());
    let names: Vec<String> = trained(&engine).into_iter().filter(|name| of(name)).collect();
    let gradients: HashMap<String, Vec<f32>> =
        names.iter().map(|name| (name.clone(), engine.read_tensor(name, Kind::Gradients).unwrap())).collect();
    let square: f64 = gradients.values().flatten().map(|g| f64::from(*g) * f64::from(*g)).sum();
    let step = 1e-3 / square.sqrt();
    let mut at = |sign: f64| {
        let moved = adapter_of(name, text, |tensor, place| {
            let gradient = gradients.get(tensor).map_or(0.0, |values| f64::from(values[place]));
            value(tensor, place) + (sign * step * gradient) as f32
        });
        loss(&mut engine, moved.path())
    };
    ((at(1.0) - at(-1.0)) / (2.0 * step), square)
}

#[test]
fn gradients_are_the_slope_of_the_loss() {
    for (name, text) in kinds() {
        let (slope, square) = slope_and_square(name, &text, |_| true);
        assert!((slope - square).abs() < 1e-2 * square, "{name} {text}: {slope} instead of {square}");
    }
    for name in ["window-bias", "qwen2-window"] {
        // The norms under the magnitudes are constants to A and B.
        let (slope, square) = slope_and_square(name, &dora(), |tensor| tensor.ends_with("vector"));
        assert!((slope - square).abs() < 5e-3 * square, "{name}: {slope} instead of {square}");
    }
}

#[test]
fn recomputation_and_offloading_change_no_bit() {
    let dora = ("qwen2-window", dora());
    for (name, text) in kinds().into_iter().chain([dora]) {
        for dtype in TYPES.into_iter().filter(|dtype| *dtype == DType::F32 || text["use_dora"].is_null()) {
            let run = |recompute, offload| {
                let base = options(dtype, recompute, 33);
                let base = EngineOptions {
                    activation_offloading: offload,
                    optimizer_offload: offload,
                    loss_seq_chunk_size: Some(7),
                    ..base
                };
                let mut engine = open(name, &with(base, &text));
                let losses: Vec<u64> = (0..3).map(|_| engine.step(&batches(), HYPER).unwrap().loss.to_bits()).collect();
                let names = trained(&engine);
                (losses, bits(&mut engine, &names, Kind::Weights))
            };
            let plain = run(Recompute::Off, false);
            for recompute in LEVELS {
                for offload in [false, true] {
                    assert!(run(recompute, offload) == plain, "{name} {dtype:?} {recompute:?} {offload}");
                }
            }
        }
    }
}

#[test]
fn fresh_magnitudes_change_nothing_and_train_and_resume() {
    let base = options(DType::F32, Recompute::Norms, 33);
    let mut plain = open("qwen2-window", &base);
    let text = dora();
    let options = with(base, &text);
    let mut engine = open("qwen2-window", &options);
    let expected = plain.inspect(&batches()[0]).unwrap().logits;
    assert!(difference(&engine.inspect(&batches()[0]).unwrap().logits, &expected) < 1e-5);
    let module = "model.layers.1.mlp.down_proj";
    let weight = engine.read_tensor(&format!("{module}.weight"), Kind::Weights).unwrap();
    let magnitudes = engine.read_tensor(&format!("{module}.lora_magnitude_vector"), Kind::Weights).unwrap();
    for (row, magnitude) in weight.chunks_exact(weight.len() / magnitudes.len()).zip(&magnitudes) {
        let norm = row.iter().map(|value| value * value).sum::<f32>().sqrt();
        assert!((norm - magnitude).abs() < 1e-5 * norm);
    }
    (0..2).for_each(|_| drop(engine.step(&batches(), HYPER).unwrap()));
    assert!(engine.read_tensor(&format!("{module}.lora_magnitude_vector"), Kind::Weights).unwrap() != magnitudes);
    let dir = tempfile::tempdir().unwrap();
    engine.save_state(dir.path()).unwrap();
    let backend = Box::new(CpuBackend::new());
    let mut resumed = Engine::open(backend, &model("qwen2-window"), Weights::Restored, &options).unwrap();
    resumed.restore_state(dir.path()).unwrap();
    for engine in [&mut engine, &mut resumed] {
        (0..2).for_each(|_| drop(engine.step(&batches(), HYPER).unwrap()));
    }
    let names = trained(&engine);
    assert!(bits(&mut engine, &names, Kind::Weights) == bits(&mut resumed, &names, Kind::Weights));
    // PEFT's name in the folder, and its flag.
    let out = tempfile::tempdir().unwrap();
    engine.export_adapter(out.path(), None).unwrap();
    assert!(LoraConfig::from_dir(out.path()).unwrap().use_dora);
    let mut again = open("qwen2-window", &options);
    again.load_adapter(out.path()).unwrap();
    assert!(bits(&mut again, &names, Kind::Weights) == bits(&mut engine, &names, Kind::Weights));
}

#[test]
fn what_is_not_built_next_to_them_is_refused_by_name() {
    let refused = |name: &str, base: EngineOptions, text: Value| {
        let opened = Engine::open(Box::new(CpuBackend::new()), &model(name), Weights::Checkpoint, &with(base, &text));
        opened.map(|_| ()).unwrap_err().message
    };
    let base = |dtype| options(dtype, Recompute::Norms, 33);
    let with_dropout = |mut text: Value| {
        text["lora_dropout"] = json!(0.1);
        text
    };
    assert!(refused("qwen2-window", base(DType::Bf16), dora()).contains("use_dora is built for float32 on the CPU"));
    assert!(refused("qwen2-window", base(DType::F32), with_dropout(dora())).contains("use_dora: magnitudes next to"));
    let [experts, head] = kinds();
    assert!(refused(experts.0, base(DType::F32), with_dropout(experts.1)).contains("of experts and routers"));
    assert!(refused(head.0, base(DType::F32), with_dropout(head.1)).contains("lm_head has no dropout"));
    // What is only used has no dropout in any case.
    let inference = EngineOptions { inference_only: true, ..base(DType::F32) };
    let [(name, text), _] = kinds();
    open(name, &with(inference, &with_dropout(text)));
}
