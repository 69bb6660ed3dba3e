//! Whole optimizer steps: their numbers against the CPU's, and the same bits on a second run, with every level of
//! recomputation, and with both offloads. With attention by the device's own library: their numbers against the own kernels'.

use std::path::{Path, PathBuf};

use arl_engine::backend::cpu::CpuBackend;
use arl_engine::backend::{Backend, DType};
use arl_engine::{
    Adam, AttentionChoice, BatchSize, Engine, EngineOptions, Hyper, IGNORED, Kind, MicroBatch, Recompute, Weights,
};
use arl_model::{Error, ErrorCode, Result};

use super::draw::{Draw, Size};
use super::trial::{COSINE, NORM_ERROR, Near};

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

/// How a run differs from the plain one.
#[derive(Clone, Copy)]
struct Way {
    recompute: Recompute,
    offload: bool,
    attention: AttentionChoice,
}

const PLAIN: Way = Way { recompute: Recompute::Norms, offload: false, attention: AttentionChoice::Own };

/// Two layers with heads of a size, as `config.json` says a Qwen3 model; small enough for the host.
pub(super) fn small_model(folder: &Path, head: usize) -> Result<PathBuf> {
    let config = serde_json::json!({
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": head, "vocab_size": 640, "max_position_embeddings": 4096,
        "rope_theta": 1e6, "tie_word_embeddings": true, "attention_bias": false, "initializer_range": 0.02,
    });
    write_config(folder.join(format!("heads-of-{head}")), &config)
}

