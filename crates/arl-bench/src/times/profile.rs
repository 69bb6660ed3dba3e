//! Where a step goes: each leaf's share, its rate next to the rates measured in the same run, and the gaps between leaves.

use arl_engine::backend::profile::{LeafTotal, ProfileBackend};
use arl_engine::{Engine, Hyper, Weights};
use arl_model::{ModelConfig, Result};
use serde_json::{Value, json};

use super::rate::Ceilings;
use super::step::{Room, Step, fitting};
use super::{Times, batch, free_bytes, is_oom, skipped};
use crate::options::word;
use crate::run::Run;

/// Profiles one step, after two that are not looked at.
pub(super) fn case(run: &mut Run<'_>, times: &Times, name: &'static str, step: &Step) -> Result<()> {
    let step = step.sized(run);
    let dir = step.folder(run);
    let config = ModelConfig::from_dir(&dir)?;
    let backend = run.open()?;
    let base = step.options(super::options(run));
    let room = Room::of(run, free_bytes(&*backend)?);
    let Some((options, _)) = fitting(&config, &base, backend.kind(), room)?.into_iter().next() else {
        return skipped(run, name, "no settings fit the memory that is free");
    };
    let profiled = Box::new(ProfileBackend::new(backend));
    let mut engine = match Engine::open(profiled, &dir, Weights::Random(0), &options) {
        Ok(engine) => engine,
        Err(error) if is_oom(&error) => return skipped(run, name, &error.to_string()),
        Err(error) => return Err(error),
    };
    let batches: Vec<_> =
        (0..step.micro_batches).map(|m| batch(config.vocab_size, step.tokens, step.seq, m as u64 + 1)).collect();
    let hyper = Hyper { learning_rate: 1e-5, max_grad_norm: 1.0 };
    for _ in 0..2 {
        engine.step(&batches, hyper)?;
    }
    engine.backend_mut().enable()?;
    let whole = engine.step(&batches, hyper)?.seconds;
    let profile = engine.backend_mut().take()?;
    drop(engine);

    let in_leaves: f64 = profile.leaves.iter().map(|(_, total)| total.seconds).sum();
    run.note(&format!(
        "{name}: one step of {} x {} tokens, recompute {:?}",
        step.micro_batches, step.tokens, options.recompute
    ))?;
    run.note(&format!(
        "{:44} {:>6} {:>10} {:>6} {:>10} {:>10} {:>9} {:>9} {:>10} {:>7}",
        "leaf", "calls", "ms", "share", "GFLOP", "GB", "TFLOP/s", "GB/s", "least ms", "of it"
    ))?;
    for (leaf, total) in &profile.leaves {
        run.note(&row(leaf, total, in_leaves, &times.ceilings))?;
    }
    let least = |total: &LeafTotal| times.ceilings.least_seconds(total.flops, total.bytes);
    let timed = || profile.leaves.iter().filter(|(_, total)| total.seconds > 0.0);
    let least: f64 = timed().map(|(_, total)| least(total)).sum();
    run.note(&format!(
        "all leaves {:.2} ms, at least {:.2} ms; gaps between them {:.2} ms; the step {:.2} ms",
        in_leaves * 1e3,
        least * 1e3,
        profile.gaps * 1e3,
        whole * 1e3
    ))?;
    let leaves: Vec<Value> = profile.leaves.iter().map(|(leaf, total)| json!([leaf, total.seconds * 1e3])).collect();
    run.case(json!({
        "case": name, "ok": true, "profile": true, "rehearsal": run.options.rehearse, "attention": word(options.attention), "step_ms": whole * 1e3,
        "leaves_ms": in_leaves * 1e3, "least_ms": least * 1e3, "gaps_ms": profile.gaps * 1e3, "by_leaf_ms": leaves,
    }))
}

/// A leaf's line of the table. A copy concurrent with the leaves has bytes, and no time of its own.
fn row(leaf: &str, total: &LeafTotal, all: f64, ceilings: &Ceilings) -> String {
    let least = ceilings.least_seconds(total.flops, total.bytes);
    let rate = |amount: f64| if total.seconds > 0.0 { amount / total.seconds } else { 0.0 };
    format!(
        "{leaf:44} {:6} {:10.3} {:5.1}% {:10.1} {:10.3} {:9.1} {:9.1} {:10.3} {:6.1}%",
        total.calls,
        total.seconds * 1e3,
        100.0 * total.seconds / all,
        total.flops / 1e9,
        total.bytes / 1e9,
        rate(total.flops) / 1e12,
        rate(total.bytes) / 1e9,
        least * 1e3,
        100.0 * rate(least)
    )
}
