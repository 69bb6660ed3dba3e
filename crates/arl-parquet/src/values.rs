//! A Parquet value as JSON text, by its column's type: integers of any size and decimals digit by digit, floats as floats,
//! times as ISO 8601, bytes as text, an image's data URL, or base64.

use std::io::Write;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use chrono::{DateTime, Datelike};
use num_bigint::BigInt;
use parquet::basic::{ConvertedType, LogicalType, TimeUnit, Type as Physical};
use parquet::schema::types::Type;

use crate::json;

/// A value of its column's physical type.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Value<'a> {
    None,
    Bool(bool),
    Integer(i64),
    /// The low, middle and high 32 bits.
    Int96(&'a [u32]),
    Float(f64),
    Bytes(&'a [u8]),
}

/// What a column's values are, and so how they are written.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Kind {
    Bool,
    Signed,
    Unsigned32,
    Unsigned64,
    Decimal {
        scale: usize,
    },
    Date,
    /// `digits`: of a second's fraction.
    Time {
        digits: u32,
    },
    Timestamp {
        digits: u32,
        utc: bool,
    },
    Int96,
    Float,
    Float16,
    Text,
    /// Text that is JSON by the column's type: as it is. What is not JSON after all is a string.
    Json,
    /// The text of a column of lists or objects: as it is where it is one, so that each digit stays; null where it is blank;
    /// else a string, which is refused with the row's place where the row is parsed.
    Nested,
    Uuid,
    /// Bytes that no type describes: an image as its data URL, text as text, all else as base64 in a data URL.
    Binary,
    Bytes,
}

impl Kind {
    /// The kind of a column, by its type alone.
    pub(crate) fn of(field: &Type) -> Self {
        let info = field.get_basic_info();
        let (converted, logical) = (info.converted_type(), info.logical_type_ref());
        if converted == ConvertedType::DECIMAL {
            return Self::Decimal { scale: usize::try_from(field.get_scale()).unwrap_or(0) };
        }
        match field.get_physical_type() {
            Physical::BOOLEAN => Self::Bool,
            Physical::INT32 | Physical::INT64 => Self::of_integers(converted, logical),
            Physical::INT96 => Self::Int96,
            Physical::FLOAT | Physical::DOUBLE => Self::Float,
            Physical::BYTE_ARRAY | Physical::FIXED_LEN_BYTE_ARRAY => match (converted, logical) {
                (ConvertedType::UTF8 | ConvertedType::ENUM, _) => Self::Text,
                (ConvertedType::JSON, _) => Self::Json,
                (_, Some(LogicalType::Uuid)) => Self::Uuid,
                (_, Some(LogicalType::Float16)) => Self::Float16,
                (ConvertedType::NONE, None) if field.get_physical_type() == Physical::BYTE_ARRAY => Self::Binary,
                _ => Self::Bytes,
            },
        }
    }

    fn of_integers(converted: ConvertedType, logical: Option<&LogicalType>) -> Self {
        let digits = |unit: &TimeUnit| match unit {
            TimeUnit::MILLIS => 3,
            TimeUnit::MICROS => 6,
            TimeUnit::NANOS => 9,
        };
        match (logical, converted) {
            (Some(LogicalType::Time(time)), _) => Self::Time { digits: digits(&time.unit) },
            (Some(LogicalType::Timestamp(time)), _) => {
                Self::Timestamp { digits: digits(&time.unit), utc: time.is_adjusted_to_u_t_c }
            }
            (_, ConvertedType::DATE) => Self::Date,
            (_, ConvertedType::TIME_MILLIS) => Self::Time { digits: 3 },
            (_, ConvertedType::TIME_MICROS) => Self::Time { digits: 6 },
            (_, ConvertedType::TIMESTAMP_MILLIS) => Self::Timestamp { digits: 3, utc: true },
            (_, ConvertedType::TIMESTAMP_MICROS) => Self::Timestamp { digits: 6, utc: true },
            (_, ConvertedType::UINT_8 | ConvertedType::UINT_16 | ConvertedType::UINT_32) => Self::Unsigned32,
            (_, ConvertedType::UINT_64) => Self::Unsigned64,
            _ => Self::Signed,
        }
    }
}

