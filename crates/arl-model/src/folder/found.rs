//! What a folder or a file is instead of what was looked for, and the way from it to a model that can be trained.

use std::path::Path;

use super::names_of;
use crate::weights::{INDEX, SINGLE};
use crate::{Error, ErrorCode};

/// What a file is in place of its content.
#[derive(Clone, Copy, Debug)]
pub struct Placeholder {
    what: &'static str,
    hint: &'static str,
}

impl Placeholder {
    /// That the file at `path` is this.
    pub fn error(self, code: ErrorCode, path: &Path) -> Error {
        Error::new(code, format!("{}: {}", path.display(), self.what)).hint(self.hint)
    }
}

/// Whether these bytes are no file's own content but a pointer to it.
pub fn unreadable(bytes: &[u8]) -> Option<Placeholder> {
    bytes.starts_with(b"version https://git-lfs").then_some(Placeholder {
        what: "a pointer of Git LFS in place of the file",
        hint: "fetch the file itself: git lfs pull",
    })
}

/// Files that hold weights and are not read, by how their names end, with the way out.
const OTHER_WEIGHTS: &[(&[&str], &str)] = &[
    (
        &[".gguf"],
        "GGUF is for inference, and mostly quantized: take the safetensors folder of the model that it was made from",
    ),
    (
        &[".bin", ".pt", ".pth", ".ckpt"],
        "load the model with transformers and write it as safetensors: model.save_pretrained(folder)",
    ),
    (
        &[".h5", ".msgpack", ".onnx"],
        "take the model's PyTorch weights as safetensors: model.save_pretrained(folder) of transformers",
    ),
];

/// There is no `config.json` in a folder.
pub(super) fn no_config(dir: &Path, path: &Path) -> Error {
    let error = |message: String, hint: &str| Error::new(ErrorCode::Config, message).hint(hint);
    let names = names_of(dir);
    if let Some(adapter) = adapter(dir, &names) {
        return Error { code: ErrorCode::Config, ..adapter };
    }
    if let Some((name, hint)) = other_weights(&names) {
        return error(format!("{}: no such file; the folder holds {name}", path.display()), hint);
    }
    if path.exists() {
        return error(format!("{} is not a file", path.display()), "config.json of a model is a JSON file");
    }
    error(
        format!("{}: no such file: the folder is no model in Hugging Face's layout", path.display()),
        "it should hold config.json, *.safetensors, tokenizer.json and a chat template",
    )
}

/// There are no weights in a folder.
pub(crate) fn no_weights(dir: &Path) -> Error {
    let error = |message: String| Error::new(ErrorCode::Weights, format!("{}: {message}", dir.display()));
    let names = names_of(dir);
    if let Some(adapter) = adapter(dir, &names) {
        return adapter;
    }
    let shards = names.iter().filter(|name| name.ends_with(".safetensors"));
    match shards.collect::<Vec<_>>().as_slice() {
        [] => {}
        [one] => {
            return error(format!("has neither {SINGLE} nor {INDEX}, only {one}"))
                .hint(format!("rename it to {SINGLE} if it holds the whole model; else complete the download"));
        }
        [one, ..] => {
            return error(format!("has no {INDEX}, which maps tensors to {one} and the other files"))
                .hint("complete the download: copy the index from where the weights came from");
        }
    }
    if let Some((name, hint)) = other_weights(&names) {
        return error(format!("has neither {SINGLE} nor {INDEX}, only {name}")).hint(hint);
    }
    error(format!("has no weights ({SINGLE} or {INDEX})"))
        .hint("complete the download; to start from random weights on purpose, use --init_from_config")
}

/// A folder that holds an adapter, and no model.
fn adapter(dir: &Path, names: &[String]) -> Option<Error> {
    let found = names.iter().find(|name| name.starts_with("adapter_model."))?;
    let config = std::fs::read(dir.join("adapter_config.json")).unwrap_or_default();
    let config: serde_json::Value = serde_json::from_slice(&config).unwrap_or_default();
    let base = config.get("base_model_name_or_path").and_then(|base| base.as_str());
    let of = base.map_or(String::new(), |base| format!(" of {base}"));
    Some(
        Error::new(ErrorCode::Weights, format!("{}: {found} is an adapter{of}, not a model", dir.display())).hint(
            "merge it into its base with PEFT (merge_and_unload) and save_pretrained the result, or train the base",
        ),
    )
}

fn other_weights(names: &[String]) -> Option<(&str, &'static str)> {
    OTHER_WEIGHTS.iter().find_map(|(ends, hint)| {
        let is = |name: &&String| ends.iter().any(|end| name.to_ascii_lowercase().ends_with(end));
        // What Hugging Face's Trainer keeps next to a model is none.
        let state = ["optimizer.", "scheduler.", "rng_state", "training_args.", "scaler."];
        let weights = |name: &&String| is(name) && !state.iter().any(|state| name.starts_with(state));
        names.iter().find(weights).map(|name| (name.as_str(), *hint))
    })
}
