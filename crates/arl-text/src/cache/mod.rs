//! The token cache: samples on disk, in the order in which they were filled, found by row.
//! Files are only ever appended to; opened again, what is whole is kept and a torn end is cut off.

mod batch;
mod entry;
mod store;

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use arl_model::{Error, ErrorCode, Result};

pub use batch::{BatchImage, MicroBatch};
use entry::{Entry, Kind};
use store::{CachedSample, Store};

use crate::encoder::{Outcome, RowImage, Run, TextEncoder};
use crate::lock::FileLock;
use crate::note::NoteCount;
use crate::problem::RowProblem;

/// Rows that are encoded before what they gave is written; bounds the memory that results take.
const ROWS_AT_ONCE: usize = 1024;

/// What the cache knows of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowState {
    /// Not filled yet.
    Missing,
    /// A sample.
    Sample,
    /// Left out because it is too long, as `truncation: drop` asks.
    Dropped,
    /// It cannot be used.
    Problem,
}

/// What one call of `fill` did. Rows that were there already count as they did the first time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FillReport {
    /// Rows that gave a sample.
    pub rows: usize,
    /// Their tokens.
    pub tokens: usize,
    /// Their targets.
    pub target_tokens: usize,
    /// Samples of which something was cut off.
    pub truncated: usize,
    /// Rows left out for their length.
    pub dropped: usize,
    /// Rows that cannot be used, in the order of the call.
    pub problems: Vec<RowProblem>,
}

/// The samples of one source.
pub struct TokenCache {
    encoder: Arc<TextEncoder>,
    store: Mutex<Store>,
    /// Held as long as this process uses the files.
    _lock: FileLock,
    /// A copy of this process alone, removed at the end, because another process holds the shared one.
    private: Option<PathBuf>,
}

impl TokenCache {
    /// Opens the cache of the source that `key` names, for `rows` rows, below `dir`; continues one that exists.
    /// While another process has it open, this one gets a private copy and fills it from the start.
    ///
    /// # Errors
    /// `ARL_IO` where the folder or its files cannot be used.
    pub fn open(dir: &Path, key: &str, rows: usize, encoder: Arc<TextEncoder>) -> Result<Self> {
        if u32::try_from(rows).is_err() {
            return Err(Error::new(ErrorCode::Data, format!("{rows} rows are more than a cache can hold")));
        }
        let mut hash = blake3::Hasher::new();
        hash.update(&(key.len() as u64).to_le_bytes());
        hash.update(key.as_bytes());
        hash.update(encoder.info().fingerprint.as_bytes());
        hash.update(&(rows as u64).to_le_bytes());
        let hash = hash.finalize();
        let name = hash.to_hex()[..24].to_owned();
        let shared = dir.join(&name);
        std::fs::create_dir_all(&shared).map_err(|error| Error::io(&shared, &error))?;
        remove_abandoned(dir, &name);
        if let Some(lock) = lock(&shared)? {
            let store = Store::open(&shared, hash.as_bytes(), rows)?;
            return Ok(Self { encoder, store: Mutex::new(store), _lock: lock, private: None });
        }
        for attempt in 0..1000 {
            let folder = dir.join(format!("{name}-private-{}-{attempt}", std::process::id()));
            match std::fs::create_dir(&folder) {
                Ok(()) => {}
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => continue,
                Err(error) => return Err(Error::io(&folder, &error)),
            }
            if let Some(lock) = lock(&folder)? {
                let store = Store::open(&folder, hash.as_bytes(), rows)?;
                return Ok(Self { encoder, store: Mutex::new(store), _lock: lock, private: Some(folder) });
            }
        }
        Err(Error::new(ErrorCode::State, format!("{}: the token cache is in use", shared.display())))
    }

    /// Another process holds the shared files, so this cache is a private copy that ends with it.
    pub fn is_private(&self) -> bool {
        self.private.is_some()
    }

