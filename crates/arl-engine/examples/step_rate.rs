//! How fast the training step is: random weights from a config, random ids, every token trained, AdamW (0.9, 0.95),
//! weight decay 0.1, clipping at 1. Prints one JSON line; with `--profile` also the leaves, the slowest first.
//!
//! `step_rate --config DIR [--tokens 2048] [--seq 512] [--dtype f32|bf16|f16] [--recompute off|norms|mlp|block]
//! [--chunk ROWS] [--steps 8] [--warmup 2] [--threads N] [--lora RANK [--dropout P]] [--profile]`
//!
//! Model FLOPs a token: 6 x parameters of the matrix products (head included) + 6 L Hq d T; see `Flops`.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command's output")]

use std::path::{Path, PathBuf};
use std::time::Instant;

use arl_engine::backend::DType;
use arl_engine::backend::cpu::CpuBackend;
use arl_engine::backend::profile::ProfileBackend;
use arl_engine::{Adam, BatchSize, Engine, EngineOptions, Flops, Hyper, LoraOptions, MicroBatch, Recompute, Weights};
use arl_model::LoraConfig;

struct Arguments {
    config: PathBuf,
    tokens: usize,
    seq: usize,
    dtype: DType,
    recompute: Recompute,
    chunk: Option<usize>,
    steps: usize,
    warmup: usize,
    threads: usize,
    /// Rank of adapters of every layer; 0: the whole model is trained.
    lora: usize,
    dropout: f64,
    profile: bool,
}

fn arguments() -> Result<Arguments, String> {
    let mut parsed = Arguments {
        config: PathBuf::new(),
        tokens: 2048,
        seq: 512,
        dtype: DType::F32,
        recompute: Recompute::Norms,
        chunk: None,
        steps: 8,
        warmup: 2,
        threads: 0,
        lora: 0,
        dropout: 0.0,
        profile: false,
    };
    let mut words = std::env::args().skip(1);
    while let Some(flag) = words.next() {
        if flag == "--profile" {
            parsed.profile = true;
            continue;
        }
        let value = words.next().ok_or(format!("{flag} needs a value"))?;
        let number = || value.parse::<usize>().map_err(|e| format!("{flag}: {e}"));
        match flag.as_str() {
            "--config" => parsed.config = PathBuf::from(&value),
            "--tokens" => parsed.tokens = number()?,
            "--seq" => parsed.seq = number()?,
            "--chunk" => parsed.chunk = Some(number()?),
            "--steps" => parsed.steps = number()?,
            "--warmup" => parsed.warmup = number()?,
            "--threads" => parsed.threads = number()?,
            "--lora" => parsed.lora = number()?,
            "--dropout" => parsed.dropout = value.parse().map_err(|e| format!("{flag}: {e}"))?,
            "--dtype" => {
                parsed.dtype = match value.as_str() {
                    "bf16" => DType::Bf16,
                    "f16" => DType::F16,
                    _ => DType::F32,
                }
            }
            "--recompute" => {
                parsed.recompute = match value.as_str() {
                    "off" => Recompute::Off,
                    "norms" => Recompute::Norms,
                    "mlp" => Recompute::Mlp,
                    "block" => Recompute::Block,
                    _ => return Err(format!("--recompute is off, norms, mlp or block, not {value}")),
                }
            }
            _ => return Err(format!("{flag} is no option")),
        }
    }
    if parsed.seq == 0 || !parsed.tokens.is_multiple_of(parsed.seq) || parsed.steps == 0 {
        return Err("--tokens must be a multiple of --seq, --steps at least 1".into());
    }
    Ok(parsed)
}

/// Sequences of random ids; each token's target is the next one, the last one's the first.
fn batch(vocab: usize, tokens: usize, seq: usize, random: &mut u64) -> MicroBatch {
    let mut next = || {
        *random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((*random >> 33) as usize % vocab) as i32
    };
    let input_ids: Vec<i32> = (0..tokens).map(|_| next()).collect();
    let targets = input_ids.chunks(seq).flat_map(|s| s.iter().skip(1).chain(s.first()).copied()).collect();
    let positions = (0..tokens).map(|t| (t % seq) as i32).collect();
    let cu_seqlens = (0..=tokens / seq).map(|s| (s * seq) as i32).collect();
    MicroBatch { input_ids, targets, positions, cu_seqlens, ..MicroBatch::default() }
}

/// Largest resident set so far, in MiB; 0 where the system does not say.
fn peak_mib() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|kib| kib.parse::<f64>().ok()).unwrap_or(0.0) / 1024.0
}

