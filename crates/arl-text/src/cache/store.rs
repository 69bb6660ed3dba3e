//! The cache's two files. `tokens` holds ids, runs, images and texts of problems; `index` one entry of fixed size a row.
//! An entry carries checksums of itself and of its data, so that a write that was cut off is seen and undone.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use arl_model::{Error, ErrorCode, Result};
use rayon::prelude::*;

use super::entry::{ENTRY, Entry, IMAGE, Kind, checksum};
use crate::encoder::{Encoded, MeasuredImage, Run, targets_in};
use crate::note::{NoteCount, NoteTotals, Notes};
use crate::problem::RowProblem;
use crate::system::{read_exact_at, write_all_at};

const MAGIC: &[u8; 8] = b"ARLTOKEN";
const VERSION: u32 = 3;
/// Magic, version, four bytes of zero, rows, hash of the key.
const HEADER: u64 = 8 + 4 + 4 + 8 + 32;

/// A sample as it was stored.
#[derive(Clone, Debug, Default)]
pub(super) struct CachedSample {
    pub(super) ids: Vec<u32>,
    pub(super) runs: Vec<Run>,
    /// Each with its number in the row.
    pub(super) images: Vec<(u32, MeasuredImage)>,
}

/// Rows that are to be appended together.
pub(super) struct Batch {
    offset: u64,
    data: Vec<u8>,
    entries: Vec<Entry>,
    notes: Vec<(u32, Notes)>,
}

impl Batch {
    fn add(&mut self, mut entry: Entry, data: &[u8]) {
        entry.offset = self.offset + self.data.len() as u64;
        entry.checksum = checksum(data);
        self.data.extend_from_slice(data);
        self.entries.push(entry);
    }

    pub(super) fn sample(&mut self, row: u32, sample: &Encoded) {
        let mut data = Vec::with_capacity(sample.ids.len() * 4 + sample.runs.len() * 8);
        data.extend(sample.ids.iter().flat_map(|id| id.to_le_bytes()));
        for run in &sample.runs {
            data.extend(run.length.to_le_bytes());
            data.extend(run.weight.to_le_bytes());
        }
        for image in &sample.images {
            data.extend(image.place.to_le_bytes());
            data.extend(image.image.hash);
            data.extend(image.image.height.to_le_bytes());
            data.extend(image.image.width.to_le_bytes());
        }
        let notes = sample.notes.to_bytes();
        data.extend(&notes);
        let entry = Entry {
            row,
            kind: Kind::Sample,
            truncated: sample.truncated,
            ids: sample.ids.len() as u32,
            runs: sample.runs.len() as u32,
            targets: targets_in(&sample.runs) as u32,
            images: sample.images.len() as u32,
            notes: notes.len() as u32,
            offset: 0,
            checksum: 0,
        };
        self.add(entry, &data);
        self.notes.push((row, sample.notes.clone()));
    }

    pub(super) fn dropped(&mut self, row: u32, tokens: usize) {
        self.add(Entry::without_tokens(row, Kind::Dropped, u32::try_from(tokens).unwrap_or(u32::MAX), 0), &[]);
    }

    pub(super) fn problem(&mut self, row: u32, problem: &RowProblem) {
        let mut data = problem.reason.clone().into_bytes();
        data.extend(problem.message.as_bytes());
        let (ids, runs) = (problem.reason.len() as u32, problem.message.len() as u32);
        self.add(Entry::without_tokens(row, Kind::Problem, ids, runs), &data);
    }
}

/// The open files, and the entry of each row.
pub(super) struct Store {
    data: File,
    index: File,
    data_path: PathBuf,
    index_path: PathBuf,
    data_size: u64,
    index_size: u64,
    entries: Vec<Option<Entry>>,
    filled: usize,
    notes: NoteTotals,
}

