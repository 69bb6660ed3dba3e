//! Runs every golden case of a folder: a small model, a batch, and what transformers computed with them.
//!
//! `golden [FOLDER ...]`; without one, the folder that `ARL_GOLDEN` names. A case is any subfolder with `config.json`,
//! `model.safetensors`, `batch.safetensors`, `forward.safetensors`, `grads.safetensors`, `curve.json` and
//! `trained.safetensors`; or, of an adapter, with the model in `base`, PEFT's folders `adapter` and `adapter_trained`, and
//! `merged.safetensors`. Prints one line a case with the worst figure of each kind; exits with 1 if one is too large.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command's output")]
#![allow(dead_code, reason = "the test includes this file, and does not call main")]

#[path = "../tests/common/nf4_folder.rs"]
#[allow(unreachable_pub, missing_docs, reason = "shared with tests")]
mod nf4_folder;

use std::path::{Path, PathBuf};

use arl_engine::backend::cpu::CpuBackend;
use arl_engine::backend::{Backend, DType};
use arl_engine::{Adam, BatchSize, Engine, EngineOptions, Hyper, Kind, LoraOptions, MicroBatch, Recompute, Weights};
use arl_model::{
    AdapterFile, Checkpoint, Error, ErrorCode, Lora, LoraConfig, ModelConfig, Result, SafetensorsFile, merge_adapter,
};

/// How far from transformers' f32 a type of weights and activations may be.
#[derive(Clone, Copy)]
struct Bounds {
    /// Logits and routers' logits, tensor by tensor: `|a - b| / |b|`. `None`: by [`COSINE`] and [`NORM`].
    forward: Option<f64>,
    /// The same of gradients.
    gradients: Option<f64>,
    /// Negative log-likelihoods: `|a - b| / |b|`.
    nll: f64,
    /// A loss of the curve.
    curve: f64,
    /// A gradient norm of the curve: `|a - b| / |b|`.
    norms: f64,
    /// Trained weights: `|a - b| / |b|`, tensor by tensor.
    trained: f64,
}

/// Most that the cosine of all tensors of a kind may be below 1 in bf16, and that their norm may differ. A single tensor tells
/// nothing: a rounding may send a token to another expert.
const COSINE: f64 = 1e-3;
const NORM: f64 = 1e-2;

impl Bounds {
    /// `experts`: whether layers have a router.
    fn of(dtype: DType, experts: bool) -> Self {
        match dtype {
            DType::F32 => Bounds {
                forward: Some(1e-4),
                gradients: Some(1e-4),
                nll: 1e-4,
                curve: 1e-4,
                norms: 1e-3,
                trained: 1e-3,
            },
            // f16 keeps 11 bits: weights and activations are rounded by up to 2^-12 at some twenty places of the forward pass,
            // which makes 5e-3, and at as many of the backward pass. A loss of some 4 nats may be 4 times the first apart; but
            // where rounding makes a router choose another expert for one of some 40 tokens, by 4 nats of that one. Trained
            // weights ten times, as in f32, for AdamW makes a whole step of a gradient that is nothing but rounding.
            DType::F16 => {
                let curve = if experts { 0.1 } else { 2e-2 };
                // That token's own logits are then of another size of error: in `qwen3-moe` of the shared cases one token of 128,
                // whose second and third experts' logits are 9e-4 apart, makes 7.9e-3, and all the others together 1.4e-3.
                let forward = if experts { None } else { Some(5e-3) };
                Bounds { forward, gradients: Some(1e-2), nll: 5e-3, curve, norms: 10.0 * curve, trained: 5e-2 }
            }
            // Beside the two above, about twice what the roundings of bf16 do on the CPU.
            _ => Bounds { forward: None, gradients: None, nll: 2e-3, curve: 2e-2, norms: 0.15, trained: 5e-2 },
        }
    }
}

/// A tensor's name, what was computed, and what it should be.
type Compared = (String, Vec<f32>, Vec<f32>);

/// The figures of the tensors of a kind.
fn figures_of(kind: &'static str, of_cosine: &'static str, tensors: &[Compared], bound: Option<f64>) -> Vec<Figure> {
    if let Some(bound) = bound {
        let mut figure = Figure::new(kind, bound);
        tensors.iter().for_each(|(name, a, b)| figure.note(name, difference(a, b)));
        return vec![figure];
    }
    if tensors.is_empty() {
        return Vec::new();
    }
    let pairs = || tensors.iter().flat_map(|(_, a, b)| a.iter().zip(b).map(|(&a, &b)| (f64::from(a), f64::from(b))));
    let sum = |f: fn(f64, f64) -> f64| pairs().map(|(a, b)| f(a, b)).sum::<f64>();
    let (of_a, of_b) = (sum(|a, _| a * a).sqrt(), sum(|_, b| b * b).sqrt());
    let (mut norm, mut cosine) = (Figure::new(kind, NORM), Figure::new(of_cosine, COSINE));
    norm.note("all", (of_a - of_b).abs() / of_b);
    cosine.note("all", 1.0 - sum(|a, b| a * b) / (of_a * of_b));
    vec![norm, cosine]
}

