//! What names a way of making tokens: the same fingerprint has the same tokens for the same rows.

use crate::options::TextOptions;
use crate::template::Templates;
use crate::tokenize::Tokens;
use crate::vision::VisionTokens;

/// Change it whenever the same row would give other tokens.
const FORMAT: &str = "arl-text 2";

/// A hash of everything besides the rows that decides tokens, targets and weights.
pub(super) fn fingerprint<T>(
    options: &TextOptions,
    templates: Option<&Templates<T>>,
    date: Option<&str>,
    tokens: &Tokens,
    eos: Option<&(String, u32)>,
    vision: Option<&VisionTokens>,
) -> String {
    let mut hash = blake3::Hasher::new();
    let mut add = |part: &str| {
        hash.update(&(part.len() as u64).to_le_bytes());
        hash.update(part.as_bytes());
    };
    add(FORMAT);
    for (name, source) in templates.iter().flat_map(|templates| &templates.sources) {
        add(name);
        add(source);
    }
    add(&tokens.hash.to_hex());
    add(&format!("{eos:?}"));
    let TextOptions {
        model_dir: _,
        chat_template: _,
        chat_template_date: _,
        max_length,
        truncation,
        thinking,
        columns,
        minimal_advantage,
        drop_zero_advantage,
        skip_non_positive_advantage,
        images,
        vision: _,
        image_processor,
    } = options;
    add(&format!("{max_length:?} {truncation:?} {thinking:?} {images:?} {columns:?}"));
    add(&format!("{minimal_advantage:?} {drop_zero_advantage} {skip_non_positive_advantage}"));
    if let Some(vision) = vision {
        add(&format!("{vision:?} {image_processor:?}"));
    }
    let hash = hash.finalize().to_hex().to_string();
    // Readable, so that a run that is resumed on another day shows what differs.
    date.map_or(hash.clone(), |date| format!("{hash}, chat_template_date {date}"))
}
