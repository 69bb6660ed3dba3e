//! Whole optimizer steps on the CUDA leaves, whose kernels run on the host: their numbers against the CPU backend's, and
//! what is queued against the rules of order.

#[path = "../../../tests/common/mod.rs"]
pub(super) mod common;
#[path = "../../../examples/golden.rs"]
#[allow(unreachable_pub, reason = "an example, included for its cases")]
mod golden;

use std::path::Path;

use arl_model::LoraConfig;
use rayon::prelude::*;

use super::emulated::EmulatedDevice;
use super::recording::{NoDevice, RecordingDevice};
use super::*;
use crate::backend::cpu::CpuBackend;
use crate::engine::Engine;
use crate::loss_scale::LossScaling;
use crate::options::Recompute;
use crate::options::{EngineOptions, LoraOptions, Nf4Options, Weights};
use crate::weights::Kind;
use common::{HYPER, TYPES, batch, deeper, difference, options};

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
        // Sums in another order; and in 16 bits the roundings of activations, which differ where sums do: f16's are an
        // eighth of bf16's.
        let f32_logits = TYPES.map(|dtype| (dtype, false));
        for (dtype, logits_16bit) in f32_logits.into_iter().chain([(DType::Bf16, true), (DType::F16, true)]) {
            let (gradient_bound, loss_bound) = match dtype {
                DType::F32 => (1e-5, 1e-6),
                DType::Bf16 => (1e-2, 1e-3),
                _ => (1e-2 / 8.0, 1e-3 / 8.0),
            };
            // A scale at which no step is skipped.
            let loss_scaling = LossScaling { initial: 1024.0, ..LossScaling::default() };
            let options = EngineOptions { loss_scaling, logits_16bit, ..options(dtype, Recompute::Norms, 33) };
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
                assert!(!actual.skipped && !expected.skipped, "{name} {dtype:?}");
                let apart = (actual.loss - expected.loss).abs() / expected.loss;
                assert!(apart <= 10.0 * loss_bound, "{name} {dtype:?}: {} instead of {}", actual.loss, expected.loss);
            }
            let device = cuda.backend_mut().device_mut();
            assert_eq!(device.faults, Vec::<String>::new(), "{name} {dtype:?}");
            let of_16_bits = ["cross_entropy_gradient_bf16", "cross_entropy_gradient_f16"];
            assert_eq!(
                device.kernels.iter().any(|kernel| of_16_bits.contains(kernel)),
                logits_16bit,
                "{name} {dtype:?}"
            );
        }
    }
}

