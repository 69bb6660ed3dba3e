//! Models that see: what must not change a result, what a step without images leaves alone, what is frozen, and what is refused.

use crate::common;
use crate::common::vision;

use std::collections::HashMap;

use arl_engine::backend::cpu::CpuBackend;
use arl_engine::backend::{DType, DeviceKind};
use arl_engine::{
    Engine, EngineOptions, GenerateOptions, Hyper, IGNORED, Kind, MicroBatch, MicroBatchStats, Prompt, Recompute,
    Weights, plan_memory,
};
use arl_model::{CheckpointFormat, ErrorCode, MAX_SHARD_BYTES, ModelFiles, save_model};
use common::{HYPER, TYPES, difference, state_bits};
use vision::{
    IMAGE, SEEING, SEEING_EXPERTS, batch, batches, bits, f32_room, folder, names, of_text, open, room, split,
};

const LEVELS: [Recompute; 4] = [Recompute::Off, Recompute::Norms, Recompute::Mlp, Recompute::Block];

/// Sums in another order.
const REORDERED: f64 = 3e-6;

/// Steps with images, without, and with them again: figures and state in bits.
fn train(engine: &mut Engine<CpuBackend>, batches: &[MicroBatch]) -> (Vec<[u64; 2]>, Vec<u32>) {
    let steps = [batches, &batches[1..2], &batches[1..]];
    let figures = steps.map(|step| {
        let stats = engine.step(step, HYPER).unwrap();
        [stats.loss.to_bits(), stats.grad_norm.to_bits()]
    });
    (figures.to_vec(), state_bits(engine))
}

#[test]
fn every_parameter_has_a_gradient_and_the_loss_falls() {
    for name in SEEING {
        let batches = batches();
        let mut engine = open(name, &f32_room(&batches));
        engine.gradients(&batches).unwrap();
        for tensor in engine.tensor_names() {
            let gradient = engine.read_tensor(&tensor, Kind::Gradients).unwrap();
            assert!(gradient.iter().any(|&value| value != 0.0), "{name} {tensor}");
        }
        let losses: Vec<f64> = (0..12).map(|_| engine.step(&batches, HYPER).unwrap().loss).collect();
        assert!(losses[11] < 0.8 * losses[0], "{name} {losses:?}");
    }
}

#[test]
fn packed_sequences_are_those_apart() {
    for name in SEEING {
        let whole = batch(&[&[(4, 6)], &[], &[(2, 2), (8, 4)], &[(6, 2)]], 5);
        let parts = split(&whole);
        let options = f32_room(std::slice::from_ref(&whole));
        let (mut packed, mut apart) = (open(name, &options), open(name, &options));
        let one = packed.step(std::slice::from_ref(&whole), HYPER).unwrap();
        let many = apart.step(&parts, HYPER).unwrap();
        assert!((one.loss - many.loss).abs() < 1e-6, "{name} {} {}", one.loss, many.loss);
        for tensor in packed.tensor_names() {
            let [a, b] = [&mut packed, &mut apart].map(|engine| engine.read_tensor(&tensor, Kind::Gradients).unwrap());
            assert!(difference(&a, &b) < 1e-5, "{name} {tensor}: {:e}", difference(&a, &b));
        }
        let logits = packed.inspect(&whole).unwrap().logits;
        let mut each = Vec::new();
        for part in &parts {
            each.extend(packed.inspect(part).unwrap().logits);
        }
        assert!(difference(&logits, &each) < REORDERED, "{name} {:e}", difference(&logits, &each));
    }
}

#[test]
fn recomputation_and_offloading_change_no_bit() {
    for name in SEEING {
        let batches = batches();
        for dtype in TYPES {
            let base = EngineOptions { dtype, ..f32_room(&batches) };
            let expected =
                train(&mut open(name, &EngineOptions { recompute: Recompute::Off, ..base.clone() }), &batches);
            for recompute in LEVELS {
                for (activation_offloading, optimizer_offload) in
                    [(false, false), (true, false), (false, true), (true, true)]
                {
                    let options = EngineOptions { recompute, activation_offloading, optimizer_offload, ..base.clone() };
                    let found = train(&mut open(name, &options), &batches);
                    let what = format!("{name} {dtype:?} {recompute:?} {activation_offloading} {optimizer_offload}");
                    assert_eq!(found.0, expected.0, "{what}");
                    assert!(found.1 == expected.1, "{what}: the state differs");
                }
            }
        }
    }
}

