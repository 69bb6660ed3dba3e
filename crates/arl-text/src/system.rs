//! What differs between systems about files that stay open: reads and writes at a place, and the life of a lock's file.
//! Imports nothing of the crate.

use std::fs::File;
use std::io;
use std::path::Path;

#[cfg(unix)]
mod at {
    use std::fs::File;
    use std::io;
    use std::os::unix::fs::{FileExt as _, MetadataExt as _};
    use std::path::Path;

    pub(crate) fn read_exact_at(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        file.read_exact_at(bytes, offset)
    }

    pub(crate) fn write_all_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
        file.write_all_at(bytes, offset)
    }

    pub(super) fn open_lock(path: &Path) -> io::Result<File> {
        File::options().create(true).truncate(false).write(true).open(path)
    }

    pub(super) fn is_at(file: &File, path: &Path) -> io::Result<bool> {
        let own = file.metadata()?;
        let there = std::fs::metadata(path)?;
        Ok((own.dev(), own.ino()) == (there.dev(), there.ino()))
    }

    /// Removed first and unlocked then: in between nobody can lock a file that is about to go.
    pub(super) fn remove_lock(file: File, path: &Path) -> io::Result<()> {
        let removed = std::fs::remove_file(path);
        drop(file);
        removed
    }
}

#[cfg(windows)]
mod at {
    use std::fs::File;
    use std::io;
    use std::os::windows::fs::{FileExt as _, OpenOptionsExt as _};
    use std::path::Path;

    /// `FILE_SHARE_READ | FILE_SHARE_WRITE`: while a lock's file is open, nobody can remove it.
    const SHARED_BUT_NOT_REMOVED: u32 = 1 | 2;
    /// `ERROR_SHARING_VIOLATION`: somebody else has the file open.
    const IN_USE: i32 = 32;

    pub(crate) fn read_exact_at(file: &File, mut bytes: &mut [u8], mut offset: u64) -> io::Result<()> {
        while !bytes.is_empty() {
            let read = file.seek_read(bytes, offset)?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            bytes = &mut bytes[read..];
            offset += read as u64;
        }
        Ok(())
    }

    pub(crate) fn write_all_at(file: &File, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
        while !bytes.is_empty() {
            let written = file.seek_write(bytes, offset)?;
            if written == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            bytes = &bytes[written..];
            offset += written as u64;
        }
        Ok(())
    }

    pub(super) fn open_lock(path: &Path) -> io::Result<File> {
        let mut options = File::options();
        options.create(true).truncate(false).write(true).share_mode(SHARED_BUT_NOT_REMOVED).open(path)
    }

    /// A file that is open cannot have been removed.
    pub(super) fn is_at(_file: &File, path: &Path) -> io::Result<bool> {
        path.try_exists()
    }

    /// Unlocked first, as no open file can be removed; another process that opens it in between keeps it.
    pub(super) fn remove_lock(file: File, path: &Path) -> io::Result<()> {
        drop(file);
        match std::fs::remove_file(path) {
            Err(error) if error.raw_os_error() == Some(IN_USE) => Ok(()),
            removed => removed,
        }
    }
}

pub(crate) use at::{read_exact_at, write_all_at};

/// Opens the file of a lock, and creates it where it is missing.
pub(crate) fn open_lock(path: &Path) -> io::Result<File> {
    at::open_lock(path)
}

/// Whether `file` is the one that `path` leads to.
pub(crate) fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    match at::is_at(file, path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        found => found,
    }
}

/// Removes the file of a lock, and frees the lock; a file that is gone already is no error.
pub(crate) fn remove_lock(file: File, path: &Path) -> io::Result<()> {
    match at::remove_lock(file, path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}