    fn store(&self) -> MutexGuard<'_, Store> {
        // A panic between two appends leaves the store as after a torn write, which `Store` is made for.
        self.store.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Encodes rows on all cores and appends them; `indexes[i]` is the row of `rows[i]`. Rows that are there already are
    /// not encoded again.
    ///
    /// # Errors
    /// `ARL_DATA` for an index beyond the source; `ARL_IO` where the disk refuses (what was written before is kept).
    pub fn fill(&self, rows: &[&[u8]], indexes: &[u32]) -> Result<FillReport> {
        self.fill_with_images(rows, indexes, &[])
    }

    /// The same; `images[i]` are the images of `rows[i]` (absent: none), in the order of [`TextEncoder::image_refs`].
    ///
    /// # Errors
    /// As [`TokenCache::fill`].
    pub fn fill_with_images(&self, rows: &[&[u8]], indexes: &[u32], images: &[Vec<RowImage>]) -> Result<FillReport> {
        if rows.len() != indexes.len() || (!images.is_empty() && images.len() != rows.len()) {
            let what = format!("{} rows, {} indexes, images of {}", rows.len(), indexes.len(), images.len());
            return Err(Error::new(ErrorCode::Internal, what));
        }
        let mut report = FillReport::default();
        for (i, (rows, indexes)) in rows.chunks(ROWS_AT_ONCE).zip(indexes.chunks(ROWS_AT_ONCE)).enumerate() {
            let images = images.get(i * ROWS_AT_ONCE..).unwrap_or_default();
            self.fill_chunk(rows, indexes, images, &mut report)?;
        }
        Ok(report)
    }

    /// `images`: of these rows and perhaps of rows behind them.
    fn fill_chunk(
        &self,
        rows: &[&[u8]],
        indexes: &[u32],
        images: &[Vec<RowImage>],
        report: &mut FillReport,
    ) -> Result<()> {
        let mut new_rows = Vec::new();
        let mut new_indexes = Vec::new();
        let mut new_images = Vec::new();
        {
            let store = self.store();
            for (i, (bytes, &index)) in rows.iter().zip(indexes).enumerate() {
                if store.entry(index)?.is_none() {
                    new_rows.push(*bytes);
                    new_indexes.push(index);
                    new_images.push(images.get(i).map(Vec::as_slice).unwrap_or_default());
                }
            }
        }
        let outcomes = self.encoder.encode_rows(&new_rows, &new_indexes, &new_images);
        let mut store = self.store();
        let mut batch = store.batch();
        let mut added = HashSet::new();
        for (outcome, &index) in outcomes.into_iter().zip(&new_indexes) {
            // Another call may have filled it meanwhile, or the caller names it twice.
            if store.entry(index)?.is_some() || !added.insert(index) {
                continue;
            }
            match outcome {
                Ok(Outcome::Sample(sample)) => batch.sample(index, &sample),
                Ok(Outcome::Dropped(tokens)) => batch.dropped(index, tokens),
                Err(problem) => batch.problem(index, &problem),
            }
        }
        store.append(batch)?;
        for &index in indexes {
            let Some(entry) = store.entry(index)? else { continue };
            match entry.kind {
                Kind::Sample => {
                    report.rows += 1;
                    report.tokens += entry.ids as usize;
                    report.target_tokens += entry.targets as usize;
                    report.truncated += usize::from(entry.truncated);
                }
                Kind::Dropped => report.dropped += 1,
                Kind::Problem => {
                    let (reason, message) = store.problem(&entry)?;
                    report.problems.push(RowProblem { row: index as usize, reason, message });
                }
            }
        }
        Ok(())
    }

    /// Tokens of every row; 0: not there yet, dropped, or a problem.
    pub fn lengths(&self) -> Vec<u32> {
        let length = |entry: &Option<Entry>| match entry {
            Some(entry) if entry.kind == Kind::Sample => entry.ids,
            _ => 0,
        };
        self.store().entries().iter().map(length).collect()
    }

