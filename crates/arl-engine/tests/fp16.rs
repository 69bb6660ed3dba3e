//! Training in f16: the loss scale falls and rises as torch's `GradScaler`'s, and a step that is skipped changes nothing.

use crate::common;

use arl_engine::backend::DType;
use arl_engine::backend::cpu::CpuBackend;
use arl_engine::{Engine, EngineOptions, Kind, LossScaling, Recompute, Weights};
use arl_model::ErrorCode;
use common::{HYPER, MODELS, all, batch, difference, model, open, options, state_bits};

/// A scale that no gradient in f16 survives.
const HUGE: f32 = (1u64 << 40) as f32;

fn scaled(initial: f32, growth_interval: u32) -> EngineOptions {
    EngineOptions {
        loss_scaling: LossScaling { initial, growth_interval },
        ..options(DType::F16, Recompute::Norms, 33)
    }
}

#[test]
fn a_step_that_overflows_changes_nothing_but_the_scale_and_the_run_goes_on() {
    let batches = [batch(&[9, 3, 21], 1)];
    for name in MODELS {
        for optimizer_offload in [false, true] {
            let mut engine = open(name, &EngineOptions { optimizer_offload, ..scaled(HUGE, 2000) });
            let before = state_bits(&mut engine);
            let mut scale = HUGE;
            loop {
                let stats = engine.step(&batches, HYPER).unwrap();
                assert_eq!(stats.loss_scale, Some(scale), "{name}");
                assert!(stats.loss.is_finite(), "{name}: {}", stats.loss);
                if !stats.skipped {
                    assert!(stats.grad_norm.is_finite(), "{name}");
                    break;
                }
                assert!(!stats.grad_norm.is_finite(), "{name}");
                assert!(state_bits(&mut engine) == before && engine.steps() == 0, "{name}");
                scale /= 2.0;
            }
            assert!(scale < HUGE && engine.steps() == 1, "{name}: {scale}");
            assert!(state_bits(&mut engine) != before, "{name}");
            // What follows is what a run that began with this scale does.
            let mut other = open(name, &scaled(scale, 2000));
            other.step(&batches, HYPER).unwrap();
            for _ in 0..2 {
                let (a, b) = (engine.step(&batches, HYPER).unwrap(), other.step(&batches, HYPER).unwrap());
                assert_eq!((a.loss, a.grad_norm, a.loss_scale), (b.loss, b.grad_norm, b.loss_scale), "{name}");
            }
            assert!(state_bits(&mut engine) == state_bits(&mut other), "{name}");
        }
    }
}

#[test]
fn the_scale_doubles_after_so_many_good_steps_also_across_a_restored_state() {
    let batches = [batch(&[9, 3], 1)];
    let options = scaled(8.0, 2);
    let mut engine = open("window-bias", &options);
    let step = |engine: &mut Engine<CpuBackend>| engine.step(&batches, HYPER).unwrap().loss_scale.unwrap();
    let first: Vec<f32> = (0..3).map(|_| step(&mut engine)).collect();
    assert_eq!(first, [8.0, 8.0, 16.0]);
    let dir = tempfile::tempdir().unwrap();
    engine.save_state(dir.path()).unwrap();
    let mut resumed =
        Engine::open(Box::new(CpuBackend::new()), &model("window-bias"), Weights::Random(7), &options).unwrap();
    resumed.restore_state(dir.path()).unwrap();
    // One good step at 16 has been taken.
    for engine in [&mut engine, &mut resumed] {
        assert_eq!((0..3).map(|_| step(engine)).collect::<Vec<f32>>(), [16.0, 32.0, 32.0]);
    }
    assert!(state_bits(&mut engine) == state_bits(&mut resumed));
}

/// Powers of two change no significand; only gradients below the least normal f16, 2^-14, are rounded otherwise, by up to
/// 2^-25 of the loss's own gradients of some hundredths: about 2^-18 of them. AdamW divides by their size.
#[test]
fn the_scale_changes_trained_weights_by_no_more_than_rounding() {
    let batches = [batch(&[9, 3, 21], 1)];
    for name in MODELS {
        let run = |initial| {
            let mut engine = open(name, &scaled(initial, 2000));
            for _ in 0..5 {
                assert!(!engine.step(&batches, HYPER).unwrap().skipped, "{name}");
            }
            all(&mut engine, Kind::Weights)
        };
        let apart = difference(&run(1.0), &run(1024.0));
        assert!(apart < 1e-3, "{name}: {apart:e}");
    }
}

#[test]
fn a_loss_that_is_not_finite_at_a_scale_of_1_is_an_error() {
    let options = scaled(4.0, 2000);
    let dir = tempfile::tempdir().unwrap();
    // Weights whose products exceed f16.
    let mut exact = open("window-bias", &common::options(DType::F32, Recompute::Norms, 33));
    exact.step(&[batch(&[9], 1)], arl_engine::Hyper { learning_rate: 3e3, max_grad_norm: 0.0 }).unwrap();
    exact.export_model(dir.path(), None).unwrap();
    let mut engine = Engine::open(Box::new(CpuBackend::new()), dir.path(), Weights::Checkpoint, &options).unwrap();
    let before = state_bits(&mut engine);
    let batches = [batch(&[9, 3, 21], 1)];
    for scale in [4.0, 2.0] {
        let stats = engine.step(&batches, HYPER).unwrap();
        assert!(stats.skipped && !stats.loss.is_finite(), "{stats:?}");
        assert_eq!(stats.loss_scale, Some(scale));
    }
    let error = engine.step(&batches, HYPER).unwrap_err();
    assert_eq!(error.code, ErrorCode::NonFinite);
    assert!(error.message.contains("at a loss scale of 1") && error.hint.contains("bf16"), "{error}");
    assert!(state_bits(&mut engine) == before && engine.steps() == 0);
}
