//! The launcher itself, on a machine without a GPU: a short rehearsal to the end, and what it says of what is missing.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "tests; a skip is printed")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

/// A folder as `npm run build:bench` lays it out, with one golden model; `None` where the files are not there.
fn home() -> Option<tempfile::TempDir> {
    let shared = std::env::var_os("ARL_SHARED")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared"), PathBuf::from);
    let (configs, golden) = (shared.join("bench/configs"), shared.join("golden/qwen3-tied"));
    if !configs.is_dir() || !golden.is_dir() {
        println!("SKIPPED: the rehearsal of the bench, whose models are not here");
        return None;
    }
    let folder = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(configs.canonicalize().unwrap(), folder.path().join("configs")).unwrap();
    std::fs::create_dir(folder.path().join("golden")).unwrap();
    std::os::unix::fs::symlink(golden.canonicalize().unwrap(), folder.path().join("golden/qwen3-tied")).unwrap();
    Some(folder)
}

fn gpu(words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_gpu")).args(words).output().unwrap()
}

/// The lines that are JSON.
fn lines(output: &Output) -> Vec<Value> {
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines().filter(|line| line.starts_with('{')).map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn what_is_counted_is_the_formulas_operations_and_one_more_product_of_attentions_backward_pass() {
    let Some(home) = home() else { return };
    let folder = home.path().to_str().unwrap();
    let output = gpu(&["--count", "--rehearse", "--only", "qwen3-0.6b", "--home", folder]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let lines = lines(&output);
    let number = |name: &str| lines[0][name].as_f64().unwrap();
    let config = std::fs::read(home.path().join("configs/qwen3-cpu-8m/config.json")).unwrap();
    let config: Value = serde_json::from_slice(&config).unwrap();
    let of = |name: &str| config[name].as_f64().unwrap();
    // 128 tokens in sequences of 64; a product of causal attention is `heads * dim * sequence` operations a token.
    let product = of("num_hidden_layers") * of("num_attention_heads") * of("head_dim") * 64.0 * 128.0 / 1e12;
    let more = number("tflop") - number("model_tflop");
    assert!((more - product).abs() < 1e-3 * product, "{more} more, not {product}: {}", lines[0]);
    assert!((0.0..=1.0).contains(&number("mfu_at_most")), "{}", lines[0]);
    assert!(lines[0].get("step_s").is_none() && lines[0]["counted"] == true, "{}", lines[0]);
}

#[test]
fn a_rehearsal_checks_and_then_times() {
    let Some(home) = home() else { return };
    let home = home.path().to_str().unwrap();
    let short = ["--device", "cpu", "--rehearse", "--shapes", "1", "--steps", "1", "--python", "none", "--home", home];
    let output = gpu(&[&short[..], &["--only", "qwen3-0.6b,loss,plan-1m"]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let lines = lines(&output);
    let checks: Vec<&Value> = lines.iter().filter(|line| line.get("check").is_some()).collect();
    assert!(checks.iter().filter(|line| line["check"] == "leaf").count() >= 29, "{checks:?}");
    for dtype in ["F32", "Bf16", "F16"] {
        assert!(checks.iter().any(|line| line["check"] == "golden" && line["dtype"] == dtype), "{dtype}: {checks:?}");
    }
    assert!(checks.iter().all(|line| line["ok"] == true), "{checks:?}");
    let cases: Vec<&Value> = lines.iter().filter(|line| line.get("case").is_some()).collect();
    assert_eq!(
        cases.iter().map(|case| case["case"].as_str().unwrap()).collect::<Vec<_>>(),
        ["qwen3-0.6b", "loss", "plan-1m"]
    );
    for case in &cases {
        assert!(case["device"].as_str().unwrap().starts_with("cpu"), "{case}");
        assert!(case["date"].is_string() && case["command"].is_string(), "{case}");
    }
    assert!(cases[0]["tokens_per_s"].as_f64().unwrap() > 0.0, "{}", cases[0]);
    assert_eq!(cases[0]["attention"], "own");
    assert!(cases[0]["reached"].is_null(), "a host's figures reach no GPU's goal: {}", cases[0]);
    assert_eq!(cases[2]["reached"], true);
}

#[test]
fn with_keep_going_a_family_that_fails_keeps_neither_the_others_nor_the_cases_from_running() {
    let Some(home) = home() else { return };
    std::fs::remove_file(home.path().join("golden/qwen3-tied")).unwrap();
    let home = home.path().to_str().unwrap();
    let short = ["--device", "cpu", "--rehearse", "--shapes", "1", "--steps", "1", "--python", "none", "--home", home];
    let output = gpu(&[&short[..], &["--keep-going", "--only", "golden,scale,model,plan-1m,loss"]].concat());
    assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stderr));
    let lines = lines(&output);
    let check = |name: &str| lines.iter().find(|line| line["check"] == name).unwrap();
    assert_eq!(check("golden")["ok"], false);
    assert_eq!((&check("model")["ok"], &check("model")["same_bits_again"]), (&true.into(), &true.into()));
    let of_leaf = |name: &str| lines.iter().any(|line| line["leaf"] == name && line["ok"] == true);
    assert!(["matmul", "long_sums", "exact_products"].into_iter().all(of_leaf), "{lines:?}");
    let cases: Vec<_> = lines.iter().filter(|line| line.get("case").is_some()).collect();
    assert_eq!(cases.len(), 2, "{cases:?}");
    assert!(cases.iter().all(|case| case["ok"] == true && case["checked"] == false), "{cases:?}");
}

#[test]
fn the_first_command_on_a_gpu_goes_to_its_end_and_leaves_all_it_found_in_a_folder() {
    let Some(home) = home() else { return };
    let out = home.path().join("found");
    // A machine with a profiler that fails, and without sanitizers.
    let tools = home.path().join("tools");
    std::fs::create_dir(&tools).unwrap();
    std::fs::write(tools.join("ncu"), "#!/bin/sh\necho \"$@\"\necho no counters >&2\nexit 7\n").unwrap();
    std::fs::set_permissions(tools.join("ncu"), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../bench/gpu-first.sh");
    let output = Command::new("bash")
        .arg(script)
        .arg(&out)
        .args([
            "--device",
            "cpu",
            "--rehearse",
            "--shapes",
            "1",
            "--steps",
            "1",
            "--home",
            home.path().to_str().unwrap(),
        ])
        .env("GPU", env!("CARGO_BIN_EXE_gpu"))
        .envs([("FIRST_CASES", "qwen2.5-0.5b-llmq"), ("FIRST_PROFILED", "qwen2.5-0.5b"), ("FIRST_SECONDS", "1800")])
        .env("PATH", format!("{}:/usr/bin:/bin", tools.display()))
        .env("CUDA_HOME", home.path())
        .output()
        .unwrap();
    let printed = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{printed}{}", String::from_utf8_lossy(&output.stderr));
    let read = |name: &str| std::fs::read_to_string(out.join(name)).unwrap();
    // A processor has no library for attention: the run goes on.
    assert!(printed.contains("attention-cudnn: exit 1"), "{printed}");
    assert!(read("attention-cudnn.err").contains("no library for attention"));
    assert!(
        read("checks.log").contains("\"leaf\":\"long_sums\"") && read("checks.log").contains("\"check\":\"golden\"")
    );
    assert!(read("profile-own.log").contains("by_leaf_ms"));
    assert!(read("times-own.log").contains("\"case\":\"qwen2.5-0.5b-llmq\""));
    assert!(read("machine.log").contains("qwen3-0.6b"), "the list of cases");
    // NVIDIA's tools are used where they are; without them, or where one fails, the script continues.
    assert!(printed.contains("memcheck: ") && printed.contains("racecheck: "), "{printed}");
    assert!(printed.contains("ncu: exit 7") && read("ncu.err").contains("no counters"), "{printed}");
    assert!(read("ncu.log").contains("--part checked --profile --only qwen3-0.6b"), "{}", read("ncu.log"));
    assert!(printed.ends_with(&format!("all of it is in {}\n", out.display())), "{printed}");
    assert!(read("summary.log").lines().count() >= 9, "{}", read("summary.log"));
}

#[test]
fn a_profile_has_the_leaves_of_a_step_and_the_gaps() {
    let Some(home) = home() else { return };
    let home = home.path().to_str().unwrap();
    let short = ["--device", "cpu", "--rehearse", "--shapes", "1", "--profile", "--home", home, "--only", "qwen3-0.6b"];
    let output = gpu(&short);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let lines = lines(&output);
    let case = lines.iter().find(|line| line.get("case").is_some()).unwrap();
    let leaves = case["by_leaf_ms"].as_array().unwrap();
    for leaf in ["attention", "attention_backward", "swiglu", "cross_entropy", "adamw"] {
        assert!(leaves.iter().any(|found| found[0] == leaf), "{leaf}: {leaves:?}");
    }
    let parts = case["leaves_ms"].as_f64().unwrap() + case["gaps_ms"].as_f64().unwrap();
    assert!(parts > 0.0 && parts <= case["step_ms"].as_f64().unwrap(), "{case}");
}

#[test]
fn a_budget_that_is_spent_ends_the_checks_or_skips_the_cases_and_says_so() {
    let Some(home) = home() else { return };
    let home = home.path().to_str().unwrap();
    let short =
        ["--device", "cpu", "--rehearse", "--shapes", "1", "--home", home, "--only", "context", "--budget", "1"];
    let output = gpu(&short);
    let stderr = String::from_utf8_lossy(&output.stderr);
    // How far a second reaches is the machine's affair.
    if output.status.success() {
        assert!(lines(&output).iter().any(|line| line["skipped"] == "the seconds of --budget are spent"));
    } else {
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        assert!(stderr.contains("the 1 s of --budget were spent before"), "{stderr}");
    }
}

#[test]
fn what_is_missing_for_a_gpu_is_named() {
    // No CUDA library is next to the tests' launcher, so that a machine with a driver ends there as well.
    let output = gpu(&[]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{stderr}");
    assert!(stderr.starts_with("gpu: CUDA cannot be used: ") && output.stdout.is_empty(), "{stderr}");
}

#[test]
fn a_device_without_a_library_for_attention_says_so_or_takes_its_own() {
    let short = ["--device", "cpu", "--shapes", "1", "--only", "attention", "--attention"];
    let output = gpu(&[&short[..], &["cudnn"]].concat());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("attention by the library") && stderr.contains("no library for attention"), "{stderr}");
    let output = gpu(&[&short[..], &["auto"]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let lines = lines(&output);
    assert_eq!((&lines[0]["trials"], &lines[0]["refused"], lines.len()), (&0.into(), &1.into(), 1), "{lines:?}");
}

#[test]
fn a_wrong_option_is_named() {
    let output = gpu(&["--only", "qwen3-4tb"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("--only qwen3-4tb: there are attention, leaves, golden"));
}