impl Store {
    /// Opens or creates the files. Files of another key, version or number of rows are replaced.
    pub(super) fn open(folder: &Path, key: &[u8; 32], rows: usize) -> Result<Self> {
        let (data_path, index_path) = (folder.join("tokens"), folder.join("index"));
        let open = |path: &Path| {
            let file = File::options().create(true).truncate(false).read(true).write(true).open(path);
            file.map_err(|error| Error::io(path, &error))
        };
        let (data, index) = (open(&data_path)?, open(&index_path)?);
        let mut header = Vec::with_capacity(HEADER as usize);
        header.extend(MAGIC);
        header.extend(VERSION.to_le_bytes());
        header.extend([0; 4]);
        header.extend((rows as u64).to_le_bytes());
        header.extend(key);
        let mut store = Self {
            data,
            index,
            data_path,
            index_path,
            data_size: HEADER,
            index_size: HEADER,
            entries: vec![None; rows],
            filled: 0,
            notes: NoteTotals::default(),
        };
        let whole = has_header(&mut store.data, &store.data_path, &header)?
            && has_header(&mut store.index, &store.index_path, &header)?;
        if whole {
            store.recover()?
        } else {
            store.begin(&header)?
        }
        Ok(store)
    }

    fn data_error(&self, error: &std::io::Error) -> Error {
        Error::io(&self.data_path, error)
    }

    fn index_error(&self, error: &std::io::Error) -> Error {
        Error::io(&self.index_path, error)
    }

    fn begin(&mut self, header: &[u8]) -> Result<()> {
        // The index last: without its header the data is not looked at.
        self.index.set_len(0).map_err(|error| self.index_error(&error))?;
        self.data.set_len(0).map_err(|error| self.data_error(&error))?;
        write_all_at(&self.data, header, 0).map_err(|error| self.data_error(&error))?;
        write_all_at(&self.index, header, 0).map_err(|error| self.index_error(&error))
    }

    /// Reads the index, checks every row's data, and cuts both files after the last row before the first bad one.
    fn recover(&mut self) -> Result<()> {
        let mut bytes = Vec::new();
        // The header was read before, so the file's position is right after it.
        self.index.read_to_end(&mut bytes).map_err(|error| self.index_error(&error))?;
        let data_end = self.data.metadata().map_err(|error| self.data_error(&error))?.len();
        let mut found = Vec::with_capacity(bytes.len() / ENTRY);
        let mut seen = vec![false; self.entries.len()];
        let mut end = HEADER;
        for entry in bytes.chunks_exact(ENTRY).map_while(Entry::from_bytes) {
            let new = seen.get_mut(entry.row as usize).is_some_and(|seen| !std::mem::replace(seen, true));
            let fits = entry.offset == end && end.checked_add(entry.size()).is_some_and(|next| next <= data_end);
            if !new || !fits {
                break;
            }
            end += entry.size();
            found.push(entry);
        }
        let notes: Vec<Option<Notes>> = found.par_iter().map(|entry| self.notes_if_whole(entry)).collect();
        let whole = notes.iter().take_while(|notes| notes.is_some()).count();
        found.truncate(whole);
        self.data_size = found.last().map_or(HEADER, |entry| entry.offset + entry.size());
        self.index_size = HEADER + (found.len() * ENTRY) as u64;
        self.filled = found.len();
        for (entry, notes) in found.into_iter().zip(notes.into_iter().flatten()) {
            self.notes.add(entry.row, &notes);
            self.entries[entry.row as usize] = Some(entry);
        }
        self.cut()
    }

    /// The row's notes; nothing where its data is not what was written.
    fn notes_if_whole(&self, entry: &Entry) -> Option<Notes> {
        let mut bytes = vec![0; entry.size() as usize];
        read_exact_at(&self.data, &mut bytes, entry.offset).ok()?;
        if checksum(&bytes) != entry.checksum {
            return None;
        }
        match entry.kind {
            Kind::Sample => Notes::from_bytes(&bytes[entry.tokens_size() as usize..]),
            Kind::Dropped | Kind::Problem => Some(Notes::default()),
        }
    }

    /// Cuts the files to what is known to be whole.
    fn cut(&self) -> Result<()> {
        self.index.set_len(self.index_size).map_err(|error| self.index_error(&error))?;
        self.data.set_len(self.data_size).map_err(|error| self.data_error(&error))
    }

    pub(super) fn batch(&self) -> Batch {
        Batch { offset: self.data_size, data: Vec::new(), entries: Vec::new(), notes: Vec::new() }
    }

