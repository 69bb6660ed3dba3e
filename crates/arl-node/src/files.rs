//! Files of rows: what they are, unpacking, the places of the elements of a JSON array, and folders for temporary files.

use std::path::PathBuf;

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
