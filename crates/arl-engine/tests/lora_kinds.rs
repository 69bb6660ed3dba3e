//! Adapters of more kinds of layers: of routers and experts by PEFT's conversion, and of both ends; and DoRA's magnitudes.

use crate::common;

use std::collections::{HashMap, HashSet};
use std::path::Path;

use arl_engine::backend::DType;
use arl_engine::backend::cpu::CpuBackend;
use arl_engine::{Engine, EngineOptions, GenerateOptions, Kind, LossScaling, Recompute, Weights};
use arl_model::{LoraConfig, Projection, merge_adapter};
use common::adapters::{LEVELS, adapter_of, batches, bits, open, product, scattered, trained, with};
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
fn gradients_are_those_that_the_merged_models_imply() {
    let mut seen = HashSet::new();
    for (name, text) in kinds() {
        let adapter = adapter_of(name, &text, scattered);
        let base = options(DType::F32, Recompute::Norms, 33);
        let mut full = merged(name, adapter.path(), &base);
        let mut adapted = open(name, &with(base, &text));
        adapted.load_adapter(adapter.path()).unwrap();
        adapted.gradients(&batches()).unwrap();
        full.gradients(&batches()).unwrap();
        let lora = adapted.lora().unwrap().clone();
        // Those of experts are `lora.rs`'s.
        for one in lora.adapters.iter().filter(|adapter| adapter.experts.is_none()) {
            let ((input, output), rank) = (one.sides(&lora.model), one.rank);
            let embedding = one.projection == Projection::Embedding;
            let [a_name, b_name] = if embedding { ["embedding_A", "embedding_B"] } else { ["A.weight", "B.weight"] };
            let [a_name, b_name] = [a_name, b_name].map(|matrix| format!("{}.lora_{matrix}", one.module));
            let d_weight = full.read_tensor(&format!("{}.weight", one.module), Kind::Gradients).unwrap();
            let a = adapted.read_tensor(&a_name, Kind::Weights).unwrap();
            let b = adapted.read_tensor(&b_name, Kind::Weights).unwrap();
            // W + s B A, but of the look-up, whose weight is [vocab, hidden], W + s A B^T.
            let (mut d_a, mut d_b) = if embedding {
                (
                    product(&d_weight, &b, [input, rank, output], false, false),
                    product(&d_weight, &a, [output, rank, input], true, false),
                )
            } else {
                (
                    product(&b, &d_weight, [rank, input, output], true, false),
                    product(&d_weight, &a, [output, rank, input], false, true),
                )
            };
            d_a.iter_mut().chain(&mut d_b).for_each(|value| *value *= one.factor);
            for (name, expected) in [(a_name, d_a), (b_name, d_b)] {
                let apart = difference(&adapted.read_tensor(&name, Kind::Gradients).unwrap(), &expected);
                assert!(apart < 5e-5, "{name}: {apart:e}");
            }
            seen.insert(one.projection);
        }
    }
    assert!([Projection::Router, Projection::Head, Projection::Embedding].iter().all(|kind| seen.contains(kind)));
}

#[test]
fn gradients_of_magnitudes_are_the_slope_of_the_loss() {
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
        for dtype in TYPES {
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
fn magnitudes_in_types_of_16_bits_train_as_in_f32_but_for_rounding() {
    for name in ["window-bias", "qwen2-window"] {
        let adapter = adapter_of(name, &dora(), |tensor, place| {
            if tensor.ends_with("vector") { 0.5 + 0.2 * scattered(tensor, place) } else { scattered(tensor, place) }
        });
        let first = |dtype| {
            let loss_scaling = LossScaling { initial: 64.0, ..LossScaling::default() };
            let base = EngineOptions { loss_scaling, ..options(dtype, Recompute::Norms, 33) };
            let mut engine = open(name, &with(base, &dora()));
            engine.load_adapter(adapter.path()).unwrap();
            let stats = engine.gradients(&batches()).unwrap();
            let [magnitudes, others] = [true, false].map(|wanted| {
                let names = trained(&engine).into_iter().filter(|name| name.ends_with("vector") == wanted);
                let names: Vec<String> = names.collect();
                names.iter().flat_map(|name| engine.read_tensor(name, Kind::Gradients).unwrap()).collect::<Vec<f32>>()
            });
            (stats.iter().map(|stats| stats.loss_sum).sum::<f64>(), magnitudes, others)
        };
        let expected = first(DType::F32);
        for (dtype, bound) in [(DType::Bf16, 3e-2), (DType::F16, 4e-3)] {
            let actual = first(dtype);
            assert!(
                (actual.0 - expected.0).abs() < bound / 5.0 * expected.0,
                "{name} {dtype:?}: {} {}",
                actual.0,
                expected.0
            );
            let apart = [difference(&actual.1, &expected.1), difference(&actual.2, &expected.2)];
            assert!(apart.iter().all(|apart| *apart < bound), "{name} {dtype:?}: {apart:?}");
        }
    }
}

#[test]
fn fresh_magnitudes_change_nothing_and_train_and_resume() {
    for (dtype, apart) in [(DType::F32, 1e-5), (DType::Bf16, 3e-2), (DType::F16, 4e-3)] {
        fresh_magnitudes(dtype, apart);
    }
}

fn fresh_magnitudes(dtype: DType, apart: f64) {
    let base = options(dtype, Recompute::Norms, 33);
    let mut plain = open("qwen2-window", &base);
    let text = dora();
    let options = with(base, &text);
    let mut engine = open("qwen2-window", &options);
    let expected = plain.inspect(&batches()[0]).unwrap().logits;
    assert!(difference(&engine.inspect(&batches()[0]).unwrap().logits, &expected) < apart);
    let module = "model.layers.0.mlp.down_proj";
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
    // In an engine for inference alone they are as exact, whatever its weights are.
    let mut used = open("qwen2-window", &EngineOptions { inference_only: true, ..options.clone() });
    used.load_adapter(out.path()).unwrap();
    let magnitudes: Vec<String> = names.iter().filter(|name| name.ends_with("vector")).cloned().collect();
    assert!(bits(&mut used, &magnitudes, Kind::Weights) == bits(&mut engine, &magnitudes, Kind::Weights));
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
    assert!(refused("qwen2-window", base(DType::F32), with_dropout(dora())).contains("use_dora: magnitudes next to"));
    let [experts, head] = kinds();
    assert!(refused(experts.0, base(DType::F32), with_dropout(experts.1)).contains("of experts and routers"));
    assert!(refused(head.0, base(DType::F32), with_dropout(head.1)).contains("lm_head has no dropout"));
    // What is only used has no dropout in any case.
    let inference = EngineOptions { inference_only: true, ..base(DType::F32) };
    let [(name, text), _] = kinds();
    open(name, &with(inference, &with_dropout(text)));
}
