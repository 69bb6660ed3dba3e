//! Whole steps and generation of the hybrid families on the CUDA leaves, whose kernels run on the host: their numbers against the CPU
//! backend's, their bits against their own, their memory against the plan.

use super::emulated::EmulatedDevice;
use super::recording::RecordingDevice;
use super::step_tests::common::{HYPER, TYPES, batch, difference, hybrids, options};
use super::*;
use crate::backend::cpu::CpuBackend;
use crate::batch::BatchSize;
use crate::engine::Engine;
use crate::generate::GenerateOptions;
use crate::loss_scale::LossScaling;
use crate::options::{EngineOptions, Recompute, Weights};
use crate::plan_memory;
use crate::weights::Kind;

fn recorded() -> CudaBackend<RecordingDevice<EmulatedDevice>> {
    CudaBackend::new(RecordingDevice::new(EmulatedDevice::default()))
}

fn open<B: Backend>(backend: B, dir: &std::path::Path, options: &EngineOptions) -> Engine<B> {
    Engine::open(Box::new(backend), dir, Weights::Random(7), options).unwrap()
}

/// Every tensor of a kind, one after the other.
fn all<B: Backend>(engine: &mut Engine<B>, kind: Kind) -> Vec<f32> {
    engine.tensor_names().iter().flat_map(|name| engine.read_tensor(name, kind).unwrap()).collect()
}

#[test]
fn gradients_losses_and_trained_weights_of_hybrids_are_those_of_the_cpu() {
    // Sequences within a chunk and over two.
    let batches = [batch(&[9, 3, 70], 1), batch(&[17], 2)];
    for (name, dir) in hybrids() {
        for dtype in TYPES {
            // As of the other families (`step_tests.rs`).
            let (gradient_bound, loss_bound) = match dtype {
                DType::F32 => (1e-5, 1e-6),
                DType::Bf16 => (1e-2, 1e-3),
                _ => (1e-2 / 8.0, 1e-3 / 8.0),
            };
            let loss_scaling = LossScaling { initial: 1024.0, ..LossScaling::default() };
            let max_batch = BatchSize { tokens: 82, sequences: 3, ..BatchSize::default() };
            let options = EngineOptions { loss_scaling, max_batch, ..options(dtype, Recompute::Norms, 82) };
            let mut cpu = open(CpuBackend::new(), dir.path(), &options);
            let mut cuda = open(recorded(), dir.path(), &options);
            let planned = plan_memory(dir.path(), &options, DeviceKind::Cuda).unwrap();
            assert_eq!(cuda.memory(), planned, "{name} {dtype:?}");
            let (expected, actual) = (cpu.gradients(&batches).unwrap(), cuda.gradients(&batches).unwrap());
            for (actual, expected) in actual.iter().zip(&expected) {
                let apart = (actual.loss_sum - expected.loss_sum).abs() / expected.loss_sum;
                assert!(apart <= loss_bound, "{name} {dtype:?}: {actual:?} instead of {expected:?}");
            }
            let apart = difference(&all(&mut cuda, Kind::Gradients), &all(&mut cpu, Kind::Gradients));
            assert!(apart <= gradient_bound, "{name} {dtype:?}: gradients {apart:e} apart");
            for _ in 0..3 {
                let (actual, expected) = (cuda.step(&batches, HYPER).unwrap(), cpu.step(&batches, HYPER).unwrap());
                assert!(!actual.skipped && !expected.skipped, "{name} {dtype:?}");
                let apart = (actual.loss - expected.loss).abs() / expected.loss;
                assert!(apart <= 10.0 * loss_bound, "{name} {dtype:?}: {} instead of {}", actual.loss, expected.loss);
            }
            assert_eq!(cuda.memory(), planned, "{name} {dtype:?}: nothing was reserved again");
            let device = cuda.backend_mut().device_mut();
            assert_eq!(device.faults, Vec::<String>::new(), "{name} {dtype:?}");
        }
    }
}

#[test]
fn recomputation_and_offloading_of_hybrids_change_no_bit() {
    let batches = [batch(&[9, 66], 1), batch(&[17], 2)];
    for (name, dir) in hybrids() {
        let run = |recompute, offload| {
            let base = options(DType::Bf16, recompute, 75);
            let options = EngineOptions { activation_offloading: offload, optimizer_offload: offload, ..base };
            let mut engine = open(recorded(), dir.path(), &options);
            let stats: Vec<_> = (0..2).map(|_| engine.step(&batches, HYPER).unwrap()).collect();
            let figures: Vec<_> = stats.iter().map(|s| (s.loss.to_bits(), s.grad_norm.to_bits())).collect();
            let kinds = [Kind::Weights, Kind::Moment1, Kind::Moment2];
            let state: Vec<u32> = kinds.into_iter().flat_map(|kind| all(&mut engine, kind)).map(f32::to_bits).collect();
            let device = engine.backend_mut().device_mut();
            assert_eq!(device.faults, Vec::<String>::new(), "{name} {recompute:?} {offload}");
            (figures, state)
        };
        let expected = run(Recompute::Off, false);
        for (recompute, offload) in [(Recompute::Norms, false), (Recompute::Mlp, true), (Recompute::Block, false)] {
            assert!(run(recompute, offload) == expected, "{name} {recompute:?} {offload}");
        }
    }
}

#[test]
fn hybrids_generate_what_they_generate_on_the_cpu() {
    // Shorter than the convolution, and over two chunks; replies of several tokens from the kept states.
    let prompts = [vec![3, 9], (0..70).map(|i| i % 32).collect(), vec![5]];
    for (name, dir) in hybrids() {
        let options = options(DType::F32, Recompute::Norms, 82);
        let (mut cpu, mut cuda) =
            (open(CpuBackend::new(), dir.path(), &options), open(recorded(), dir.path(), &options));
        for _ in 0..3 {
            let batches = [batch(&[9, 3, 70], 1)];
            cpu.step(&batches, HYPER).unwrap();
            cuda.step(&batches, HYPER).unwrap();
        }
        // Drawn: the most probable token is nearly always the same after so little training.
        let options = GenerateOptions { temperature: 1.0, seed: 3, ..GenerateOptions::greedy(6) };
        let expected = cpu.generate(&prompts, &options).unwrap();
        assert!(expected.iter().all(|reply| reply.iter().any(|id| *id != reply[0])), "{name}: {expected:?}");
        assert_eq!(cuda.generate(&prompts, &options).unwrap(), expected, "{name}");
        let device = cuda.backend_mut().device_mut();
        assert!(device.kernels.contains(&"gated_delta_step_f32"));
        // Keys join a cache that is written in part, which counts as read.
        let faults: Vec<_> = device.faults.iter().filter(|fault| !fault.starts_with("scatter_f32 ")).collect();
        assert!(faults.is_empty(), "{name}: {faults:?}");
    }
}
