//! Whole optimizer steps of a model: the settings that fit, the steps, the figures.

use std::path::PathBuf;
use std::time::Instant;

use arl_engine::backend::{Backend, DType, DeviceKind};
use arl_engine::{BatchSize, Engine, EngineOptions, Flops, Hyper, MemoryPlan, Recompute, Weights, plan_memory_of};
use arl_model::{ModelConfig, Result};
use serde_json::{Value, json};

use super::goal::{self, Goal, PEAK_TFLOPS, reached};
use super::{Times, algorithms, batch, free_bytes, gib, is_oom, skipped};
use crate::options::word;
use crate::run::Run;

/// Which steps.
#[derive(Clone, Debug)]
pub(super) struct Step {
    /// A folder of `configs`.
    pub(super) config: &'static str,
    /// Tokens of a micro-batch.
    pub(super) tokens: usize,
    /// Tokens of a sequence.
    pub(super) seq: usize,
    pub(super) micro_batches: usize,
    pub(super) optimizer_offload: bool,
    /// Weights and moments in bf16 alone, as the peer and llmq have them, here rounded at random.
    pub(super) bf16_state: bool,
    /// In no more memory than the peer takes.
    pub(super) peers_memory: bool,
}

impl Step {
    pub(super) const fn of(config: &'static str) -> Self {
        Step {
            config,
            tokens: super::TOKENS,
            seq: super::SEQ,
            micro_batches: 1,
            optimizer_offload: false,
            bf16_state: false,
            peers_memory: false,
        }
    }

    /// The same with a tiny model where the run is a rehearsal.
    pub(super) fn sized(&self, run: &Run<'_>) -> Self {
        if !run.options.rehearse {
            return self.clone();
        }
        Step { config: "qwen3-cpu-8m", tokens: 128, seq: 64, micro_batches: self.micro_batches.min(2), ..self.clone() }
    }

    pub(super) fn folder(&self, run: &Run<'_>) -> PathBuf {
        run.options.home.join("configs").join(self.config)
    }

    /// What its engine is made of, but for what is recomputed.
    pub(super) fn options(&self, base: EngineOptions) -> EngineOptions {
        EngineOptions {
            optimizer_offload: self.optimizer_offload,
            stochastic_rounding: self.bf16_state && base.dtype == DType::Bf16,
            bf16_moments: self.bf16_state,
            max_batch: BatchSize { tokens: self.tokens, sequences: self.tokens / self.seq, ..BatchSize::default() },
            ..base
        }
    }
}

/// Settings from the fastest to the smallest: what is recomputed, and whether activations are offloaded.
pub(super) const SETTINGS: [(Recompute, bool); 6] = [
    (Recompute::Off, false),
    (Recompute::Norms, false),
    (Recompute::Mlp, false),
    (Recompute::Mlp, true),
    (Recompute::Block, false),
    (Recompute::Block, true),
];

/// Left for what the plan does not know: fragments, the driver's own.
pub(super) const MARGIN: usize = 512 << 20;

/// What a case may take of memory, in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room {
    /// Free memory of the device; `None`: it is not known.
    pub(super) free: Option<usize>,
    /// Of the host.
    pub(super) host: usize,
}

impl Room {
    /// On a device with so much free memory.
    pub(super) fn of(run: &Run<'_>, free: Option<usize>) -> Self {
        let host = run.options.host_gib.map_or_else(host_memory, |gib| (gib as usize) << 30);
        Room { free, host }
    }
}

/// Settings whose plans fit, the fastest first; where the device's memory is not known, the usual ones.
pub(super) fn fitting(
    config: &ModelConfig,
    base: &EngineOptions,
    kind: DeviceKind,
    room: Room,
) -> Result<Vec<(EngineOptions, MemoryPlan)>> {
    let mut found = Vec::new();
    for (recompute, activation_offloading) in SETTINGS {
        let options = EngineOptions { recompute, activation_offloading, ..base.clone() };
        let plan = plan_memory_of(config, &options, kind)?;
        let fits = match room.free {
            Some(free) => plan.total_bytes + MARGIN <= free && plan.host_bytes <= room.host,
            None => recompute == Recompute::Norms,
        };
        if fits {
            found.push((options, plan));
        }
    }
    Ok(found)
}

