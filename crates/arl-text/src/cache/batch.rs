//! Samples side by side, as the engine takes them.

use arl_model::{Error, ErrorCode, Result};

use crate::encoder::Run;

/// One row of `T` tokens that holds several samples; attention does not cross `cu_seqlens`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MicroBatch {
    /// `[T]` tokens.
    pub input_ids: Vec<i32>,
    /// `[T]`: position t is scored against `targets[t]`, the token after it; -100 is not trained.
    pub targets: Vec<i32>,
    /// `[T]`: from 0 in each sample.
    pub positions: Vec<i32>,
    /// `[samples + 1]`: where each begins, and the end.
    pub cu_seqlens: Vec<i32>,
    /// `[T]`: weight of each target; absent where all are 1.
    pub weights: Option<Vec<f32>>,
}

impl MicroBatch {
    pub(crate) fn begin(&mut self) {
        self.cu_seqlens.push(0);
    }

    /// Appends a sample. A token is a target if it is trained and another precedes it in its sample.
    pub(crate) fn push(&mut self, ids: &[u32], runs: &[Run]) -> Result<()> {
        let start = self.input_ids.len();
        let end = i32::try_from(start + ids.len())
            .map_err(|_| Error::new(ErrorCode::Data, "a micro-batch has more than 2^31 tokens"))?;
        self.input_ids.extend(ids.iter().map(|&id| id as i32));
        self.positions.extend(0..ids.len() as i32);
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
