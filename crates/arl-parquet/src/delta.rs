//! Counts in pages of texts that are stored as differences of their lengths. The crate `parquet` reserves memory for a count
//! before it looks for the lengths, so they are checked first.

use parquet::basic::Encoding;
use parquet::column::page::Page;
use parquet::schema::types::ColumnDescriptor;

/// Whether the page has no more lengths than values.
pub(crate) fn is_plausible(page: &Page, column: &ColumnDescriptor) -> bool {
    let streams = match page.encoding() {
        Encoding::DELTA_LENGTH_BYTE_ARRAY => 1,
        Encoding::DELTA_BYTE_ARRAY => 2,
        _ => return true,
    };
    let mut rest = values(page, column);
    for _ in 0..streams {
        rest = rest.and_then(|rest| behind(rest, page.num_values() as usize));
    }
    rest.is_some()
}

/// The bytes of a data page behind its levels.
fn values<'a>(page: &'a Page, column: &ColumnDescriptor) -> Option<&'a [u8]> {
    let mut bytes: &[u8] = page.buffer();
    if let Page::DataPageV2 { def_levels_byte_len, rep_levels_byte_len, .. } = page {
        return bytes.get(*def_levels_byte_len as usize + *rep_levels_byte_len as usize..);
    }
    for level in [column.max_rep_level(), column.max_def_level()] {
        if level > 0 {
            let length = u32::from_le_bytes(*bytes.first_chunk()?);
            bytes = bytes.get(4 + length as usize..)?;
        }
    }
    Some(bytes)
}

/// The bytes behind differences of at most `most` numbers.
fn behind(mut bytes: &[u8], most: usize) -> Option<&[u8]> {
    let (block, parts, count) = (varint(&mut bytes)?, varint(&mut bytes)?, varint(&mut bytes)?);
    varint(&mut bytes)?;
    let of_part = block.checked_div(parts)?;
    let mut left = count.saturating_sub(1);
    while count <= most && left > 0 {
        varint(&mut bytes)?;
        let (widths, rest) = bytes.split_at_checked(parts)?;
        bytes = rest;
        for &width in widths {
            if left > 0 {
                bytes = bytes.get((usize::from(width) * of_part) / 8..)?;
            }
            left = left.saturating_sub(of_part.max(1));
        }
    }
    (count <= most).then_some(bytes)
}

/// Takes a number of variable length from the front, seven bits a byte.
fn varint(bytes: &mut &[u8]) -> Option<usize> {
    let mut number = 0;
    for shift in (0..63).step_by(7) {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        number |= usize::from(byte & 0x7F) << shift;
        if byte < 0x80 {
            return Some(number);
        }
    }
    None
}
