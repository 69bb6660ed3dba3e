//! Ranks that train a model that sees: each has micro-batches of its own, with images or without, and the bits are those of one.

use crate::common;
use crate::common::vision;

use std::path::Path;

use arl_comm::{Group, local_groups};
use arl_engine::backend::DType;
use arl_engine::backend::cpu::CpuBackend;
use arl_engine::{Engine, EngineOptions, Kind, MicroBatch, Recompute, StepStats, Weights};
use common::HYPER;
use vision::{SEEING, batch, batches, folder, room};

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
