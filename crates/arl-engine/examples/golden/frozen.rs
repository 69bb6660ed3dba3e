//! The curve of a case with its vision tower frozen.

use std::path::Path;

use arl_engine::backend::cpu::CpuBackend;
use arl_engine::{Engine, EngineOptions, Kind, Weights};
use arl_model::{Error, ErrorCode, Result};

use super::Training;
use super::figures::Figure;

/// How far losses and norms of the gradients are from transformers', and the frozen weights from what they were.
pub(super) fn figure(dir: &Path, options: &EngineOptions, run: &Training) -> Result<Figure> {
    let path = dir.join("curve_frozen.json");
    let damaged = |what: &str| Error::new(ErrorCode::Data, format!("{}: {what}", path.display()));
    let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, &e))?;
    let curve: serde_json::Value = serde_json::from_str(&text).map_err(|e| damaged(&e.to_string()))?;
    let frozen = curve["frozen"].as_str().ok_or_else(|| damaged("it names nothing frozen"))?;
    let options = EngineOptions { frozen: vec![format!("{frozen}.*")], ..options.clone() };
    let mut engine = Engine::open(Box::new(CpuBackend::new()), dir, Weights::Checkpoint, &options)?;
    let kept: Vec<String> = engine.tensor_names().into_iter().filter(|name| name.starts_with(frozen)).collect();
    let before = kept.iter().map(|name| engine.read_tensor(name, Kind::Weights)).collect::<Result<Vec<_>>>()?;
    let mut figure = Figure::new("frozen", 1e-4);
    let steps = curve["steps"].as_array().ok_or_else(|| damaged("it has no steps"))?;
    for (i, (computed, step)) in run.curve(&mut engine)?.iter().zip(steps).enumerate() {
        let number = |key: &str| step[key].as_f64().ok_or_else(|| damaged("a number is missing"));
        let (loss, norm) = (number("loss")?, number("grad_norm")?);
        figure.note(&format!("step {i}"), (computed[0] - loss).abs().max((computed[1] - norm).abs() / norm / 10.0));
    }
    for (name, before) in kept.iter().zip(&before) {
        let same = engine.read_tensor(name, Kind::Weights)? == *before;
        figure.note(name, if same { 0.0 } else { f64::INFINITY });
    }
    Ok(figure)
}
