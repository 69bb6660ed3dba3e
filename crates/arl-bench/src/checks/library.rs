//! Attention by the device's own library against the CPU's. It gives other bits from run to run, which a leaf of the table may
//! not.

use arl_engine::AttentionChoice;
use arl_engine::backend::{Backend, DType};
use arl_model::{Error, ErrorCode, Result};

use super::draw::{Draw, Size};
use super::leaves::attention::by_library;
use super::reference::WithReference;
use super::trial::{Figures, Scene};

/// Most trials: making a plan takes up to a second, and each trial needs two.
const MOST_TRIALS: usize = 12;

/// What the trials came to.
pub(super) struct Outcome {
    /// That the library computed.
    pub(super) trials: usize,
    pub(super) figures: Figures,
    /// What it has no plan for, and why.
    pub(super) refused: Vec<String>,
}

/// Trials in bf16, over heads of 64 and 128 elements, with windows and without. Fails on the first that is wrong; and, where
/// the library and nothing else is asked for, on the first that it refuses.
pub(super) fn check(device: &mut dyn Backend, choice: AttentionChoice, shapes: usize, large: bool) -> Result<Outcome> {
    let mut both = WithReference::new(device)?;
    let mut outcome = Outcome { trials: 0, figures: Figures::default(), refused: Vec::new() };
    for number in 0..shapes.min(MOST_TRIALS) {
        let scene = Scene::new(Draw::new(900 + number as u64, Size::of(large)), DType::Bf16);
        let (trial, asked) = by_library(scene, number);
        if asked.is_sparse() {
            outcome
                .refused
                .push(format!("{}: most of its blocks would have no work, so the own kernels compute", trial.what));
            continue;
        }
        match both.device.use_attention_library(&[asked]) {
            Ok(()) => {
                both.compare(&trial, DType::Bf16, &mut outcome.figures)?;
                outcome.trials += 1;
            }
            Err(reason) if choice == AttentionChoice::Cudnn => {
                return Err(Error::new(ErrorCode::Device, format!("{}: {reason}", trial.what))
                    .hint("use --attention own, or auto, which takes the own kernels instead"));
            }
            Err(reason) => outcome.refused.push(format!("{}: {reason}", trial.what)),
        }
    }
    Ok(outcome)
}
