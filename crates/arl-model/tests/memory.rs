//! Memory while reading. The only test of its process, because it measures the process.

#![allow(clippy::print_stderr, reason = "reports that it was skipped")]

use arl_model::{Dtype, SafetensorsFile, SafetensorsWriter, TensorDecl};

/// Resident memory of this process in KiB, mapped files included.
fn resident() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.trim().parse().ok())
}

#[test]
fn reading_releases_the_pages_of_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    let elements = 24 << 20;
    let tensor = TensorDecl { name: "w".to_owned(), dtype: Dtype::F32, shape: vec![elements] };
    let mut writer = SafetensorsWriter::create(&path, &[], &[tensor]).unwrap();
    let piece = 1.5f32.to_le_bytes().repeat(1 << 20);
    for _ in 0..24 {
        writer.append(&piece).unwrap();
    }
    writer.finish().unwrap();
    let file = SafetensorsFile::open(&path).unwrap();
    // The destination is in memory before, so that only the map can add to it.
    let mut out = vec![1f32; elements];
    let before = resident();
    file.read_f32("w", &mut out).unwrap();
    let (Some(before), Some(after)) = (before, resident()) else {
        eprintln!("SKIPPED: this system does not report resident memory");
        return;
    };
    assert_eq!(out[elements - 1], 1.5);
    // The file is 96 MiB, and 4 MiB of it are mapped at a time.
    assert!(after < before + 10 * 1024, "{before} KiB before, {after} KiB after");
}
