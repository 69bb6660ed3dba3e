//! Models with the gated delta rule: what must not change a bit, what must not see another sequence, the plan, generation.

use crate::common;

use std::path::Path;

use arl_engine::backend::cpu::CpuBackend;
use arl_engine::backend::{Backend, Buffer, DType, DeviceKind, Pool};
use arl_engine::{
    BatchSize, Engine, EngineOptions, GenerateOptions, GenerateSize, IGNORED, Kind, MicroBatch, Recompute, Weights,
    plan_memory,
};
use common::{HYPER, TYPES, all, batch, difference, hybrids, options, split, state_bits};

/// Sums in another order: f32 rounding over sums of at most a few hundred terms.
const REORDERED: f64 = 2e-6;
const LEVELS: [Recompute; 4] = [Recompute::Off, Recompute::Norms, Recompute::Mlp, Recompute::Block];
const GREEDY: GenerateOptions = GenerateOptions::greedy(12);

fn open(dir: &Path, options: &EngineOptions) -> Engine<CpuBackend> {
    Engine::open(Box::new(CpuBackend::new()), dir, Weights::Random(7), options).unwrap()
}

/// Sequences within a chunk, of a chunk, over chunks; one of a token.
fn batches() -> [MicroBatch; 2] {
    [batch(&[9, 64, 1, 100], 1), batch(&[140], 2)]
}

/// Figures and state of three steps, as bits.
fn trained(dir: &Path, options: &EngineOptions) -> (Vec<(u64, u64)>, Vec<u32>) {
    let mut engine = open(dir, options);
    let stats: Vec<_> = (0..3).map(|_| engine.step(&batches(), HYPER).unwrap()).collect();
    (stats.iter().map(|s| (s.loss.to_bits(), s.grad_norm.to_bits())).collect(), state_bits(&mut engine))
}

#[test]
fn recomputation_and_offloading_change_no_bit() {
    for (name, dir) in hybrids() {
        for dtype in TYPES {
            let plain = trained(dir.path(), &options(dtype, Recompute::Off, 174));
            assert!(
                plain.0.iter().all(|(loss, norm)| f64::from_bits(*loss).is_finite() && f64::from_bits(*norm) > 0.0)
            );
            for recompute in LEVELS {
                let level = options(dtype, recompute, 174);
                assert!(trained(dir.path(), &level) == plain, "{name} {dtype:?} {recompute:?}");
                let offloaded = EngineOptions { activation_offloading: true, optimizer_offload: true, ..level };
                assert!(trained(dir.path(), &offloaded) == plain, "{name} {dtype:?} {recompute:?} offloaded");
            }
        }
    }
}

#[test]
fn threads_change_no_bit() {
    for (name, dir) in hybrids() {
        for dtype in TYPES {
            let run = |threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| trained(dir.path(), &options(dtype, Recompute::Norms, 174)))
            };
            let one = run(1);
            assert!(run(2) == one && run(3) == one, "{name} {dtype:?}");
        }
    }
}

#[test]
fn a_restored_state_resumes_in_equal_bits() {
    for (name, dir) in hybrids() {
        for dtype in TYPES {
            let options = options(dtype, Recompute::Norms, 174);
            let saved = tempfile::tempdir().unwrap();
            let mut engine = open(dir.path(), &options);
            engine.step(&batches(), HYPER).unwrap();
            engine.save_state(saved.path()).unwrap();
            let loss = engine.step(&batches(), HYPER).unwrap().loss.to_bits();
            let mut resumed =
                Engine::open(Box::new(CpuBackend::new()), dir.path(), Weights::Random(8), &options).unwrap();
            resumed.restore_state(saved.path()).unwrap();
            assert_eq!(resumed.step(&batches(), HYPER).unwrap().loss.to_bits(), loss, "{name} {dtype:?}");
            assert!(state_bits(&mut resumed) == state_bits(&mut engine), "{name} {dtype:?}");
        }
    }
}

/// A sequence's logits do not depend on what is packed with it, to the bit: products compute each row by itself.
#[test]
fn packed_sequences_have_the_bits_of_each_alone() {
    let packed = batch(&[9, 64, 1, 100], 3);
    for (name, dir) in hybrids() {
        for dtype in TYPES {
            let mut engine = open(dir.path(), &options(dtype, Recompute::Norms, 174));
            let together = engine.inspect(&packed).unwrap().logits;
            let apart: Vec<f32> = split(&packed).iter().flat_map(|b| engine.inspect(b).unwrap().logits).collect();
            assert!(together == apart, "{name} {dtype:?}: {:e}", difference(&together, &apart));
        }
    }
}

#[test]
fn how_samples_are_cut_into_micro_batches_changes_sums_orders_alone() {
    let packed = batch(&[9, 64, 1, 100], 3);
    for (name, dir) in hybrids() {
        let mut engine = open(dir.path(), &options(DType::F32, Recompute::Norms, 174));
        engine.gradients(std::slice::from_ref(&packed)).unwrap();
        let whole = all(&mut engine, Kind::Gradients);
        engine.gradients(&split(&packed)).unwrap();
        let apart = difference(&all(&mut engine, Kind::Gradients), &whole);
        assert!(apart <= REORDERED, "{name}: {apart:e}");
    }
}

/// As of the older models: activations and weights are rounded at some twenty places a layer; `A_log`, decays and states are f32.
#[test]
fn sixteen_bits_stay_near_f32() {
    let batches = [batch(&[9, 64, 1, 100], 3)];
    let (_, dir) = &hybrids()[0];
    let run = |dtype| {
        let mut engine = open(dir.path(), &options(dtype, Recompute::Norms, 174));
        let stats = engine.gradients(&batches).unwrap();
        (stats[0].loss_sum, all(&mut engine, Kind::Gradients))
    };
    let exact = run(DType::F32);
    for (dtype, times) in [(DType::Bf16, 1.0), (DType::F16, 8.0)] {
        let near = run(dtype);
        assert!((near.0 - exact.0).abs() / exact.0 < 0.01 / times, "{dtype:?}: {} {}", near.0, exact.0);
        let apart = difference(&near.1, &exact.1);
        assert!(apart < 0.05 / times, "{dtype:?}: {apart}");
    }
}

