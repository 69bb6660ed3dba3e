//! A checkpoint's weights: proves that the files' tensors are those of the model before anything is read.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use half::bf16;
use safetensors::Dtype;

use super::file::SafetensorsFile;
use super::shards::{find, list};
use crate::config::{ModelConfig, WeightDtype};
use crate::layout::{Layout, StoredTensor};
use crate::tensors::{TensorSpec, tensor_table};
use crate::{Error, ErrorCode, Result};

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// The weights of a model: mapped files whose tensors are just those of the configuration.
#[derive(Debug)]
pub struct Checkpoint {
    files: Vec<SafetensorsFile>,
    /// Which file has a tensor.
    home: HashMap<String, usize>,
    layout: Layout,
    /// Where a parameter of the table is.
    places: HashMap<String, Place>,
    dtype: WeightDtype,
}

/// Where a parameter is in the files.
#[derive(Debug)]
struct Place {
    /// The tensor that holds it.
    tensor: String,
    /// Its first element there.
    start: usize,
    /// Its elements.
    len: usize,
}

impl Checkpoint {
    /// Opens `dir/model.safetensors`, or the shards of `dir/model.safetensors.index.json`, and compares names, shapes
    /// and types with the table of tensors, in the layout that the names show. Values are looked at when they are read.
    pub fn open(dir: &Path, config: &ModelConfig) -> Result<Self> {
        let (files, home) = find(dir)?;
        let layout = Layout::of(home.keys().map(String::as_str));
        let table = tensor_table(config);
        let stored = layout.tensors(&table);
        let mut checkpoint = Self { files, home, layout, places: HashMap::new(), dtype: WeightDtype::F32 };
        checkpoint.check(dir, config, &stored)?;
        checkpoint.dtype = checkpoint.common_dtype(&stored);
        checkpoint.places = places(&stored, &table);
        Ok(checkpoint)
    }

    /// The type in which most of the weights are stored.
    pub fn dtype(&self) -> WeightDtype {
        self.dtype
    }

