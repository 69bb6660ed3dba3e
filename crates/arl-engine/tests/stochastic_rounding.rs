//! bf16 weights without masters: what rounding takes from one update it gives to another.

#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use arl_engine::backend::DType;
use arl_engine::backend::cpu::CpuBackend;
use arl_engine::{Engine, EngineOptions, Hyper, Kind, Recompute, Weights};
use arl_model::ErrorCode;
use common::{HYPER, MODELS, all, batch, difference, model, open, options, state_bits};

fn rounded(seed: u64) -> EngineOptions {
    EngineOptions { stochastic_rounding: Some(seed), ..options(DType::Bf16, Recompute::Norms, 33) }
}

/// 400 updates of some 1e-6 each: a weight of about 0.2, whose bf16 neighbours are 2^-10 away, moves by less than half of
/// that in all. Rounded to nearest, it never would. Rounded at random, weight `i` deviates from the exact one by at most half
/// the distance of its neighbours (the deviation of a number between two values), and the sum over `n` weights by the root
/// of the sum of their squares.
#[test]
fn updates_that_nearest_rounding_loses_move_weights_as_the_exact_ones_do() {
    let batches = [batch(&[9, 3, 21], 1)];
    let hyper = Hyper { learning_rate: 1e-6, max_grad_norm: 1.0 };
    for name in MODELS {
        let run = |options: &EngineOptions| {
            let mut engine = open(name, options);
            let before = all(&mut engine, Kind::Weights);
            for _ in 0..400 {
                engine.step(&batches, hyper).unwrap();
            }
            (before, all(&mut engine, Kind::Weights))
        };
        let (start, exact) = run(&options(DType::Bf16, Recompute::Norms, 33));
        let (rounded_start, near) = run(&rounded(3));
        // Along the way that the exact weights went: how far did the rounded ones go?
        let (mut moved, mut expected, mut variance, mut lost) = (0.0, 0.0, 0.0, 0.0);
        for i in 0..start.len() {
            let way = f64::from(exact[i]) - f64::from(start[i]);
            let gap = f64::from(start[i].abs()) / 128.0;
            moved += way * (f64::from(near[i]) - f64::from(rounded_start[i]));
            expected += way * way;
            variance += (way * gap / 2.0).powi(2);
            lost += if way.abs() < gap / 4.0 { way * way } else { 0.0 };
        }
        let bound = 5.0 * variance.sqrt();
        assert!((moved - expected).abs() <= bound, "{name}: {moved:e}, not {expected:e} (bound {bound:e})");
        // The bound means something: it tells this from standing still, and nearest rounding would lose the most of it.
        assert!(bound < expected / 2.0, "{name}: a bound of {bound:e} on {expected:e}");
        assert!(lost > expected / 2.0, "{name}: {lost:e} of {expected:e}");
    }
}

/// As `sixteen_bits_stay_near_f32`: bf16's roundings at some twenty places, and now of the weights too at each step.
#[test]
fn a_models_loss_falls_as_with_exact_masters() {
    let batches = [batch(&[9, 3, 21], 3)];
    let run = |options: &EngineOptions| -> Vec<f64> {
        let mut engine = open("window-bias", options);
        (0..30).map(|_| engine.step(&batches, HYPER).unwrap().loss).collect()
    };
    let exact = run(&options(DType::Bf16, Recompute::Norms, 33));
    assert!(exact[29] < exact[0] / 2.0, "{exact:?}");
    for seed in [1, 2, 3] {
        let near = run(&rounded(seed));
        for (step, (near, exact)) in near.iter().zip(&exact).enumerate() {
            let apart = (near - exact).abs() / exact;
            assert!(apart < 0.05, "seed {seed}, step {step}: {near} instead of {exact}");
        }
    }
}

#[test]
fn a_restored_state_goes_on_in_equal_bits_and_offloading_or_threads_change_none() {
    let steps: Vec<_> = (0..6).map(|i| vec![batch(&[9, 3, 21], i)]).collect();
    for name in MODELS {
        let whole = rounded(9);
        let mut engine = open(name, &whole);
        let dir = tempfile::tempdir().unwrap();
        for (i, batches) in steps.iter().enumerate() {
            if i == 3 {
                engine.save_state(dir.path()).unwrap();
            }
            engine.step(batches, HYPER).unwrap();
        }
        let expected = state_bits(&mut engine);
        let offloaded = EngineOptions { optimizer_offload: true, ..whole.clone() };
        for options in [&whole, &offloaded] {
            let mut resumed =
                Engine::open(Box::new(CpuBackend::new()), &model(name), Weights::Random(7), options).unwrap();
            resumed.restore_state(dir.path()).unwrap();
            for batches in &steps[3..] {
                resumed.step(batches, HYPER).unwrap();
            }
            assert!(state_bits(&mut resumed) == expected, "{name}");
        }
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        let threaded = pool.install(|| {
            let mut engine = open(name, &offloaded);
            for batches in &steps {
                engine.step(batches, HYPER).unwrap();
            }
            state_bits(&mut engine)
        });
        assert!(threaded == expected, "{name}");
        // Another seed rounds otherwise.
        let mut other = open(name, &rounded(10));
        for batches in &steps {
            other.step(batches, HYPER).unwrap();
        }
        assert!(state_bits(&mut other) != expected, "{name}");
        assert!(difference(&all(&mut other, Kind::Weights), &all(&mut engine, Kind::Weights)) < 0.1, "{name}");
    }
}

#[test]
fn it_is_for_bf16_and_its_state_is_its_own() {
    for dtype in [DType::F32, DType::F16] {
        let options = EngineOptions { dtype, ..rounded(1) };
        let Err(error) =
            Engine::open(Box::new(CpuBackend::new()), &model("window-bias"), Weights::Checkpoint, &options)
        else {
            panic!("{dtype:?} was taken");
        };
        assert_eq!(error.code, ErrorCode::Config);
        assert!(error.hint.contains("--bf16"), "{error}");
    }
    let dir = tempfile::tempdir().unwrap();
    open("window-bias", &options(DType::Bf16, Recompute::Norms, 33)).save_state(dir.path()).unwrap();
    let error = open("window-bias", &rounded(1)).restore_state(dir.path()).unwrap_err();
    assert_eq!(error.code, ErrorCode::State);
}
