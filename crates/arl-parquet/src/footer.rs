//! A Parquet file's description of itself, which is at its end.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

use arl_model::{Error, ErrorCode, Result};
use parquet::file::metadata::{ParquetMetaData, ParquetMetaDataReader};

use crate::delta::varint;
use crate::read::damaged;
use crate::{contained, reason};

/// The length of the description, and `PAR1`.
const TAIL: u64 = 8;

const MAX_BYTES: u64 = 1 << 30;

/// Reads the description of the file that a user knows as `name`.
pub(crate) fn read(file: &File, name: &str) -> Result<ParquetMetaData> {
    let refused = |error: std::io::Error| Error::io(name.as_ref(), &error);
    let size = file.metadata().map_err(refused)?.len();
    if size < TAIL + 4 {
        return Err(damaged(name, "the Parquet file ends early"));
    }
    let bytes = |start: u64, length: u64| {
        let (mut file, mut bytes) = (file, vec![0; length as usize]);
        file.seek(SeekFrom::Start(start)).and_then(|_| file.read_exact(&mut bytes)).map(|()| bytes).map_err(refused)
    };
    let tail = bytes(size - TAIL, TAIL)?;
    let encrypted = || {
        Error::new(ErrorCode::Data, format!("{name}: the Parquet file is encrypted"))
            .hint("Write it without encryption.")
    };
    match &tail[4..] {
        b"PAR1" => {}
        b"PARE" => return Err(encrypted()),
        _ => return Err(damaged(name, "the Parquet file has no end mark: it was cut off, or is still being written")),
    }
    let length = u64::from(u32::from_le_bytes([tail[0], tail[1], tail[2], tail[3]]));
    if length > size - TAIL - 4 || length > MAX_BYTES {
        let what = format!("the Parquet file's description of itself would have {length} bytes of {size}");
        return Err(damaged(name, &what));
    }
    let footer = bytes(size - TAIL - length, length)?;
    if is_encrypted(&footer).unwrap_or(false) {
        return Err(encrypted());
    }
    contained(|| ParquetMetaDataReader::decode_metadata(&footer)).map_err(|error| {
        damaged(name, &format!("the Parquet file's description of itself cannot be read: {}", reason(&error)))
    })
}

/// The field of the description that only files with encrypted columns have.
const ENCRYPTION_ALGORITHM: i16 = 8;

/// Whether columns are encrypted though the description is not. The crate `parquet` would say that they are damaged.
/// `None`: the description cannot be read.
fn is_encrypted(footer: &[u8]) -> Option<bool> {
    let mut thrift = Thrift(footer);
    let mut field = 0;
    while let Some(kind) = thrift.field(&mut field)? {
        if field == ENCRYPTION_ALGORITHM {
            return Some(true);
        }
        thrift.skip(kind, 0)?;
    }
    Some(false)
}

/// Thrift's compact protocol, as far as passing over fields needs it.
struct Thrift<'a>(&'a [u8]);

impl Thrift<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (&first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(first)
    }

    /// The type of a struct's next field, whose number goes to `id`; `Some(None)`: the struct ends.
    fn field(&mut self, id: &mut i16) -> Option<Option<u8>> {
        let head = self.byte()?;
        if head == 0 {
            return Some(None);
        }
        *id = match head >> 4 {
            0 => {
                let zigzag = varint(&mut self.0)?;
                (zigzag >> 1) as i16 ^ -((zigzag & 1) as i16)
            }
            step => id.checked_add(step.into())?,
        };
        Some(Some(head & 15))
    }

    fn skip(&mut self, kind: u8, depth: usize) -> Option<()> {
        match kind {
            1 | 2 => {}
            3 => _ = self.byte()?,
            4..=6 => _ = varint(&mut self.0)?,
            7 => self.0 = self.0.get(8..)?,
            8 => {
                let length = varint(&mut self.0)?;
                self.0 = self.0.get(length..)?;
            }
            9 | 10 => {
                let head = self.byte()?;
                let count = if head >> 4 == 15 { varint(&mut self.0)? } else { usize::from(head >> 4) };
                for _ in 0..count {
                    match head & 15 {
                        1 | 2 => _ = self.byte()?,
                        kind => self.skip(kind, depth)?,
                    }
                }
            }
            12 if depth < 16 => {
                let mut field = 0;
                while let Some(kind) = self.field(&mut field)? {
                    self.skip(kind, depth + 1)?;
                }
            }
            _ => return None,
        }
        Some(())
    }
}
