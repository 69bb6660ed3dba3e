//! How much memory images may take while they are decoded, all threads together. An image that fits waits until others
//! have given back enough.

use std::sync::{Condvar, Mutex, PoisonError};

use arl_model::{Error, ErrorCode, Result};

/// Bytes that the images being decoded may take at once. An image that needs more by itself is refused.
pub const MAX_MEMORY: u64 = 2 << 30;

/// A counter of bytes with a bound.
struct Budget {
    limit: u64,
    taken: Mutex<u64>,
    freed: Condvar,
}

static BUDGET: Budget = Budget::new(MAX_MEMORY);

/// A part of the budget; given back when it is dropped.
pub(crate) struct Held<'a> {
    budget: &'a Budget,
    bytes: u64,
}

/// Takes `bytes` of [`MAX_MEMORY`], and waits until there are as many.
pub(crate) fn take(bytes: u64) -> Result<Held<'static>> {
    BUDGET.take(bytes)
}

/// Whether [`take`] would ever give as many.
pub(crate) fn fits(bytes: u64) -> Result<()> {
    BUDGET.fits(bytes)
}

impl Budget {
    const fn new(limit: u64) -> Self {
        Self { limit, taken: Mutex::new(0), freed: Condvar::new() }
    }

    fn fits(&self, bytes: u64) -> Result<()> {
        if bytes > self.limit {
            let message = format!(
                "decoding the image needs {} MiB, more than the {} MiB that images may take",
                bytes >> 20,
                self.limit >> 20
            );
            return Err(Error::new(ErrorCode::Data, message).hint("Scale the image down, or leave it out."));
        }
        Ok(())
    }

    fn take(&self, bytes: u64) -> Result<Held<'_>> {
        self.fits(bytes)?;
        // The count is right whatever happened to another holder, because Held gives back when it unwinds.
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        while *taken + bytes > self.limit {
            taken = self.freed.wait(taken).unwrap_or_else(PoisonError::into_inner);
        }
        *taken += bytes;
        Ok(Held { budget: self, bytes })
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        *self.budget.taken.lock().unwrap_or_else(PoisonError::into_inner) -= self.bytes;
        self.budget.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    #[test]
    fn holders_never_have_more_than_the_limit_and_all_get_their_turn() {
        let budget = Budget::new(100);
        let (now, most, turns) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for thread in 0..8u64 {
                let (budget, now, most, turns) = (&budget, &now, &most, &turns);
                scope.spawn(move || {
                    for turn in 0..50 {
                        let bytes = 1 + (thread * 31 + turn * 17) % 100;
                        let held = budget.take(bytes).unwrap();
                        most.fetch_max(now.fetch_add(bytes, Ordering::SeqCst) + bytes, Ordering::SeqCst);
                        std::thread::yield_now();
                        now.fetch_sub(bytes, Ordering::SeqCst);
                        drop(held);
                        turns.fetch_add(1, Ordering::SeqCst);
                    }
                });
            }
        });
        assert_eq!(turns.into_inner(), 400);
        assert!((1..=100).contains(&most.into_inner()));
        assert_eq!(*budget.taken.lock().unwrap(), 0);
    }

    #[test]
    fn a_picture_that_alone_needs_more_is_refused_and_holds_nothing() {
        let budget = Budget::new(64 << 20);
        let Err(error) = budget.take(65 << 20) else { panic!("65 MiB were given") };
        assert_eq!(error.code, ErrorCode::Data);
        assert!(error.message.contains("needs 65 MiB, more than the 64 MiB"), "{error}");
        drop(budget.take(64 << 20).unwrap());
    }

    #[test]
    fn what_a_thread_that_panicked_had_is_given_back() {
        let budget = Budget::new(10);
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _held = budget.take(10).unwrap();
            panic!("a decoder's defect");
        }));
        assert!(panicked.is_err());
        drop(budget.take(10).unwrap());
    }
}
