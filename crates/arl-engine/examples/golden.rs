//! Runs every golden case of a folder: a small model, a batch, and what transformers computed with them.
//!
//! `golden [FOLDER ...]`; without one, the folder that `ARL_GOLDEN` names. A case is any subfolder with `config.json`,
//! `model.safetensors`, `batch.safetensors`, `forward.safetensors`, `grads.safetensors`, `curve.json` and
//! `trained.safetensors`; or, of an adapter, with the model in `base`, PEFT's folders `adapter` and `adapter_trained`, and
//! `merged.safetensors`. Prints one line a case with the worst figure of each kind; exits with 1 if one is too large.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command's output")]
#![allow(dead_code, reason = "the test includes this file, and does not call main")]

#[path = "golden/figures.rs"]
mod figures;
#[path = "golden/frozen.rs"]
mod frozen;
#[path = "../tests/common/nf4_folder.rs"]
#[allow(unreachable_pub, missing_docs, reason = "shared with tests")]
pub mod nf4_folder;
#[path = "golden/rounding.rs"]
mod rounding;

use std::path::{Path, PathBuf};

use arl_engine::backend::cpu::CpuBackend;
use arl_engine::backend::{Backend, DType};
use arl_engine::{Adam, Engine, EngineOptions, Hyper, Images, Kind, LoraOptions, MicroBatch, Recompute, Weights};
use arl_model::{
    AdapterFile, Checkpoint, Error, ErrorCode, Lora, LoraConfig, ModelConfig, Result, SafetensorsFile, merge_adapter,
};

use figures::{Bounds, difference, figures_of};
pub use figures::{Figure, Outcome};
use rounding::Rounding;

fn ints(file: &SafetensorsFile, name: &str) -> Result<Vec<i32>> {
    let bytes = file.bytes(name)?.as_chunks::<8>().0;
    Ok(bytes.iter().map(|&b| i64::from_le_bytes(b) as i32).collect())
}

fn floats(file: &SafetensorsFile, name: &str) -> Result<Vec<f32>> {
    let mut values = vec![0f32; file.info(name).map_or(0, |(_, shape)| shape.iter().product())];
    file.read_f32(name, &mut values)?;
    Ok(values)
}

/// The images of a case's batch.
fn images(file: &SafetensorsFile) -> Result<Option<Images>> {
    if file.info("pixel_values").is_none() {
        return Ok(None);
    }
    let grids = ints(file, "image_grid_thw")?.chunks_exact(3).map(|grid| [0, 1, 2].map(|i| grid[i] as u32)).collect();
    Ok(Some(Images { pixel_values: floats(file, "pixel_values")?, grids }))
}

/// Runs a case on the CPU.
pub fn run_case(dir: &Path, recompute: Recompute) -> Result<Outcome> {
    run_case_on(Box::new(CpuBackend::new()), dir, recompute, DType::F32)
}

