//! Parquet files as rows, and rows as Parquet files: conversions only. Files are read and written on threads of their own.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use arl_model::{Error, ErrorCode};
use napi::Env;
use napi::bindgen_prelude::{Float64Array, Object, Uint8Array};
use napi_derive::napi;

use crate::error::sync;
use crate::worker::once;

/// How a Parquet file is read. Columns are given by the names that they have in the file.
#[napi(object)]
pub struct ParquetOptions {
    /// The file.
    pub path: String,
    /// What a user knows it by.
    pub name: String,
    /// The file that gets the rows; must not exist yet.
    pub spill: String,
    /// Columns of lists and objects: text in them is their JSON.
    pub nested: Vec<String>,
    /// Of these, columns of images and the like, in which bytes are no text.
    pub media: Vec<String>,
    /// Columns of lists of objects: a list of texts in them is a list of their JSON.
    pub objects: Vec<String>,
    /// The column of the conversation.
    pub messages: String,
}

/// How many of something a top-level column has.
#[napi(object)]
pub struct ColumnCount {
    /// The column.
    pub column: String,
    /// How many.
    pub count: f64,
}

/// The rows of a Parquet file, which are in the spill file.
#[napi(object)]
pub struct ParquetRows {
    /// The start and the end of each, in bytes.
    pub ranges: Float64Array,
    /// Nulls in structs, which were left out.
    pub left_out: Vec<ColumnCount>,
    /// Floats that are NaN or infinite.
    pub not_finite: Vec<ColumnCount>,
}

fn counts(counts: Vec<(String, u64)>) -> Vec<ColumnCount> {
    counts.into_iter().map(|(column, count)| ColumnCount { column, count: count as f64 }).collect()
}

/// Reads a Parquet file.
#[napi]
pub struct ParquetReader {
    options: arl_parquet::ReadOptions,
    cancelled: Arc<AtomicBool>,
}

#[napi]
impl ParquetReader {
    /// Opens nothing yet.
    #[napi(factory)]
    pub fn create(options: ParquetOptions) -> Self {
        let ParquetOptions { path, name, spill, nested, media, objects, messages } = options;
        let columns = arl_parquet::ColumnNames { nested, media, objects, messages };
        let options = arl_parquet::ReadOptions { path: path.into(), name, spill: spill.into(), columns };
        Self { options, cancelled: Arc::default() }
    }

    /// Writes all rows to the spill file.
    #[napi(ts_return_type = "Promise<ParquetRows>")]
    pub fn read<'env>(&self, env: &'env Env) -> napi::Result<Object<'env>> {
        let (options, cancelled) = (self.options.clone(), Arc::clone(&self.cancelled));
        let job = move || arl_parquet::read(&options, &cancelled);
        once(env, "arl-parquet", job, |rows| ParquetRows {
            ranges: rows.ranges.into_iter().map(|place| place as f64).collect::<Vec<_>>().into(),
            left_out: counts(rows.left_out),
            not_finite: counts(rows.not_finite),
        })
    }

    /// Ends the reading with `ARL_INTERRUPTED`.
    #[napi]
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }
}

/// Writes a Parquet file.
#[napi]
pub struct ParquetWriter {
    core: Arc<Mutex<Option<arl_parquet::Writer>>>,
}

fn closed() -> Error {
    Error::new(ErrorCode::Internal, "the Parquet file is closed")
}

#[napi]
impl ParquetWriter {
    /// Begins a file at `path`, which messages call `name`.
    #[napi(factory)]
    pub fn create(path: String, name: String) -> napi::Result<Self> {
        let writer = sync(|| arl_parquet::Writer::create(&PathBuf::from(path), &name))?;
        Ok(Self { core: Arc::new(Mutex::new(Some(writer))) })
    }

    /// Adds rows, each a JSON object as text. The file is closed where one cannot be written.
    #[napi(ts_return_type = "Promise<void>")]
    pub fn write<'env>(&self, env: &'env Env, rows: Vec<Uint8Array>) -> napi::Result<Object<'env>> {
        // Copied, so that no thread reads memory that JavaScript can write.
        let rows: Vec<Vec<u8>> = rows.iter().map(|row| row.to_vec()).collect();
        let core = Arc::clone(&self.core);
        let job = move || {
            let mut core = core.lock().unwrap_or_else(PoisonError::into_inner);
            let mut writer = core.take().ok_or_else(closed)?;
            rows.iter().try_for_each(|row| writer.add(row))?;
            *core = Some(writer);
            Ok(())
        };
        once(env, "arl-parquet", job, |()| ())
    }

    /// Ends the file and resolves with the number of its rows.
    #[napi(ts_return_type = "Promise<number>")]
    pub fn finish<'env>(&self, env: &'env Env) -> napi::Result<Object<'env>> {
        let core = Arc::clone(&self.core);
        let job = move || {
            let writer = core.lock().unwrap_or_else(PoisonError::into_inner).take();
            writer.ok_or_else(closed)?.finish()
        };
        once(env, "arl-parquet", job, |rows: u64| rows as f64)
    }
}
