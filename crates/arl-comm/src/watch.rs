//! What the rest of a process sees of calls that wait for other ranks: since when, and for how long in all; and how it ends
//! them. Knows nothing of what they wait with.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use arl_model::{Error, ErrorCode, Result};

/// Calls that one thread makes, one after the other.
pub struct Watch {
    /// Why the ranks end; set once.
    failure: OnceLock<String>,
    started: Instant,
    /// Microseconds that calls have taken.
    spent: AtomicU64,
    /// Milliseconds after `started` since when a call waits for other ranks, plus 1; 0: none does.
    waiting: AtomicU64,
}

impl Watch {
    /// No call has been made.
    pub fn new() -> Self {
        Watch {
            failure: OnceLock::new(),
            started: Instant::now(),
            spent: AtomicU64::new(0),
            waiting: AtomicU64::new(0),
        }
    }

    /// Has every call in progress, and every later one, fail with `ARL_INTERRUPTED` because of `reason`.
    pub fn fail(&self, reason: String) {
        // A second reason follows from the first.
        let _ = self.failure.set(reason);
    }

    /// Fails where [`Watch::fail`] was called. Calls that wait ask again and again.
    pub fn check(&self) -> Result<()> {
        match self.failure.get() {
            None => Ok(()),
            Some(reason) => {
                Err(Error::new(ErrorCode::Interrupted, format!("ended because another rank failed: {reason}")))
            }
        }
    }

    /// For how long the call in progress has waited for other ranks; `None` where there is none.
    pub fn waiting(&self) -> Option<Duration> {
        let since = Duration::from_millis(self.waiting.load(Ordering::Relaxed).checked_sub(1)?);
        Some(self.started.elapsed().saturating_sub(since))
    }

    /// How long calls have taken so far, waiting for other ranks included.
    pub fn spent(&self) -> Duration {
        Duration::from_micros(self.spent.load(Ordering::Relaxed))
    }

    /// Runs a call that waits for other ranks.
    pub fn during<T>(&self, call: impl FnOnce() -> T) -> T {
        let begun = Instant::now();
        let since = u64::try_from((begun - self.started).as_millis()).unwrap_or(u64::MAX - 1);
        self.waiting.store(since + 1, Ordering::Relaxed);
        let result = call();
        self.waiting.store(0, Ordering::Relaxed);
        self.spent.fetch_add(u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
        result
    }
}

impl Default for Watch {
    fn default() -> Self {
        Self::new()
    }
}
