//! Data parallelism: the same bits for any number of ranks, whatever each of them was dealt.

use crate::common;

use arl_comm::local_groups;
use arl_engine::backend::DType;
use arl_engine::backend::cpu::CpuBackend;
use arl_engine::{Engine, EngineOptions, IGNORED, LossScaling, MicroBatch, Recompute, StepStats};
use common::{HYPER, MODELS, TYPES, all, batch, difference, open, options, state_bits};

/// What steps leave: each one's figures, weights and moments in bits, and the state's fingerprint.
#[derive(Debug)]
struct Outcome {
    figures: Vec<StepStats>,
    state: Vec<u32>,
    fingerprint: String,
}

impl PartialEq for Outcome {
    /// Equal in bits: as text, figures that are not a number are equal to themselves.
    fn eq(&self, other: &Self) -> bool {
        let text = |outcome: &Outcome| format!("{:?}", outcome.figures);
        text(self) == text(other) && self.state == other.state && self.fingerprint == other.fingerprint
    }
}

impl Outcome {
    fn of(engine: &mut Engine<CpuBackend>, figures: Vec<StepStats>) -> Self {
        Outcome { figures, state: state_bits(engine), fingerprint: engine.fingerprint().unwrap() }
    }
}

/// The micro-batches of `rank`.
fn dealt(step: &[MicroBatch], rank: usize, size: usize) -> Vec<MicroBatch> {
    step.iter().skip(rank).step_by(size).cloned().collect()
}

