//! The loss of a step next to the three matrix products that it cannot do without: the logits, and the gradients of the head
//! and of its input. The leaves are those of a real step of a model with one layer.

use std::path::{Path, PathBuf};

use arl_engine::backend::profile::ProfileBackend;
use arl_engine::backend::{Backend, DType, Layout, Matmul, Pool};
use arl_engine::{BatchSize, Engine, EngineOptions, Hyper, Recompute, Weights};
use arl_model::{Error, ErrorCode, ModelConfig, Result};
use serde_json::{Value, json};

use super::goal::{Goal, of_ratio, reached};
use super::rate::{Places, fill, rows, seconds};
use super::{batch, is_oom, skipped};
use crate::options::word;
use crate::run::Run;

const STEPS: usize = 5;

/// Runs the case.
pub(super) fn case(run: &mut Run<'_>, name: &'static str, goals: &[Goal]) -> Result<()> {
    let (model, tokens, seq) = if run.options.rehearse { ("qwen3-cpu-8m", 128, 64) } else { ("qwen3-8b", 8192, 2048) };
    let folder = tempfile::tempdir().map_err(|error| Error::io(&std::env::temp_dir(), &error))?;
    let dir = one_layer(&run.options.home.join("configs").join(model), folder.path())?;
    let config = ModelConfig::from_dir(&dir)?;
    let (vocab, hidden) = (config.vocab_size, config.hidden_size);
    let options = EngineOptions {
        recompute: Recompute::Norms,
        max_batch: BatchSize { tokens, sequences: tokens / seq, ..BatchSize::default() },
        ..super::options(run)
    };
    let both = of_a_step(run, &dir, &options, tokens, seq)
        .and_then(|loss| Ok((loss, bare_products(&mut *run.open()?, vocab, hidden, tokens, &options)?)));
    let (loss, bare) = match both {
        Ok(both) => both,
        Err(error) if is_oom(&error) => return skipped(run, name, &error.to_string()),
        Err(error) => return Err(error),
    };
    let goals = of_ratio(goals, loss / bare.iter().sum::<f64>());
    let done = reached(run, &goals);
    let [logits, of_head, of_input] = bare;
    run.case(json!({
        "case": name, "ok": true, "reached": done, "goals": goals, "rehearsal": run.options.rehearse,
        "attention": word(options.attention), "rows": tokens, "vocab": vocab, "hidden": hidden, "dtype": format!("{:?}", options.dtype),
        "logits_16bit": options.logits_16bit, "loss_ms": loss * 1e3, "logits_ms": logits * 1e3, "gradient_of_head_ms": of_head * 1e3,
        "gradient_of_input_ms": of_input * 1e3,
    }))
}

/// A copy of a model's configuration with one layer.
fn one_layer(dir: &Path, to: &Path) -> Result<PathBuf> {
    let file = dir.join("config.json");
    let text = std::fs::read_to_string(&file).map_err(|error| Error::io(&file, &error))?;
    let mut config: Value = serde_json::from_str(&text)
        .map_err(|error| Error::new(ErrorCode::Config, format!("{}: {error}", file.display())))?;
    config["num_hidden_layers"] = 1.into();
    let file = to.join("config.json");
    std::fs::write(&file, config.to_string()).map_err(|error| Error::io(&file, &error))?;
    Ok(to.to_path_buf())
}

/// Seconds of the loss's leaves in a step, the median of a few.
fn of_a_step(run: &Run<'_>, dir: &Path, options: &EngineOptions, tokens: usize, seq: usize) -> Result<f64> {
    let profiled = ProfileBackend::new(run.open()?);
    let mut engine = Engine::open(Box::new(profiled), dir, Weights::Random(0), options)?;
    let vocab = engine.config().vocab_size;
    let hyper = Hyper { learning_rate: 1e-5, max_grad_norm: 1.0 };
    let batches = [batch(vocab, tokens, seq, 1)];
    engine.step(&batches, hyper)?;
    let mut found = Vec::new();
    for _ in 0..STEPS {
        engine.backend_mut().enable()?;
        engine.step(&batches, hyper)?;
        let leaves = engine.backend_mut().take()?.leaves;
        let of_loss = |name: &str| {
            let head = name.starts_with("matmul ") && name.split([' ', '=']).any(|word| word == vocab.to_string());
            head || matches!(name, "gather_rows" | "cross_entropy" | "scatter_rows")
        };
        found.push(leaves.iter().filter(|(name, _)| of_loss(name)).map(|(_, total)| total.seconds).sum());
    }
    found.sort_by(f64::total_cmp);
    Ok(found[STEPS / 2])
}

/// Seconds of the three products over all rows at once, with the types that they have in a step.
fn bare_products(
    backend: &mut dyn Backend,
    vocab: usize,
    hidden: usize,
    tokens: usize,
    options: &EngineOptions,
) -> Result<[f64; 3]> {
    let dtype = options.dtype;
    let mut places = Places::default();
    let [x, d_x] = [(); 2].map(|()| places.take(tokens * hidden, dtype));
    let head = places.take(vocab * hidden, dtype);
    let d_head = places.take(vocab * hidden, DType::F32);
    let of_logits = if options.logits_16bit { [dtype; 2] } else { [DType::F32, backend.logits_gradient(dtype)] };
    let [logits, d_logits] = of_logits.map(|dtype| places.take(tokens * vocab, dtype));
    let scratch = backend.scratch_bytes(hidden, tokens);
    backend.reserve(Pool::Scratch, scratch)?;
    backend.reserve(Pool::Step, places.bytes)?;
    for buffer in [x, head, d_logits] {
        fill(backend, buffer);
    }
    let (x, d_x, head) = (rows(x, hidden), rows(d_x, hidden), rows(head, hidden));
    let (logits, d_logits, d_head) = (rows(logits, vocab), rows(d_logits, vocab), rows(d_head, hidden));
    let product = |layout, [m, n, k]: [usize; 3], [a, b, c]: [_; 3], accumulate| Matmul {
        layout,
        m,
        n,
        k,
        a,
        b,
        c,
        accumulate,
        bias: None,
    };
    let products = [
        product(Layout::Nt, [tokens, vocab, hidden], [x, head, logits], false),
        product(Layout::Tn, [vocab, hidden, tokens], [d_logits, x, d_head], true),
        product(Layout::Nn, [tokens, hidden, vocab], [d_logits, head, d_x], false),
    ];
    let mut found = [0.0; 3];
    for (found, op) in found.iter_mut().zip(&products) {
        *found = seconds(backend, 0.5, |backend| backend.matmul(op))?;
    }
    Ok(found)
}
