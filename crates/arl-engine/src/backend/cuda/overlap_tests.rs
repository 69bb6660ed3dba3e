//! What ranks exchange while something is computed: the bits of one rank, the order of the streams, and how much of it a step waits for.

use std::path::Path;

use arl_model::{LoraConfig, ModelConfig, ModelFiles};

use super::super::recording::NoDevice;
use super::super::step_tests::common::deeper;
use super::*;
use crate::backend::plan::PlanBackend;
use crate::backend::profile::ProfileBackend;
use crate::backend::timeline::Rates;
use crate::options::{LoraOptions, Nf4Options};
use crate::plan::plan_memory;
use crate::ranks::{Traffic, plan_traffic};

/// Layers enough that each place has several, and with the head of its own that alternates with them.
const MODELS: [(&str, DType); 2] = [("window-bias", DType::Bf16), ("moe-top1", DType::F32)];

fn of_rank(base: &EngineOptions, size: usize, rank: usize, zero: u8) -> EngineOptions {
    EngineOptions { data_parallel: Some(size), rank, zero, ..base.clone() }
}

/// A step of two rounds in the second of which the last rank has nothing, and one with a single micro-batch.
fn uneven(size: usize) -> Vec<Vec<MicroBatch>> {
    let first = (0..2 * size as u64 - 1).map(|seed| batch(&[5, 3], seed)).collect();
    vec![first, vec![batch(&[7], 9)]]
}

#[test]
fn what_overlaps_changes_no_bit_and_takes_what_is_planned() {
    let plain = MODELS.map(|(name, dtype)| (name, options(dtype, Recompute::Block, 9)));
    let (name, dtype) = MODELS[0];
    let text = r#"{ "target_modules": ["q_proj", "down_proj"], "r": 3, "layers_to_transform": [1, 2] }"#;
    let config = LoraConfig::from_json(text, Path::new("adapter_config.json")).unwrap();
    let in_4_bits = EngineOptions {
        lora: Some(LoraOptions { config, seed: 7 }),
        load_in_4bit: Some(Nf4Options { nested: true }),
        ..options(dtype, Recompute::Block, 9)
    };
    for (name, base) in plain.into_iter().chain([(name, in_4_bits)]) {
        let (dir, size) = (deeper(name, 5), 2);
        let open = |backend: Recorded<EmulatedDevice>, options: &EngineOptions| {
            Engine::open(Box::new(backend), dir.path(), Weights::Random(7), options).unwrap()
        };
        let alone = CudaBackend::new(RecordingDevice::new(EmulatedDevice::default()));
        let (mut alone, one) = take(open(alone, &of_rank(&base, 1, 0, 0)), &uneven(size), 0, 1);
        let evaluated = format!("{:?}", alone.evaluate(&[batch(&[6], 4)]).unwrap());
        for zero in [1, 2, 3] {
            on_ranks(size, |backend, group| {
                let (rank, what) = (group.rank(), format!("{name} zero {zero}"));
                let options = of_rank(&base, size, rank, zero);
                let mut engine = open(backend, &options);
                engine.join(group).unwrap();
                let planned = plan_memory(dir.path(), &options, DeviceKind::Cuda).unwrap();
                assert_eq!(engine.memory(), planned, "{what}");
                let (mut engine, found) = take(engine, &uneven(size), rank, size);
                assert!(found == one, "{what}: rank {rank}");
                let config = ModelConfig::from_dir(dir.path()).unwrap();
                let of = |rounds| plan_traffic(&config, &options, DeviceKind::Cuda, rounds).unwrap();
                let ([two, once], sent) = ([2, 1].map(of), engine.sent());
                let planned = Traffic {
                    gradients: two.gradients + once.gradients,
                    sums: two.sums + once.sums,
                    weights: two.weights + once.weights,
                    ..sent
                };
                assert_eq!(sent, planned, "{what}: rank {rank}");
                // Rank 0 alone, in the places that gathers have used.
                if rank == 0 {
                    assert_eq!(format!("{:?}", engine.evaluate(&[batch(&[6], 4)]).unwrap()), evaluated, "{what}");
                    engine.end_serving().unwrap();
                } else {
                    engine.serve_weights().unwrap();
                }
                assert_eq!(engine.backend_mut().device_mut().faults, Vec::<String>::new(), "{what}: rank {rank}");
            });
        }
    }
}

