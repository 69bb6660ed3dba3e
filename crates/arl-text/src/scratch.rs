//! Folders for files that are needed only while a process runs, on a disk that the caller chooses. A process that is killed
//! cannot remove its folder; the next one does.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use arl_model::{Error, ErrorCode, Result};

use crate::lock::FileLock;

const PREFIX: &str = ".arl-scratch-";
const LOCK: &str = "lock";
const ATTEMPTS: usize = 100;

static NEXT: AtomicU64 = AtomicU64::new(0);

/// A folder of this process alone. A lock, which the system frees however the process ends, shows others that it is in use.
#[derive(Debug)]
pub struct ScratchFolder {
    path: PathBuf,
    lock: Option<FileLock>,
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
            if let Some(lock) = make(&path)? {
                return Ok(Self { path, lock: Some(lock) });
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
fn make(path: &Path) -> Result<Option<FileLock>> {
    match std::fs::create_dir(path) {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::AlreadyExists => return Ok(None),
        Err(error) => return Err(Error::io(path, &error)),
    }
    match FileLock::take(&path.join(LOCK)) {
        Err(_) if !path.exists() => Ok(None),
        lock => lock,
    }
}

/// Removes folders whose process has ended without doing so. Failures are left to the next process.
fn remove_abandoned(parent: &Path) {
    let Ok(entries) = std::fs::read_dir(parent) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        // A process that has made its folder and not locked it yet finds it locked or gone, and makes another one.
        if entry.file_name().to_string_lossy().starts_with(PREFIX)
            && let Ok(Some(_held)) = FileLock::take(&path.join(LOCK))
        {
            let _ = std::fs::remove_dir_all(&path);
        }
    }
}
