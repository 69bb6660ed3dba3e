//! The loss of held-out rows: the same bits however they are cut into micro-batches, in memory that was planned, and without a
//! trace in training.

use crate::common;

use arl_engine::backend::cpu::CpuBackend;
use arl_engine::backend::{DType, DeviceKind};
use arl_engine::{
    BatchSize, Engine, EngineOptions, GenerateOptions, GenerateSize, IGNORED, MicroBatch, MicroBatchStats, Recompute,
    Weights, plan_memory,
};
use common::{HYPER, MODELS, TYPES, batch, model, open, options, split, state_bits};

type Bits = (usize, usize, u64, u64, usize, u64);

fn bits(stats: &MicroBatchStats) -> Bits {
    assert_eq!(stats.balance_loss, 0.0, "the balance loss belongs to a micro-batch");
    let MicroBatchStats { tokens, target_tokens, target_weight, loss_sum, correct, entropy_sum, .. } = *stats;
    (tokens, target_tokens, target_weight.to_bits(), loss_sum.to_bits(), correct, entropy_sum.to_bits())
}

fn evaluated(engine: &mut Engine<CpuBackend>, batches: &[MicroBatch]) -> Vec<Bits> {
    batches.iter().flat_map(|batch| engine.evaluate_sequences(batch).unwrap()).map(|stats| bits(&stats)).collect()
}

/// Sequences of several batches as one.
fn joined(parts: &[MicroBatch]) -> MicroBatch {
    let mut all = MicroBatch { cu_seqlens: vec![0], weights: Some(Vec::new()), ..MicroBatch::default() };
    for part in parts {
        let first = all.input_ids.len() as i32;
        all.input_ids.extend(&part.input_ids);
        all.targets.extend(&part.targets);
        all.positions.extend(&part.positions);
        all.weights.as_mut().unwrap().extend(part.weights.as_ref().unwrap());
        all.cu_seqlens.extend(part.cu_seqlens[1..].iter().map(|end| first + end));
    }
    all
}

#[test]
fn how_sequences_are_cut_into_micro_batches_changes_no_bit() {
    let sequences = split(&batch(&[9, 3, 21, 14, 5, 40], 3));
    for name in MODELS {
        for dtype in TYPES {
            let mut engine = open(name, &options(dtype, Recompute::Norms, 92));
            let together = evaluated(&mut engine, &[joined(&sequences)]);
            assert_eq!(together.len(), sequences.len());
            assert!(together.iter().all(|(_, targets, _, loss, ..)| *targets > 0 && f64::from_bits(*loss) > 0.0));
            for size in [1, 2, 4] {
                let batches: Vec<_> = sequences.chunks(size).map(joined).collect();
                assert_eq!(evaluated(&mut engine, &batches), together, "{name} {dtype:?}, {size} at a time");
            }
            let chunked = EngineOptions { loss_seq_chunk_size: Some(7), ..options(dtype, Recompute::Norms, 92) };
            let chunks = evaluated(&mut open(name, &chunked), &[joined(&sequences)]);
            assert_eq!(chunks, together, "{name} {dtype:?}, 7 rows of logits at a time");
        }
    }
}

#[test]
fn the_sums_are_those_of_each_targets_loss() {
    let packed = batch(&[9, 3, 21], 1);
    for name in MODELS {
        let mut engine = open(name, &options(DType::F32, Recompute::Norms, 33));
        let nll = engine.inspect(&packed).unwrap().nll;
        let stats = engine.evaluate_sequences(&packed).unwrap();
        for (ends, stats) in packed.cu_seqlens.windows(2).zip(&stats) {
            let tokens = ends[0] as usize..ends[1] as usize;
            let sum: f64 = tokens.clone().map(|t| f64::from(packed.weight(t)) * f64::from(nll[t])).sum();
            assert!((stats.loss_sum - sum).abs() <= 1e-12 * sum, "{name}: {} {sum}", stats.loss_sum);
            assert_eq!(stats.target_weight, tokens.map(|t| f64::from(packed.weight(t))).sum::<f64>(), "{name}");
        }
        let [whole] = engine.evaluate(std::slice::from_ref(&packed)).unwrap()[..] else { panic!("one micro-batch") };
        assert_eq!(stats.iter().map(|s| s.correct).sum::<usize>(), whole.correct, "{name}");
        let entropy: f64 = stats.iter().map(|s| s.entropy_sum).sum();
        assert!((entropy - whole.entropy_sum).abs() <= 1e-12 * entropy, "{name}: {entropy} {}", whole.entropy_sum);
    }
}

#[test]
fn a_sequence_without_targets_has_sums_of_zero() {
    let mut packed = batch(&[9, 7], 1);
    packed.targets[..9].fill(IGNORED);
    let mut engine = open("window-bias", &options(DType::F32, Recompute::Norms, 16));
    let stats = engine.evaluate_sequences(&packed).unwrap();
    assert_eq!(stats[0], MicroBatchStats { tokens: 9, ..MicroBatchStats::default() });
    assert!(stats[1].target_tokens > 0 && stats[1].loss_sum > 0.0);
    packed.targets.fill(IGNORED);
    let none = engine.evaluate_sequences(&packed).unwrap();
    assert_eq!(none.iter().map(|s| (s.tokens, s.target_tokens)).collect::<Vec<_>>(), [(9, 0), (7, 0)]);
}

