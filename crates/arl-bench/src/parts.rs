//! `--keep-going`: each family of checks, and the cases, in a process of its own, so that neither a wrong number nor a device that
//! fails keeps the others from running. Knows nothing of a device.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::Instant;

use arl_model::{Error, Result};
use serde_json::{Value, json};

use crate::options::Options;
use crate::{checks, times};

/// The exit code of a launcher that finds no CUDA to use: then no part can run.
pub const NO_CUDA: u8 = 3;

/// The flags whose values a part has of its own.
const OWN_FLAGS: [&str; 2] = ["--only", "--budget"];

/// Runs all parts with the launcher `program`; the exit code.
pub fn run(options: &Options, program: &Path) -> i32 {
    match (Parts { options, program, start: Instant::now(), code: 0 }).all() {
        Ok(code) => code,
        Err(error) => {
            // Where standard error is closed, the exit code says it.
            let _ = writeln!(std::io::stderr(), "gpu: {error}");
            1
        }
    }
}

struct Parts<'a> {
    options: &'a Options,
    program: &'a Path,
    start: Instant,
    /// The first exit code that was not 0.
    code: i32,
}

impl Parts<'_> {
    fn all(mut self) -> Result<i32> {
        for check in checks::NAMES.into_iter().filter(|name| self.options.checks(name)) {
            let (ended, _) = self.part("checks", &[check])?;
            if ended.code() == Some(NO_CUDA.into()) {
                return Ok(self.code);
            }
            if !ended.success() {
                print(&json!({ "check": check, "ok": false, "process": ended.to_string() }))?;
            }
        }
        let part = if self.code == 0 { "checked" } else { "unchecked" };
        let mut left: Vec<&str> = times::names().into_iter().filter(|name| self.options.times(name)).collect();
        while !left.is_empty() {
            let (ended, done) = self.part(part, &left)?;
            left.retain(|name| !done.iter().any(|done| done == name));
            if ended.success() || left.is_empty() {
                break;
            }
            // The case that it was at; the others in a new process.
            print(&json!({ "case": left.remove(0), "ok": false, "error": format!("its process ended: {ended}") }))?;
        }
        Ok(self.code)
    }

    /// Runs a part, and passes on what it prints; how it ended, and the cases that it printed a line of.
    fn part(&mut self, part: &str, only: &[&str]) -> Result<(ExitStatus, Vec<String>)> {
        let failed = |error: &std::io::Error| Error::io(self.program, error);
        let left = self.options.budget.saturating_sub(self.start.elapsed().as_secs()).max(1);
        let mut child = Command::new(self.program)
            .args(common_words(&self.options.command))
            .args(["--part", part, "--only", &only.join(","), "--budget", &left.to_string()])
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| failed(&error))?;
        let mut done = Vec::new();
        if let Some(out) = child.stdout.take() {
            for line in BufReader::new(out).lines() {
                let line = line.map_err(|error| failed(&error))?;
                let case =
                    serde_json::from_str::<Value>(&line).ok().and_then(|line| Some(line["case"].as_str()?.into()));
                done.extend(case);
                writeln!(std::io::stdout(), "{line}").map_err(|error| failed(&error))?;
            }
        }
        let ended = child.wait().map_err(|error| failed(&error))?;
        if self.code == 0 {
            self.code = ended.code().unwrap_or(1);
        }
        Ok((ended, done))
    }
}

fn print(line: &Value) -> Result<()> {
    writeln!(std::io::stdout(), "{line}").map_err(|error| Error::io(Path::new("standard output"), &error))
}

/// The command's words without those that a part has of its own.
fn common_words(command: &[String]) -> Vec<&String> {
    let mut words = command.iter();
    let mut common = Vec::new();
    while let Some(word) = words.next() {
        if OWN_FLAGS.contains(&word.as_str()) {
            words.next();
        } else {
            common.push(word);
        }
    }
    common
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_has_names_and_seconds_of_its_own_and_all_else_of_the_command() {
        let words = ["--only", "loss,golden", "--keep-going", "--budget", "9", "--shapes", "3"].map(String::from);
        assert_eq!(common_words(&words), ["--keep-going", "--shapes", "3"]);
    }
}
