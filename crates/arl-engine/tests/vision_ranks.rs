//! Ranks that train a model that sees: each has micro-batches of its own, with images or without, and the bits are those of one.

use crate::common;
use crate::common::vision;

use std::path::Path;

use arl_comm::{Group, local_groups};
use arl_engine::backend::DType;
use arl_engine::backend::DeviceKind;
use arl_engine::backend::cpu::CpuBackend;
use arl_engine::{Engine, EngineOptions, Kind, Mesh, MicroBatch, Recompute, StepStats, Weights, plan_memory};
use common::ranks::{dealt, mesh_step, on_mesh};
use common::{HYPER, difference};
use vision::{SEEING, batch, batches, folder, names, room};

/// Steps of which some micro-batches have images, and one step none.
fn steps() -> Vec<Vec<MicroBatch>> {
    vec![batches(), vec![batch(&[&[]], 4), batch(&[&[], &[]], 5)], vec![batch(&[&[]], 6), batch(&[&[(4, 4)]], 7)]]
}

/// Figures and state, in bits, of each of `size` ranks.
fn train(dir: &Path, options: &EngineOptions, size: usize) -> Vec<(Vec<String>, Vec<u32>)> {
    let work = |rank: usize, group: Box<dyn Group>| {
        let options = EngineOptions { data_parallel: Some(size), rank, ..options.clone() };
        let mut engine = Engine::open(Box::new(CpuBackend::new()), dir, Weights::Random(7), &options).unwrap();
        engine.join(group).unwrap();
        let figures = steps()
            .iter()
            .map(|batches| {
                let own: Vec<MicroBatch> = batches.iter().skip(rank).step_by(size).cloned().collect();
                format!("{:?}", StepStats { seconds: 0.0, ..engine.step(&own, HYPER).unwrap() })
            })
            .collect();
        let mut state = Vec::new();
        for name in engine.tensor_names() {
            for kind in [Kind::Weights, Kind::Moment1, Kind::Moment2] {
                state.extend(engine.read_tensor(&name, kind).unwrap().into_iter().map(f32::to_bits));
            }
        }
        (figures, state)
    };
    std::thread::scope(|scope| {
        let work = &work;
        let groups = local_groups(size).into_iter().enumerate();
        let ranks: Vec<_> = groups.map(|(rank, group)| scope.spawn(move || work(rank, group))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

#[test]
fn results_have_the_bits_of_one_rank() {
    for name in SEEING {
        let dir = folder(name);
        for dtype in [DType::F32, DType::Bf16] {
            let options = room(dtype, Recompute::Block, &steps().concat());
            let one = train(dir.path(), &options, 1).remove(0);
            for zero in 0..4 {
                for size in [2, 3] {
                    let options = EngineOptions { zero, ..options.clone() };
                    for (rank, found) in train(dir.path(), &options, size).into_iter().enumerate() {
                        assert_eq!(found.0, one.0, "{name} {dtype:?}: rank {rank} of {size}, zero {zero}");
                        assert!(found.1 == one.1, "{name} {dtype:?}: rank {rank} of {size}, zero {zero}");
                    }
                }
            }
        }
    }
}

/// What a mesh computes: gradients of the first step, of the tower and of the rest; figures of all steps; and an evaluation behind them.
struct Outcome {
    gradients: [Vec<f32>; 2],
    figures: Vec<f32>,
    evaluated: Vec<f32>,
}

fn on_slices(dir: &Path, options: &EngineOptions, data: usize, steps: &[Vec<MicroBatch>]) -> Outcome {
    let folder = dir.display().to_string();
    let all = on_mesh(&folder, options, data, Weights::Random(7), |engine, rank| {
        let mesh = options.mesh;
        engine.gradients(&dealt(&steps[0], rank, data, mesh)).unwrap();
        let (tower, rest) = names(engine);
        let mut read = |mut names: Vec<String>| {
            // Meshes have different orders.
            names.sort();
            let values = names.iter().flat_map(|name| engine.read_tensor(name, Kind::Gradients).unwrap());
            values.collect::<Vec<f32>>()
        };
        let gradients = [read(tower), read(rest)];
        let figures = steps.iter().map(|step| mesh_step(engine, step, rank, data, mesh));
        let figures = figures.flat_map(|stats| [stats.loss as f32, stats.grad_norm as f32]).collect();
        let mut evaluated = Vec::new();
        if rank == 0 {
            let stats = engine.evaluate_sequences(&steps[0][0]).unwrap();
            evaluated.extend(stats.iter().map(|stats| stats.loss_sum as f32));
            engine.end_serving().unwrap();
        } else {
            engine.serve_weights().unwrap();
        }
        let planned = EngineOptions { data_parallel: Some(data), rank, ..options.clone() };
        assert_eq!(engine.memory(), plan_memory(dir, &planned, DeviceKind::Cpu).unwrap(), "{mesh:?}");
        Outcome { gradients, figures, evaluated }
    });
    all.into_iter().next().unwrap()
}

/// A model with so many layers that the first of two stages has those that DeepStack adds to.
fn deep(name: &str) -> tempfile::TempDir {
    let dir = folder(name);
    let path = dir.path().join("config.json");
    let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["text_config"]["num_hidden_layers"] = 5.into();
    if let Some(types) = config["text_config"]["layer_types"].as_array_mut() {
        types.extend_from_within(..2);
    }
    std::fs::write(path, config.to_string()).unwrap();
    dir
}

#[test]
fn a_first_stage_without_the_layers_that_rows_are_added_to_is_refused() {
    let base = room(DType::F32, Recompute::Norms, &batches());
    let options = EngineOptions { zero: 2, data_parallel: Some(1), mesh: Mesh { pp: 3, ..Mesh::default() }, ..base };
    let error = plan_memory(folder("qwen3_vl").path(), &options, DeviceKind::Cpu).unwrap_err();
    assert_eq!(error.message, "pp_size is 3, and the first of its stages has 1 layers");
    assert!(error.hint.contains("first 2 layers"), "{}", error.hint);
}

/// Each rank sees all images of a micro-batch, and has the rows of its own tokens: what the tower's gradients are on all together.
#[test]
fn ranks_with_slices_of_tokens_see_as_one_rank_does() {
    for name in SEEING {
        let dir = deep(name);
        let base = room(DType::F32, Recompute::Norms, &steps().concat());
        let base = EngineOptions { zero: 2, eval_batch: base.max_batch, ..base };
        let bound = 1e-5;
        let one = on_slices(dir.path(), &base, 1, &steps());
        let mesh = |tp, cp| Mesh { tp, cp, ..Mesh::default() };
        let stages = Mesh { pp: 2, ..mesh(2, 1) };
        let all = [(1, mesh(1, 2), 3), (1, mesh(2, 1), 2), (2, mesh(2, 1), 1), (1, stages, 2)];
        // The delta rule with weights drawn so widely magnifies the rounding of partial sums, images or not: `tensor_parallel` has it.
        let meshes = if name == "qwen3_5" { &all[..1] } else { &all[..] };
        for &(data, mesh, zero) in meshes {
            for recompute in [Recompute::Norms, Recompute::Block] {
                let options = EngineOptions { mesh, zero, recompute, ..base.clone() };
                let found = on_slices(dir.path(), &options, data, &steps());
                let what = format!("{name} {data} x {mesh:?} {recompute:?}");
                for (found, one) in found.gradients.iter().zip(&one.gradients) {
                    assert!(difference(found, one) < bound, "{what}: {}", difference(found, one));
                }
                assert!(difference(&found.figures, &one.figures) < bound, "{what}: {:?}", found.figures);
                assert!(difference(&found.evaluated, &one.evaluated) < bound, "{what}: {:?}", found.evaluated);
            }
        }
    }
}
