//! Writes a folder that transformers loads: weights, one file or shards, and the configuration and tokenizer of the
//! folder that the model came from. Memory holds one parameter, or the few that interleave in a stored tensor.

use std::fs::File;
use std::path::Path;

use half::{bf16, f16};
use safetensors::Dtype;
use serde_json::{Map, Value, json};

use super::file::TensorView;
use super::shards::{INDEX, SINGLE};
use super::writer::{SafetensorsWriter, TensorDecl, refused};
use crate::config::{ModelConfig, WeightDtype};
use crate::folder::{ModelFiles, write_file};
use crate::format::{CheckpointFormat, Part, StoredTensor};
use crate::tensors::{TensorSpec, tensor_table};
use crate::{Error, ErrorCode, Result};

/// Elements that are narrowed at a time.
pub(super) const CHUNK: usize = 1 << 18;
/// Bytes of one file of a saved model, as transformers has it.
pub const MAX_SHARD_BYTES: u64 = 50_000_000_000;

/// Writes the model to `dir`, which exists and is empty: `files`, and the weights in `format`, in files of at most
/// `max_shard_bytes` (a single larger tensor gets a file of its own). Tensors have the types of `format`, or `dtype`
/// where it is given; those that are carried keep their bytes. `fetch` fills in one parameter at a time, by its name in
/// the table. Everything is on the disk when it returns; to make the folder appear at once, write to a temporary folder
/// and rename it. A value that is not finite in its type is an error.
pub fn save_model(
    dir: &Path,
    files: &ModelFiles,
    config: &ModelConfig,
    format: &CheckpointFormat,
    dtype: Option<WeightDtype>,
    max_shard_bytes: u64,
    mut fetch: impl FnMut(&str, &mut [f32]) -> Result<()>,
) -> Result<()> {
    files.write(dir, dtype.unwrap_or(format.dtype), config.vision.is_some())?;
    let table = tensor_table(config);
    let stored = format.tensors(config, &table);
    let saved = saved_tensors(format, dtype, &stored)?;
    let shards = cut(&saved, max_shard_bytes);
    let mut buffers = Buffers::default();
    for (number, shard) in shards.iter().enumerate() {
        let path = dir.join(shard_name(number, shards.len()));
        let declared: Vec<TensorDecl> = shard.iter().map(|tensor| tensor.decl.clone()).collect();
        let mut writer = SafetensorsWriter::create(&path, &[("format", "pt")], &declared)?;
        for Saved { decl, content } in *shard {
            match content {
                Content::Carried(view) => view.windows().try_for_each(|bytes| writer.append(bytes))?,
                Content::Parameters(tensor) => {
                    for group in tensor.groups() {
                        let values = buffers.fetch(&table, group, &mut fetch)?;
                        let name = if let [part] = group { &table[part.parameter].name } else { &decl.name };
                        append(&mut writer, name, decl.dtype, values)?;
                    }
                }
            }
        }
        writer.finish()?;
    }
    if shards.len() > 1 {
        write_file(&dir.join(INDEX), index(&shards).as_bytes())?;
    }
    sync_folder(dir)
}

/// A tensor of the saved files.
pub(super) struct Saved<'a> {
    pub(super) decl: TensorDecl,
    pub(super) content: Content<'a>,
}

pub(super) enum Content<'a> {
    Parameters(&'a StoredTensor),
    Carried(TensorView<'a>),
}

impl Saved<'_> {
    /// The writer refuses a size that cannot be.
    fn bytes(&self) -> u64 {
        self.decl.bytes().unwrap_or_default() as u64
    }
}

/// The parameters, then what is carried.
pub(super) fn saved_tensors<'a>(
    format: &'a CheckpointFormat,
    dtype: Option<WeightDtype>,
    stored: &'a [StoredTensor],
) -> Result<Vec<Saved<'a>>> {
    let parameter = |tensor: &'a StoredTensor| {
        let dtype = dtype.or(format.other_dtypes.get(&tensor.name).copied()).unwrap_or(format.dtype);
        let decl = TensorDecl { name: tensor.name.clone(), dtype: dtype.in_file(), shape: tensor.shape.clone() };
        Saved { decl, content: Content::Parameters(tensor) }
    };
    let mut saved: Vec<Saved<'_>> = stored.iter().map(parameter).collect();
    for carried in &format.carried {
        let view = carried.file.view(&carried.name)?;
        let decl = TensorDecl { name: carried.name.clone(), dtype: view.dtype, shape: view.shape.to_vec() };
        saved.push(Saved { decl, content: Content::Carried(view) });
    }
    Ok(saved)
}

