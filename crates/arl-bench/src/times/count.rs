//! What a step is made of, counted without a device: the operations and bytes of each leaf, and the least time that a GPU's
//! data sheet allows for them. Nothing is computed and nothing is timed.

use arl_engine::backend::plan::PlanBackend;
use arl_engine::backend::profile::{LeafTotal, ProfileBackend};
use arl_engine::backend::timeline::Rates;
use arl_engine::backend::{DType, DeviceKind};
use arl_engine::{Engine, EngineOptions, Flops, Hyper, Weights, plan_memory_of, with_logits_rows};
use arl_model::{ModelConfig, Result};
use serde_json::json;

use super::goal::{PEAK_TFLOPS, REFERENCE_TFLOPS};
use super::step::{MARGIN, SETTINGS, Step};
use super::{ADAM, CASES, Work, batch};
use crate::run::Run;

/// What a GPU does at best.
struct Gpu {
    name: &'static str,
    /// Dense bf16, in FLOP/s.
    flops: f64,
    /// Device memory, in bytes/s.
    memory: f64,
    /// Bytes of memory that it reports, without 1 GiB of CUDA's context.
    bytes: usize,
}

/// What an H100 and an H200 with 80 and 141 GB report.
const H100_BYTES: usize = 84_987_740_160 - (1 << 30);
const H200_BYTES: usize = 150_754_820_096 - (1 << 30);

const GPUS: [Gpu; 3] = [
    Gpu { name: "H100 by its data sheet", flops: PEAK_TFLOPS * 1e12, memory: 3.35e12, bytes: H100_BYTES },
    Gpu { name: "H200 by its data sheet", flops: PEAK_TFLOPS * 1e12, memory: 4.8e12, bytes: H200_BYTES },
    // A product of 8,192 of random values, and a copy within the device.
    Gpu { name: "H200 as measured", flops: REFERENCE_TFLOPS * 1e12, memory: 4.3e12, bytes: H200_BYTES },
];

/// PCIe 5, one way, in bytes/s.
const LINK: f64 = 64e9;

/// Leaves of the table; the others are one line.
const SHOWN: usize = 40;

/// Counts the cases of whole steps that are asked for.
pub(crate) fn run(run: &mut Run<'_>) -> Result<()> {
    for gpu in &GPUS {
        let (tflops, terabytes) = (gpu.flops / 1e12, gpu.memory / 1e12);
        run.note(&format!(
            "counted for {}: {tflops} TFLOP/s of bf16, {terabytes} TB/s, PCIe 64 GB/s each way",
            gpu.name
        ))?;
        for case in CASES {
            if let (Work::Step(step), true) = (&case.work, run.options.times(case.name)) {
                count(run, gpu, case.name, &step.sized(run))?;
            }
        }
    }
    Ok(())
}

/// The fastest settings whose plan fits the device, whatever host memory there is here.
fn settings(config: &ModelConfig, base: &EngineOptions, bytes: usize) -> Result<Option<EngineOptions>> {
    for (recompute, activation_offloading) in SETTINGS {
        let options = EngineOptions { recompute, activation_offloading, ..base.clone() };
        // As the engine on such a GPU.
        let options = with_logits_rows(config, &options, DeviceKind::Cuda, Some((bytes, bytes + (1 << 30))))?;
        if plan_memory_of(config, &options, DeviceKind::Cuda)?.total_bytes + MARGIN <= bytes {
            return Ok(Some(options));
        }
    }
    Ok(None)
}

/// Whether a leaf goes over the link to the host, concurrently with the others.
fn is_copy(leaf: &str) -> bool {
    leaf.starts_with("transfer") || leaf.starts_with("upload")
}

impl Gpu {
    fn least(&self, total: &LeafTotal) -> f64 {
        (total.flops / self.flops).max(total.bytes / self.memory)
    }
}

