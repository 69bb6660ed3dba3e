//! The peer: the same step by transformers, in a process of its own with a time limit, plain and compiled.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use arl_model::{Error, Result};
use serde_json::{Value, json};

use crate::run::Run;

/// Seconds for one run, plain and compiled; and for each in a rehearsal.
const LIMITS: [(bool, f64); 2] = [(false, 120.0), (true, 240.0)];
const REHEARSED: f64 = 60.0;

/// From what a user begins with to what needs least memory.
const SETTINGS: [[&str; 4]; 3] = [
    ["--ckpt", "none", "--loss", "plain"],
    ["--ckpt", "none", "--loss", "chunked"],
    ["--ckpt", "block", "--loss", "chunked"],
];

/// What the peer reached at best.
#[derive(Clone, Debug)]
pub(super) struct Best {
    pub(super) tokens_per_s: f64,
    pub(super) peak_gib: f64,
    /// Its own line.
    pub(super) line: Value,
}

/// A Python with torch and transformers, and what was run with it.
pub(crate) struct Peer {
    python: Option<PathBuf>,
    /// By folder of the configuration, tokens and length of sequences.
    known: Vec<(PathBuf, [usize; 2], Option<Best>)>,
}

/// `timeout` ends what the program has started as well.
fn limited(seconds: f64, program: &Path) -> Command {
    let mut command = Command::new("timeout");
    command.args(["-k", "5", &format!("{seconds:.0}")]).arg(program);
    command
}

impl Peer {
    pub(super) fn none() -> Self {
        Peer { python: None, known: Vec::new() }
    }

    /// The Python that is named, that of `VIRTUAL_ENV`, or the first of `PATH`, if it has what the peer needs.
    pub(super) fn find(run: &mut Run<'_>) -> Result<Self> {
        let named = run.options.python.clone();
        if named.as_deref() == Some("none") {
            run.note("peer: none is asked for")?;
            return Ok(Peer::none());
        }
        let active = std::env::var("VIRTUAL_ENV").ok().filter(|folder| !folder.is_empty());
        let python = named.or_else(|| active.map(|folder| format!("{folder}/bin/python3")));
        let python = PathBuf::from(python.unwrap_or_else(|| "python3".into()));
        let asked = limited(60.0, &python).args(["-c", "import torch, transformers"]).output();
        if asked.is_ok_and(|output| output.status.success()) {
            return Ok(Peer { python: Some(python), known: Vec::new() });
        }
        run.note(&format!(
            "peer: skipped, {} does not import torch and transformers (--python PATH names another)",
            python.display()
        ))?;
        Ok(Peer::none())
    }

    /// The better of plain and compiled, each with the first settings that its memory suffices for. Prints its lines.
    pub(super) fn best(&mut self, run: &mut Run<'_>, config: &Path, tokens: usize, seq: usize) -> Result<Option<Best>> {
        let Some(python) = &self.python else { return Ok(None) };
        let sizes = [tokens, seq];
        if let Some((.., best)) = self.known.iter().find(|known| known.0 == config && known.1 == sizes) {
            return Ok(best.clone());
        }
        let mut best: Option<Best> = None;
        for (compiled, limit) in LIMITS {
            for settings in SETTINGS {
                let limit = if run.options.rehearse { REHEARSED } else { limit };
                let seconds = limit.min(run.left());
                if seconds < 10.0 {
                    run.note("peer: skipped, the seconds of --budget are spent")?;
                    break;
                }
                let mut command = limited(seconds, python);
                command.arg(run.options.home.join("hf_sft.py")).arg("--config").arg(config).args(settings);
                command.args(["--tokens", &tokens.to_string(), "--seq", &seq.to_string()]);
                let device = if run.on_host() { ["cpu", "fp32"] } else { ["cuda", "bf16"] };
                command.args(["--device", device[0], "--dtype", device[1]]);
                let steps = if run.options.rehearse { ["1", "1"] } else { ["6", "3"] };
                command.args(["--steps", steps[0], "--warmup", steps[1]]);
                if compiled {
                    command.arg("--compile");
                }
                let output = command.output().map_err(|error| Error::io(Path::new("timeout"), &error))?;
                if let Some(line) = line_of(&output) {
                    run.line(line.clone())?;
                    let found = Best::of(line);
                    if best.as_ref().is_none_or(|best| found.tokens_per_s > best.tokens_per_s) {
                        best = Some(found);
                    }
                    break;
                }
                let (why, short) = failure(&output, seconds);
                run.line(json!({ "peer": "transformers", "failed": why, "compile": compiled, "settings": settings }))?;
                if !short {
                    break;
                }
            }
        }
        self.known.push((config.to_path_buf(), sizes, best.clone()));
        Ok(best)
    }
}

impl Best {
    fn of(line: Value) -> Self {
        let number = |key: &str| line[key].as_f64().unwrap_or(f64::NAN);
        Best { tokens_per_s: number("tokens_per_s"), peak_gib: number("peak_gib"), line }
    }
}

/// The line of JSON that a run which went well ends with.
fn line_of(output: &Output) -> Option<Value> {
    let text = String::from_utf8_lossy(&output.stdout);
    let line: Value = serde_json::from_str(text.lines().rev().find(|line| line.starts_with('{'))?).ok()?;
    (output.status.success() && line["tokens_per_s"].is_f64()).then_some(line)
}

/// Why a run gave no line, and whether it was for memory.
fn failure(output: &Output, limit: f64) -> (String, bool) {
    let text = String::from_utf8_lossy(&output.stderr);
    let last = text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it said nothing");
    let why = match output.status.code() {
        Some(124 | 137) => format!("it ran past its limit of {limit:.0} s"),
        _ => last.chars().take(300).collect(),
    };
    (why, text.contains("out of memory") || text.contains("OutOfMemoryError"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;

    fn output(code: i32, stdout: &str, stderr: &str) -> Output {
        let status = std::process::ExitStatus::from_raw(code << 8);
        Output { status, stdout: stdout.into(), stderr: stderr.into() }
    }

    #[test]
    fn a_peers_line_is_taken_only_where_it_went_well() {
        let line = "warming up\n{\"tokens_per_s\": 12.5, \"peak_gib\": 3.0}\n";
        let best = Best::of(line_of(&output(0, line, "")).unwrap());
        assert_eq!((best.tokens_per_s, best.peak_gib), (12.5, 3.0));
        assert!(line_of(&output(1, line, "")).is_none());
        assert!(line_of(&output(0, "{}", "")).is_none());
    }

    #[test]
    fn a_peer_without_memory_is_distinguished_from_other_failures() {
        let error = "Traceback\ntorch.OutOfMemoryError: CUDA out of memory. Tried\n";
        assert_eq!(
            failure(&output(1, "", error), 60.0),
            ("torch.OutOfMemoryError: CUDA out of memory. Tried".into(), true)
        );
        assert_eq!(failure(&output(124, "", ""), 60.0), ("it ran past its limit of 60 s".into(), false));
        assert!(!failure(&output(1, "", "ImportError: no module"), 60.0).1);
    }
}