/// All of the host's memory, or of its container's, less some for the process itself. Not what is free now: in virtual
/// machines whose memory grows with its use that starts far too low. Whether it can be had, the attempt shows.
fn host_memory() -> usize {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:")).unwrap_or_default();
    let total = line.trim().trim_end_matches(" kB").parse::<usize>().map_or(0, |kib| kib << 10);
    let limit = std::fs::read_to_string("/sys/fs/cgroup/memory.max").unwrap_or_default();
    limit.trim().parse().map_or(total, |limit: usize| total.min(limit)).saturating_sub(2 << 30)
}

/// What the steps took.
pub(super) struct Measured {
    /// Of each timed step, ascending.
    pub(super) seconds: Vec<f64>,
    /// Memory that the engine took of the device.
    pub(super) used: Option<usize>,
    /// Why attention is not the library's, for example.
    notice: Option<String>,
    /// Algorithms of matrix products next to the first proposals.
    algorithms: Value,
    loss: f64,
}

impl Measured {
    pub(super) fn median(&self) -> f64 {
        self.seconds[self.seconds.len() / 2]
    }
}

/// Why a case took no step, though it fits.
const NO_TIME: &str = "no step was done in time";

/// Steps before those that are timed; one where a step takes longer than [`SLOW`] seconds.
const WARM_UP: usize = 2;
const SLOW: f64 = 5.0;

/// Opens an engine, warms up, and takes the steps that are timed, as many as `until` seconds leave time for. As in a run, a
/// step is submitted before the figures of the one before it are waited for.
pub(super) fn measure(
    run: &Run<'_>,
    backend: Box<dyn Backend>,
    step: &Step,
    options: &EngineOptions,
    until: f64,
) -> Result<Option<Measured>> {
    let start = Instant::now();
    let before = free_bytes(&*backend)?;
    let mut engine = Engine::open(backend, &step.folder(run), Weights::Random(0), options)?;
    let vocab = engine.config().vocab_size;
    let mut seconds = Vec::new();
    let (mut warm_up, mut number) = (WARM_UP, 0);
    let submit = |engine: &mut Engine<dyn Backend>, number: usize| {
        let seed = |micro| (number * step.micro_batches + micro + 1) as u64;
        let batches: Vec<_> = (0..step.micro_batches).map(|m| batch(vocab, step.tokens, step.seq, seed(m))).collect();
        engine.submit(&batches, Hyper { learning_rate: 1e-5, max_grad_norm: 1.0 })
    };
    let mut queued = submit(&mut engine, 0)?;
    let loss = loop {
        engine.apply(queued)?;
        let next = submit(&mut engine, number + 1)?;
        let stats = engine.finish(queued)?;
        if number == 0 && stats.seconds > SLOW {
            warm_up = 1;
        } else if number >= warm_up {
            seconds.push(stats.seconds);
        }
        number += 1;
        let no_time = start.elapsed().as_secs_f64() + 1.2 * stats.seconds > until;
        if no_time || number == warm_up + run.options.steps {
            engine.discard();
            break stats.loss;
        }
        queued = next;
    };
    if seconds.is_empty() {
        return Ok(None);
    }
    seconds.sort_by(f64::total_cmp);
    let after = free_bytes(engine.backend_mut())?;
    let used = before.zip(after).map(|(before, after)| before.saturating_sub(after));
    let algorithms = algorithms::chosen(engine.backend_mut());
    Ok(Some(Measured { seconds, used, notice: engine.notice(), algorithms, loss }))
}

/// Dense bf16 on tensor cores, in TFLOP/s, as NVIDIA's data sheets say.
fn peak(device: &str) -> Option<f64> {
    let known = [("H100 PCIe", 756.0), ("H100", PEAK_TFLOPS), ("H200", PEAK_TFLOPS), ("A100", 312.0)];
    known.iter().find(|(name, _)| device.contains(name)).map(|(_, peak)| *peak)
}

