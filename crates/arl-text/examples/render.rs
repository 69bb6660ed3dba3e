//! What a template makes of rows, one JSON string a line, or an object with the problem:
//! `cargo run -p arl-text --example render -- MODEL_DIR TEMPLATE FILE`. For comparison with another renderer.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "the text is its output")]

use arl_model::{Error, ErrorCode, Result};
use arl_text::{Outcome, TextEncoder, TextOptions};

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model_dir, template, file] = args.as_slice() else {
        return Err(Error::new(ErrorCode::Config, "usage: render MODEL_DIR TEMPLATE FILE"));
    };
    let encoder = TextEncoder::open(TextOptions {
        model_dir: model_dir.into(),
        chat_template: Some(template.into()),
        ..TextOptions::default()
    })?;
    let bytes = std::fs::read(file).map_err(|error| Error::io(file.as_ref(), &error))?;
    for (i, row) in bytes.split(|&byte| byte == b'\n').filter(|row| !row.is_empty()).enumerate() {
        let line = match encoder.encode(i, row) {
            Ok(Outcome::Sample(sample)) => serde_json::json!(sample.text),
            Ok(Outcome::Dropped(tokens)) => serde_json::json!({ "dropped": tokens }),
            Err(problem) => serde_json::json!({ "reason": problem.reason, "message": problem.message }),
        };
        println!("{line}");
    }
    Ok(())
}
