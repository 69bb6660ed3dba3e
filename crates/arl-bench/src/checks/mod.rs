//! What must be right before anything is timed: the leaves, attention's library, the golden models, whole steps. Stops at the
//! first that is wrong, but with `--keep-going`.

mod draw;
mod golden;
mod leaves;
mod library;
mod reference;
mod steps;
mod trial;

use std::path::PathBuf;
use std::time::Instant;

use arl_engine::Recompute;
use arl_engine::backend::{Backend, DType};
use arl_model::{Error, ErrorCode, Result};
use serde_json::json;

use self::draw::Size;
use self::leaves::Leaf;
use crate::options::word;
use crate::run::{GRACE, Limit, Run};

/// The check of a library for attention; the own kernels are leaves.
pub(crate) const LIBRARY: &str = "attention";

/// The names of the checks, as `--only` takes them.
pub(crate) const NAMES: [&str; 6] = [LIBRARY, "leaves", "golden", "steps", "scale", "model"];

/// Runs the checks that are asked for. An error: something is wrong, and nothing may be timed.
pub(crate) fn run(run: &mut Run<'_>) -> Result<()> {
    let _limit = Limit::new("checks", run.left() + GRACE);
    let checks: [fn(&mut Run<'_>) -> Result<()>; 6] =
        [check_library, check_leaves, check_golden, check_steps, check_scale, check_model];
    for (name, check) in NAMES.into_iter().zip(checks) {
        if run.checks(name) {
            let start = Instant::now();
            let wrong = run.wrong;
            check(run)?;
            let found = match run.wrong - wrong {
                0 => "all right".to_string(),
                wrong => format!("{wrong} wrong"),
            };
            run.note(&format!("{name}: {found}, {:.0} s", start.elapsed().as_secs_f64()))?;
        }
    }
    if run.wrong > 0 {
        return Err(Error::new(ErrorCode::Internal, format!("{} wrong, named above", run.wrong)));
    }
    Ok(())
}

/// Each leaf on random shapes. Its table is the trait's, which a test proves.
fn check_leaves(run: &mut Run<'_>) -> Result<()> {
    let mut device = run.open()?;
    let (shapes, size) = (run.options.shapes, Size::of(run.large()));
    for leaf in leaves::LEAVES {
        check_leaf(run, &mut *device, leaf, shapes, &leaves::TYPES, size)?;
    }
    Ok(())
}

/// Each leaf at the sizes of a step, which fill a GPU, and products that no random shape shows to be wrong.
fn check_scale(run: &mut Run<'_>) -> Result<()> {
    let mut device = run.open()?;
    let size = if run.large() { Size::Step } else { Size::Host };
    for (leaf, dtype) in leaves::of_a_step() {
        check_leaf(run, &mut *device, &leaf, 1, &[dtype], size)?;
    }
    Ok(())
}

fn check_leaf(
    run: &mut Run<'_>,
    device: &mut dyn Backend,
    leaf: &Leaf,
    shapes: usize,
    types: &[DType],
    size: Size,
) -> Result<()> {
    run.in_time(leaf.name)?;
    let line =
        json!({ "check": "leaf", "leaf": leaf.name, "trials": types.len() * shapes, "size": format!("{size:?}") });
    match leaf.check(device, shapes, types, size) {
        Ok(figures) => run.passed(
            line,
            json!({
                "least_cosine": figures.cosine, "norm_error": figures.norm_error, "f32_error": figures.f32_error,
                "same_bits_again": true,
            }),
        ),
        Err(error) => run.failed(line, wrong(leaf.name, &error)),
    }
}

/// One real micro-batch of a model: both attentions where the library's is asked for, and the same bits again.
fn check_model(run: &mut Run<'_>) -> Result<()> {
    run.in_time("model")?;
    let folder = tempfile::tempdir().map_err(|error| Error::io(&std::env::temp_dir(), &error))?;
    let dir = match run.large() {
        true => run.options.home.join("configs").join("qwen3-0.6b"),
        false => steps::small_model(folder.path(), 64)?,
    };
    let (tokens, seq) = if run.large() { (draw::TOKENS, 2048) } else { (100, 50) };
    let line =
        json!({ "check": "model", "model": dir.file_name().map(|name| name.to_string_lossy()), "tokens": tokens });
    match steps::check_model(&|| run.open(), &dir, tokens, seq, run.options.attention) {
        Ok(figures) => run.passed(line, figures),
        Err(error) => run.failed(line, wrong("a micro-batch", &error)),
    }
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
            "apart_from_own": apart, "cosine_of_gradients": cosine,
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
        let (figures, passed) = (outcome.line(), outcome.passed());
        let line =
            json!({ "check": "golden", "model": outcome.name, "dtype": format!("{dtype:?}"), "figures": figures });
        if passed {
            run.passed(line, json!({}))?;
        } else {
            let what = format!("golden model in {dtype:?} is wrong, and nothing is timed: {figures}");
            run.failed(line, Error::new(ErrorCode::Internal, what))?;
        }
    }
    Ok(())
}

/// The golden models, two with heads for tensor cores, and a hybrid.
fn check_steps(run: &mut Run<'_>) -> Result<()> {
    let folder = tempfile::tempdir().map_err(|error| Error::io(&std::env::temp_dir(), &error))?;
    let mut models: Vec<PathBuf> = golden::cases(&run.options.home.join("golden"));
    models.push(steps::small_model(folder.path(), 64)?);
    models.push(steps::small_model(folder.path(), 128)?);
    models.push(steps::small_hybrid(folder.path())?);
    for (dir, dtype) in models.iter().flat_map(|dir| [DType::F32, DType::Bf16].map(|dtype| (dir, dtype))) {
        let name = dir.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        run.in_time("steps")?;
        let line = json!({ "check": "steps", "model": name, "dtype": format!("{dtype:?}") });
        match steps::check(&|| run.open(), dir, dtype) {
            Ok(apart) => run.passed(
                line,
                json!({
                    "apart_from_cpu": apart, "same_bits": "second run, every level of recomputation, both offloads",
                }),
            )?,
            Err(error) => run.failed(line, wrong("a step", &error))?,
        }
    }
    Ok(())
}
