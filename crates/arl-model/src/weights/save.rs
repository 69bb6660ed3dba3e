//! Writes a folder that transformers loads: weights, one file or shards, and beside them the source's configuration
//! and tokenizer. One tensor at a time is in memory.

use std::fs::File;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::Dtype;
use serde_json::{Value, json};

use super::writer::{SafetensorsWriter, TensorDecl, refused};
use crate::config::{ModelConfig, WeightDtype};
use crate::tensors::{TensorSpec, tensor_table};
use crate::{Error, ErrorCode, Result};

/// Files that make a model folder complete, copied as they are where the source has them.
const COMPANIONS: &[&str] = &[
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
];
const TEMPLATES: &str = "additional_chat_templates";
/// Elements that are narrowed at a time.
const CHUNK: usize = 1 << 18;

/// Bytes of the weights that [`save_model`] would write, headers aside.
pub fn saved_bytes(config: &ModelConfig, dtype: WeightDtype) -> u128 {
    config.num_parameters() * dtype.bytes() as u128
}

/// Writes the model to `dir`, which exists and is empty: the weights in `dtype`, in files of at most `max_shard_bytes`
/// (a single larger tensor gets a file of its own), and configuration and tokenizer from `source_dir`. `fetch` fills in
/// one tensor at a time, by name. Everything is on the disk when it returns; to make the folder appear at once, write
/// to a temporary folder and rename it. A value that does not fit `dtype` is an error.
pub fn save_model(
    dir: &Path,
    source_dir: &Path,
    config: &ModelConfig,
    dtype: WeightDtype,
    max_shard_bytes: u64,
    mut fetch: impl FnMut(&str, &mut [f32]) -> Result<()>,
) -> Result<()> {
    save_config(dir, source_dir, dtype)?;
    copy_companions(dir, source_dir)?;
    let table = tensor_table(config);
    let shards = cut(&table, dtype, max_shard_bytes);
    let largest = table.iter().map(TensorSpec::elements).max().unwrap_or(0);
    let mut values = Vec::new();
    values.try_reserve_exact(largest).map_err(|_| {
        Error::new(ErrorCode::Oom, format!("no memory for a tensor of {largest} elements while saving"))
    })?;
    values.resize(largest, 0f32);
    for (number, shard) in shards.iter().enumerate() {
        let path = dir.join(shard_name(number, shards.len()));
        let tensors: Vec<TensorDecl> = shard
            .iter()
            .map(|spec| TensorDecl { name: spec.name.clone(), dtype: stored(dtype), shape: spec.shape.clone() })
            .collect();
        let mut writer = SafetensorsWriter::create(&path, &[("format", "pt")], &tensors)?;
        for spec in *shard {
            let values = &mut values[..spec.elements()];
            fetch(&spec.name, values)?;
            append(&mut writer, &spec.name, dtype, values)?;
        }
        writer.finish()?;
    }
    if shards.len() > 1 {
        let mut places: Vec<(String, Value)> = shards
            .iter()
            .enumerate()
            .flat_map(|(number, shard)| {
                let file = shard_name(number, shards.len());
                shard.iter().map(move |spec| (spec.name.clone(), Value::from(file.clone())))
            })
            .collect();
        places.sort_by(|left, right| left.0.cmp(&right.0));
        let total: usize = table.iter().map(|spec| spec.elements() * dtype.bytes()).sum();
        let index = json!({
            "metadata": { "total_size": total },
            "weight_map": Value::Object(places.into_iter().collect()),
        });
        write_file(&dir.join("model.safetensors.index.json"), format!("{index:#}\n").as_bytes())?;
    }
    sync_folder(dir)
}

/// Consecutive parts of the table, each as large as the bound admits.
fn cut(table: &[TensorSpec], dtype: WeightDtype, max_shard_bytes: u64) -> Vec<&[TensorSpec]> {
    let mut shards = Vec::new();
    let (mut begin, mut size) = (0, 0u64);
    for (index, spec) in table.iter().enumerate() {
        let bytes = (spec.elements() * dtype.bytes()) as u64;
        if index > begin && size + bytes > max_shard_bytes {
            shards.push(&table[begin..index]);
            (begin, size) = (index, 0);
        }
        size += bytes;
    }
    shards.push(&table[begin..]);
    shards
}

fn shard_name(number: usize, count: usize) -> String {
    if count == 1 {
        "model.safetensors".to_owned()
    } else {
        format!("model-{:05}-of-{count:05}.safetensors", number + 1)
    }
}

fn stored(dtype: WeightDtype) -> Dtype {
    match dtype {
        WeightDtype::F32 => Dtype::F32,
        WeightDtype::Bf16 => Dtype::BF16,
        WeightDtype::F16 => Dtype::F16,
    }
}