/// Takes the steps on `size` ranks, each a thread; the outcome of every rank.
fn train(name: &str, options: &EngineOptions, size: usize, steps: &[Vec<MicroBatch>]) -> Vec<Outcome> {
    let options = EngineOptions { data_parallel: Some(size), ..options.clone() };
    std::thread::scope(|scope| {
        let ranks: Vec<_> = local_groups(size)
            .into_iter()
            .enumerate()
            .map(|(rank, group)| {
                let options = &options;
                scope.spawn(move || {
                    let mut engine: Engine<CpuBackend> = open(name, options);
                    engine.join(group).unwrap();
                    let figures = steps
                        .iter()
                        .map(|step| StepStats { seconds: 0.0, ..engine.step(&dealt(step, rank, size), HYPER).unwrap() })
                        .collect();
                    Outcome::of(&mut engine, figures)
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// The steps on one rank that no other joins.
fn alone(name: &str, options: &EngineOptions, steps: &[Vec<MicroBatch>]) -> Outcome {
    let mut engine = open(name, options);
    let figures = steps.iter().map(|step| StepStats { seconds: 0.0, ..engine.step(step, HYPER).unwrap() }).collect();
    Outcome::of(&mut engine, figures)
}

/// Steps of 5, 1 and 4 micro-batches, of which one has no target: ranks are dealt unequally many, or none.
fn uneven_steps() -> Vec<Vec<MicroBatch>> {
    let mut empty = batch(&[6], 9);
    empty.targets.fill(IGNORED);
    let five = vec![batch(&[9, 3], 1), batch(&[17], 2), empty, batch(&[5, 5, 5], 3), batch(&[21], 4)];
    vec![five, vec![batch(&[12], 5)], (6..10).map(|seed| batch(&[4 + seed as usize], seed)).collect()]
}

#[test]
fn results_have_the_same_bits_for_any_number_of_ranks() {
    for name in MODELS {
        for dtype in TYPES {
            let base = options(dtype, Recompute::Norms, 33);
            let one = alone(name, &EngineOptions { data_parallel: Some(1), ..base.clone() }, &uneven_steps());
            for size in 1..=4 {
                for (rank, outcome) in train(name, &base, size, &uneven_steps()).into_iter().enumerate() {
                    assert!(outcome == one, "{name} {dtype:?}: rank {rank} of {size} differs from one rank");
                }
            }
        }
    }
}

#[test]
fn rounding_at_random_and_what_is_offloaded_keep_the_same_bits() {
    let base = options(DType::Bf16, Recompute::Block, 33);
    let random = EngineOptions { stochastic_rounding: true, bf16_moments: true, ..base.clone() };
    let offloaded = EngineOptions { optimizer_offload: true, activation_offloading: true, ..base };
    for options in [random, offloaded] {
        let one = alone("window-bias", &EngineOptions { data_parallel: Some(1), ..options.clone() }, &uneven_steps());
        for size in [2, 3] {
            let ranks = train("window-bias", &options, size, &uneven_steps());
            assert!(ranks.iter().all(|outcome| *outcome == one), "{size} ranks differ from one");
        }
    }
}

#[test]
fn a_skipped_step_of_f16_is_skipped_on_every_rank() {
    // Twice the scale at which the gradients still fit: the first step is skipped, the next ones are taken.
    let scaling = LossScaling { initial: 2f32.powi(120), ..LossScaling::default() };
    let options = EngineOptions { loss_scaling: scaling, ..options(DType::F16, Recompute::Norms, 33) };
    let one = alone("window-bias", &EngineOptions { data_parallel: Some(1), ..options.clone() }, &uneven_steps());
    assert!(one.figures[0].skipped);
    assert!(train("window-bias", &options, 2, &uneven_steps()).iter().all(|outcome| *outcome == one));
}

#[test]
fn the_loss_is_the_mean_over_all_targets_of_all_ranks() {
    // 1 target on one rank, 20 on the other.
    let mut few = batch(&[30], 1);
    few.targets[..28].fill(IGNORED);
    let step = vec![few, batch(&[30], 2)];
    let plain = options(DType::F32, Recompute::Norms, 60);
    let mut engine = open("window-bias", &plain);
    let expected = engine.step(&step, HYPER).unwrap();
    let weights = all(&mut engine, arl_engine::Kind::Weights);
    let [first, _] = &train("window-bias", &plain, 2, std::slice::from_ref(&step))[..] else { panic!("two ranks") };
    let counts: Vec<_> = first.figures[0].micro_batches.iter().map(|stats| stats.target_tokens).collect();
    assert_eq!(counts, [1, 19]);
    assert_eq!(first.figures[0].loss.to_bits(), expected.loss.to_bits());
    let trained: Vec<f32> = first.state[..weights.len()].iter().map(|&bits| f32::from_bits(bits)).collect();
    assert!(difference(&trained, &weights) < 1e-6);
}

#[test]
fn a_step_without_targets_is_an_error_on_every_rank_and_changes_nothing() {
    let mut empty = batch(&[6], 9);
    empty.targets.fill(IGNORED);
    let options = EngineOptions { data_parallel: Some(2), ..options(DType::F32, Recompute::Norms, 33) };
    let before = open("window-bias", &options).fingerprint().unwrap();
    std::thread::scope(|scope| {
        for group in local_groups(2) {
            let (options, empty, before) = (&options, &empty, &before);
            scope.spawn(move || {
                let mut engine = open("window-bias", options);
                let own = if group.rank() == 0 { vec![empty.clone()] } else { Vec::new() };
                engine.join(group).unwrap();
                assert_eq!(engine.step(&own, HYPER).unwrap_err().code, arl_model::ErrorCode::Data);
                assert_eq!(&engine.fingerprint().unwrap(), before);
            });
        }
    });
}

#[test]
fn ranks_that_are_dealt_wrongly_or_not_expected_are_refused() {
    let two = EngineOptions { data_parallel: Some(2), ..options(DType::F32, Recompute::Norms, 33) };
    let mut engine = open("window-bias", &two);
    assert!(engine.step(&[batch(&[9], 1)], HYPER).unwrap_err().message.contains("have not joined"));
    let error = engine.join(local_groups(3).remove(0)).unwrap_err();
    assert!(error.message.contains("3 ranks join an engine that was opened for 2"), "{}", error.message);
    std::thread::scope(|scope| {
        for group in local_groups(2) {
            let two = &two;
            scope.spawn(move || {
                let mut engine = open("window-bias", two);
                let own = vec![batch(&[9], 1); 2 * group.rank()];
                engine.join(group).unwrap();
                let error = engine.step(&own, HYPER).unwrap_err();
                assert!(error.message.contains("rank 0 has 0 of 2 micro-batches, not 1"), "{}", error.message);
            });
        }
    });
}

#[test]
fn the_plan_counts_the_sums() {
    let base = options(DType::F32, Recompute::Norms, 33);
    let sums = |data_parallel| {
        let memory = open("window-bias", &EngineOptions { data_parallel, ..base.clone() }).memory();
        let of = |wanted| memory.categories.iter().find(|(name, _)| *name == wanted).map(|(_, bytes)| *bytes);
        (of("gradients").unwrap(), of("gradient sums"))
    };
    let (gradients, none) = sums(None);
    assert_eq!(none, None);
    assert_eq!(sums(Some(1)), (gradients, Some(gradients)));
    assert_eq!(sums(Some(4)), (gradients, Some((gradients / 4).div_ceil(4) * 4)));
}
