//! What is timed, once all is right: the table of cases, each with its goal and its limit of seconds.

mod algorithms;
mod context;
pub(crate) mod count;
mod goal;
mod heads;
mod loss;
mod offload;
mod peer;
mod profile;
mod rate;
mod step;

use arl_engine::backend::{Backend, Buffer, DType, Pool};
use arl_engine::{Adam, AttentionChoice, EngineOptions, MicroBatch};
use arl_model::{Error, ErrorCode, Result};
use serde_json::json;

use self::goal::Goal;
use self::peer::Peer;
use self::rate::Ceilings;
use self::step::Step;
use crate::run::{GRACE, Limit, Run};

/// What a case does.
enum Work {
    /// Whole optimizer steps of a model.
    Step(Step),
    /// The loss next to its bare matrix products.
    Loss,
    /// Attention over heads of each size.
    Heads,
    /// A step with activation offloading next to one without.
    Offload,
    /// One long sequence.
    Context,
    /// The memory plan of a longer one.
    Plan,
}

/// A case of the table.
struct Case {
    name: &'static str,
    /// Seconds after which it has failed; the peer has limits of its own.
    limit: f64,
    work: Work,
    goals: &'static [Goal],
}

/// Tokens of a micro-batch of the models from 0.6B on, and of a sequence in it.
const TOKENS: usize = 16_384;
const SEQ: usize = 2048;

/// Steps of llmq's shape: micro-batches of so many tokens in sequences of 1,024, weights and moments in bf16.
const fn as_llmq(config: &'static str, micro_batches: usize, tokens: usize) -> Work {
    Work::Step(Step { tokens, seq: 1024, micro_batches, bf16_state: true, ..Step::of(config) })
}

/// Steps of Qwen3-0.6B over single sequences.
const fn long(tokens: usize, micro_batches: usize) -> Work {
    Work::Step(Step { tokens, seq: tokens, micro_batches, ..Step::of("qwen3-0.6b") })
}

const fn case(name: &'static str, limit: f64, work: Work, goals: &'static [Goal]) -> Case {
    Case { name, limit, work, goals }
}

/// All cases: bf16, full fine-tuning, one GPU, random weights. On one H100 llmq has reached 149,500, 58,900, 30,900 and 13,850
/// tokens/s with its four models, and prime-rl 26,005 with Qwen3-0.6B at 8,192 tokens; at 65,536 it was out of memory.
const CASES: [Case; 20] = [
    case(
        "qwen2.5-0.5b",
        90.0,
        Work::Step(Step { tokens: 32_768, seq: 1024, ..Step::of("qwen2.5-0.5b") }),
        &[Goal::TokensPerS(149_500.0)],
    ),
    case("qwen2.5-0.5b-llmq", 90.0, as_llmq("qwen2.5-0.5b", 16, 32_768), &[Goal::TokensPerS(160_000.0)]),
    case("qwen3-0.6b", 90.0, Work::Step(Step::of("qwen3-0.6b")), &[Goal::Mfu(0.50), Goal::TimesPeer(2.0)]),
    case("qwen3-1.7b", 90.0, Work::Step(Step::of("qwen3-1.7b")), &[Goal::Mfu(0.56)]),
    case("qwen3-4b", 120.0, Work::Step(Step::of("qwen3-4b")), &[Goal::Mfu(0.58), Goal::TimesPeer(1.4)]),
    case(
        "qwen3-4b-bf16-state",
        120.0,
        Work::Step(Step { bf16_state: true, ..Step::of("qwen3-4b") }),
        &[Goal::Mfu(0.58)],
    ),
    case("qwen3-0.6b-8k", 90.0, long(8192, 2), &[Goal::TokensPerS(78_000.0)]),
    case("qwen3-0.6b-64k", 120.0, long(65_536, 1), &[Goal::Fits]),
    case("loss", 90.0, Work::Loss, &[Goal::AtMost("times_its_products", 1.25)]),
    case("qwen2.5-1.5b-llmq", 120.0, as_llmq("qwen2.5-1.5b", 16, 16_384), &[Goal::TokensPerS(62_000.0)]),
    case("qwen2.5-3b-llmq", 150.0, as_llmq("qwen2.5-3b", 16, 16_384), &[Goal::TokensPerS(33_000.0)]),
    case("qwen2.5-7b-llmq", 240.0, as_llmq("qwen2.5-7b", 64, 4096), &[Goal::TokensPerS(14_500.0)]),
    case("qwen3-30b-a3b-4-layers", 120.0, Work::Step(Step::of("qwen3-30b-a3b-4-layers")), &[]),
    case("hybrid-8-layers", 120.0, Work::Step(Step::of("hybrid-8-layers")), &[]),
    case("attention-heads", 60.0, Work::Heads, &[]),
    case("activation-offload", 180.0, Work::Offload, &[Goal::AtMost("times_without", 1.03)]),
    case(
        "qwen3-8b-offload",
        300.0,
        Work::Step(Step { micro_batches: 8, optimizer_offload: true, ..Step::of("qwen3-8b") }),
        &[Goal::Mfu(0.50)],
    ),
    case("context", 480.0, Work::Context, &[Goal::AtMost("times_its_attention", 1.3)]),
    case("plan-1m", 30.0, Work::Plan, &[Goal::Fits]),
    case(
        "qwen3-4b-peers-memory",
        120.0,
        Work::Step(Step { bf16_state: true, peers_memory: true, ..Step::of("qwen3-4b") }),
        &[Goal::TimesPeer(1.4)],
    ),
];

