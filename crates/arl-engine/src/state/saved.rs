//! The files of a saved state, as tensors by name: one file of whole tensors, or one of each rank with its pieces of them.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use arl_model::{Dtype, ErrorCode, Result, SafetensorsFile};
use serde_json::{Map, Value};

use super::ranges::{Copied, Held, intersect};
use super::{ANOTHER, Entry, FORMAT, FORMAT_1, FORMAT_2, FORMAT_PIECES, STATE_FILE, damaged, file_dtype};

/// A tensor of a state.
struct Tensor {
    dtype: Dtype,
    /// Of the whole.
    shape: Vec<usize>,
    /// Which file has which elements.
    held: Vec<Held>,
}

/// A state on disk.
pub(super) struct Saved {
    /// What errors name: the file, or that of rank 0.
    pub(super) path: PathBuf,
    files: Vec<SafetensorsFile>,
    tensors: HashMap<String, Tensor>,
}

/// The file of a rank.
pub(super) fn file_of(rank: usize, ranks: usize) -> String {
    format!("state-{:05}-of-{ranks:05}.safetensors", rank + 1)
}

/// Whatever is wrong with a file, a state is damaged, not the weights of a model.
fn open(path: &Path) -> Result<SafetensorsFile> {
    SafetensorsFile::open(path).map_err(|e| if e.code == ErrorCode::Io { e } else { damaged(path, &e.message) })
}

/// Of how many ranks the folder has files; none: it has one file.
fn ranks_of(dir: &Path) -> Option<usize> {
    let entries = std::fs::read_dir(dir).ok()?;
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names
        .filter_map(|name| {
            name.strip_prefix("state-")?.strip_suffix(".safetensors")?.split_once("-of-")?.1.parse().ok()
        })
        .max()
}

impl Saved {
    /// Opens the state in a folder, whole or in pieces.
    pub(super) fn open(dir: &Path) -> Result<Self> {
        match ranks_of(dir) {
            None => Self::open_whole(dir.join(STATE_FILE)),
            Some(ranks) => Self::open_pieces(dir, ranks),
        }
    }

    fn open_whole(path: PathBuf) -> Result<Self> {
        let file = open(&path)?;
        if !matches!(file.metadata("format"), Some(FORMAT | FORMAT_2 | FORMAT_1)) {
            return Err(damaged(&path, "this version does not read its format"));
        }
        let tensor = |name: String| {
            let (dtype, shape) = file.info(&name)?;
            let held = vec![Held { place: 0, start: 0, len: shape.iter().product() }];
            Some((name, Tensor { dtype, shape: shape.to_vec(), held }))
        };
        let tensors = file.names().into_iter().filter_map(tensor).collect();
        Ok(Saved { path, files: vec![file], tensors })
    }

    fn open_pieces(dir: &Path, ranks: usize) -> Result<Self> {
        let path = dir.join(file_of(0, ranks));
        let mut saved = Saved { path, files: Vec::with_capacity(ranks), tensors: HashMap::new() };
        for rank in 0..ranks {
            let path = dir.join(file_of(rank, ranks));
            let file = open(&path)?;
            if file.metadata("format") != Some(FORMAT_PIECES) {
                return Err(damaged(&path, "this version does not read its format"));
            }
            if file.metadata("steps") != saved.files.first().unwrap_or(&file).metadata("steps") {
                return Err(damaged(&path, "it is of another step than that of rank 0"));
            }
            let pieces: Map<String, Value> =
                file.metadata("pieces").and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
            for name in file.names() {
                let parameter = name.split_once('/').map_or(name.as_str(), |(_, parameter)| parameter);
                let Some((dtype, [len])) = file.info(&name) else {
                    return Err(damaged(&path, &format!("its `{name}` is no list of elements")));
                };
                let Some((start, shape)) = pieces.get(parameter).and_then(piece) else {
                    return Err(damaged(&path, &format!("it does not say which part of `{parameter}` it has")));
                };
                let held = Held { place: rank, start, len: *len };
                let tensor = saved.tensors.entry(name.clone()).or_insert_with(|| Tensor {
                    dtype,
                    shape: shape.clone(),
                    held: vec![],
                });
                if (tensor.dtype, &tensor.shape) != (dtype, &shape) {
                    return Err(damaged(&path, &format!("its `{name}` is another tensor than that of rank 0")));
                }
                tensor.held.push(held);
            }
            saved.files.push(file);
        }
        Ok(saved)
    }

    /// A free entry of the first file.
    pub(super) fn metadata(&self, key: &str) -> Option<&str> {
        self.files.first()?.metadata(key)
    }

    /// The state has these tensors, with these shapes, types, and all elements that are wanted, and no others.
    pub(super) fn check_fits(&self, entries: &[Entry]) -> std::result::Result<(), String> {
        for Entry { name, shape, dtype, wanted, .. } in entries {
            let Some(tensor) = self.tensors.get(name) else { return Err(format!("{ANOTHER}: it has no `{name}`")) };
            if (tensor.dtype, &tensor.shape) != (file_dtype(*dtype), shape) {
                let Tensor { dtype: found, shape: other, .. } = tensor;
                return Err(format!(
                    "{ANOTHER}: its `{name}` is {found:?} {other:?}, and the run's {dtype:?} {shape:?}"
                ));
            }
            for part in wanted {
                intersect(part.start..part.start + part.buffer.len, &tensor.held).map_err(|gap| {
                    format!("none of its files has elements {} to {} of `{name}`", gap.start, gap.end)
                })?;
            }
        }
        let names: HashSet<&str> = entries.iter().map(|entry| entry.name.as_str()).collect();
        match self.tensors.keys().filter(|name| !names.contains(name.as_str())).min() {
            Some(name) => Err(format!("{ANOTHER}: the run has no `{name}`")),
            None => Ok(()),
        }
    }

    /// The bytes of `len` elements of a tensor from `start` on, part by part: each with the first element that it is.
    pub(super) fn read(&self, name: &str, start: usize, len: usize) -> Result<Vec<(usize, &[u8])>> {
        let missing = || damaged(&self.path, &format!("`{name}` is incomplete"));
        let tensor = self.tensors.get(name).ok_or_else(missing)?;
        let width = tensor.dtype.bitsize() / 8;
        let copies = intersect(start..start + len, &tensor.held).map_err(|_| missing())?;
        let bytes = |Copied { place, from, to, len }: Copied| -> Result<(usize, &[u8])> {
            let all = self.files[place].bytes(name)?;
            Ok((start + to, all.get(from * width..(from + len) * width).ok_or_else(missing)?))
        };
        copies.into_iter().map(bytes).collect()
    }
}

/// Where a piece begins in its parameter, and the parameter's shape.
fn piece(value: &Value) -> Option<(usize, Vec<usize>)> {
    let number = |value: &Value| usize::try_from(value.as_u64()?).ok();
    Some((number(value.get("start")?)?, value.get("of")?.as_array()?.iter().map(number).collect::<Option<_>>()?))
}
