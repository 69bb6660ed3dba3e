//! The files of a saved state, as tensors by name: one file of whole tensors, or one of each rank with its pieces of them, or of
//! slices of them.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use arl_model::{Dtype, ErrorCode, Result, SafetensorsFile, Slice};
use serde_json::{Map, Value};

use super::ranges::{Copied, Cover, Held};
use super::{
    ANOTHER, Entry, FORMAT, FORMAT_1, FORMAT_2, FORMAT_PIECES, FORMAT_SLICES, STATE_FILE, damaged, file_dtype,
};
use crate::placement;

/// A tensor of a state.
struct Tensor {
    dtype: Dtype,
    /// Of the whole.
    shape: Vec<usize>,
    /// Its name in the files.
    stored: String,
    /// Which file has which elements.
    held: Cover,
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
            let held = Cover::new(vec![Held { place: 0, start: 0, len: shape.iter().product(), from: 0 }]);
            Some((name.clone(), Tensor { dtype, shape: shape.to_vec(), stored: name, held }))
        };
        let tensors = file.names().into_iter().filter_map(tensor).collect();
        Ok(Saved { path, files: vec![file], tensors })
    }

    fn open_pieces(dir: &Path, ranks: usize) -> Result<Self> {
        let path = dir.join(file_of(0, ranks));
        let mut saved = Saved { path, files: Vec::with_capacity(ranks), tensors: HashMap::new() };
        let mut held: HashMap<String, Vec<Held>> = HashMap::new();
        for rank in 0..ranks {
            let path = dir.join(file_of(rank, ranks));
            let file = open(&path)?;
            if !matches!(file.metadata("format"), Some(FORMAT_PIECES | FORMAT_SLICES)) {
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
                let Some((start, slice)) = pieces.get(parameter).and_then(piece) else {
                    return Err(damaged(&path, &format!("it does not say which part of `{parameter}` it has")));
                };
                let tensor = saved.tensors.entry(name.clone()).or_insert_with(|| Tensor {
                    dtype,
                    shape: slice.of.clone(),
                    stored: name.clone(),
                    held: Cover::default(),
                });
                if (tensor.dtype, &tensor.shape) != (dtype, &slice.of) {
                    return Err(damaged(&path, &format!("its `{name}` is another tensor than that of rank 0")));
                }
                let (of_tensor, mut from) = (held.entry(name).or_default(), 0);
                for run in slice.runs(start..start + len) {
                    of_tensor.push(Held { place: rank, start: run.start, len: run.len(), from });
                    from += run.len();
                }
            }
            saved.files.push(file);
        }
        for (name, held) in held {
            saved.tensors.entry(name).and_modify(|tensor| tensor.held = Cover::new(held));
        }
        Ok(saved)
    }

    /// Makes tensors of the whole arrays of format 1, which have trained parameters at their places in the arena of one rank.
    pub(super) fn split_arrays(&mut self, parameters: &[placement::Tensor]) {
        let arrays = std::mem::take(&mut self.tensors);
        for (array, of_array) in arrays {
            for placement::Tensor { spec, param, .. } in parameters {
                let Some(from) = param.trained else { continue };
                let held = Cover::new(vec![Held { place: 0, start: 0, len: param.len, from }]);
                let tensor = Tensor { shape: spec.shape.clone(), stored: array.clone(), held, ..of_array };
                self.tensors.insert(format!("{array}/{}", spec.name), tensor);
            }
        }
    }

    /// A free entry of the first file.
    pub(super) fn metadata(&self, key: &str) -> Option<&str> {
        self.files.first()?.metadata(key)
    }

    /// The state has these tensors, with these shapes, types, and all elements that are wanted, and no others.
    pub(super) fn check_fits(&self, entries: &[Entry]) -> std::result::Result<(), String> {
        for Entry { name, slice, dtype, wanted, .. } in entries {
            let shape = &slice.of;
            let Some(tensor) = self.tensors.get(name) else { return Err(format!("{ANOTHER}: it has no `{name}`")) };
            if (tensor.dtype, &tensor.shape) != (file_dtype(*dtype), shape) {
                let Tensor { dtype: found, shape: other, .. } = tensor;
                return Err(format!(
                    "{ANOTHER}: its `{name}` is {found:?} {other:?}, and the run's {dtype:?} {shape:?}"
                ));
            }
            let runs = wanted.iter().flat_map(|part| slice.runs(part.start..part.start + part.buffer.len));
            for run in runs {
                tensor.held.intersect(run).map_err(|gap| {
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
        let copies = tensor.held.intersect(start..start + len).map_err(|_| missing())?;
        let bytes = |Copied { place, from, to, len }: Copied| -> Result<(usize, &[u8])> {
            let all = self.files[place].bytes(&tensor.stored)?;
            Ok((start + to, all.get(from * width..(from + len) * width).ok_or_else(missing)?))
        };
        copies.into_iter().map(bytes).collect()
    }
}

/// Where a piece begins in the slice of its parameter that its rank has, and the slice: without rows and columns all of it.
fn piece(value: &Value) -> Option<(usize, Slice)> {
    let number = |value: &Value| usize::try_from(value.as_u64()?).ok();
    let of: Vec<usize> = value.get("of")?.as_array()?.iter().map(number).collect::<Option<_>>()?;
    let whole = Slice::whole(&of);
    let (height, width) = (whole.rows.last()?.end, whole.columns.end);
    let range = |value: &Value, end: usize| match value.as_array()?.iter().map(number).collect::<Option<Vec<_>>>()?[..]
    {
        [first, last] if first <= last && last <= end => Some(first..last),
        _ => None,
    };
    let rows = value.get("rows").map(|rows| rows.as_array()?.iter().map(|rows| range(rows, height)).collect());
    let columns = value.get("columns").map(|columns| range(columns, width));
    let slice = Slice { rows: rows.unwrap_or(Some(whole.rows))?, columns: columns.unwrap_or(Some(whole.columns))?, of };
    Some((number(value.get("start")?)?, slice))
}