/// Adapters of every linear layer.
fn lora(arguments: &Arguments) -> arl_model::Result<Option<LoraOptions>> {
    if arguments.lora == 0 {
        return Ok(None);
    }
    let text = serde_json::json!({
        "target_modules": "all-linear", "r": arguments.lora, "lora_alpha": 2 * arguments.lora,
        "lora_dropout": arguments.dropout,
    });
    let config = LoraConfig::from_json(&text.to_string(), Path::new("--lora"))?;
    Ok(Some(LoraOptions { config, seed: 0 }))
}

fn run(arguments: &Arguments) -> Result<(), String> {
    let start = Instant::now();
    let message = |e: arl_model::Error| e.to_string();
    let options = EngineOptions {
        dtype: arguments.dtype,
        recompute: arguments.recompute,
        loss_seq_chunk_size: arguments.chunk,
        max_batch: BatchSize {
            tokens: arguments.tokens,
            sequences: arguments.tokens / arguments.seq,
            ..BatchSize::default()
        },
        adam: Adam { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1 },
        lora: lora(arguments).map_err(message)?,
        ..EngineOptions::default()
    };
    let backend = ProfileBackend::new(Box::new(CpuBackend::new()));
    let mut engine =
        Engine::open(Box::new(backend), &arguments.config, Weights::Random(0), &options).map_err(message)?;
    let hyper = Hyper { learning_rate: 1e-5, max_grad_norm: 1.0 };
    let (mut random, mut seconds, mut losses) = (1u64, Vec::new(), Vec::new());
    let mut first_step = 0.0;
    for step in 0..arguments.warmup + arguments.steps {
        if arguments.profile && step == arguments.warmup {
            engine.backend_mut().enable().map_err(message)?;
        }
        let vocab = engine.config().vocab_size;
        let batch = batch(vocab, arguments.tokens, arguments.seq, &mut random);
        let stats = engine.step(&[batch], hyper).map_err(message)?;
        losses.push(stats.loss);
        if step == 0 {
            first_step = start.elapsed().as_secs_f64();
        }
        if step >= arguments.warmup {
            seconds.push(stats.seconds);
        }
    }
    seconds.sort_by(f64::total_cmp);
    let median = seconds[seconds.len() / 2];
    let rate = arguments.tokens as f64 / median;
    let flops = engine.lora().map_or_else(|| Flops::of(engine.config()), |lora| Flops::adapted(engine.config(), lora));
    let per_token = flops.per_token + flops.attention * arguments.seq as f64;
    println!(
        "{}",
        serde_json::json!({
            "device": engine.device(),
            "dtype": format!("{:?}", arguments.dtype).to_lowercase(),
            "recompute": format!("{:?}", arguments.recompute).to_lowercase(),
            "tokens": arguments.tokens,
            "seq": arguments.seq,
            "parameters": flops.parameters,
            "trained": flops.trained,
            "step_s": median,
            "tokens_per_s": rate,
            "model_gflops": per_token * rate / 1e9,
            "first_step_s": first_step,
            "peak_mib": peak_mib(),
            "plan_mib": engine.memory().total_bytes as f64 / 1048576.0,
            "plan": engine.memory().categories.iter().map(|(name, bytes)| (name.to_string(), *bytes as f64 / 1048576.0)).collect::<std::collections::BTreeMap<_, _>>(),
            "first_loss": losses[0],
            "last_loss": losses[losses.len() - 1],
        })
    );
    if arguments.profile {
        let profile = engine.backend_mut().take().map_err(message)?;
        let (totals, gaps) = (profile.leaves, profile.gaps);
        let all: f64 = totals.iter().map(|(_, t)| t.seconds).sum();
        let steps = arguments.steps as f64;
        println!("{:52} {:>8} {:>10} {:>6} {:>10} {:>8}", "leaf", "calls", "ms/step", "%", "GFLOP/s", "GB/s");
        for (name, total) in totals {
            println!(
                "{name:52} {:8.0} {:10.2} {:6.1} {:10.1} {:8.1}",
                total.calls as f64 / steps,
                total.seconds / steps * 1e3,
                100.0 * total.seconds / all,
                total.flops / total.seconds / 1e9,
                total.bytes / total.seconds / 1e9
            );
        }
        println!("{:52} {:8} {:10.2}", "all leaves", "", all / steps * 1e3);
        println!("{:52} {:8} {:10.2}", "between leaves", "", gaps / steps * 1e3);
    }
    Ok(())
}

fn main() -> std::process::ExitCode {
    let result = arguments().and_then(|arguments| {
        if arguments.threads == 0 {
            return run(&arguments);
        }
        let pool = rayon::ThreadPoolBuilder::new().num_threads(arguments.threads).build();
        pool.map_err(|e| e.to_string())?.install(|| run(&arguments))
    });
    match result {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{message}");
            std::process::ExitCode::FAILURE
        }
    }
}
