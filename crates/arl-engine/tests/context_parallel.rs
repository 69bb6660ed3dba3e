//! Context parallelism: ranks that have slices of the tokens of a micro-batch compute what one rank does.

use crate::common;
use crate::common::ranks;

use arl_engine::backend::cpu::CpuBackend;
use arl_engine::backend::{DType, DeviceKind};
use arl_engine::{
    BatchSize, Engine, EngineOptions, GenerateOptions, IGNORED, Kind, Mesh, MicroBatch, Recompute, StepStats, Weights,
    plan_memory, plan_traffic,
};
use arl_model::{ErrorCode, ModelConfig};
use common::{altered, batch, difference, hybrids, model, options};
use ranks::{Cpu, adapted, dealt, mesh_step, on_mesh, state, uneven_steps};
use serde_json::json;

const SEED: Weights = Weights::Random(3);

/// A folder whose model has so many query and key heads.
fn with_heads(name: &str, query: usize, key: usize) -> tempfile::TempDir {
    altered(name, json!({"num_attention_heads": query, "num_key_value_heads": key}))
}

fn path(dir: &tempfile::TempDir) -> String {
    dir.path().display().to_string()
}

fn context(cp: usize) -> Mesh {
    Mesh { cp, ..Mesh::default() }
}

/// Uneven steps; behind them micro-batches of fewer tokens than ranks, and one whose last half, and some slices with it, has no
/// targets.
fn steps() -> Vec<Vec<MicroBatch>> {
    let mut steps = uneven_steps();
    let mut half = batch(&[7, 13], 21);
    half.targets[6..].fill(IGNORED);
    steps.push(vec![batch(&[3], 22), half, batch(&[2], 23), batch(&[2, 1], 24)]);
    steps
}

/// The gradients of the first step, then every step's figures; and the state that they leave.
fn train(name: &str, options: &EngineOptions, data: usize) -> Vec<(Vec<f32>, Vec<StepStats>, Vec<u32>)> {
    let weights = if name.starts_with('/') { SEED } else { Weights::Checkpoint };
    on_mesh(name, options, data, weights, |engine: &mut Cpu, rank| {
        let first = &dealt(&steps()[0], rank, data, options.mesh);
        engine.gradients(first).unwrap();
        let names = engine.tensor_names();
        let gradient = |name: &String| engine.read_tensor(name, Kind::Gradients).unwrap_or_default();
        let gradients = names.iter().flat_map(gradient).collect();
        let figures = steps().iter().map(|step| mesh_step(engine, step, rank, data, options.mesh)).collect();
        (gradients, figures, state(engine))
    })
}

fn close(a: f64, b: f64, bound: f64) -> bool {
    (a - b).abs() <= bound * b.abs().max(1e-3)
}

/// Trains on these ranks and on one, and compares figures, gradients and losses.
fn expect_one_rank(name: &str, base: &EngineOptions, cases: &[(usize, usize)]) {
    let one = train(name, base, 1).remove(0);
    for &(cp, data) in cases {
        let found = train(name, &EngineOptions { mesh: context(cp), ..base.clone() }, data);
        let place = format!("{name} {:?}: cp {cp} x dp {data}", base.dtype);
        for rank in &found {
            assert!(format!("{:?}", rank.1) == format!("{:?}", found[0].1) && rank.2 == found[0].2, "{place}");
        }
        let (gradients, figures, _) = &found[0];
        assert!(difference(gradients, &one.0) < 1e-6, "{place}: {}", difference(gradients, &one.0));
        for (step, (found, expected)) in figures.iter().zip(&one.1).enumerate() {
            // The first step has the weights of one rank; then updates differ within rounding.
            let bound = match base.dtype {
                _ if step == 0 => 1e-6,
                DType::F32 => 1e-5,
                _ => 3e-3,
            };
            let place = format!("{place}, step {step}: {found:?} and not {expected:?}");
            assert!(close(found.loss, expected.loss, bound), "{place}");
            assert!(close(found.grad_norm, expected.grad_norm, 10.0 * bound), "{place}");
            assert_eq!(found.sequence_losses.len(), expected.sequence_losses.len());
            for (found, expected) in found.sequence_losses.iter().zip(&expected.sequence_losses) {
                assert_eq!(found.len(), expected.len(), "{place}");
                assert!(found.iter().zip(expected).all(|(&a, &b)| close(a, b, 10.0 * bound)), "{place}");
            }
            for (found, expected) in found.micro_batches.iter().zip(&expected.micro_batches) {
                assert_eq!(
                    (found.tokens, found.target_tokens, found.target_weight),
                    (expected.tokens, expected.target_tokens, expected.target_weight),
                    "{place}"
                );
                assert!(close(found.loss_sum, expected.loss_sum, 10.0 * bound), "{place}");
                assert!(close(found.entropy_sum, expected.entropy_sum, 10.0 * bound), "{place}");
                assert!(close(found.balance_loss, expected.balance_loss, 10.0 * bound), "{place}");
                assert!(step > 0 || found.correct == expected.correct, "{place}");
            }
        }
    }
}