/// What a case came to, for the peer that is run later.
pub(super) struct Own {
    name: &'static str,
    goals: &'static [Goal],
    step: Step,
    tokens_per_s: f64,
    bytes: usize,
}

/// Runs a case and prints its line. Steps are taken for `until` seconds at most.
pub(super) fn case(
    run: &mut Run<'_>,
    times: &mut Times,
    (name, goals): (&'static str, &'static [Goal]),
    step: &Step,
    until: f64,
) -> Result<Option<Own>> {
    let step = step.sized(run);
    let dir = step.folder(run);
    let config = ModelConfig::from_dir(&dir)?;
    let backend = run.open()?;
    let (kind, mut free, device) = (backend.kind(), free_bytes(&*backend)?, backend.name());
    drop(backend);
    if step.peers_memory {
        // It was run before, outside of this case's limit.
        let taken = times
            .peer
            .best(run, &dir, step.tokens, step.seq)?
            .map(|best| (best.peak_gib * f64::from(1 << 30)) as usize);
        free = free.map(|free| free.min(taken.unwrap_or(free)));
    }
    let base = step.options(super::options(run));
    let room = Room::of(run, free);
    let mut outcome = Err(too_large(&config, &base, kind, room)?);
    // A plan does not know how much host memory can be pinned.
    for (options, plan) in fitting(&config, &base, kind, room)? {
        outcome = match measure(run, run.open()?, &step, &options, until) {
            Ok(Some(measured)) => Ok((options, plan, measured)),
            Ok(None) => Err(NO_TIME.into()),
            Err(error) if is_oom(&error) => {
                run.note(&format!("{name}: recompute {:?} {error}", options.recompute))?;
                outcome = Err(error.to_string());
                continue;
            }
            Err(error) => return Err(error),
        };
        break;
    }
    let (options, plan, measured) = match outcome {
        Ok(outcome) => outcome,
        Err(why) => return left_out(run, name, goals, &why).map(|()| None),
    };

    let flops = Flops::of(&config);
    let per_token = flops.per_token + flops.attention * step.seq as f64;
    let tokens = (step.tokens * step.micro_batches) as f64;
    let rate = tokens / measured.median();
    let tflops = per_token * rate / 1e12;
    let mfu = peak(&device).map(|peak| tflops / peak);
    let results = goal::of_step(goals, per_token, rate, times.ceilings.gemm_tflops);
    let done = reached(run, &results);
    run.case(json!({
        "case": name, "ok": true, "reached": done, "goals": results, "rehearsal": run.options.rehearse,
        "model": step.config, "dtype": format!("{:?}", options.dtype), "logits_16bit": options.logits_16bit,
        "tokens": step.tokens, "seq": step.seq,
        "micro_batches": step.micro_batches, "recompute": format!("{:?}", options.recompute),
        "attention": word(options.attention), "notice": measured.notice,
        "activation_offloading": options.activation_offloading, "optimizer_offload": options.optimizer_offload,
        "stochastic_rounding": options.stochastic_rounding, "bf16_moments": options.bf16_moments,
        "step_s": measured.median(), "step_s_min": measured.seconds[0],
        "step_s_max": measured.seconds[measured.seconds.len() - 1], "steps": measured.seconds.len(),
        "tokens_per_s": rate, "flops_per_token": per_token, "model_tflops": tflops, "mfu": mfu,
        "of_measured_gemm": tflops / times.ceilings.gemm_tflops,
        "planned_gib": gib(plan.total_bytes), "used_gib": measured.used.map(gib), "host_gib": gib(plan.host_bytes),
        "loss": measured.loss, "matmul_algorithms": measured.algorithms,
    }))?;
    let bytes = measured.used.unwrap_or(plan.total_bytes);
    Ok(Some(Own { name, goals, step, tokens_per_s: rate, bytes }))
}

