//! One micro-batch: forward, loss, backward, as sequences of leaf calls over any backend.
//!
//! `T` tokens, `H` hidden size, `Q` and `K` columns of all query and key heads, `W` width of the feed-forward part.
//! The very code runs against a counting allocator and a backend that does nothing to find the memory it needs.

mod backward;
mod forward;
mod loss;
mod moe;
mod offload;

use std::sync::atomic::{AtomicBool, Ordering};

use arl_model::{Error, ErrorCode, Result};

use crate::arena::{Arena, Category, higher};
use crate::backend::{Attention, Backend, Buffer, DType, Layout, Matmul, NormRope, Permutation, Pool, Rows};
use crate::batch::Inputs;
use crate::events::ACTIVATION_SLOTS;
use crate::model::Model;
use crate::options::Recompute;
use crate::params::Param;
use crate::shape::{MlpShape, Shape};
use crate::update::Pending;

pub(crate) use loss::LossMode;
pub(crate) use offload::host_bytes;

const NONE: Buffer = Buffer { pool: Pool::Step, offset: 0, len: 0, dtype: DType::F32 };

/// The buffers of a layer. Each lies in memory of its own or in scratch that all layers share, as recomputation has it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layer {
    /// `[T, H]`: the residual stream before the layer.
    pub(crate) x: Buffer,
    /// f32 `[T]`.
    inverse_rms1: Buffer,
    /// `[T, H]`: the normed input.
    pub(crate) norm1: Buffer,
    /// `[T, Q + 2 K]`: queries, keys, values.
    pub(crate) qkv: Buffer,
    /// `[T, Q + K]`: queries and keys, normed and rotated.
    pub(crate) qk: Buffer,
    /// `[T, Q]`: what attention gives.
    pub(crate) attention: Buffer,
    /// f32 `[query heads, T]`.
    log_sum_exp: Buffer,
    /// `[T, H]`: the residual stream after attention.
    pub(crate) x_mid: Buffer,
    /// f32 `[T]`.
    inverse_rms2: Buffer,
    /// `[T, H]`: the normed input of the feed-forward part.
    norm2: Buffer,
    /// `[N, 2 W]`: gate and up; `N` is `T`, or `T top_k` with experts.
    gate_up: Buffer,
    /// `[N, W]`: after SwiGLU.
    act: Buffer,
    moe: MoeLayer,
}

/// The buffers that only a layer with experts has.
#[derive(Clone, Copy, Debug)]
struct MoeLayer {
    /// f32 `[T, experts]`: the router's logits.
    logits: Buffer,
    /// f32 `[T, experts]`.
    probabilities: Buffer,
    /// i32 `[T, top_k]`.
    chosen: Buffer,
    /// f32 `[T, top_k]`.
    weights: Buffer,
    permutation: Permutation,
    /// `[T top_k, H]`: the input, sorted by expert.
    routed: Buffer,
    /// `[T top_k, H]`: what the experts give.
    out: Buffer,
}

impl Layer {
    const EMPTY: Layer = Layer {
        x: NONE,
        inverse_rms1: NONE,
        norm1: NONE,
        qkv: NONE,
        qk: NONE,
        attention: NONE,
        log_sum_exp: NONE,
        x_mid: NONE,
        inverse_rms2: NONE,
        norm2: NONE,
        gate_up: NONE,
        act: NONE,
        moe: MoeLayer {
            logits: NONE,
            probabilities: NONE,
            chosen: NONE,
            weights: NONE,
            permutation: Permutation { offsets: NONE, pairs: NONE, rows: NONE },
            routed: NONE,
            out: NONE,
        },
    };

    /// The router's logits; `None` for a dense layer. Lasting only where everything is kept.
    pub(crate) fn router_logits(&self) -> Option<Buffer> {
        (self.moe.logits.len > 0).then_some(self.moe.logits)
    }