fn append(writer: &mut SafetensorsWriter, name: &str, dtype: WeightDtype, values: &[f32]) -> Result<()> {
    let mut bytes = Vec::with_capacity(CHUNK * dtype.bytes());
    for chunk in values.chunks(CHUNK) {
        bytes.clear();
        let fits = match dtype {
            WeightDtype::F32 => narrow(chunk, &mut bytes, |value| (value.to_le_bytes(), value.is_finite())),
            WeightDtype::Bf16 => narrow(chunk, &mut bytes, |value| {
                let value = bf16::from_f32(value);
                (value.to_le_bytes(), value.is_finite())
            }),
            WeightDtype::F16 => narrow(chunk, &mut bytes, |value| {
                let value = f16::from_f32(value);
                (value.to_le_bytes(), value.is_finite())
            }),
        };
        if !fits {
            return Err(Error::new(
                ErrorCode::NonFinite,
                format!("tensor `{name}` holds a value that is not finite in {}", dtype.as_str()),
            )
            .hint(
                "the run diverged, or the values do not fit this type: lower the learning rate, or save as bfloat16",
            ));
        }
        writer.append(&bytes)?;
    }
    Ok(())
}

/// Appends the values' bytes; whether all are finite in the type of the file.
fn narrow<const N: usize>(values: &[f32], bytes: &mut Vec<u8>, one: impl Fn(f32) -> ([u8; N], bool)) -> bool {
    let mut finite = true;
    for &value in values {
        let (raw, fits) = one(value);
        bytes.extend_from_slice(&raw);
        finite &= fits;
    }
    finite
}

fn save_config(dir: &Path, source_dir: &Path, dtype: WeightDtype) -> Result<()> {
    let source = source_dir.join("config.json");
    let mut text = std::fs::read_to_string(&source).map_err(|error| Error::io(&source, &error))?;
    for key in ["dtype", "torch_dtype"] {
        if let Some((begin, end)) = value_of_key(&text, key)
            && text[begin..end] != *"null"
        {
            text.replace_range(begin..end, &format!("\"{}\"", dtype.as_str()));
        }
    }
    write_file(&dir.join("config.json"), text.as_bytes())
}

/// Where the value of a key of the outermost object begins and ends, in text that is known to be JSON; only for values
/// that are strings, numbers or words. Of several such keys the last one counts, as for every reader of JSON.
fn value_of_key(text: &str, key: &str) -> Option<(usize, usize)> {
    let bytes = text.as_bytes();
    let (mut depth, mut at, mut found) = (0usize, 0, None);
    let string_end = |mut at: usize| {
        while let Some(&byte) = bytes.get(at) {
            match byte {
                b'\\' => at += 2,
                b'"' => return at + 1,
                _ => at += 1,
            }
        }
        at
    };
    while let Some(&byte) = bytes.get(at) {
        match byte {
            b'{' | b'[' => depth += 1,
            b'}' | b']' => depth = depth.saturating_sub(1),
            b'"' => {
                let end = string_end(at + 1);
                let rest = text.get(end..)?.trim_start();
                if depth == 1
                    && text.get(at + 1..end - 1) == Some(key)
                    && let Some(value) = rest.strip_prefix(':')
                {
                    let begin = text.len() - value.trim_start().len();
                    at = match bytes.get(begin)? {
                        b'"' => string_end(begin + 1),
                        _ => begin + text.get(begin..)?.find([',', '}', ' ', '\n', '\r', '\t'])?,
                    };
                    found = Some((begin, at));
                } else {
                    at = end;
                }
                continue;
            }
            _ => {}
        }
        at += 1;
    }
    found
}

fn copy_companions(dir: &Path, source_dir: &Path) -> Result<()> {
    for name in COMPANIONS {
        let source = source_dir.join(name);
        if source.is_file() {
            copy_file(&source, &dir.join(name))?;
        }
    }
    let source = source_dir.join(TEMPLATES);
    if !source.is_dir() {
        return Ok(());
    }
    let target = dir.join(TEMPLATES);
    std::fs::create_dir(&target).map_err(|error| refused(&target, &error))?;
    for entry in std::fs::read_dir(&source).map_err(|error| Error::io(&source, &error))? {
        let entry: PathBuf = entry.map_err(|error| Error::io(&source, &error))?.path();
        if let (true, Some(name)) = (entry.is_file(), entry.file_name()) {
            copy_file(&entry, &target.join(name))?;
        }
    }
    sync_folder(&target)
}

fn copy_file(source: &Path, target: &Path) -> Result<()> {
    let mut from = File::open(source).map_err(|error| Error::io(source, &error))?;
    let mut to = File::create(target).map_err(|error| refused(target, &error))?;
    std::io::copy(&mut from, &mut to).map_err(|error| refused(target, &error))?;
    to.sync_all().map_err(|error| refused(target, &error))
}

fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    use std::io::Write as _;
    let mut file = File::create(path).map_err(|error| refused(path, &error))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(|error| refused(path, &error))
}

/// Waits until the names in a folder are on the disk.
pub fn sync_folder(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|folder| folder.sync_all()).map_err(|error| refused(dir, &error))
}
