//! Tokens a second from rows to a filled cache: `cargo run --release -p arl-text --example rate -- MODEL_DIR FILE...`.
//! Prints one JSON line a file and one for all; reading the file is not counted, writing the cache is.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a measurement is its output")]

use std::sync::Arc;
use std::time::Instant;

use arl_model::{Error, ErrorCode, Result};
use arl_text::{TextEncoder, TextOptions, TokenCache};

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let model_dir = args.next().ok_or_else(|| Error::new(ErrorCode::Config, "usage: rate MODEL_DIR FILE..."))?;
    let (mut all_tokens, mut all_seconds) = (0, 0.0);
    for file in args {
        let options = TextOptions { model_dir: model_dir.clone().into(), ..TextOptions::default() };
        let encoder = Arc::new(TextEncoder::open(options)?);
        let bytes = std::fs::read(&file).map_err(|error| Error::io(file.as_ref(), &error))?;
        let rows: Vec<&[u8]> = bytes.split(|&byte| byte == b'\n').filter(|row| !row.is_empty()).collect();
        let indexes: Vec<u32> = (0..rows.len() as u32).collect();
        let shape = encoder.detect(&rows[..rows.len().min(16)])?;
        let dir = std::env::temp_dir().join(format!("arl-rate-{}", std::process::id()));
        let cache = TokenCache::open(&dir, &file, rows.len(), Arc::clone(&encoder))?;
        let start = Instant::now();
        let report = cache.fill(&rows, &indexes)?;
        let seconds = start.elapsed().as_secs_f64();
        cache.sync()?;
        drop(cache);
        std::fs::remove_dir_all(&dir).map_err(|error| Error::io(&dir, &error))?;
        println!(
            r#"{{"file": "{file}", "shape": "{shape}", "rows": {}, "problems": {}, "tokens": {}, "target_tokens": {}, "seconds": {seconds:.3}, "tokens_per_second": {:.0}}}"#,
            report.rows,
            report.problems.len(),
            report.tokens,
            report.target_tokens,
            report.tokens as f64 / seconds
        );
        all_tokens += report.tokens;
        all_seconds += seconds;
    }
    println!(r#"{{"tokens": {all_tokens}, "tokens_per_second": {:.0}}}"#, all_tokens as f64 / all_seconds);
    Ok(())
}