    /// Shows `take` every buffer of the layer, its type and length, and the last level at which it is kept.
    fn visit(
        &mut self,
        shape: &Shape,
        mlp: MlpShape,
        dtype: DType,
        t: usize,
        mut take: impl FnMut(&mut Buffer, Recompute, DType, usize),
    ) {
        use Recompute::{Block, Mlp, Norms, Off};
        let h = shape.hidden;
        take(&mut self.x, Block, dtype, t * h);
        take(&mut self.inverse_rms1, Mlp, DType::F32, t);
        take(&mut self.norm1, Off, dtype, t * h);
        take(&mut self.qkv, Mlp, dtype, t * shape.qkv());
        take(&mut self.qk, Off, dtype, t * shape.qk());
        take(&mut self.attention, Mlp, dtype, t * shape.q());
        take(&mut self.log_sum_exp, Mlp, DType::F32, t * shape.heads.query);
        take(&mut self.x_mid, Mlp, dtype, t * h);
        take(&mut self.inverse_rms2, Mlp, DType::F32, t);
        take(&mut self.norm2, Off, dtype, t * h);
        let (rows, width) = match mlp {
            MlpShape::Dense { width } => (t, width),
            MlpShape::Experts { experts, top_k, width, .. } => {
                let moe = &mut self.moe;
                take(&mut moe.logits, Off, DType::F32, t * experts);
                take(&mut moe.probabilities, Norms, DType::F32, t * experts);
                take(&mut moe.chosen, Norms, DType::I32, t * top_k);
                take(&mut moe.weights, Norms, DType::F32, t * top_k);
                take(&mut moe.permutation.offsets, Norms, DType::I32, experts + 1);
                take(&mut moe.permutation.pairs, Norms, DType::I32, t * top_k);
                take(&mut moe.permutation.rows, Norms, DType::I32, t * top_k);
                take(&mut moe.routed, Off, dtype, t * top_k * h);
                take(&mut moe.out, Norms, dtype, t * top_k * h);
                (t * top_k, width)
            }
        };
        take(&mut self.gate_up, Norms, dtype, rows * 2 * width);
        take(&mut self.act, Off, dtype, rows * width);
    }
}

/// The state of one micro-batch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Run {
    pub(crate) inputs: Inputs,
    /// What layers keep; `None`: nothing, because no backward pass follows.
    pub(crate) keep: Option<Recompute>,
    /// `[T, H]`: what a layer's feed-forward part adds to the residual stream; after the last one the stream itself.
    pub(crate) delta: Buffer,
    /// f32 `[T]`.
    final_inverse_rms: Buffer,
    /// `[T, H]`: the head's input.
    pub(crate) final_norm: Buffer,
    /// f64 `[3]`: weighted sum of the negative log-likelihoods, sums of right predictions and of entropies.
    pub(crate) sums: Buffer,
    /// f32 `[2, experts]`: choices and probabilities of each expert, all layers together.
    pub(crate) balance: Option<Buffer>,
    /// Factor on the loss whose gradients are computed.
    pub(crate) loss_scale: f32,
}

/// One micro-batch in progress.
pub(crate) struct Step<'a, B: ?Sized> {
    pub(crate) backend: &'a mut B,
    pub(crate) arena: &'a mut Arena,
    pub(crate) model: &'a Model,
    pub(crate) layers: &'a mut Vec<Layer>,
    pub(crate) interrupt: &'a AtomicBool,
    /// What is left of the last update.
    pub(crate) pending: &'a mut Option<Pending>,
}

