//! Whole optimizer steps on the CUDA leaves, whose kernels run on the host: their numbers against the CPU backend's, and
//! what is queued against the rules of order.

#[path = "../../../tests/common/mod.rs"]
mod common;
#[path = "../../../examples/golden.rs"]
#[allow(unreachable_pub, reason = "an example, included for its cases")]
mod golden;

use std::path::Path;

use rayon::prelude::*;

use super::emulated::EmulatedDevice;
use super::recording::{NoDevice, RecordingDevice};
use super::*;
use crate::backend::cpu::CpuBackend;
use crate::engine::{Engine, EngineOptions, Weights};
use crate::state::Kind;
use crate::step::Recompute;
use common::{HYPER, batch, deeper, difference, options};

const MODELS: [(&str, usize); 2] = [("window-bias", 5), ("moe-balance", 4)];
const LEVELS: [Recompute; 4] = [Recompute::Off, Recompute::Norms, Recompute::Mlp, Recompute::Block];

type Recorded = CudaBackend<RecordingDevice<EmulatedDevice>>;

fn open<B: Backend>(backend: B, dir: &Path, options: &EngineOptions) -> Engine<B> {
    Engine::open(Box::new(backend), dir, Weights::Random(7), options).unwrap()
}

fn recorded() -> Recorded {
    CudaBackend::new(RecordingDevice::new(EmulatedDevice::default()))
}

/// Every tensor of a kind, one after the other.
fn all<B: Backend>(engine: &mut Engine<B>, kind: Kind) -> Vec<f32> {
    engine.tensor_names().iter().flat_map(|name| engine.read_tensor(name, kind).unwrap()).collect()
}

fn bits<B: Backend>(engine: &mut Engine<B>) -> Vec<u32> {
    let kinds = [Kind::Weights, Kind::Moment1, Kind::Moment2];
    kinds.into_iter().flat_map(|kind| all(engine, kind)).map(f32::to_bits).collect()
}

#[test]
fn gradients_losses_and_trained_weights_are_those_of_the_cpu() {
    let batches = [batch(&[9, 3, 21], 1), batch(&[17], 2)];
    for (name, layers) in MODELS {
        let dir = deeper(name, layers);
        // Sums in another order; and in bf16 the roundings of activations, which differ where sums do.
        for (dtype, gradient_bound, loss_bound) in [(DType::F32, 1e-5, 1e-6), (DType::Bf16, 1e-2, 1e-3)] {
            let options = options(dtype, Recompute::Norms, 33);
            let mut cpu = open(CpuBackend::new(), dir.path(), &options);
            let mut cuda = open(recorded(), dir.path(), &options);
            let expected = cpu.gradients(&batches).unwrap();
            let actual = cuda.gradients(&batches).unwrap();
            for (actual, expected) in actual.iter().zip(&expected) {
                let apart = (actual.loss_sum - expected.loss_sum).abs() / expected.loss_sum;
                assert!(apart <= loss_bound, "{name} {dtype:?}: {actual:?} instead of {expected:?}");
                assert_eq!((actual.tokens, actual.target_tokens), (expected.tokens, expected.target_tokens));
            }
            let (actual, expected) = (all(&mut cuda, Kind::Gradients), all(&mut cpu, Kind::Gradients));
            let apart = difference(&actual, &expected);
            assert!(apart <= gradient_bound, "{name} {dtype:?}: gradients {apart:e} apart");

            for _ in 0..3 {
                let (actual, expected) = (cuda.step(&batches, HYPER).unwrap(), cpu.step(&batches, HYPER).unwrap());
                let apart = (actual.loss - expected.loss).abs() / expected.loss;
                assert!(apart <= 10.0 * loss_bound, "{name} {dtype:?}: {} instead of {}", actual.loss, expected.loss);
            }
            assert_eq!(cuda.backend_mut().device_mut().faults, Vec::<String>::new(), "{name} {dtype:?}");
        }
    }
}