/// Appends a value.
///
/// # Errors
/// What is wrong with a value that is not of its column's type.
pub(crate) fn write(out: &mut Vec<u8>, kind: Kind, value: Value<'_>) -> Result<(), String> {
    match (kind, value) {
        (Kind::Bool, Value::Bool(value)) => ascii(out, value),
        (Kind::Signed, Value::Integer(value)) => ascii(out, value),
        (Kind::Unsigned32, Value::Integer(value)) => ascii(out, value as u32),
        (Kind::Unsigned64, Value::Integer(value)) => ascii(out, value as u64),
        (Kind::Decimal { scale }, Value::Integer(value)) => ascii(out, decimal(&value.into(), scale)),
        (Kind::Decimal { scale }, Value::Bytes(bytes)) => {
            ascii(out, decimal(&BigInt::from_signed_bytes_be(bytes), scale));
        }
        (Kind::Date, Value::Integer(days)) => ascii(out, quoted(&date(days.into()))),
        (Kind::Time { digits }, Value::Integer(value)) => ascii(out, quoted(&time(value.into(), digits))),
        (Kind::Timestamp { digits, utc }, Value::Integer(value)) => {
            let zone = if utc { "Z" } else { "" };
            ascii(out, quoted(&(timestamp(value.into(), digits) + zone)));
        }
        (Kind::Int96, Value::Int96(&[low, middle, high])) => {
            let nanoseconds = i128::from(middle) << 32 | i128::from(low);
            let days = i128::from(high as i32) - JULIAN_DAY_OF_1970;
            ascii(out, quoted(&timestamp(days * per_day(9) + nanoseconds, 9)));
        }
        (Kind::Float, Value::Float(value)) => json::float(out, value),
        (Kind::Float16, Value::Bytes(&[low, high])) => {
            json::float(out, half::f16::from_le_bytes([low, high]).to_f64());
        }
        (Kind::Text, Value::Bytes(text)) => json::string(out, text),
        (Kind::Json, Value::Bytes(text)) if json::is_json(text) => out.extend_from_slice(text),
        (Kind::Json, Value::Bytes(text)) => json::string(out, text),
        (Kind::Nested, Value::Bytes(text)) if json::is_nested(text) => out.extend_from_slice(text),
        (Kind::Nested, Value::Bytes(b"null")) => out.extend_from_slice(b"null"),
        (Kind::Nested, Value::Bytes(text)) if json::is_blank(text) => out.extend_from_slice(b"null"),
        (Kind::Nested, Value::Bytes(text)) => json::string(out, text),
        (Kind::Uuid, Value::Bytes(bytes)) => ascii(out, quoted(&uuid(bytes))),
        (Kind::Binary, Value::Bytes(bytes)) => match image_type(bytes) {
            Some(image) => data_url(out, image, bytes),
            None if !bytes.contains(&0) && std::str::from_utf8(bytes).is_ok() => json::string(out, bytes),
            None => data_url(out, "application/octet-stream", bytes),
        },
        (Kind::Bytes, Value::Bytes(bytes)) => data_url(out, "application/octet-stream", bytes),
        (kind, value) => return Err(format!("a value of another type than the column's: {value:?} for {kind:?}")),
    }
    Ok(())
}

fn ascii(out: &mut Vec<u8>, value: impl std::fmt::Display) {
    // Writing to a vector cannot fail.
    let _ = write!(out, "{value}");
}

fn quoted(text: &str) -> String {
    format!("\"{text}\"")
}

/// All digits of `unscaled / 10^scale`.
fn decimal(unscaled: &BigInt, scale: usize) -> String {
    let digits = format!("{:0>width$}", unscaled.magnitude().to_string(), width = scale + 1);
    let sign = if unscaled.sign() == num_bigint::Sign::Minus { "-" } else { "" };
    let (whole, fraction) = digits.split_at(digits.len() - scale);
    let point = if scale > 0 { "." } else { "" };
    format!("{sign}{whole}{point}{fraction}")
}

const JULIAN_DAY_OF_1970: i128 = 2_440_588;

/// A date of the Gregorian calendar, extended to years before and after it.
fn date(days: i128) -> String {
    let seconds = i64::try_from(days * 86_400).ok();
    let Some(date) = seconds.and_then(|seconds| DateTime::from_timestamp(seconds, 0)) else {
        return format!("{days} days since 1970-01-01");
    };
    let (year, month, day) = (date.year(), date.month(), date.day());
    let year = if (0..10_000).contains(&year) { format!("{year:04}") } else { format!("{year:+07}") };
    format!("{year}-{month:02}-{day:02}")
}

fn per_day(digits: u32) -> i128 {
    86_400 * 10_i128.pow(digits)
}