    /// How the files name and join the parameters.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// The files that hold the weights.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(SafetensorsFile::path)
    }

    /// Reads a parameter, by its name in the table, as f32. A value that is not finite is an error that names tensor and
    /// place.
    pub fn read_f32(&self, name: &str, out: &mut [f32]) -> Result<()> {
        let (file, place) = self.place(name, 0, out.len(), true)?;
        file.read_f32_part(&place.tensor, place.start, out)
    }

    /// [`Checkpoint::read_f32`] of a part: `out.len()` elements from `start` on, counted row-major.
    pub fn read_f32_part(&self, name: &str, start: usize, out: &mut [f32]) -> Result<()> {
        let (file, place) = self.place(name, start, out.len(), false)?;
        file.read_f32_part(&place.tensor, place.start + start, out)
    }

    /// Reads a parameter as bf16, rounding to nearest even. A value that is not finite is an error that names tensor and
    /// place.
    pub fn read_bf16(&self, name: &str, out: &mut [bf16]) -> Result<()> {
        let (file, place) = self.place(name, 0, out.len(), true)?;
        file.read_bf16_part(&place.tensor, place.start, out)
    }

    /// Where `len` elements of a parameter from `start` on are; `whole`: they must be all.
    fn place(&self, name: &str, start: usize, len: usize, whole: bool) -> Result<(&SafetensorsFile, &Place)> {
        let Some(place) = self.places.get(name) else {
            return Err(Error::new(ErrorCode::Internal, format!("the checkpoint has no tensor `{name}`")));
        };
        if start + len > place.len || (whole && len != place.len) {
            let what = format!("tensor `{name}` has {} elements; {start} to {} are read", place.len, start + len);
            return Err(Error::new(ErrorCode::Internal, what));
        }
        Ok((self.file_of(&place.tensor)?, place))
    }

    /// The file that has a tensor of this name.
    fn file_of(&self, tensor: &str) -> Result<&SafetensorsFile> {
        match self.home.get(tensor).and_then(|&file| self.files.get(file)) {
            Some(file) => Ok(file),
            None => Err(Error::new(ErrorCode::Internal, format!("the checkpoint has no tensor `{tensor}`"))),
        }
    }

    fn info(&self, tensor: &str) -> Option<(Dtype, &[usize])> {
        self.files.get(*self.home.get(tensor)?)?.info(tensor)
    }

    fn check(&self, dir: &Path, config: &ModelConfig, stored: &[StoredTensor]) -> Result<()> {
        let mut missing = Vec::new();
        let mut misshapen = Vec::new();
        let mut mistyped = Vec::new();
        for tensor in stored {
            match self.info(&tensor.name) {
                None => missing.push(tensor.name.clone()),
                Some((dtype, shape)) => {
                    if shape != tensor.shape.as_slice() {
                        misshapen.push(format!("{} is {shape:?}, not {:?}", tensor.name, tensor.shape));
                    }
                    if weight_dtype(dtype).is_none() {
                        mistyped.push(format!("{} is {dtype:?}", tensor.name));
                    }
                }
            }
        }
        if !missing.is_empty()
            && let Some(prefix) = wrapper_prefix(self.home.keys())
        {
            return Err(wrapped(dir, &prefix));
        }
        let expected: HashSet<&str> = stored.iter().map(|tensor| tensor.name.as_str()).collect();
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
        if message.is_empty() {
            return if tied_head { self.check_tied_head() } else { Ok(()) };
        }
        let hint = if missing.as_slice() == [HEAD] && surplus.is_empty() {
            "a model without a head (AutoModel) is trained as the causal model that it belongs to: load that one \
             (AutoModelForCausalLM) and save it, or set `tie_word_embeddings` to true where head and embedding are one"
        } else {
            "the weights belong to another model than config.json, or are incomplete"
        };
        let message = format!("{}: the tensors are not those of config.json: {message}", dir.display());
        Err(Error::new(ErrorCode::Weights, message).hint(hint))
    }

    fn check_tied_head(&self) -> Result<()> {
        let embedding = self.layout.name(EMBEDDING);
        let (head_file, embedding_file) = (self.file_of(HEAD)?, self.file_of(&embedding)?);
        let same =
            self.info(HEAD) == self.info(&embedding) && head_file.bytes_equal(HEAD, embedding_file, &embedding)?;
        if same {
            return Ok(());
        }
        Err(Error::new(
            ErrorCode::Weights,
            format!(
                "{}: `{HEAD}` differs from `{embedding}`, but `tie_word_embeddings` says that they are one",
                head_file.path().display()
            ),
        )
        .hint("set `tie_word_embeddings` to false in config.json to train both, or remove `lm_head.weight`"))
    }

    fn common_dtype(&self, stored: &[StoredTensor]) -> WeightDtype {
        let mut elements = [(WeightDtype::F32, 0), (WeightDtype::Bf16, 0), (WeightDtype::F16, 0)];
        for tensor in stored {
            let found = self.info(&tensor.name).and_then(|(dtype, _)| weight_dtype(dtype));
            for (dtype, count) in &mut elements {
                if Some(*dtype) == found {
                    *count += tensor.shape.iter().product::<usize>();
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

/// Where each parameter is: those of one tensor follow each other.
fn places(stored: &[StoredTensor], table: &[TensorSpec]) -> HashMap<String, Place> {
    let mut places = HashMap::with_capacity(table.len());
    for tensor in stored {
        let mut start = 0;
        for spec in &table[tensor.parts.clone()] {
            let len = spec.elements();
            places.insert(spec.name.clone(), Place { tensor: tensor.name.clone(), start, len });
            start += len;
        }
    }
    places
}

/// What all names begin with that a model's own do not: the trace of a wrapper that was saved in its place.
fn wrapper_prefix<'a>(names: impl Iterator<Item = &'a String> + Clone) -> Option<String> {
    let ends = [EMBEDDING, "embed_tokens.weight"];
    let prefix = names.clone().find_map(|name| ends.iter().find_map(|end| name.strip_suffix(end)))?;
    (!prefix.is_empty() && prefix.ends_with('.') && names.into_iter().all(|name| name.starts_with(prefix)))
        .then(|| prefix.to_owned())
}

fn wrapped(dir: &Path, prefix: &str) -> Error {
    let hint = match prefix {
        "_orig_mod." => {
            "torch.compile's wrapper was saved: save the model in it (model._orig_mod.save_pretrained(...))"
        }
        "module." => "DataParallel's wrapper was saved: save the model in it (model.module.save_pretrained(...))",
        "base_model.model." | "base_model." => {
            "PEFT's wrapper was saved: merge the adapter (model.merge_and_unload()) and save the result"
        }
        _ => "the model was saved inside of another module: save the inner one with save_pretrained",
    };
    Error::new(ErrorCode::Weights, format!("{}: the names of all tensors begin with `{prefix}`", dir.display()))
        .hint(format!("{hint}, or take `{prefix}` off the names"))
}