impl<B: Backend + ?Sized> Step<'_, B> {
    /// Takes the memory that lasts for the whole micro-batch.
    pub(crate) fn begin(
        &mut self,
        inputs: Inputs,
        keep: Option<Recompute>,
        sums: Buffer,
        balance: Option<Buffer>,
    ) -> Run {
        let (model, t) = (self.model, inputs.size.tokens);
        let shape = &model.shape;
        self.layers.clear();
        // With offloading, the inputs of layers take turns in a few slots.
        let slots = (keep.is_some() && model.activation_offloading)
            .then(|| [(); ACTIVATION_SLOTS].map(|()| self.take(Category::Activations, model.dtype, t * shape.hidden)));
        for (l, layer_shape) in shape.layers.iter().enumerate() {
            let mut layer = Layer::EMPTY;
            layer.visit(shape, layer_shape.mlp, model.dtype, t, |buffer, last, dtype, len| {
                *buffer = match slots {
                    Some(slots) if last == Recompute::Block => slots[l % slots.len()],
                    _ if keep.is_some_and(|level| level <= last) => self.take(Category::Activations, dtype, len),
                    _ => return,
                };
            });
            self.layers.push(layer);
        }
        Run {
            inputs,
            keep,
            delta: self.take(Category::Activations, model.dtype, t * shape.hidden),
            final_inverse_rms: self.take(Category::Activations, DType::F32, t),
            final_norm: self.take(Category::Activations, model.dtype, t * shape.hidden),
            sums,
            balance,
            loss_scale: 1.0,
        }
    }

    /// Takes the scratch that all layers share, on top of the stack: the most that any one of them needs.
    pub(crate) fn take_scratch(&mut self, run: &Run) {
        let (model, t) = (self.model, run.inputs.size.tokens);
        let base = self.arena.mark();
        let mut top = base;
        for (layer, layer_shape) in self.layers.iter_mut().zip(&model.shape.layers) {
            layer.visit(&model.shape, layer_shape.mlp, model.dtype, t, |buffer, last, dtype, len| {
                if run.keep.is_none_or(|level| level > last) {
                    *buffer = self.arena.take(Category::Workspace, dtype, len);
                    self.backend.discard(*buffer);
                }
            });
            top = higher(top, self.arena.mark());
            self.arena.release(base);
        }
        self.arena.release(top);
    }

    /// Takes memory whose contents are of no use.
    fn take(&mut self, category: Category, dtype: DType, len: usize) -> Buffer {
        let buffer = self.arena.take(category, dtype, len);
        self.backend.discard(buffer);
        buffer
    }

    /// Forward, loss and backward; gradients are added to, in the `first` micro-batch of a step to zero. `weight` is that of
    /// all targets of the step.
    pub(crate) fn train(&mut self, run: &Run, weight: f64, first: bool) -> Result<()> {
        let result = self.passes(run, (f64::from(run.loss_scale) / weight) as f32, first);
        if result.is_err() && self.model.activation_offloading {
            // Copies may be on their way; what comes next must not meet them.
            self.backend.read_back(run.sums.slice(0, 0), &mut [])?;
        }
        result
    }

    fn passes(&mut self, run: &Run, scale: f32, first: bool) -> Result<()> {
        let top = self.arena.mark();
        self.take_scratch(run);
        self.forward(run)?;
        self.arena.release(top);
        // Not before: the forward pass may have had the last update to do.
        if let (true, Some(training)) = (first, &self.model.store.training) {
            self.backend.zero(training.gradients);
        }

        let (t, h) = (run.inputs.size.tokens, self.model.shape.hidden);
        let d_norm = self.take(Category::Workspace, self.model.dtype, t * h);
        self.loss(run, LossMode::Train { scale, d_norm });

        let d_x = self.take(Category::Workspace, self.model.dtype, t * h);
        self.take_scratch(run);
        self.backward(run, d_norm, d_x)?;
        self.arena.release(top);
        Ok(())
    }

    /// Forward and loss.
    pub(crate) fn evaluate(&mut self, run: &Run) -> Result<()> {
        let top = self.arena.mark();
        self.take_scratch(run);
        self.forward(run)?;
        self.arena.release(top);
        self.loss(run, LossMode::Evaluate);
        Ok(())
    }

    /// To be called before decayed parameters up to element `end`, or any others, are used.
    fn update_to(&mut self, end: usize) {
        if let Some(pending) = self.pending
            && pending.advance(self.backend, end)
        {
            *self.pending = None;
        }
    }

    pub(crate) fn check_interrupt(&self) -> Result<()> {
        if self.interrupt.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorCode::Interrupted, "interrupted; the weights are as before the step"));
        }
        Ok(())
    }

    fn weight(&self, param: Param) -> Buffer {
        self.model.store.weight(param)
    }

    fn gradient(&self, param: Param) -> Buffer {
        self.model.store.gradient(param)
    }

    /// `out[m, n] = x[m, k] weight[n, k]^T + bias`.
    pub(crate) fn linear(&mut self, x: Buffer, weight: Param, bias: Option<Param>, out: Buffer, m: usize) {
        let (n, k) = (out.len / m, x.len / m);
        let (weight, bias) = (self.weight(weight), bias.map(|b| self.weight(b)));
        self.backend.matmul(&Matmul {
            layout: Layout::Nt,
            m,
            n,
            k,
            a: Rows { buffer: x, stride: k },
            b: Rows { buffer: weight, stride: k },
            c: Rows { buffer: out, stride: n },
            accumulate: false,
            bias,
        });
    }

    /// `d_x[m, k] = d_out[m, n] weight[n, k]`, or added to it.
    fn linear_backward_input(&mut self, d_out: Buffer, weight: Param, d_x: Buffer, m: usize, accumulate: bool) {
        let (n, k) = (d_out.len / m, d_x.len / m);
        let weight = self.weight(weight);
        self.backend.matmul(&Matmul {
            layout: Layout::Nn,
            m,
            n: k,
            k: n,
            a: Rows { buffer: d_out, stride: n },
            b: Rows { buffer: weight, stride: k },
            c: Rows { buffer: d_x, stride: k },
            accumulate,
            bias: None,
        });
    }

    /// `d_weight[n, k] += d_out[m, n]^T x[m, k]`, and the bias's gradient with it.
    fn linear_backward_weight(&mut self, d_out: Buffer, x: Buffer, weight: Param, bias: Option<Param>, m: usize) {
        let (n, k) = (d_out.len / m, x.len / m);
        let d_weight = self.gradient(weight);
        self.backend.matmul(&Matmul {
            layout: Layout::Tn,
            m: n,
            n: k,
            k: m,
            a: Rows { buffer: d_out, stride: n },
            b: Rows { buffer: x, stride: k },
            c: Rows { buffer: d_weight, stride: k },
            accumulate: true,
            bias: None,
        });
        if let Some(bias) = bias {
            let d_bias = self.gradient(bias);
            self.backend.sum_rows(Rows { buffer: d_out, stride: n }, m, n, d_bias);
        }
    }

    /// The norms and rotation of layer `l`'s queries and keys.
    pub(crate) fn norm_rope_op(&self, l: usize, inputs: &Inputs) -> NormRope {
        let shape = &self.model.shape;
        NormRope {
            heads: shape.heads,
            tokens: inputs.size.tokens,
            norm: self.model.params.layers[l].qk_norm.map(|(q, k)| (self.weight(q), self.weight(k), shape.epsilon)),
            cos: inputs.cos,
            sin: inputs.sin,
        }
    }

    /// Layer `l`'s attention.
    pub(crate) fn attention_op(&self, l: usize, inputs: &Inputs) -> Attention {
        let (shape, layer) = (&self.model.shape, &self.layers[l]);
        let (q, qk, qkv) = (shape.q(), shape.qk(), shape.qkv());
        Attention {
            heads: shape.heads,
            sequences: inputs.sequences,
            window: shape.layers[l].window,
            scale: shape.attention_scale(),
            q: Rows { buffer: layer.qk, stride: qk },
            k: Rows { buffer: layer.qk.slice(q, layer.qk.len - q), stride: qk },
            v: Rows { buffer: layer.qkv.slice(qk, layer.qkv.len - qk), stride: qkv },
            out: Rows { buffer: layer.attention, stride: q },
            log_sum_exp: layer.log_sum_exp,
        }
    }
}
