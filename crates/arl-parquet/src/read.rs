//! A Parquet file as rows: its columns become JSON text, a row a line, in a file of their own. At most one page of each column
//! is held at a time, whatever the size of the row groups.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use arl_model::{Error, ErrorCode, Result};
use parquet::basic::Compression;
use parquet::file::metadata::ParquetMetaData;

use crate::footer;
use crate::leaf::{Leaf, codec_name};
use crate::notes::{self, Notes};
use crate::rows::Cursors;
use crate::schema::{Builder, ColumnNames, Field};

/// Bytes that are read ahead, of all columns together.
const READ_AHEAD: usize = 32 << 20;

const FLUSH: usize = 4 << 20;

/// What to do about a damaged file.
pub(crate) const DAMAGED: &str = "The file is damaged or not complete: copy or write it again.";

/// How a file is read.
#[derive(Clone, Debug)]
pub struct ReadOptions {
    /// The Parquet file.
    pub path: PathBuf,
    /// What a user knows it by.
    pub name: String,
    /// Gets the rows; must not exist yet.
    pub spill: PathBuf,
    /// The names that columns have in it.
    pub columns: ColumnNames,
}

/// What was read. Counts are by top-level column, in the order in which columns first had one.
#[derive(Clone, Debug, Default)]
pub struct Rows {
    /// Where each row starts and ends in the spill file: start, end, start, end, ...
    pub ranges: Vec<u64>,
    /// Nulls in structs, which were left out.
    pub left_out: Vec<(String, u64)>,
    /// Floats that are NaN or infinite.
    pub not_finite: Vec<(String, u64)>,
}

pub(crate) fn damaged(name: &str, what: &str) -> Error {
    Error::new(ErrorCode::Data, format!("{name}: {what}")).hint(DAMAGED)
}

fn refused(name: &str, what: &str, hint: &str) -> Error {
    Error::new(ErrorCode::Data, format!("{name}: {what}")).hint(hint)
}

/// Writes all rows of a file to the spill file.
///
/// # Errors
/// `ARL_DATA` for a file that is damaged, encrypted, empty, or has what is not read; `ARL_IO` where a file cannot be read or
/// written; `ARL_INTERRUPTED` once `cancelled` is set.
pub fn read(options: &ReadOptions, cancelled: &AtomicBool) -> Result<Rows> {
    let name = options.name.as_str();
    let file = File::open(&options.path).map_err(|error| Error::io(&options.path, &error))?;
    let metadata = footer::read(&file, name)?;
    if metadata.row_groups().iter().all(|group| group.num_rows() == 0) {
        return Err(refused(name, "the Parquet file has no rows", "Is it the right one?"));
    }
    check_chunks(name, &metadata)?;
    let columns = columns(&metadata, &options.columns);
    if columns.is_empty() {
        return Err(refused(name, "the Parquet file has no columns", ""));
    }
    let (shared, schema) = (Arc::<str>::from(name), metadata.file_metadata().schema_descr());
    let leaves = schema.columns().iter().map(|column| Leaf::new(Arc::clone(&shared), Arc::clone(column)));
    let mut cursors = Cursors::new(leaves.collect());
    let mut spill = Spill::create(&options.spill, name)?;
    let file = Arc::new(file);
    let read_ahead = (READ_AHEAD / schema.num_columns()).clamp(16 << 10, 1 << 20);
    for (index, group) in metadata.row_groups().iter().enumerate() {
        for (leaf, chunk) in cursors.leaves.iter_mut().zip(group.columns()) {
            leaf.open(&file, chunk, index, read_ahead)?;
        }
        for _ in 0..group.num_rows() {
            if cancelled.load(Ordering::Relaxed) {
                let what = format!("interrupted while {name} was read; nothing was trained");
                return Err(Error::new(ErrorCode::Interrupted, what));
            }
            let start = cursors.out.len();
            cursors.row(&columns)?;
            for leaf in &mut cursors.leaves {
                if leaf.repetition()? != 0 {
                    let row = spill.ranges.len() / 2;
                    return Err(leaf.damaged(&format!("it is not at the same row as the others (row {row})")));
                }
            }
            spill.end_row(&mut cursors.out, start)?;
        }
        for leaf in &mut cursors.leaves {
            if !leaf.ended()? {
                return Err(leaf.damaged("it has more entries than the row group has rows"));
            }
        }
    }
    spill.flush(&mut cursors.out)?;
    let (said, rows) = (metadata.file_metadata().num_rows(), spill.ranges.len() / 2);
    // Some writers leave the sum at 0.
    if said != 0 && said != rows as i64 {
        let what = format!("the Parquet file says to have {said} rows, and its row groups have {rows}");
        return Err(damaged(name, &what));
    }
    Ok(Rows { ranges: spill.ranges, left_out: cursors.left_out.0, not_finite: cursors.not_finite.0 })
}