#[test]
fn adapters_train_as_on_the_cpu_and_keep_the_order() {
    let batches = [batch(&[9, 3, 21], 1), batch(&[17], 2)];
    let configs = [
        ("window-bias", r#"{ "target_modules": "all-linear", "r": 3 }"#, Some(Nf4Options { nested: true })),
        ("window-bias", r#"{ "target_modules": "all-linear", "r": 3, "lora_dropout": 0.25 }"#, None),
        (
            "window-bias",
            r#"{ "target_modules": "all-linear", "r": 3, "use_dora": true }"#,
            Some(Nf4Options { nested: false }),
        ),
        // Attention, experts and the router.
        ("moe-balance", r#"{ "target_modules": "all-linear", "r": 3 }"#, Some(Nf4Options { nested: false })),
        ("qwen2-window", r#"{ "target_modules": ["lm_head", "embed_tokens", "v_proj"], "r": 3 }"#, None),
    ];
    for (dtype, gradient_bound, loss_bound) in [(DType::F32, 1e-5, 1e-6), (DType::Bf16, 2e-2, 1e-3)] {
        for (name, text, load_in_4bit) in configs {
            let dir = deeper(name, 3);
            let config = LoraConfig::from_json(text, Path::new("adapter_config.json")).unwrap();
            let base = options(dtype, Recompute::Block, 33);
            let base = EngineOptions { activation_offloading: true, optimizer_offload: true, ..base };
            let options = EngineOptions { lora: Some(LoraOptions { config, seed: 7 }), load_in_4bit, ..base };
            let (mut cpu, mut cuda) =
                (open(CpuBackend::new(), dir.path(), &options), open(recorded(), dir.path(), &options));
            // B is zero before the first step, and then A has no gradient.
            for _ in 0..3 {
                let (actual, expected) = (cuda.step(&batches, HYPER).unwrap(), cpu.step(&batches, HYPER).unwrap());
                let apart = (actual.loss - expected.loss).abs() / expected.loss;
                assert!(apart <= 10.0 * loss_bound, "{dtype:?} {text}: {} instead of {}", actual.loss, expected.loss);
            }
            let names: Vec<String> =
                cpu.lora().unwrap().stored().into_iter().map(|(_, spec)| spec.name.clone()).collect();
            let all =
                |name: &String, engine: &mut Engine<CpuBackend>| engine.read_tensor(name, Kind::Gradients).unwrap();
            let expected: Vec<f32> = names.iter().flat_map(|name| all(name, &mut cpu)).collect();
            let actual: Vec<f32> =
                names.iter().flat_map(|name| cuda.read_tensor(name, Kind::Gradients).unwrap()).collect();
            let apart = difference(&actual, &expected);
            assert!(apart <= 10.0 * gradient_bound, "{dtype:?} {text}: gradients {apart:e} apart");
            let device = cuda.backend_mut().device_mut();
            assert!(device.kernels.iter().any(|kernel| kernel.starts_with("scale")));
            assert_eq!(device.faults, Vec::<String>::new(), "{dtype:?} {text}");
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
        // On the CPU backend every pair of them is tested; here what is queued concurrently with the leaves matters.
        for recompute in LEVELS {
            for (activations, optimizer) in [(false, false), (true, true)] {
                let actual = run(recompute, activations, optimizer);
                assert!(actual == expected, "{name} {recompute:?} {activations} {optimizer}");
            }
        }
    }
}

#[test]
fn whole_masters_and_none_keep_the_order_as_split_ones_do() {
    let dir = deeper("window-bias", 5);
    let bf16 = options(DType::Bf16, Recompute::Block, 33);
    let f16 = options(DType::F16, Recompute::Block, 33);
    let bare = EngineOptions { stochastic_rounding: true, bf16_moments: true, ..bf16 };
    for base in [f16.clone(), EngineOptions { bf16_moments: true, ..f16 }, bare] {
        let options = EngineOptions { activation_offloading: true, optimizer_offload: true, ..base };
        let mut engine = open(CudaBackend::new(RecordingDevice::new(NoDevice)), dir.path(), &options);
        for _ in 0..2 {
            engine.step(&[batch(&[9, 3], 1), batch(&[12], 2)], HYPER).unwrap();
        }
        let device = engine.backend_mut().device_mut();
        assert!(device.transfers > 0);
        assert_eq!(device.faults, Vec::<String>::new(), "{:?}", options.dtype);
    }
}

#[test]
fn steps_are_queued_without_waiting_for_the_device() {
    let steps: Vec<_> = (0..4).map(|i| [batch(&[9, 3, 21], i), batch(&[17], 2 * i)]).collect();
    for (name, layers) in MODELS {
        let dir = deeper(name, layers);
        for offload in [false, true] {
            let base = options(DType::Bf16, Recompute::Block, 33);
            let options = EngineOptions { activation_offloading: offload, optimizer_offload: offload, ..base };
            let mut other = open(recorded(), dir.path(), &options);
            let mut losses: Vec<_> = steps.iter().map(|s| other.step(s, HYPER).unwrap().loss.to_bits()).collect();
            let mut engine = open(recorded(), dir.path(), &options);
            let mut running = None;
            for step in &steps {
                let waits = engine.backend_mut().device_mut().host_waits;
                let ticket = engine.submit(step, HYPER).unwrap();
                assert_eq!(engine.backend_mut().device_mut().host_waits, waits, "{name} {offload}");
                // At the earliest now the host knows of the step before.
                if let Some(before) = running.replace(ticket) {
                    assert_eq!(engine.finish(before).unwrap().loss.to_bits(), losses.remove(0), "{name} {offload}");
                    assert_eq!(engine.backend_mut().device_mut().host_waits, waits + 1, "{name} {offload}");
                }
                let waits = engine.backend_mut().device_mut().host_waits;
                engine.apply(ticket).unwrap();
                assert_eq!(engine.backend_mut().device_mut().host_waits, waits, "{name} {offload}");
            }
            engine.evaluate(&[batch(&[30], 5)]).unwrap();
            assert_eq!(engine.finish(running.unwrap()).unwrap().loss.to_bits(), losses[0], "{name} {offload}");
            assert!(bits(&mut engine) == bits(&mut other), "{name} {offload}");
            assert_eq!(engine.backend_mut().device_mut().faults, Vec::<String>::new(), "{name} {offload}");
        }
    }
}

/// The waits of three steps, each of two micro-batches and submitted ahead, and those that may be left out unnoticed.
fn waits_and_unfound(options: &EngineOptions) -> (usize, Vec<usize>) {
    let dir = deeper("window-bias", 5);
    let run = |forgotten| {
        let mut device = RecordingDevice::new(NoDevice);
        device.forgotten = forgotten;
        let mut engine = open(CudaBackend::new(device), dir.path(), options);
        let mut running = None;
        for _ in 0..3 {
            let ticket = engine.submit(&[batch(&[9, 3], 1), batch(&[12], 2)], HYPER).unwrap();
            if let Some(before) = running.replace(ticket) {
                engine.finish(before).unwrap();
            }
            engine.apply(ticket).unwrap();
        }
        engine.complete_update();
        let device = engine.backend_mut().device_mut();
        (device.waits, device.faults.len())
    };
    let (waits, faults) = run(0);
    assert_eq!(faults, 0);
    (waits, (1..=waits).filter(|&forgotten| run(forgotten).1 == 0).collect())
}

#[test]
fn an_event_that_is_not_waited_for_is_found() {
    let base = options(DType::Bf16, Recompute::Block, 33);
    let options = |activation_offloading, optimizer_offload| EngineOptions {
        activation_offloading,
        optimizer_offload,
        ..base.clone()
    };
    let (waits, unfound) = waits_and_unfound(&options(false, true));
    // Each of five pieces comes, is updated and goes back, three times. When the next update begins, the third slot's last
    // piece has gone before those of the other two, whose waits imply its own.
    assert_eq!((waits, unfound), (3 * 15 - 3, vec![15, 30]));
    let (waits, unfound) = waits_and_unfound(&options(true, true));
    // Of inputs of layers some waits are implied by others.
    assert!(waits > 60 && 3 * unfound.len() < waits, "{unfound:?} of {waits}");
}

#[test]
fn an_offloaded_update_is_left_to_the_next_forward_pass_and_done_once() {
    let dir = deeper("window-bias", 5);
    let base = options(DType::Bf16, Recompute::Block, 33);
    let options = EngineOptions { optimizer_offload: true, ..base };
    let mut engine = open(CudaBackend::new(RecordingDevice::new(NoDevice)), dir.path(), &options);
    let batches = [batch(&[9, 3], 1), batch(&[12], 2)];
    let ticket = engine.submit(&batches, HYPER).unwrap();
    assert_eq!(engine.backend_mut().device_mut().transfers, 0);
    engine.apply(ticket).unwrap();
    // Both moments and the masters' lower halves of the three pieces that are needed first.
    assert_eq!(engine.backend_mut().device_mut().transfers, 3 * 3);
    let queued = engine.backend_mut().device_mut().kernels.len();
    assert!(!engine.backend_mut().device_mut().kernels.contains(&"adamw_split"));
    engine.finish(ticket).unwrap();

    engine.submit(&batches, HYPER).unwrap();
    let device = engine.backend_mut().device_mut();
    let kernels = &device.kernels[queued..];
    let updates: Vec<usize> = (0..kernels.len()).filter(|&i| kernels[i] == "adamw_split").collect();
    // Every piece came and went.
    assert_eq!(device.transfers, 2 * 3 * updates.len());
    // Layers whose feed-forward part was computed before each piece was updated.
    let layers = |&update: &usize| kernels[..update].iter().filter(|kernel| kernel.starts_with("swiglu")).count();
    let mut layers: Vec<usize> = updates.iter().map(layers).collect();
    assert!(layers[0] == 0 && layers[layers.len() - 1] < 5, "{layers:?}");
    layers.dedup();
    assert!(layers.len() >= 3, "{layers:?}");
}

#[test]
fn an_interrupted_forward_pass_leaves_the_rest_of_the_update_to_the_next() {
    let dir = deeper("window-bias", 5);
    let base = options(DType::F32, Recompute::Block, 33);
    let batches = [batch(&[9, 3], 1)];
    let run = |optimizer_offload, interrupted| {
        let mut engine = open(recorded(), dir.path(), &EngineOptions { optimizer_offload, ..base.clone() });
        engine.step(&batches, HYPER).unwrap();
        if interrupted {
            engine.interrupt_flag().store(true, std::sync::atomic::Ordering::Relaxed);
            assert!(engine.step(&batches, HYPER).is_err());
        }
        engine.step(&batches, HYPER).unwrap();
        assert_eq!(engine.backend_mut().device_mut().faults, Vec::<String>::new());
        bits(&mut engine)
    };
    let expected = run(false, false);
    assert!(run(true, false) == expected && run(true, true) == expected);
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