#[test]
fn transformers_numbers_come_out_of_the_kernels() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../__test__/golden");
    let cases = golden::cases(&folder);
    assert!(!cases.is_empty(), "{} has no cases", folder.display());
    let failed: Vec<String> = cases
        .par_iter()
        .map(|case| golden::run_case_on(Box::new(recorded()), case, Recompute::Norms, DType::F32).unwrap())
        .filter(|outcome| !outcome.passed())
        .map(|outcome| outcome.line())
        .collect();
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

#[test]
fn recomputation_and_offloading_change_no_bit_and_keep_the_order() {
    let batches = [batch(&[9, 3, 21], 1), batch(&[17], 2)];
    for (name, layers) in MODELS {
        let dir = deeper(name, layers);
        let run = |recompute, activation_offloading, optimizer_offload| {
            let base = options(DType::Bf16, recompute, 33);
            let options = EngineOptions { activation_offloading, optimizer_offload, ..base };
            let mut engine = open(recorded(), dir.path(), &options);
            let stats: Vec<_> = (0..2).map(|_| engine.step(&batches, HYPER).unwrap()).collect();
            let losses: Vec<_> = stats.iter().map(|s| (s.loss.to_bits(), s.grad_norm.to_bits())).collect();
            let state = bits(&mut engine);
            let device = engine.backend_mut().device_mut();
            let what = format!("{name} {recompute:?} {activation_offloading} {optimizer_offload}");
            assert_eq!(device.faults, Vec::<String>::new(), "{what}");
            assert_eq!(device.transfers > 0, activation_offloading || optimizer_offload, "{what}");
            (losses, state)
        };
        let expected = run(Recompute::Off, false, false);
        // On the CPU backend every pair of them is tested; here what is queued beside the leaves matters.
        for recompute in LEVELS {
            for (activations, optimizer) in [(false, false), (true, true)] {
                let actual = run(recompute, activations, optimizer);
                assert!(actual == expected, "{name} {recompute:?} {activations} {optimizer}");
            }
        }
    }
}

#[test]
fn an_event_that_is_not_waited_for_is_found() {
    let dir = deeper("window-bias", 5);
    let base = options(DType::Bf16, Recompute::Block, 33);
    let options = EngineOptions { activation_offloading: true, optimizer_offload: true, ..base };
    let run = |forgotten| {
        let mut device = RecordingDevice::new(NoDevice);
        device.forgotten = forgotten;
        let mut engine = open(CudaBackend::new(device), dir.path(), &options);
        for _ in 0..2 {
            engine.step(&[batch(&[9, 3], 1), batch(&[12], 2)], HYPER).unwrap();
        }
        let device = engine.backend_mut().device_mut();
        (device.waits, device.faults.len())
    };
    let (waits, faults) = run(0);
    assert_eq!(faults, 0);
    let unfound: Vec<usize> = (1..=waits).filter(|&forgotten| run(forgotten).1 == 0).collect();
    // At the beginning there is nothing to wait for yet, at the end nothing comes after, and some waits others imply.
    assert!(waits > 20 && 3 * unfound.len() < waits, "{unfound:?} of {waits}");
}

#[test]
fn heads_without_tensor_cores_are_told_of() {
    let dir = deeper("window-bias", 2);
    let notice = |dtype| open(CudaBackend::new(NoDevice), dir.path(), &options(dtype, Recompute::Norms, 8)).notice();
    assert!(notice(DType::Bf16).unwrap().contains("heads of 8 elements"));
    assert_eq!(notice(DType::F32), None);
    let cpu = open(CpuBackend::new(), dir.path(), &options(DType::Bf16, Recompute::Norms, 8));
    assert_eq!(cpu.notice(), None);
}

#[test]
fn an_interrupted_step_leaves_no_copy_on_its_way() {
    let dir = deeper("window-bias", 5);
    let base = options(DType::F32, Recompute::Block, 33);
    let options = EngineOptions { activation_offloading: true, ..base };
    let mut engine = open(recorded(), dir.path(), &options);
    engine.interrupt_flag().store(true, std::sync::atomic::Ordering::Relaxed);
    assert!(engine.step(&[batch(&[20], 1)], HYPER).is_err());
    engine.step(&[batch(&[20], 1)], HYPER).unwrap();
    assert_eq!(engine.backend_mut().device_mut().faults, Vec::<String>::new());
}
