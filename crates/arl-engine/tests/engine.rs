//! What an engine promises besides its numbers: state that goes on in equal bits, errors that change nothing, text.

use crate::common;

use std::path::Path;
use std::sync::atomic::Ordering;

use arl_engine::backend::cpu::CpuBackend;
use arl_engine::backend::{Backend, Buffer, DType, DeviceKind, Pool};
use arl_engine::{
    BatchSize, Engine, EngineOptions, GenerateOptions, Hyper, IGNORED, Kind, MicroBatch, Recompute, Weights,
    plan_memory,
};
use arl_model::{ErrorCode, WeightDtype};
use common::{HYPER, MODELS, TYPES, all, batch, model, open, options, split, state_bits};

const GREEDY: GenerateOptions = GenerateOptions::greedy(12);

#[test]
fn a_restored_state_goes_on_in_equal_bits() {
    let batches: Vec<Vec<MicroBatch>> =
        (0..6).map(|i| vec![batch(&[9, 3, 21], i), batch(&[i as usize + 2], i)]).collect();
    for name in MODELS {
        for dtype in TYPES {
            let options = options(dtype, Recompute::Norms, 33);
            let dir = tempfile::tempdir().unwrap();
            let mut engine = open(name, &options);
            let mut losses = Vec::new();
            for (i, batches) in batches.iter().enumerate() {
                if i == 3 {
                    engine.save_state(dir.path()).unwrap();
                }
                losses.push(engine.step(batches, HYPER).unwrap().loss.to_bits());
            }
            let mut resumed =
                Engine::open(Box::new(CpuBackend::new()), &model(name), Weights::Random(7), &options).unwrap();
            resumed.restore_state(dir.path()).unwrap();
            assert_eq!(resumed.steps(), 3);
            for (batches, loss) in batches[3..].iter().zip(&losses[3..]) {
                assert_eq!(resumed.step(batches, HYPER).unwrap().loss.to_bits(), *loss, "{name} {dtype:?}");
            }
            assert!(state_bits(&mut resumed) == state_bits(&mut engine), "{name} {dtype:?}");
        }
    }
}

#[test]
fn a_state_of_another_model_or_a_damaged_one_is_refused_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(DType::F32, Recompute::Norms, 33);
    let mut engine = open("window-bias", &options);
    engine.step(&[batch(&[9], 1)], HYPER).unwrap();
    let before = state_bits(&mut engine);
    assert_eq!(engine.restore_state(dir.path()).unwrap_err().code, ErrorCode::Io);

    open("moe-balance", &options).save_state(dir.path()).unwrap();
    let error = engine.restore_state(dir.path()).unwrap_err();
    assert_eq!(error.code, ErrorCode::State, "{error}");
    assert!(error.message.contains("another model"), "{error}");

    open("window-bias", &options).save_state(dir.path()).unwrap();
    let path = dir.path().join("engine.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    assert_eq!(engine.restore_state(dir.path()).unwrap_err().code, ErrorCode::State);
    assert!(state_bits(&mut engine) == before && engine.steps() == 1);
}

#[test]
fn an_exported_model_is_the_model() {
    for name in MODELS {
        for dtype in TYPES {
            let options = options(dtype, Recompute::Norms, 33);
            let mut engine = open(name, &options);
            engine.step(&[batch(&[9, 3, 21], 1)], HYPER).unwrap();
            let dir = tempfile::tempdir().unwrap();
            let (exact, narrow) = (dir.path().join("exact"), dir.path().join("narrow"));
            engine.export_model(&exact, None).unwrap();
            engine.export_model(&narrow, Some(WeightDtype::Bf16)).unwrap();
            let weights = all(&mut engine, Kind::Weights);
            let read = |dir: &Path| {
                all(
                    &mut Engine::open(Box::new(CpuBackend::new()), dir, Weights::Checkpoint, &options).unwrap(),
                    Kind::Weights,
                )
            };
            assert_eq!(read(&exact), weights, "{name}");
            for (narrow, exact) in read(&narrow).iter().zip(&weights) {
                assert!((narrow - exact).abs() <= exact.abs() / 256.0, "{narrow} {exact}");
            }
        }
    }
}

