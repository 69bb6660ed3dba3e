//! What every block computes with: the device, memory, weights and gradients, and the micro-batch.

use arl_model::Error;

use super::low_rank::LowRankDropout;
use crate::backend::{Backend, Buffer, DType, Layout, Matmul, Nf4Matmul, Nf4Weights, NormWeight, Product, Rows};
use crate::batch::{BatchSize, Inputs};
use crate::mesh::Place;
use crate::options::Recompute;
use crate::pipeline_parallel::Passed;
use crate::placement::Param;
use crate::placement::arena::{Arena, Category};
use crate::placement::quantized::Quantized;
use crate::placement::store::Store;
use crate::ranks::Ranks;
use crate::vision::Seen;

/// The device and its memory, during one micro-batch.
pub(crate) struct Context<'a, B: ?Sized> {
    pub(crate) backend: &'a mut B,
    pub(crate) arena: &'a mut Arena,
    pub(crate) store: &'a Store,
    pub(crate) quantized: &'a Quantized,
    /// Of this rank among all.
    pub(crate) place: &'a Place,
    /// Those that compute with this one; none in a dry run, and where this one computes alone.
    pub(crate) ranks: Option<&'a mut Ranks>,
    /// The first failure of an exchange with them.
    pub(crate) failure: &'a mut Option<Error>,
    /// Bytes that a dry run would have exchanged with them.
    pub(crate) planned: &'a mut u64,
    /// Of activations.
    pub(crate) dtype: DType,
    /// What norms add to their weights.
    pub(crate) norm_offset: f32,
    /// Attention is the device's own library's where it has a plan.
    pub(crate) attention_library: bool,
    /// Of adapters' inputs; none where no backward pass follows.
    pub(crate) dropout: Option<LowRankDropout>,
}

/// The state of one micro-batch. `T` tokens, `H` hidden size.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Run {
    pub(crate) inputs: Inputs,
    /// What the tower makes of its images.
    pub(crate) seen: Option<Seen>,
    /// What layers keep; `None`: nothing, because no backward pass follows.
    pub(crate) keep: Option<Recompute>,
    /// `[T, H]`: what a block adds to the residual stream; after the last one the stream itself.
    pub(crate) delta: Buffer,
    /// f32 `[T]`.
    pub(crate) final_inverse_rms: Buffer,
    /// `[T, H]`: the head's input.
    pub(crate) final_norm: Buffer,
    /// f64 `[3]`: weighted sum of the negative log-likelihoods, sums of right predictions and of entropies.
    pub(crate) sums: Buffer,
    /// f32 `[2, experts]`: choices and probabilities of each expert, all layers together.
    pub(crate) balance: Option<Buffer>,
    /// Factor on the loss whose gradients are computed.
    pub(crate) loss_scale: f32,
    /// Of adapters' inputs.
    pub(crate) dropout: Option<LowRankDropout>,
    /// What neighbouring stages of a pipeline pass of it; none where there is one stage.
    pub(crate) passed: Option<Passed>,
    /// Whether a step's gradients begin with this micro-batch: products assign them, and what is only ever added to was
    /// zeroed.
    pub(crate) first: bool,
}

impl Run {
    pub(crate) fn size(&self) -> BatchSize {
        self.inputs.size
    }
}

/// Takes a block's buffers: the last level at which one is kept, its type and its length.
pub(crate) type Take<'a> = dyn FnMut(Recompute, DType, usize) -> Buffer + 'a;

impl<B: Backend + ?Sized> Context<'_, B> {
    /// Takes memory whose contents are of no use.
    pub(crate) fn take(&mut self, category: Category, dtype: DType, len: usize) -> Buffer {
        let buffer = self.arena.take(category, dtype, len);
        self.backend.discard(buffer);
        buffer
    }

    pub(crate) fn workspace(&mut self, dtype: DType, len: usize) -> Buffer {
        self.take(Category::Workspace, dtype, len)
    }

    /// A product whose right operand is a linear layer's weights, of `n` by `k` (`Nt`) or `k` by `n` (`Nn`).
    #[allow(clippy::too_many_arguments, reason = "the arguments of BLAS")]
    pub(crate) fn multiply(
        &mut self,
        layout: Layout,
        size: [usize; 3],
        a: Rows,
        weight: Param,
        c: Rows,
        accumulate: bool,
        bias: Option<Buffer>,
    ) {
        self.with_product(layout, size, a, weight, c, accumulate, bias, |backend, product| match product {
            Product::Plain(product) => backend.matmul(&product),
            Product::Nf4(product) => backend.matmul_nf4(&product),
        });
    }

    /// Has `compute` do [`Context::multiply`]'s product.
    #[allow(clippy::too_many_arguments, reason = "the arguments of BLAS")]
    pub(super) fn with_product(
        &mut self,
        layout: Layout,
        [m, n, k]: [usize; 3],
        a: Rows,
        weight: Param,
        c: Rows,
        accumulate: bool,
        bias: Option<Buffer>,
        compute: impl FnOnce(&mut B, Product<'_>),
    ) {
        let (rows, columns) = if layout == Layout::Nt { (n, k) } else { (k, n) };
        let Some(store) = self.store.quantized.filter(|_| weight.quantized) else {
            let b = Rows { buffer: self.store.weight(weight), stride: columns };
            return compute(self.backend, Product::Plain(Matmul { layout, m, n, k, a, b, c, accumulate, bias }));
        };
        let parts = self.quantized.parts(&store, weight);
        let weights: Vec<Nf4Weights> = parts.into_iter().map(|(_, part)| part).collect();
        let top = self.arena.mark();
        let (dtype, tile) = (self.dtype, self.quantized.kind.nf4_tile(self.dtype, rows, columns));
        let tile = self.workspace(dtype, tile);
        let weights = weights.as_slice();
        let product = Nf4Matmul { layout, m, n, k, a, weights, dtype, c, accumulate, bias, tile };
        compute(self.backend, Product::Nf4(product));
        self.arena.release(top);
    }

    /// Elements of a linear layer's weights from `start` on: where they are, or, of those in NF4, in workspace, in the type of
    /// activations.
    pub(crate) fn weights(&mut self, weight: Param, start: usize, len: usize) -> Buffer {
        let Some(store) = self.store.quantized.filter(|_| weight.quantized) else {
            return self.store.weight(weight.part(start, len));
        };
        let out = self.workspace(self.dtype, len);
        for (first, part) in self.quantized.parts(&store, weight) {
            let (from, to) = (start.max(first), (start + len).min(first + part.len));
            if from < to {
                self.backend.dequantize(&part, from - first, out.slice(from - start, to - from));
            }
        }
        out
    }

    pub(crate) fn norm(&self, weight: Param) -> NormWeight {
        NormWeight { weight: self.store.weight(weight), offset: self.norm_offset }
    }

    /// Where a leaf adds the gradient of a norm's weight. That of a frozen one goes to workspace that nobody reads.
    pub(crate) fn norm_gradient(&mut self, weight: Param) -> Buffer {
        self.store.gradient(weight).unwrap_or_else(|| {
            let unread = self.workspace(DType::F32, weight.len);
            self.backend.zero(unread);
            unread
        })
    }
}
