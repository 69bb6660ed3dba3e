//! Stages of a pipeline: what they compute has the bits of one rank, wherever ranks do not divide a sum.

use std::path::Path;

use arl_comm::local_groups;
use arl_engine::backend::cpu::CpuBackend;
use arl_engine::backend::{DType, DeviceKind};
use arl_engine::{
    Engine, EngineOptions, Kind, LossScaling, Mesh, MicroBatch, Recompute, StepStats, Traffic, Weights, plan_memory,
    plan_traffic,
};
use arl_model::{ErrorCode, ModelConfig};

use crate::common::alone::{expect_alone, with_room};
use crate::common::ranks::{Cpu, dealt, on_mesh, state, uneven_steps};
use crate::common::{HYPER, batch, deeper, difference, options};

/// What `work` gives on each rank of `stages` stages of `data` ranks each.
fn on_stages<T: Send>(
    dir: &Path,
    base: &EngineOptions,
    [stages, data]: [usize; 2],
    work: impl Fn(&mut Cpu, usize) -> T + Sync,
) -> Vec<T> {
    let options = EngineOptions { mesh: Mesh { pp: stages, ..base.mesh }, ..base.clone() };
    on_mesh(&dir.display().to_string(), &options, data, Weights::Random(7), work)
}

/// Eight steps, three of them uneven, with a micro-batch without targets, and fewer micro-batches than ranks.
fn steps() -> Vec<Vec<MicroBatch>> {
    let more = (0..5u64).map(|step| (0..3).map(|m| batch(&[5 + m as usize, 4], 20 + 3 * step + m)).collect());
    uneven_steps().into_iter().chain(more).collect()
}

/// The figures of eight steps, and what they leave, on every rank.
fn train(dir: &Path, base: &EngineOptions, mesh: [usize; 2]) -> Vec<(Vec<StepStats>, Vec<u32>)> {
    on_stages(dir, base, mesh, |engine, rank| {
        let take = |step: Vec<MicroBatch>| engine.step(&dealt(&step, rank, mesh[1], base.mesh), HYPER).unwrap();
        let figures = steps().into_iter().map(take).map(|stats| StepStats { seconds: 0.0, ..stats }).collect();
        (figures, state(engine))
    })
}

/// Compares figures in bits, but norms, whose squares stages add up in another order.
fn expect_same(found: &[StepStats], one: &[StepStats], what: &str) {
    let rest = |stats: &StepStats| format!("{:?}", StepStats { grad_norm: 0.0, ..stats.clone() });
    for (step, (found, one)) in found.iter().zip(one).enumerate() {
        assert_eq!(rest(found), rest(one), "{what}, step {step}");
        let apart = (found.grad_norm - one.grad_norm).abs() / one.grad_norm;
        assert!(apart < 1e-13 || found.skipped, "{what}, step {step}: norms {apart} apart");
    }
    assert_eq!(found.len(), one.len());
}

fn base(dtype: DType, recompute: Recompute) -> EngineOptions {
    EngineOptions { zero: 2, ..options(dtype, recompute, 33) }
}

#[test]
fn stages_have_the_bits_of_one_rank() {
    for (name, layers) in [("qwen2-window", 5), ("moe-top1", 4)] {
        let dir = deeper(name, layers);
        for dtype in [DType::F32, DType::Bf16] {
            let base = base(dtype, Recompute::Norms);
            let one = train(dir.path(), &base, [1, 1]).remove(0);
            let meshes: &[[usize; 2]] =
                if dtype == DType::F32 { &[[2, 1], [3, 1], [4, 1], [2, 2]] } else { &[[3, 1], [2, 3]] };
            for mesh in meshes {
                for (rank, found) in train(dir.path(), &base, *mesh).into_iter().enumerate() {
                    let what = format!("{name} {dtype:?} {mesh:?} rank {rank}");
                    expect_same(&found.0, &one.0, &what);
                    assert!(found.1 == one.1, "{what}: weights or moments differ");
                }
            }
        }
    }
}

