//! The curve of a case with its vision tower frozen.

use std::path::Path;

use arl_engine::backend::cpu::CpuBackend;
use arl_engine::{Engine, EngineOptions, Kind, Weights};
use arl_model::{Error, ErrorCode, Result};

use super::Training;
use super::figures::Figure;
use super::rounding::Rounding;

/// Most that a loss may be apart.
const LOSS: f64 = 1e-4;

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
    let steps = curve["steps"].as_array().ok_or_else(|| damaged("it has no steps"))?;
    let number = |value: &serde_json::Value| value.as_f64().ok_or_else(|| damaged("a number is missing"));
    let expected = |step: &serde_json::Value| Ok([number(&step["loss"])?, number(&step["grad_norm"])?]);
    let steps: Vec<[f64; 2]> = steps.iter().map(expected).collect::<Result<_>>()?;
    let computed = run.curve(&mut engine)?;
    let compare = |rounding: &Rounding| {
        // A norm of the gradients may be ten times as far away, as in the other curve.
        let mut figure = Figure::new("frozen", LOSS);
        for (i, ([loss, norm], [expected_loss, expected_norm])) in computed.iter().zip(&steps).enumerate() {
            let place = format!("step {i}");
            figure.note_beside(&place, (loss - expected_loss).abs(), rounding.loss(i, LOSS));
            let apart = (norm - expected_norm).abs() / expected_norm;
            figure.note_beside(&place, apart / 10.0, rounding.norm(i, 10.0 * LOSS) / 10.0);
        }
        figure
    };
    let mut figure = compare(&Rounding::none(steps.len()));
    if figure.failed() {
        figure = compare(&Rounding::measure(dir, &options, run, &computed, &[])?);
    }
    for (name, before) in kept.iter().zip(&before) {
        let same = engine.read_tensor(name, Kind::Weights)? == *before;
        figure.note(name, if same { 0.0 } else { f64::INFINITY });
    }
    Ok(figure)
}