/// The worst figure of one kind, where it is, and the bound on it.
pub struct Figure {
    kind: &'static str,
    worst: f64,
    place: String,
    bound: f64,
}

impl Figure {
    fn new(kind: &'static str, bound: f64) -> Self {
        Figure { kind, worst: 0.0, place: String::new(), bound }
    }

    fn note(&mut self, place: &str, value: f64) {
        // A NaN is worse than anything.
        if value.is_nan() || value > self.worst {
            self.worst = if value.is_nan() { f64::INFINITY } else { value };
            self.place = place.to_owned();
        }
    }
}

/// What a case came to.
pub struct Outcome {
    /// The folder's name.
    pub name: String,
    /// By kind.
    pub figures: Vec<Figure>,
}

impl Outcome {
    /// Whether every figure is within its bound.
    pub fn passed(&self) -> bool {
        self.figures.iter().all(|f| f.worst <= f.bound)
    }

    /// One line.
    pub fn line(&self) -> String {
        let mut line = format!("{} {}:", if self.passed() { "ok    " } else { "FAILED" }, self.name);
        for figure in &self.figures {
            line += &format!("  {} {:.1e}", figure.kind, figure.worst);
            if figure.worst > figure.bound {
                line += &format!(" > {:.0e} at {}", figure.bound, figure.place);
            }
        }
        line
    }
}

fn difference(a: &[f32], b: &[f32]) -> f64 {
    if a.len() != b.len() {
        return f64::INFINITY;
    }
    let square = |x: f64| x * x;
    let error: f64 = a.iter().zip(b).map(|(&a, &b)| square(f64::from(a) - f64::from(b))).sum();
    let norm: f64 = b.iter().map(|&b| square(f64::from(b))).sum();
    if error == 0.0 { 0.0 } else { (error / norm).sqrt() }
}

fn ints(file: &SafetensorsFile, name: &str) -> Result<Vec<i32>> {
    let bytes = file.bytes(name)?.as_chunks::<8>().0;
    Ok(bytes.iter().map(|&b| i64::from_le_bytes(b) as i32).collect())
}

fn floats(file: &SafetensorsFile, name: &str) -> Result<Vec<f32>> {
    let mut values = vec![0f32; file.info(name).map_or(0, |(_, shape)| shape.iter().product())];
    file.read_f32(name, &mut values)?;
    Ok(values)
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
    };
    let scratch = tempfile::tempdir().map_err(|e| Error::io(dir, &e))?;
    let (base, adapter) = (model_of(dir, scratch.path())?, dir.join("adapter"));
    let lora = adapter.is_dir().then(|| LoraConfig::from_dir(&adapter)).transpose()?;
    let options = EngineOptions {
        dtype,
        recompute,
        lora: lora.map(|config| LoraOptions { config, seed: 0 }),
        loss_seq_chunk_size: Some(37),
        max_batch: BatchSize { tokens: batch.input_ids.len(), sequences: batch.cu_seqlens.len() - 1 },
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

    let mut gradients = Vec::new();
    engine.gradients(std::slice::from_ref(&batch))?;
    let file = Expected::open(&dir.join("grads.safetensors"), &base, engine.lora())?;
    for name in &names {
        let actual = engine.read_tensor(name, Kind::Gradients)?;
        let expected = file.floats(name, actual.len())?;
        gradients.push((name.clone(), actual, expected));
    }

    let (mut losses, mut norms) = (Figure::new("curve", bounds.curve), Figure::new("norms", bounds.norms));
    for (i, step) in curve["steps"].as_array().ok_or_else(|| damaged("it has no steps"))?.iter().enumerate() {
        let hyper = Hyper { learning_rate: number(&step["lr"])?, max_grad_norm };
        let stats = engine.step(std::slice::from_ref(&batch), hyper)?;
        let (loss, norm) = (f64::from(number(&step["loss"])?), f64::from(number(&step["grad_norm"])?));
        losses.note(&format!("step {i}"), (stats.loss - loss).abs());
        norms.note(&format!("step {i}"), (stats.grad_norm - norm).abs() / norm);
    }

    let trained =
        if options.lora.is_some() { "adapter_trained/adapter_model.safetensors" } else { "trained.safetensors" };
    let file = Expected::open(&dir.join(trained), &base, engine.lora())?;
    let mut trained = Figure::new("trained", bounds.trained);
    for name in &names {
        let actual = engine.read_tensor(name, Kind::Weights)?;
        trained.note(name, difference(&actual, &file.floats(name, actual.len())?));
    }
    let name = dir.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
    let mut figures = figures_of("logits", "their cosine", &logits, bounds.forward);
    figures.extend(figures_of("router", "its cosine", &router, bounds.forward));
    figures.extend(figures_of("gradients", "their cosine", &gradients, bounds.gradients));
    figures.extend([nll, losses, norms, trained]);
    if options.lora.is_some() {
        figures.push(merged(dir, &base)?);
    }
    Ok(Outcome { name, figures })
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