/// Refuses what no column can be read of.
fn check_chunks(name: &str, metadata: &ParquetMetaData) -> Result<()> {
    for chunk in metadata.row_groups().iter().flat_map(|group| group.columns()) {
        if let Some(path) = chunk.file_path().filter(|path| !path.is_empty()) {
            let what = format!("column {} is in another file ({path})", chunk.column_path().string());
            return Err(refused(name, &what, ""));
        }
        if chunk.compression() == Compression::LZO {
            let what = format!("pages compressed with {}, which is not read", codec_name(chunk));
            return Err(refused(name, &what, "Write it with zstd, snappy, gzip, brotli or lz4."));
        }
    }
    Ok(())
}

/// The top-level columns with their names.
fn columns(metadata: &ParquetMetaData, names: &ColumnNames) -> Vec<(String, Field)> {
    let file = metadata.file_metadata();
    let entry = file.key_value_metadata().and_then(|entries| entries.iter().find(|entry| entry.key == notes::KEY));
    let notes = entry.and_then(|entry| entry.value.as_deref()).map(Notes::parse).unwrap_or_default();
    let mut builder = Builder { names, json: &notes.json, leaves: 0 };
    let fields = file.schema_descr().root_schema().get_fields();
    let column = fields.iter().map(|field| {
        let name = field.name().to_owned();
        let (key, omits_null) = (crate::json::key(&name), notes.absent.contains(&name));
        let node = builder.column(field);
        (name, Field { key, node, omits_null })
    });
    column.collect()
}

/// The file that rows are written to.
struct Spill<'a> {
    path: &'a Path,
    /// The source, for messages.
    name: &'a str,
    file: File,
    written: u64,
    ranges: Vec<u64>,
}

impl<'a> Spill<'a> {
    fn create(path: &'a Path, name: &'a str) -> Result<Self> {
        let file = File::create_new(path).map_err(|error| Error::io(path, &error))?;
        Ok(Self { path, name, file, written: 0, ranges: Vec::new() })
    }

    /// Ends the row that begins at `start` of what is not written yet.
    fn end_row(&mut self, out: &mut Vec<u8>, start: usize) -> Result<()> {
        self.ranges.extend([self.written + start as u64, self.written + out.len() as u64]);
        // The line's end is not part of the row; with it the content is that of the same rows as JSONL.
        out.push(b'\n');
        if out.len() >= FLUSH { self.flush(out) } else { Ok(()) }
    }

    fn flush(&mut self, out: &mut Vec<u8>) -> Result<()> {
        self.file.write_all(out).map_err(|error| match error.kind() {
            std::io::ErrorKind::StorageFull => {
                let folder = self.path.parent().unwrap_or(self.path).display();
                Error::new(ErrorCode::Io, format!("{}: no space is left in {folder} for the rows as text", self.name))
                    .hint("Free some space, or give a folder with more as cache_dir.")
            }
            _ => Error::io(self.path, &error),
        })?;
        self.written += out.len() as u64;
        out.clear();
        Ok(())
    }
}
