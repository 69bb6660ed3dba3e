//! Files of rows: what they are, unpacking, the places of the elements of a JSON array; folders for temporary files, and locks.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use napi::Env;
use napi::bindgen_prelude::{Float64Array, Object, Uint8Array};
use napi_derive::napi;

use crate::error::sync;
use crate::worker::once;

/// gzip or zstd, recognised by content, unpacked into `target`; false, and nothing written, if `source` is neither.
#[napi(ts_return_type = "Promise<boolean>")]
pub fn decompress(env: &Env, source: String, target: String) -> napi::Result<Object<'_>> {
    let job = move || arl_text::decompress(&PathBuf::from(source), &PathBuf::from(target));
    once(env, "arl-decompress", job, |unpacked: bool| unpacked)
}

/// What the first bytes of a file say that it is.
#[napi(ts_return_type = "'gzip' | 'zstd' | 'UTF-16' | 'UTF-32' | 'other'")]
pub fn sniff(head: Uint8Array) -> &'static str {
    arl_text::sniff(&head).as_str()
}

/// The elements of a JSON array.
#[napi(object)]
pub struct ArrayRows {
    /// The start and the end of each, in bytes.
    pub ranges: Float64Array,
    /// The line on which each begins, counted from 1.
    pub lines: Float64Array,
}

/// Finds the elements of a JSON file whose top level is an array.
#[napi(ts_return_type = "Promise<ArrayRows>")]
pub fn json_array_rows(env: &Env, file: String) -> napi::Result<Object<'_>> {
    let job = move || arl_text::json_array_rows(&PathBuf::from(file));
    let numbers = |values: Vec<u64>| values.into_iter().map(|value| value as f64).collect::<Vec<_>>().into();
    once(env, "arl-json-array", job, move |rows: arl_text::ArrayRows| ArrayRows {
        ranges: numbers(rows.ranges),
        lines: numbers(rows.lines),
    })
}

/// A row with more bytes than this is refused.
#[napi]
pub const MAX_ROW_BYTES: u32 = arl_text::MAX_ROW_BYTES as u32;

/// A folder for files that are needed only while this process runs.
#[napi]
pub struct ScratchFolder {
    core: arl_text::ScratchFolder,
}

#[napi]
impl ScratchFolder {
    /// Makes a folder below `parent`; removes those that killed processes left there.
    #[napi(factory)]
    pub fn create(parent: String) -> napi::Result<Self> {
        Ok(Self { core: sync(|| arl_text::ScratchFolder::create(&PathBuf::from(parent)))? })
    }

    /// Where it is.
    #[napi(getter)]
    pub fn path(&self) -> String {
        self.core.path().to_string_lossy().into_owned()
    }

    /// Removes the folder and everything in it.
    #[napi]
    pub fn close(&mut self) {
        self.core.close();
    }
}

/// A file that this process alone has locked; the system frees it when the process ends, however it ends.
#[napi]
pub struct FileLock {
    core: Mutex<Option<arl_text::FileLock>>,
}

#[napi]
impl FileLock {
    /// Locks the file, and creates it where it is missing; null while another holder has it. `note` becomes its content, for
    /// people to read who has it.
    #[napi(ts_return_type = "FileLock | null")]
    pub fn take(path: String, note: String) -> napi::Result<Option<Self>> {
        sync(|| {
            let Some(mut lock) = arl_text::FileLock::take(&PathBuf::from(path))? else { return Ok(None) };
            // The lock decides; on a disk that is full it does so without a note.
            let _ = lock.note(&note);
            Ok(Some(Self { core: Mutex::new(Some(lock)) }))
        })
    }

    /// Removes the file, and frees the lock. Doing so again has no effect.
    #[napi]
    pub fn release(&self) -> napi::Result<()> {
        let held = self.core.lock().unwrap_or_else(PoisonError::into_inner).take();
        sync(|| held.map_or(Ok(()), arl_text::FileLock::remove))
    }
}
