//! A checkpoint's weights: checks that the files' tensors are those of the model before anything is read.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use safetensors::Dtype;

use super::file::{SafetensorsFile, TensorView};
use super::shards::{find, list};
use crate::config::{ModelConfig, WeightDtype};
use crate::format::{Carried, CheckpointFormat, Other, Row, StoredTensor, StridedView};
use crate::nf4::{NF4_BLOCK, Nf4, Nf4Builder, StoredNf4, is_companion};
use crate::tensors::{Role, Slice, TensorSpec, tensor_table};
use crate::{Error, ErrorCode, Result};

/// The weights of a model: mapped files whose tensors are exactly those of the configuration.
#[derive(Debug)]
pub struct Checkpoint {
    files: Vec<Arc<SafetensorsFile>>,
    /// The index of the file that has a tensor.
    home: HashMap<String, usize>,
    format: CheckpointFormat,
    /// Where a parameter is, by its name in the table.
    places: HashMap<String, Place>,
    /// Tensors of the files that are in NF4, with the shapes of what they stand for.
    quantized: HashMap<String, Vec<usize>>,
}

/// Where a parameter is in the files.
#[derive(Debug)]
struct Place {
    /// The tensor that holds it.
    tensor: String,
    views: Vec<StridedView>,
}

/// Elements that are quantized at a time.
const QUANTIZED: usize = 1 << 20;

impl Place {
    /// Whether the tensor, of so many elements, holds nothing else.
    fn is_whole(&self, elements: usize) -> bool {
        matches!(self.views.as_slice(), [StridedView { start: 0, rows: 1, column_stride: 1, columns, .. }] if *columns == elements)
    }

    /// Its part of the tensor, which has so many elements.
    fn of(&self, nf4: Nf4, elements: usize) -> Result<Nf4> {
        if self.is_whole(elements) {
            return Ok(nf4);
        }
        let rows = self.views.iter().flat_map(|view| {
            let &StridedView { start, rows, columns, row_stride, .. } = view;
            (0..rows).map(move |row| start + row * row_stride..start + row * row_stride + columns)
        });
        let along = self.views.iter().all(|view| view.column_stride == 1);
        let parts = if along { nf4.gathered(rows) } else { None };
        parts.ok_or_else(|| {
            let what =
                format!("`{}` holds several parameters whose rows are no whole blocks of {NF4_BLOCK}", self.tensor);
            Error::new(ErrorCode::Weights, what).hint("take the weights in 16 bits, without load_in_4bit")
        })
    }
}

/// What is wrong with the tensors of the files.
#[derive(Default)]
struct Faults {
    missing: Vec<String>,
    surplus: Vec<String>,
    misshapen: Vec<String>,
    mistyped: Vec<String>,
}

impl Checkpoint {
    /// Opens `dir/model.safetensors`, or the shards of `dir/model.safetensors.index.json`, and compares names, shapes
    /// and types with the table of tensors, in the format that the names show. Values are checked when they are read.
    pub fn open(dir: &Path, config: &ModelConfig) -> Result<Self> {
        Self::open_as(Row::of(config), dir, config)
    }

    pub(crate) fn open_as(row: &'static Row, dir: &Path, config: &ModelConfig) -> Result<Self> {
        let (files, home) = find(dir)?;
        let shape = |name: &str, file: usize| Some(files.get(file)?.info(name)?.1);
        let tensors = home.iter().map(|(name, &file)| (name.as_str(), shape(name, file).unwrap_or_default()));
        let format = CheckpointFormat::of_tensors(row, config, tensors).map_err(|what| {
            Error::new(ErrorCode::Weights, format!("{}: {what}", dir.display()))
                .hint("load the model with transformers and save it again: model.save_pretrained(folder)")
        })?;
        let mut checkpoint = Self { files, home, format, places: HashMap::new(), quantized: HashMap::new() };
        let table = tensor_table(config);
        let stored = checkpoint.format.tensors(config, &table);
        if config.nf4.is_some() {
            checkpoint.open_quantized(&stored)?;
        }
        checkpoint.check(row, dir, &table, &stored)?;
        checkpoint.note_types(&stored);
        for tensor in stored {
            for part in tensor.parts {
                let place = Place { tensor: tensor.name.clone(), views: part.views };
                checkpoint.places.insert(table[part.parameter].name.clone(), place);
            }
        }
        Ok(checkpoint)
    }

