//! The golden cases: what transformers computes with small models, to within 1e-4.

#[path = "../examples/golden.rs"]
#[allow(unreachable_pub, missing_docs, reason = "an example, included to run its cases")]
pub(crate) mod runner;

use std::path::{Path, PathBuf};

use arl_engine::Recompute;
use arl_engine::backend::DType;
use arl_engine::backend::cpu::CpuBackend;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Runs the cases of a folder; returns how many.
fn run(folder: &Path) -> usize {
    let mut failed = Vec::new();
    let mut count = 0;
    for case in runner::cases(folder) {
        if let Some(why) = runner::not_built(&case) {
            eprintln!("SKIPPED: {}: {why}", case.display());
            continue;
        }
        count += 1;
        let outcome = runner::run_case(&case, Recompute::Norms).unwrap();
        println!("{}", outcome.line());
        if !outcome.passed() {
            failed.push(outcome.line());
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
    count
}

#[test]
fn the_cases_of_this_project_match() {
    let folder = root().join("__test__/golden");
    assert!(!runner::cases(&folder).is_empty(), "{} has no cases", folder.display());
    assert_eq!(run(&folder), runner::cases(&folder).len());
}

#[test]
fn the_shared_cases_match() {
    let shared = std::env::var_os("ARL_SHARED").map_or_else(|| root().join("../shared"), PathBuf::from);
    let folder = std::env::var_os("ARL_GOLDEN").map_or_else(|| shared.join("golden"), PathBuf::from);
    if runner::cases(&folder).is_empty() {
        eprintln!("SKIPPED: {} has no golden cases", folder.display());
        return;
    }
    assert_eq!(run(&folder), runner::cases(&folder).len());
}

/// A folder of the shared cases, if there is one.
fn shared(name: &str) -> Option<PathBuf> {
    let shared = std::env::var_os("ARL_SHARED").map_or_else(|| root().join("../shared"), PathBuf::from);
    let folder = shared.join("golden").join(name);
    if runner::cases(&folder).is_empty() {
        eprintln!("SKIPPED: {} has no golden cases", folder.display());
        return None;
    }
    Some(folder)
}

#[test]
fn the_shared_hybrids_match() {
    let Some(folder) = shared("hybrid") else { return };
    assert_eq!(run(&folder), runner::cases(&folder).len());
}

#[test]
fn the_shared_adapters_match() {
    let Some(folder) = shared("lora") else { return };
    assert_eq!(run(&folder), runner::cases(&folder).len());
}

#[test]
fn the_shared_models_that_see_match() {
    let Some(folder) = shared("vision") else { return };
    assert_eq!(run(&folder), runner::cases(&folder).len());
}

#[test]
fn in_f16_the_cases_match_but_for_its_rounding() {
    let mut failed = Vec::new();
    for case in runner::cases(&root().join("__test__/golden")) {
        let backend = Box::new(CpuBackend::new());
        let outcome = runner::run_case_on(backend, &case, Recompute::Norms, DType::F16).unwrap();
        println!("{}", outcome.line());
        if !outcome.passed() {
            failed.push(outcome.line());
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

#[test]
fn a_figure_that_is_too_large_fails_a_case() {
    let folder = root().join("__test__/golden");
    let case = runner::cases(&folder).into_iter().next().unwrap();
    let damaged = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(&case).unwrap().flatten() {
        std::fs::copy(entry.path(), damaged.path().join(entry.file_name())).unwrap();
    }
    // One bit of the exponent of one of the expected gradients' numbers.
    let path = damaged.path().join("grads.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 0x08;
    std::fs::write(&path, bytes).unwrap();
    let outcome = runner::run_case(&case, Recompute::Norms).unwrap();
    assert!(outcome.passed(), "{}", outcome.line());
    let outcome = runner::run_case(damaged.path(), Recompute::Norms).unwrap();
    assert!(!outcome.passed(), "{}", outcome.line());
}