    /// What the cache knows of every row.
    pub fn states(&self) -> Vec<RowState> {
        let state = |entry: &Option<Entry>| match entry.as_ref().map(|entry| entry.kind) {
            None => RowState::Missing,
            Some(Kind::Sample) => RowState::Sample,
            Some(Kind::Dropped) => RowState::Dropped,
            Some(Kind::Problem) => RowState::Problem,
        };
        self.store().entries().iter().map(state).collect()
    }

    /// What was noticed in the samples that are filled, by this process or an earlier one.
    pub fn notes(&self) -> Vec<NoteCount> {
        self.store().notes()
    }

    /// Rows that are filled, samples or not.
    pub fn filled(&self) -> usize {
        self.store().filled()
    }

    /// A sample's ids and weights.
    ///
    /// # Errors
    /// `ARL_DATA` where the row is no sample of this cache; `ARL_STATE` where the files changed underneath.
    pub fn sample(&self, row: u32) -> Result<(Vec<u32>, Vec<Run>)> {
        self.cached(row).map(|sample| (sample.ids, sample.runs))
    }

    fn cached(&self, row: u32) -> Result<CachedSample> {
        let store = self.store();
        match store.entry(row)? {
            Some(entry) if entry.kind == Kind::Sample => store.sample(&entry),
            _ => Err(Error::new(ErrorCode::Data, format!("row {row} has no tokens in the cache"))),
        }
    }

    /// Samples side by side, in the order of `rows`.
    ///
    /// # Errors
    /// As [`TokenCache::sample`].
    pub fn micro_batch(&self, rows: &[u32]) -> Result<MicroBatch> {
        let samples: Vec<_> = rows.iter().map(|&row| Ok((row, self.cached(row)?))).collect::<Result<_>>()?;
        MicroBatch::of(&samples, self.encoder.vision())
    }

    /// Groups of positions into `rows`, each of at most `max_tokens` tokens together; see [`crate::pack()`].
    ///
    /// # Errors
    /// `ARL_DATA` names a row that is too long or has no tokens.
    pub fn pack(&self, rows: &[u32], max_tokens: usize) -> Result<Vec<Vec<u32>>> {
        let lengths = self.lengths();
        let of = |&row: &u32| match lengths.get(row as usize) {
            Some(&length) if length > 0 && length as usize <= max_tokens => Ok(length),
            Some(&length) if length > 0 => Err(Error::new(
                ErrorCode::Data,
                format!("row {row} has {length} tokens; a micro-batch may have {max_tokens}"),
            )
            .hint("raise max_tokens_per_micro_batch, or set max_length and truncation")),
            _ => Err(Error::new(ErrorCode::Data, format!("row {row} has no tokens in the cache"))),
        };
        let lengths: Vec<u32> = rows.iter().map(of).collect::<Result<_>>()?;
        crate::pack::pack(&lengths, max_tokens)
    }

    /// What is filled is on disk from here on, also if the machine stops.
    ///
    /// # Errors
    /// `ARL_IO` where the disk refuses.
    pub fn sync(&self) -> Result<()> {
        self.store().sync()
    }
}

impl Drop for TokenCache {
    fn drop(&mut self) {
        if let Some(folder) = &self.private {
            // Nothing depends on it; what stays is removed by the next process.
            let _ = std::fs::remove_dir_all(folder);
        }
    }
}

/// The folder's lock, or nothing where another holds it.
fn lock(folder: &Path) -> Result<Option<FileLock>> {
    FileLock::take(&folder.join("lock"))
}

/// Private copies whose process was killed.
fn remove_abandoned(dir: &Path, name: &str) {
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    let prefix = format!("{name}-private-");
    for entry in entries.flatten() {
        let own = format!("{prefix}{}-", std::process::id());
        let file_name = entry.file_name();
        let file_name = file_name.to_string_lossy();
        if file_name.starts_with(&prefix)
            && !file_name.starts_with(&own)
            && let Ok(Some(_held)) = lock(&entry.path())
        {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}
