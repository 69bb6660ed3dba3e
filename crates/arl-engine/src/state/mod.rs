//! The state of a run on disk: exact weights and moments of what is trained, step count and loss scale. An engine that
//! restores it computes equal bits from there on. Tensors are saved by name, each with its place in the whole parameter, so
//! that a state depends neither on places in memory nor on how parameters were divided.

mod arrays;
mod ranges;
mod saved;

use std::collections::HashMap;
use std::path::Path;

use arl_model::{Dtype, Error, ErrorCode, Result, SafetensorsWriter, Slice, TensorDecl, TensorSpec, sync_folder};
use serde_json::{Map, Value, json};

use self::saved::{Saved, file_of};
use crate::backend::{Backend, Buffer, DType};
use crate::engine::Engine;
use crate::loss_scale::LossScale;
use crate::placement::cut::Owned;
use crate::placement::{Param, Tensor};
use crate::weights::PIECE;

/// The file that [`Engine::save_state`] writes into its folder, where one rank has everything.
const STATE_FILE: &str = "engine.safetensors";
/// Tensors by name: `moment1/model.norm.weight`. The metadata `slices` has by parameters where they begin in the whole and the
/// whole's shape.
const FORMAT: &str = "arl engine state 3";
/// One of several files, each with the elements that a rank owns, as lists. The metadata `pieces` has by parameters where they
/// begin in the whole, row-major, and the whole's shape.
const FORMAT_PIECES: &str = "arl engine state 4";
/// As [`FORMAT_PIECES`] where a mesh divides the model: pieces begin in the rows and columns of the whole that a rank has, which
/// `pieces` names too.
const FORMAT_SLICES: &str = "arl engine state 5";
/// As [`FORMAT`] without slices: every tensor is a whole parameter. Read, and no longer written.
const FORMAT_2: &str = "arl engine state 2";
/// Whole arrays, whose order a hash names. Read, and no longer written.
const FORMAT_1: &str = "arl engine state 1";
/// The metadata with the algorithms that a device chose for matrix products, where it chose any.
const ALGORITHMS: &str = "matmul_algorithms";
/// The metadata with the number of steps that had images, of a model whose vision tower is in the engine.
const VISION_STEPS: &str = "vision_steps";
/// The name of weights in a state's file.
const WEIGHTS: &str = "weights";
/// The name of what is left of exact f32 masters next to weights in bf16.
const WEIGHTS_LOW: &str = "weights_low";
/// The name of f32 masters.
const MASTERS: &str = "master_weights";

/// Elements of a tensor, and their place in memory.
#[derive(Clone, Copy, Debug)]
struct Part {
    /// First element within what this rank has of the tensor.
    start: usize,
    buffer: Buffer,
}

/// A tensor of a state and its places in memory.
struct Entry {
    /// Its name in the files.
    name: String,
    /// The parameter's name.
    parameter: String,
    /// What this rank has of the parameter; of one that it has nothing of, all.
    slice: Slice,
    dtype: DType,
    /// What this rank writes of it.
    owned: Vec<Part>,
    /// What this rank reads of it. Masters of f16 weights have no place of their own here: see `masters_of`.
    wanted: Vec<Part>,
    /// Masters of f16 weights: the weights are their roundings, and no part of the file.
    masters_of: Option<Param>,
}

impl<B: Backend + ?Sized> Engine<B> {
    /// The arrays of a saved state under their names. f16 weights are no part of it: they are the masters' roundings.
    fn state_arrays(&self) -> Result<Vec<(&'static str, Buffer)>> {
        let store = self.model.store;
        let Some(training) = store.training else {
            return Err(Error::new(ErrorCode::Config, "an engine for inference only has no state to save or restore"));
        };
        let mut arrays = match (store.weights.dtype, store.masters) {
            (DType::F16, Some(masters)) => vec![(MASTERS, masters)],
            (_, masters) => {
                let low = masters.map(|low| (WEIGHTS_LOW, low));
                [(WEIGHTS, store.weights)].into_iter().chain(low).collect()
            }
        };
        arrays.extend([("moment1", training.moment1), ("moment2", training.moment2)]);
        Ok(arrays)
    }