#[test]
fn a_step_without_targets_is_refused_and_a_micro_batch_without_adds_nothing() {
    let untrained = |mut batch: MicroBatch| {
        batch.targets.fill(IGNORED);
        batch
    };
    let weightless = |mut batch: MicroBatch| {
        batch.weights.as_mut().unwrap().fill(0.0);
        batch
    };
    for name in MODELS {
        let options = options(DType::F32, Recompute::Norms, 33);
        let mut engine = open(name, &options);
        let before = state_bits(&mut engine);
        for empty in [untrained(batch(&[9], 1)), weightless(batch(&[9], 1))] {
            let error = engine.step(&[empty], HYPER).unwrap_err();
            assert_eq!(error.code, ErrorCode::Data);
        }
        assert!(state_bits(&mut engine) == before && engine.steps() == 0);

        let real = batch(&[9, 3, 21], 2);
        let mut plain = open(name, &options);
        let expected = plain.step(std::slice::from_ref(&real), HYPER).unwrap();
        let found = engine.step(&[untrained(batch(&[20], 3)), real, weightless(batch(&[2], 4))], HYPER).unwrap();
        assert_eq!((found.loss, found.grad_norm), (expected.loss, expected.grad_norm));
        assert!(state_bits(&mut engine) == state_bits(&mut plain), "{name}");
    }
}

#[test]
fn bad_input_is_refused_before_anything_is_computed() {
    let mut engine = open("window-bias", &options(DType::F32, Recompute::Norms, 33));
    let before = state_bits(&mut engine);
    let good = batch(&[9], 1);
    let mut bad = good.clone();
    bad.input_ids[4] = 32;
    let error = engine.step(&[good.clone(), bad], HYPER).unwrap_err();
    assert!(error.code == ErrorCode::Data && error.message.contains("micro-batch 1: token 4 has id 32"), "{error}");
    for hyper in [
        Hyper { learning_rate: f32::INFINITY, max_grad_norm: 1.0 },
        Hyper { learning_rate: -1.0, max_grad_norm: 1.0 },
        Hyper { learning_rate: 1e-3, max_grad_norm: f32::NAN },
    ] {
        assert_eq!(engine.step(std::slice::from_ref(&good), hyper).unwrap_err().code, ErrorCode::Config);
    }
    assert!(state_bits(&mut engine) == before && engine.steps() == 0);
}

#[test]
fn a_loss_that_is_not_finite_is_named_and_nothing_is_updated() {
    for dtype in [DType::F32, DType::Bf16] {
        let mut engine = open("window-bias", &options(dtype, Recompute::Norms, 33));
        let batches = [batch(&[9], 1), batch(&[5], 2)];
        // Weights of about 1e30, whose products overflow.
        engine.step(&batches, Hyper { learning_rate: 1e30, max_grad_norm: 1.0 }).unwrap();
        let before = state_bits(&mut engine);
        let error = engine.step(&batches, HYPER).unwrap_err();
        assert_eq!(error.code, ErrorCode::NonFinite);
        assert!(error.message.starts_with("step 2: the "), "{error}");
        assert!(state_bits(&mut engine) == before && engine.steps() == 1);
    }
}

#[test]
fn an_interrupted_step_changes_nothing_and_the_next_one_runs() {
    let mut engine = open("moe-balance", &options(DType::F32, Recompute::Norms, 33));
    let mut other = open("moe-balance", &options(DType::F32, Recompute::Norms, 33));
    let batches = [batch(&[9, 3, 21], 1)];
    let before = state_bits(&mut engine);
    engine.interrupt_flag().store(true, Ordering::Relaxed);
    assert_eq!(engine.step(&batches, HYPER).unwrap_err().code, ErrorCode::Interrupted);
    assert!(state_bits(&mut engine) == before && engine.steps() == 0);
    engine.step(&batches, HYPER).unwrap();
    other.step(&batches, HYPER).unwrap();
    assert!(state_bits(&mut engine) == state_bits(&mut other));
}