#[test]
fn what_is_computed_again_offloaded_scaled_or_frozen_keeps_the_bits() {
    let dir = deeper("moe-top1", 4);
    let scaling = LossScaling { initial: 2f32.powi(120), ..LossScaling::default() };
    let skipping = EngineOptions { loss_scaling: scaling, zero: 1, ..base(DType::F16, Recompute::Mlp) };
    let offloading = EngineOptions {
        activation_offloading: true,
        optimizer_offload: true,
        loss_seq_chunk_size: Some(4),
        ..base(DType::Bf16, Recompute::Block)
    };
    let frozen = vec!["*embed*".to_owned(), "model.layers.0.*".to_owned(), "*.o_proj.weight".to_owned()];
    let frozen = EngineOptions { frozen, ..base(DType::F32, Recompute::Off) };
    for base in [skipping, offloading, frozen] {
        let one = train(dir.path(), &base, [1, 1]).remove(0);
        assert_eq!(one.0[0].skipped, base.dtype == DType::F16);
        for (rank, found) in train(dir.path(), &base, [2, 1]).into_iter().enumerate() {
            let what = format!("{:?} {:?} rank {rank}", base.dtype, base.recompute);
            expect_same(&found.0, &one.0, &what);
            assert!(found.1 == one.1, "{what}: weights or moments differ");
        }
    }
}

/// The table's gradient is the head's of all micro-batches and the look-up's of all, not the sum of both of each.
#[test]
fn a_tied_embedding_is_updated_alike_on_both_ends() {
    for name in ["window-bias", "moe-balance"] {
        let dir = deeper(name, 4);
        let base = base(DType::F32, Recompute::Norms);
        let one = train(dir.path(), &base, [1, 1]).remove(0);
        for mesh in [[2, 1], [3, 2]] {
            let found = train(dir.path(), &base, mesh);
            assert!(found == train(dir.path(), &base, mesh), "{name} {mesh:?}: two runs differ");
            for (figures, state) in found {
                for (found, one) in figures.iter().zip(&one.0) {
                    assert!((found.loss - one.loss).abs() < 1e-5 * one.loss.abs(), "{} {}", found.loss, one.loss);
                    assert!((found.grad_norm - one.grad_norm).abs() < 1e-5 * one.grad_norm);
                }
                let values = |bits: &[u32]| bits.iter().map(|bits| f32::from_bits(*bits)).collect::<Vec<_>>();
                let apart = difference(&values(&state), &values(&one.1));
                assert!(apart < 1e-5, "{name} {mesh:?}: {apart}");
            }
        }
    }
}

#[test]
fn gradients_and_saved_models_have_the_bits_of_one_rank() {
    let dir = deeper("qwen2-window", 3);
    let read = |mesh: [usize; 2]| {
        let saved = tempfile::tempdir().unwrap();
        let bits = on_stages(dir.path(), &base(DType::F32, Recompute::Norms), mesh, |engine, rank| {
            let own = dealt(&uneven_steps()[0], rank, mesh[1], Mesh::default());
            engine.gradients(&own).unwrap();
            let names = engine.tensor_names();
            let values = names.iter().flat_map(|name| engine.read_tensor(name, Kind::Gradients).unwrap());
            let bits: Vec<u32> = values.map(f32::to_bits).collect();
            engine.step(&own, HYPER).unwrap();
            engine.export_model(saved.path(), None).unwrap();
            bits
        });
        (bits, std::fs::read(saved.path().join("model.safetensors")).unwrap())
    };
    let one = read([1, 1]);
    for mesh in [[3, 1], [2, 2]] {
        let found = read(mesh);
        assert!(found.0.iter().all(|bits| *bits == one.0[0]), "{mesh:?}");
        assert!(found.1 == one.1, "{mesh:?}: saved models differ");
    }
}

