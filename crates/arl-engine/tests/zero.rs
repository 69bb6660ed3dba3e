//! Ranks that divide moments, masters, gradients and weights: bits, memory and messages are those that one rank implies.

use crate::common;
use crate::common::ranks;

use std::collections::BTreeMap;
use std::path::Path;

use arl_comm::local_groups;
use arl_engine::backend::cpu::CpuBackend;
use arl_engine::backend::{DType, DeviceKind};
use arl_engine::{
    Engine, EngineOptions, GenerateOptions, Kind, LossScaling, MemoryPlan, MicroBatch, Nf4Options, Recompute, Traffic,
    Weights, plan_memory, plan_traffic,
};
use arl_model::ModelConfig;
use common::{HYPER, MODELS, TYPES, batch, model, options};
use ranks::{adapted, fingerprints, on_ranks, state, step, uneven_steps, with_adapters, with_other_weights};

/// Tied and untied, dense and with experts.
const ALL: [&str; 4] = [MODELS[0], MODELS[1], "qwen2-window", "moe-top1"];

/// Takes steps, which leave figures and a state.
fn train(name: &str, options: &EngineOptions, size: usize, steps: &[Vec<MicroBatch>]) -> Vec<(Vec<String>, Vec<u32>)> {
    on_ranks(name, options, size, Weights::Checkpoint, |engine, rank| {
        let figures = steps.iter().map(|batches| step(engine, batches, rank, size)).collect();
        (figures, state(engine))
    })
}

/// Trains on 1 to 4 ranks, each way of dividing, and compares with one rank that divides nothing.
fn expect_bits_of_one(name: &str, options: &EngineOptions, sizes: &[usize]) {
    let steps = uneven_steps();
    let one = train(name, options, 1, &steps).remove(0);
    for zero in [1, 2, 3] {
        let options = EngineOptions { zero, ..options.clone() };
        for &size in sizes {
            for (rank, found) in train(name, &options, size, &steps).into_iter().enumerate() {
                assert_eq!(found.0, one.0, "{name} {:?}: rank {rank} of {size}, zero {zero}", options.dtype);
                assert!(found.1 == one.1, "{name} {:?}: rank {rank} of {size}, zero {zero}", options.dtype);
            }
        }
    }
}

#[test]
fn results_have_the_bits_of_one_rank() {
    for name in ALL {
        for dtype in TYPES {
            let sizes: &[usize] = if dtype == DType::F32 { &[1, 2, 3, 4] } else { &[2, 3] };
            expect_bits_of_one(name, &options(dtype, Recompute::Norms, 33), sizes);
        }
    }
}

#[test]
fn rounding_at_random_and_what_is_offloaded_or_computed_again_keep_the_bits() {
    let bf16 = options(DType::Bf16, Recompute::Block, 33);
    let random = EngineOptions { stochastic_rounding: true, bf16_moments: true, ..bf16.clone() };
    let offloaded = EngineOptions { optimizer_offload: true, activation_offloading: true, ..bf16.clone() };
    let chunks = EngineOptions { loss_seq_chunk_size: Some(4), ..options(DType::F32, Recompute::Off, 33) };
    for options in [random, offloaded, chunks] {
        for name in ["window-bias", "moe-top1"] {
            expect_bits_of_one(name, &options, &[2, 3]);
        }
    }
}

#[test]
fn a_skipped_step_of_f16_is_skipped_on_every_rank() {
    let scaling = LossScaling { initial: 2f32.powi(120), ..LossScaling::default() };
    let options = EngineOptions { loss_scaling: scaling, ..options(DType::F16, Recompute::Norms, 33) };
    let one = train("window-bias", &options, 1, &uneven_steps()).remove(0);
    assert!(one.0[0].contains("skipped: true"), "{}", one.0[0]);
    expect_bits_of_one("window-bias", &options, &[2, 4]);
}

#[test]
fn adapters_with_dropout_and_frozen_parameters_keep_the_bits() {
    for dtype in [DType::F32, DType::Bf16] {
        let base = options(dtype, Recompute::Norms, 33);
        let frozen = vec!["*embed*".to_owned(), "model.layers.0.*".to_owned(), "*.o_proj.weight".to_owned()];
        expect_bits_of_one("qwen2-window", &EngineOptions { frozen, ..base.clone() }, &[2, 3]);
        for name in ["window-bias", "moe-top1"] {
            expect_bits_of_one(name, &with_adapters(name, base.clone()), &[2, 3]);
        }
    }
    // Magnitudes, which begin with weights that no rank has all of; and adapters of the ends.
    let magnitudes = r#"{"target_modules": ["q_proj", "down_proj"], "r": 3, "lora_alpha": 6, "use_dora": true}"#;
    let ends = r#"{"target_modules": ["embed_tokens", "lm_head", "v_proj"], "r": 3, "lora_alpha": 6}"#;
    for (name, text) in [("window-bias", magnitudes), ("qwen2-window", ends)] {
        expect_bits_of_one(name, &adapted(text, options(DType::F32, Recompute::Norms, 33)), &[2, 3]);
    }
}