    /// How the files hold the model. It keeps the files mapped that have tensors which are carried.
    pub fn format(&self) -> &CheckpointFormat {
        &self.format
    }

    /// A parameter that the files have in NF4, as it is there; `None`: they have its values. Of a tensor that holds others too, its
    /// rows' blocks, with scales of 32 bits.
    pub fn read_nf4(&self, name: &str) -> Result<Option<Nf4>> {
        let place = self.place(name)?;
        match (self.quantized.get(&place.tensor), self.file_of(&place.tensor)) {
            (Some(shape), Some(file)) => {
                let nf4 = StoredNf4::open(file, &place.tensor, shape)?.read()?;
                place.of(nf4, shape.iter().product()).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// A parameter quantized together with the others of the tensor that holds it, as bitsandbytes does that; `None`: it has a tensor
    /// of its own. `nested`: with the values of scales in 8 bits.
    pub fn quantize_shared(&self, name: &str, nested: bool) -> Result<Option<Nf4>> {
        let place = self.place(name)?;
        let elements = self.info(&place.tensor).map_or(0, |(_, shape)| shape.iter().product());
        if place.is_whole(elements) {
            return Ok(None);
        }
        let tensor = self.view(&place.tensor)?;
        let (mut staging, mut builder) = (vec![0f32; QUANTIZED.min(elements)], Nf4Builder::default());
        for start in (0..elements).step_by(QUANTIZED) {
            let piece = &mut staging[..QUANTIZED.min(elements - start)];
            tensor.read(start, 1, piece)?;
            builder.push(piece);
        }
        place.of(builder.finish(nested), elements).map(Some)
    }

    /// Reads a parameter, by its name in the table. A value that is not finite is an error that names tensor and place.
    pub fn read_f32(&self, name: &str, out: &mut [f32]) -> Result<()> {
        let len = self.place(name)?.views.iter().map(StridedView::len).sum::<usize>();
        if out.len() != len {
            let what = format!("tensor `{name}` has {len} elements; {} are read", out.len());
            return Err(Error::new(ErrorCode::Internal, what));
        }
        self.read_f32_part(name, 0, out)
    }

    /// [`Checkpoint::read_f32`] of a part: `out.len()` elements from `start` on, counted row-major.
    pub fn read_f32_part(&self, name: &str, start: usize, out: &mut [f32]) -> Result<()> {
        let place = self.place(name)?;
        let end = start + out.len();
        if self.quantized.contains_key(&place.tensor) {
            let elements: usize = place.views.iter().map(StridedView::len).sum();
            let nf4 = self.read_nf4(name)?.filter(|_| end <= elements);
            let outside = || Error::new(ErrorCode::Internal, format!("tensor `{name}` in NF4 has {elements} elements"));
            nf4.ok_or_else(outside)?.read(start, out);
            return Ok(());
        }
        let tensor = self.view(&place.tensor)?;
        let (mut first, mut read) = (0, start);
        for view in &place.views {
            let last = first + view.len();
            if read >= first && read < last.min(end) {
                let part = read - first..last.min(end) - first;
                read_view(&tensor, view, part.clone(), &mut out[read - start..][..part.len()])?;
                read += part.len();
            }
            first = last;
        }
        if read < end {
            let what = format!("tensor `{name}` has {first} elements; {start} to {end} are read");
            return Err(Error::new(ErrorCode::Internal, what));
        }
        Ok(())
    }

    /// [`Checkpoint::read_f32_part`] of a part of a tensor: `out.len()` of the slice's elements from `start` on.
    pub fn read_f32_slice(&self, name: &str, slice: &Slice, start: usize, out: &mut [f32]) -> Result<()> {
        let (runs, mut rest) = (slice.runs(start..start + out.len()), out);
        for run in &runs {
            let (part, behind) = rest.split_at_mut(run.len());
            self.read_f32_part(name, run.start, part)?;
            rest = behind;
        }
        let place = self.place(name)?;
        if let ([first, .., last], [view]) = (runs.as_slice(), place.views.as_slice())
            && view.rows == 1
            && !self.quantized.contains_key(&place.tensor)
        {
            // Runs shorter than a page have released none.
            self.view(&place.tensor)?.release(view.start + first.start..view.start + last.end);
        }
        Ok(())
    }

    fn place(&self, name: &str) -> Result<&Place> {
        self.places.get(name).ok_or_else(|| no_tensor(name))
    }

    /// A tensor of the files, by its name there.
    fn view<'a>(&'a self, tensor: &'a str) -> Result<TensorView<'a>> {
        self.file_of(tensor).ok_or_else(|| no_tensor(tensor))?.view(tensor)
    }

    fn file_of(&self, tensor: &str) -> Option<&Arc<SafetensorsFile>> {
        self.files.get(*self.home.get(tensor)?)
    }

    fn info(&self, tensor: &str) -> Option<(Dtype, &[usize])> {
        self.file_of(tensor)?.info(tensor)
    }

    /// Finds the tensors that are in NF4 and checks their descriptions.
    fn open_quantized(&mut self, stored: &[StoredTensor]) -> Result<()> {
        for tensor in stored {
            let Some(file) = self.file_of(&tensor.name) else { continue };
            if StoredNf4::is_stored(file, &tensor.name, tensor.shape.iter().product()) {
                StoredNf4::open(file, &tensor.name, &tensor.shape)?;
                self.quantized.insert(tensor.name.clone(), tensor.shape.clone());
            }
        }
        Ok(())
    }

    /// Compares the files' tensors with those of the model, and collects what is carried.
    fn check(&mut self, row: &Row, dir: &Path, table: &[TensorSpec], stored: &[StoredTensor]) -> Result<()> {
        let mut faults = self.faults(stored);
        if !faults.missing.is_empty()
            && let Some(prefix) = wrapper_prefix(row, table, self.home.keys())
        {
            return Err(wrapped(dir, &prefix));
        }
        let parameters: HashSet<&String> = stored.iter().map(|tensor| &tensor.name).collect();
        let mut others: Vec<&String> = self.home.keys().filter(|name| !parameters.contains(name)).collect();
        others.sort();
        let (mut copies, mut carried) = (Vec::new(), Vec::new());
        for name in others {
            if is_companion(name, |tensor| self.quantized.contains_key(tensor)) {
                continue;
            }
            match (row.other(name), self.file_of(name)) {
                (Some(Other::CopyOf(parameter)), _) => copies.push((name, self.format.spell(parameter))),
                (Some(Other::Carried), Some(file)) => {
                    carried.push(Carried { name: name.clone(), file: Arc::clone(file) });
                }
                (Some(Other::Derived), _) => {}
                _ => faults.surplus.push(name.clone()),
            }
        }
        faults.check(dir, table)?;
        for (copy, original) in copies {
            if !self.view(copy)?.equals(&self.view(&original)?) {
                return Err(not_tied(self.file_of(copy).map_or(dir, |file| file.path()), copy, &original));
            }
        }
        self.format.carried = carried;
        Ok(())
    }

    /// The faults of the tensors that must be there.
    fn faults(&self, stored: &[StoredTensor]) -> Faults {
        let mut faults = Faults::default();
        for tensor in stored.iter().filter(|tensor| !self.quantized.contains_key(&tensor.name)) {
            let Some((dtype, shape)) = self.info(&tensor.name) else {
                faults.missing.push(tensor.name.clone());
                continue;
            };
            if shape != tensor.shape.as_slice() {
                faults.misshapen.push(format!("{} is {shape:?}, not {:?}", tensor.name, tensor.shape));
            }
            if WeightDtype::of(dtype).is_none() {
                faults.mistyped.push(format!("{} is {dtype:?}", tensor.name));
            }
        }
        faults
    }

    /// Notes the type of most elements, and which tensors have another one.
    fn note_types(&mut self, stored: &[StoredTensor]) {
        let type_of = |tensor: &StoredTensor| WeightDtype::of(self.info(&tensor.name)?.0);
        // Types of those in NF4 are none of these: what is written of them has the type of the others.
        let count = |dtype| {
            let of_type = stored.iter().filter(|tensor| type_of(tensor) == Some(dtype));
            of_type.map(|tensor| tensor.shape.iter().product::<usize>()).sum::<usize>()
        };
        let types = [WeightDtype::F32, WeightDtype::Bf16, WeightDtype::F16];
        let most = types.into_iter().max_by_key(|&dtype| count(dtype)).unwrap_or(WeightDtype::F32);
        let others = stored.iter().filter_map(|tensor| Some((tensor.name.clone(), type_of(tensor)?)));
        self.format.other_dtypes = others.filter(|&(_, dtype)| dtype != most).collect();
        self.format.dtype = most;
    }
}

impl Faults {
    fn check(&self, dir: &Path, table: &[TensorSpec]) -> Result<()> {
        let mut message = String::new();
        list(&mut message, "missing", &self.missing);
        list(&mut message, "surplus", &self.surplus);
        list(&mut message, "of the wrong shape", &self.misshapen);
        list(&mut message, "of a type other than F32, BF16 or F16", &self.mistyped);
        if message.is_empty() {
            return Ok(());
        }
        let head = table.iter().filter(|spec| spec.role == Role::LmHead).map(|spec| &spec.name);
        let headless = !self.missing.is_empty() && self.missing.iter().eq(head);
        let hint = if headless && self.surplus.is_empty() {
            "AutoModel saves a model without a head: load the causal model that it belongs to (AutoModelForCausalLM) and \
             save that one, or set `tie_word_embeddings` to true if the head is the embedding"
        } else {
            "the weights belong to another model than config.json, or are incomplete"
        };
        let message = format!("{}: the tensors are not those of config.json: {message}", dir.display());
        Err(Error::new(ErrorCode::Weights, message).hint(hint))
    }
}

/// Reads a range of a view's elements, counted row by row.
fn read_view(tensor: &TensorView<'_>, view: &StridedView, range: Range<usize>, out: &mut [f32]) -> Result<()> {
    let columns = view.columns;
    let mut read = range.start;
    while read < range.end {
        let (row, column) = (read / columns, read % columns);
        // The rest of a row, or as many whole rows as are wanted.
        let width = (columns - column).min(range.end - read);
        let rows = if width == columns { (range.end - read) / columns } else { 1 };
        let out = &mut out[read - range.start..][..rows * width];
        let start = view.start + row * view.row_stride + column * view.column_stride;
        if view.column_stride == 1 {
            for (row, out) in out.chunks_exact_mut(width).enumerate() {
                tensor.read(start + row * view.row_stride, 1, out)?;
            }
        } else {
            for column in 0..width {
                tensor.read(start + column * view.column_stride, width, &mut out[column..])?;
            }
        }
        read += rows * width;
    }
    // Runs shorter than a page have released none.
    if view.rows > 1 {
        tensor.release(view.extent());
    }
    Ok(())
}

fn no_tensor(name: &str) -> Error {
    Error::new(ErrorCode::Internal, format!("the checkpoint has no tensor `{name}`"))
}

fn not_tied(path: &Path, copy: &str, original: &str) -> Error {
    let what = format!("`{copy}` differs from `{original}`, but `tie_word_embeddings` says that they are one");
    Error::new(ErrorCode::Weights, format!("{}: {what}", path.display()))
        .hint(format!("set `tie_word_embeddings` to false in config.json to train both, or remove `{copy}`"))
}

/// What all names begin with that a model's own do not: the trace of a wrapper that was saved in its place.
fn wrapper_prefix<'a>(
    row: &Row,
    table: &[TensorSpec],
    mut names: impl Iterator<Item = &'a String> + Clone,
) -> Option<String> {
    let embedding = table.iter().find(|spec| spec.role == Role::Embedding)?;
    let ends: Vec<String> = row.spellings.iter().map(|spelling| spelling.spell(&embedding.name)).collect();
    // A longer spelling may end as a shorter one does.
    let before = |name: &'a String, end: &String| {
        name.strip_suffix(end.as_str()).filter(|prefix| prefix.is_empty() || prefix.ends_with('.'))
    };
    let prefix = names.clone().find_map(|name| ends.iter().find_map(|end| before(name, end)))?;
    (prefix.ends_with('.') && names.all(|name| name.starts_with(prefix))).then(|| prefix.to_owned())
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
        _ => "the model was saved inside another module: save the inner one with save_pretrained",
    };
    Error::new(ErrorCode::Weights, format!("{}: the names of all tensors begin with `{prefix}`", dir.display()))
        .hint(format!("{hint}, or take `{prefix}` off the names"))
}
