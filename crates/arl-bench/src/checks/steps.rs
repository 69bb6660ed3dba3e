//! Whole optimizer steps: their numbers beside the CPU's, and the same bits on a second run, with every level of
//! recomputation, and with both offloads.

use std::path::{Path, PathBuf};

use arl_engine::backend::cpu::CpuBackend;
use arl_engine::backend::{Backend, DType};
use arl_engine::{Adam, BatchSize, Engine, EngineOptions, Hyper, IGNORED, Kind, MicroBatch, Recompute, Weights};
use arl_model::{Error, ErrorCode, Result};

use super::draw::Draw;

/// Most that a loss or gradient norm may differ from the CPU's.
fn bound(dtype: DType) -> f64 {
    if dtype == DType::F32 { 1e-5 } else { 1e-2 }
}

const STEPS: usize = 3;
const LEVELS: [Recompute; 4] = [Recompute::Off, Recompute::Norms, Recompute::Mlp, Recompute::Block];

/// What a few steps gave: losses and norms of gradients by turns, and every bit of weights and moments.
struct Outcome {
    figures: Vec<f64>,
    state: Vec<u32>,
}

/// How a run is told apart from the plain one.
#[derive(Clone, Copy)]
struct Way {
    recompute: Recompute,
    offload: bool,
}

const PLAIN: Way = Way { recompute: Recompute::Norms, offload: false };

/// Two layers with heads of a size, as `config.json` says a Qwen3 model; small enough for the host.
pub(super) fn small_model(folder: &Path, head: usize) -> Result<PathBuf> {
    let config = serde_json::json!({
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": head, "vocab_size": 640, "max_position_embeddings": 4096,
        "rope_theta": 1e6, "tie_word_embeddings": true, "attention_bias": false, "initializer_range": 0.02,
    });
    let dir = folder.join(format!("heads-of-{head}"));
    let file = dir.join("config.json");
    std::fs::create_dir_all(&dir).map_err(|error| Error::io(&dir, &error))?;
    std::fs::write(&file, config.to_string()).map_err(|error| Error::io(&file, &error))?;
    Ok(dir)
}

/// Ragged sequences of random ids; the first third of each is not trained.
fn batch(draw: &mut Draw, lengths: &[usize], vocab: usize) -> MicroBatch {
    let mut batch = MicroBatch { cu_seqlens: vec![0], ..MicroBatch::default() };
    for &length in lengths {
        let ids: Vec<i32> = (0..length).map(|_| draw.below(vocab) as i32).collect();
        let trained = |t: usize| t >= length / 3 && t + 1 < length;
        batch.targets.extend((0..length).map(|t| if trained(t) { ids[t + 1] } else { IGNORED }));
        batch.positions.extend(0..length as i32);
        batch.input_ids.extend(ids);
        batch.cu_seqlens.push(batch.input_ids.len() as i32);
    }
    batch
}

fn run<B: Backend + ?Sized>(backend: Box<B>, dir: &Path, dtype: DType, way: Way) -> Result<Outcome> {
    let options = EngineOptions {
        dtype,
        recompute: way.recompute,
        activation_offloading: way.offload,
        optimizer_offload: way.offload,
        max_batch: BatchSize { tokens: 100, sequences: 4 },
        adam: Adam { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1 },
        ..EngineOptions::default()
    };
    let mut engine = Engine::open(backend, dir, Weights::Random(7), &options)?;
    let vocab = engine.config().vocab_size;
    let mut draw = Draw::new(11, false);
    let mut figures = Vec::new();
    for _ in 0..STEPS {
        let batches = [batch(&mut draw, &[9, 70, 21], vocab), batch(&mut draw, &[33], vocab)];
        let stats = engine.step(&batches, Hyper { learning_rate: 1e-3, max_grad_norm: 1.0 })?;
        figures.extend([stats.loss, stats.grad_norm]);
    }
    let mut state = Vec::new();
    for kind in [Kind::Weights, Kind::Moment1, Kind::Moment2] {
        for name in engine.tensor_names() {
            state.extend(engine.read_tensor(&name, kind)?.into_iter().map(f32::to_bits));
        }
    }
    Ok(Outcome { figures, state })
}

/// Checks one model in one type; how far the figures are from the CPU's.
pub(super) fn check(open: &dyn Fn() -> Result<Box<dyn Backend>>, dir: &Path, dtype: DType) -> Result<f64> {
    let plain = run(open()?, dir, dtype, PLAIN)?;
    let cpu = run(Box::new(CpuBackend::new()), dir, dtype, PLAIN)?;
    let pairs = plain.figures.iter().zip(&cpu.figures);
    let apart =
        pairs.map(|(a, b)| (a - b).abs() / b.abs()).fold(0.0, |a: f64, b| if b > a || b.is_nan() { b } else { a });
    let wrong = |what: String| Err(Error::new(ErrorCode::Internal, format!("{} in {dtype:?}: {what}", dir.display())));
    if apart.is_nan() || apart > bound(dtype) {
        return wrong(format!(
            "losses and gradient norms {:?}, on the CPU {:?}: {apart:.1e} apart, allowed is {:.0e}",
            plain.figures,
            cpu.figures,
            bound(dtype)
        ));
    }
    let ways = LEVELS.into_iter().flat_map(|recompute| [false, true].map(|offload| Way { recompute, offload }));
    for way in ways {
        let other = run(open()?, dir, dtype, way)?;
        let what = format!("recompute {:?}, offloads {}", way.recompute, way.offload);
        if other.figures != plain.figures {
            return wrong(format!("{what}: other losses: {:?} instead of {:?}", other.figures, plain.figures));
        }
        if other.state != plain.state {
            return wrong(format!("{what}: other bits of weights or moments"));
        }
    }
    Ok(apart)
}
