//! Writes a folder that transformers loads: weights, one file or shards, and the configuration and tokenizer of the
//! folder that the model came from. One parameter at a time is in memory.

use std::fs::File;
use std::path::Path;

use half::{bf16, f16};
use safetensors::Dtype;
use serde_json::{Value, json};

use super::shards::{INDEX, SINGLE};
use super::writer::{SafetensorsWriter, TensorDecl, refused};
use crate::config::{ModelConfig, WeightDtype};
use crate::folder::{ModelFiles, write_file};
use crate::layout::{Layout, StoredTensor};
use crate::tensors::{TensorSpec, tensor_table};
use crate::{Error, ErrorCode, Result};

/// Elements that are narrowed at a time.
const CHUNK: usize = 1 << 18;

/// Bytes of the weights that [`save_model`] would write, headers aside.
pub fn saved_bytes(config: &ModelConfig, dtype: WeightDtype) -> u128 {
    config.num_parameters() * dtype.bytes() as u128
}

/// Writes the model to `dir`, which exists and is empty: the weights in `dtype`, named and joined as `layout` has them, in
/// files of at most `max_shard_bytes` (a single larger tensor gets a file of its own), and `files`. `fetch` fills in one
/// parameter at a time, by its name in the table. Everything is on the disk when it returns; to make the folder appear at
/// once, write to a temporary folder and rename it. A value that does not fit `dtype` is an error.
pub fn save_model(
    dir: &Path,
    files: &ModelFiles,
    config: &ModelConfig,
    layout: Layout,
    dtype: WeightDtype,
    max_shard_bytes: u64,
    mut fetch: impl FnMut(&str, &mut [f32]) -> Result<()>,
) -> Result<()> {
    files.write(dir, dtype)?;
    let table = tensor_table(config);
    let stored = layout.tensors(&table);
    let shards = cut(&stored, dtype, max_shard_bytes);
    let largest = table.iter().map(TensorSpec::elements).max().unwrap_or(0);
    let mut values = Vec::new();
    values.try_reserve_exact(largest).map_err(|_| {
        Error::new(ErrorCode::Oom, format!("no memory for a tensor of {largest} elements while saving"))
    })?;
    values.resize(largest, 0f32);
    for (number, shard) in shards.iter().enumerate() {
        let path = dir.join(shard_name(number, shards.len()));
        let declare = |tensor: &StoredTensor| TensorDecl {
            name: tensor.name.clone(),
            dtype: file_dtype(dtype),
            shape: tensor.shape.clone(),
        };
        let declared: Vec<TensorDecl> = shard.iter().map(declare).collect();
        let mut writer = SafetensorsWriter::create(&path, &[("format", "pt")], &declared)?;
        for spec in shard.iter().flat_map(|tensor| &table[tensor.parts.clone()]) {
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
                shard.iter().map(move |tensor| (tensor.name.clone(), Value::from(file.clone())))
            })
            .collect();
        places.sort_by(|left, right| left.0.cmp(&right.0));
        let index = json!({
            "metadata": { "total_size": stored.iter().map(|tensor| bytes_of(tensor, dtype)).sum::<u64>() },
            "weight_map": Value::Object(places.into_iter().collect()),
        });
        write_file(&dir.join(INDEX), format!("{index:#}\n").as_bytes())?;
    }
    sync_folder(dir)
}

/// Consecutive parts of the tensors, each as large as the bound admits.
fn cut(stored: &[StoredTensor], dtype: WeightDtype, max_shard_bytes: u64) -> Vec<&[StoredTensor]> {
    let mut shards = Vec::new();
    let (mut begin, mut size) = (0, 0u64);
    for (index, tensor) in stored.iter().enumerate() {
        let bytes = bytes_of(tensor, dtype);
        if index > begin && size + bytes > max_shard_bytes {
            shards.push(&stored[begin..index]);
            (begin, size) = (index, 0);
        }
        size += bytes;
    }
    shards.push(&stored[begin..]);
    shards
}

fn bytes_of(tensor: &StoredTensor, dtype: WeightDtype) -> u64 {
    (tensor.shape.iter().product::<usize>() * dtype.bytes()) as u64
}

fn shard_name(number: usize, count: usize) -> String {
    if count == 1 { SINGLE.to_owned() } else { format!("model-{:05}-of-{count:05}.safetensors", number + 1) }
}

fn file_dtype(dtype: WeightDtype) -> Dtype {
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

/// Waits until the names in a folder are on the disk.
pub fn sync_folder(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|folder| folder.sync_all()).map_err(|error| refused(dir, &error))
}
