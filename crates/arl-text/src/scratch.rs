//! Folders for files that are needed only while a process runs, on a disk that the caller chooses. A process that is killed
//! cannot remove its folder; the next one does.

use std::fs::{File, TryLockError};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use arl_model::{Error, ErrorCode, Result};

const PREFIX: &str = ".arl-scratch-";
const LOCK: &str = "lock";
const ATTEMPTS: usize = 100;

static NEXT: AtomicU64 = AtomicU64::new(0);

/// A folder of this process alone. A lock that the system frees however the process ends tells others that it is in use.
#[derive(Debug)]
pub struct ScratchFolder {
    path: PathBuf,
    lock: Option<File>,
}

impl ScratchFolder {
    /// Makes a folder below `parent`, and `parent` where it is missing; removes those that killed processes left there.
    ///
    /// # Errors
    /// `ARL_IO` where the folder cannot be made or locked.
    pub fn create(parent: &Path) -> Result<Self> {
        std::fs::create_dir_all(parent).map_err(|error| Error::io(parent, &error))?;
        remove_abandoned(parent);
        for _ in 0..ATTEMPTS {
            let name = format!("{PREFIX}{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
            let path = parent.join(name);
            match make(&path) {
                Ok(Some(lock)) => return Ok(Self { path, lock: Some(lock) }),
                Ok(None) => {}
                Err(error) => return Err(Error::io(&path, &error)),
            }
        }
        Err(Error::new(ErrorCode::Io, format!("{}: no folder for temporary files can be made", parent.display())))
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes the folder and everything in it. A second call does nothing.
    pub fn close(&mut self) {
        if self.lock.is_some() {
            // What stays is removed by the next process.
            let _ = std::fs::remove_dir_all(&self.path);
        }
        self.lock = None;
    }
}

impl Drop for ScratchFolder {
    fn drop(&mut self) {
        self.close();
    }
}

/// Makes and locks a folder. None: the name is taken, or another process took the new folder for an abandoned one.
fn make(path: &Path) -> io::Result<Option<File>> {
    match std::fs::create_dir(path) {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::AlreadyExists => return Ok(None),
        Err(error) => return Err(error),
    }
    let file = path.join(LOCK);
    let lock = match File::options().create(true).truncate(false).write(true).open(&file) {
        Ok(lock) => lock,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(None),
        Err(TryLockError::Error(error)) => return Err(error),
    }
    // A process removes a folder only while it holds the lock: one that still exists now stays.
    Ok(std::fs::exists(&file)?.then_some(lock))
}

/// Removes folders whose process has ended without doing so. Failures are left to the next process.
fn remove_abandoned(parent: &Path) {
    let Ok(entries) = std::fs::read_dir(parent) else { return };
    for entry in entries.flatten() {
        if !entry.file_name().to_string_lossy().starts_with(PREFIX) {
            continue;
        }
        let path = entry.path();
        match File::options().write(true).open(path.join(LOCK)) {
            Ok(lock) => {
                if lock.try_lock().is_ok() {
                    let _ = std::fs::remove_dir_all(&path);
                }
            }
            // Its process was killed between the two steps, or is about to lock it; then this fails, or it makes another one.
            Err(error) if error.kind() == ErrorKind::NotFound => drop(std::fs::remove_dir(&path)),
            Err(_) => {}
        }
    }
}
