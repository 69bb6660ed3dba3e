//! Steps that are submitted before the one before is finished: the same numbers, and nothing done where one fails.

use crate::common;

use arl_engine::backend::DType;
use arl_engine::backend::cpu::CpuBackend;
use arl_engine::{Engine, EngineOptions, GenerateOptions, Hyper, IGNORED, MicroBatch, Recompute, StepStats, Weights};
use arl_model::ErrorCode;
use common::{HYPER, MODELS, batch, model, open, options, state_bits};

fn steps() -> Vec<Vec<MicroBatch>> {
    (0..5).map(|i| vec![batch(&[9, 3, 21], i), batch(&[i as usize + 2], i)]).collect()
}

fn hyper(step: usize) -> Hyper {
    Hyper { learning_rate: 1e-2 / (step + 1) as f32, max_grad_norm: 1.0 }
}

/// What does not depend on the clock.
fn figures(stats: &StepStats) -> StepStats {
    StepStats { seconds: 0.0, ..stats.clone() }
}

/// Takes all steps, each submitted behind the one before.
fn take_ahead(engine: &mut Engine<CpuBackend>, steps: &[Vec<MicroBatch>]) -> Vec<StepStats> {
    let mut found = Vec::new();
    let mut running = None;
    for (i, batches) in steps.iter().enumerate() {
        let ticket = engine.submit(batches, hyper(i)).unwrap();
        if let Some(before) = running.replace(ticket) {
            found.push(figures(&engine.finish(before).unwrap()));
        }
        engine.apply(ticket).unwrap();
    }
    found.push(figures(&engine.finish(running.unwrap()).unwrap()));
    found
}

#[test]
fn steps_submitted_ahead_are_those_taken_one_after_the_other() {
    for name in MODELS {
        for dtype in [DType::F32, DType::Bf16] {
            for optimizer_offload in [false, true] {
                let options = EngineOptions { optimizer_offload, ..options(dtype, Recompute::Norms, 33) };
                let (mut engine, mut other) = (open(name, &options), open(name, &options));
                let expected: Vec<_> = (steps().iter().enumerate())
                    .map(|(i, batches)| figures(&other.step(batches, hyper(i)).unwrap()))
                    .collect();
                assert_eq!(take_ahead(&mut engine, &steps()), expected, "{name} {dtype:?} {optimizer_offload}");
                assert_eq!(engine.steps(), 5);
                assert!(state_bits(&mut engine) == state_bits(&mut other), "{name} {dtype:?} {optimizer_offload}");
            }
        }
    }
}

#[test]
fn a_step_is_not_taken_where_the_one_before_it_is_not_finite() {
    let good = [batch(&[9], 1), batch(&[5], 2)];
    // Weights of about 1e30, whose products overflow.
    let overflowing = Hyper { learning_rate: 1e30, max_grad_norm: 1.0 };
    for dtype in [DType::F32, DType::Bf16] {
        for applied in [false, true] {
            let mut engine = open("window-bias", &options(dtype, Recompute::Norms, 33));
            let first = engine.submit(&good, overflowing).unwrap();
            engine.apply(first).unwrap();
            let second = engine.submit(&good, HYPER).unwrap();
            engine.finish(first).unwrap();
            let before = state_bits(&mut engine);
            engine.apply(second).unwrap();
            let third = engine.submit(&good, HYPER).unwrap();
            if applied {
                engine.apply(third).unwrap();
            }
            let error = engine.finish(second).unwrap_err();
            assert!(error.code == ErrorCode::NonFinite && error.message.starts_with("step 2: the "), "{error}");
            let error = engine.finish(third).unwrap_err();
            assert_eq!(error.code, ErrorCode::Interrupted);
            assert!(error.message.contains("behind step 2"), "{error}");
            assert!(state_bits(&mut engine) == before && engine.steps() == 1);
            // The next one has the failed one's number.
            let error = engine.step(&good, HYPER).unwrap_err();
            assert!(error.message.starts_with("step 2: "), "{error}");
        }
    }
}

