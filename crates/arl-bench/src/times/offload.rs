//! What activation offloading costs: the same steps with and without it.

use arl_engine::backend::Backend;
use arl_engine::{BatchSize, EngineOptions, Recompute};
use arl_model::Result;
use serde_json::json;

use super::goal::{Goal, of_ratio, reached};
use super::step::{Step, measure};
use super::{Times, gib, is_oom, skipped};
use crate::options::word;
use crate::run::Run;

/// Runs the case.
pub(super) fn case(run: &mut Run<'_>, times: &Times, (name, goals): (&'static str, &[Goal]), until: f64) -> Result<()> {
    let step = Step { tokens: 32_768, ..Step::of("qwen3-4b") }.sized(run);
    let mut medians = Vec::new();
    let mut used = Vec::new();
    for activation_offloading in [false, true] {
        let options = EngineOptions {
            recompute: Recompute::Block,
            activation_offloading,
            max_batch: BatchSize { tokens: step.tokens, sequences: step.tokens / step.seq, ..BatchSize::default() },
            ..super::options(run)
        };
        let backend: Box<dyn Backend> = run.open()?;
        match measure(run, backend, &step, &options, until) {
            Ok(Some(measured)) => {
                medians.push(measured.median());
                used.push(measured.used.map(gib));
            }
            Ok(None) => return skipped(run, name, "no step was done in time"),
            Err(error) if is_oom(&error) => return skipped(run, name, &error.to_string()),
            Err(error) => return Err(error),
        }
    }
    let goals = of_ratio(goals, medians[1] / medians[0]);
    let done = reached(run, &goals);
    run.case(json!({
        "case": name, "ok": true, "reached": done, "goals": goals, "rehearsal": run.options.rehearse,
        "model": step.config, "tokens": step.tokens, "seq": step.seq, "recompute": "Block", "attention": word(super::attention(run)),
        "step_s_without": medians[0], "step_s_with": medians[1], "used_gib_without": used[0], "used_gib_with": used[1],
        "to_host_gb_s": times.ceilings.to_host_gb_s,
    }))
}