/// Of each of two ranks: the waits of three steps that tell a stream something, each step submitted ahead, and those of them that may be left out
/// unnoticed. Both ranks have a micro-batch in each round: one without has no leaf that some of its waits are for.
fn waits_and_unfound(name: &str, zero: u8) -> Vec<(usize, Vec<usize>)> {
    let dir = deeper(name, 6);
    let base = options(DType::Bf16, Recompute::Block, 33);
    let run = |forgotten: usize| {
        on_devices(
            2,
            || NoDevice,
            |mut backend, group| {
                let rank = group.rank();
                backend.device_mut().forgotten = forgotten;
                let options = of_rank(&base, 2, rank, zero);
                let mut engine = Engine::open(Box::new(backend), dir.path(), Weights::Random(7), &options).unwrap();
                engine.join(group).unwrap();
                let own = [batch(&[9, 3], 1), batch(&[12], 2)];
                let mut running = None;
                for _ in 0..3 {
                    let ticket = engine.submit(&own, HYPER).unwrap();
                    if let Some(before) = running.replace(ticket) {
                        engine.finish(before).unwrap();
                    }
                    engine.apply(ticket).unwrap();
                }
                engine.complete_update();
                let device = engine.backend_mut().device_mut();
                (device.telling.clone(), device.faults.clone())
            },
        )
    };
    let found: Vec<_> = run(0);
    let most = found.iter().flat_map(|(telling, _)| telling.last()).max().copied().unwrap_or(0);
    let mut all: Vec<(usize, Vec<usize>)> = Vec::new();
    for (telling, faults) in &found {
        assert_eq!(*faults, Vec::<String>::new(), "{name} zero {zero}");
        all.push((telling.len(), Vec::new()));
    }
    for forgotten in 1..=most {
        if found.iter().any(|(telling, _)| telling.contains(&forgotten)) {
            for (rank, (_, faults)) in run(forgotten).into_iter().enumerate() {
                if faults.is_empty() && found[rank].0.contains(&forgotten) {
                    all[rank].1.push(forgotten);
                }
            }
        }
    }
    all
}

#[test]
fn an_exchange_that_is_not_waited_for_is_found() {
    for (name, zero, least) in
        [("moe-top1", 3, 60), ("window-bias", 3, 60), ("window-bias", 2, 40), ("window-bias", 1, 15)]
    {
        for (rank, (waits, unfound)) in waits_and_unfound(name, zero).into_iter().enumerate() {
            let what = format!("{name} zero {zero}: {unfound:?} of {waits} on rank {rank}");
            assert!(waits > least && 20 * unfound.len() <= waits, "{what}");
        }
    }
}

/// Seconds of a step of two ranks whose devices have these rates, and the bytes that a rank receives in it.
fn modelled(zero: u8, rates: Rates) -> (f64, f64) {
    let dir = deeper("moe-top1", 12);
    let base = options(DType::Bf16, Recompute::Block, 33);
    let files = || ModelFiles::read(dir.path()).unwrap();
    let run = |rank: usize, group: Box<dyn Group>| {
        let mut backend = ProfileBackend::new(Box::new(PlanBackend::of(DeviceKind::Cuda)));
        backend.model(rates);
        let mut engine = Engine::reserve(Box::new(backend), files(), &of_rank(&base, 2, rank, zero)).unwrap();
        engine.join(group).unwrap();
        let mut step = || {
            engine.step(&[batch(&[20, 13], 1), batch(&[33], 2)], HYPER).unwrap();
            let sent = engine.sent();
            (engine.backend_mut().timeline().unwrap().end(), sent.gradients + sent.weights + sent.sums)
        };
        let (first, second) = (step(), step());
        (second.0 - first.0, (second.1 - first.1) as f64)
    };
    std::thread::scope(|scope| {
        let run = &run;
        let groups = local_groups(2).into_iter().enumerate();
        let ranks: Vec<_> = groups.map(|(rank, group)| scope.spawn(move || run(rank, group))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).next().unwrap()
    })
}

/// A model of the streams, not a measurement: what travels takes as long as half of what is computed.
#[test]
fn a_step_waits_for_little_of_what_ranks_exchange() {
    let rates = |link: f64| Rates { flops: 1e9, memory: 1e12, link };
    for (zero, most) in [(1, 0.8), (2, 0.3), (3, 0.3)] {
        let (computed, bytes) = modelled(zero, rates(f64::INFINITY));
        let (step, _) = modelled(zero, rates(2.0 * bytes / computed));
        let waited = (step - computed) / (0.5 * computed);
        assert!((0.0..most).contains(&waited), "zero {zero}: a step waits for {waited:.2} of it");
    }
}