/// The names of the cases, as `--only` takes them.
pub(crate) fn names() -> Vec<&'static str> {
    CASES.iter().map(|case| case.name).collect()
}

/// What the cases of a run share.
pub(crate) struct Times {
    ceilings: Ceilings,
    peer: Peer,
}

/// Runs the cases that are asked for.
pub(crate) fn run(run: &mut Run<'_>) -> Result<()> {
    let wanted: Vec<&Case> = CASES.iter().filter(|case| run.options.times(case.name)).collect();
    if wanted.is_empty() {
        return Ok(());
    }
    if run.options.device == "emulated" {
        return run.note("nothing is timed on the emulated device");
    }
    run.note("model FLOPs a token: 6 x parameters of the matrix products (head included, embedding not)")?;
    run.note("  + 6 x layers x query heads x head size x sequence length; recomputation is not counted")?;
    let limit = Limit::new("ceilings", run.left() + GRACE);
    let ceilings = rate::ceilings(&mut *run.open()?, run.large())?;
    drop(limit);
    run.line(ceilings.line())?;
    let mut times = Times { ceilings, peer: Peer::none() };
    let needs_peer = |case: &&Case| matches!(&case.work, Work::Step(step) if step.peers_memory) && !run.options.profile;
    let (last, first): (Vec<_>, Vec<_>) = wanted.into_iter().partition(needs_peer);
    let mut own = Vec::new();
    for case in first {
        own.extend(one(run, &mut times, case)?);
    }
    // The peer takes minutes: after all own cases.
    if !run.options.profile {
        times.peer = Peer::find(run)?;
    }
    for own in &own {
        step::compare_with_peer(run, &mut times, own)?;
    }
    for case in last {
        if let Work::Step(step) = &case.work {
            // The memory that it takes is the case's bound.
            let step = step.sized(run);
            times.peer.best(run, &step.folder(run), step.tokens, step.seq)?;
        }
        if let Some(own) = one(run, &mut times, case)? {
            step::compare_with_peer(run, &mut times, &own)?;
        }
    }
    // A rehearsal goes through everything there is.
    if let (Work::Step(step), true) = (&CASES[0].work, run.options.rehearse && run.options.only.is_empty()) {
        profile::case(run, &times, CASES[0].name, step)?;
    }
    Ok(())
}

