//! What must not change a result: recomputation, chunks, how samples are cut into micro-batches, threads, and memory.

use crate::common;

use arl_engine::backend::DType;
use arl_engine::backend::cpu::CpuBackend;
use arl_engine::{BatchSize, Engine, EngineOptions, Hyper, Kind, Recompute, Weights};
use common::{HYPER, MODELS, TYPES, all, batch, difference, open, options, split, state_bits};

/// Sums in another order: f32 rounding over sums of at most a few hundred terms.
const REORDERED: f64 = 2e-6;

#[test]
fn recomputation_changes_no_bit() {
    let batches = [batch(&[9, 3, 21], 1), batch(&[17], 2)];
    for name in MODELS {
        for dtype in TYPES {
            let mut results = Vec::new();
            for recompute in [Recompute::Off, Recompute::Norms, Recompute::Mlp, Recompute::Block] {
                let mut engine = open(name, &options(dtype, recompute, 33));
                let stats: Vec<_> = (0..3).map(|_| engine.step(&batches, HYPER).unwrap()).collect();
                let losses: Vec<_> = stats.iter().map(|s| (s.loss.to_bits(), s.grad_norm.to_bits())).collect();
                results.push((recompute, losses, state_bits(&mut engine)));
            }
            for (recompute, losses, state) in &results[1..] {
                assert_eq!(losses, &results[0].1, "{name} {dtype:?} {recompute:?}");
                assert!(state == &results[0].2, "{name} {dtype:?} {recompute:?}: the state differs");
            }
        }
    }
}

#[test]
fn offloading_changes_no_bit_at_any_level_of_recomputation() {
    let batches = [batch(&[9, 3, 21], 1), batch(&[17], 2)];
    for (name, layers) in [("window-bias", 5), ("moe-balance", 4)] {
        let dir = common::deeper(name, layers);
        for dtype in TYPES {
            for recompute in [Recompute::Off, Recompute::Norms, Recompute::Mlp, Recompute::Block] {
                let run = |activation_offloading, optimizer_offload| {
                    let base = options(dtype, recompute, 33);
                    let options = EngineOptions { activation_offloading, optimizer_offload, ..base };
                    let mut engine =
                        Engine::open(Box::new(CpuBackend::new()), dir.path(), Weights::Random(7), &options).unwrap();
                    let stats: Vec<_> = (0..3).map(|_| engine.step(&batches, HYPER).unwrap()).collect();
                    let losses: Vec<_> = stats.iter().map(|s| (s.loss.to_bits(), s.grad_norm.to_bits())).collect();
                    (losses, state_bits(&mut engine), engine.memory())
                };
                let (losses, state, memory) = run(false, false);
                assert_eq!((memory.host_bytes, &memory.host_categories), (0, &Vec::new()));
                for (activations, optimizer) in [(true, false), (false, true), (true, true)] {
                    let what = format!("{name} {dtype:?} {recompute:?} {activations} {optimizer}");
                    let (offloaded_losses, offloaded_state, offloaded) = run(activations, optimizer);
                    assert_eq!(offloaded_losses, losses, "{what}");
                    assert!(offloaded_state == state, "{what}: the state differs");
                    assert!(offloaded.total_bytes < memory.total_bytes, "{what}: {offloaded:?} {memory:?}");
                    let host: usize = offloaded.host_categories.iter().map(|(_, bytes)| bytes).sum();
                    assert!(host > 0 && host <= offloaded.host_bytes, "{what}: {offloaded:?}");
                }
            }
        }
    }
}

#[test]
fn higher_levels_of_recomputation_need_less_memory() {
    let bytes = |recompute| {
        let engine = open("window-bias", &options(DType::F32, recompute, 4096));
        engine.memory().total_bytes
    };
    let levels = [Recompute::Off, Recompute::Norms, Recompute::Mlp, Recompute::Block].map(bytes);
    assert!(levels.is_sorted_by(|a, b| a > b), "{levels:?}");
}

#[test]
fn chunks_of_the_loss_change_sums_orders_alone() {
    let batches = [batch(&[9, 3, 21], 1)];
    for name in MODELS {
        let run = |chunk| {
            let options =
                EngineOptions { loss_seq_chunk_size: Some(chunk), ..options(DType::F32, Recompute::Norms, 33) };
            let mut engine = open(name, &options);
            let stats = engine.gradients(&batches).unwrap();
            (stats[0].loss_sum, all(&mut engine, Kind::Gradients))
        };
        let whole = run(1000);
        for chunk in [1, 4, 7, 16] {
            let (loss, gradients) = run(chunk);
            assert!((loss - whole.0).abs() <= REORDERED * whole.0, "{name} {chunk}: {loss} {}", whole.0);
            let apart = difference(&gradients, &whole.1);
            assert!(apart <= REORDERED, "{name} {chunk}: {apart:e}");
        }
    }
}

