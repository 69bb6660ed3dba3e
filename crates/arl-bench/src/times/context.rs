//! One long sequence: a step over it next to what its attention costs at the kernel's own rate, and the plan of a longer one.

use std::path::Path;
use std::time::Instant;

use arl_engine::backend::{DType, DeviceKind, Heads};
use arl_engine::{BatchSize, Engine, EngineOptions, Hyper, MemoryPlan, Recompute, Weights, plan_memory};
use arl_model::{ModelConfig, Result};
use serde_json::json;

use super::goal::{Goal, of_ratio, reached};
use super::rate::{attention_flops, attention_rates};
use super::{batch, gib, is_oom, skipped};
use crate::options::word;
use crate::run::Run;

const MODEL: &str = "qwen3-0.6b";
/// Tokens of the sequence that is trained.
const CONTEXT: usize = 262_144;
/// Tokens over which the kernel's own rate is measured.
const RATED: usize = 32_768;
/// Tokens of the sequence that is planned, and the memory that it is to fit.
const PLANNED: usize = 1_000_000;
const PLANNED_BYTES: usize = 80_000_000_000;
/// Of a device's memory, CUDA's own context.
const CONTEXT_BYTES: usize = 1 << 30;

/// Runs the case: one step of one sequence.
pub(super) fn case(run: &mut Run<'_>, name: &'static str, goals: &[Goal]) -> Result<()> {
    let (model, tokens, rated) =
        if run.options.rehearse { ("qwen3-cpu-8m", 512, 128) } else { (MODEL, CONTEXT, RATED) };
    let dir = run.options.home.join("configs").join(model);
    let config = ModelConfig::from_dir(&dir)?;
    let options = EngineOptions {
        recompute: Recompute::Block,
        activation_offloading: true,
        max_batch: BatchSize { tokens, sequences: 1, ..BatchSize::default() },
        ..super::options(run)
    };
    let heads =
        Heads { query: config.num_attention_heads, key_value: config.num_key_value_heads, dim: config.head_dim };
    let (forward, backward) = attention_rates(&mut *run.open()?, options.attention, heads, rated, options.dtype)?;
    // A layer's forward pass runs twice, as it is computed again.
    let flops = config.layers.len() as f64 * attention_flops(heads, tokens);
    let attention = 2.0 * flops / forward + 2.5 * flops / backward;
    if 1.5 * attention > run.left() {
        let (needs, left) = (1.5 * attention, run.left());
        return skipped(run, name, &format!("needs about {needs:.0} s, and {left:.0} s of --budget are left"));
    }
    let took = match one_step(run, &dir, &options, tokens) {
        Ok(took) => took,
        Err(error) if is_oom(&error) => return skipped(run, name, &error.to_string()),
        Err(error) => return Err(error),
    };
    let goals = of_ratio(goals, took / attention);
    let done = reached(run, &goals);
    run.case(json!({
        "case": name, "ok": true, "reached": done, "goals": goals, "rehearsal": run.options.rehearse,
        "attention": word(options.attention), "model": model, "tokens": tokens, "step_s": took, "attention_s": attention,
        "attention_tflops_forward": forward / 1e12, "attention_tflops_backward": backward / 1e12, "rated_at": rated,
    }))
}

/// Seconds of a step, after a short one that finds plans and loads kernels.
fn one_step(run: &Run<'_>, dir: &Path, options: &EngineOptions, tokens: usize) -> Result<f64> {
    let mut engine = Engine::open(run.open()?, dir, Weights::Random(0), options)?;
    let vocab = engine.config().vocab_size;
    let hyper = Hyper { learning_rate: 1e-5, max_grad_norm: 1.0 };
    let short = tokens.min(256);
    engine.step(&[batch(vocab, short, short, 1)], hyper)?;
    let batches = [batch(vocab, tokens, tokens, 2)];
    let start = Instant::now();
    engine.step(&batches, hyper)?;
    Ok(start.elapsed().as_secs_f64())
}

/// The plan of one sequence of a million tokens on a GPU, with everything that saves memory.
fn plan(configs: &Path) -> Result<MemoryPlan> {
    let options = EngineOptions {
        dtype: DType::Bf16,
        recompute: Recompute::Block,
        activation_offloading: true,
        optimizer_offload: true,
        max_batch: BatchSize { tokens: PLANNED, sequences: 1, ..BatchSize::default() },
        ..EngineOptions::default()
    };
    plan_memory(&configs.join(MODEL), &options, DeviceKind::Cuda)
}

/// Prints the plan; needs no GPU.
pub(super) fn plan_case(run: &mut Run<'_>, name: &'static str) -> Result<()> {
    let plan = plan(&run.options.home.join("configs"))?;
    let categories: serde_json::Map<_, _> =
        plan.categories.iter().map(|(name, bytes)| (name.to_string(), gib(*bytes).into())).collect();
    let fits = plan.total_bytes + CONTEXT_BYTES <= PLANNED_BYTES;
    run.case(json!({
        "case": name, "ok": true, "reached": fits, "model": MODEL, "tokens": PLANNED, "planned_gib": gib(plan.total_bytes),
        "of_gib": gib(PLANNED_BYTES), "host_gib": gib(plan.host_bytes), "categories": categories,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_million_tokens_are_planned_to_fit_80_gb() {
        let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/bench/configs");
        if !configs.join(MODEL).exists() {
            println!("SKIPPED: the plan for a million tokens, as the model's configuration is not here");
            return;
        }
        let plan = plan(&configs).unwrap();
        assert!(plan.total_bytes + CONTEXT_BYTES <= PLANNED_BYTES, "{plan:?}");
        // The plan is of that many tokens: the residual stream alone has 2 bytes for each of 1,024 columns of each.
        assert!(plan.total_bytes > 2 * 1024 * PLANNED, "{plan:?}");
    }
}
