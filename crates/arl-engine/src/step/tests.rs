//! What a step's first micro-batch leaves of the gradients before it: nothing.

use std::path::Path;

use crate::backend::cpu::CpuBackend;
use crate::backend::{Backend, DType};
use crate::placement::store::Store;
use crate::{BatchSize, Engine, EngineOptions, Kind, LossScaling, MicroBatch, Weights};

/// One sequence of so many tokens.
fn batch(tokens: i32) -> MicroBatch {
    MicroBatch {
        input_ids: (0..tokens).map(|t| t * 7 % 31).collect(),
        targets: (0..tokens).map(|t| (t + 1) * 7 % 31).collect(),
        positions: (0..tokens).collect(),
        cu_seqlens: vec![0, tokens],
        ..MicroBatch::default()
    }
}

#[test]
fn gradients_that_hold_anything_before_a_step_are_those_of_the_step_alone() {
    for name in ["moe-balance", "window-bias", "qwen2-window"] {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../__test__/golden").join(name);
        for dtype in [DType::F32, DType::Bf16, DType::F16] {
            // So few tokens that some experts have none; and chunks of the loss, which add to the head.
            for (tokens, chunk) in [(2, None), (21, Some(4))] {
                let max_batch = BatchSize { tokens: 21, sequences: 1, ..BatchSize::default() };
                let base = EngineOptions {
                    dtype,
                    max_batch,
                    loss_seq_chunk_size: chunk,
                    loss_scaling: LossScaling { initial: 1.0, growth_interval: 2000 },
                    ..EngineOptions::default()
                };
                let run = |poison: bool| {
                    let mut engine =
                        Engine::open(Box::new(CpuBackend::new()), &dir, Weights::Checkpoint, &base).unwrap();
                    let training = engine.training().unwrap();
                    for i in 0..engine.model.placement.tensors.len() {
                        let param = engine.model.placement.tensors[i].param;
                        let gradient = Store::trained(training.gradients, param).unwrap();
                        if poison {
                            engine.backend.upload(&vec![0xff; gradient.bytes()], gradient);
                        }
                    }
                    engine.gradients(&[batch(tokens), batch(3)]).unwrap();
                    let names = engine.tensor_names();
                    let gradients = names.iter().flat_map(|name| engine.read_tensor(name, Kind::Gradients).unwrap());
                    gradients.map(f32::to_bits).collect::<Vec<u32>>()
                };
                let clean = run(false);
                assert!(clean.iter().all(|bits| f32::from_bits(*bits).is_finite()));
                assert!(run(true) == clean, "{name} {dtype:?} {tokens} tokens");
            }
        }
    }
}