fn count(run: &mut Run<'_>, gpu: &Gpu, name: &'static str, step: &Step) -> Result<()> {
    let least = |total: &LeafTotal| gpu.least(total);
    if step.peers_memory {
        return super::skipped(run, name, "how much memory the peer takes, only a run shows");
    }
    let dir = step.folder(run);
    let config = ModelConfig::from_dir(&dir)?;
    let logits_16bit = run.options.logits_16bit;
    let base = step.options(EngineOptions { dtype: DType::Bf16, logits_16bit, adam: ADAM, ..EngineOptions::default() });
    let Some(options) = settings(&config, &base, gpu.bytes)? else {
        return super::skipped(run, name, "no settings fit");
    };
    let device = PlanBackend::of(DeviceKind::Cuda).with_memory(gpu.bytes);
    let mut backend = Box::new(ProfileBackend::new(Box::new(device)));
    backend.model(Rates { flops: gpu.flops, memory: gpu.memory, link: LINK });
    let mut engine = Engine::open(backend, &dir, Weights::Unset, &options)?;
    let batches: Vec<_> =
        (0..step.micro_batches).map(|m| batch(config.vocab_size, step.tokens, step.seq, m as u64 + 1)).collect();
    let hyper = Hyper { learning_rate: 1e-5, max_grad_norm: 1.0 };
    // With `optimizer_offload` a step begins with the update that the one before has left.
    engine.step(&batches, hyper)?;
    engine.backend_mut().enable()?;
    let (before, waited_before) = modelled(&mut engine);
    engine.step(&batches, hyper)?;
    let (end, waited) = modelled(&mut engine);
    let mut leaves = engine.backend_mut().take()?.leaves;
    leaves.sort_by(|a, b| least(&b.1).total_cmp(&least(&a.1)));

    let (copies, leaves): (Vec<_>, Vec<_>) = leaves.into_iter().partition(|(leaf, _)| is_copy(leaf));
    let sum = |of: &dyn Fn(&LeafTotal) -> f64| leaves.iter().map(|(_, total)| of(total)).sum::<f64>();
    let (flops, all) = (sum(&|total| total.flops), sum(&least));
    let products = sum(&|total| if total.flops > 0.0 { least(total) } else { 0.0 });
    let per_token = Flops::of(&config);
    let tokens = step.tokens * step.micro_batches;
    let model = (per_token.per_token + per_token.attention * step.seq as f64) * tokens as f64;
    let copied = copies.iter().map(|(_, total)| total.bytes).sum::<f64>();

    run.note(&format!(
        "{name}: one step of {} x {} tokens, recompute {:?}",
        step.micro_batches, step.tokens, options.recompute
    ))?;
    run.note(&format!("{:44} {:>6} {:>11} {:>9} {:>10} {:>6}", "leaf", "calls", "GFLOP", "GB", "least ms", "share"))?;
    for (leaf, total) in leaves.iter().take(SHOWN) {
        let share = 100.0 * least(total) / all;
        let (gflop, gb) = (total.flops / 1e9, total.bytes / 1e9);
        run.note(&format!(
            "{leaf:44} {:6} {gflop:11.1} {gb:9.3} {:10.3} {share:5.1}%",
            total.calls,
            least(total) * 1e3
        ))?;
    }
    let rest: f64 = leaves.iter().skip(SHOWN).map(|(_, total)| least(total)).sum();
    run.note(&format!("{:44} {:>38.3} {:5.1}%", "all others", rest * 1e3, 100.0 * rest / all))?;
    run.case(json!({
        "case": name, "ok": true, "counted": true, "for": gpu.name, "logits_rows": options.loss_seq_chunk_size,
        "logits_16bit": logits_16bit, "recompute": format!("{:?}", options.recompute),
        "activation_offloading": options.activation_offloading, "optimizer_offload": options.optimizer_offload,
        "tokens": tokens, "leaves": leaves.iter().map(|(_, total)| total.calls).sum::<usize>(),
        "model_tflop": model / 1e12, "tflop": flops / 1e12, "least_ms": all * 1e3, "products_ms": products * 1e3,
        "memory_ms": (all - products) * 1e3, "link_gb": copied / 1e9, "link_ms": copied / 2.0 / LINK * 1e3,
        "mfu_at_most": model / (PEAK_TFLOPS * 1e12) / all,
        "step_ms": (end - before) * 1e3, "waits_for_link_ms": (waited - waited_before) * 1e3,
    }))
}

/// When the leaves would be done, and how long of that they would have waited for copies; in seconds.
fn modelled(engine: &mut Engine<ProfileBackend<PlanBackend>>) -> (f64, f64) {
    engine.backend_mut().timeline().map_or((0.0, 0.0), |timeline| (timeline.end(), timeline.waited()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_leaf_takes_as_long_as_the_slower_of_its_operations_and_its_bytes() {
        let total = |flops, bytes| LeafTotal { flops, bytes, ..LeafTotal::default() };
        assert_eq!(GPUS[0].least(&total(989e12, 1.0)), 1.0);
        assert_eq!(GPUS[0].least(&total(1.0, 6.7e12)), 2.0);
    }
}
