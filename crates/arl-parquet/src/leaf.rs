//! A column as a cursor: the levels of its next entry, and the value that belongs to it. Entries of all columns of a row are
//! taken in step, which is how nested rows come out of flat columns.

use std::fs::File;
use std::io;
use std::sync::Arc;

use arl_model::{Error, ErrorCode, Result};
use bytes::Bytes;
use parquet::basic::Encoding;
use parquet::column::page::{Page, PageReader};
use parquet::errors::ParquetError;
use parquet::file::metadata::ColumnChunkMetaData;
use parquet::file::reader::SerializedPageReader;
use parquet::schema::types::ColumnDescPtr;

use crate::chunk::Chunk;
use crate::column::{self, Column, Levels};
use crate::values::Value;
use crate::{contained, delta, reason};

/// The entries of one column chunk.
struct Entries {
    descriptor: ColumnDescPtr,
    pages: SerializedPageReader<Chunk>,
    chunk: Chunk,
    column: Box<dyn Column>,
    has_dictionary: bool,
    /// Entries of pages that were not read yet.
    left: i64,
}

impl Entries {
    /// Decodes the next ones and returns how many there are; 0 at the end.
    fn decode(&mut self, levels: &mut Levels) -> std::result::Result<usize, ParquetError> {
        loop {
            let count = self.column.decode(levels)?;
            if count > 0 || self.left == 0 {
                return Ok(count);
            }
            if !self.has_dictionary {
                // The decoder would hold its page until it has the next one.
                self.column = column::open(&self.descriptor)?;
            }
            let missing = || ParquetError::General(format!("{} values are missing", self.left));
            let page = self.pages.get_next_page()?.ok_or_else(missing)?;
            self.give(page)?;
        }
    }

    /// Checks what the crate `parquet` believes, which would reserve memory for it.
    fn give(&mut self, page: Page) -> std::result::Result<(), ParquetError> {
        let count = i64::from(page.num_values());
        if page.is_data_page() {
            if count > self.left {
                let what = format!("a page of {count} values where {} are left", self.left);
                return Err(ParquetError::General(what));
            }
            if !delta::is_plausible(&page, &self.descriptor) {
                return Err(ParquetError::General("a page has not the lengths that it says".to_owned()));
            }
            self.left -= count;
            // A column of nulls may have no dictionary.
            if !self.has_dictionary && matches!(page.encoding(), Encoding::RLE_DICTIONARY | Encoding::PLAIN_DICTIONARY)
            {
                let (buf, encoding) = (Bytes::new(), Encoding::PLAIN);
                self.give(Page::DictionaryPage { buf, num_values: 0, encoding, is_sorted: false })?;
                self.column.decode(&mut Levels::default())?;
            }
        } else {
            // A byte holds eight booleans; any other value takes a byte at least.
            if count > page.buffer().len() as i64 * 8 {
                return Err(ParquetError::General("a dictionary holds fewer values than it says".to_owned()));
            }
            self.has_dictionary = true;
        }
        self.column.give(page);
        Ok(())
    }
}

/// One column of the file's lowest level.
pub(crate) struct Leaf {
    /// The file's name, for messages.
    file: Arc<str>,
    descriptor: ColumnDescPtr,
    entries: Option<Entries>,
    /// For messages: the row group, counted from 0, and its codec.
    group: usize,
    codec: String,
    levels: Levels,
    count: usize,
    at: usize,
    value: usize,
}

impl Leaf {
    pub(crate) fn new(file: Arc<str>, descriptor: ColumnDescPtr) -> Self {
        let (levels, codec) = (Levels::default(), String::new());
        Self { file, descriptor, entries: None, group: 0, codec, levels, count: 0, at: 0, value: 0 }
    }

    /// The column's name with those of the groups that it is in.
    pub(crate) fn path(&self) -> String {
        self.descriptor.path().string()
    }

