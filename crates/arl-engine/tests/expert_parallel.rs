//! Ranks that divide experts: numbers are those of one rank with all of them, whatever the router chooses and whichever ranks have tokens.

use crate::common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use arl_engine::backend::DType;
use arl_engine::backend::DeviceKind;
use arl_engine::backend::cpu::CpuBackend;
use arl_engine::{
    BatchSize, Engine, EngineOptions, Kind, Mesh, MicroBatch, Recompute, StepStats, Traffic, Weights, plan_memory,
    plan_traffic,
};
use arl_model::{ErrorCode, ModelConfig};
use common::alone::{expect_alone, with_room};
use common::ranks::{Cpu, on_mesh, uneven_steps};
use common::{HYPER, batch, difference, model, options};
use serde_json::json;
use tempfile::TempDir;

const LEVELS: [Recompute; 4] = [Recompute::Off, Recompute::Norms, Recompute::Mlp, Recompute::Block];

/// A model's folder, and where its weights come from.
struct Case {
    dir: TempDir,
    weights: Weights,
}

impl Case {
    fn name(&self) -> String {
        self.dir.path().display().to_string()
    }

    /// A golden model.
    fn golden(name: &str) -> Self {
        Self::copied(&model(name))
    }

    /// One of the golden models that projects share, where they are.
    fn shared(name: &str) -> Option<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let shared = std::env::var_os("ARL_SHARED").map_or_else(|| root.join("../shared"), PathBuf::from);
        let folder = shared.join("golden").join(name);
        if !folder.is_dir() {
            eprintln!("SKIPPED: {} is not there", folder.display());
            return None;
        }
        Some(Self::copied(&folder))
    }

    fn copied(folder: &Path) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for file in ["config.json", "model.safetensors"] {
            std::fs::write(dir.path().join(file), std::fs::read(folder.join(file)).unwrap()).unwrap();
        }
        Case { dir, weights: Weights::Checkpoint }
    }

    /// The model with routers that find all experts equal, so that every token gets the first ones.
    fn crowded(self) -> Self {
        let path = self.dir.path().join("model.safetensors");
        let mut bytes = std::fs::read(&path).unwrap();
        let start = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header: serde_json::Value = serde_json::from_slice(&bytes[8..start]).unwrap();
        let routers = header.as_object().unwrap().iter().filter(|(name, _)| name.ends_with("mlp.gate.weight"));
        let mut found = 0;
        for (_, tensor) in routers {
            let [from, to] = [0, 1].map(|i| start + tensor["data_offsets"][i].as_u64().unwrap() as usize);
            bytes[from..to].fill(0);
            found += 1;
        }
        assert!(found > 0);
        std::fs::write(path, bytes).unwrap();
        self
    }

    /// A hybrid with so many experts, one of which is shared, and a balance loss.
    fn hybrid(experts: usize, top_k: usize) -> Self {
        let [_, (_, dir)] = common::hybrids();
        let path = dir.path().join("config.json");
        let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        config["num_experts"] = json!(experts);
        config["num_experts_per_tok"] = json!(top_k);
        config["output_router_logits"] = json!(true);
        config["router_aux_loss_coef"] = json!(0.1);
        std::fs::write(path, config.to_string()).unwrap();
        Case { dir, weights: Weights::Random(3) }
    }
}

/// What ranks compute: figures of every step, the first step's gradients, weights and moments.
#[derive(Clone, PartialEq)]
struct Outcome {
    figures: Vec<StepStats>,
    gradients: Vec<Vec<f32>>,
    state: Vec<u32>,
}

fn with_mesh(base: EngineOptions, data: usize, mesh: Mesh, zero: u8) -> EngineOptions {
    EngineOptions { data_parallel: Some(data), mesh, zero, ..base }
}

/// Data-parallel ranks.
fn data_of(options: &EngineOptions) -> usize {
    options.data_parallel.unwrap()
}

/// In an order that every mesh has.
fn sorted_names(engine: &mut Cpu) -> Vec<String> {
    let mut names = engine.tensor_names();
    names.sort();
    names
}

/// Weights and moments, in bits. All ranks call it.
fn state(engine: &mut Cpu, names: &[String]) -> Vec<u32> {
    let mut bits = Vec::new();
    for name in names {
        for kind in [Kind::Weights, Kind::Moment1, Kind::Moment2] {
            bits.extend(engine.read_tensor(name, kind).unwrap_or_default().into_iter().map(f32::to_bits));
        }
    }
    bits
}