/// A hybrid model: three layers of the delta rule and one of attention, with experts, of which one is shared.
#[test]
fn layers_of_the_delta_rule_and_shared_experts_keep_the_bits() {
    let config = serde_json::json!({
        "model_type": "qwen3_next", "vocab_size": 32, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 12, "linear_value_head_dim": 20,
        "linear_conv_kernel_dim": 4, "rms_norm_eps": 1e-6, "tie_word_embeddings": false, "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 16,
        "norm_topk_prob": true, "mlp_only_layers": [1], "decoder_sparse_step": 1,
    });
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    for dtype in [DType::F32, DType::Bf16] {
        let run = |size: usize, zero: u8| {
            let options = EngineOptions { zero, ..options(dtype, Recompute::Norms, 33) };
            on_ranks(&dir.path().display().to_string(), &options, size, Weights::Random(7), |engine, rank| {
                let figures: Vec<String> =
                    uneven_steps().iter().map(|batches| step(engine, batches, rank, size)).collect();
                (figures, state(engine))
            })
        };
        let one = run(1, 0).remove(0);
        for (size, zero) in [(2, 1), (2, 2), (3, 2), (2, 3), (3, 3)] {
            assert!(run(size, zero).iter().all(|found| *found == one), "{dtype:?}: {size} ranks, zero {zero}");
        }
    }
}

/// Blocks of the norm's sum are longer than these models: a larger one has blocks that one rank has wholly, and others.
#[test]
fn the_norm_of_a_model_of_several_blocks_has_the_bits_of_one_rank() {
    let dir = tempfile::tempdir().unwrap();
    let text = std::fs::read_to_string(model("qwen2-window").join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
    config["vocab_size"] = 3000.into();
    config["intermediate_size"] = 999.into();
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let run = |size: usize, zero: u8| {
        let weights = Weights::Random(5);
        let options = EngineOptions { zero, ..options(DType::F32, Recompute::Norms, 33) };
        on_ranks(&dir.path().display().to_string(), &options, size, weights, |engine, rank| {
            (0..2).map(|_| step(engine, &uneven_steps()[0], rank, size)).collect::<Vec<_>>()
        })
    };
    let one = run(1, 0).remove(0);
    for (size, zero) in [(1, 2), (2, 2), (3, 2), (4, 2), (3, 3)] {
        assert!(run(size, zero).iter().all(|found| *found == one), "{size} ranks, zero {zero}");
    }
}

#[test]
fn gradients_that_are_read_are_the_sums_of_all_ranks() {
    let read = |size: usize, zero: u8| {
        let options = EngineOptions { zero, ..options(DType::F16, Recompute::Norms, 33) };
        on_ranks("moe-top1", &options, size, Weights::Checkpoint, |engine, rank| {
            let batches = &uneven_steps()[0];
            let own: Vec<MicroBatch> = batches.iter().skip(rank).step_by(size).cloned().collect();
            engine.gradients(&own).unwrap();
            let names = engine.tensor_names();
            let values = names.iter().flat_map(|name| engine.read_tensor(name, Kind::Gradients).unwrap());
            values.map(f32::to_bits).collect::<Vec<u32>>()
        })
    };
    let one = read(1, 0).remove(0);
    for (size, zero) in [(2, 1), (2, 2), (3, 2), (2, 3)] {
        assert!(read(size, zero).iter().all(|found| *found == one), "{size} ranks, zero {zero}");
    }
}

fn categories(plan: &MemoryPlan) -> BTreeMap<&'static str, usize> {
    plan.categories.iter().copied().collect()
}

