//! Ranks that divide heads and columns: losses, norms, gradients and saved models are those of one rank.

use crate::common;
use crate::common::ranks;

use std::collections::BTreeMap;
use std::path::Path;

use arl_engine::backend::cpu::CpuBackend;
use arl_engine::backend::{DType, DeviceKind};
use arl_engine::{Engine, EngineOptions, Kind, Mesh, MicroBatch, Recompute, Weights, plan_memory, plan_traffic};
use arl_model::ModelConfig;
use common::alone::{expect_alone, with_room};
use common::{HYPER, altered, batch, difference, hybrids, options};
use ranks::{Cpu, dealt, mesh_step, on_mesh, uneven_steps};
use serde_json::{Value, json};
use tempfile::TempDir;

fn tensor(tp: usize, cp: usize) -> Mesh {
    Mesh { tp, cp, ..Mesh::default() }
}

/// The folder of a model of which every bias and norm has been trained a little.
fn trained(configuration: &Path) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let options = options(DType::F32, Recompute::Norms, 33);
    let mut engine = Engine::open(Box::new(CpuBackend::new()), configuration, Weights::Random(7), &options).unwrap();
    uneven_steps()[..2].iter().for_each(|step| drop(engine.step(step, HYPER).unwrap()));
    engine.export_model(dir.path(), None).unwrap();
    dir
}

