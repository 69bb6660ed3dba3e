//! Which templates a checkpoint has, and which of them renders a row: as transformers finds and chooses them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use arl_model::{Error, ErrorCode, Result};

use super::{Moment, Template};
use crate::row::{Json, Record};

const FILE: &str = "chat_template.jinja";
const FOLDER: &str = "additional_chat_templates";
const CONFIG: &str = "tokenizer_config.json";
const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";

/// A checkpoint's templates, or what was made of each.
pub(crate) struct Templates<T = Template> {
    pub(crate) default: T,
    /// For rows with tools, where there is one.
    pub(crate) tool_use: Option<T>,
    /// The text of each, under its name.
    pub(crate) sources: BTreeMap<String, String>,
    /// Where they came from, as a user knows it.
    pub(crate) origin: String,
}

impl Templates {
    /// Finds a checkpoint's templates: `chat_template.jinja` with those in `additional_chat_templates`, else
    /// `tokenizer_config.json`; `replacement` wins over both. Nothing where there is none.
    ///
    /// # Errors
    /// `ARL_TEXT` where one cannot be compiled, or none has the name `default`; `ARL_IO` where a file cannot be read.
    pub(crate) fn find(
        model_dir: &Path,
        replacement: Option<&PathBuf>,
        config: &Json,
        day: Moment,
    ) -> Result<Option<Self>> {
        let (place, sources) = match replacement {
            Some(path) => (path.display().to_string(), BTreeMap::from([(DEFAULT.to_owned(), read(path)?)])),
            None => {
                let files = in_files(model_dir)?;
                let place = if files.is_empty() { CONFIG } else { FILE };
                (place.to_owned(), if files.is_empty() { in_config(config) } else { files })
            }
        };
        if sources.is_empty() {
            return Ok(None);
        }
        let names = sources.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
        let compile = |name: &str| {
            let origin = if sources.len() == 1 { place.clone() } else { format!("{place} ({name})") };
            sources.get(name).map(|source| Template::compile(source.clone(), &origin, config, day)).transpose()
        };
        let Some(default) = compile(DEFAULT)? else {
            return Err(Error::new(
                ErrorCode::Text,
                format!("{}: no chat template is named `{DEFAULT}`; there are {names}", model_dir.display()),
            )
            .hint(format!("name one of them `{DEFAULT}`, or give a template with --chat_template FILE")));
        };
        let tool_use = compile(TOOL_USE)?;
        let origin = if sources.len() == 1 { place } else { format!("{place} ({names})") };
        Ok(Some(Self { default, tool_use, sources, origin }))
    }
}

impl<T> Templates<T> {
    /// `tool_use` for a row with tools, also with an empty list of them: as transformers chooses.
    pub(crate) fn choose(&self, record: &Record) -> &T {
        self.tool_use.as_ref().filter(|_| record.tools.is_some()).unwrap_or(&self.default)
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &T> {
        std::iter::once(&self.default).chain(&self.tool_use)
    }

    pub(crate) fn map<U>(self, mut make: impl FnMut(T) -> U) -> Templates<U> {
        Templates {
            default: make(self.default),
            tool_use: self.tool_use.map(make),
            sources: self.sources,
            origin: self.origin,
        }
    }
}

fn in_files(model_dir: &Path) -> Result<BTreeMap<String, String>> {
    let mut sources = BTreeMap::new();
    let file = model_dir.join(FILE);
    if file.exists() {
        sources.insert(DEFAULT.to_owned(), read(&file)?);
    }
    let folder = model_dir.join(FOLDER);
    let entries = match std::fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(sources),
        Err(error) => return Err(Error::io(&folder, &error)),
    };
    for entry in entries {
        let path = entry.map_err(|error| Error::io(&folder, &error))?.path();
        if path.extension().is_some_and(|extension| extension == "jinja")
            && let Some(name) = path.file_stem().and_then(|name| name.to_str())
        {
            sources.insert(name.to_owned(), read(&path)?);
        }
    }
    Ok(sources)
}

fn in_config(config: &Json) -> BTreeMap<String, String> {
    let named = |entry: &Json| {
        let text = |key: &str| entry.get(key).and_then(Json::as_str).map(str::to_owned);
        Some((text("name")?, text("template")?))
    };
    match config.get("chat_template") {
        Some(Json::Str(source)) => BTreeMap::from([(DEFAULT.to_owned(), source.clone())]),
        Some(Json::Array(entries)) => entries.iter().filter_map(named).collect(),
        _ => BTreeMap::new(),
    }
}

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).map_err(|error| Error::io(path, &error))
}