/// The peer next to what a case came to; nothing where there is no peer, or nothing that it is to be compared with.
pub(super) fn compare_with_peer(run: &mut Run<'_>, times: &mut Times, own: &Own) -> Result<()> {
    let Own { name, goals, step, tokens_per_s, bytes } = own;
    if goal::times_peer(goals).is_none() {
        return Ok(());
    }
    let Some(best) = times.peer.best(run, &step.folder(run), step.tokens, step.seq)? else { return Ok(()) };
    let results = goal::of_peer(goals, tokens_per_s / best.tokens_per_s, gib(*bytes) - best.peak_gib);
    let done = reached(run, &results);
    run.case(json!({
        "case": name, "against": "peer", "ok": true, "reached": done, "goals": results, "rehearsal": run.options.rehearse,
        "tokens_per_s": tokens_per_s, "peer": best.line,
    }))
}

/// A case that took no step. Where it was to fit the memory, it has missed its goal.
fn left_out(run: &mut Run<'_>, name: &'static str, goals: &[Goal], why: &str) -> Result<()> {
    let missed = goals.contains(&Goal::Fits) && !run.on_host() && why != NO_TIME;
    if !missed {
        return skipped(run, name, why);
    }
    run.case(json!({ "case": name, "ok": true, "skipped": why, "reached": false }))
}

/// Why nothing fits.
fn too_large(config: &ModelConfig, base: &EngineOptions, kind: DeviceKind, room: Room) -> Result<String> {
    let least = EngineOptions { recompute: Recompute::Block, activation_offloading: true, ..base.clone() };
    let plan = plan_memory_of(config, &least, kind)?;
    let (needs, has) = (gib(plan.total_bytes), gib(room.free.unwrap_or(0)));
    let (host, host_has) = (gib(plan.host_bytes), gib(room.host));
    Ok(format!("does not fit: {needs} GiB planned of {has} GiB that are free, {host} of {host_has} GiB in host memory"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fastest_settings_that_fit_are_taken() {
        let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../__test__/golden/window-bias");
        let config = ModelConfig::from_dir(&dir).unwrap();
        let base = EngineOptions {
            max_batch: BatchSize { tokens: 4096, sequences: 1, ..BatchSize::default() },
            ..EngineOptions::default()
        };
        let plan = |recompute, activation_offloading| {
            let options = EngineOptions { recompute, activation_offloading, ..base.clone() };
            plan_memory_of(&config, &options, DeviceKind::Cuda).unwrap().total_bytes
        };
        let all = |free, host| {
            let found = fitting(&config, &base, DeviceKind::Cuda, Room { free, host }).unwrap();
            found.iter().map(|(options, _)| (options.recompute, options.activation_offloading)).collect::<Vec<_>>()
        };
        let chosen = |free| all(free, usize::MAX).first().copied();
        assert_eq!(chosen(Some(usize::MAX)), Some((Recompute::Off, false)));
        assert_eq!(chosen(Some(plan(Recompute::Norms, false) + MARGIN)), Some((Recompute::Norms, false)));
        assert_eq!(chosen(Some(plan(Recompute::Block, false) + MARGIN)), Some((Recompute::Block, false)));
        assert_eq!(chosen(Some(MARGIN)), None);
        assert_eq!(chosen(None), Some((Recompute::Norms, false)));
        assert_eq!(all(Some(usize::MAX), usize::MAX), SETTINGS);
        let offloaded = EngineOptions { optimizer_offload: true, ..base.clone() };
        let with_host = |host| {
            let room = Room { free: Some(usize::MAX), host };
            fitting(&config, &offloaded, DeviceKind::Cuda, room).unwrap().len()
        };
        assert_eq!((with_host(0), with_host(usize::MAX)), (0, SETTINGS.len()));
    }

    #[test]
    fn peaks_are_those_of_the_data_sheets() {
        assert_eq!(peak("NVIDIA H100 80GB HBM3"), Some(989.0));
        assert_eq!(peak("NVIDIA H100 PCIe"), Some(756.0));
        assert_eq!(peak("cpu"), None);
    }
}