/// The balance loss of a mixture of experts belongs to a micro-batch, so that only a dense model can show this.
#[test]
fn how_samples_are_cut_into_micro_batches_changes_sums_orders_alone() {
    let packed = batch(&[9, 3, 21, 14], 3);
    let parts = split(&packed);
    let mut engine = open("window-bias", &options(DType::F32, Recompute::Norms, 47));
    engine.gradients(std::slice::from_ref(&packed)).unwrap();
    let whole = all(&mut engine, Kind::Gradients);
    let stats = engine.gradients(&parts).unwrap();
    let apart = difference(&all(&mut engine, Kind::Gradients), &whole);
    assert!(apart <= REORDERED, "{apart:e}");
    let packed_stats = engine.evaluate(std::slice::from_ref(&packed)).unwrap();
    let sum: f64 = stats.iter().map(|s| s.loss_sum).sum();
    assert!((sum - packed_stats[0].loss_sum).abs() <= REORDERED * sum);
    assert_eq!(stats.iter().map(|s| s.correct).sum::<usize>(), packed_stats[0].correct);
}

#[test]
fn packing_lets_no_sequence_see_another_one() {
    let packed = batch(&[9, 3, 21, 14], 3);
    for name in MODELS {
        let mut engine = open(name, &options(DType::F32, Recompute::Norms, 47));
        let together = engine.inspect(&packed).unwrap().logits;
        let apart: Vec<f32> = split(&packed).iter().flat_map(|b| engine.inspect(b).unwrap().logits).collect();
        assert!(difference(&together, &apart) <= REORDERED, "{name}");
    }
}

#[test]
fn threads_change_no_bit() {
    let batches = [batch(&[9, 3, 21], 1), batch(&[17], 2)];
    for name in MODELS {
        for dtype in TYPES {
            let run = |threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| {
                    let mut engine = open(name, &options(dtype, Recompute::Norms, 33));
                    let losses: Vec<_> = (0..2).map(|_| engine.step(&batches, HYPER).unwrap().loss.to_bits()).collect();
                    (losses, state_bits(&mut engine))
                })
            };
            let one = run(1);
            for threads in [2, 3] {
                assert!(run(threads) == one, "{name} {dtype:?}: {threads} threads");
            }
        }
    }
}

#[test]
fn evaluation_gives_the_losses_of_training_in_bits() {
    let batches = [batch(&[9, 3, 21], 1), batch(&[17], 2)];
    for name in MODELS {
        for dtype in TYPES {
            let mut engine = open(name, &options(dtype, Recompute::Block, 33));
            let evaluated = engine.evaluate(&batches).unwrap();
            assert_eq!(engine.step(&batches, HYPER).unwrap().micro_batches, evaluated, "{name}");
            let mut inference =
                open(name, &EngineOptions { inference_only: true, ..options(dtype, Recompute::Off, 33) });
            assert_eq!(inference.evaluate(&batches).unwrap(), evaluated, "{name}");
        }
    }
}

/// bf16 keeps 8 bits: activations and weights are rounded by up to 1/512 at some twenty places. f16 keeps 11.
/// In the batch no router is so undecided that rounding chooses other experts, which is a step and no rounding.
#[test]
fn sixteen_bits_stay_near_f32() {
    let batches = [batch(&[9, 3, 21], 3)];
    for name in MODELS {
        let run = |dtype| {
            let mut engine = open(name, &options(dtype, Recompute::Norms, 33));
            let stats = engine.gradients(&batches).unwrap();
            (stats[0].loss_sum, all(&mut engine, Kind::Gradients))
        };
        let exact = run(DType::F32);
        for (dtype, times) in [(DType::Bf16, 1.0), (DType::F16, 8.0)] {
            let near = run(dtype);
            assert!((near.0 - exact.0).abs() / exact.0 < 0.01 / times, "{name} {dtype:?}: {} {}", near.0, exact.0);
            let apart = difference(&near.1, &exact.1);
            assert!(apart < 0.05 / times, "{name} {dtype:?}: {apart}");
        }
    }
}

/// The master weights are exact: small updates are not lost, as they are in weights of 16 bits alone.
#[test]
fn weights_of_16_bits_move_by_updates_smaller_than_their_last_bit() {
    let batches = [batch(&[9, 3, 21], 1)];
    let hyper = Hyper { learning_rate: 1e-6, max_grad_norm: 1.0 };
    let moved = |dtype| {
        let mut engine = open("window-bias", &options(dtype, Recompute::Norms, 33));
        let before = all(&mut engine, Kind::Weights);
        for _ in 0..50 {
            engine.step(&batches, hyper).unwrap();
        }
        let after = all(&mut engine, Kind::Weights);
        after.iter().zip(&before).map(|(a, b)| f64::from((a - b).abs())).sum::<f64>()
    };
    let exact = moved(DType::F32);
    for dtype in [DType::Bf16, DType::F16] {
        let near = moved(dtype);
        assert!((near / exact - 1.0).abs() < 0.1, "{dtype:?}: {near} {exact}");
    }
}

#[test]
fn a_batch_larger_than_planned_makes_room_and_changes_no_bit() {
    let batches = [batch(&[9, 3, 21], 1)];
    let run = |size| {
        let mut engine =
            open("window-bias", &EngineOptions { max_batch: size, ..options(DType::F32, Recompute::Norms, 1) });
        engine.step(&[batch(&[2], 5)], HYPER).unwrap();
        engine.step(&batches, HYPER).unwrap();
        (state_bits(&mut engine), engine.memory())
    };
    let planned = run(BatchSize { tokens: 33, sequences: 3, ..BatchSize::default() });
    assert!(run(BatchSize { tokens: 2, sequences: 1, ..BatchSize::default() }) == planned);
}
