//! NCCL for tests, made by the C compiler of `libnccl.c`.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Puts the library into `folder`; `version` as NCCL counts, 23007 for 2.30.7.
pub(crate) fn library(folder: &Path, version: u32) -> PathBuf {
    let file = folder.join(format!("libnccl-{version}.so.2"));
    // Also where this file is a part of another crate's tests.
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../arl-comm/tests/fake/libnccl.c");
    let status = Command::new(std::env::var("CC").unwrap_or_else(|_| "cc".into()))
        .args(["-std=gnu11", "-O2", "-Wall", "-Werror", "-Wno-format-truncation", "-shared", "-fPIC", "-pthread"])
        .arg(format!("-DFAKE_VERSION={version}"))
        .arg(&source)
        .args(["-lrt", "-o"])
        .arg(&file)
        .status()
        .unwrap();
    assert!(status.success(), "{} does not compile", source.display());
    file
}