fn time(value: i128, digits: u32) -> String {
    let per_second = 10_i128.pow(digits);
    let (seconds, fraction) = (value / per_second, value % per_second);
    let width = digits as usize;
    format!("{:02}:{:02}:{:02}.{fraction:0width$}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

fn timestamp(value: i128, digits: u32) -> String {
    let of_day = value.rem_euclid(per_day(digits));
    format!("{}T{}", date(value.div_euclid(per_day(digits))), time(of_day, digits))
}

fn uuid(bytes: &[u8]) -> String {
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let mut parts = Vec::new();
    let mut rest = bytes;
    for length in [4, 2, 2, 2] {
        let (part, behind) = rest.split_at(length.min(rest.len()));
        parts.push(hex(part));
        rest = behind;
    }
    parts.push(hex(rest));
    parts.join("-")
}

fn data_url(out: &mut Vec<u8>, media_type: &str, bytes: &[u8]) {
    out.extend_from_slice(format!("\"data:{media_type};base64,").as_bytes());
    out.extend_from_slice(STANDARD.encode(bytes).as_bytes());
    out.push(b'"');
}

/// The type of an image, by its first bytes; the same types as `src/data/mime.ts` takes.
fn image_type(bytes: &[u8]) -> Option<&'static str> {
    const BMP_HEADERS: [u32; 8] = [12, 16, 40, 52, 56, 64, 108, 124];
    Some(match bytes {
        [0x89, b'P', b'N', b'G', b'\r', b'\n', 0x1A, b'\n', ..] => "image/png",
        [0xFF, 0xD8, 0xFF, ..] => "image/jpeg",
        [b'G', b'I', b'F', b'8', b'7' | b'9', b'a', ..] => "image/gif",
        [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => "image/webp",
        [b'I', b'I', b'*' | b'+', 0, ..] | [b'M', b'M', 0, b'*' | b'+', ..] => "image/tiff",
        [b'B', b'M', ..] if bytes.len() >= 26 => {
            let header = [bytes[14], bytes[15], bytes[16], bytes[17]];
            return BMP_HEADERS.contains(&u32::from_le_bytes(header)).then_some("image/bmp");
        }
        // An ISO media file: the major brand, and those it is compatible with.
        [a, b, c, d, b'f', b't', b'y', b'p', _, _, _, _, _, _, _, _, ..] => {
            let end = (u32::from_be_bytes([*a, *b, *c, *d]) as usize).clamp(16, bytes.len().min(64));
            let mut brands = std::iter::once(&bytes[8..12]).chain(bytes[16..end].chunks_exact(4));
            return brands.any(|brand| matches!(brand, b"avif" | b"avis")).then_some("image/avif");
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_reach_beyond_four_digits_of_years() {
        for (days, text) in [
            (0, "1970-01-01"),
            (-1, "1969-12-31"),
            (19_782, "2024-02-29"),
            (-719_162, "0001-01-01"),
            (2_932_896, "9999-12-31"),
            (2_932_897, "+010000-01-01"),
            (-719_529, "-000001-12-31"),
            (100_000_000, "100000000 days since 1970-01-01"),
        ] {
            assert_eq!(date(days), text);
        }
        assert_eq!(timestamp(-1, 9), "1969-12-31T23:59:59.999999999");
        assert_eq!(timestamp(i64::MIN.into(), 3), "-106751991168 days since 1970-01-01T16:47:04.192");
    }

    #[test]
    fn decimals_have_all_digits() {
        for (unscaled, scale, text) in [(-5, 2, "-0.05"), (0, 3, "0.000"), (120, 0, "120"), (-1230, 3, "-1.230")] {
            assert_eq!(decimal(&BigInt::from(unscaled), scale), text);
        }
        assert_eq!(decimal(&BigInt::from_signed_bytes_be(&[]), 1), "0.0");
    }

    #[test]
    fn images_are_known_by_their_first_bytes() {
        let bmp = |header: u8| [b"BM".as_slice(), &[0; 12], &[header, 0, 0, 0], &[0; 8]].concat();
        for (bytes, wanted) in [
            (b"\x89PNG\r\n\x1A\n".to_vec(), Some("image/png")),
            (b"\xFF\xD8\xFF".to_vec(), Some("image/jpeg")),
            (b"GIF89a".to_vec(), Some("image/gif")),
            (b"GIF88a".to_vec(), None),
            (b"RIFF....WEBP".to_vec(), Some("image/webp")),
            (b"MM\0*".to_vec(), Some("image/tiff")),
            (bmp(40), Some("image/bmp")),
            (bmp(41), None),
            (b"\0\0\0\x14ftypmif1\0\0\0\0avif".to_vec(), Some("image/avif")),
            (b"\0\0\0\x10ftypmif1\0\0\0\0avif".to_vec(), None),
            (b"\0\0\0\x01ftypavis\0\0\0\0".to_vec(), Some("image/avif")),
            (b"ftyp".to_vec(), None),
        ] {
            assert_eq!(image_type(&bytes), wanted, "{bytes:?}");
        }
    }
}