#[test]
fn evaluation_between_steps_changes_no_bit_of_training() {
    let batches = [batch(&[9, 3, 21], 1), batch(&[17], 2)];
    let held_out = batch(&[12, 40, 5], 9);
    for name in MODELS {
        for dtype in TYPES {
            let run = |evaluates: bool, optimizer_offload| {
                let options = EngineOptions { optimizer_offload, ..options(dtype, Recompute::Block, 33) };
                let mut engine = open(name, &options);
                let mut losses = Vec::new();
                for _ in 0..3 {
                    losses.push(engine.step(&batches, HYPER).unwrap().loss.to_bits());
                    if evaluates {
                        engine.evaluate_sequences(&held_out).unwrap();
                    }
                }
                (losses, state_bits(&mut engine))
            };
            let plain = run(false, false);
            assert!(run(true, false) == plain, "{name} {dtype:?}");
            assert!(run(true, true) == plain, "{name} {dtype:?}, with the optimizer in host memory");
        }
    }
}

#[test]
fn the_memory_of_an_evaluation_is_planned_and_is_less_than_that_of_a_step() {
    let held_out = batch(&[200, 100], 9);
    let size = held_out.size();
    for name in MODELS {
        let training = options(DType::F32, Recompute::Norms, 33);
        let with = EngineOptions { eval_batch: size, ..training.clone() };
        let planned = plan_memory(&model(name), &with, DeviceKind::Cpu).unwrap();
        let mut engine = open(name, &with);
        assert_eq!(engine.memory(), planned, "{name}");
        engine.evaluate_sequences(&held_out).unwrap();
        engine.step(&[batch(&[9, 3, 21], 1)], HYPER).unwrap();
        assert_eq!(engine.memory(), planned, "{name}: evaluated in the memory that was planned");
        let bytes = |options| plan_memory(&model(name), options, DeviceKind::Cpu).unwrap().total_bytes;
        let step = EngineOptions { max_batch: size, ..training.clone() };
        assert!(bytes(&training) < planned.total_bytes && planned.total_bytes < bytes(&step), "{name}");
        // What is no larger than a step's micro-batch needs nothing.
        let small = EngineOptions {
            eval_batch: BatchSize { tokens: 33, sequences: 3, ..BatchSize::default() },
            ..training.clone()
        };
        assert_eq!(bytes(&small), bytes(&training), "{name}");
    }
}

#[test]
fn the_memory_of_generated_replies_is_planned_for_every_call() {
    let generate = GenerateSize { prompts: vec![vec![7; 3], vec![40, 300, 2500]], max_new_tokens: 5 };
    let greedy = GenerateOptions::greedy(5);
    for name in MODELS {
        let training = options(DType::F32, Recompute::Norms, 33);
        let with = EngineOptions { generate: generate.clone(), ..training.clone() };
        let planned = plan_memory(&model(name), &with, DeviceKind::Cpu).unwrap();
        assert!(planned.total_bytes > plan_memory(&model(name), &training, DeviceKind::Cpu).unwrap().total_bytes);
        let mut engine = open(name, &with);
        assert_eq!(engine.memory(), planned, "{name}");
        for lengths in &generate.prompts {
            let prompts: Vec<Vec<i32>> = lengths.iter().map(|&length| vec![3; length]).collect();
            engine.generate(&prompts, &greedy).unwrap();
        }
        engine.step(&[batch(&[9, 3, 21], 1)], HYPER).unwrap();
        assert_eq!(engine.memory(), planned, "{name}: generated in the memory that was planned");
        engine.generate(&[vec![3; 2800]], &greedy).unwrap();
        assert!(engine.memory().total_bytes > planned.total_bytes, "{name}: a longer prompt needs more");
        // Of no call, and of replies without tokens, nothing is kept ready.
        for size in
            [GenerateSize { prompts: vec![], ..generate }, GenerateSize { max_new_tokens: 0, ..generate.clone() }]
        {
            let none = EngineOptions { generate: size, ..training.clone() };
            let bytes = plan_memory(&model(name), &none, DeviceKind::Cpu).unwrap();
            assert_eq!(bytes, plan_memory(&model(name), &training, DeviceKind::Cpu).unwrap());
        }
    }
}

#[test]
fn a_larger_evaluation_than_planned_makes_room_and_training_keeps_its_own() {
    let mut engine = open("window-bias", &options(DType::F32, Recompute::Norms, 33));
    let before = engine.memory().total_bytes;
    let planned =
        evaluated(&mut open("window-bias", &options(DType::F32, Recompute::Norms, 300)), &[batch(&[200, 100], 9)]);
    assert_eq!(evaluated(&mut engine, &[batch(&[200, 100], 9)]), planned);
    assert!(engine.memory().total_bytes > before);
    engine.step(&[batch(&[9, 3, 21], 1)], HYPER).unwrap();
}

#[test]
fn a_model_without_gradients_has_the_same_losses() {
    let packed = batch(&[9, 3, 21], 1);
    for name in MODELS {
        let trained =
            evaluated(&mut open(name, &options(DType::F32, Recompute::Norms, 33)), std::slice::from_ref(&packed));
        let options = EngineOptions { inference_only: true, ..options(DType::F32, Recompute::Block, 1) };
        let mut engine =
            Engine::open(Box::new(CpuBackend::new()), &model(name), Weights::Checkpoint, &options).unwrap();
        assert_eq!(evaluated(&mut engine, std::slice::from_ref(&packed)), trained, "{name}");
    }
}