#[test]
fn a_stage_reserves_and_sends_what_is_planned() {
    for name in ["moe-balance", "qwen2-window"] {
        let dir = deeper(name, 4);
        let config = ModelConfig::from_dir(dir.path()).unwrap();
        let base = base(DType::Bf16, Recompute::Norms);
        let mesh = [3, 2];
        let sent = on_stages(dir.path(), &base, mesh, |engine, rank| {
            let batches: Vec<MicroBatch> = (0..4).map(|seed| batch(&[33], seed + 1)).collect();
            engine.step(&dealt(&batches, rank, mesh[1], base.mesh), HYPER).unwrap();
            (engine.sent(), engine.memory())
        });
        for (rank, (found, memory)) in sent.into_iter().enumerate() {
            let options =
                EngineOptions { data_parallel: Some(2), mesh: Mesh { pp: 3, ..Mesh::default() }, rank, ..base.clone() };
            let planned = plan_traffic(&config, &options, DeviceKind::Cpu, 2).unwrap();
            assert_eq!(found, Traffic { figures: found.figures, ..planned }, "{name}: rank {rank}");
            assert!(found.tokens > 0);
            assert_eq!(memory, plan_memory(dir.path(), &options, DeviceKind::Cpu).unwrap(), "{name}: rank {rank}");
        }
    }
}

#[test]
fn rank_0_evaluates_and_generates_with_the_layers_of_all_stages() {
    for (name, layers) in [("qwen2-window", 5), ("moe-top1", 4)] {
        let (dir, bits) = (deeper(name, layers), 0.0);
        let folder = dir.path().display().to_string();
        for (dtype, data, pp) in [(DType::F32, 1, 2), (DType::Bf16, 1, 4), (DType::F32, 2, 3)] {
            let mesh = Mesh { pp, ..Mesh::default() };
            // The last one has planned no room for it.
            let planned =
                if data == 1 { with_room(base(dtype, Recompute::Norms)) } else { base(dtype, Recompute::Norms) };
            expect_alone(&folder, &planned, Weights::Random(7), (data, mesh), bits);
        }
    }
}

/// Each stage has its own layers alone, and a pipeline's depth costs it inputs, not activations.
#[test]
fn a_stage_of_a_deep_model_takes_its_share_and_a_few_inputs() {
    let dir = deeper("qwen2-window", 16);
    let of = |pp: usize, rank: usize, name: &str| {
        let mesh = Mesh { pp, ..Mesh::default() };
        let options = EngineOptions { data_parallel: Some(1), mesh, rank, ..base(DType::F32, Recompute::Off) };
        let plan = plan_memory(dir.path(), &options, DeviceKind::Cpu).unwrap();
        plan.categories.iter().find(|(category, _)| *category == name).map_or(0, |(_, bytes)| *bytes)
    };
    let inputs = 33 * 18 * 4;
    for category in ["weights", "moments", "activations"] {
        let (whole, stage) = (of(1, 0, category), of(4, 1, category));
        let room = if category == "activations" { 5 * inputs } else { 0 };
        assert!(stage < whole / 3 + room, "{category}: {stage} of {whole}");
    }
}

#[test]
fn a_stage_that_ends_ends_the_others() {
    let dir = deeper("qwen2-window", 3);
    let ended = std::thread::scope(|scope| {
        let ranks: Vec<_> = local_groups(3)
            .into_iter()
            .enumerate()
            .map(|(rank, group)| {
                let dir = dir.path();
                scope.spawn(move || {
                    let mesh = Mesh { pp: 3, ..Mesh::default() };
                    let options =
                        EngineOptions { data_parallel: Some(1), mesh, rank, ..base(DType::F32, Recompute::Norms) };
                    let mut engine =
                        Engine::open(Box::new(CpuBackend::new()), dir, Weights::Random(7), &options).unwrap();
                    engine.join(group).unwrap();
                    if rank == 1 {
                        engine.interrupt_flag().store(true, std::sync::atomic::Ordering::Relaxed);
                    }
                    engine.step(&[batch(&[9], 1), batch(&[5], 2)], HYPER).unwrap_err()
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect::<Vec<_>>()
    });
    assert!(ended.iter().all(|error| error.code == ErrorCode::Interrupted), "{ended:?}");
    assert!(ended[0].message.contains("has ended"), "{}", ended[0]);
}
