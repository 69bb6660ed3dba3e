//! Locks of files: one process at a time. The system frees a lock when its process ends, however it ends.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use arl_model::{Error, Result};

use crate::system;

/// A file that this process alone has locked. Dropping it frees the lock and leaves the file.
#[derive(Debug)]
pub struct FileLock {
    file: File,
    path: PathBuf,
}

impl FileLock {
    /// Locks the file at `path`, and creates it where it is missing; `None` while another holder has it, in this process or
    /// in another.
    ///
    /// # Errors
    /// `ARL_IO` where the file cannot be opened, or its file system knows no locks.
    pub fn take(path: &Path) -> Result<Option<Self>> {
        loop {
            let file = system::open_lock(path).map_err(|error| Error::io(path, &error))?;
            match file.try_lock() {
                Ok(()) => {}
                Err(std::fs::TryLockError::WouldBlock) => return Ok(None),
                Err(std::fs::TryLockError::Error(error)) => return Err(Error::io(path, &error)),
            }
            // Between opening and locking, a holder may have removed the file: then the lock is on a file that nobody else
            // can find, and another process may hold the one that has its name now.
            if system::is_at(&file, path).map_err(|error| Error::io(path, &error))? {
                return Ok(Some(Self { file, path: path.to_owned() }));
            }
        }
    }

    /// Writes down who has the lock, for people to read.
    ///
    /// # Errors
    /// `ARL_IO` where the file cannot be written.
    pub fn note(&mut self, text: &str) -> Result<()> {
        let write = self.file.set_len(0).and_then(|()| self.file.write_all(text.as_bytes()));
        write.map_err(|error| Error::io(&self.path, &error))
    }

    /// Removes the file, and frees the lock.
    ///
    /// # Errors
    /// `ARL_IO` where the file cannot be removed; the lock is free then too.
    pub fn remove(self) -> Result<()> {
        system::remove_lock(self.file, &self.path).map_err(|error| Error::io(&self.path, &error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Outcome = std::result::Result<(), Box<dyn std::error::Error>>;

    #[test]
    fn one_holder_at_a_time_and_the_next_one_after_it() -> Outcome {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("lock");
        let held = FileLock::take(&path)?.ok_or("nobody holds it")?;
        assert!(FileLock::take(&path)?.is_none());
        drop(held);
        let held = FileLock::take(&path)?.ok_or("it was dropped")?;
        held.remove()?;
        assert!(!path.exists());
        assert!(FileLock::take(&path)?.is_some());
        Ok(())
    }

    #[test]
    fn the_note_is_the_holders_own_whatever_the_file_held() -> Outcome {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("lock");
        std::fs::write(&path, "a much longer note of an earlier holder")?;
        FileLock::take(&path)?.ok_or("nobody holds it")?.note("process 1")?;
        assert_eq!(std::fs::read_to_string(&path)?, "process 1");
        Ok(())
    }

    #[test]
    fn holders_that_remove_the_file_never_overlap() -> Outcome {
        use std::sync::atomic::{AtomicUsize, Ordering};
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("lock");
        let (inside, most, turns) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..2000 {
                        let Ok(Some(held)) = FileLock::take(&path) else { continue };
                        most.fetch_max(inside.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                        turns.fetch_add(1, Ordering::SeqCst);
                        inside.fetch_sub(1, Ordering::SeqCst);
                        let _ = held.remove();
                    }
                });
            }
        });
        assert_eq!(most.load(Ordering::SeqCst), 1);
        assert!(turns.load(Ordering::SeqCst) > 100);
        Ok(())
    }
}
