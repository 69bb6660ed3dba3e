//! Recognises what a folder or a file is if it is not a model, and says how to get from it to one that can be trained.

use std::path::Path;

use super::names_of;
use crate::weights::{INDEX, SINGLE};
use crate::{Error, ErrorCode};

/// What a file is if it is not its own content.
#[derive(Clone, Copy, Debug)]
pub struct Placeholder {
    what: &'static str,
    hint: &'static str,
}

impl Placeholder {
    /// The error for the file at `path`.
    pub fn error(self, code: ErrorCode, path: &Path) -> Error {
        Error::new(code, format!("{}: {}", path.display(), self.what)).hint(self.hint)
    }
}

/// Whether these bytes are a pointer to a file's content and not the content.
pub fn unreadable(bytes: &[u8]) -> Option<Placeholder> {
    bytes.starts_with(b"version https://git-lfs").then_some(Placeholder {
        what: "a pointer of Git LFS in place of the file",
        hint: "fetch the file itself: git lfs pull",
    })
}

/// Files of weights that cannot be read, by how their names end, with advice.
const OTHER_WEIGHTS: &[(&[&str], &str)] = &[
    (
        &[".gguf"],
        "GGUF is for inference, and mostly quantized: use the safetensors folder of the model that it was converted from",
    ),
    (
        &[".bin", ".pt", ".pth", ".ckpt"],
        "load the model with transformers and write it as safetensors: model.save_pretrained(folder)",
    ),
    (
        &[".h5", ".msgpack", ".onnx"],
        "load the model's PyTorch weights with transformers and write them as safetensors: model.save_pretrained(folder)",
    ),
];

/// The error for a folder without `config.json`.
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
        return error(format!("{} is not a file", path.display()), "a model's config.json is a JSON file");
    }
    error(
        format!("{}: no such file: this is not a model folder in Hugging Face's layout", path.display()),
        "a model folder has config.json, *.safetensors, tokenizer.json and a chat template",
    )
}

/// The error for a folder without weights.
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
                .hint("complete the download: copy the index from the source of the weights");
        }
    }
    if let Some((name, hint)) = other_weights(&names) {
        return error(format!("has neither {SINGLE} nor {INDEX}, only {name}")).hint(hint);
    }
    error(format!("has no weights ({SINGLE} or {INDEX})"))
        .hint("complete the download; to start from random weights on purpose, use --init_from_config")
}

/// The error for a folder that has an adapter and no model.
fn adapter(dir: &Path, names: &[String]) -> Option<Error> {
    let found = names.iter().find(|name| name.starts_with("adapter_model."))?;
    let config = std::fs::read(dir.join("adapter_config.json")).unwrap_or_default();
    let config: serde_json::Value = serde_json::from_slice(&config).unwrap_or_default();
    let base = config.get("base_model_name_or_path").and_then(|base| base.as_str());
    let of = base.map_or(String::new(), |base| format!(" of {base}"));
    Some(
        Error::new(ErrorCode::Weights, format!("{}: {found} is an adapter{of}, not a model", dir.display())).hint(
            "name its base as the model and this folder as the adapter (--adapter, or --adapter_name_or_path to train on), or merge them (`arl merge`; PEFT's merge_and_unload)",
        ),
    )
}

fn other_weights(names: &[String]) -> Option<(&str, &'static str)> {
    OTHER_WEIGHTS.iter().find_map(|(ends, hint)| {
        let is = |name: &&String| ends.iter().any(|end| name.to_ascii_lowercase().ends_with(end));
        // Hugging Face's Trainer saves these next to a model; they are not weights.
        let state = ["optimizer.", "scheduler.", "rng_state", "training_args.", "scaler."];
        let weights = |name: &&String| is(name) && !state.iter().any(|state| name.starts_with(state));
        names.iter().find(weights).map(|name| (name.as_str(), *hint))
    })
}