#[test]
fn slices_of_tokens_train_as_whole_micro_batches_do() {
    let dense = with_heads("window-bias", 8, 4);
    let experts = with_heads("moe-balance", 4, 2);
    for dtype in [DType::F32, DType::Bf16] {
        let base = options(dtype, Recompute::Norms, 33);
        expect_one_rank(&path(&dense), &base, &[(2, 1), (2, 2), (4, 1)]);
        expect_one_rank(&path(&experts), &base, &[(2, 1), (2, 2)]);
        expect_one_rank("qwen2-window", &base, &[(3, 1)]);
    }
}

#[test]
fn twenty_losses_are_those_of_one_rank() {
    for name in ["window-bias", "moe-balance"] {
        let dir = with_heads(name, 4, 2);
        let base = options(DType::F32, Recompute::Norms, 33);
        let losses = |mesh: Mesh, data: usize| {
            let options = EngineOptions { mesh, ..base.clone() };
            let found = on_mesh(&path(&dir), &options, data, SEED, |engine, rank| {
                let all = (0..5).flat_map(|_| steps());
                all.map(|step| mesh_step(engine, &step, rank, data, mesh).loss).collect::<Vec<f64>>()
            });
            assert!(found.iter().all(|rank| *rank == found[0]));
            found[0].clone()
        };
        let (found, expected) = (losses(context(2), 2), losses(Mesh::default(), 1));
        let worst = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(found.len() == 20 && worst < 1e-4, "{name}: {worst}");
    }
}

/// Positions of slices that begin within a sequence are those of the whole, whose length decides its angles.
#[test]
fn adapters_frozen_parameters_and_angles_that_lengths_change_have_slices_too() {
    let text = r#"{"target_modules": "all-linear", "r": 3, "lora_alpha": 6, "modules_to_save": ["lm_head"]}"#;
    let base = options(DType::F32, Recompute::Norms, 33);
    let dense = with_heads("window-bias", 4, 2);
    expect_one_rank(&path(&dense), &adapted(text, base.clone()), &[(2, 1)]);
    let frozen = vec!["*embed*".to_owned(), "model.layers.0.*".to_owned(), "*.o_proj.weight".to_owned()];
    expect_one_rank(&path(&dense), &EngineOptions { frozen, zero: 3, ..base.clone() }, &[(2, 2)]);
    for name in ["rope-dynamic", "rope-longrope"] {
        expect_one_rank(&path(&with_heads(name, 4, 2)), &base, &[(2, 1)]);
    }
}

#[test]
fn hybrids_exchange_the_heads_of_the_delta_rule_too() {
    for (_, dir) in hybrids() {
        for dtype in [DType::F32, DType::Bf16] {
            expect_one_rank(&path(&dir), &options(dtype, Recompute::Norms, 33), &[(2, 1), (2, 2)]);
        }
    }
}