/// The pool is as large as the plan says (the backend refuses what is beyond it), and a step reaches its end.
#[test]
fn the_plan_is_what_a_step_touches() {
    let mut whole = batch(&[9, 64, 1, 100], 1);
    for t in 0..whole.targets.len() {
        (whole.targets[t], whole.weights.as_mut().unwrap()[t]) = (1, 1.0);
    }
    let tokens = whole.targets.len();
    // Room is planned for the statistics of 64 micro-batches.
    let mut batches = vec![MicroBatch { targets: vec![IGNORED; tokens], ..whole.clone() }; 63];
    batches.push(whole);
    for (name, dir) in hybrids() {
        for recompute in LEVELS {
            let base = options(DType::F32, recompute, tokens);
            let options =
                EngineOptions { max_batch: BatchSize { tokens, sequences: 4, ..BatchSize::default() }, ..base };
            let plan = plan_memory(dir.path(), &options, DeviceKind::Cpu).unwrap();
            let mut engine = open(dir.path(), &options);
            assert_eq!(engine.memory(), plan);
            let step_names = ["inputs", "activations", "logits chunk", "workspace"];
            let upper = plan.categories.iter().filter(|(name, _)| step_names.contains(name));
            let upper: usize = upper.map(|(_, bytes)| bytes).sum();
            let bytes = (upper / 64 - 1) * 64;
            let pool = Buffer { pool: Pool::Step, offset: 0, len: bytes / 4, dtype: DType::I32 };
            // Not a number in any type: what is read before it is written shows.
            engine.backend_mut().upload(&vec![0xff; bytes], pool);
            let stats = engine.step(&batches, HYPER).unwrap();
            assert!(stats.loss.is_finite() && stats.grad_norm.is_finite());
            assert_eq!(engine.memory(), plan);
            let mut after = vec![0u8; bytes];
            engine.backend_mut().read_back(pool, &mut after).unwrap();
            // The rule's scratch has rows of whole panels, whose last words a small head leaves.
            let end = &after[bytes.saturating_sub(8192)..];
            assert!(end.iter().any(|&b| b != 0xff), "{name} {recompute:?}: the last bytes were not used");
        }
    }
}

/// The most probable next tokens, found by running the whole text again for each.
fn greedy_by_whole_texts(engine: &mut Engine<CpuBackend>, prompt: &[i32], count: usize) -> Vec<i32> {
    let vocab = engine.config().vocab_size;
    let mut text = prompt.to_vec();
    for _ in 0..count {
        let tokens = text.len();
        let whole = MicroBatch {
            targets: vec![IGNORED; tokens],
            positions: (0..tokens as i32).collect(),
            cu_seqlens: vec![0, tokens as i32],
            input_ids: text.clone(),
            ..MicroBatch::default()
        };
        let logits = engine.inspect(&whole).unwrap().logits;
        let last = &logits[(tokens - 1) * vocab..];
        let best = (0..vocab).reduce(|best, i| if last[i] > last[best] { i } else { best }).unwrap();
        text.push(best as i32);
    }
    text.split_off(prompt.len())
}

#[test]
fn generation_from_kept_states_agrees_with_whole_texts() {
    // Prompts shorter than the convolution, and over chunks; they end at different times, so that sequences move.
    let prompts: Vec<Vec<i32>> = split(&batch(&[1, 2, 70, 3, 130, 5], 9)).into_iter().map(|b| b.input_ids).collect();
    for (name, dir) in hybrids() {
        // As trained for a while: random weights alone say nothing.
        let mut engine = open(dir.path(), &options(DType::F32, Recompute::Norms, 174));
        for _ in 0..5 {
            engine.step(&batches(), HYPER).unwrap();
        }
        let expected: Vec<Vec<i32>> =
            prompts.iter().map(|prompt| greedy_by_whole_texts(&mut engine, prompt, 12)).collect();
        assert_eq!(engine.generate(&prompts, &GREEDY).unwrap(), expected, "{name}");
        let stop = expected[0][3];
        let ended = engine.generate(&prompts, &GenerateOptions { stop_ids: vec![stop], ..GREEDY }).unwrap();
        for (text, whole) in ended.iter().zip(&expected) {
            let end = whole.iter().position(|&id| id == stop).unwrap_or(whole.len());
            assert_eq!(text, &whole[..end], "{name}");
        }
    }
}

#[test]
fn the_memory_of_generated_replies_is_planned() {
    let generate = GenerateSize { prompts: vec![vec![7; 3], vec![40, 300]], max_new_tokens: 5 };
    for (name, dir) in hybrids() {
        let training = options(DType::F32, Recompute::Norms, 33);
        let with = EngineOptions { generate: generate.clone(), ..training };
        let planned = plan_memory(dir.path(), &with, DeviceKind::Cpu).unwrap();
        let mut engine = open(dir.path(), &with);
        assert_eq!(engine.memory(), planned, "{name}");
        for lengths in &generate.prompts {
            let prompts: Vec<Vec<i32>> = lengths.iter().map(|&length| vec![3; length]).collect();
            engine.generate(&prompts, &GenerateOptions::greedy(5)).unwrap();
        }
        engine.step(&[batch(&[9, 3, 21], 1)], HYPER).unwrap();
        assert_eq!(engine.memory(), planned, "{name}: generated in the memory that was planned");
    }
}
