//! A checkpoint's weights: finds the files, and proves that their tensors are those of the model before anything is read.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Write as _;
use std::path::{Component, Path, PathBuf};

use half::bf16;
use safetensors::Dtype;
use serde_json::Value;

use super::file::{SafetensorsFile, damaged};
use crate::config::{ModelConfig, WeightDtype};
use crate::tensors::{TensorSpec, tensor_table};
use crate::{Error, ErrorCode, Result};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// The weights of a model: mapped files whose tensors are just those of the configuration.
#[derive(Debug)]
pub struct Checkpoint {
    files: Vec<SafetensorsFile>,
    /// Which file has a tensor.
    home: HashMap<String, usize>,
    dtype: WeightDtype,
}

impl Checkpoint {
    /// Opens `dir/model.safetensors`, or the shards of `dir/model.safetensors.index.json`, and compares names, shapes
    /// and types with the table of tensors. Values are looked at when they are read.
    pub fn open(dir: &Path, config: &ModelConfig) -> Result<Self> {
        let single = dir.join(SINGLE);
        let index = dir.join(INDEX);
        let (files, home) = if single.exists() {
            let file = SafetensorsFile::open(&single)?;
            let home = file.names().into_iter().map(|name| (name, 0)).collect();
            (vec![file], home)
        } else if index.exists() {
            open_shards(dir, &index)?
        } else {
            return Err(no_weights(dir));
        };
        let mut checkpoint = Self { files, home, dtype: WeightDtype::F32 };
        let table = tensor_table(config);
        checkpoint.check(dir, config, &table)?;
        checkpoint.dtype = checkpoint.common_dtype(&table);
        Ok(checkpoint)
    }

    /// The type in which most of the weights are stored.
    pub fn dtype(&self) -> WeightDtype {
        self.dtype
    }

    /// The files that hold the weights.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(SafetensorsFile::path)
    }

    /// Reads a tensor as f32. A value that is not finite is an error that names tensor and place.
    pub fn read_f32(&self, name: &str, out: &mut [f32]) -> Result<()> {
        self.file_of(name)?.read_f32(name, out)
    }

    /// [`Checkpoint::read_f32`] of a part: `out.len()` elements from `start` on, counted row-major.
    pub fn read_f32_part(&self, name: &str, start: usize, out: &mut [f32]) -> Result<()> {
        self.file_of(name)?.read_f32_part(name, start, out)
    }

    /// Reads a tensor as bf16, rounding to nearest even. A value that is not finite is an error that names tensor and
    /// place.
    pub fn read_bf16(&self, name: &str, out: &mut [bf16]) -> Result<()> {
        self.file_of(name)?.read_bf16(name, out)
    }

    fn file_of(&self, name: &str) -> Result<&SafetensorsFile> {
        match self.home.get(name).and_then(|&file| self.files.get(file)) {
            Some(file) => Ok(file),
            None => Err(Error::new(ErrorCode::Internal, format!("the checkpoint has no tensor `{name}`"))),
        }
    }

    fn info(&self, name: &str) -> Option<(Dtype, &[usize])> {
        self.files.get(*self.home.get(name)?)?.info(name)
    }

    fn check(&self, dir: &Path, config: &ModelConfig, table: &[TensorSpec]) -> Result<()> {
        let mut missing = Vec::new();
        let mut misshapen = Vec::new();
        let mut mistyped = Vec::new();
        for spec in table {
            match self.info(&spec.name) {
                None => missing.push(spec.name.clone()),
                Some((dtype, shape)) => {
                    if shape != spec.shape.as_slice() {
                        misshapen.push(format!("{} is {shape:?}, not {:?}", spec.name, spec.shape));
                    }
                    if weight_dtype(dtype).is_none() {
                        mistyped.push(format!("{} is {dtype:?}", spec.name));
                    }
                }
            }
        }
        let expected: std::collections::HashSet<&str> = table.iter().map(|spec| spec.name.as_str()).collect();
        let mut surplus: Vec<String> =
            self.home.keys().filter(|name| !expected.contains(name.as_str()) && !is_derived(name)).cloned().collect();
        let tied_head = config.tie_word_embeddings && surplus.iter().any(|name| name == HEAD);
        if tied_head {
            surplus.retain(|name| name != HEAD);
        }
        surplus.sort();
        let mut message = String::new();
        list(&mut message, "missing", &missing);
        list(&mut message, "surplus", &surplus);
        list(&mut message, "of the wrong shape", &misshapen);
        list(&mut message, "of a type other than F32, BF16 or F16", &mistyped);
        if !message.is_empty() {
            let hint = "the weights belong to another model than config.json, or are incomplete";
            return Err(Error::new(
                ErrorCode::Weights,
                format!("{}: the tensors are not those of config.json: {message}", dir.display()),
            )
            .hint(hint));
        }
        if tied_head { self.check_tied_head() } else { Ok(()) }
    }

    /// A tied model may store its head all the same; it must then be the embedding.
    fn check_tied_head(&self) -> Result<()> {
        let (head_file, embedding_file) = (self.file_of(HEAD)?, self.file_of(EMBEDDING)?);
        let same = self.info(HEAD) == self.info(EMBEDDING) && head_file.bytes_equal(HEAD, embedding_file, EMBEDDING)?;
        if same {
            return Ok(());
        }
        Err(Error::new(
            ErrorCode::Weights,
            format!(
                "{}: `{HEAD}` differs from `{EMBEDDING}`, but `tie_word_embeddings` says that they are one",
                head_file.path().display()
            ),
        )
        .hint("set `tie_word_embeddings` to false in config.json to train both, or remove `lm_head.weight`"))
    }

    fn common_dtype(&self, table: &[TensorSpec]) -> WeightDtype {
        let mut elements = [(WeightDtype::F32, 0), (WeightDtype::Bf16, 0), (WeightDtype::F16, 0)];
        for spec in table {
            let stored = self.info(&spec.name).and_then(|(dtype, _)| weight_dtype(dtype));
            for (dtype, count) in &mut elements {
                if Some(*dtype) == stored {
                    *count += spec.elements();
                }
            }
        }
        elements.iter().max_by_key(|&&(_, count)| count).map_or(WeightDtype::F32, |&(dtype, _)| dtype)
    }
}