fn train(case: &Case, options: &EngineOptions, steps: &[Vec<MicroBatch>]) -> Vec<Outcome> {
    let (data, slices) = (data_of(options), options.mesh.slices());
    on_mesh(&case.name(), options, data_of(options), case.weights, |engine, rank| {
        let dealt = |step: &[MicroBatch]| -> Vec<MicroBatch> {
            step.iter().skip(rank / slices % data).step_by(data).cloned().collect()
        };
        engine.gradients(&dealt(&steps[0])).unwrap();
        let names = sorted_names(engine);
        let gradients = names.iter().map(|name| engine.read_tensor(name, Kind::Gradients).unwrap()).collect();
        let step = |step: &Vec<MicroBatch>| StepStats { seconds: 0.0, ..engine.step(&dealt(step), HYPER).unwrap() };
        let figures = steps.iter().map(step).collect();
        Outcome { figures, gradients, state: state(engine, &names) }
    })
}

/// One rank that has everything.
fn alone(case: &Case, base: &EngineOptions, steps: &[Vec<MicroBatch>]) -> Outcome {
    train(case, &with_mesh(base.clone(), 1, Mesh::default(), 0), steps).remove(0)
}

/// Every rank has the same figures, those of one rank to within `bound`: losses, norms, gradients, and the weights and moments that
/// they come to.
fn expect_close(what: &str, all: &[Outcome], one: &Outcome, bound: f64) {
    for (rank, found) in all.iter().enumerate() {
        assert_eq!(format!("{:?}", found.figures), format!("{:?}", all[0].figures), "{what}: rank {rank}");
        for (step, (a, b)) in found.figures.iter().zip(&one.figures).enumerate() {
            let near = |a: f64, b: f64| (a - b).abs() <= bound * b.abs();
            assert!(near(a.loss, b.loss), "{what}: step {step}: loss {} of {}", a.loss, b.loss);
            assert!(near(a.grad_norm, b.grad_norm), "{what}: step {step}: norm {} of {}", a.grad_norm, b.grad_norm);
        }
        for (i, (a, b)) in found.gradients.iter().zip(&one.gradients).enumerate() {
            let norm = b.iter().map(|x| x * x).sum::<f32>().sqrt();
            let apart = if norm > 1e-6 { difference(a, b) } else { 0.0 };
            assert!(apart <= bound, "{what}: rank {rank}: gradient {i} is {apart} apart");
        }
        let values = |bits: &[u32]| bits.iter().map(|&bits| f32::from_bits(bits)).collect::<Vec<_>>();
        let apart = difference(&values(&found.state), &values(&one.state));
        assert!(apart <= 10.0 * bound, "{what}: rank {rank}: weights and moments are {apart} apart");
    }
}

fn ep(size: usize) -> Mesh {
    Mesh { ep: size, ..Mesh::default() }
}

#[test]
fn numbers_are_those_of_one_rank_and_have_the_same_bits_twice_and_at_every_level() {
    let balance = Case::golden("moe-balance");
    let cases = [
        ("balance loss", &balance, 2, 2),
        ("balance loss, an expert a rank", &balance, 4, 4),
        ("balance loss, twice the ranks", &balance, 4, 2),
        ("one expert a token", &Case::golden("moe-top1"), 3, 3),
        ("a shared expert", &Case::hybrid(6, 2), 2, 2),
    ];
    for (what, case, data, size) in cases {
        for zero in [1, 2] {
            let base = options(DType::F32, Recompute::Norms, 33);
            let one = alone(case, &base, &uneven_steps());
            let all = train(case, &with_mesh(base.clone(), data, ep(size), zero), &uneven_steps());
            expect_close(&format!("{what}, zero {zero}"), &all, &one, 1e-5);
            for recompute in LEVELS {
                let base = EngineOptions { recompute, ..base.clone() };
                let again = train(case, &with_mesh(base, data, ep(size), zero), &uneven_steps());
                assert!(again == all, "{what}, zero {zero}: {recompute:?}");
            }
        }
    }
}

/// The embedding's gradients have a place that layers had before, in which a rank without a micro-batch has those of its experts.
#[test]
fn an_embedding_gets_nothing_from_a_rank_that_only_its_experts_have_work_for() {
    // Its embedding is larger than a layer.
    let case = Case { dir: common::altered("moe-top1", json!({"vocab_size": 600})), weights: Weights::Random(3) };
    let base = options(DType::F32, Recompute::Norms, 33);
    let one = alone(&case, &base, &uneven_steps());
    let all = train(&case, &with_mesh(base, 3, ep(3), 2), &uneven_steps());
    expect_close("a large embedding", &all, &one, 1e-5);
}

