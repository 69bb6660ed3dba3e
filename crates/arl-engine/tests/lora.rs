//! Adapters of low rank: they compute what the merged model computes, their gradients are those that its weights' gradients
//! imply, and they are saved, resumed and dropped exactly.

use crate::common;

use std::path::Path;

use arl_engine::backend::DType;
use arl_engine::backend::cpu::CpuBackend;
use arl_engine::{Engine, EngineOptions, GenerateOptions, Kind, Recompute, Weights};
use arl_model::{ErrorCode, LoraConfig, SafetensorsFile, merge_adapter};
use common::adapters::{LEVELS, adapter_of, batches, bits, open, product, scattered, trained, with};
use common::{HYPER, TYPES, difference, model, options};
use serde_json::{Value, json};

/// Every layer, all products with one factor; and some layers of each product, each with its own factor and rank.
fn configs() -> [Value; 2] {
    [
        json!({ "target_modules": "all-linear", "r": 3, "lora_alpha": 6 }),
        json!({
            "target_modules": ["k_proj", "v_proj", "o_proj", "up_proj"], "r": 4, "lora_alpha": 2, "use_rslora": true,
            "rank_pattern": { "v_proj": 2 }, "alpha_pattern": { "k_proj": 5 },
        }),
    ]
}

#[test]
fn adapters_compute_what_the_merged_model_does_and_its_gradients_imply_theirs() {
    for text in configs() {
        let adapter = adapter_of("window-bias", &text, scattered);
        let merged = tempfile::tempdir().unwrap();
        merge_adapter(&model("window-bias"), adapter.path(), merged.path(), None).unwrap();
        let base = options(DType::F32, Recompute::Norms, 33);
        let backend = Box::new(CpuBackend::new());
        let mut full = Engine::open(backend, merged.path(), Weights::Checkpoint, &base).unwrap();
        let mut adapted = open("window-bias", &with(base, &text));
        adapted.load_adapter(adapter.path()).unwrap();

        let (actual, expected) = (adapted.inspect(&batches()[0]).unwrap(), full.inspect(&batches()[0]).unwrap());
        assert!(difference(&actual.logits, &expected.logits) < 1e-5);
        let (actual, expected) = (adapted.gradients(&batches()).unwrap(), full.gradients(&batches()).unwrap());
        for (actual, expected) in actual.iter().zip(&expected) {
            assert!((actual.loss_sum - expected.loss_sum).abs() < 1e-5 * expected.loss_sum);
        }
        let lora = adapted.lora().unwrap().clone();
        for one in &lora.adapters {
            let (input, output) = one.sides(&lora.model);
            let name = |matrix: &str| format!("{}.{matrix}.weight", one.module);
            let d_weight = full.read_tensor(&format!("{}.weight", one.module), Kind::Gradients).unwrap();
            let a = adapted.read_tensor(&name("lora_A"), Kind::Weights).unwrap();
            let b = adapted.read_tensor(&name("lora_B"), Kind::Weights).unwrap();
            // y = W x + s B A x: dA = s B^T dW, dB = s dW A^T.
            let mut d_a = product(&b, &d_weight, [one.rank, input, output], true, false);
            let mut d_b = product(&d_weight, &a, [output, one.rank, input], false, true);
            d_a.iter_mut().chain(&mut d_b).for_each(|value| *value *= one.factor);
            for (matrix, expected) in [("lora_A", d_a), ("lora_B", d_b)] {
                let actual = adapted.read_tensor(&name(matrix), Kind::Gradients).unwrap();
                let apart = difference(&actual, &expected);
                assert!(apart < 2e-5, "{}: {apart:e}", name(matrix));
            }
            let error = adapted.read_tensor(&format!("{}.weight", one.module), Kind::Gradients).unwrap_err();
            assert!(error.message.contains("is frozen"), "{error}");
        }
    }
}