fn weight_dtype(dtype: Dtype) -> Option<WeightDtype> {
    match dtype {
        Dtype::F32 => Some(WeightDtype::F32),
        Dtype::BF16 => Some(WeightDtype::Bf16),
        Dtype::F16 => Some(WeightDtype::F16),
        _ => None,
    }
}

/// Old files also store what follows from the configuration; transformers passes over it too.
fn is_derived(name: &str) -> bool {
    name.ends_with(".rotary_emb.inv_freq")
}

/// Adds `what (count): the first five names` to a message.
fn list(message: &mut String, what: &str, names: &[String]) {
    const SHOWN: usize = 5;
    if names.is_empty() {
        return;
    }
    if !message.is_empty() {
        message.push_str("; ");
    }
    let first = names.iter().take(SHOWN).map(String::as_str).collect::<Vec<_>>().join(", ");
    let more = if names.len() > SHOWN { ", ..." } else { "" };
    // Writing to a string cannot fail.
    let _ = write!(message, "{what} ({}): {first}{more}", names.len());
}

fn open_shards(dir: &Path, index: &Path) -> Result<(Vec<SafetensorsFile>, HashMap<String, usize>)> {
    let text = std::fs::read_to_string(index).map_err(|error| match error.kind() {
        std::io::ErrorKind::InvalidData => damaged(index, "is not UTF-8"),
        _ => Error::io(index, &error),
    })?;
    let value: Value = serde_json::from_str(&text).map_err(|error| damaged(index, &format!("is not JSON: {error}")))?;
    let Some(Value::Object(map)) = value.get("weight_map") else {
        return Err(damaged(index, "has no object `weight_map`"));
    };
    let mut shards: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for (tensor, shard) in map {
        let Some(shard) = shard.as_str().filter(|shard| is_file_name(shard)) else {
            return Err(damaged(index, &format!("`{tensor}` is said to lie in {shard}, which is no file name")));
        };
        shards.entry(shard).or_default().insert(tensor);
    }
    let absent: Vec<String> =
        shards.keys().filter(|shard| !dir.join(shard).exists()).map(|shard| (*shard).to_owned()).collect();
    if !absent.is_empty() {
        let mut message = String::new();
        list(&mut message, "files that it names are missing", &absent);
        return Err(damaged(index, &message));
    }
    let mut files = Vec::new();
    let mut home = HashMap::new();
    for (shard, tensors) in shards {
        let path: PathBuf = dir.join(shard);
        let file = SafetensorsFile::open(&path)?;
        let names = file.names();
        let unlisted: Vec<String> = names.iter().filter(|name| !tensors.contains(name.as_str())).cloned().collect();
        let absent: Vec<String> =
            tensors.iter().filter(|name| file.info(name).is_none()).map(|name| (*name).to_owned()).collect();
        let mut message = String::new();
        list(&mut message, "tensors that the index places there are missing", &absent);
        list(&mut message, "tensors that the index does not place there", &unlisted);
        if !message.is_empty() {
            return Err(damaged(&path, &format!("does not agree with {INDEX}: {message}")));
        }
        home.extend(names.into_iter().map(|name| (name, files.len())));
        files.push(file);
    }
    Ok((files, home))
}

/// A plain name, which cannot lead out of the folder.
fn is_file_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(part)), None) if part == name)
}

fn no_weights(dir: &Path) -> Error {
    let other = std::fs::read_dir(dir).ok().and_then(|entries| {
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        let mut names: Vec<String> = names
            .filter(|name| {
                let name = name.to_ascii_lowercase();
                [".bin", ".pt", ".pth", ".safetensors", ".gguf", ".ckpt", ".h5"].iter().any(|end| name.ends_with(end))
            })
            .collect();
        names.sort();
        names.into_iter().next()
    });
    match other {
        Some(name) => Error::new(
            ErrorCode::Weights,
            format!("{}: has neither {SINGLE} nor {INDEX}, only such as {name}", dir.display()),
        )
        .hint("save the model as safetensors with transformers (save_pretrained), or complete the download"),
        None => Error::new(ErrorCode::Weights, format!("{}: has no weights ({SINGLE} or {INDEX})", dir.display()))
            .hint("to start from random weights on purpose, use --init_from_config"),
    }
}