#[test]
fn what_is_computed_again_or_divided_keeps_the_bits_of_slices() {
    let mut folders = vec![with_heads("window-bias", 4, 2), with_heads("moe-balance", 4, 2)];
    folders.extend(hybrids().map(|(_, dir)| dir));
    for dir in folders {
        let base = |recompute| EngineOptions { mesh: context(2), ..options(DType::Bf16, recompute, 33) };
        let run = |options: &EngineOptions| {
            let mut all = train(&path(&dir), options, 2);
            let first = all.remove(0);
            assert!(all.iter().all(|rank| rank.2 == first.2));
            (format!("{:?}", first.1), first.2)
        };
        let one = run(&base(Recompute::Norms));
        assert!(run(&base(Recompute::Norms)) == one, "twice");
        for level in [Recompute::Off, Recompute::Mlp, Recompute::Block] {
            assert!(run(&base(level)) == one, "{level:?}");
        }
        for zero in [1, 2, 3] {
            assert!(run(&EngineOptions { zero, ..base(Recompute::Norms) }) == one, "zero {zero}");
        }
        let chunks = EngineOptions { optimizer_offload: true, activation_offloading: true, ..base(Recompute::Block) };
        assert!(run(&chunks) == one, "offloaded");
    }
}

#[test]
fn ranks_with_slices_reserve_and_send_what_is_planned() {
    let dense = with_heads("window-bias", 8, 4);
    let experts = with_heads("moe-balance", 4, 2);
    let [(_, hybrid), _] = hybrids();
    for (dir, cases) in [(&dense, &[(2, 1), (4, 2)][..]), (&experts, &[(2, 2)]), (&hybrid, &[(2, 1)])] {
        let config = ModelConfig::from_dir(dir.path()).unwrap();
        for &(cp, data) in cases {
            for (recompute, zero) in [(Recompute::Norms, 2), (Recompute::Block, 3)] {
                let base = EngineOptions { zero, mesh: context(cp), ..options(DType::Bf16, recompute, 32) };
                let batches: Vec<MicroBatch> = (0..2 * data as u64).map(|seed| batch(&[21, 11], seed + 1)).collect();
                let sent = on_mesh(&path(dir), &base, data, SEED, |engine, rank| {
                    let reserved = engine.memory();
                    mesh_step(engine, &batches, rank, data, base.mesh);
                    assert_eq!(engine.memory(), reserved, "a step makes no more room");
                    // One token fewer, which are filled up, and more sequences than planned tokens a rank.
                    mesh_step(engine, &[batch(&[5, 4, 4, 4, 4, 4, 3, 3], 9)], rank, data, base.mesh);
                    assert_eq!(engine.memory(), reserved, "nor does one of fewer tokens");
                    mesh_step(engine, &batches, rank, data, base.mesh);
                    (engine.sent(), reserved)
                });
                for (rank, (found, reserved)) in sent.into_iter().enumerate() {
                    let options = EngineOptions { data_parallel: Some(data), rank, ..base.clone() };
                    assert_eq!(reserved, plan_memory(dir.path(), &options, DeviceKind::Cpu).unwrap());
                    let plan = |rounds| plan_traffic(&config, &options, DeviceKind::Cpu, rounds).unwrap();
                    // 31 tokens are filled up to 32; only the first data-parallel rank has them.
                    let small = if rank < cp { plan(1).tokens } else { 0 };
                    assert_eq!(found.tokens, 2 * plan(2).tokens + small, "cp {cp} x dp {data}: rank {rank}");
                    assert_eq!(found.gradients, 2 * plan(2).gradients + plan(1).gradients);
                    assert_eq!(found.weights, 2 * plan(2).weights + plan(1).weights);
                }
            }
        }
    }
}

/// Queries, keys, values and results of `t` tokens of a rank go to the others three times: in the forward pass, again in the backward
/// pass, and as gradients.
#[test]
fn planned_traffic_is_that_of_the_formula_and_memory_that_of_a_slice() {
    let dir = with_heads("window-bias", 8, 4);
    let config = ModelConfig::from_dir(dir.path()).unwrap();
    let (q, k, layers) = (8 * 8, 4 * 8, config.layers.len());
    for cp in [1, 2, 4] {
        for (recompute, times) in [(Recompute::Off, 3), (Recompute::Block, 4)] {
            let base = options(DType::Bf16, recompute, 64);
            let options = EngineOptions { data_parallel: Some(1), mesh: context(cp), ..base };
            let planned = plan_traffic(&config, &options, DeviceKind::Cpu, 5).unwrap().tokens;
            let (t, bytes) = (64 / cp, 2);
            let expected = 5 * layers * times * (2 * q + 2 * k) * bytes * t * (cp - 1) / cp;
            assert_eq!(planned, expected as u64, "cp {cp} {recompute:?}");
            let plan = |mesh| plan_memory(dir.path(), &EngineOptions { mesh, ..options.clone() }, DeviceKind::Cpu);
            let activations = |mesh| {
                let found = plan(mesh).unwrap().categories.into_iter().find(|(name, _)| *name == "activations");
                found.unwrap().1 as f64
            };
            let share = activations(context(cp)) / activations(context(1)) * cp as f64;
            assert!((0.99..1.25).contains(&share), "cp {cp} {recompute:?}: {share}");
        }
    }
}

