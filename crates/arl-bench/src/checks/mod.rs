//! What must be right before anything is timed: the leaves, attention's library, the golden models, whole steps. Stops at the
//! first that is wrong.

mod beside;
mod draw;
mod golden;
mod leaves;
mod library;
mod steps;
mod trial;

use std::path::PathBuf;
use std::time::Instant;

use arl_engine::Recompute;
use arl_engine::backend::DType;
use arl_model::{Error, ErrorCode, Result};
use serde_json::json;

use crate::options::word;
use crate::run::{GRACE, Limit, Run};

/// The check of a library for attention; the own kernels are leaves.
pub(crate) const LIBRARY: &str = "attention";

/// The names of the checks, as `--only` takes them.
pub(crate) const NAMES: [&str; 4] = [LIBRARY, "leaves", "golden", "steps"];

/// Runs the checks that are asked for. An error: something is wrong, and nothing may be timed.
pub(crate) fn run(run: &mut Run<'_>) -> Result<()> {
    let _limit = Limit::new("checks", run.left() + GRACE);
    let checks: [fn(&mut Run<'_>) -> Result<()>; 4] = [check_library, check_leaves, check_golden, check_steps];
    for (name, check) in NAMES.into_iter().zip(checks) {
        if run.checks(name) {
            let start = Instant::now();
            check(run)?;
            run.note(&format!("{name}: all right, {:.0} s", start.elapsed().as_secs_f64()))?;
        }
    }
    Ok(())
}

/// Each leaf on random shapes. Its table is the trait's, which a test proves.
fn check_leaves(run: &mut Run<'_>) -> Result<()> {
    let mut device = run.open()?;
    for leaf in leaves::LEAVES {
        run.in_time(leaf.name)?;
        let (shapes, large) = (run.options.shapes, run.large());
        let figures = leaf.check(&mut *device, shapes, large).map_err(|error| wrong(leaf.name, &error))?;
        run.line(json!({
            "check": "leaf", "leaf": leaf.name, "trials": leaves::TYPES.len() * shapes, "ok": true,
            "least_cosine": figures.cosine, "norm_error": figures.norm_error, "f32_error": figures.f32_error,
            "same_bits_again": true,
        }))?;
    }
    Ok(())
}

/// The device's own library, where `--attention` asks for it: its attention, and whole steps with it. First of all, as a
/// library that is not there ends the run.
fn check_library(run: &mut Run<'_>) -> Result<()> {
    let choice = run.options.attention;
    run.in_time("attention")?;
    let (shapes, large) = (run.options.shapes, run.large());
    let mut device = run.open()?;
    let outcome = library::check(&mut *device, choice, shapes, large)
        .map_err(|error| wrong("attention by the library", &error))?;
    drop(device);
    for refused in &outcome.refused {
        run.note(&format!("attention: the own kernels, for {refused}"))?;
    }
    run.line(json!({
        "check": "attention", "attention": word(choice), "trials": outcome.trials, "refused": outcome.refused.len(),
        "ok": true, "least_cosine": outcome.figures.cosine, "norm_error": outcome.figures.norm_error,
    }))?;
    if outcome.trials == 0 {
        return Ok(());
    }
    let folder = tempfile::tempdir().map_err(|error| Error::io(&std::env::temp_dir(), &error))?;
    for head in [64, 128] {
        run.in_time("attention")?;
        let dir = steps::small_model(folder.path(), head)?;
        let (apart, cosine) =
            steps::check_library(&|| run.open(), &dir, choice).map_err(|error| wrong("a step", &error))?;
        run.line(json!({
            "check": "attention", "attention": word(choice), "model": format!("heads-of-{head}"), "dtype": "Bf16", "ok": true,
            "beside_own": apart, "cosine_of_gradients": cosine,
        }))?;
    }
    Ok(())
}

fn wrong(what: &str, error: &Error) -> Error {
    Error::new(error.code, format!("{what} is wrong, and nothing is timed: {}", error.message)).hint(error.hint.clone())
}

/// What transformers computed, in every type.
fn check_golden(run: &mut Run<'_>) -> Result<()> {
    let folder = run.options.home.join("golden");
    let cases = golden::cases(&folder);
    if cases.is_empty() {
        return Err(Error::new(ErrorCode::Io, format!("{}: no golden models there", folder.display()))
            .hint("build the folder again: `npm run build:bench`"));
    }
    for (case, dtype) in cases.iter().flat_map(|case| leaves::TYPES.map(|dtype| (case, dtype))) {
        run.in_time("golden")?;
        let outcome = golden::run_case_on(run.open()?, case, Recompute::Norms, dtype)?;
        let line = outcome.line();
        run.line(json!({
            "check": "golden", "model": outcome.name, "dtype": format!("{dtype:?}"), "ok": outcome.passed(), "figures": line,
        }))?;
        if !outcome.passed() {
            let what = format!("golden model in {dtype:?} is wrong, and nothing is timed: {line}");
            return Err(Error::new(ErrorCode::Internal, what));
        }
    }
    Ok(())
}

/// The golden models, and two with heads for tensor cores.
fn check_steps(run: &mut Run<'_>) -> Result<()> {
    let folder = tempfile::tempdir().map_err(|error| Error::io(&std::env::temp_dir(), &error))?;
    let mut models: Vec<PathBuf> = golden::cases(&run.options.home.join("golden"));
    models.push(steps::small_model(folder.path(), 64)?);
    models.push(steps::small_model(folder.path(), 128)?);
    for (dir, dtype) in models.iter().flat_map(|dir| [DType::F32, DType::Bf16].map(|dtype| (dir, dtype))) {
        let name = dir.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        run.in_time("steps")?;
        let apart = steps::check(&|| run.open(), dir, dtype).map_err(|error| wrong("a step", &error))?;
        run.line(json!({
            "check": "steps", "model": name, "dtype": format!("{dtype:?}"), "ok": true, "beside_cpu": apart,
            "same_bits": "second run, every level of recomputation, both offloads",
        }))?;
    }
    Ok(())
}