    /// A parameter's tensor of an array.
    fn entry(&self, array: &str, buffer: Buffer, tensor: &Tensor) -> Entry {
        let param = tensor.param;
        let owned = self.model.owned(param);
        let of_own = |&Owned { start, own, len }: &Owned| Part { start, buffer: buffer.slice(own, len) };
        let of_weights = |first: usize, param: Param| {
            let part = move |(start, buffer): (usize, Buffer)| Part { start: first + start, buffer };
            self.model.weight_parts(param).into_iter().map(part)
        };
        let own = owned.iter().map(of_own);
        let (owned, wanted) = match array {
            WEIGHTS => {
                let of_part = |part: &Owned| of_weights(part.start, param.part(part.start, part.len));
                (owned.iter().flat_map(of_part).collect(), of_weights(0, param).collect())
            }
            MASTERS => {
                let of_rounded = |part: Part| Part { buffer: Buffer { len: part.buffer.len, ..buffer }, ..part };
                (own.collect(), of_weights(0, param).map(of_rounded).collect())
            }
            _ => (own.clone().collect(), own.collect()),
        };
        Entry {
            name: format!("{array}/{}", tensor.spec.name),
            parameter: tensor.spec.name.clone(),
            slice: tensor.slice.clone(),
            dtype: if array == WEIGHTS { self.model.store.weight(param).dtype } else { buffer.dtype },
            owned: if tensor.copied { Vec::new() } else { owned },
            wanted,
            masters_of: (array == MASTERS).then_some(param),
        }
    }

    /// The tensors of a state, array by array, in the order of the parameters; also those that this rank has nothing of.
    fn state_entries(&self) -> Result<Vec<Entry>> {
        let mut arrays = self.state_arrays()?;
        let store = self.model.store;
        // Magnitudes have no masters, in any type.
        let narrow = store.weights.dtype == DType::F16;
        arrays.extend(narrow.then_some((WEIGHTS, store.weights)));
        let has = move |array: &str, wide: bool| match array {
            WEIGHTS => wide || !narrow,
            MASTERS | WEIGHTS_LOW => !wide,
            _ => true,
        };
        let tensors: HashMap<&str, &Tensor> =
            self.model.placement.tensors.iter().map(|tensor| (tensor.spec.name.as_str(), tensor)).collect();
        let trained: Vec<&TensorSpec> =
            self.model.placement.table().into_iter().filter(|spec| spec.trainable).collect();
        let mut entries = Vec::with_capacity(arrays.len() * trained.len());
        for &(array, buffer) in &arrays {
            for spec in &trained {
                let (tensor, wide) = (tensors.get(spec.name.as_str()), self.model.is_wide(spec.role));
                if !has(array, wide) {
                    continue;
                }
                entries.push(match tensor {
                    Some(tensor) => self.entry(array, buffer, tensor),
                    None => Entry {
                        name: format!("{array}/{}", spec.name),
                        parameter: spec.name.clone(),
                        slice: Slice::whole(&spec.shape),
                        dtype: if array == WEIGHTS && wide { DType::F32 } else { buffer.dtype },
                        owned: Vec::new(),
                        wanted: Vec::new(),
                        masters_of: None,
                    },
                });
            }
        }
        Ok(entries)
    }

    /// By trained parameters, where they begin in the whole, and the whole's shape.
    fn slices(&self) -> Map<String, Value> {
        let trained = self.model.placement.table().into_iter().filter(|spec| spec.trainable);
        let slice = |spec: &TensorSpec| json!({ "start": vec![0; spec.shape.len()], "of": spec.shape });
        trained.map(|spec| (spec.name.clone(), slice(spec))).collect()
    }

    /// Writes exact weights, moments, step count and loss scale to `dir/engine.safetensors`, under another name until the
    /// file is complete and on the disk. Where ranks divide moments, all of them call it at once, and each writes a file of its
    /// own: `dir/state-00001-of-00002.safetensors`, for example.
    pub fn save_state(&mut self, dir: &Path) -> Result<()> {
        self.state_arrays()?;
        self.settle();
        self.complete_update_in_host();
        let Some((rank, ranks)) = self.model.cut.as_ref().map(|cut| (cut.place.rank, cut.place.world())) else {
            return self.write_state_in(dir, STATE_FILE);
        };
        self.check_joined()?;
        let made = if rank == 0 { std::fs::create_dir_all(dir).map_err(|e| Error::io(dir, &e)) } else { Ok(()) };
        self.ranks.agree(made)?;
        let written = if dir.is_dir() { self.write_state_in(dir, &file_of(rank, ranks)) } else { Err(not_shared(dir)) };
        self.ranks.agree(written)
    }