#[test]
fn a_rank_reserves_what_is_planned_and_less_the_more_there_are() {
    for name in ALL {
        for dtype in TYPES {
            let base = options(dtype, Recompute::Norms, 33);
            let of = |size: usize, zero: u8, rank: usize| {
                let options = EngineOptions { data_parallel: Some(size), zero, rank, ..base.clone() };
                let engine = common::open(name, &options);
                let plan = plan_memory(&model(name), &options, DeviceKind::Cpu).unwrap();
                assert_eq!(engine.memory(), plan, "{name} {dtype:?} {size} ranks, zero {zero}");
                categories(&plan)
            };
            let whole = of(1, 0, 0);
            for size in [2, 4] {
                let [none, one, two, three] = [0, 1, 2, 3].map(|zero| of(size, zero, size - 1));
                let first = [1, 2, 3].map(|zero| of(size, zero, 0));
                assert_eq!(first, [one.clone(), two.clone(), three.clone()], "every rank reserves the same");
                // Pieces are padded by at most 31 elements a bucket, and there are a few buckets.
                let part =
                    |of: &BTreeMap<&str, usize>, name: &str| (of[name] as f64) / (whole[name] as f64) * size as f64;
                for divided in ["moments", "master weights"] {
                    if !whole.contains_key(divided) {
                        continue;
                    }
                    assert_eq!(none[divided], whole[divided]);
                    for found in [&one, &two, &three] {
                        assert!((1.0..1.1).contains(&part(found, divided)), "{divided} {}", part(found, divided));
                    }
                }
                assert_eq!([none["gradients"], one["gradients"]], [whole["gradients"]; 2]);
                assert!(two["gradients"] < whole["gradients"]);
                assert!((1.0..1.1).contains(&part(&two, "gradient sums")));
                assert_eq!(two["weights"], whole["weights"]);
                for same in ["gradients", "gradient sums"] {
                    assert_eq!(three[same], two[same]);
                }
                assert!(three["weights"] < two["weights"]);
            }
        }
    }
}

/// The more layers there are, the nearer weights come to their share: what is whole are norms and biases, and what is gathered at a
/// time the embedding and two layers.
#[test]
fn weights_of_a_deep_model_take_a_rank_its_share_and_two_layers() {
    let plan = |layers: usize, size: usize, zero: u8| {
        let dir = common::deeper("qwen2-window", layers);
        let base = options(DType::Bf16, Recompute::Norms, 33);
        let options = EngineOptions { data_parallel: Some(size), zero, ..base };
        categories(&plan_memory(dir.path(), &options, DeviceKind::Cpu).unwrap())
    };
    let layer = (plan(9, 1, 0)["weights"] - plan(8, 1, 0)["weights"]) as f64;
    for size in [2, 4] {
        let [few, many] = [8, 40].map(|layers| plan(layers, size, 3));
        assert_eq!(few["gathered weights"], many["gathered weights"]);
        assert!(many["gathered weights"] as f64 > 2.0 * layer * 0.8);
        let grown = (many["weights"] - few["weights"]) as f64 / (32.0 * layer) * size as f64;
        assert!((0.95..1.25).contains(&grown), "{size} ranks: {grown}");
    }
}

/// Rank 0 computes alone, with weights that the others send it; then all train on.
#[test]
fn what_rank_0_evaluates_generates_and_inspects_has_the_bits_of_one_rank() {
    for (name, dtype) in [("window-bias", DType::F32), ("moe-top1", DType::Bf16), ("qwen2-window", DType::F32)] {
        let dir = common::deeper(name, 5);
        let run = |size: usize, zero: u8| {
            let options = EngineOptions { zero, ..options(dtype, Recompute::Norms, 33) };
            on_ranks(&dir.path().display().to_string(), &options, size, Weights::Random(3), |engine, rank| {
                let steps = uneven_steps();
                let mut found = vec![step(engine, &steps[0], rank, size)];
                for _ in 0..2 {
                    if rank == 0 {
                        let prompts = [vec![1, 2, 3], vec![7, 9, 4, 2, 5]];
                        found.push(format!("{:?}", engine.evaluate_sequences(&batch(&[9, 4], 3)).unwrap()));
                        found.push(format!("{:?}", engine.generate(&prompts, &GenerateOptions::greedy(6)).unwrap()));
                        found.push(format!("{:?}", engine.inspect(&batch(&[7], 5)).unwrap().logits));
                        // A failure of rank 0's own ends nothing for the others.
                        assert!(engine.generate(&[vec![-1]], &GenerateOptions::greedy(1)).is_err());
                        engine.end_serving().unwrap();
                    } else {
                        engine.serve_weights().unwrap();
                        if zero == 3 {
                            let alone = engine.evaluate_sequences(&batch(&[9], 3)).unwrap_err();
                            assert!(alone.message.contains("only rank 0 may"), "{alone}");
                        }
                    }
                }
                found.push(step(engine, &steps[2], rank, size));
                (found, state(engine))
            })
        };
        let one = run(1, 0).remove(0);
        for (size, zero) in [(1, 3), (2, 3), (3, 3), (2, 2)] {
            let mut all = run(size, zero);
            assert!(all.remove(0) == one, "{name}: {size} ranks, zero {zero}");
            assert!(all.iter().all(|other| other.1 == one.1));
        }
    }
}

