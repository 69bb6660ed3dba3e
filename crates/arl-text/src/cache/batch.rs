//! Samples side by side, as the engine takes them.

use arl_model::{Error, ErrorCode, Result};

use super::CachedSample;
use crate::encoder::MeasuredImage;
use crate::vision::VisionTokens;

/// An image of a micro-batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchImage {
    /// The row that has it.
    pub row: u32,
    /// Which image of that row it is.
    pub place: u32,
    /// The image as it was measured.
    pub image: MeasuredImage,
}

/// One row of `T` tokens that holds several samples; attention does not cross `cu_seqlens`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MicroBatch {
    /// `[T]` tokens.
    pub input_ids: Vec<i32>,
    /// `[T]`: position t is scored against `targets[t]`, the token after it; -100 is not trained.
    pub targets: Vec<i32>,
    /// `[T]`: from 0 in each sample; `[3, T]` (time, height, width) for models with three axes.
    pub positions: Vec<i32>,
    /// `[samples + 1]`: where each begins, and the end.
    pub cu_seqlens: Vec<i32>,
    /// `[T]`: weight of each target; absent where all are 1.
    pub weights: Option<Vec<f32>>,
    /// The images, in the order of their tokens.
    pub images: Vec<BatchImage>,
}

impl MicroBatch {
    /// `samples`, each with the row that it is of, side by side. `vision`: how images became tokens, where they did.
    ///
    /// # Errors
    /// `ARL_DATA` for too many tokens, `ARL_INTERNAL` where a sample's images are not those of its tokens.
    pub(super) fn of(samples: &[(u32, CachedSample)], vision: Option<&VisionTokens>) -> Result<Self> {
        let mut batch = Self { cu_seqlens: vec![0], ..Self::default() };
        let mut axes: [Vec<i32>; 3] = Default::default();
        for (row, sample) in samples {
            batch.push(sample)?;
            let measured: Vec<MeasuredImage> = sample.images.iter().map(|(_, image)| *image).collect();
            match vision.filter(|vision| vision.axes) {
                Some(vision) => vision.push_positions(&sample.ids, &measured, &mut axes)?,
                None => batch.positions.extend(0..sample.ids.len() as i32),
            }
            let image = |&(place, image): &(u32, MeasuredImage)| BatchImage { row: *row, place, image };
            batch.images.extend(sample.images.iter().map(image));
        }
        if vision.is_some_and(|vision| vision.axes) {
            batch.positions = axes.concat();
        }
        Ok(batch)
    }

    /// Appends a sample's tokens. A token is a target if it is trained and another precedes it in its sample.
    fn push(&mut self, CachedSample { ids, runs, .. }: &CachedSample) -> Result<()> {
        let start = self.input_ids.len();
        let end = i32::try_from(start + ids.len())
            .map_err(|_| Error::new(ErrorCode::Data, "a micro-batch has more than 2^31 tokens"))?;
        self.input_ids.extend(ids.iter().map(|&id| id as i32));
        self.targets.resize(end as usize, -100);
        if let Some(weights) = &mut self.weights {
            weights.resize(end as usize, 1.0);
        }
        self.cu_seqlens.push(end);
        let mut at = 0;
        for run in runs {
            let next = at + run.length as usize;
            if run.weight > 0.0 {
                // Token t is the target of position t - 1.
                let first = at.max(1);
                for (target, &id) in
                    self.targets[start + first - 1..].iter_mut().zip(ids.get(first..next).unwrap_or_default())
                {
                    *target = id as i32;
                }
                if run.weight != 1.0 {
                    let weights = self.weights.get_or_insert_with(|| vec![1.0; end as usize]);
                    weights[start + at.max(1) - 1..start + next.max(1) - 1].fill(run.weight);
                }
            }
            at = next;
        }
        Ok(())
    }
}