    fn write_state_in(&mut self, dir: &Path, name: &str) -> Result<()> {
        std::fs::create_dir_all(dir).map_err(|e| Error::io(dir, &e))?;
        let (path, partial) = (dir.join(name), dir.join(format!("{name}.partial")));
        let written = self.write_state(&partial);
        if written.is_err() {
            // The error that is reported is the first one.
            let _ = std::fs::remove_file(&partial);
        }
        written?;
        std::fs::rename(&partial, &path).map_err(|e| Error::io(&path, &e))?;
        sync_folder(dir)
    }

    fn write_state(&mut self, path: &Path) -> Result<()> {
        let mut entries = self.state_entries()?;
        entries.retain(|entry| !entry.owned.is_empty());
        let divided = self.is_divided();
        let declare = |entry: &Entry| TensorDecl {
            name: entry.name.clone(),
            dtype: file_dtype(entry.dtype),
            shape: if divided { vec![entry.elements()] } else { entry.slice.of.clone() },
        };
        let declared: Vec<TensorDecl> = entries.iter().map(declare).collect();
        let steps = self.steps.to_string();
        let loss_scale = self.loss_scale.map(LossScale::to_text);
        let by_slices = self.model.place.mesh.divides_model();
        let pieces = entries.iter().map(|entry| (entry.parameter.clone(), entry.piece(by_slices)));
        let (format, places) = match divided {
            true if by_slices => ((FORMAT_SLICES, "pieces"), Value::Object(pieces.collect()).to_string()),
            true => ((FORMAT_PIECES, "pieces"), Value::Object(pieces.collect()).to_string()),
            false => ((FORMAT, "slices"), Value::Object(self.slices()).to_string()),
        };
        let mut metadata = vec![("format", format.0), ("steps", &steps), (format.1, &places)];
        metadata.extend(loss_scale.as_deref().map(|text| ("loss_scale", text)));
        let vision_steps = self.vision_steps.to_string();
        metadata.extend(self.model.tower.as_ref().map(|_| (VISION_STEPS, vision_steps.as_str())));
        let algorithms = self.backend.matmul_algorithms().and_then(|algorithms| algorithms.chosen());
        metadata.extend(algorithms.as_deref().map(|text| (ALGORITHMS, text)));
        let mut writer = SafetensorsWriter::create(path, &metadata, &declared)?;
        let mut staging = vec![0u8; PIECE * 4];
        for Part { buffer, .. } in entries.into_iter().flat_map(|entry| entry.owned) {
            for start in (0..buffer.len).step_by(PIECE) {
                let part = buffer.slice(start, PIECE.min(buffer.len - start));
                let staging = &mut staging[..part.bytes()];
                self.backend.read_back(part, staging)?;
                writer.append(staging)?;
            }
        }
        writer.finish()
    }