/// Runs one case, and gives what a peer may be compared with.
fn one(run: &mut Run<'_>, times: &mut Times, case: &Case) -> Result<Option<step::Own>> {
    let Case { name, goals, .. } = *case;
    if run.left() < 5.0 {
        return skipped(run, name, "the seconds of --budget are spent").map(|()| None);
    }
    let seconds = case.limit.min(run.left());
    let _limit = Limit::new(name, seconds + GRACE);
    match (&case.work, run.options.profile) {
        (Work::Step(step), true) => profile::case(run, times, name, step)?,
        (_, true) => {}
        (Work::Step(step), false) => return step::case(run, times, (name, goals), step, seconds),
        (Work::Loss, _) => loss::case(run, name, goals)?,
        (Work::Heads, _) => heads::case(run, times, name)?,
        (Work::Offload, _) => offload::case(run, times, (name, goals), seconds / 2.0)?,
        (Work::Context, _) => context::case(run, name, goals)?,
        (Work::Plan, _) => context::plan_case(run, name)?,
    }
    Ok(None)
}

/// A case that was not run, and why; the run continues.
fn skipped(run: &mut Run<'_>, name: &str, why: &str) -> Result<()> {
    run.case(json!({ "case": name, "ok": true, "skipped": why, "reached": null }))
}

/// AdamW as the peer's.
const ADAM: Adam = Adam { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1 };

/// bf16 on a GPU, f32 on the host, which may have no instructions for bf16.
fn dtype(run: &Run<'_>) -> DType {
    if run.on_host() { DType::F32 } else { DType::Bf16 }
}

/// Who computes attention: as `--attention` says, but for a rehearsal's models, whose heads no library takes.
fn attention(run: &Run<'_>) -> AttentionChoice {
    if run.options.rehearse { AttentionChoice::Own } else { run.options.attention }
}

fn options(run: &Run<'_>) -> EngineOptions {
    let (dtype, attention) = (dtype(run), attention(run));
    let logits_16bit = run.options.logits_16bit && dtype != DType::F32;
    EngineOptions { dtype, logits_16bit, adam: ADAM, attention, ..EngineOptions::default() }
}

/// Sequences of random ids of equal length; each token's target is the next one, the last one's the first.
fn batch(vocab: usize, tokens: usize, seq: usize, seed: u64) -> MicroBatch {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) as usize % vocab) as i32
    };
    let input_ids: Vec<i32> = (0..tokens).map(|_| next()).collect();
    let targets = input_ids.chunks(seq).flat_map(|s| s.iter().skip(1).chain(s.first()).copied()).collect();
    let positions = (0..tokens).map(|t| (t % seq) as i32).collect();
    let cu_seqlens = (0..=tokens / seq).map(|s| (s * seq) as i32).collect();
    MicroBatch { input_ids, targets, positions, cu_seqlens, ..MicroBatch::default() }
}

fn gib(bytes: usize) -> f64 {
    (bytes as f64 / f64::from(1 << 30) * 100.0).round() / 100.0
}

/// Free memory of the device, where it has its own.
fn free_bytes(backend: &dyn Backend) -> Result<Option<usize>> {
    Ok(backend.memory()?.map(|(free, _)| free))
}

/// Whether an error says that memory does not suffice; the run then continues with the next case.
fn is_oom(error: &Error) -> bool {
    error.code == ErrorCode::Oom
}

/// Waits for what is queued.
fn wait(backend: &mut dyn Backend) -> Result<()> {
    backend.read_back(Buffer { pool: Pool::Step, offset: 0, len: 0, dtype: DType::F32 }, &mut [])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_distinct() {
        let all: Vec<&str> = crate::checks::NAMES.into_iter().chain(names()).collect();
        let distinct: std::collections::BTreeSet<&&str> = all.iter().collect();
        assert_eq!(distinct.len(), all.len());
    }
}