#[test]
fn a_learning_rate_of_zero_moves_moments_alone() {
    let mut engine = open("window-bias", &options(DType::F32, Recompute::Norms, 33));
    let weights = all(&mut engine, Kind::Weights);
    engine.step(&[batch(&[9, 3, 21], 1)], Hyper { learning_rate: 0.0, max_grad_norm: 0.0 }).unwrap();
    assert_eq!(all(&mut engine, Kind::Weights), weights);
    let (moments, gradients) = (all(&mut engine, Kind::Moment1), all(&mut engine, Kind::Gradients));
    for (moment, gradient) in moments.iter().zip(&gradients) {
        assert!((moment - 0.1 * gradient).abs() <= 1e-6 * gradient.abs(), "{moment} {gradient}");
    }
    assert_eq!(engine.steps(), 1);
}

#[test]
fn an_engine_for_inference_has_no_gradients_and_refuses_to_train() {
    let training = options(DType::Bf16, Recompute::Norms, 33);
    let inference = EngineOptions { inference_only: true, ..training.clone() };
    let mut engine = open("window-bias", &inference);
    let names: Vec<&str> = engine.memory().categories.iter().map(|(name, _)| *name).collect();
    assert!(!names.contains(&"gradients") && !names.contains(&"moments") && !names.contains(&"master weights"));
    assert_eq!(engine.step(&[batch(&[9], 1)], HYPER).unwrap_err().code, ErrorCode::Config);
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(engine.save_state(dir.path()).unwrap_err().code, ErrorCode::Config);
    assert!(engine.memory().total_bytes < open("window-bias", &training).memory().total_bytes / 3);
}