/// Windows, biases and norms of queries and keys; biases without norms; experts with a balance loss; and the hybrids, with gates,
/// the delta rule and a shared expert. All have heads for 4 ranks.
fn models() -> Vec<(&'static str, TempDir)> {
    let heads = json!({"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 8});
    let with = |name: &'static str, more: Value| {
        let mut values = heads.clone();
        values.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        (name, trained(altered(name, values).path()))
    };
    let mut all = vec![
        with("window-bias", json!({})),
        with("qwen2-window", json!({"hidden_size": 32})),
        with("moe-balance", json!({})),
    ];
    for (name, dir) in hybrids() {
        let path = dir.path().join("config.json");
        let mut config: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        for (key, heads) in [
            ("num_attention_heads", 8),
            ("num_key_value_heads", 4),
            ("linear_num_key_heads", 4),
            ("linear_num_value_heads", 8),
        ] {
            config[key] = heads.into();
        }
        std::fs::write(path, config.to_string()).unwrap();
        all.push((name, trained(dir.path())));
    }
    all
}

/// Values by tensors' names; none of what is frozen has a gradient.
type Values = BTreeMap<String, Vec<f32>>;

fn read(engine: &mut Cpu, kind: Kind) -> Values {
    let names = engine.tensor_names();
    names.into_iter().map(|name| (name.clone(), engine.read_tensor(&name, kind).unwrap_or_default())).collect()
}

/// The gradients of the first step; losses and norms of all steps; and what the weights are then.
#[derive(Clone, PartialEq)]
struct Outcome {
    gradients: Values,
    figures: Vec<[f64; 2]>,
    weights: Values,
}

/// Uneven steps; behind them micro-batches of fewer tokens than ranks.
fn steps() -> Vec<Vec<MicroBatch>> {
    uneven_steps().into_iter().chain([vec![batch(&[3], 22), batch(&[2], 23)]]).collect()
}

fn train(dir: &TempDir, options: &EngineOptions, data: usize) -> Vec<Outcome> {
    on_mesh(&dir.path().display().to_string(), options, data, Weights::Checkpoint, |engine: &mut Cpu, rank| {
        let steps = steps();
        engine.gradients(&dealt(&steps[0], rank, data, options.mesh)).unwrap();
        let gradients = read(engine, Kind::Gradients);
        let figures = steps.iter().map(|step| mesh_step(engine, step, rank, data, options.mesh));
        let figures = figures.map(|stats| [stats.loss, stats.grad_norm]).collect();
        Outcome { gradients, figures, weights: read(engine, Kind::Weights) }
    })
}

fn joined(values: &Values) -> Vec<f32> {
    values.values().flatten().copied().collect()
}

/// The largest relative difference of a loss, a norm or a tensor's gradients; of one that is next to nothing, by all gradients.
fn worst(found: &Outcome, expected: &Outcome) -> (f64, String) {
    let length = |values: &[f32]| values.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    let all = joined(&expected.gradients);
    assert!(found.gradients.keys().eq(expected.gradients.keys()));
    let mut worst = (0.0, String::new());
    let mut note = |value: f64, what: String| {
        if value.is_nan() || value > worst.0 {
            worst = (value, what);
        }
    };
    for ((name, found), expected) in found.gradients.iter().zip(expected.gradients.values()) {
        assert_eq!(found.len(), expected.len(), "{name}");
        let apart: Vec<f32> = found.iter().zip(expected).map(|(a, b)| a - b).collect();
        note(length(&apart) / length(expected).max(1e-3 * length(&all)), name.clone());
    }
    for (step, (found, expected)) in found.figures.iter().zip(&expected.figures).enumerate() {
        for (what, (found, expected)) in ["loss", "norm"].iter().zip(found.iter().zip(expected)) {
            note((found - expected).abs() / expected, format!("{what} of step {step}"));
        }
    }
    worst
}

#[test]
fn losses_norms_and_gradients_are_those_of_one_rank() {
    for (name, dir) in models() {
        // In 16 bits what is gathered was rounded where one rank rounds too, and sums are rounded once.
        for (dtype, bound) in [(DType::F32, 1e-5), (DType::Bf16, 5e-3)] {
            let base = EngineOptions { zero: 2, ..options(dtype, Recompute::Norms, 33) };
            let one = train(&dir, &base, 1).remove(0);
            let four = (dtype == DType::F32).then_some((1, tensor(4, 1)));
            // The other one has one layer.
            let stages = (name != "qwen2-window").then_some((1, Mesh { pp: 2, ..tensor(2, 1) }));
            for (data, mesh) in
                [(1, tensor(2, 1)), (2, tensor(2, 1)), (1, tensor(2, 2))].into_iter().chain(four).chain(stages)
            {
                let ranks = train(&dir, &EngineOptions { mesh, ..base.clone() }, data);
                assert!(ranks.iter().all(|rank| *rank == ranks[0]), "{name} {dtype:?} {mesh:?}: ranks differ");
                let (apart, what) = worst(&ranks[0], &one);
                assert!(apart < bound, "{name} {dtype:?} {data} x {mesh:?}: {what} is {apart:e} apart");
                let weights = difference(&joined(&ranks[0].weights), &joined(&one.weights));
                assert!(weights < 10.0 * bound, "{name} {dtype:?} {mesh:?}: weights are {weights:e} apart");
            }
        }
    }
}

#[test]
fn every_level_of_recomputation_and_each_way_of_dividing_moments_gives_the_same_bits() {
    for (name, dir) in models() {
        for dtype in [DType::F32, DType::Bf16] {
            let run = |recompute, zero| {
                let options = EngineOptions { zero, mesh: tensor(2, 1), ..options(dtype, recompute, 33) };
                train(&dir, &options, 1).remove(0)
            };
            let first = run(Recompute::Norms, 2);
            assert!(run(Recompute::Norms, 2) == first, "{name} {dtype:?}: twice");
            for (recompute, zero) in [(Recompute::Off, 2), (Recompute::Mlp, 3), (Recompute::Block, 1)] {
                assert!(run(recompute, zero) == first, "{name} {dtype:?} {recompute:?}, zero {zero}");
            }
            let offloaded = EngineOptions {
                zero: 2,
                mesh: tensor(2, 1),
                optimizer_offload: true,
                activation_offloading: true,
                ..options(dtype, Recompute::Block, 33)
            };
            assert!(train(&dir, &offloaded, 1).remove(0) == first, "{name} {dtype:?}: offloaded");
        }
    }
}

/// Products whose weights are frozen, and a backward pass that ends before the lowest trained block's input.
#[test]
fn what_is_frozen_ends_the_backward_pass_on_every_rank() {
    let (_, dir) = models().swap_remove(0);
    let frozen = ["*embed*", "model.layers.0.*", "model.layers.1.input_layernorm*", "*.o_proj.*", "*.k_norm.*"];
    let frozen = frozen.map(str::to_owned).to_vec();
    let base = EngineOptions { zero: 2, frozen, ..options(DType::F32, Recompute::Norms, 33) };
    let one = train(&dir, &base, 1).remove(0);
    let two = train(&dir, &EngineOptions { mesh: tensor(2, 1), ..base }, 1).remove(0);
    let (apart, what) = worst(&two, &one);
    assert!(one.gradients["model.layers.0.mlp.up_proj.weight"].is_empty());
    assert!(apart < 1e-5, "{what} is {apart:e} apart");
}

#[test]
fn a_model_that_is_saved_has_the_bytes_that_one_rank_saves() {
    for (name, dir) in models() {
        let saved = |data, mesh: Mesh| {
            let base = EngineOptions { zero: 1, mesh, ..options(DType::Bf16, Recompute::Norms, 33) };
            let out = tempfile::tempdir().unwrap();
            let folder = dir.path().display().to_string();
            on_mesh(&folder, &base, data, Weights::Checkpoint, |engine: &mut Cpu, _| {
                engine.export_model(out.path(), None).unwrap();
            });
            std::fs::read(out.path().join("model.safetensors")).unwrap()
        };
        let one = saved(1, Mesh::default());
        assert!(saved(1, tensor(4, 1)) == one && saved(2, tensor(2, 1)) == one, "{name}");
    }
}

#[test]
fn a_rank_reserves_and_sends_what_is_planned() {
    for (name, dir) in models() {
        let config = ModelConfig::from_dir(dir.path()).unwrap();
        for (mesh, recompute) in
            [(tensor(2, 1), Recompute::Off), (tensor(4, 1), Recompute::Block), (tensor(2, 2), Recompute::Norms)]
        {
            let base = EngineOptions { zero: 2, mesh, ..options(DType::Bf16, recompute, 32) };
            let folder = dir.path().display().to_string();
            let found = on_mesh(&folder, &base, 1, Weights::Checkpoint, |engine: &mut Cpu, _| {
                engine.step(&[batch(&[32], 1), batch(&[20, 12], 2)], HYPER).unwrap();
                (engine.sent().tokens, engine.memory())
            });
            for (rank, (tokens, memory)) in found.into_iter().enumerate() {
                let of = |mesh, rank| EngineOptions { data_parallel: Some(1), mesh, rank, ..base.clone() };
                let plan = |options: &EngineOptions| plan_memory(dir.path(), options, DeviceKind::Cpu).unwrap();
                assert_eq!(memory, plan(&of(mesh, rank)), "{name} {mesh:?} {recompute:?}");
                let weights = |mesh, rank| plan(&of(mesh, rank)).categories[0].1;
                assert!(weights(mesh, rank) < weights(Mesh::default(), 0), "{name} {mesh:?}");
                let planned = plan_traffic(&config, &of(mesh, rank), DeviceKind::Cpu, 2).unwrap().tokens;
                assert_eq!(tokens, planned, "{name} {mesh:?} {recompute:?}: rank {rank}");
            }
        }
    }
}

#[test]
fn rank_0_evaluates_and_generates_with_all_weights() {
    for (name, dir) in models() {
        let folder = dir.path().display().to_string();
        let base = EngineOptions { zero: 2, ..options(DType::F32, Recompute::Norms, 33) };
        let zero_3 = EngineOptions { zero: 3, ..base.clone() };
        let of = |options: EngineOptions, data, mesh| {
            expect_alone(&folder, &with_room(options), Weights::Checkpoint, (data, mesh), 1e-5);
        };
        of(base.clone(), 1, tensor(2, 1));
        of(zero_3, 2, tensor(2, 1));
        of(base, 1, tensor(2, 2));
        let bf16 = EngineOptions { zero: 1, ..options(DType::Bf16, Recompute::Norms, 33) };
        if name == "window-bias" {
            expect_alone(&folder, &bf16, Weights::Checkpoint, (1, tensor(4, 1)), 1e-2);
        }
    }
}

/// By layers of a dense model: two gathers of inputs and two of gradients in the type of activations, and as many sums in f32, of a
/// slice to each of the others; what is computed again gathers again, and its first sum is made again.
#[test]
fn planned_traffic_is_that_of_the_formula() {
    let heads = json!({"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 8});
    let config = ModelConfig::from_dir(altered("window-bias", heads).path()).unwrap();
    for tp in [1, 2, 4] {
        for (recompute, gathers, sums) in [(Recompute::Off, 4, 4), (Recompute::Mlp, 6, 4), (Recompute::Block, 6, 5)] {
            let base = EngineOptions { zero: 2, mesh: tensor(tp, 1), ..options(DType::Bf16, recompute, 64) };
            let options = EngineOptions { data_parallel: Some(1), ..base };
            let planned = plan_traffic(&config, &options, DeviceKind::Cpu, 3).unwrap().tokens;
            let slice = 64 / tp * config.hidden_size * (tp - 1);
            assert_eq!(
                planned,
                (3 * config.layers.len() * (2 * gathers + 4 * sums) * slice) as u64,
                "{tp} {recompute:?}"
            );
        }
    }
}