/// Rank 0 computes whole micro-batches alone, with all of its weights.
#[test]
fn rank_0_evaluates_and_generates_as_one_rank_does() {
    let dir = with_heads("moe-balance", 4, 2);
    let look = |engine: &mut Cpu| {
        let prompts = [vec![1, 2, 3], vec![7, 9, 4, 2, 5]];
        let batches = [batch(&[9, 4], 3), batch(&[5], 4)];
        let found = (
            engine.evaluate(&batches).unwrap(),
            engine.evaluate_sequences(&batches[0]).unwrap(),
            engine.generate(&prompts, &GenerateOptions::greedy(6)).unwrap(),
            engine.inspect(&batches[0]).unwrap().logits,
        );
        format!("{found:?}")
    };
    let base = options(DType::F32, Recompute::Norms, 33);
    let one = on_mesh(&path(&dir), &base, 1, SEED, |engine, _| look(engine)).remove(0);
    for zero in [0, 3] {
        let options = EngineOptions { zero, mesh: context(2), ..base.clone() };
        let found = on_mesh(&path(&dir), &options, 1, SEED, |engine, rank| {
            let mut found = Vec::new();
            for _ in 0..2 {
                if rank == 0 {
                    found.push(look(engine));
                    engine.end_serving().unwrap();
                } else {
                    engine.serve_weights().unwrap();
                }
                mesh_step(engine, &steps()[1], rank, 1, options.mesh);
            }
            found
        });
        assert!(found[0][0] == one && found[0][1] != one, "zero {zero}");
    }
}

#[test]
fn what_context_parallelism_cannot_divide_is_refused_by_name() {
    let refused = |dir: &std::path::Path, mesh, kind| {
        let base = options(DType::F32, Recompute::Norms, 33);
        let options = EngineOptions { data_parallel: Some(1), mesh, zero: 2, ..base };
        let error = plan_memory(dir, &options, kind).unwrap_err();
        assert_eq!(error.code, ErrorCode::Config);
        assert!(!error.hint.is_empty());
        error.message
    };
    let golden = model("window-bias");
    let cpu = |dir, mesh| refused(dir, mesh, DeviceKind::Cpu);
    assert_eq!(cpu(&golden, context(2)), "cp_size is 2, and does not divide the model's 1 key heads");
    let heads = with_heads("window-bias", 4, 2);
    let both = cpu(heads.path(), Mesh { cp: 2, tp: 2, ..Mesh::default() });
    assert_eq!(both, "cp_size 2 x tp_size 2 is 4, and does not divide the model's 2 key heads");
    let dir = altered_hybrid();
    let hybrid = cpu(dir.path(), context(2));
    assert_eq!(hybrid, "cp_size is 2, and does not divide the model's 3 key heads of linear attention");
    let cuda = refused(&golden, context(2), DeviceKind::Cuda);
    assert_eq!(cuda, "cp_size is 2, and does not divide the model's 1 key heads");
    let options = EngineOptions { mesh: context(2), ..options(DType::F32, Recompute::Norms, 33) };
    let opened = Engine::open(Box::new(CpuBackend::new()), heads.path(), SEED, &options);
    assert!(opened.err().unwrap().message.contains("there are none"));
    let size = BatchSize { tokens: 0, ..BatchSize::default() };
    assert!(plan_memory(heads.path(), &EngineOptions { max_batch: size, ..options }, DeviceKind::Cpu).is_err());
}

/// A hybrid whose delta rule has 3 key heads.
fn altered_hybrid() -> tempfile::TempDir {
    let [(_, dir), _] = hybrids();
    let path = dir.path().join("config.json");
    let mut config: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    config["linear_num_key_heads"] = 3.into();
    config["linear_num_value_heads"] = 6.into();
    std::fs::write(path, config.to_string()).unwrap();
    dir
}
