//! `logits_16bit`: the loss's logits in the type of the activations. Bounds on the distance to f32 logits follow from the number
//! formats alone.

use crate::common;

use arl_engine::backend::{DType, DeviceKind};
use arl_engine::{BatchSize, Engine, EngineOptions, Kind, Recompute, Weights, plan_memory_of};
use arl_model::{ErrorCode, ModelConfig};
use common::{MODELS, batch, difference, model, open, options};

/// Both types of 16 bits, and how far the nearest number may be, relatively.
const TYPES: [(DType, f64); 2] = [(DType::Bf16, 1.0 / 256.0), (DType::F16, 1.0 / 2048.0)];

fn rounded(dtype: DType) -> EngineOptions {
    EngineOptions { logits_16bit: true, ..options(dtype, Recompute::Norms, 33) }
}

#[test]
fn f32_activations_have_no_logits_of_16_bits() {
    let backend = Box::new(arl_engine::backend::cpu::CpuBackend::new());
    let opened = Engine::open(backend, &model(MODELS[0]), Weights::Checkpoint, &rounded(DType::F32));
    let error = opened.map(|_| ()).unwrap_err();
    assert_eq!(error.code, ErrorCode::Config);
    assert!(error.message.starts_with("logits_16bit") && error.message.contains("float32"), "{error}");
}

#[test]
fn losses_and_gradients_are_as_far_from_those_of_f32_logits_as_the_rounding_of_the_greatest_logit() {
    let batches = [batch(&[9, 3, 21], 1), batch(&[17], 2)];
    for name in MODELS {
        for (dtype, unit) in TYPES {
            let (mut exact, mut short) =
                (open(name, &options(dtype, Recompute::Norms, 33)), open(name, &rounded(dtype)));
            let greatest =
                |batch| exact.inspect(batch).unwrap().logits.into_iter().fold(0f32, |most, x| most.max(x.abs()));
            let greatest = batches.iter().map(greatest).fold(0.0, f32::max);
            let farthest = 2.0 * unit * f64::from(greatest);
            let (evaluated, expected) = (short.evaluate(&batches).unwrap(), exact.evaluate(&batches).unwrap());
            for (actual, expected) in evaluated.iter().zip(&expected) {
                let apart = (actual.loss_sum - expected.loss_sum).abs() / expected.target_weight;
                assert!(0.0 < apart && apart <= farthest, "{name} {dtype:?}: {apart:e} of {farthest:e}");
            }
            let trained = short.gradients(&batches).unwrap();
            exact.gradients(&batches).unwrap();
            let losses =
                |stats: &[arl_engine::MicroBatchStats]| stats.iter().map(|s| s.loss_sum.to_bits()).collect::<Vec<_>>();
            assert_eq!(losses(&trained), losses(&evaluated), "one loss, whether it is trained or not");
            let all = |engine: &mut Engine<_>| -> Vec<f32> {
                engine
                    .tensor_names()
                    .iter()
                    .flat_map(|name| engine.read_tensor(name, Kind::Gradients).unwrap())
                    .collect()
            };
            let apart = difference(&all(&mut short), &all(&mut exact));
            // Of the logits' gradient as much as of a probability, and its own rounding; as much again for the roundings of
            // activations behind it.
            let bound = 2.0 * (farthest.exp_m1() + unit);
            assert!(0.0 < apart && apart <= bound, "{name} {dtype:?}: gradients {apart:e} of {bound:e}");
        }
    }
}

#[test]
fn the_memory_of_the_logits_is_halved() {
    let mut config = ModelConfig::from_dir(&model("window-bias")).unwrap();
    config.vocab_size = 151_936;
    for (dtype, _) in TYPES {
        for kind in [DeviceKind::Cpu, DeviceKind::Cuda] {
            let total = |logits_16bit| {
                let options = EngineOptions {
                    logits_16bit,
                    loss_seq_chunk_size: Some(2048),
                    max_batch: BatchSize { tokens: 4096, sequences: 4, ..BatchSize::default() },
                    ..options(dtype, Recompute::Norms, 1)
                };
                plan_memory_of(&config, &options, kind).unwrap().total_bytes
            };
            assert_eq!(total(false) - total(true), 2 * 2048 * 151_936, "{dtype:?} {kind:?}");
        }
    }
}