/// Ranks with some of the experts are also those with some of the heads, of the tokens of a micro-batch, or of the layers.
#[test]
fn experts_heads_tokens_and_layers_are_divided_at_once() {
    let case = Case::hybrid(4, 2);
    let mesh = |tp, cp, ep, pp| Mesh { tp, cp, ep, pp, ..Mesh::default() };
    let meshes = [
        (1, mesh(1, 2, 2, 1)),
        (1, mesh(2, 1, 2, 1)),
        (2, mesh(1, 2, 4, 1)),
        (2, mesh(2, 1, 2, 1)),
        (2, mesh(1, 1, 2, 2)),
    ];
    for (data, mesh) in meshes {
        let base = options(DType::F32, Recompute::Norms, 33);
        let one = alone(&case, &base, &uneven_steps());
        let all = train(&case, &with_mesh(base.clone(), data, mesh, 2), &uneven_steps());
        expect_close(&format!("{data} x {mesh:?}"), &all, &one, 1e-5);
        for recompute in [Recompute::Off, Recompute::Block] {
            let base = EngineOptions { recompute, ..base.clone() };
            assert!(train(&case, &with_mesh(base, data, mesh, 2), &uneven_steps()) == all, "{mesh:?}: {recompute:?}");
        }
    }
}

/// In 16 bits every token's numbers are rounded as on one rank.
#[test]
fn in_16_bits_the_first_losses_have_the_bits_of_one_rank() {
    for (case, data, size) in [(Case::golden("moe-balance"), 2, 2), (Case::hybrid(6, 3), 3, 3)] {
        for dtype in [DType::F32, DType::Bf16] {
            let base = options(dtype, Recompute::Norms, 33);
            let steps = &uneven_steps()[..1];
            let one = alone(&case, &base, steps);
            let all = train(&case, &with_mesh(base, data, ep(size), 2), steps);
            assert_eq!(all[0].figures[0].micro_batches, one.figures[0].micro_batches, "{dtype:?}");
            expect_close(&format!("{dtype:?}"), &all, &one, if dtype == DType::F32 { 1e-5 } else { 1e-3 });
        }
    }
}

/// All rows go to the first rank, which has room for two thirds of them with three ranks, and half of them with four.
#[test]
fn rank_0_evaluates_and_generates_with_the_experts_of_all_ranks() {
    let case = Case::hybrid(4, 2);
    let all = Mesh { tp: 2, ep: 2, pp: 2, ..Mesh::default() };
    for (data, mesh, zero) in [(2, ep(2), 2), (4, ep(4), 1), (4, ep(2), 3), (1, all, 2)] {
        let options = EngineOptions { zero, ..options(DType::F32, Recompute::Norms, 33) };
        expect_alone(&case.name(), &with_room(options), case.weights, (data, mesh), 1e-5);
    }
}

#[test]
fn one_expert_with_all_tokens_and_others_without_any_change_no_number() {
    let [balance, top1] = ["moe-balance", "moe-top1"].map(|name| Case::golden(name).crowded());
    let eight = Case::shared("qwen3-moe").map(Case::crowded);
    let cases = [(Some(&balance), 2, 2), (Some(&top1), 3, 3), (Some(&top1), 6, 3), (eight.as_ref(), 4, 4)];
    for (case, data, size) in cases.into_iter().filter_map(|(case, data, size)| Some((case?, data, size))) {
        let base = options(DType::F32, Recompute::Norms, 33);
        // Behind the first step its eight experts are so nearly equal that rounding decides between them.
        let mut steps = uneven_steps();
        steps.truncate(if size == 4 { 1 } else { 3 });
        let one = alone(case, &base, &steps);
        let all = train(case, &with_mesh(base.clone(), data, ep(size), 2), &steps);
        expect_close(&format!("all on one of {size}"), &all, &one, 1e-5);
        for recompute in LEVELS {
            let base = EngineOptions { recompute, ..base.clone() };
            assert!(train(case, &with_mesh(base, data, ep(size), 2), &steps) == all, "{recompute:?}");
        }
    }
}

/// The files of a folder, by name.
fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries.map(|path| (path.file_name().unwrap().display().to_string(), std::fs::read(&path).unwrap())).collect()
}

/// Experts one by one, and all of a layer in one tensor.
#[test]
fn a_saved_model_has_the_bytes_of_one_ranks_and_a_state_is_read_by_one_rank() {
    let cases = [Some(Case::golden("moe-balance")), Case::shared("qwen3-moe"), Case::shared("hybrid/qwen3_5-moe")];
    for case in cases.iter().flatten() {
        let base = options(DType::F32, Recompute::Norms, 33);
        let (one, two) = (with_mesh(base.clone(), 1, Mesh::default(), 1), with_mesh(base, 2, ep(2), 2));
        let state_dir = tempfile::tempdir().unwrap();
        let export = |options: &EngineOptions, weights: Weights, steps: usize| {
            let dir = tempfile::tempdir().unwrap();
            on_mesh(&case.name(), options, data_of(options), weights, |engine, rank| {
                for seed in 0..steps as u64 {
                    engine.step(&[batch(&[9], 2 * seed + rank as u64)], HYPER).unwrap();
                }
                if steps > 0 {
                    engine.save_state(state_dir.path()).unwrap();
                } else if matches!(weights, Weights::Restored) {
                    engine.restore_state(state_dir.path()).unwrap();
                }
                engine.export_model(dir.path(), None).unwrap();
            });
            files(dir.path())
        };
        let before = export(&one, Weights::Checkpoint, 0);
        assert!(export(&two, Weights::Checkpoint, 0) == before);
        let behind = export(&two, Weights::Checkpoint, 2);
        assert!(behind != before);
        assert!(export(&one, Weights::Restored, 0) == behind);
        assert!(export(&two, Weights::Restored, 0) == behind);
    }
}

