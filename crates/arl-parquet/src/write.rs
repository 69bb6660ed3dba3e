//! Rows of JSON text as a Parquet file: numbers and names of a row become columns of their type, lists and objects columns of
//! JSON text, so that `read` returns the same rows and any other reader can use the file.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use arl_model::{Error, ErrorCode, Result};
use indexmap::IndexMap;
use parquet::basic::{Compression, LogicalType, Type as Physical};
use parquet::data_type::{ByteArray, ByteArrayType, DataType, DoubleType, Int64Type};
use parquet::errors::ParquetError;
use parquet::file::metadata::KeyValue;
use parquet::file::properties::WriterProperties;
use parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};
use parquet::schema::types::Type;
use serde_json::value::RawValue;

use crate::notes::{KEY, Notes};
use crate::reason;

/// `RecordData`'s fields, and the split that a database gives its rows. Any other key becomes a column of JSON.
const FIELDS: [(&str, Kind); 10] = [
    ("messages", Kind::Json),
    ("tools", Kind::Json),
    ("scores", Kind::Json),
    ("advantages", Kind::Json),
    ("created_at_step", Kind::Json),
    ("logprobs", Kind::Json),
    ("reward", Kind::Float),
    ("step", Kind::Integer),
    ("record_id", Kind::Text),
    ("split", Kind::Text),
];

/// A row group ends at this many rows, or at this many bytes of text.
const GROUP_ROWS: usize = 10_000;
const GROUP_BYTES: usize = 64 << 20;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Json,
    Text,
    Float,
    Integer,
}

impl Kind {
    fn expected(self) -> &'static str {
        match self {
            Self::Json => "a value",
            Self::Text => "a string",
            Self::Float => "a number",
            Self::Integer => "an integer of 64 bits",
        }
    }
}

/// The values of the rows that are not written yet.
enum Values {
    Texts(Vec<ByteArray>),
    Floats(Vec<f64>),
    Integers(Vec<i64>),
}

struct Column {
    name: String,
    kind: Kind,
    values: Values,
    /// 1 for each row that has a value, else 0; shorter than the rows where the last ones have none.
    levels: Vec<i16>,
    /// Whether a row had the key with null as its value; JSON text says that itself.
    saw_null: bool,
}

impl Column {
    fn new(name: &str, kind: Kind) -> Self {
        let values = match kind {
            Kind::Json | Kind::Text => Values::Texts(Vec::new()),
            Kind::Float => Values::Floats(Vec::new()),
            Kind::Integer => Values::Integers(Vec::new()),
        };
        Self { name: name.to_owned(), kind, values, levels: Vec::new(), saw_null: false }
    }

    /// Adds the value of row `row`; `None`: it is not of the column's kind.
    fn add(&mut self, row: usize, text: &str) -> Option<()> {
        self.levels.resize(row, 0);
        if self.kind != Kind::Json && text == "null" {
            self.saw_null = true;
            return Some(());
        }
        let number = text.starts_with(|first: char| first == '-' || first.is_ascii_digit());
        let whole = number && !text.contains(['.', 'e', 'E']);
        match &mut self.values {
            Values::Texts(values) if self.kind == Kind::Json => values.push(text.into()),
            Values::Texts(values) => values.push(serde_json::from_str::<String>(text).ok()?.into_bytes().into()),
            Values::Integers(values) => values.push(text.parse().ok().filter(|_| whole)?),
            Values::Floats(values) => {
                let value: f64 = text.parse().ok().filter(|_| number)?;
                if whole && value != 0.0 && format!("{value:.0}") != text {
                    return None;
                }
                values.push(value);
            }
        }
        self.levels.push(1);
        Some(())
    }

    fn field(&self) -> std::result::Result<Type, ParquetError> {
        let (physical, logical) = match self.kind {
            Kind::Json | Kind::Text => (Physical::BYTE_ARRAY, Some(LogicalType::String)),
            Kind::Float => (Physical::DOUBLE, None),
            Kind::Integer => (Physical::INT64, None),
        };
        Type::primitive_type_builder(&self.name, physical).with_logical_type(logical).build()
    }

    /// Writes the values of `rows` rows, and takes them out.
    fn flush(
        &mut self,
        rows: usize,
        group: &mut SerializedRowGroupWriter<'_, File>,
    ) -> std::result::Result<(), ParquetError> {
        self.levels.resize(rows, 0);
        match &mut self.values {
            Values::Texts(values) => write::<ByteArrayType>(group, values, &self.levels),
            Values::Floats(values) => write::<DoubleType>(group, values, &self.levels),
            Values::Integers(values) => write::<Int64Type>(group, values, &self.levels),
        }?;
        self.levels.clear();
        Ok(())
    }
}

fn write<T: DataType>(
    group: &mut SerializedRowGroupWriter<'_, File>,
    values: &mut Vec<T::T>,
    levels: &[i16],
) -> std::result::Result<(), ParquetError> {
    if let Some(mut column) = group.next_column()? {
        column.typed::<T>().write_batch(values, Some(levels), None)?;
        column.close()?;
    }
    values.clear();
    Ok(())
}

