//! What rounding alone does to a case's training. Where a model amplifies the smallest differences from step to step, f32 does not
//! determine its curve: two right programs part as two runs of one of them do, whose weights begin one unit in the last place
//! apart. How far such runs part is measured here: a case is held to its bounds up to the step at which rounding comes near them, and
//! from there on to the spread of such runs, for a spike may come a step sooner or later.

use std::path::Path;

use arl_engine::backend::cpu::CpuBackend;
use arl_engine::{Engine, EngineOptions, Kind, Weights};
use arl_model::{Error, Result};

use super::figures::{Compared, difference};
use super::{Training, base_of};

/// Runs that are compared with the one from the weights as they are.
const RUNS: u32 = 4;

/// What rounding does.
pub(super) struct Rounding {
    /// By steps: most that a loss was apart up to there.
    losses: Vec<f64>,
    /// By steps: most that a norm of the gradients was apart up to there, relatively.
    norms: Vec<f64>,
    /// Most that a trained tensor was apart: `|a - b| / |b|`.
    pub(super) trained: f64,
}

impl Rounding {
    /// Nothing.
    pub(super) fn none(steps: usize) -> Self {
        Rounding { losses: vec![0.0; steps], norms: vec![0.0; steps], trained: 0.0 }
    }

    /// What it may do to the loss of a step whose bound is this.
    pub(super) fn loss(&self, step: usize, bound: f64) -> f64 {
        spread(&self.losses, step, bound)
    }

    /// What it may do to a step's norm of the gradients.
    pub(super) fn norm(&self, step: usize, bound: f64) -> f64 {
        spread(&self.norms, step, bound)
    }

    /// Trains from weights that are one unit in the last place apart, and compares with what came of the weights as they are.
    pub(super) fn measure(
        dir: &Path,
        options: &EngineOptions,
        training: &Training,
        curve: &[[f64; 2]],
        trained: &[Compared],
    ) -> Result<Self> {
        let mut rounding = Self::none(curve.len());
        for run in 0..RUNS {
            let folder = moved(&base_of(dir), run)?;
            let mut engine = Engine::open(Box::new(CpuBackend::new()), folder.path(), Weights::Checkpoint, options)?;
            if options.lora.is_some() {
                engine.load_adapter(&dir.join("adapter"))?;
            }
            let (mut loss, mut norm) = (0f64, 0f64);
            for (i, (a, b)) in training.curve(&mut engine)?.iter().zip(curve).enumerate() {
                loss = loss.max((a[0] - b[0]).abs());
                norm = norm.max((a[1] - b[1]).abs() / b[1]);
                rounding.losses[i] = rounding.losses[i].max(loss);
                rounding.norms[i] = rounding.norms[i].max(norm);
            }
            for (name, values, _) in trained {
                let apart = difference(&engine.read_tensor(name, Kind::Weights)?, values);
                rounding.trained = rounding.trained.max(apart);
            }
        }
        Ok(rounding)
    }
}

/// Nothing before the step at which rounding does a tenth of the bound; from there on the most that it does to any step.
fn spread(most: &[f64], step: usize, bound: f64) -> f64 {
    if most[step] > bound / 10.0 { most.last().copied().unwrap_or(0.0) } else { 0.0 }
}

/// The folder of a model whose f32 weights are each the same, the next one up or the next one down.
fn moved(base: &Path, run: u32) -> Result<tempfile::TempDir> {
    let failed = |error: std::io::Error| Error::io(base, &error);
    let folder = tempfile::tempdir().map_err(failed)?;
    std::fs::copy(base.join("config.json"), folder.path().join("config.json")).map_err(failed)?;
    let mut bytes = std::fs::read(base.join("model.safetensors")).map_err(failed)?;
    // The header, and before it the length of that.
    let header = bytes.first_chunk::<8>().map_or(0, |length| u64::from_le_bytes(*length)) as usize;
    let mut random = 0x9e37_79b9_7f4a_7c15u64.wrapping_mul(u64::from(run) + 1);
    for word in bytes[8 + header..].as_chunks_mut::<4>().0 {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let bits = u32::from_le_bytes(*word);
        if bits << 1 != 0 {
            *word = (bits + (random >> 33) as u32 % 3 - 1).to_le_bytes();
        }
    }
    std::fs::write(folder.path().join("model.safetensors"), bytes).map_err(failed)?;
    Ok(folder)
}