#[test]
fn adapters_of_experts_have_the_gradients_that_the_merged_experts_imply() {
    let text = json!({
        "target_modules": ["o_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "experts.down_proj"], "r": 3,
        "lora_alpha": 4, "rank_pattern": { "down_proj": 2 },
    });
    // Small ones, so that routers choose alike.
    let adapter = adapter_of("moe-balance", &text, |name, place| 0.3 * scattered(name, place));
    let merged = tempfile::tempdir().unwrap();
    merge_adapter(&model("moe-balance"), adapter.path(), merged.path(), None).unwrap();
    let base = options(DType::F32, Recompute::Norms, 33);
    let backend = Box::new(CpuBackend::new());
    let mut full = Engine::open(backend, merged.path(), Weights::Checkpoint, &base).unwrap();
    let mut adapted = open("moe-balance", &with(base, &text));
    adapted.load_adapter(adapter.path()).unwrap();
    let (actual, expected) = (adapted.gradients(&batches()).unwrap(), full.gradients(&batches()).unwrap());
    for (actual, expected) in actual.iter().zip(&expected) {
        assert!((actual.loss_sum - expected.loss_sum).abs() < 1e-5 * expected.loss_sum);
    }
    let lora = adapted.lora().unwrap().clone();
    let mut seen = 0;
    for one in lora.adapters.iter().filter(|adapter| adapter.experts.is_some()) {
        let ((input, output), layer) = (one.sides(&lora.model), one.block.layer().unwrap());
        let parts: &[&str] =
            if one.module.ends_with("gate_up_proj") { &["gate_proj", "up_proj"] } else { &["down_proj"] };
        let mut read =
            |matrix: &str, kind| adapted.read_tensor(&format!("{}.{matrix}.weight", one.module), kind).unwrap();
        let (a, b) = (read("lora_A", Kind::Weights), read("lora_B", Kind::Weights));
        let (d_a, d_b) = (read("lora_A", Kind::Gradients), read("lora_B", Kind::Gradients));
        let (a_len, b_len) = (one.rank * input, output * one.rank);
        for e in 0..one.experts.unwrap() {
            let of = |part: &&str| format!("model.layers.{layer}.mlp.experts.{e}.{part}.weight");
            let d_weight: Vec<f32> =
                parts.iter().flat_map(|part| full.read_tensor(&of(part), Kind::Gradients).unwrap()).collect();
            let (a, b) = (&a[e * a_len..][..a_len], &b[e * b_len..][..b_len]);
            let mut expected_a = product(b, &d_weight, [one.rank, input, output], true, false);
            let mut expected_b = product(&d_weight, a, [output, one.rank, input], false, true);
            expected_a.iter_mut().chain(&mut expected_b).for_each(|value| *value *= one.factor);
            for (actual, expected) in
                [(&d_a[e * a_len..][..a_len], expected_a), (&d_b[e * b_len..][..b_len], expected_b)]
            {
                if expected.iter().all(|value| *value == 0.0) {
                    assert!(actual.iter().all(|value| *value == 0.0), "{} {e}", one.module);
                    continue;
                }
                seen += 1;
                let apart = difference(actual, &expected);
                assert!(apart < 5e-5, "{} {e}: {apart:e}", one.module);
            }
        }
    }
    assert!(seen > 8, "{seen}");
}

#[test]
fn recomputation_and_offloading_change_no_bit() {
    for name in ["window-bias", "moe-balance"] {
        let text = if name == "window-bias" {
            json!({ "target_modules": ["q_proj", "v_proj", "o_proj"], "r": 2, "lora_dropout": 0.25 })
        } else {
            json!({ "target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "r": 2 })
        };
        for dtype in TYPES {
            let run = |recompute, activation_offloading, optimizer_offload| {
                let base = options(dtype, recompute, 33);
                let base = EngineOptions { activation_offloading, optimizer_offload, ..base };
                let mut engine = open(name, &with(base, &text));
                let losses: Vec<u64> = (0..3).map(|_| engine.step(&batches(), HYPER).unwrap().loss.to_bits()).collect();
                let names = trained(&engine);
                (losses, bits(&mut engine, &names, Kind::Weights))
            };
            let plain = run(Recompute::Off, false, false);
            for recompute in LEVELS {
                for offload in [false, true] {
                    assert!(run(recompute, offload, offload) == plain, "{name} {dtype:?} {recompute:?} {offload}");
                }
            }
        }
    }
}

/// The loss along the gradient, as differences and the gradient itself see it: checks every element of it at once.
#[test]
fn gradients_are_the_slope_of_the_loss_with_and_without_dropout() {
    for dropout in [0.0, 0.4] {
        for mut text in configs() {
            text["lora_dropout"] = json!(dropout);
            let adapter = adapter_of("window-bias", &text, scattered);
            let mut engine = open("window-bias", &with(options(DType::F32, Recompute::Norms, 33), &text));
            let loss = |engine: &mut Engine<CpuBackend>, dir: &Path| {
                engine.load_adapter(dir).unwrap();
                let stats = engine.gradients(&batches()).unwrap();
                let sum = |of: fn(&arl_engine::MicroBatchStats) -> f64| stats.iter().map(of).sum::<f64>();
                sum(|s| s.loss_sum) / sum(|s| s.target_weight)
            };
            loss(&mut engine, adapter.path());
            let names = trained(&engine);
            let gradients: std::collections::HashMap<String, Vec<f32>> =
                names.iter().map(|name| (name.clone(), engine.read_tensor(name, Kind::Gradients).unwrap())).collect();
            let square: f64 = gradients.values().flatten().map(|g| f64::from(*g) * f64::from(*g)).sum();
            let step = 1e-3 / square.sqrt();
            let mut at = |sign: f64| {
                let moved = adapter_of("window-bias", &text, |name, place| {
                    scattered(name, place) + (sign * step * f64::from(gradients[name][place])) as f32
                });
                loss(&mut engine, moved.path())
            };
            let slope = (at(1.0) - at(-1.0)) / (2.0 * step);
            assert!((slope - square).abs() < 5e-3 * square, "{dropout} {text}: {slope} instead of {square}");
        }
    }
}

#[test]
fn dropout_is_for_training_alone_and_new_at_every_step() {
    let of = |dropout: f64| json!({ "target_modules": "all-linear", "r": 3, "lora_dropout": dropout });
    let adapter = adapter_of("window-bias", &of(0.0), scattered);
    let mut engines = [0.0, 0.5].map(|dropout| {
        let mut engine = open("window-bias", &with(options(DType::F32, Recompute::Norms, 33), &of(dropout)));
        engine.load_adapter(adapter.path()).unwrap();
        engine
    });
    let [plain, dropping] = &mut engines;
    assert_eq!(dropping.evaluate(&batches()).unwrap(), plain.evaluate(&batches()).unwrap());
    assert_eq!(dropping.inspect(&batches()[0]).unwrap().logits, plain.inspect(&batches()[0]).unwrap().logits);
    // Neither moves a weight.
    let still = arl_engine::Hyper { learning_rate: 0.0, ..HYPER };
    let losses: Vec<f64> = (0..4).map(|_| dropping.step(&batches(), still).unwrap().loss).collect();
    let loss = plain.step(&batches(), still).unwrap().loss;
    for (i, dropped) in losses.iter().enumerate() {
        assert!(*dropped != loss && (dropped - loss).abs() < 0.5 * loss, "{dropped} {loss}");
        assert!(losses[..i].iter().all(|other| other != dropped));
    }
}

#[test]
fn a_resumed_run_has_the_same_bits_and_its_state_holds_what_is_trained_alone() {
    let dense = json!({
        "target_modules": "all-linear", "r": 2, "lora_dropout": 0.1, "modules_to_save": ["lm_head", "norm"],
    });
    let experts = json!({ "target_modules": ["q_proj", "o_proj"], "target_parameters": ["experts.down_proj"], "r": 2 });
    for (name, text) in [("window-bias", dense), ("moe-balance", experts)] {
        for dtype in TYPES {
            let options = with(options(dtype, Recompute::Norms, 33), &text);
            let mut engine = open(name, &options);
            let names = trained(&engine);
            let frozen: Vec<String> = engine.tensor_names().into_iter().filter(|name| !names.contains(name)).collect();
            let before = bits(&mut engine, &frozen, Kind::Weights);
            // Submitted ahead, as runs do.
            let mut ticket = engine.submit(&batches(), HYPER).unwrap();
            for _ in 0..2 {
                engine.apply(ticket).unwrap();
                let next = engine.submit(&batches(), HYPER).unwrap();
                engine.finish(ticket).unwrap();
                ticket = next;
            }
            engine.finish(ticket).unwrap();
            let dir = tempfile::tempdir().unwrap();
            engine.save_state(dir.path()).unwrap();
            let file = SafetensorsFile::open(&dir.path().join("engine.safetensors")).unwrap();
            let known = |stored: &String| names.iter().any(|name| stored.ends_with(&format!("/{name}")));
            assert!(file.names().iter().all(known), "{:?}", file.names());

            let backend = Box::new(CpuBackend::new());
            let mut resumed = Engine::open(backend, &model(name), Weights::Restored, &options).unwrap();
            resumed.restore_state(dir.path()).unwrap();
            for engine in [&mut engine, &mut resumed] {
                for _ in 0..2 {
                    engine.step(&batches(), HYPER).unwrap();
                }
            }
            for kind in [Kind::Weights, Kind::Moment1, Kind::Moment2] {
                let same = bits(&mut resumed, &names, kind) == bits(&mut engine, &names, kind);
                assert!(same, "{name} {dtype:?} {kind:?}");
            }
            assert!(bits(&mut resumed, &frozen, Kind::Weights) == before, "{name} {dtype:?}");
        }
    }
}

#[test]
fn an_exported_adapter_is_the_trained_one_in_exact_f32() {
    let text = json!({ "target_modules": "all-linear", "r": 2, "modules_to_save": ["lm_head"] });
    for dtype in TYPES {
        let options = with(options(dtype, Recompute::Norms, 33), &text);
        let mut engine = open("window-bias", &options);
        for _ in 0..3 {
            engine.step(&batches(), HYPER).unwrap();
        }
        let dir = tempfile::tempdir().unwrap();
        engine.export_adapter(dir.path(), Some("base")).unwrap();
        let (lora, names) = (LoraConfig::from_dir(dir.path()).unwrap(), trained(&engine));
        assert_eq!((lora.r, lora.modules_to_save.len()), (2, 1));
        let mut again = open("window-bias", &options);
        assert!(bits(&mut again, &names, Kind::Weights) != bits(&mut engine, &names, Kind::Weights));
        again.load_adapter(dir.path()).unwrap();
        assert!(bits(&mut again, &names, Kind::Weights) == bits(&mut engine, &names, Kind::Weights), "{dtype:?}");
        let error = engine.export_model(&dir.path().join("model"), None).unwrap_err();
        assert_eq!(error.code, ErrorCode::Config);
    }
}

#[test]
fn a_fresh_adapter_changes_nothing_and_a_head_trained_as_a_whole_begins_as_the_embedding() {
    let base = options(DType::F32, Recompute::Norms, 33);
    let mut plain = open("window-bias", &base);
    let text = json!({ "target_modules": "all-linear", "modules_to_save": ["lm_head"] });
    let mut engine = open("window-bias", &with(base, &text));
    let expected = plain.inspect(&batches()[0]).unwrap().logits;
    assert_eq!(engine.inspect(&batches()[0]).unwrap().logits, expected);
    let embedding = bits(&mut engine, &["model.embed_tokens.weight".into()], Kind::Weights);
    engine.step(&batches(), HYPER).unwrap();
    assert!(bits(&mut engine, &["model.embed_tokens.weight".into()], Kind::Weights) == embedding);
    assert!(bits(&mut engine, &["lm_head.weight".into()], Kind::Weights) != embedding);
    // A is uniform between -1 and 1 over the root of its columns, and B zero.
    let a = engine.read_tensor("model.layers.1.mlp.down_proj.lora_A.weight", Kind::Weights).unwrap();
    let largest = a.iter().fold(0f32, |most, value| most.max(value.abs()));
    assert!((0.3..=0.41).contains(&largest), "{largest}");
}

#[test]
fn an_adapter_generates_what_the_merged_model_does() {
    let text = &configs()[1];
    let adapter = adapter_of("window-bias", text, scattered);
    let merged = tempfile::tempdir().unwrap();
    merge_adapter(&model("window-bias"), adapter.path(), merged.path(), None).unwrap();
    let base = EngineOptions { inference_only: true, ..options(DType::F32, Recompute::Block, 1) };
    let backend = Box::new(CpuBackend::new());
    let mut full = Engine::open(backend, merged.path(), Weights::Checkpoint, &base).unwrap();
    let mut adapted = open("window-bias", &with(base, text));
    adapted.load_adapter(adapter.path()).unwrap();
    let options = GenerateOptions::greedy(12);
    let prompts = [vec![1, 2, 3], vec![7; 40], vec![30]];
    assert_eq!(adapted.generate(&prompts, &options).unwrap(), full.generate(&prompts, &options).unwrap());
}

#[test]
fn the_plan_has_gradients_and_moments_of_adapters_alone_and_nothing_below_the_first() {
    let bytes = |engine: &Engine<CpuBackend>, name: &str| {
        engine.memory().categories.iter().find(|(category, _)| *category == name).map_or(0, |(_, bytes)| *bytes)
    };
    let base = options(DType::Bf16, Recompute::Norms, 512);
    let all = open("window-bias", &with(base.clone(), &json!({ "target_modules": "all-linear", "r": 4 })));
    let (lora, tensors) = (all.lora().unwrap(), all.lora().unwrap().stored().len());
    let (least, most) = (lora.trained_parameters(), lora.trained_parameters() + 32 * (tensors + 1));
    for (category, size) in [("gradients", 4), ("master weights", 2), ("moments", 8)] {
        let planned = bytes(&all, category);
        assert!((size * least..=size * most).contains(&planned), "{category}: {planned}");
    }
    let upper = json!({ "target_modules": "all-linear", "r": 4, "layers_to_transform": [1] });
    let upper = open("window-bias", &with(base.clone(), &upper));
    assert!(bytes(&upper, "activations") < bytes(&all, "activations") * 2 / 3);
    let rounding = EngineOptions { stochastic_rounding: true, ..base };
    let options = with(rounding, &json!({ "target_modules": "all-linear" }));
    let opened = Engine::open(Box::new(CpuBackend::new()), &model("window-bias"), Weights::Checkpoint, &options);
    assert!(opened.map(|_| ()).unwrap_err().message.contains("adapters keep exact f32 masters"));
}
