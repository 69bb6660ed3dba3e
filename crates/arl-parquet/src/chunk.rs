//! A column chunk's bytes, read a window at a time, however large the chunk is.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use parquet::errors::{ParquetError, Result};
use parquet::file::reader::{ChunkReader, Length};

/// Bytes that are read at once for the header of a page, at least.
const HEADER: usize = 8 * 1024;

struct Inner {
    file: Arc<File>,
    end: u64,
    read_ahead: usize,
    /// Where the window begins, and its bytes.
    window: Mutex<(u64, Bytes)>,
    page: AtomicU64,
}

impl Inner {
    /// The bytes from `at` on: `length` of them, or those left in the chunk.
    fn peek(&self, at: u64, length: usize) -> Result<Bytes> {
        let left = usize::try_from(self.end.saturating_sub(at)).unwrap_or(usize::MAX);
        let wanted = length.min(left);
        let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        let from = at.checked_sub(window.0).map_or(usize::MAX, |from| usize::try_from(from).unwrap_or(usize::MAX));
        if from.checked_add(wanted).is_some_and(|end| end <= window.1.len()) {
            return Ok(window.1.slice(from..from + wanted));
        }
        // Of a page that is larger than the window nothing is kept here.
        let bytes = self.read(at, wanted.max(self.read_ahead.min(left)))?;
        if wanted < self.read_ahead {
            *window = (at, bytes.clone());
        }
        Ok(bytes.slice(..wanted))
    }

    fn read(&self, at: u64, length: usize) -> Result<Bytes> {
        let mut bytes = vec![0; length];
        let mut file = &*self.file;
        file.seek(SeekFrom::Start(at)).and_then(|_| file.read_exact(&mut bytes)).map_err(|error| {
            match error.kind() {
                io::ErrorKind::UnexpectedEof => ParquetError::EOF("the file ends before its column does".to_owned()),
                _ => ParquetError::from(error),
            }
        })?;
        Ok(bytes.into())
    }
}

/// Where a column's pages are read from. All chunks of a file share its handle, so one thread reads them.
#[derive(Clone)]
pub(crate) struct Chunk(Arc<Inner>);

impl Chunk {
    /// The bytes from `start` to `end`.
    pub(crate) fn new(file: Arc<File>, start: u64, end: u64, read_ahead: usize) -> Self {
        let window = Mutex::new((start, Bytes::new()));
        Self(Arc::new(Inner { file, end, read_ahead, window, page: AtomicU64::new(start) }))
    }

    /// Where the page begins that was read last.
    pub(crate) fn page(&self) -> u64 {
        self.0.page.load(Ordering::Relaxed)
    }
}

impl Length for Chunk {
    fn len(&self) -> u64 {
        self.0.end
    }
}

impl ChunkReader for Chunk {
    type T = Header;

    fn get_read(&self, start: u64) -> Result<Header> {
        self.0.page.store(start, Ordering::Relaxed);
        Ok(Header { chunk: Arc::clone(&self.0), at: start, bytes: self.0.peek(start, HEADER)? })
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes> {
        let bytes = self.0.peek(start, length)?;
        if bytes.len() < length {
            return Err(ParquetError::EOF("a page ends after its column".to_owned()));
        }
        Ok(bytes)
    }
}

/// The header of a page, which may be longer than what is read at first: it holds statistics.
pub(crate) struct Header {
    chunk: Arc<Inner>,
    /// Where `bytes` begins.
    at: u64,
    bytes: Bytes,
}

impl Read for Header {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.bytes.is_empty() {
            self.bytes = self.chunk.peek(self.at, HEADER).map_err(io::Error::other)?;
        }
        let count = buffer.len().min(self.bytes.len());
        buffer[..count].copy_from_slice(&self.bytes.split_to(count));
        self.at += count as u64;
        Ok(count)
    }
}