/// Runs a case on any backend, with weights and activations of a type.
pub fn run_case_on<B: Backend + ?Sized>(
    backend: Box<B>,
    dir: &Path,
    recompute: Recompute,
    dtype: DType,
) -> Result<Outcome> {
    let open = |name: &str| SafetensorsFile::open(&dir.join(name));
    let damaged = |what: &str| Error::new(ErrorCode::Data, format!("{}: {what}", dir.join("curve.json").display()));
    let text = std::fs::read_to_string(dir.join("curve.json")).map_err(|e| Error::io(&dir.join("curve.json"), &e))?;
    let curve: serde_json::Value = serde_json::from_str(&text).map_err(|e| damaged(&e.to_string()))?;
    let optimizer = &curve["optimizer"];
    let number =
        |value: &serde_json::Value| value.as_f64().ok_or_else(|| damaged("a number is missing")).map(|x| x as f32);

    let file = open("batch.safetensors")?;
    let batch = MicroBatch {
        input_ids: ints(&file, "input_ids")?,
        targets: ints(&file, "labels")?,
        positions: ints(&file, "position_ids")?,
        cu_seqlens: ints(&file, "cu_seqlens")?,
        weights: None,
        images: images(&file)?,
    };
    let scratch = tempfile::tempdir().map_err(|e| Error::io(dir, &e))?;
    let (base, adapter) = (model_of(dir, scratch.path())?, dir.join("adapter"));
    let lora = adapter.is_dir().then(|| LoraConfig::from_dir(&adapter)).transpose()?;
    let options = EngineOptions {
        dtype,
        recompute,
        lora: lora.map(|config| LoraOptions { config, seed: 0 }),
        loss_seq_chunk_size: Some(37),
        max_batch: batch.size(),
        adam: Adam {
            beta1: number(&optimizer["betas"][0])?,
            beta2: number(&optimizer["betas"][1])?,
            epsilon: number(&optimizer["eps"])?,
            weight_decay: number(&optimizer["weight_decay"])?,
        },
        ..EngineOptions::default()
    };
    let max_grad_norm = number(&optimizer["max_grad_norm"])?;
    let mut engine = Engine::open(backend, &base, Weights::Checkpoint, &options)?;
    // What is trained.
    let mut names = engine.tensor_names();
    if options.lora.is_some() {
        engine.load_adapter(&adapter)?;
        names = engine.lora().map(Lora::stored).unwrap_or_default().iter().map(|(_, spec)| spec.name.clone()).collect();
    }

    let forward = open("forward.safetensors")?;
    let inspection = engine.inspect(&batch)?;
    let bounds = Bounds::of(dtype, !inspection.router_logits.is_empty());
    let logits = [("logits".to_string(), inspection.logits, floats(&forward, "logits")?)];
    let mut nll = Figure::new("nll", bounds.nll);
    nll.note("nll", difference(&inspection.nll, &floats(&forward, "nll")?));
    let mut router = Vec::new();
    for (i, values) in inspection.router_logits.into_iter().enumerate() {
        let name = format!("router_logits.{i}");
        // The cases of adapters have none.
        if options.lora.is_some() && forward.info(&name).is_none() {
            continue;
        }
        let expected = floats(&forward, &name)?;
        router.push((name, values, expected));
    }

    let mut seen = Vec::new();
    for (i, values) in inspection.image_features.into_iter().enumerate() {
        let name = i.checked_sub(1).map_or_else(|| "image_embeds".to_owned(), |i| format!("deepstack.{i}"));
        let expected = floats(&forward, &name)?;
        seen.push((name, values, expected));
    }

    let mut gradients = Vec::new();
    engine.gradients(std::slice::from_ref(&batch))?;
    let file = Expected::open(&dir.join("grads.safetensors"), &base, engine.lora())?;
    for name in &names {
        let actual = engine.read_tensor(name, Kind::Gradients)?;
        let expected = file.floats(name, actual.len())?;
        gradients.push((name.clone(), actual, expected));
    }

    let steps = curve["steps"].as_array().ok_or_else(|| damaged("it has no steps"))?;
    let steps: Vec<[f64; 3]> = steps
        .iter()
        .map(|step| Ok([number(&step["lr"])?, number(&step["loss"])?, number(&step["grad_norm"])?].map(f64::from)))
        .collect::<Result<_>>()?;
    let run = Training { batch, rates: steps.iter().map(|step| step[0] as f32).collect(), max_grad_norm };
    let computed = run.curve(&mut engine)?;
    let trained =
        if options.lora.is_some() { "adapter_trained/adapter_model.safetensors" } else { "trained.safetensors" };
    let file = Expected::open(&dir.join(trained), &base, engine.lora())?;
    let mut weights = Vec::new();
    for name in &names {
        let actual = engine.read_tensor(name, Kind::Weights)?;
        let expected = file.floats(name, actual.len())?;
        weights.push((name.clone(), actual, expected));
    }
    let compare = |rounding: &Rounding| {
        let (mut losses, mut norms) = (Figure::new("curve", bounds.curve), Figure::new("norms", bounds.norms));
        for (i, (&[_, loss, norm], computed)) in steps.iter().zip(&computed).enumerate() {
            let place = format!("step {i}");
            losses.note_beside(&place, (computed[0] - loss).abs(), rounding.loss(i, bounds.curve));
            norms.note_beside(&place, (computed[1] - norm).abs() / norm, rounding.norm(i, bounds.norms));
        }
        let mut trained = Figure::new("trained", bounds.trained);
        for (name, actual, expected) in &weights {
            trained.note_beside(name, difference(actual, expected), rounding.trained);
        }
        [losses, norms, trained]
    };
    let mut training = compare(&Rounding::none(steps.len()));
    if dtype == DType::F32 && training.iter().any(Figure::failed) {
        training = compare(&Rounding::measure(dir, &options, &run, &computed, &weights)?);
    }
    let name = dir.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
    let mut figures = figures_of("logits", "their cosine", &logits, bounds.forward);
    if !seen.is_empty() {
        figures.extend(figures_of("images", "their cosine", &seen, bounds.forward));
        if dtype == DType::F32 {
            figures.push(frozen::figure(dir, &options, &run)?);
        }
    }
    figures.extend(figures_of("router", "its cosine", &router, bounds.forward));
    figures.extend(figures_of("gradients", "their cosine", &gradients, bounds.gradients));
    figures.push(nll);
    figures.extend(training);
    if options.lora.is_some() {
        figures.push(merged(dir, &base)?);
    }
    Ok(Outcome { name, figures })
}

/// The steps of a case.
struct Training {
    batch: MicroBatch,
    /// Of each step.
    rates: Vec<f32>,
    max_grad_norm: f32,
}

