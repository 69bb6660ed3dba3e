//! Files of older writers, damaged files, and what is written is what is read.

#[path = "../../arl-text/tests/common/property.rs"]
mod property;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use arl_model::{ErrorCode, Result};
use arl_parquet::{ColumnNames, ReadOptions, Rows, Writer};
use parquet::basic::{Compression, Encoding};
use parquet::column::writer::ColumnWriter;
use parquet::data_type::ByteArray;
use parquet::file::properties::{WriterProperties, WriterVersion};
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use proptest::prelude::*;
use tempfile::{TempDir, tempdir};

/// The values of one column with their definition and repetition levels.
struct Values<'a> {
    values: &'a [i32],
    definition: &'a [i16],
    repetition: &'a [i16],
}

fn write_int32(path: &Path, schema: &str, columns: &[Values<'_>]) {
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let properties = Arc::new(WriterProperties::builder().build());
    let mut file = SerializedFileWriter::new(std::fs::File::create(path).unwrap(), schema, properties).unwrap();
    let mut group = file.next_row_group().unwrap();
    for Values { values, definition, repetition } in columns {
        let mut column = group.next_column().unwrap().unwrap();
        let ColumnWriter::Int32ColumnWriter(writer) = column.untyped() else { panic!("another type") };
        writer.write_batch(values, Some(definition), Some(repetition)).unwrap();
        column.close().unwrap();
    }
    group.close().unwrap();
    file.close().unwrap();
}

fn read_with(path: &Path, cancelled: bool) -> (TempDir, PathBuf, Result<Rows>) {
    let folder = tempdir().unwrap();
    let spill = folder.path().join("rows");
    let options = ReadOptions {
        path: path.to_owned(),
        name: "table".to_owned(),
        spill: spill.clone(),
        columns: ColumnNames { messages: "messages".to_owned(), ..ColumnNames::default() },
    };
    let rows = arl_parquet::read(&options, &AtomicBool::new(cancelled));
    (folder, spill, rows)
}

fn read(path: &Path) -> Result<Vec<String>> {
    let (_folder, spill, rows) = read_with(path, false);
    let rows = rows?;
    let text = std::fs::read(spill).unwrap();
    let row = |place: &[u64]| String::from_utf8_lossy(&text[place[0] as usize..place[1] as usize]).into_owned();
    Ok(rows.ranges.chunks(2).map(row).collect())
}

#[test]
fn lists_of_older_writers_are_lists() {
    let numbers: &[i32] = &[1, 2];
    let two_one = Values { values: numbers, definition: &[2, 2, 1, 0], repetition: &[0, 1, 0, 0] };
    let none_around = Values { values: numbers, definition: &[1, 1, 0], repetition: &[0, 1, 0] };
    let x = Values { values: &[1], definition: &[3, 2, 1, 0], repetition: &[0, 1, 0, 0] };
    let y = Values { values: &[2, 3], definition: &[2, 2, 1, 0], repetition: &[0, 1, 0, 0] };
    let one_field = Values { values: &[1], definition: &[3, 2, 1, 0], repetition: &[0, 1, 0, 0] };
    let key = Values { values: &[1], definition: &[2, 1], repetition: &[0, 0] };
    let value = Values { values: &[2], definition: &[3, 1], repetition: &[0, 0] };
    let cases: [(&str, &str, &[Values<'_>], &[&str]); 5] = [
        ("repeated values", "optional group l (LIST) { repeated int32 array; }", &[two_one], &["[1,2]", "[]", "null"]),
        ("repeated values that no list is around", "repeated int32 l;", &[none_around], &["[1,2]", "[]"]),
        (
            "repeated structs",
            "optional group l (LIST) { repeated group element { optional int32 x; required int32 y; } }",
            &[x, y],
            &["[{\"x\":1,\"y\":2},{\"y\":3}]", "[]", "null"],
        ),
        (
            "repeated structs of one field, by their name",
            "optional group l (LIST) { repeated group l_tuple { optional int32 x; } }",
            &[one_field],
            &["[{\"x\":1},{}]", "[]", "null"],
        ),
        (
            "maps by their old name",
            "optional group l (MAP_KEY_VALUE) { repeated group map { required int32 key; optional int32 value; } }",
            &[key, value],
            &["{\"1\":2}", "{}"],
        ),
    ];
    let folder = tempdir().unwrap();
    let path = folder.path().join("rows.parquet");
    for (name, column, columns, wanted) in cases {
        write_int32(&path, &format!("message schema {{ {column} }}"), columns);
        let wanted: Vec<String> = wanted.iter().map(|value| format!("{{\"l\":{value}}}")).collect();
        assert_eq!(read(&path).unwrap(), wanted, "{name}");
    }
}

/// A file with columns of texts and integers in the given encodings, over several pages.
fn encoded(
    texts: Encoding,
    integers: Encoding,
    dictionary: bool,
    codec: Compression,
    version: WriterVersion,
) -> Vec<u8> {
    let schema = "message schema { optional binary t (STRING); required int64 i; optional int32 j; }";
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let builder = WriterProperties::builder().set_compression(codec).set_writer_version(version);
    let builder =
        builder.set_dictionary_enabled(dictionary).set_data_page_row_count_limit(100).set_write_batch_size(50);
    let builder = builder.set_column_encoding("t".into(), texts).set_column_encoding("i".into(), integers);
    let properties = Arc::new(builder.set_column_encoding("j".into(), integers).build());
    let mut bytes = Vec::new();
    let mut file = SerializedFileWriter::new(&mut bytes, schema, properties).unwrap();
    let mut group = file.next_row_group().unwrap();
    let present: Vec<i16> = (0..ROWS).map(|row| i16::from(row % 3 != 0)).collect();
    let some = || (0..ROWS).filter(|row| row % 3 != 0);
    while let Some(mut column) = group.next_column().unwrap() {
        match column.untyped() {
            ColumnWriter::ByteArrayColumnWriter(writer) => {
                let values: Vec<ByteArray> = some().map(|row| format!("text {}", row % 7).as_str().into()).collect();
                writer.write_batch(&values, Some(&present), None).unwrap();
            }
            ColumnWriter::Int64ColumnWriter(writer) => {
                let values: Vec<i64> = (0..ROWS).map(|row| row * row).collect();
                writer.write_batch(&values, None, None).unwrap();
            }
            ColumnWriter::Int32ColumnWriter(writer) => {
                let values: Vec<i32> = some().map(|row| -(row as i32)).collect();
                writer.write_batch(&values, Some(&present), None).unwrap();
            }
            _ => panic!("another type"),
        }
        column.close().unwrap();
    }
    group.close().unwrap();
    file.close().unwrap();
    bytes
}

const ROWS: i64 = 350;

fn expected() -> Vec<String> {
    let row = |row: i64| match row % 3 {
        0 => format!("{{\"t\":null,\"i\":{},\"j\":null}}", row * row),
        _ => format!("{{\"t\":\"text {}\",\"i\":{},\"j\":{}}}", row % 7, row * row, -row),
    };
    (0..ROWS).map(row).collect()
}

#[test]
fn a_damaged_file_ends_in_a_named_error_or_in_rows() {
    let (plain, one, two) = (Encoding::PLAIN, WriterVersion::PARQUET_1_0, WriterVersion::PARQUET_2_0);
    let delta = Encoding::DELTA_BINARY_PACKED;
    let zstd = Compression::ZSTD(Default::default());
    let files = [
        encoded(plain, plain, true, Compression::SNAPPY, one),
        encoded(plain, plain, false, zstd, two),
        encoded(Encoding::DELTA_BYTE_ARRAY, delta, false, Compression::UNCOMPRESSED, one),
        encoded(Encoding::DELTA_LENGTH_BYTE_ARRAY, delta, false, Compression::UNCOMPRESSED, two),
        encoded(plain, Encoding::BYTE_STREAM_SPLIT, false, Compression::LZ4_RAW, one),
    ];
    let folder = tempdir().unwrap();
    let path = folder.path().join("rows.parquet");
    for (number, whole) in files.iter().enumerate() {
        std::fs::write(&path, whole).unwrap();
        assert_eq!(read(&path).unwrap(), expected(), "file {number}");
        let change = (4..whole.len() - 4, any::<u8>());
        let changes = proptest::collection::vec(change, 1..4);
        let refused = std::cell::Cell::new(0);
        let damaged = |changes: Vec<(usize, u8)>| {
            let mut bytes = whole.clone();
            changes.iter().for_each(|&(at, byte)| bytes[at] = byte);
            std::fs::write(&path, bytes).unwrap();
            if let Err(error) = read(&path) {
                prop_assert_eq!(error.code, ErrorCode::Data, "{}", error);
                prop_assert!(error.message.contains("table"), "{}", error);
                refused.set(refused.get() + 1);
            }
            Ok(())
        };
        property::holds(400, changes, damaged);
        assert!(refused.get() > 50, "file {number}: {}", refused.get());
    }
}

#[test]
fn a_count_that_no_page_can_hold_reserves_no_memory() {
    // Where the lengths of the texts are counted, 2^63 - 1 of them.
    let whole = encoded(
        Encoding::DELTA_LENGTH_BYTE_ARRAY,
        Encoding::PLAIN,
        false,
        Compression::UNCOMPRESSED,
        WriterVersion::PARQUET_1_0,
    );
    let header = [0x80, 0x01, 0x04];
    let at = whole.windows(3).position(|bytes| bytes == header).unwrap() + 3;
    let folder = tempdir().unwrap();
    let path = folder.path().join("rows.parquet");
    for length in [5, 9] {
        let mut bytes = whole.clone();
        bytes[at..at + length].fill(0xFF);
        bytes[at + length] = 0x3F;
        std::fs::write(&path, bytes).unwrap();
        assert_eq!(read(&path).unwrap_err().code, ErrorCode::Data);
    }
}

#[test]
fn reading_ends_when_it_is_cancelled() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("rows.parquet");
    write_int32(
        &path,
        "message schema { repeated int32 l; }",
        &[Values { values: &[1], definition: &[1], repetition: &[0] }],
    );
    assert_eq!(read_with(&path, true).2.unwrap_err().code, ErrorCode::Interrupted);
}

#[test]
fn rows_that_are_written_are_read_as_the_same_bytes() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("rows.parquet");
    let rows = [
        "{\"messages\":[{\"content\":null,\"weight\":1.0}],\"tools\":[{\"n\":1e400}],\"reward\":1.0,\"step\":9007199254740993}",
        "{\"messages\":[],\"tools\":null,\"reward\":-0.25,\"record_id\":\"a\\\"b\"}",
        "{\"step\":-1,\"extra\":{\"b\": 1, \"a\": [1.0]}}",
        "{}",
    ];
    let mut writer = Writer::create(&path, "table").unwrap();
    rows.iter().for_each(|row| writer.add(row.as_bytes()).unwrap());
    assert_eq!(writer.finish().unwrap(), 4);
    assert_eq!(read(&path).unwrap(), rows);
    let mut writer = Writer::create(&path, "table").unwrap();
    writer.add(b"{\"step\":1,\"step\":2,\"reward\":-0,\"reward\":null,\"reward\":1e23}").unwrap();
    writer.finish().unwrap();
    assert_eq!(read(&path).unwrap(), ["{\"reward\":1e+23,\"step\":2}"]);
    for bad in ["{\"step\":1.0}", "{\"reward\":9007199254740993}", "{\"reward\":\"1\"}", "{\"split\":1}", "[]", "{"] {
        let mut writer = Writer::create(&path, "table").unwrap();
        assert_eq!(writer.add(bad.as_bytes()).unwrap_err().code, ErrorCode::Data, "{bad}");
    }
}