/// Three layers of the gated delta rule and one of attention with heads of 256, as `config.json` says a Qwen3.5 model; small enough
/// for the host.
pub(super) fn small_hybrid(folder: &Path) -> Result<PathBuf> {
    let config = serde_json::json!({
        "architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text", "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 640, "max_position_embeddings": 4096,
        "linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
        "linear_conv_kernel_dim": 4, "tie_word_embeddings": true, "attention_bias": false, "initializer_range": 0.02,
        "rope_parameters": { "rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25 },
    });
    write_config(folder.join("hybrid"), &config)
}

fn write_config(dir: PathBuf, config: &serde_json::Value) -> Result<PathBuf> {
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

fn engine<B: Backend + ?Sized>(backend: Box<B>, dir: &Path, dtype: DType, way: Way) -> Result<Engine<B>> {
    let options = EngineOptions {
        dtype,
        recompute: way.recompute,
        activation_offloading: way.offload,
        optimizer_offload: way.offload,
        attention: way.attention,
        max_batch: BatchSize { tokens: 100, sequences: 4, ..BatchSize::default() },
        adam: Adam { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1 },
        ..EngineOptions::default()
    };
    Engine::open(backend, dir, Weights::Random(7), &options)
}

fn batches(draw: &mut Draw, vocab: usize) -> [MicroBatch; 2] {
    [batch(draw, &[9, 70, 21], vocab), batch(draw, &[33], vocab)]
}

fn run<B: Backend + ?Sized>(backend: Box<B>, dir: &Path, dtype: DType, way: Way) -> Result<Outcome> {
    let mut engine = engine(backend, dir, dtype, way)?;
    let vocab = engine.config().vocab_size;
    let mut draw = Draw::new(11, Size::Host);
    let mut figures = Vec::new();
    for _ in 0..STEPS {
        let batches = batches(&mut draw, vocab);
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

/// The most that two runs' figures differ.
fn apart(a: &[f64], b: &[f64]) -> f64 {
    let apart = a.iter().zip(b).map(|(a, b)| (a - b).abs() / b.abs());
    apart.fold(0.0, |a: f64, b| if b > a || b.is_nan() { b } else { a })
}

/// Every gradient of one optimizer step.
fn gradients(backend: Box<dyn Backend>, dir: &Path, way: Way) -> Result<Vec<f64>> {
    let mut engine = engine(backend, dir, DType::Bf16, way)?;
    let vocab = engine.config().vocab_size;
    engine.gradients(&batches(&mut Draw::new(11, Size::Host), vocab))?;
    let mut all = Vec::new();
    for name in engine.tensor_names() {
        all.extend(engine.read_tensor(&name, Kind::Gradients)?.into_iter().map(f64::from));
    }
    Ok(all)
}

/// Checks one model in bf16 whose attention is the library's against the same with the own kernels; how far the figures are
/// apart, and the cosine of gradients.
pub(super) fn check_library(
    open: &dyn Fn() -> Result<Box<dyn Backend>>,
    dir: &Path,
    attention: AttentionChoice,
) -> Result<(f64, f64)> {
    let own = run(open()?, dir, DType::Bf16, PLAIN)?;
    let own_gradients = gradients(open()?, dir, PLAIN)?;
    let (mut most_apart, mut least_cosine) = (0.0f64, 1.0f64);
    for way in [Way { attention, ..PLAIN }, Way { attention, recompute: Recompute::Block, offload: true }] {
        let other = run(open()?, dir, DType::Bf16, way)?;
        let apart = apart(&other.figures, &own.figures);
        let near = Near::of(&gradients(open()?, dir, way)?, &own_gradients);
        if apart.is_nan() || apart > bound(DType::Bf16) || near.cosine < COSINE || near.norm_error > NORM_ERROR {
            let what = format!(
                "{} with {attention:?}, recompute {:?}: losses and gradient norms {:?}, with the own kernels {:?}; gradients: \
                 cosine {:.6}, norms {:.2e}",
                dir.display(),
                way.recompute,
                other.figures,
                own.figures,
                near.cosine,
                near.norm_error
            );
            return Err(Error::new(ErrorCode::Internal, what));
        }
        (most_apart, least_cosine) = (most_apart.max(apart), least_cosine.min(near.cosine));
    }
    Ok((most_apart, least_cosine))
}

/// Loss, gradient norm and the bits of all gradients of one micro-batch.
fn micro_batch(
    backend: Box<dyn Backend>,
    dir: &Path,
    tokens: usize,
    seq: usize,
    attention: AttentionChoice,
) -> Result<([f64; 2], u64)> {
    let options = EngineOptions {
        dtype: DType::Bf16,
        attention,
        max_batch: BatchSize { tokens, sequences: tokens / seq, ..BatchSize::default() },
        ..EngineOptions::default()
    };
    let mut engine = Engine::open(backend, dir, Weights::Random(7), &options)?;
    let vocab = engine.config().vocab_size;
    let batches = [batch(&mut Draw::new(11, Size::Host), &vec![seq; tokens / seq], vocab)];
    engine.gradients(&batches)?;
    let mut bits = 0u64;
    for name in engine.tensor_names() {
        let gradient = engine.read_tensor(&name, Kind::Gradients)?;
        bits = gradient.iter().fold(bits, |bits, x| bits.rotate_left(5).wrapping_mul(31) ^ u64::from(x.to_bits()));
    }
    let stats = engine.step(&batches, Hyper { learning_rate: 1e-5, max_grad_norm: 1.0 })?;
    Ok(([stats.loss, stats.grad_norm], bits))
}

/// Most that loss and gradient norm of a real micro-batch may differ between two attentions.
const BETWEEN_ATTENTIONS: f64 = 1e-3;

/// A micro-batch of a model with the own kernels, twice in bits, and with the library's attention where that is asked for.
pub(super) fn check_model(
    open: &dyn Fn() -> Result<Box<dyn Backend>>,
    dir: &Path,
    tokens: usize,
    seq: usize,
    attention: AttentionChoice,
) -> Result<serde_json::Value> {
    let wrong = |what: String| Err(Error::new(ErrorCode::Internal, what));
    let run = |attention| micro_batch(open()?, dir, tokens, seq, attention);
    let (figures, bits) = run(AttentionChoice::Own)?;
    if !figures.iter().all(|figure| figure.is_finite()) {
        return wrong(format!("loss and gradient norm are {figures:?}"));
    }
    let (_, again) = run(AttentionChoice::Own)?;
    if again != bits {
        return wrong("a second run gives other bits of gradients".into());
    }
    let [loss, norm] = figures;
    let mut found = serde_json::json!({ "loss": loss, "grad_norm": norm, "same_bits_again": true });
    if attention != AttentionChoice::Own {
        let (library, _) = run(attention)?;
        let apart = apart(&library, &figures);
        if apart.is_nan() || apart > BETWEEN_ATTENTIONS {
            return wrong(format!(
                "loss and gradient norm {library:?} with {attention:?}, {figures:?} with own kernels"
            ));
        }
        found["between_attentions"] = apart.into();
    }
    Ok(found)
}

/// Checks one model in one type; how far the figures are from the CPU's.
pub(super) fn check(open: &dyn Fn() -> Result<Box<dyn Backend>>, dir: &Path, dtype: DType) -> Result<f64> {
    let plain = run(open()?, dir, dtype, PLAIN)?;
    let cpu = run(Box::new(CpuBackend::new()), dir, dtype, PLAIN)?;
    let apart = apart(&plain.figures, &cpu.figures);
    let wrong = |what: String| Err(Error::new(ErrorCode::Internal, format!("{} in {dtype:?}: {what}", dir.display())));
    if apart.is_nan() || apart > bound(dtype) {
        return wrong(format!(
            "losses and gradient norms {:?}, on the CPU {:?}: {apart:.1e} apart, allowed is {:.0e}",
            plain.figures,
            cpu.figures,
            bound(dtype)
        ));
    }
    let ways =
        LEVELS.into_iter().flat_map(|recompute| [false, true].map(|offload| Way { recompute, offload, ..PLAIN }));
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