/// The pool is as large as the plan says (the backend refuses what is beyond it), and a step reaches its end.
#[test]
fn the_plan_is_what_a_step_touches() {
    let mut whole = batch(&[9, 3, 21], 1);
    for t in 0..whole.targets.len() {
        (whole.targets[t], whole.weights.as_mut().unwrap()[t]) = (1, 1.0);
    }
    // Room is planned for the statistics of 64 micro-batches.
    let mut batches = vec![MicroBatch { targets: vec![IGNORED; 33], ..whole.clone() }; 63];
    batches.push(whole);
    let size = BatchSize { tokens: 33, sequences: 3, ..BatchSize::default() };
    for name in MODELS {
        for recompute in [Recompute::Off, Recompute::Norms, Recompute::Mlp, Recompute::Block] {
            for chunk in [4, 33] {
                let options = EngineOptions {
                    max_batch: size,
                    loss_seq_chunk_size: Some(chunk),
                    ..options(DType::F32, recompute, 33)
                };
                let plan = plan_memory(&model(name), &options, DeviceKind::Cpu).unwrap();
                let mut engine = open(name, &options);
                assert_eq!(engine.memory(), plan);
                assert_eq!(plan.total_bytes, plan.categories.iter().map(|(_, bytes)| bytes).sum::<usize>());
                let step_names = ["inputs", "activations", "logits chunk", "workspace"];
                let upper = plan.categories.iter().filter(|(name, _)| step_names.contains(name));
                let upper: usize = upper.map(|(_, bytes)| bytes).sum();
                // Inputs include the one number that is with the state.
                let bytes = (upper / 64 - 1) * 64;
                let pool = Buffer { pool: Pool::Step, offset: 0, len: bytes / 4, dtype: DType::I32 };
                engine.backend_mut().upload(&vec![0x5a; bytes], pool);
                engine.step(&batches, HYPER).unwrap();
                let mut after = vec![0u8; bytes];
                engine.backend_mut().read_back(pool, &mut after).unwrap();
                let end = &after[bytes - 64..];
                assert!(end.iter().any(|&b| b != 0x5a), "{name} {recompute:?} {chunk}: the last bytes were not used");
            }
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
fn cached_generation_agrees_with_whole_texts() {
    let prompts: Vec<Vec<i32>> = split(&batch(&[1, 7, 3, 12, 5], 9)).into_iter().map(|b| b.input_ids).collect();
    for name in ["window-bias", "qwen2-window", "rope-yarn", "moe-balance"] {
        for options in [
            options(DType::F32, Recompute::Norms, 2),
            EngineOptions { inference_only: true, ..options(DType::F32, Recompute::Norms, 2) },
        ] {
            let mut engine = open(name, &options);
            let texts = engine.generate(&prompts, &GREEDY).unwrap();
            for (prompt, text) in prompts.iter().zip(&texts) {
                assert_eq!(*text, greedy_by_whole_texts(&mut engine, prompt, GREEDY.max_new_tokens), "{name}");
            }
        }
    }
}

#[test]
fn a_sequence_ends_before_its_stop_token_and_the_others_go_on() {
    let prompts: Vec<Vec<i32>> = split(&batch(&[4, 7, 3, 12, 5, 9, 2], 9)).into_iter().map(|b| b.input_ids).collect();
    let mut engine = open("window-bias", &options(DType::F32, Recompute::Norms, 2));
    let whole = engine.generate(&prompts, &GREEDY).unwrap();
    let mut seen = 0;
    for stop in 0..32 {
        let texts = engine.generate(&prompts, &GenerateOptions { stop_ids: vec![stop], ..GREEDY }).unwrap();
        for (text, whole) in texts.iter().zip(&whole) {
            let end = whole.iter().position(|&id| id == stop).unwrap_or(whole.len());
            assert_eq!(text, &whole[..end]);
            seen += usize::from(end < whole.len());
        }
    }
    assert!(seen > prompts.len(), "too few sequences stopped early to show anything");
}

#[test]
fn drawn_tokens_depend_on_seed_and_prompt_alone() {
    let prompts: Vec<Vec<i32>> = split(&batch(&[4, 7, 3], 9)).into_iter().map(|b| b.input_ids).collect();
    let mut engine = open("window-bias", &options(DType::F32, Recompute::Norms, 2));
    let drawn = |engine: &mut Engine<CpuBackend>, prompts: &[Vec<i32>], seed| {
        engine.generate(prompts, &GenerateOptions { temperature: 1.5, seed, ..GREEDY }).unwrap()
    };
    let first = drawn(&mut engine, &prompts, 1);
    assert_eq!(drawn(&mut engine, &prompts, 1), first);
    assert_ne!(drawn(&mut engine, &prompts, 2), first);
    assert_eq!(drawn(&mut engine, &prompts[..1], 1), first[..1]);
    let cold = engine.generate(&prompts, &GenerateOptions { temperature: 1e-6, seed: 1, ..GREEDY }).unwrap();
    assert_eq!(cold, engine.generate(&prompts, &GREEDY).unwrap());
}

#[test]
fn training_goes_on_in_equal_bits_after_generation() {
    let options = options(DType::F32, Recompute::Norms, 33);
    let (mut engine, mut other) = (open("moe-balance", &options), open("moe-balance", &options));
    for i in 0..3 {
        engine.generate(&[vec![1, 2, 3], vec![4]], &GREEDY).unwrap();
        engine.step(&[batch(&[9, 3, 21], i)], HYPER).unwrap();
        other.step(&[batch(&[9, 3, 21], i)], HYPER).unwrap();
    }
    assert!(state_bits(&mut engine) == state_bits(&mut other));
}

#[test]
fn random_weights_depend_on_the_seed() {
    let options = options(DType::F32, Recompute::Norms, 33);
    let drawn = |seed| {
        all(
            &mut Engine::open(Box::new(CpuBackend::new()), &model("moe-balance"), Weights::Random(seed), &options)
                .unwrap(),
            Kind::Weights,
        )
    };
    assert_eq!(drawn(1), drawn(1));
    assert_ne!(drawn(1), drawn(2));
}