#[test]
fn a_submitted_step_changes_nothing_until_it_is_applied() {
    let options = options(DType::Bf16, Recompute::Norms, 33);
    let dir = tempfile::tempdir().unwrap();
    let mut other = open("moe-balance", &options);
    other.step(&steps()[0], HYPER).unwrap();
    let mut engine = open("moe-balance", &options);
    let first = engine.submit(&steps()[0], HYPER).unwrap();
    engine.apply(first).unwrap();
    let second = engine.submit(&steps()[1], HYPER).unwrap();
    // What is saved is the step that was applied, whether its figures were asked for or not.
    engine.save_state(dir.path()).unwrap();
    assert_eq!(engine.steps(), 1);
    let mut saved =
        Engine::open(Box::new(CpuBackend::new()), &model("moe-balance"), Weights::Random(7), &options).unwrap();
    saved.restore_state(dir.path()).unwrap();
    assert!(saved.steps() == 1 && state_bits(&mut saved) == state_bits(&mut other));
    // Saving leaves the submitted step as it is.
    let expected = figures(&other.step(&steps()[1], HYPER).unwrap());
    assert_eq!(figures(&engine.finish(second).unwrap()), expected);
    assert!(state_bits(&mut engine) == state_bits(&mut other));
    engine.finish(first).unwrap();
    assert_eq!(engine.finish(first).unwrap_err().code, ErrorCode::Internal);
}

#[test]
fn a_step_that_is_discarded_or_loses_its_memory_was_never_taken() {
    type Other = fn(&mut Engine<CpuBackend>);
    let others: [Other; 4] = [
        |engine| drop(engine.evaluate(&[batch(&[12], 3)]).unwrap()),
        |engine| {
            engine.generate(&[vec![1, 2, 3]], &GenerateOptions::greedy(3)).unwrap();
        },
        |engine| drop(engine.inspect(&batch(&[12], 3)).unwrap()),
        |engine| drop(engine.gradients(&[batch(&[12], 3)]).unwrap()),
    ];
    let options = options(DType::F32, Recompute::Norms, 33);
    let mut other = open("window-bias", &options);
    let expected: Vec<_> = (0..2).map(|i| figures(&other.step(&steps()[i], HYPER).unwrap())).collect();
    for (i, compute) in others.into_iter().enumerate() {
        let mut engine = open("window-bias", &options);
        let first = engine.submit(&steps()[0], HYPER).unwrap();
        engine.apply(first).unwrap();
        let second = engine.submit(&steps()[3], HYPER).unwrap();
        compute(&mut engine);
        let error = engine.finish(second).unwrap_err();
        assert_eq!(error.code, ErrorCode::Interrupted, "{i}: {error}");
        let third = engine.submit(&steps()[4], HYPER).unwrap();
        engine.discard();
        assert_eq!(engine.finish(third).unwrap_err().code, ErrorCode::Interrupted);
        assert_eq!(figures(&engine.step(&steps()[1], HYPER).unwrap()), expected[1], "{i}");
        assert_eq!(figures(&engine.finish(first).unwrap()), expected[0], "{i}");
        assert!(engine.steps() == 2 && state_bits(&mut engine) == state_bits(&mut other), "{i}");
    }
}

#[test]
fn a_step_that_cannot_be_submitted_leaves_the_one_before_it() {
    let options = options(DType::F32, Recompute::Norms, 33);
    let (mut engine, mut other) = (open("window-bias", &options), open("window-bias", &options));
    let first = engine.submit(&steps()[0], HYPER).unwrap();
    engine.apply(first).unwrap();
    let mut untrained = batch(&[9], 1);
    untrained.targets.fill(IGNORED);
    assert_eq!(engine.submit(&[untrained], HYPER).unwrap_err().code, ErrorCode::Data);
    engine.interrupt_flag().store(true, std::sync::atomic::Ordering::Relaxed);
    assert_eq!(engine.submit(&steps()[1], HYPER).unwrap_err().code, ErrorCode::Interrupted);
    let expected = figures(&other.step(&steps()[0], HYPER).unwrap());
    assert_eq!(figures(&engine.finish(first).unwrap()), expected);
    // A larger micro-batch, for which memory is reserved again.
    let larger = [batch(&[40], 1)];
    let second = engine.submit(&larger, HYPER).unwrap();
    engine.finish(second).unwrap();
    other.step(&larger, HYPER).unwrap();
    assert!(state_bits(&mut engine) == state_bits(&mut other));
}
