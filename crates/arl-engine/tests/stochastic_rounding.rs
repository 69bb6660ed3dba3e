//! bf16 weights without masters, and bf16 moments: what rounding takes from one update it gives to another.

use crate::common;

use arl_engine::backend::DType;
use arl_engine::backend::cpu::CpuBackend;
use arl_engine::{Adam, Engine, EngineOptions, Hyper, Kind, Recompute, Weights};
use arl_model::ErrorCode;
use common::{HYPER, MODELS, all, batch, difference, model, open, options, state_bits};

fn rounded(seed: u64) -> EngineOptions {
    EngineOptions { stochastic_rounding: true, rounding_seed: seed, ..options(DType::Bf16, Recompute::Norms, 33) }
}

/// The same with bf16 moments; 8 bytes a parameter in all, and 4 of the gradient.
fn smallest(seed: u64) -> EngineOptions {
    EngineOptions { bf16_moments: true, ..rounded(seed) }
}

/// bf16 moments next to exact weights.
fn moments(dtype: DType, seed: u64) -> EngineOptions {
    EngineOptions { bf16_moments: true, rounding_seed: seed, ..options(dtype, Recompute::Norms, 33) }
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

/// The same gradients for 600 steps. A second moment grows by at most a thousandth of its square in a step: rounded to
/// nearest, it would stop where that is less than half the distance of its bf16 neighbours, at a quarter of the square and
/// before; after 600 steps it is 0.45 of it. Rounded at random, each step adds a deviation of at most half that distance,
/// 2^-8 of the moment, and after `n` steps they are at most `sqrt(n) / 2^8` of it.
#[test]
fn moments_that_nearest_rounding_would_stop_grow_as_the_exact_ones_do() {
    let batches = [batch(&[9, 3, 21], 1)];
    let hyper = Hyper { learning_rate: 0.0, max_grad_norm: 1.0 };
    let steps = 600;
    for (name, dtype) in MODELS.into_iter().zip([DType::Bf16, DType::F32]) {
        let run = |options: &EngineOptions| {
            let mut engine = open(name, &EngineOptions { adam: Adam::default(), ..options.clone() });
            for _ in 0..steps {
                engine.step(&batches, hyper).unwrap();
            }
            [Kind::Moment1, Kind::Moment2].map(|kind| all(&mut engine, kind))
        };
        let exact = run(&options(dtype, Recompute::Norms, 33));
        let kept = run(&moments(dtype, 4));
        for (moment, (kept, exact)) in kept.iter().zip(&exact).enumerate() {
            let pairs = || kept.iter().zip(exact).map(|(k, e)| (f64::from(*k), f64::from(*e)));
            let total: f64 = pairs().map(|(_, e)| e * e).sum();
            // Along the exact ones.
            let along: f64 = pairs().map(|(k, e)| k * e).sum();
            let deviation = f64::from(steps).sqrt() / 256.0 * pairs().map(|(_, e)| e.powi(4)).sum::<f64>().sqrt();
            let bound = 5.0 * deviation;
            assert!((along - total).abs() <= bound, "{name} moment {moment}: {along:e}, not {total:e} ({bound:e})");
            // To stay at a quarter instead of 0.45 would be seen.
            assert!(bound < total / 4.0, "{name} moment {moment}: a bound of {bound:e} on {total:e}");
        }
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
    for (seed, options) in [(1, rounded(1)), (2, rounded(2)), (3, smallest(3)), (4, moments(DType::Bf16, 4))] {
        let near = run(&options);
        for (step, (near, exact)) in near.iter().zip(&exact).enumerate() {
            let apart = (near - exact).abs() / exact;
            assert!(apart < 0.05, "seed {seed}, step {step}: {near} instead of {exact}");
        }
    }
}

#[test]
fn a_restored_state_goes_on_in_equal_bits_and_offloading_or_threads_change_none() {
    let steps: Vec<_> = (0..6).map(|i| vec![batch(&[9, 3, 21], i)]).collect();
    let f16: fn(u64) -> EngineOptions = |seed| moments(DType::F16, seed);
    let runs = [(MODELS[0], rounded as fn(u64) -> _), (MODELS[1], rounded), (MODELS[0], smallest), (MODELS[1], f16)];
    for (name, options) in runs {
        let whole = options(9);
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
        let mut other = open(name, &options(10));
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
    let kinds = [options(DType::Bf16, Recompute::Norms, 33), rounded(1), moments(DType::Bf16, 1), smallest(1)];
    for saved in 0..kinds.len() {
        open("window-bias", &kinds[saved]).save_state(dir.path()).unwrap();
        for (kind, options) in kinds.iter().enumerate() {
            let restored = open("window-bias", options).restore_state(dir.path());
            assert_eq!(
                restored.err().map(|error| error.code),
                (kind != saved).then_some(ErrorCode::State),
                "{saved} {kind}"
            );
        }
    }
}