/// Consecutive tensors, each time as many as the bound admits.
pub(super) fn cut<'a>(saved: &'a [Saved<'a>], max_shard_bytes: u64) -> Vec<&'a [Saved<'a>]> {
    let mut shards = Vec::new();
    let (mut begin, mut size) = (0, 0u64);
    for (index, tensor) in saved.iter().enumerate() {
        let bytes = tensor.bytes();
        if index > begin && size + bytes > max_shard_bytes {
            shards.push(&saved[begin..index]);
            (begin, size) = (index, 0);
        }
        size += bytes;
    }
    shards.push(&saved[begin..]);
    shards
}

/// The text of the index: which file has a tensor, by name.
pub(super) fn index(shards: &[&[Saved<'_>]]) -> String {
    let file_of = |(number, tensor): (usize, &Saved<'_>)| {
        (tensor.decl.name.clone(), Value::from(shard_name(number, shards.len())))
    };
    let tensors = || shards.iter().enumerate().flat_map(|(number, shard)| shard.iter().map(move |t| (number, t)));
    let mut places: Vec<(String, Value)> = tensors().map(file_of).collect();
    places.sort_by(|left, right| left.0.cmp(&right.0));
    let index = json!({
        "metadata": { "total_size": tensors().map(|(_, tensor)| tensor.bytes()).sum::<u64>() },
        "weight_map": places.into_iter().collect::<Map<String, Value>>(),
    });
    format!("{index:#}\n")
}

pub(super) fn shard_name(number: usize, count: usize) -> String {
    if count == 1 { SINGLE.to_owned() } else { format!("model-{:05}-of-{count:05}.safetensors", number + 1) }
}

/// Memory that is used again from tensor to tensor.
#[derive(Default)]
struct Buffers {
    parameter: Vec<f32>,
    interleaved: Vec<f32>,
}

impl Buffers {
    /// The elements of a group, in the order of the file.
    fn fetch(
        &mut self,
        table: &[TensorSpec],
        group: &[Part],
        fetch: &mut impl FnMut(&str, &mut [f32]) -> Result<()>,
    ) -> Result<&[f32]> {
        let (begin, end) = group
            .iter()
            .map(Part::extent)
            .fold((usize::MAX, 0), |(begin, end), extent| (begin.min(extent.start), end.max(extent.end)));
        let as_in_memory = group.len() == 1 && group[0].is_contiguous();
        for part in group {
            let spec = &table[part.parameter];
            let values = room(&mut self.parameter, spec.elements())?;
            fetch(&spec.name, values)?;
            if as_in_memory {
                break;
            }
            let interleaved = room(&mut self.interleaved, end - begin)?;
            for (place, &mut value) in part.places().zip(values) {
                interleaved[place - begin] = value;
            }
        }
        let filled = if as_in_memory { &self.parameter } else { &self.interleaved };
        Ok(&filled[..end - begin])
    }
}

/// The first `len` elements of a buffer, which grows if need be.
fn room(buffer: &mut Vec<f32>, len: usize) -> Result<&mut [f32]> {
    if buffer.len() < len {
        buffer.clear();
        buffer.try_reserve_exact(len).map_err(|_| {
            Error::new(ErrorCode::Oom, format!("no memory for a tensor of {len} elements while saving"))
        })?;
        buffer.resize(len, 0.0);
    }
    Ok(&mut buffer[..len])
}

fn append(writer: &mut SafetensorsWriter, name: &str, dtype: Dtype, values: &[f32]) -> Result<()> {
    let mut bytes = Vec::with_capacity(CHUNK.min(values.len()) * 4);
    for chunk in values.chunks(CHUNK) {
        bytes.clear();
        encode(name, dtype, chunk, &mut bytes)?;
        writer.append(&bytes)?;
    }
    Ok(())
}

/// Appends the bytes of values in the type of the file.
pub(super) fn encode(name: &str, dtype: Dtype, values: &[f32], bytes: &mut Vec<u8>) -> Result<()> {
    let fits = match dtype {
        Dtype::F32 => narrow(values, bytes, |value| (value.to_le_bytes(), value.is_finite())),
        Dtype::BF16 => narrow(values, bytes, |value| {
            let value = bf16::from_f32(value);
            (value.to_le_bytes(), value.is_finite())
        }),
        _ => narrow(values, bytes, |value| {
            let value = f16::from_f32(value);
            (value.to_le_bytes(), value.is_finite())
        }),
    };
    if fits {
        return Ok(());
    }
    Err(Error::new(ErrorCode::NonFinite, format!("tensor `{name}` has a value that is not finite in {dtype}"))
        .hint("the run diverged, or the values do not fit this type: lower the learning rate, or save as bfloat16"))
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

/// Waits until the names in a folder are on the disk. Windows has no such call: NTFS keeps names in its own journal.
pub fn sync_folder(dir: &Path) -> Result<()> {
    if cfg!(windows) {
        return Ok(());
    }
    File::open(dir).and_then(|folder| folder.sync_all()).map_err(|error| refused(dir, &error))
}
