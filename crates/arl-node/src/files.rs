//! Files of rows: unpacking, and where the elements of a JSON array lie.

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

/// Byte ranges (start, end, start, end, ...) of the elements of a JSON file whose top level is an array.
#[napi]
pub fn json_array_rows(file: String) -> napi::Result<Float64Array> {
    let ranges = sync(|| arl_text::json_array_rows(&PathBuf::from(file)))?;
    Ok(ranges.into_iter().map(|byte| byte as f64).collect::<Vec<_>>().into())
}
