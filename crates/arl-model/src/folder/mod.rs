//! The small files of a model folder: configuration, tokenizer, templates. They are read once, when the folder is opened,
//! and every save writes them from memory, so the folder may be removed.

mod export;
mod found;
mod text;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};

pub use export::ExportOverrides;
pub(crate) use found::no_weights;
pub use found::{Placeholder, unreadable};
use text::ObjectText;

use crate::config::{ModelConfig, WeightDtype};
use crate::weights::{refused, sync_folder};
use crate::{Error, ErrorCode, Result};

const CONFIG: &str = "config.json";
/// What a model that sees nests in [`CONFIG`].
const TEXT_CONFIG: &str = "text_config";
const VISION_CONFIG: &str = "vision_config";
const GENERATION: &str = "generation_config.json";
const TOKENIZER: &str = "tokenizer_config.json";
const TEMPLATE: &str = "chat_template.jinja";
/// An older file of a processor's template.
const OLD_TEMPLATE: &str = "chat_template.json";
const NAMED_TEMPLATES: &str = "additional_chat_templates";

/// Files that loaders of a model or a tokenizer read: what any version of transformers' `save_pretrained` writes for
/// them, and for a processor.
const COMPANIONS: &[&str] = &[
    GENERATION,
    "tokenizer.json",
    TOKENIZER,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    TEMPLATE,
    OLD_TEMPLATE,
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
];

/// The small files of a model folder, in memory.
#[derive(Clone, Debug)]
pub struct ModelFiles {
    dir: PathBuf,
    /// By their path in the folder, such as `additional_chat_templates/tool_use.jinja`.
    files: BTreeMap<String, Vec<u8>>,
}

impl ModelFiles {
    /// Reads `dir/config.json`, which must exist, and all other files that a loader of the model may read.
    pub fn read(dir: &Path) -> Result<Self> {
        let mut files = BTreeMap::from([(CONFIG.to_owned(), read_config(dir)?.into_bytes())]);
        for &name in COMPANIONS {
            let path = dir.join(name);
            if path.is_file() {
                files.insert(name.to_owned(), read(&path)?);
            }
        }
        for name in names_of(&dir.join(NAMED_TEMPLATES)) {
            files.insert(format!("{NAMED_TEMPLATES}/{name}"), read(&dir.join(NAMED_TEMPLATES).join(&name))?);
        }
        let mut found = Self { dir: dir.to_path_buf(), files };
        // Code of the model's author, which loaders run if the user allows it.
        if [CONFIG, TOKENIZER]
            .iter()
            .any(|name| found.object(name).is_some_and(|object| object.get("auto_map").is_some()))
        {
            for name in names_of(dir).into_iter().filter(|name| name.ends_with(".py")) {
                let bytes = read(&dir.join(&name))?;
                found.files.insert(name, bytes);
            }
        }
        Ok(found)
    }

    /// The configuration in `config.json`.
    pub fn config(&self) -> Result<ModelConfig> {
        let bytes = self.files.get(CONFIG).map(Vec::as_slice).unwrap_or_default();
        ModelConfig::from_json(&String::from_utf8_lossy(bytes), &self.dir.join(CONFIG))
    }

    /// Writes all files to `dir`, which exists, and waits until they are on the disk. `config.json` gets `dtype` as the
    /// type of the weights; `tower`: of those of its vision tower as well, which is not carried.
    pub(crate) fn write(&self, dir: &Path, dtype: WeightDtype, tower: bool) -> Result<()> {
        for (name, bytes) in &self.files {
            let path = dir.join(name);
            if let Some(folder) = path.parent().filter(|folder| *folder != dir && !folder.exists()) {
                std::fs::create_dir(folder).map_err(|error| refused(folder, &error))?;
            }
            match self.object(name).filter(|_| name == CONFIG) {
                Some(config) => {
                    let parts: &[&str] = if tower { &[TEXT_CONFIG, VISION_CONFIG] } else { &[TEXT_CONFIG] };
                    write_file(&path, with_dtype(config, dtype, parts).as_bytes())?;
                }
                None => write_file(&path, bytes)?,
            }
        }
        let folder = dir.join(NAMED_TEMPLATES);
        if folder.exists() { sync_folder(&folder) } else { Ok(()) }
    }

    /// Writes the files of tokenizer and templates alone, as they are next to an adapter.
    pub(crate) fn write_tokenizer(&self, dir: &Path) -> Result<()> {
        let of_model = |name: &str| name == CONFIG || name == GENERATION || name.ends_with(".py");
        let mut files = self.files.iter().filter(|(name, _)| !of_model(name) && !name.contains('/'));
        files.try_for_each(|(name, bytes)| write_file(&dir.join(name), bytes))
    }

    /// Has `config.json` say that the head has weights of its own.
    pub(crate) fn untie(&mut self) -> Result<()> {
        let Some(mut config) = self.object(CONFIG) else {
            return Err(Error::new(ErrorCode::Internal, "config.json is no JSON object"));
        };
        config.set("tie_word_embeddings", "false");
        if let Some(mut text) = config.object(TEXT_CONFIG).filter(|text| text.get("tie_word_embeddings").is_some()) {
            text.set("tie_word_embeddings", "false");
            config.set(TEXT_CONFIG, &text.into_text());
        }
        self.files.insert(CONFIG.to_owned(), config.into_text().into_bytes());
        Ok(())
    }

    /// Has `config.json` say nothing of quantized weights.
    pub(crate) fn unquantize(&mut self) {
        if let Some(mut config) = self.object(CONFIG)
            && config.remove("quantization_config")
        {
            self.files.insert(CONFIG.to_owned(), config.into_text().into_bytes());
        }
    }

    /// A file, if it is a JSON object.
    fn object(&self, name: &str) -> Option<ObjectText> {
        ObjectText::new(String::from_utf8(self.files.get(name)?.clone()).ok()?)
    }
}

/// With `dtype` wherever there is a type, also in the configurations of these parts.
fn with_dtype(mut config: ObjectText, dtype: WeightDtype, parts: &[&str]) -> String {
    for key in ["dtype", "torch_dtype"] {
        if config.get_non_null(key).is_some() {
            config.set(key, &format!("\"{}\"", dtype.as_str()));
        }
    }
    for part in parts {
        if let Some(inner) = config.object(part) {
            config.set(part, &with_dtype(inner, dtype, parts));
        }
    }
    config.into_text()
}

/// The text of `dir/config.json`.
pub(crate) fn read_config(dir: &Path) -> Result<String> {
    let path = dir.join(CONFIG);
    if !dir.is_dir() {
        return Err(Error::new(ErrorCode::Config, format!("{} is not a folder", dir.display()))
            .hint("a model folder holds config.json, tokenizer files and safetensors weights"));
    }
    if !path.is_file() {
        return Err(found::no_config(dir, &path));
    }
    let bytes = read(&path)?;
    if let Some(what) = unreadable(&bytes) {
        return Err(what.error(ErrorCode::Config, &path));
    }
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        Error::new(ErrorCode::Config, format!("{}: not UTF-8 at byte {at}", path.display()))
    })
}

/// Names of the files in a folder, in order; empty if there is no folder.
fn names_of(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter(|entry| entry.path().is_file())
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|error| Error::io(path, &error))
}

pub(crate) fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = File::create(path).map_err(|error| refused(path, &error))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(|error| refused(path, &error))
}
