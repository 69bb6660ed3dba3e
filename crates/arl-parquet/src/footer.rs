//! A Parquet file's description of itself, which is at its end.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

use arl_model::{Error, ErrorCode, Result};
use parquet::file::metadata::{ParquetMetaData, ParquetMetaDataReader};

use crate::read::damaged;
use crate::{contained, reason};

/// The length of the description, and `PAR1`.
const TAIL: u64 = 8;

const MAX_BYTES: u64 = 1 << 30;

/// The bytes of the signature that follows the description where that is not encrypted itself, but columns are.
const SIGNATURE: usize = 28;

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
    let decode = |bytes: &[u8]| contained(|| ParquetMetaDataReader::decode_metadata(bytes));
    // The crate `parquet` would say that encrypted columns are damaged.
    if footer.len().checked_sub(SIGNATURE).is_some_and(|end| decode(&footer[..end]).is_ok()) {
        return Err(encrypted());
    }
    decode(&footer).map_err(|error| {
        damaged(name, &format!("the Parquet file's description of itself cannot be read: {}", reason(&error)))
    })
}
