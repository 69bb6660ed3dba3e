//! The classifier: chunks of logits over the positions that have a target, never `[T, vocab]`.

use arl_model::Result;

use super::Step;
use crate::backend::{Backend, Buffer, CrossEntropy, DType, Rows};
use crate::blocks::Run;
use crate::placement::Param;
use crate::placement::arena::Category;
use crate::token_slice::Sliced;

/// What the classifier pass is for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum LossMode {
    /// Loss and gradient.
    Train {
        /// The loss scale over the weight of all targets of the optimizer step.
        scale: f32,
        /// `[T, H]`: gradient of the head's input.
        d_norm: Buffer,
    },
    /// Loss alone.
    Evaluate,
}

impl<B: Backend + ?Sized> Step<'_, B> {
    /// From the head's input to `run.sums`, and in training to `d_norm` and the head's gradient.
    pub(crate) fn loss(&mut self, run: &Run, mode: LossMode) -> Result<()> {
        let (h, v) = (self.model.shape.hidden, self.model.shape.vocab);
        let (inputs, r) = (&run.inputs, run.inputs.target_rows);
        self.backend.zero(run.sums);
        if let LossMode::Train { d_norm, .. } = mode {
            self.backend.zero(d_norm);
        }
        if r > 0 || run.inputs.is_slice() {
            self.need(self.model.head_part())?;
        }
        if r == 0 {
            if matches!(mode, LossMode::Train { .. }) && run.first {
                self.clear_head();
            }
            return Ok(());
        }

        let chunk = self.model.loss_chunk.min(r);
        let top = self.arena.mark();
        let hidden = self.take(Category::LogitsChunk, self.model.dtype, chunk * h);
        let logits = self.take(Category::LogitsChunk, self.model.logits_dtype, chunk * v);
        let low = self.take(Category::LogitsChunk, self.model.dtype, chunk * self.model.head.kept());
        // The head's adapter reads the rows after the product with its weight gave their gradient.
        let d_hidden = if self.model.head.kept() > 0 && matches!(mode, LossMode::Train { .. }) {
            self.take(Category::LogitsChunk, self.model.dtype, chunk * h)
        } else {
            hidden
        };
        // Logits of 16 bits hold their gradient in the same type.
        let gradient_dtype = match logits.dtype {
            DType::F32 => self.backend.logits_gradient(self.model.dtype),
            narrow => narrow,
        };
        for start in (0..r).step_by(chunk) {
            let n = chunk.min(r - start);
            let (hidden, logits) = (hidden.slice(0, n * h), logits.slice(0, n * v));
            let (low, d_hidden) = (low.slice(0, n * self.model.head.kept()), d_hidden.slice(0, n * h));
            let rows = inputs.rows.slice(start, n);
            self.backend.gather_rows(run.final_norm, rows, 1, h, hidden);
            self.logits_keeping(hidden, n, low, logits);
            // A row of the gradient begins where its row of logits begins.
            let d_logits = logits.view(gradient_dtype);
            let d_logits = Rows { buffer: d_logits, stride: d_logits.len / n };
            let (scale, gradient) = match mode {
                LossMode::Train { scale, .. } => (scale, Some(d_logits)),
                LossMode::Evaluate => (0.0, None),
            };
            self.backend.cross_entropy(&CrossEntropy {
                rows: n,
                vocab: v,
                logits,
                targets: inputs.targets.slice(start, n),
                weights: inputs.weights.slice(start, n),
                scale,
                gradient,
                nll: inputs.nll.slice(start, n),
                correct: inputs.correct.slice(start, n),
                entropy: inputs.entropy.slice(start, n),
            });
            if let LossMode::Train { d_norm, .. } = mode {
                // Without an adapter the gradient of the rows replaces them.
                let (head, cx) = (self.model.head, &mut self.context());
                head.backward(cx, d_logits, hidden, low, d_hidden, n, !(run.first && start == 0));
                self.backend.scatter_rows(d_hidden, rows, h, d_norm);
            }
        }
        self.arena.release(top);
        self.backend.dot(inputs.nll, inputs.weights, run.sums.slice(0, 1));
        self.backend.dot(inputs.correct, inputs.ones, run.sums.slice(1, 1));
        self.backend.dot(inputs.entropy, inputs.ones, run.sums.slice(2, 1));
        Ok(())
    }

    /// Zeroes the gradients that the head's products would assign, for a slice without targets.
    fn clear_head(&mut self) {
        let assigned: Vec<Param> = self.model.head.assigned().collect();
        for gradient in assigned.into_iter().filter_map(|param| self.model.store.gradient(param)) {
            self.backend.zero(gradient);
        }
    }

    /// The loss of each sequence of a slice of a micro-batch whose classifier pass is queued, as far as the slice has the sequence,
    /// into `losses` f64 `[sequences]`, which is zero.
    pub(crate) fn sum_sequences(&mut self, sliced: Sliced<'_>, run: &Run, losses: Buffer) {
        let (mut first, own) = (0, sliced.tokens());
        for (s, ends) in sliced.batch.cu_seqlens.windows(2).enumerate() {
            let count = sliced.targets(own.start.max(ends[0] as usize)..own.end.min(ends[1] as usize));
            if count > 0 {
                let part = |buffer: Buffer| buffer.slice(first, count);
                self.backend.dot(part(run.inputs.nll), part(run.inputs.weights), losses.slice(s, 1));
            }
            first += count;
        }
    }

    /// Logits of `rows` consecutive rows of `hidden` `[rows, H]`.
    pub(crate) fn logits(&mut self, hidden: Buffer, rows: usize, logits: Buffer) -> Result<()> {
        self.need(self.model.head_part())?;
        let top = self.arena.mark();
        let low = self.take(Category::Workspace, self.model.dtype, rows * self.model.head.kept());
        self.logits_keeping(hidden, rows, low, logits);
        self.arena.release(top);
        Ok(())
    }

    /// [`Step::logits`], with what the backward pass needs of them in `low`.
    fn logits_keeping(&mut self, hidden: Buffer, rows: usize, low: Buffer, logits: Buffer) {
        let head = self.model.head;
        head.forward(&mut self.context(), hidden, logits, low, rows);
    }
}