#[test]
fn ranks_that_have_read_other_weights_know_it_though_each_has_a_part_alone() {
    let own = model("window-bias");
    let other = with_other_weights("window-bias", |bytes| *bytes.last_mut().unwrap() ^= 1);
    let options = EngineOptions { zero: 3, ..options(DType::F32, Recompute::Norms, 33) };
    let [one, same] = fingerprints(&options, [&own, &own]);
    assert_eq!(one, same);
    let [one, differs] = fingerprints(&options, [&own, other.path()]);
    assert_ne!(one, differs);
}

#[test]
fn a_rank_sends_what_is_planned() {
    let plain = |name, dtype| (name, options(dtype, Recompute::Norms, 33));
    let with = |name, options| (name, with_adapters(name, options));
    let nf4 = EngineOptions {
        load_in_4bit: Some(Nf4Options { nested: false }),
        ..options(DType::Bf16, Recompute::Norms, 33)
    };
    let cases = [
        plain("window-bias", DType::F32),
        plain("moe-top1", DType::Bf16),
        plain("qwen2-window", DType::F16),
        with("qwen2-window", options(DType::F32, Recompute::Norms, 33)),
        with("window-bias", nf4),
    ];
    for (name, base) in cases {
        for zero in [0, 1, 2, 3] {
            for size in [1, 2, 3] {
                let base = EngineOptions { zero, ..base.clone() };
                let sent = on_ranks(name, &base, size, Weights::Checkpoint, |engine, rank| {
                    // Two rounds, and one in which the last rank may have none.
                    let batches: Vec<MicroBatch> = (0..2 * size as u64).map(|seed| batch(&[9], seed + 1)).collect();
                    step(engine, &batches, rank, size);
                    step(engine, &batches[..1], rank, size);
                    engine.sent()
                });
                let config = ModelConfig::from_dir(&model(name)).unwrap();
                for (rank, found) in sent.into_iter().enumerate() {
                    let options = EngineOptions { data_parallel: Some(size), rank, ..base.clone() };
                    let [two, one] =
                        [2, 1].map(|rounds| plan_traffic(&config, &options, DeviceKind::Cpu, rounds).unwrap());
                    let planned = Traffic {
                        gradients: two.gradients + one.gradients,
                        sums: two.sums + one.sums,
                        weights: two.weights + one.weights,
                        replicas: 0,
                        tokens: 0,
                        figures: found.figures,
                    };
                    assert_eq!(found, planned, "{name} zero {zero}: rank {rank} of {size}");
                    assert_eq!(size == 1, found.gradients == 0);
                    assert_eq!(zero > 0 && size > 1, found.weights > 0);
                    assert_eq!(zero < 2 && size > 1, found.sums > 0);
                    assert!(found.figures < 16_000, "{found:?}");
                }
            }
        }
    }
}

#[test]
fn what_is_not_built_is_refused_by_name() {
    let open = |options: EngineOptions| {
        let opened = Engine::open(Box::new(CpuBackend::new()), &model("window-bias"), Weights::Checkpoint, &options);
        opened.err().map(|error| error.message).unwrap_or_default()
    };
    let base = EngineOptions { data_parallel: Some(2), ..options(DType::F32, Recompute::Norms, 33) };
    assert!(open(EngineOptions { zero: 4, ..base.clone() }).contains("zero is 4"));
    assert!(open(EngineOptions { zero: 1, data_parallel: None, ..base.clone() }).contains("there are none"));
    assert!(open(EngineOptions { rank: 2, ..base.clone() }).contains("rank 2 of 2 ranks"));
    let mut engine = common::open("window-bias", &EngineOptions { zero: 3, ..base.clone() });
    assert!(engine.evaluate(&[batch(&[9], 1)]).unwrap_err().message.contains("have not joined"));
    assert!(engine.step(&[batch(&[9], 1)], HYPER).unwrap_err().message.contains("have not joined"));
    assert!(engine.save_state(Path::new("/nowhere")).unwrap_err().message.contains("have not joined"));
    let error = engine.join(local_groups(2).remove(1)).unwrap_err();
    assert!(error.message.contains("rank 1 joins with an engine that was opened for rank 0"), "{error}");
    let planned = |kind| plan_memory(&model("window-bias"), &EngineOptions { zero: 1, ..base.clone() }, kind).unwrap();
    let moments = |plan: MemoryPlan| plan.categories.iter().find(|(name, _)| *name == "moments").copied();
    assert_eq!(moments(planned(DeviceKind::Cuda)), moments(planned(DeviceKind::Cpu)));
}
