//! Files of rows (unpacking, and where the elements of a JSON array are), and locks of files.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use napi::Env;
use napi::bindgen_prelude::{Float64Array, Object, Uint8Array};
use napi_derive::napi;

use crate::error::sync;
use crate::worker::once;

/// gzip or zstd, told apart by content, unpacked into `target`; false, and nothing written, if `source` is neither.
#[napi(ts_return_type = "Promise<boolean>")]
pub fn decompress(env: &Env, source: String, target: String) -> napi::Result<Object<'_>> {
    let job = move || arl_text::decompress(&PathBuf::from(source), &PathBuf::from(target));
    once(env, "arl-decompress", job, |unpacked: bool| unpacked)
}

/// The `length` bytes that zstd data holds.
#[napi]
pub fn unpack_zstd(packed: Uint8Array, length: u32) -> napi::Result<Uint8Array> {
    Ok(sync(|| arl_text::unpack_zstd(&packed, length as usize))?.into())
}

/// Byte ranges (start, end, start, end, ...) of the elements of a JSON file whose top level is an array.
#[napi]
pub fn json_array_rows(file: String) -> napi::Result<Float64Array> {
    let ranges = sync(|| arl_text::json_array_rows(&PathBuf::from(file)))?;
    Ok(ranges.into_iter().map(|byte| byte as f64).collect::<Vec<_>>().into())
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
    #[napi]
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