impl Training {
    /// Loss and norm of the gradients of each step.
    fn curve<B: Backend + ?Sized>(&self, engine: &mut Engine<B>) -> Result<Vec<[f64; 2]>> {
        let step = |&learning_rate: &f32| {
            let hyper = Hyper { learning_rate, max_grad_norm: self.max_grad_norm };
            let stats = engine.step(std::slice::from_ref(&self.batch), hyper)?;
            Ok([stats.loss, stats.grad_norm])
        };
        self.rates.iter().map(step).collect()
    }
}

/// A file of gradients or trained weights: with a model's names and layouts, or with an adapter's.
enum Expected {
    Model(Checkpoint),
    Adapter(AdapterFile),
}

impl Expected {
    fn open(path: &Path, base: &Path, lora: Option<&Lora>) -> Result<Self> {
        Ok(match lora {
            None => {
                // Open files stay mapped when the folder is gone.
                let folder = tempfile::tempdir().map_err(|e| Error::io(path, &e))?;
                let copied = std::fs::copy(path, folder.path().join("model.safetensors"));
                copied.map_err(|e| Error::io(path, &e))?;
                Expected::Model(Checkpoint::open(folder.path(), &ModelConfig::from_dir(base)?)?)
            }
            Some(lora) => Expected::Adapter(AdapterFile::open_file(path, lora)?),
        })
    }

    /// A tensor by its name in the engine.
    fn floats(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        let mut values = vec![0f32; len];
        match self {
            Expected::Model(file) => file.read_f32(name, &mut values)?,
            Expected::Adapter(file) => file.read_f32(name, &mut values)?,
        }
        Ok(values)
    }
}

/// How far the trained adapter of a case, merged into its model, is from PEFT's merge.
fn merged(dir: &Path, base: &Path) -> Result<Figure> {
    let out = tempfile::tempdir().map_err(|e| Error::io(dir, &e))?;
    merge_adapter(base, &dir.join("adapter_trained"), out.path(), None)?;
    let actual = SafetensorsFile::open(&out.path().join("model.safetensors"))?;
    let expected = SafetensorsFile::open(&dir.join("merged.safetensors"))?;
    let mut figure = Figure::new("merged", 1e-5);
    for name in expected.names() {
        figure.note(&name, difference(&floats(&actual, &name)?, &floats(&expected, &name)?));
    }
    Ok(figure)
}

/// The model's folder: with an adapter a folder of its own.
fn base_of(dir: &Path) -> PathBuf {
    let base = dir.join("base");
    if base.is_dir() { base } else { dir.to_path_buf() }
}

/// The model's folder; of a case in 4 bits one that is written to `scratch`.
fn model_of(dir: &Path, scratch: &Path) -> Result<PathBuf> {
    if !dir.join("quantised.safetensors").is_file() {
        return Ok(base_of(dir));
    }
    nf4_folder::write_nf4_folder(dir, scratch)?;
    Ok(scratch.to_owned())
}

/// Why a case cannot run: what it is about is not built.
pub fn not_built(dir: &Path) -> Option<String> {
    let config = match ModelConfig::from_dir(&base_of(dir)) {
        Err(error) => return Some(error.message),
        Ok(config) => config,
    };
    if !dir.join("adapter").is_dir() {
        return None;
    }
    let lora = LoraConfig::from_dir(&dir.join("adapter")).and_then(|lora| Lora::new(&config, &lora));
    lora.err().map(|error| format!("{} ({})", error.message, error.hint))
}

/// The cases of a folder, by name.
pub fn cases(folder: &Path) -> Vec<PathBuf> {
    let files = ["batch.safetensors", "forward.safetensors", "grads.safetensors", "curve.json"];
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let is_case =
        |dir: &PathBuf| files.iter().all(|file| dir.join(file).is_file()) && base_of(dir).join("config.json").is_file();
    let mut cases: Vec<PathBuf> = entries.filter(is_case).collect();
    cases.sort();
    cases
}

fn main() -> std::process::ExitCode {
    let mut folders: Vec<PathBuf> = std::env::args().skip(1).map(PathBuf::from).collect();
    if folders.is_empty() {
        let folder = std::env::var("ARL_GOLDEN").unwrap_or_else(|_| "../shared/golden".to_owned());
        folders.push(PathBuf::from(folder));
    }
    let mut passed = true;
    let mut all = Vec::new();
    for folder in folders {
        let cases = cases(&folder);
        if cases.is_empty() {
            eprintln!("{}: no golden cases there", folder.display());
            passed = false;
        }
        all.extend(cases);
    }
    for case in all {
        if let Some(why) = not_built(&case) {
            println!("SKIPPED {}: {why}", case.display());
            continue;
        }
        match run_case(&case, Recompute::Norms) {
            Ok(outcome) => {
                println!("{}", outcome.line());
                passed &= outcome.passed();
            }
            Err(error) => {
                println!("FAILED {}: {error}", case.display());
                passed = false;
            }
        }
    }
    if passed { std::process::ExitCode::SUCCESS } else { std::process::ExitCode::FAILURE }
}
