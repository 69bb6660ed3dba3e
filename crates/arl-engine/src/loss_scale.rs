//! The scale of the loss of f16 training, which keeps small gradients above the least f16: torch's `GradScaler`. Knows
//! what a step came to, nothing of how it is computed.

use arl_model::{Error, ErrorCode, Result};

use crate::backend::DType;

/// How the scale begins and grows; the defaults are those of torch's `GradScaler`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossScaling {
    /// The first scale: a power of two, so that no product with it rounds.
    pub initial: f32,
    /// The scale doubles after this many good steps in a row.
    pub growth_interval: u32,
}

impl Default for LossScaling {
    fn default() -> Self {
        LossScaling { initial: 65536.0, growth_interval: 2000 }
    }
}

/// The scale of the next step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct LossScale {
    scale: f32,
    /// Good steps since the scale last changed.
    good_steps: u32,
    growth_interval: u32,
}

impl LossScale {
    /// The scale of a new run with weights of `dtype`; `None` where gradients need none.
    pub(crate) fn new(dtype: DType, options: LossScaling) -> Result<Option<Self>> {
        let LossScaling { initial, growth_interval } = options;
        if !is_scale(initial) || growth_interval == 0 {
            return Err(Error::new(
                ErrorCode::Config,
                format!("a loss scale of {initial} that doubles every {growth_interval} steps"),
            )
            .hint("it is a power of two, at least 1, and doubles after one step at least; usual are 65536 and 2000"));
        }
        Ok((dtype == DType::F16).then_some(LossScale { scale: initial, good_steps: 0, growth_interval }))
    }

    /// The factor on the loss.
    pub(crate) fn scale(&self) -> f32 {
        self.scale
    }

    /// After a step whose gradients were finite.
    fn grow(&mut self) {
        self.good_steps += 1;
        if self.good_steps >= self.growth_interval {
            self.good_steps = 0;
            if (self.scale * 2.0).is_finite() {
                self.scale *= 2.0;
            }
        }
    }

    /// After a step that is skipped, because its loss or a gradient was not finite. False where the scale is 1 already:
    /// then the scale was not the cause. (torch goes on halving, and so skips every further step of a run that is lost.)
    fn fall(&mut self) -> bool {
        if self.scale <= 1.0 {
            return false;
        }
        self.good_steps = 0;
        self.scale *= 0.5;
        true
    }

    /// As the metadata of a saved state.
    pub(crate) fn to_text(self) -> String {
        format!("{} {}", self.scale, self.good_steps)
    }

    /// The same with scale and steps of a saved state; `None` where `text` is none.
    pub(crate) fn restored(self, text: &str) -> Option<Self> {
        let (scale, good_steps) = text.split_once(' ')?;
        let scale = scale.parse().ok().filter(|scale| is_scale(*scale))?;
        Some(LossScale { scale, good_steps: good_steps.parse().ok()?, ..self })
    }
}

/// The scale after a step that came to `outcome`, an error where something was not finite. True where the step is to be
/// skipped; where it cannot be, the error.
pub(crate) fn settle(scale: &mut Option<LossScale>, outcome: Result<()>) -> Result<bool> {
    let Some(scale) = scale else { return outcome.map(|()| false) };
    match outcome {
        Ok(()) => {
            scale.grow();
            Ok(false)
        }
        Err(_) if scale.fall() => Ok(true),
        Err(error) => Err(Error::new(error.code, format!("{} at a loss scale of 1", error.message)).hint(
            "float16 holds no number above 65504, and this model may compute greater ones: use bf16; \
             or the learning rate is too high, or a row or weight damaged; nothing was updated",
        )),
    }
}

/// Whether a number is a power of two, and at least 1.
fn is_scale(scale: f32) -> bool {
    scale >= 1.0 && scale.is_finite() && scale.to_bits() << 9 == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scale(initial: f32, growth_interval: u32) -> LossScale {
        LossScale::new(DType::F16, LossScaling { initial, growth_interval }).unwrap().unwrap()
    }

    #[test]
    fn it_doubles_after_so_many_good_steps_in_a_row_and_halves_at_once() {
        let mut scale = scale(8.0, 3);
        let mut seen = Vec::new();
        // Good steps, and one that is skipped after two of them.
        for good in [true, true, true, true, true, false, true, true, true] {
            if good {
                scale.grow();
            } else {
                assert!(scale.fall());
            }
            seen.push(scale.scale());
        }
        assert_eq!(seen, [8.0, 8.0, 16.0, 16.0, 16.0, 8.0, 8.0, 8.0, 16.0]);
    }

    #[test]
    fn it_stays_between_1_and_what_f32_holds() {
        let mut low = scale(2.0, 1);
        assert_eq!((low.fall(), low.fall(), low.scale()), (true, false, 1.0));
        let mut high = scale(2f32.powi(127), 1);
        high.grow();
        assert_eq!(high.scale(), 2f32.powi(127));
    }

    #[test]
    fn a_saved_scale_is_restored_with_its_steps() {
        let mut saved = scale(65536.0, 3);
        saved.grow();
        assert_eq!(scale(1.0, 3).restored(&saved.to_text()), Some(saved));
        for text in ["", "3 1", "nan 0", "0.5 0", "8 -1", "8"] {
            assert_eq!(saved.restored(text), None, "{text}");
        }
    }

    #[test]
    fn only_f16_is_scaled_and_only_by_powers_of_two() {
        assert_eq!(LossScale::new(DType::Bf16, LossScaling::default()).unwrap(), None);
        for (initial, growth_interval) in [(3.0, 1), (0.5, 1), (f32::NAN, 1), (f32::INFINITY, 1), (2.0, 0)] {
            let error = LossScale::new(DType::F16, LossScaling { initial, growth_interval }).unwrap_err();
            assert_eq!(error.code, ErrorCode::Config);
        }
    }
}
