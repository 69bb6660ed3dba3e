//! What a run has at hand: its options, a way to open the device, where lines go, and how much time is left.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use arl_engine::backend::Backend;
use arl_model::{Error, ErrorCode, Result};
use serde_json::{Map, Value, json};

use crate::options::{Options, Part};
use crate::{checks, times};

/// The exit code of a process that ends because a case ran past its limit.
pub const PAST_ITS_LIMIT: i32 = 4;

/// Seconds beyond the budget that what was begun within it may take.
pub(crate) const GRACE: f64 = 15.0;

/// Opens the device again.
pub type Open<'a> = &'a dyn Fn() -> Result<Box<dyn Backend>>;

/// One run.
pub struct Run<'a> {
    /// Its options.
    pub options: Options,
    /// Checks that failed, of those that `--keep-going` went on from.
    pub(crate) wrong: usize,
    /// What every case's line says of the machine: driver, libraries.
    machine: Map<String, Value>,
    open: Open<'a>,
    out: &'a mut dyn Write,
    start: Instant,
}

impl<'a> Run<'a> {
    /// A run that begins now.
    pub fn new(options: Options, machine: Map<String, Value>, open: Open<'a>, out: &'a mut dyn Write) -> Self {
        Run { options, wrong: 0, machine, open, out, start: Instant::now() }
    }

    /// Checks, then times; or counts.
    pub fn all(&mut self) -> Result<()> {
        if self.options.count {
            return times::count::run(self);
        }
        let mut machine = self.machine.clone();
        // The launcher knows the GPU's name; opening the device only for that takes a second.
        let name = machine.get("gpu").cloned();
        machine.insert("device".into(), name.map_or_else(|| Ok(self.open()?.name().into()), Ok)?);
        machine.insert("date".into(), now().into());
        machine.insert("command".into(), self.options.command.join(" ").into());
        if let Some(part @ (Part::Checked | Part::Unchecked)) = self.options.part {
            machine.insert("checked".into(), (part == Part::Checked).into());
        }
        self.machine = machine;
        checks::run(self)?;
        times::run(self)
    }

    pub(crate) fn checks(&self, name: &str) -> bool {
        self.options.checks(name)
    }

    /// The device, with nothing on it.
    pub(crate) fn open(&self) -> Result<Box<dyn Backend>> {
        (self.open)()
    }

    /// Whether the device is the host, and its figures tell nothing of a GPU.
    pub(crate) fn on_host(&self) -> bool {
        !self.options.device.starts_with("cuda")
    }

    /// Whether sizes are those of a GPU.
    pub(crate) fn large(&self) -> bool {
        !self.options.rehearse && !self.on_host()
    }

    /// Seconds until the budget is spent.
    pub(crate) fn left(&self) -> f64 {
        self.options.budget as f64 - self.start.elapsed().as_secs_f64()
    }

    /// Fails where the budget is spent before the checks are through.
    pub(crate) fn in_time(&self, what: &str) -> Result<()> {
        if self.left() > 0.0 {
            return Ok(());
        }
        let what = format!("the {} s of --budget were spent before {what} was checked", self.options.budget);
        Err(Error::new(ErrorCode::Interrupted, what).hint("give --budget more seconds, or --shapes fewer"))
    }

    /// Prints a check's line: it passed, with these figures.
    pub(crate) fn passed(&mut self, mut line: Value, figures: Value) -> Result<()> {
        line["ok"] = true.into();
        if let (Value::Object(line), Value::Object(figures)) = (&mut line, figures) {
            line.extend(figures);
        }
        self.line(line)
    }

    /// A check that failed: the end of the run, or with `--keep-going` a line, unless it is the device itself that failed.
    pub(crate) fn failed(&mut self, mut line: Value, error: Error) -> Result<()> {
        if !self.options.keep_going || error.code == ErrorCode::Device {
            return Err(error);
        }
        self.wrong += 1;
        line["ok"] = false.into();
        line["error"] = error.message.into();
        self.line(line)
    }

    /// Prints a line of JSON.
    pub(crate) fn line(&mut self, line: Value) -> Result<()> {
        self.text(&line.to_string())
    }

    /// Prints a case's line, with what is known of the machine.
    pub(crate) fn case(&mut self, mut line: Value) -> Result<()> {
        if let Value::Object(line) = &mut line {
            line.extend(self.machine.clone());
        }
        self.line(line)
    }

    /// Prints a line for people.
    pub(crate) fn note(&mut self, text: &str) -> Result<()> {
        self.text(&format!("# {text}"))
    }

    fn text(&mut self, text: &str) -> Result<()> {
        let written = writeln!(self.out, "{text}").and_then(|()| self.out.flush());
        written.map_err(|error| Error::new(ErrorCode::Io, format!("standard output: {error}")))
    }
}

/// Ends the process if it is not dropped in time: a device that hangs cannot be asked to stop.
pub(crate) struct Limit {
    done: Arc<AtomicBool>,
}

impl Limit {
    pub(crate) fn new(name: &'static str, seconds: f64) -> Self {
        let done = Arc::new(AtomicBool::new(false));
        let watched = Arc::clone(&done);
        let end = Instant::now() + Duration::from_secs_f64(seconds.max(1.0));
        std::thread::spawn(move || {
            while !watched.load(Ordering::Relaxed) {
                if Instant::now() >= end {
                    let line =
                        json!({ "case": name, "ok": false, "error": format!("ran past its limit of {seconds:.0} s") });
                    // No caller is left to report a failure to.
                    let _ = writeln!(std::io::stdout(), "{line}");
                    std::process::exit(PAST_ITS_LIMIT);
                }
                std::thread::sleep(Duration::from_millis(50));
            }
        });
        Limit { done }
    }
}

impl Drop for Limit {
    fn drop(&mut self) {
        self.done.store(true, Ordering::Relaxed);
    }
}

/// Date and time in UTC, as `2026-11-22T10:20:30Z` (H. Hinnant, "chrono-compatible low-level date algorithms").
fn now() -> String {
    text_of(SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()))
}

fn text_of(seconds: u64) -> String {
    let days = seconds / 86_400 + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let shifted = (5 * of_year + 2) / 153;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let (year, day) = (year + era * 400 + u64::from(month <= 2), of_year - (153 * shifted + 2) / 5 + 1);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_763_807_130, "2025-11-22T10:25:30Z"),
        ] {
            assert_eq!(text_of(seconds), text);
        }
    }
}
