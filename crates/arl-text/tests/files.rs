//! Unpacking, and the rows of a JSON array.
use std::io::Write;

use arl_text::{Content, decompress, json_array_rows, sniff};

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 0).unwrap()
}

#[test]
fn gzip_and_zstd_are_told_by_content_and_unpacked() {
    let dir = tempfile::tempdir().unwrap();
    let text: Vec<u8> = (0..200_000u32).flat_map(|i| format!("{{\"row\": {i}}}\n").into_bytes()).collect();
    let half = text.len() / 2;
    let skippable = [b"\x50\x2A\x4D\x18\x03\0\0\0abc".to_vec(), zstd(&text)].concat();
    for (name, packed) in [
        ("gzip", gzip(&text)),
        ("zstd", zstd(&text)),
        ("members", [gzip(&text[..half]), gzip(&text[half..])].concat()),
        ("frames", [zstd(&text[..half]), zstd(&text[half..])].concat()),
        ("skippable", skippable),
    ] {
        let (source, target) = (dir.path().join("rows"), dir.path().join("out"));
        std::fs::write(&source, packed).unwrap();
        assert!(decompress(&source, &target).unwrap(), "{name}");
        assert!(std::fs::read(&target).unwrap() == text, "{name}");
    }
}

#[test]
fn plain_files_stay_as_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let (source, target) = (dir.path().join("rows"), dir.path().join("out"));
    for bytes in [b"".as_slice(), b"{}", b"\x1f", b"{\"text\": \"a\"}\n"] {
        std::fs::write(&source, bytes).unwrap();
        assert!(!decompress(&source, &target).unwrap());
        assert!(!target.exists());
    }
}

#[test]
fn a_damaged_file_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let (source, target) = (dir.path().join("rows"), dir.path().join("out"));
    let text = b"{\"text\": \"abc\"}\n".repeat(1000);
    let mut flipped = gzip(&text);
    let at = flipped.len() - 6;
    flipped[at] ^= 1;
    let mut checked = zstd::Encoder::new(Vec::new(), 0).unwrap();
    checked.include_checksum(true).unwrap();
    checked.write_all(&text).unwrap();
    let mut checked = checked.finish().unwrap();
    *checked.last_mut().unwrap() ^= 1;
    let cut = |bytes: Vec<u8>| bytes[..bytes.len() * 2 / 3].to_vec();
    for (name, bytes) in
        [("gzip", cut(gzip(&text))), ("zstd", cut(zstd(&text))), ("checksum", flipped), ("sum", checked)]
    {
        std::fs::write(&source, bytes).unwrap();
        let error = decompress(&source, &target).unwrap_err();
        assert_eq!(error.code, arl_model::ErrorCode::Data, "{name}: {error}");
        assert!(error.message.contains("rows"), "{name}: {error}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "{name}");
    }
    assert!(decompress(&dir.path().join("absent"), &target).is_err());
    assert!(decompress(dir.path(), &target).unwrap_err().message.contains("directory"));
}

#[test]
fn the_first_bytes_say_what_a_file_is() {
    let utf16 = |text: &str| text.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<u8>>();
    let utf32 = |text: &str| text.chars().flat_map(|c| (c as u32).to_be_bytes()).collect::<Vec<u8>>();
    let text = r#"{"messages": [{"role": "user", "content": "Grüße"}]}"#;
    let cases: Vec<(Vec<u8>, Content)> = vec![
        (gzip(b""), Content::Gzip),
        (zstd(b""), Content::Zstd),
        (b"\x5F\x2A\x4D\x18\0\0\0\0".to_vec(), Content::Zstd),
        (utf16(text), Content::Utf16),
        (utf16(&format!("\u{FEFF}{text}")), Content::Utf16),
        (utf16("[]"), Content::Utf16),
        (utf32(text), Content::Utf32),
        (utf32(&format!("\u{FEFF}{text}")), Content::Utf32),
        (text.as_bytes().to_vec(), Content::Other),
        (format!("\u{FEFF}{text}").into_bytes(), Content::Other),
        (b"\x1f".to_vec(), Content::Other),
        (b"{}".to_vec(), Content::Other),
        (Vec::new(), Content::Other),
    ];
    for (head, expected) in cases {
        assert_eq!(sniff(&head), expected, "{:?}", String::from_utf8_lossy(&head));
    }
}

fn rows_of(text: &[u8]) -> Result<Vec<String>, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rows.json");
    std::fs::write(&path, text).unwrap();
    let rows = json_array_rows(&path).map_err(|error| error.message)?;
    let (mut at, mut newlines) = (0, 0);
    for (range, line) in rows.ranges.chunks(2).zip(&rows.lines) {
        newlines += text[at..range[0] as usize].iter().filter(|&&byte| byte == b'\n').count();
        at = range[0] as usize;
        assert_eq!(*line, 1 + newlines as u64);
    }
    assert_eq!(rows.ranges.len(), 2 * rows.lines.len());
    Ok(rows.ranges.chunks(2).map(|r| String::from_utf8(text[r[0] as usize..r[1] as usize].to_vec()).unwrap()).collect())
}

#[test]
fn the_elements_of_an_array_are_found_to_the_byte() {
    let row = r#"{"a": "]},[\"\\", "b": [1, {"c": []}]}"#;
    let text = format!("\u{FEFF} [ {row} ,\n{row}\t, 1, \"x,]\", null , [2] ]\n");
    assert_eq!(rows_of(text.as_bytes()).unwrap(), [row, row, "1", "\"x,]\"", "null", "[2]"]);
    assert!(rows_of(b" [ ] ").unwrap().is_empty());
    let many = format!("[{}]", vec![row; 60_000].join(",\n"));
    let found = rows_of(many.as_bytes()).unwrap();
    assert!(found.len() == 60_000 && found.iter().all(|found| found == row));
}

#[test]
fn a_file_that_is_no_array_is_refused_with_its_line() {
    let cases: [(&[u8], &str); 14] = [
        (b"", "1: the file is empty"),
        (b"{}", "1: the file is not a JSON array"),
        (b"[1,\n2", "2: the file ends"),
        (b"[1,\n\n]", "3: an element is missing"),
        (b"[,1]", "1: an element is missing"),
        (b"[1 2]", "1: no `,`"),
        (b"[{} {}]", "1: no `,`"),
        (b"[1]\n]", "2: something follows"),
        (b"[{\"a\": 1]]", "1: brackets"),
        (b"[\"a\n\"]", "1: a string"),
        (b"[{\"a\": \"x", "1: the file ends"),
        (b"[\"a\" \"b\"]", "1: no `,`"),
        (b"\xFF\xFE[\0]\0", "UTF-16"),
        (b"[\0]\0", "UTF-16"),
    ];
    for (text, expected) in cases {
        let message = rows_of(text).unwrap_err();
        assert!(message.contains(expected), "{}: {message}", String::from_utf8_lossy(text));
    }
    let deep = "[".repeat(1 << 20);
    assert!(rows_of(deep.as_bytes()).unwrap_err().contains("too deep"));
}