    /// Writes a batch: its data first, then its entries. Where the disk refuses, the files are as before.
    pub(super) fn append(&mut self, batch: Batch) -> Result<()> {
        let again = |entry: &Entry| self.entries.get(entry.row as usize).is_none_or(Option::is_some);
        let mut rows: Vec<u32> = batch.entries.iter().map(|entry| entry.row).collect();
        rows.sort_unstable();
        let twice = rows.windows(2).any(|pair| pair[0] == pair[1]);
        if twice || batch.offset != self.data_size || batch.entries.iter().any(again) {
            return Err(Error::new(ErrorCode::Internal, "the token cache was given a row twice"));
        }
        let entries: Vec<u8> = batch.entries.iter().flat_map(|entry| entry.to_bytes()).collect();
        let written = match write_all_at(&self.data, &batch.data, self.data_size) {
            Err(error) => Err(self.data_error(&error)),
            Ok(()) => write_all_at(&self.index, &entries, self.index_size).map_err(|error| self.index_error(&error)),
        };
        if let Err(error) = written {
            let _ = self.cut();
            return Err(error.hint("free some space for the token cache, or move it with --cache_dir"));
        }
        self.data_size += batch.data.len() as u64;
        self.index_size += entries.len() as u64;
        self.filled += batch.entries.len();
        for entry in batch.entries {
            self.entries[entry.row as usize] = Some(entry);
        }
        for (row, notes) in &batch.notes {
            self.notes.add(*row, notes);
        }
        Ok(())
    }

    pub(super) fn entries(&self) -> &[Option<Entry>] {
        &self.entries
    }

    /// What was noticed in the samples.
    pub(super) fn notes(&self) -> Vec<NoteCount> {
        self.notes.counts()
    }

    pub(super) fn filled(&self) -> usize {
        self.filled
    }

    pub(super) fn entry(&self, row: u32) -> Result<Option<Entry>> {
        let rows = self.entries.len();
        self.entries
            .get(row as usize)
            .copied()
            .ok_or_else(|| Error::new(ErrorCode::Data, format!("row {row} of a source of {rows}")))
    }

    fn read(&self, entry: &Entry) -> Result<Vec<u8>> {
        let mut bytes = vec![0; entry.size() as usize];
        read_exact_at(&self.data, &mut bytes, entry.offset).map_err(|error| self.data_error(&error))?;
        if checksum(&bytes) != entry.checksum {
            let what = format!("{}: the tokens of row {} changed on disk", self.data_path.display(), entry.row);
            return Err(Error::new(ErrorCode::State, what).hint("remove the token cache; it is filled again"));
        }
        Ok(bytes)
    }

    pub(super) fn sample(&self, entry: &Entry) -> Result<CachedSample> {
        let bytes = self.read(entry)?;
        let (ids, rest) = bytes[..entry.tokens_size() as usize].split_at(entry.ids as usize * 4);
        let (runs, images) = rest.split_at(entry.runs as usize * 8);
        let word = |chunk: &[u8]| u32::from_le_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]);
        let run = |chunk: &[u8]| Run { length: word(chunk), weight: f32::from_bits(word(&chunk[4..])) };
        let image = |chunk: &[u8]| {
            let mut hash = [0; 16];
            hash.copy_from_slice(&chunk[4..20]);
            (word(chunk), MeasuredImage { hash, height: word(&chunk[20..]), width: word(&chunk[24..]) })
        };
        Ok(CachedSample {
            ids: ids.chunks_exact(4).map(word).collect(),
            runs: runs.chunks_exact(8).map(run).collect(),
            images: images.chunks_exact(IMAGE).map(image).collect(),
        })
    }

    pub(super) fn problem(&self, entry: &Entry) -> Result<(String, String)> {
        let bytes = self.read(entry)?;
        let (reason, message) = bytes.split_at(entry.ids as usize);
        Ok((String::from_utf8_lossy(reason).into_owned(), String::from_utf8_lossy(message).into_owned()))
    }

    /// Data before index, so that no entry is durable before what it points to.
    pub(super) fn sync(&self) -> Result<()> {
        self.data.sync_data().map_err(|error| self.data_error(&error))?;
        self.index.sync_data().map_err(|error| self.index_error(&error))
    }
}

/// The file begins with this header.
fn has_header(file: &mut File, path: &Path, header: &[u8]) -> Result<bool> {
    let mut bytes = Vec::new();
    Read::take(file, HEADER).read_to_end(&mut bytes).map_err(|error| Error::io(path, &error))?;
    Ok(bytes == header)
}