    /// Reads what [`Engine::save_state`] wrote on any number of ranks, also in the formats of earlier versions. The engine must
    /// have been opened with the same model, type and frozen parameters. Nothing is changed unless the state fits. Gives what a
    /// user should know: why results will differ in bits from what they would have been.
    pub fn restore_state(&mut self, dir: &Path) -> Result<Option<String>> {
        self.state_arrays()?;
        let mut saved = Saved::open(dir)?;
        let path = saved.path.clone();
        let entries = self.state_entries()?;
        if saved.metadata("format") == Some(FORMAT_1) {
            self.split_arrays(&mut saved)?;
        }
        let Some(steps) = saved.metadata("steps").and_then(|s| s.parse().ok()) else {
            return Err(damaged(&path, "its step count is missing"));
        };
        // States of models without a tower do not have it.
        let vision_steps = match saved.metadata(VISION_STEPS).map(str::parse) {
            None => 0,
            Some(Ok(steps)) => steps,
            Some(Err(_)) => return Err(damaged(&path, "its number of steps with images is no number")),
        };
        let loss_scale = match self.loss_scale {
            None => None,
            Some(scale) => match saved.metadata("loss_scale").and_then(|text| scale.restored(text)) {
                None => return Err(damaged(&path, "its loss scale is missing")),
                restored => restored,
            },
        };
        saved.check_fits(&entries).map_err(|what| damaged(&path, &what))?;
        if saved.metadata("format") == Some(FORMAT) {
            let found = saved.metadata("slices").and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
            check_slices(&found, &self.slices()).map_err(|what| damaged(&path, &what))?;
        }
        self.settle();
        self.give_up_submitted();
        // It updates weights that are written over.
        self.pending = None;
        self.kept.forget();
        self.ranks.forget_gathered();
        self.ranks.settle_exchanges(&mut *self.backend);
        for entry in &entries {
            for part in &entry.wanted {
                let mut at = part.start;
                for run in entry.slice.runs(part.start..part.start + part.buffer.len) {
                    for (first, bytes) in saved.read(&entry.name, run.start, run.len())? {
                        self.restore_elements(entry, part, at + first - run.start, bytes);
                    }
                    at += run.len();
                }
            }
        }
        (self.steps, self.vision_steps) = (steps, vision_steps);
        self.loss_scale = loss_scale;
        let chosen = saved.metadata(ALGORITHMS);
        Ok(chosen.and_then(|chosen| self.backend.matmul_algorithms()?.restore(chosen)))
    }

    /// Uploads elements of a tensor from the `first` on, which are in `part`.
    fn restore_elements(&mut self, entry: &Entry, part: &Part, first: usize, bytes: &[u8]) {
        let width = part.buffer.dtype.bytes();
        for (piece, bytes) in bytes.chunks(PIECE * width).enumerate() {
            let (start, len) = (first + piece * PIECE, bytes.len() / width);
            if let Some(param) = entry.masters_of {
                let words = bytes.chunks_exact(4).map(|word| [word[0], word[1], word[2], word[3]]);
                let values: Vec<f32> = words.map(f32::from_le_bytes).collect();
                self.write_weights(param.part(start, len), &values);
            } else {
                self.backend.upload(bytes, part.buffer.slice(start - part.start, len));
            }
        }
    }
}

impl Entry {
    /// Where what this rank writes is in the whole, for the metadata.
    fn piece(&self, by_slices: bool) -> Value {
        let (start, Slice { of, rows, columns }) = (self.owned.first().map_or(0, |part| part.start), &self.slice);
        if !by_slices {
            return json!({ "start": start, "of": of });
        }
        let rows: Vec<[usize; 2]> = rows.iter().map(|rows| [rows.start, rows.end]).collect();
        json!({ "start": start, "of": of, "rows": rows, "columns": [columns.start, columns.end] })
    }

    /// How many this rank writes.
    fn elements(&self) -> usize {
        self.owned.iter().map(|part| part.buffer.len).sum()
    }
}

const ANOTHER: &str = "it belongs to another model, or to a run with another dtype or rounding";

/// Each parameter of the file is the part that the run has.
fn check_slices(found: &Map<String, Value>, expected: &Map<String, Value>) -> std::result::Result<(), String> {
    for (name, slice) in expected {
        match found.get(name) {
            Some(other) if other == slice => {}
            Some(other) => return Err(format!("its part of `{name}` is {other}, and the run's {slice}")),
            None => return Err(format!("it does not say which part of `{name}` it has")),
        }
    }
    Ok(())
}

fn file_dtype(dtype: DType) -> Dtype {
    match dtype {
        DType::F32 => Dtype::F32,
        DType::Bf16 => Dtype::BF16,
        DType::F16 => Dtype::F16,
        DType::F64 => Dtype::F64,
        DType::I32 => Dtype::I32,
        DType::U16 => Dtype::U16,
        DType::U8 => Dtype::U8,
    }
}

fn damaged(path: &Path, what: &str) -> Error {
    Error::new(ErrorCode::State, format!("{}: {what}", path.display()))
        .hint("resume from another checkpoint of this run, with the options that it was started with")
}

fn not_shared(dir: &Path) -> Error {
    Error::new(ErrorCode::Io, format!("{}: rank 0 has made this folder, and here it is missing", dir.display()))
        .hint("output_dir must be one folder that all ranks share")
}