#[test]
fn experts_behind_a_tower_train_to_the_same_bits_at_every_level() {
    for name in SEEING_EXPERTS {
        let batches = batches();
        for dtype in [DType::F32, DType::Bf16] {
            let base = EngineOptions { dtype, ..f32_room(&batches) };
            let run = |recompute, offload| {
                let (activation_offloading, optimizer_offload) = (offload, offload);
                let options = EngineOptions { recompute, activation_offloading, optimizer_offload, ..base.clone() };
                train(&mut open(name, &options), &batches)
            };
            let expected = run(Recompute::Off, false);
            assert!(expected.0.iter().all(|[loss, _]| f64::from_bits(*loss).is_finite()), "{name} {dtype:?}");
            for recompute in LEVELS {
                assert!(run(recompute, recompute == Recompute::Block) == expected, "{name} {dtype:?} {recompute:?}");
            }
        }
    }
}

#[test]
fn gradients_of_experts_and_of_the_tower_before_them_are_the_slope_of_the_loss() {
    let batches = batches();
    let options = f32_room(&batches);
    let loss = |engine: &mut Engine<CpuBackend>| {
        let stats = engine.gradients(&batches).unwrap();
        let sum = |of: fn(&MicroBatchStats) -> f64| stats.iter().map(of).sum::<f64>();
        sum(|s| s.loss_sum) / sum(|s| s.target_weight) + sum(|s| s.balance_loss)
    };
    for name in SEEING_EXPERTS {
        let dir = folder(name);
        if name == SEEING_EXPERTS[1] {
            // The delta rule amplifies a shift until a router chooses otherwise, where the loss has a step: all are chosen.
            let path = dir.path().join("config.json");
            let text = std::fs::read_to_string(&path).unwrap();
            std::fs::write(&path, text.replace(r#""num_experts_per_tok":2"#, r#""num_experts_per_tok":4"#)).unwrap();
        }
        let mut engine = Engine::open(Box::new(CpuBackend::new()), dir.path(), Weights::Random(7), &options).unwrap();
        loss(&mut engine);
        let dir = tempfile::tempdir().unwrap();
        engine.export_model(dir.path(), None).unwrap();
        let files = ModelFiles::read(dir.path()).unwrap();
        let config = files.config().unwrap();
        let format = CheckpointFormat::new(&config);
        let mut all = |kind| -> HashMap<String, Vec<f32>> {
            let names = engine.tensor_names().into_iter();
            names.map(|name| (name.clone(), engine.read_tensor(&name, kind).unwrap())).collect()
        };
        let (weights, gradients) = (all(Kind::Weights), all(Kind::Gradients));
        assert!(gradients.iter().all(|(_, gradient)| gradient.iter().any(|&value| value != 0.0)), "{name}");
        for part in ["model.visual.", ".mlp.", "model."] {
            let of = |tensor: &str| tensor.contains(part);
            let squares = gradients.iter().filter(|(tensor, _)| of(tensor)).flat_map(|(_, gradient)| gradient);
            let square: f64 = squares.map(|&value| f64::from(value) * f64::from(value)).sum();
            let step = 2e-4 / square.sqrt();
            let at = |sign: f64| {
                let moved = tempfile::tempdir().unwrap();
                save_model(moved.path(), &files, &config, &format, None, MAX_SHARD_BYTES, |tensor, out| {
                    for ((out, weight), gradient) in out.iter_mut().zip(&weights[tensor]).zip(&gradients[tensor]) {
                        *out = weight + if of(tensor) { (sign * step * f64::from(*gradient)) as f32 } else { 0.0 };
                    }
                    Ok(())
                })
                .unwrap();
                let cpu = Box::new(CpuBackend::new());
                loss(&mut Engine::open(cpu, moved.path(), Weights::Checkpoint, &options).unwrap())
            };
            let slope = (at(1.0) - at(-1.0)) / (2.0 * step);
            assert!((slope - square).abs() < 5e-3 * square, "{name} {part}: {slope} instead of {square}");
        }
    }
}

#[test]
fn higher_levels_of_recomputation_need_less_memory_for_images() {
    let large = [batch(&[&[(40, 40)]], 1)];
    let bytes = |recompute| open("qwen3_vl", &room(DType::F32, recompute, &large)).memory().total_bytes;
    let levels = LEVELS.map(bytes);
    assert!(levels.windows(2).all(|pair| pair[0] > pair[1]), "{levels:?}");
}

#[test]
fn in_types_of_16_bits_losses_and_gradients_are_those_of_f32_but_for_rounding() {
    for name in SEEING {
        let batches = batches();
        let first = |dtype| {
            let mut engine = open(name, &room(dtype, Recompute::Norms, &batches));
            let stats = engine.step(&batches, HYPER).unwrap();
            assert!(!stats.skipped, "{name} {dtype:?}");
            let (tower, _) = names(&engine);
            let gradients = tower.iter().flat_map(|name| engine.read_tensor(name, Kind::Gradients).unwrap());
            (stats.loss, gradients.collect::<Vec<f32>>())
        };
        let expected = first(DType::F32);
        for (dtype, bound) in [(DType::Bf16, 0.1), (DType::F16, 0.02)] {
            let (loss, gradients) = first(dtype);
            assert!((loss - expected.0).abs() < bound / 5.0, "{name} {dtype:?}: {loss} {}", expected.0);
            let apart = difference(&gradients, &expected.1);
            // The gated delta rule of a decoder at random amplifies what rounding does to its own gradients, too.
            assert!(name == "qwen3_5" || apart < bound, "{name} {dtype:?}: gradients {apart:e} apart");
        }
    }
}

#[test]
fn a_step_without_images_leaves_the_tower_as_it_is() {
    for name in SEEING {
        let batches = batches();
        for dtype in TYPES {
            for optimizer_offload in [false, true] {
                let options = EngineOptions { optimizer_offload, ..room(dtype, Recompute::Norms, &batches) };
                let mut engine = open(name, &options);
                let (tower, others) = names(&engine);
                engine.step(&batches, HYPER).unwrap();
                let kinds = [Kind::Weights, Kind::Moment1, Kind::Moment2];
                let before = kinds.map(|kind| [bits(&mut engine, &tower, kind), bits(&mut engine, &others, kind)]);
                let stats = engine.step(&batches[1..2], HYPER).unwrap();
                let after = kinds.map(|kind| [bits(&mut engine, &tower, kind), bits(&mut engine, &others, kind)]);
                for (before, after) in before.iter().zip(&after) {
                    assert!(before[0] == after[0], "{name} {dtype:?} {optimizer_offload}");
                    assert!(before[1] != after[1], "{name} {dtype:?} {optimizer_offload}");
                }
                // Nor is it a part of the norm.
                let squares: f64 = others
                    .iter()
                    .flat_map(|name| engine.read_tensor(name, Kind::Gradients).unwrap())
                    .map(|value| f64::from(value) * f64::from(value))
                    .sum();
                assert!((squares.sqrt() - stats.grad_norm).abs() < 1e-9 * stats.grad_norm, "{name} {dtype:?}");
            }
        }
    }
}

#[test]
fn the_towers_bias_correction_counts_steps_with_images_alone() {
    let batches = batches();
    let rate = 1e-2f64;
    let hyper = Hyper { learning_rate: rate as f32, max_grad_norm: 0.0 };
    let (seeing, text) = (&batches[..1], &batches[1..2]);
    let tensors = [("model.visual.merger.linear_fc2.bias", 2), ("model.norm.weight", 4)];
    let mut engine = open("qwen3_vl", &f32_room(&batches));
    let mut moments = tensors.map(|(name, _)| {
        let len = engine.read_tensor(name, Kind::Weights).unwrap().len();
        (vec![0f64; len], vec![0f64; len])
    });
    for (number, step) in [seeing, text, text, seeing].into_iter().enumerate() {
        let before = tensors.map(|(name, _)| engine.read_tensor(name, Kind::Weights).unwrap());
        engine.step(step, hyper).unwrap();
        for (i, (name, steps)) in tensors.into_iter().enumerate() {
            if i == 0 && step == text {
                continue;
            }
            let gradient = engine.read_tensor(name, Kind::Gradients).unwrap();
            let after = engine.read_tensor(name, Kind::Weights).unwrap();
            let (first, second) = &mut moments[i];
            for j in 0..gradient.len() {
                let g = f64::from(gradient[j]);
                first[j] = 0.9 * first[j] + 0.1 * g;
                second[j] = 0.95 * second[j] + 0.05 * g * g;
                if number == 3 {
                    let corrected = first[j] / (1.0 - 0.9f64.powi(steps));
                    let root = (second[j] / (1.0 - 0.95f64.powi(steps))).sqrt() + 1e-8;
                    let expected = f64::from(before[i][j]) - rate * corrected / root;
                    assert!((expected - f64::from(after[j])).abs() < 1e-6, "{name} {j}: {} {expected}", after[j]);
                }
            }
        }
    }
}

#[test]
fn a_run_that_resumes_has_the_bits_of_one_that_never_stopped() {
    for name in SEEING {
        let batches = batches();
        for dtype in TYPES {
            let options = room(dtype, Recompute::Mlp, &batches);
            let dir = tempfile::tempdir().unwrap();
            let mut engine = open(name, &options);
            train(&mut engine, &batches);
            engine.export_model(dir.path(), None).unwrap();
            engine.save_state(dir.path()).unwrap();
            let backend = Box::new(CpuBackend::new());
            let mut resumed = Engine::open(backend, dir.path(), Weights::Restored, &options).unwrap();
            resumed.restore_state(dir.path()).unwrap();
            assert!(train(&mut resumed, &batches) == train(&mut engine, &batches), "{name} {dtype:?}");
        }
    }
}

#[test]
fn the_plan_is_what_a_run_takes_and_a_larger_batch_changes_no_bit() {
    for name in SEEING {
        let batches = batches();
        let options = f32_room(&batches);
        let dir = folder(name);
        let mut engine = open(name, &options);
        assert_eq!(plan_memory(dir.path(), &options, DeviceKind::Cpu).unwrap(), engine.memory());
        let planned = engine.memory();
        let expected = train(&mut engine, &batches);
        assert_eq!(engine.memory(), planned, "{name}: the plan was too small");
        let small = EngineOptions { max_batch: batches[1].size(), ..options };
        let mut grown = open(name, &small);
        assert!(grown.memory().total_bytes < planned.total_bytes);
        assert!(train(&mut grown, &batches) == expected, "{name}");
    }
}

#[test]
fn an_evaluation_has_the_loss_of_the_step() {
    for name in SEEING {
        let batches = batches();
        let mut engine = open(name, &f32_room(&batches));
        let losses = engine.evaluate(&batches).unwrap();
        let by_sequence = engine.evaluate_sequences(&batches[0]).unwrap();
        let sum: f64 = by_sequence.iter().map(|stats| stats.loss_sum).sum();
        assert!((sum - losses[0].loss_sum).abs() < 1e-4, "{name}");
        assert_eq!(engine.gradients(&batches).unwrap(), losses, "{name}");
    }
}

/// The most probable next tokens, found by running the whole text again for each.
fn greedy_by_whole_texts(engine: &mut Engine<CpuBackend>, prompt: &MicroBatch, count: usize) -> Vec<i32> {
    let vocab = engine.config().vocab_size;
    let mut text = prompt.clone();
    for _ in 0..count {
        let tokens = text.input_ids.len();
        text.targets = vec![IGNORED; tokens];
        text.cu_seqlens = vec![0, tokens as i32];
        let logits = engine.inspect(&text).unwrap().logits;
        let last = &logits[(tokens - 1) * vocab..];
        let best = (0..vocab).reduce(|best, i| if last[i] > last[best] { i } else { best }).unwrap();
        let next = text.positions.iter().max().unwrap() + 1;
        let mut axes: Vec<Vec<i32>> = text.positions.chunks_exact(tokens).map(<[i32]>::to_vec).collect();
        axes.iter_mut().for_each(|axis| axis.push(next));
        text.positions = axes.concat();
        text.input_ids.push(best as i32);
    }
    text.input_ids.split_off(prompt.input_ids.len())
}

#[test]
fn replies_to_prompts_with_images_are_those_of_whole_texts() {
    for name in SEEING {
        let whole = batch(&[&[(4, 6)], &[], &[(2, 2), (8, 4)]], 4);
        // A reply that had an image's token would need an image.
        let banned = |tokens: &[i32]| tokens.contains(&IMAGE);
        for inference_only in [false, true] {
            let options = EngineOptions { inference_only, ..f32_room(std::slice::from_ref(&whole)) };
            let mut engine = open(name, &options);
            let parts = split(&whole);
            let prompts: Vec<Prompt> = parts
                .iter()
                .map(|part| Prompt {
                    input_ids: part.input_ids.clone(),
                    positions: part.positions.clone(),
                    images: part.images.clone(),
                })
                .collect();
            let texts = engine.generate_streaming(&prompts, &GenerateOptions::greedy(5), &mut |_, _| {}).unwrap();
            let mut compared = 0;
            for (part, text) in parts.iter().zip(&texts) {
                if !banned(text) {
                    assert_eq!(*text, greedy_by_whole_texts(&mut engine, part, 5), "{name}");
                    compared += 1;
                }
            }
            assert!(compared > 1, "{name}: nothing was compared");
        }
    }
}

#[test]
fn what_is_wrong_with_images_is_named() {
    type Damage = fn(&mut MicroBatch);
    let cases: [(Damage, &str); 8] = [
        (|b| b.images.as_mut().unwrap().grids[0] = [2, 2, 6], "image 0 has 2 frames: videos are not built"),
        (|b| b.images.as_mut().unwrap().grids[1] = [1, 3, 2], "image 1 has 3 x 2 patches"),
        (|b| b.images.as_mut().unwrap().grids[1] = [1, 0, 2], "image 1 has 0 x 2 patches"),
        (|b| b.images.as_mut().unwrap().pixel_values.truncate(7), "pixel_values has 7 numbers"),
        (|b| b.images = None, "it has 15 image tokens (id 40), and its 0 images come to 0"),
        (|b| *b.input_ids.iter_mut().find(|id| **id == IMAGE).unwrap() = 1, "it has 14 image tokens"),
        (|b| b.input_ids[0] = IMAGE, "it has 16 image tokens"),
        (
            |b| {
                let at = b.input_ids.iter().position(|id| *id == IMAGE).unwrap() as i32;
                b.cu_seqlens.insert(1, at + 2);
            },
            "image 0 begins in one sequence and ends in another",
        ),
    ];
    let mut engine = open("qwen3_vl", &f32_room(&batches()));
    for (damage, message) in cases {
        let mut batch = batches()[0].clone();
        damage(&mut batch);
        let error = engine.evaluate(&[batch]).unwrap_err();
        assert_eq!(error.code, ErrorCode::Data);
        assert!(error.message.contains(message), "{}", error.message);
    }
    let options = EngineOptions { vision: false, ..f32_room(&batches()) };
    let mut seen = of_text(&batch(&[&[], &[]], 2));
    seen.images = batches()[0].images.clone();
    let error = open("qwen3_vl", &options).evaluate(&[seen]).unwrap_err();
    assert!(error.message.contains("it has 3 images, and this model has no vision tower"), "{}", error.message);
}
