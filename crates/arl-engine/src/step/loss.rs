//! The classifier: chunks of logits over the positions that have a target, never `[T, vocab]`.

use super::{Run, Step};
use crate::arena::Category;
use crate::backend::{Backend, Buffer, CrossEntropy, DType, Layout, Matmul, Rows};

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
    pub(crate) fn loss(&mut self, run: &Run, mode: LossMode) {
        let (h, v) = (self.model.shape.hidden, self.model.shape.vocab);
        let (inputs, r) = (&run.inputs, run.inputs.target_rows);
        self.backend.zero(run.sums);
        if let LossMode::Train { d_norm, .. } = mode {
            self.backend.zero(d_norm);
        }
        if r == 0 {
            return;
        }

        let chunk = self.model.loss_chunk.min(r);
        let top = self.arena.mark();
        let hidden = self.take(Category::LogitsChunk, self.model.dtype, chunk * h);
        let logits = self.take(Category::LogitsChunk, DType::F32, chunk * v);
        for start in (0..r).step_by(chunk) {
            let n = chunk.min(r - start);
            let (hidden, logits) = (hidden.slice(0, n * h), logits.slice(0, n * v));
            let rows = inputs.rows.slice(start, n);
            self.backend.gather_rows(run.final_norm, rows, 1, h, hidden);
            self.linear(hidden, self.model.params.head, None, logits, n);
            // A row of the gradient lies at the beginning of the memory of its row of logits.
            let d_logits = logits.view(self.backend.logits_gradient(self.model.dtype));
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
                self.head_backward(d_logits, hidden, n);
                self.backend.scatter_rows(hidden, rows, h, d_norm);
            }
        }
        self.arena.release(top);
        self.backend.dot(inputs.nll, inputs.weights, run.sums.slice(0, 1));
        self.backend.dot(inputs.correct, inputs.ones, run.sums.slice(1, 1));
        self.backend.dot(inputs.entropy, inputs.ones, run.sums.slice(2, 1));
    }

    /// From `[rows, V]` gradients of logits, the head's gradient, which is added to, and that of `hidden` `[rows, H]`,
    /// which replaces it.
    fn head_backward(&mut self, d_logits: Rows, hidden: Buffer, rows: usize) {
        let (h, v) = (self.model.shape.hidden, self.model.shape.vocab);
        let hidden = Rows { buffer: hidden, stride: h };
        let head = Rows { buffer: self.weight(self.model.params.head), stride: h };
        let d_head = Rows { buffer: self.gradient(self.model.params.head), stride: h };
        let product = Matmul {
            layout: Layout::Tn,
            m: v,
            n: h,
            k: rows,
            a: d_logits,
            b: hidden,
            c: d_head,
            accumulate: true,
            bias: None,
        };
        self.backend.matmul(&product);
        let product = Matmul { layout: Layout::Nn, m: rows, k: v, b: head, c: hidden, accumulate: false, ..product };
        self.backend.matmul(&product);
    }

    /// Logits of `rows` consecutive rows of `hidden` `[rows, H]`.
    pub(crate) fn logits(&mut self, hidden: Buffer, rows: usize, logits: Buffer) {
        let (h, v) = (self.model.shape.hidden, self.model.shape.vocab);
        let head = self.model.store.weight(self.model.params.head);
        self.backend.matmul(&Matmul {
            layout: Layout::Nt,
            m: rows,
            n: v,
            k: h,
            a: Rows { buffer: hidden, stride: h },
            b: Rows { buffer: head, stride: h },
            c: Rows { buffer: logits, stride: v },
            accumulate: false,
            bias: None,
        });
    }
}