/// Writes one file.
pub struct Writer {
    /// What a user knows the file by.
    name: String,
    columns: Vec<Column>,
    /// Before a row group is written the file has no schema, and columns can be added.
    open: Opening,
    rows: usize,
    bytes: usize,
    written: u64,
}

enum Opening {
    File(File),
    Writer(Box<SerializedFileWriter<File>>),
    /// It failed.
    Closed,
}

impl Writer {
    /// Begins a file at `path`, which messages call `name`.
    ///
    /// # Errors
    /// `ARL_IO` where the file cannot be created.
    pub fn create(path: &Path, name: &str) -> Result<Self> {
        let file = File::create(path).map_err(|error| Error::io(path, &error))?;
        let columns = FIELDS.iter().map(|&(name, kind)| Column::new(name, kind)).collect();
        Ok(Self { name: name.to_owned(), columns, open: Opening::File(file), rows: 0, bytes: 0, written: 0 })
    }

    /// Adds a row, a JSON object as text. What is in lists, objects and unknown keys stays byte for byte.
    ///
    /// # Errors
    /// `ARL_DATA` for a row that is not an object, for a `reward`, `step`, `record_id` or `split` of another type than
    /// `RecordData`'s, and for a key that first comes after the first row group; `ARL_IO` where the file cannot be written.
    pub fn add(&mut self, row: &[u8]) -> Result<()> {
        let number = self.written;
        let wrong = |what: String| Error::new(ErrorCode::Data, format!("{}: row {number}: {what}", self.name));
        // A key that comes twice has its last value.
        let entries: IndexMap<String, &RawValue> =
            serde_json::from_slice(row).map_err(|_| wrong("is no JSON object".to_owned()))?;
        for (key, value) in &entries {
            let at = self.columns.iter().position(|column| column.name == *key);
            if at.is_none() && !matches!(self.open, Opening::File(_)) {
                let key = serde_json::Value::from(key.as_str());
                let hint = "A Parquet file has the same columns throughout: write JSONL, or give each row the key.";
                return Err(wrong(format!("has the key {key}, which none of the first rows has")).hint(hint));
            }
            let at = at.unwrap_or_else(|| {
                self.columns.push(Column::new(key, Kind::Json));
                self.columns.len() - 1
            });
            let column = &mut self.columns[at];
            if column.add(self.rows, value.get()).is_none() {
                let (expected, got) = (column.kind.expected(), value.get().chars().take(80).collect::<String>());
                return Err(wrong(format!("{key}: expected {expected}, got {got}")));
            }
        }
        self.rows += 1;
        self.written += 1;
        self.bytes += row.len();
        if self.rows >= GROUP_ROWS || self.bytes >= GROUP_BYTES { self.flush() } else { Ok(()) }
    }

    /// Ends the file and returns the number of its rows.
    ///
    /// # Errors
    /// `ARL_IO` where the file cannot be written.
    pub fn finish(mut self) -> Result<u64> {
        if self.rows > 0 || matches!(self.open, Opening::File(_)) {
            self.flush()?;
        }
        let names = |which: &dyn Fn(&Column) -> bool| {
            self.columns.iter().filter(|column| which(column)).map(|column| column.name.clone()).collect()
        };
        let json = names(&|column| column.kind == Kind::Json);
        let absent = names(&|column| column.kind == Kind::Json || !column.saw_null);
        if let Opening::Writer(mut writer) = std::mem::replace(&mut self.open, Opening::Closed) {
            writer.append_key_value_metadata(KeyValue::new(KEY.to_owned(), Notes { json, absent }.text()));
            writer.finish().map_err(|error| self.refused(&error))?;
        }
        Ok(self.written)
    }

    fn refused(&self, error: &ParquetError) -> Error {
        if let ParquetError::External(inner) = error
            && let Some(inner) = inner.downcast_ref()
        {
            return Error::io(self.name.as_ref(), inner);
        }
        Error::new(ErrorCode::Io, format!("{}: {}", self.name, reason(error)))
    }

    /// Writes the rows so far as a row group.
    fn flush(&mut self) -> Result<()> {
        let mut writer = match std::mem::replace(&mut self.open, Opening::Closed) {
            Opening::Writer(writer) => writer,
            Opening::File(file) => Box::new(self.begin(file).map_err(|error| self.refused(&error))?),
            Opening::Closed => return Ok(()),
        };
        if self.rows > 0 {
            let rows = self.rows;
            let group = writer.next_row_group().and_then(|mut group| {
                self.columns.iter_mut().try_for_each(|column| column.flush(rows, &mut group))?;
                group.close()
            });
            group.map_err(|error| self.refused(&error))?;
        }
        self.open = Opening::Writer(writer);
        (self.rows, self.bytes) = (0, 0);
        Ok(())
    }

    fn begin(&self, file: File) -> std::result::Result<SerializedFileWriter<File>, ParquetError> {
        let fields = self.columns.iter().map(|column| column.field().map(Arc::new));
        let schema = Type::group_type_builder("schema").with_fields(fields.collect::<std::result::Result<_, _>>()?);
        let properties = WriterProperties::builder().set_compression(Compression::SNAPPY);
        let properties = properties.set_created_by("arl".to_owned()).build();
        SerializedFileWriter::new(file, Arc::new(schema.build()?), Arc::new(properties))
    }
}