/// A micro-batch that is larger than expected, on one rank alone, makes room on all.
#[test]
fn a_rank_reserves_what_is_planned_and_more_where_another_has_more_tokens() {
    let case = Case::golden("moe-top1");
    for recompute in LEVELS {
        let base = with_mesh(options(DType::F32, recompute, 8), 3, ep(3), 1);
        let planned = |tokens: usize| {
            let max_batch = BatchSize { tokens, ..base.max_batch };
            plan_memory(case.dir.path(), &EngineOptions { max_batch, ..base.clone() }, DeviceKind::Cpu).unwrap()
        };
        let step = [batch(&[8], 1), batch(&[20], 2), batch(&[3], 3)];
        let found = on_mesh(&case.name(), &base, data_of(&base), case.weights, |engine, rank| {
            let before = engine.memory();
            engine.step(&step[rank..=rank], HYPER).unwrap();
            (before, engine.memory())
        });
        for (rank, (before, behind)) in found.into_iter().enumerate() {
            let positions = |plan: &arl_engine::MemoryPlan| {
                let of = |name| plan.categories.iter().find(|(category, _)| *category == name).map(|(_, bytes)| *bytes);
                (of("activations"), of("workspace"))
            };
            assert_eq!(before, planned(8));
            assert_eq!(positions(&behind), positions(&planned(20)), "rank {rank}, {recompute:?}");
        }
    }
}

/// Where each token has all experts, all of them get equally many rows.
#[test]
fn a_rank_sends_what_is_planned_for_even_routing() {
    let case = Case::hybrid(4, 4);
    for dtype in [DType::F32, DType::Bf16] {
        for recompute in LEVELS {
            for (data, size) in [(2, 2), (4, 4)] {
                let base = with_mesh(options(dtype, recompute, 9), data, ep(size), 2);
                let sent = on_mesh(&case.name(), &base, data_of(&base), case.weights, |engine, rank| {
                    for _ in 0..2 {
                        engine.step(&[batch(&[9], 1 + rank as u64)], HYPER).unwrap();
                    }
                    engine.sent()
                });
                let config = ModelConfig::from_dir(case.dir.path()).unwrap();
                for (rank, found) in sent.into_iter().enumerate() {
                    let options = EngineOptions { rank, ..base.clone() };
                    let Traffic { tokens, .. } = plan_traffic(&config, &options, DeviceKind::Cpu, 2).unwrap();
                    assert!(tokens > 0);
                    assert_eq!(found.tokens, tokens, "{dtype:?} {recompute:?}: rank {rank} of {size}");
                }
            }
        }
    }
}

#[test]
fn a_rank_that_leaves_a_step_ends_it_for_the_others() {
    let case = Case::golden("moe-balance");
    let base = with_mesh(options(DType::F32, Recompute::Norms, 33), 2, ep(2), 2);
    let found = on_mesh(&case.name(), &base, data_of(&base), case.weights, |engine, rank| {
        engine.interrupt_flag().store(rank == 1, Ordering::Relaxed);
        let error = engine.step(&[batch(&[9], 1)], HYPER).unwrap_err();
        // Its channels close with it.
        drop(std::mem::replace(engine, open(case.dir.path(), &base).unwrap()));
        error
    });
    assert!(found.iter().all(|error| error.code == ErrorCode::Interrupted), "{found:?}");
    assert!(found[0].message.contains("rank 1"), "{}", found[0].message);
}

fn open(dir: &Path, options: &EngineOptions) -> arl_model::Result<Engine<CpuBackend>> {
    Engine::open(Box::new(CpuBackend::new()), dir, Weights::Checkpoint, options)
}

#[test]
fn sizes_that_experts_cannot_be_divided_by_are_refused() {
    let message = |name: &str, data: usize, size: usize| {
        let base = with_mesh(options(DType::F32, Recompute::Norms, 33), data, ep(size), 1);
        open(&model(name), &base).err().map(|error| error.to_string()).unwrap_or_default()
    };
    assert!(message("moe-balance", 3, 3).contains("ep_size is 3, and does not divide the 4 experts"));
    assert!(message("window-bias", 2, 2).contains("ep_size is 2, and the model has no experts"));
}