    /// Begins a row group.
    pub(crate) fn open(
        &mut self,
        file: &Arc<File>,
        metadata: &ColumnChunkMetaData,
        group: usize,
        read_ahead: usize,
    ) -> Result<()> {
        let (data, length) = (metadata.data_page_offset(), metadata.compressed_size());
        // Some writers leave the dictionary's place at 0.
        let dictionary = metadata.dictionary_page_offset().filter(|&offset| offset > 0 && offset < data);
        (self.group, self.codec) = (group, codec_name(metadata));
        (self.count, self.at, self.value) = (0, 0, 0);
        let opened = contained(|| {
            let place =
                |offset: i64| u64::try_from(offset).map_err(|_| ParquetError::General("a negative place".to_owned()));
            let start = place(dictionary.unwrap_or(data))?;
            let end = start.saturating_add(place(length)?);
            let chunk = Chunk::new(Arc::clone(file), start, end, read_ahead);
            let metadata = metadata.clone().into_builder().set_dictionary_page_offset(dictionary).build()?;
            let pages = SerializedPageReader::new(Arc::new(chunk.clone()), &metadata, 0, None)?;
            let (column, left) = (column::open(&self.descriptor)?, metadata.num_values());
            let descriptor = Arc::clone(&self.descriptor);
            Ok(Entries { descriptor, pages, chunk, column, has_dictionary: false, left })
        });
        self.entries = Some(opened.map_err(|error| self.damaged(&reason(&error)))?);
        Ok(())
    }

    /// Whether there is another entry in the row group.
    fn has_next(&mut self) -> Result<bool> {
        if self.at < self.count {
            return Ok(true);
        }
        let Some(entries) = &mut self.entries else { return Ok(false) };
        let levels = &mut self.levels;
        let count = match contained(|| entries.decode(levels)) {
            Ok(count) => count,
            Err(ParquetError::External(error)) if is_disk(&*error) => {
                return Err(Error::new(ErrorCode::Io, format!("{}: {error}", self.file)));
            }
            Err(error) => return Err(self.damaged(&reason(&error))),
        };
        (self.count, self.at, self.value) = (count, 0, 0);
        Ok(count > 0)
    }

    /// Whether the row group has no more entries.
    pub(crate) fn ended(&mut self) -> Result<bool> {
        Ok(!self.has_next()?)
    }

    /// The repetition level of the next entry; 0 also at the end of the row group.
    pub(crate) fn repetition(&mut self) -> Result<i16> {
        Ok(if self.has_next()? { self.levels.repetition.get(self.at).copied().unwrap_or(0) } else { 0 })
    }

    /// The definition level of the next entry.
    pub(crate) fn definition(&mut self) -> Result<i16> {
        if !self.has_next()? {
            return Err(self.damaged("it ends before its last row"));
        }
        Ok(self.levels.definition.get(self.at).copied().unwrap_or_else(|| self.descriptor.max_def_level()))
    }

    /// Passes over an entry that has no value.
    pub(crate) fn skip(&mut self) -> Result<()> {
        if self.definition()? == self.descriptor.max_def_level() {
            self.value += 1;
        }
        self.at += 1;
        Ok(())
    }

    /// The next entry's value; its definition level must be the highest.
    pub(crate) fn take(&mut self) -> Value<'_> {
        let index = self.value;
        (self.at, self.value) = (self.at + 1, index + 1);
        self.entries.as_ref().map_or(Value::None, |entries| entries.column.value(index))
    }

    /// The error of a column that cannot be read.
    pub(crate) fn damaged(&self, reason: &str) -> Error {
        let page =
            self.entries.as_ref().map_or(String::new(), |entries| format!(", page at byte {}", entries.chunk.page()));
        let (file, path, group, codec) = (&self.file, self.path(), self.group, &self.codec);
        let what = format!("{file}: column {path} cannot be read (row group {group}{page}, {codec}): {reason}");
        Error::new(ErrorCode::Data, what).hint(crate::read::DAMAGED)
    }
}

/// `SNAPPY`, `ZSTD`, ...
pub(crate) fn codec_name(metadata: &ColumnChunkMetaData) -> String {
    let name = metadata.compression().to_string();
    name.split('(').next().unwrap_or_default().to_owned()
}

/// Whether the operating system could not read, rather than a codec.
fn is_disk(error: &(dyn std::error::Error + Send + Sync + 'static)) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.raw_os_error().is_some())
}
