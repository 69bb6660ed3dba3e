//! The addon: the only crate that knows napi. It turns values and errors between JavaScript and the core, puts long work
//! on threads of its own, and holds no logic. Field names in JavaScript are those of Rust in camelCase.

pub mod adapter;
pub mod batch;
pub mod cuda;
pub mod device;
pub mod engine;
mod error;
pub mod files;
pub mod images;
mod memory;
pub mod parquet;
mod parts;
pub mod ranks;
pub mod text;
pub mod values;
mod worker;

use napi_derive::napi;

/// Version of the addon.
#[napi]
pub fn version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}

/// Every code that an error of the core can have.
#[napi]
pub fn error_codes() -> Vec<&'static str> {
    arl_model::ErrorCode::ALL.iter().map(|code| code.as_str()).collect()
}
