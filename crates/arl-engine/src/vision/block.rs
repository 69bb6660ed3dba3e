//! A block of the tower: attention to all patches of the image or of a window, and an MLP, each behind a norm and added to the
//! stream. `N` patches, `H` the tower's width, `W` the MLP's inner width.

use arl_model::{self as model, Role, VisionConfig, VisionKind};

use super::inputs::ImageInputs;
use super::norm::Norm;
use crate::backend::{self, Backend, Buffer, DType, Gelu, Heads, NormRope, Rows};
use crate::blocks::linear::{Linear, packed};
use crate::blocks::{Context, Take};
use crate::options::Recompute;
use crate::placement::Placement;

/// Its parameters and sizes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Block {
    heads: Heads,
    /// Attention stays within windows.
    windowed: bool,
    norm1: Norm,
    /// `[3 H, H]`: queries, keys, values.
    qkv: Linear,
    /// `[H, H]`.
    proj: Linear,
    norm2: Norm,
    /// `[W, H]`; gated `[2 W, H]`: gate, then up.
    up: Linear,
    /// `[H, W]`.
    down: Linear,
    /// SwiGLU; else GELU.
    gated: bool,
    width: usize,
}

/// What it computes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Buffers {
    /// `[N, H]`: the normed stream, and what is left of the norm.
    normed1: Buffer,
    statistics1: Buffer,
    /// `[N, 3 H]`: queries, keys, values.
    qkv: Buffer,
    /// `[N, 2 H]`: queries and keys, rotated.
    qk: Buffer,
    /// `[N, H]`: what attention gives.
    attention: Buffer,
    /// f32 `[heads, N]`.
    log_sum_exp: Buffer,
    /// `[N, H]`: the stream between attention and MLP.
    middle: Buffer,
    /// `[N, H]`: that, normed, and what is left of the norm.
    normed2: Buffer,
    statistics2: Buffer,
    /// `[N, W]`; gated `[N, 2 W]`.
    inner: Buffer,
    /// `[N, W]`: after the activation.
    act: Buffer,
}

impl Block {
    pub(super) fn new(config: &VisionConfig, placement: &Placement, index: usize) -> Self {
        let block = model::Block::Vision(index);
        let span = |first, last| placement.span(block, first, last);
        let linear = |(first, last), (first_bias, last_bias)| Linear {
            bias: span(first_bias, last_bias),
            ..Linear::new(span(first, last).unwrap_or_default())
        };
        let one = |weight, bias| linear((weight, weight), (bias, bias));
        let norm = |weight, bias| Norm::new(placement, block, weight, bias, config.norm_eps as f32);
        let gated = config.kind == VisionKind::Qwen2_5;
        let (up, down) = if gated {
            let up = linear((Role::VisionGateWeight, Role::VisionUpWeight), (Role::VisionGateBias, Role::VisionUpBias));
            (up, one(Role::VisionDownWeight, Role::VisionDownBias))
        } else {
            (one(Role::VisionFc1Weight, Role::VisionFc1Bias), one(Role::VisionFc2Weight, Role::VisionFc2Bias))
        };
        Block {
            heads: Heads { query: config.num_heads, key_value: config.num_heads, dim: config.head_dim() },
            windowed: config.is_windowed(index),
            norm1: norm(Role::VisionNorm1Weight, Role::VisionNorm1Bias),
            qkv: one(Role::VisionQkvWeight, Role::VisionQkvBias),
            proj: one(Role::VisionProjWeight, Role::VisionProjBias),
            norm2: norm(Role::VisionNorm2Weight, Role::VisionNorm2Bias),
            up,
            down,
            gated,
            width: config.intermediate_size,
        }
    }

    pub(super) fn buffers(&self, dtype: DType, patches: usize, take: &mut Take<'_>) -> Buffers {
        use Recompute::{Mlp, Norms, Off};
        let stream = patches * self.heads.query_columns();
        Buffers {
            normed1: take(Off, dtype, stream),
            statistics1: take(Off, DType::F32, self.norm1.statistics(stream)),
            qkv: take(Mlp, dtype, 3 * stream),
            qk: take(Off, dtype, 2 * stream),
            attention: take(Mlp, dtype, stream),
            log_sum_exp: take(Mlp, DType::F32, patches * self.heads.query),
            middle: take(Mlp, dtype, stream),
            normed2: take(Off, dtype, stream),
            statistics2: take(Off, DType::F32, self.norm2.statistics(stream)),
            inner: take(Norms, dtype, patches * self.inner_width()),
            act: take(Off, dtype, patches * self.width),
        }
    }

    fn inner_width(&self) -> usize {
        if self.gated { 2 * self.width } else { self.width }
    }

    /// From the stream `x` before the block to `out`, the one after it, which may be `x`.
    pub(super) fn forward<B: Backend + ?Sized>(
        &self,
        cx: &mut Context<'_, B>,
        at: &Buffers,
        images: &ImageInputs,
        x: Buffer,
        out: Buffer,
    ) {
        self.compute(cx, at, images, x);
        let top = cx.arena.mark();
        let delta = cx.workspace(cx.dtype, out.len);
        self.down.forward(cx, at.act, delta, delta.slice(0, 0), images.patches);
        cx.backend.copy(at.middle, out);
        cx.backend.add(out, delta);
        cx.arena.release(top);
    }

    /// All but the last layer.
    fn compute<B: Backend + ?Sized>(&self, cx: &mut Context<'_, B>, at: &Buffers, images: &ImageInputs, x: Buffer) {
        self.norm1.forward(cx, x, at.normed1, at.statistics1);
        self.qkv.forward(cx, at.normed1, at.qkv, x.slice(0, 0), images.patches);
        cx.backend.norm_rope(&self.rotation(images), at.qkv, at.qk);
        cx.backend.attention(&self.op(at, images));
        let top = cx.arena.mark();
        let delta = cx.workspace(cx.dtype, x.len);
        self.proj.forward(cx, at.attention, delta, delta.slice(0, 0), images.patches);
        cx.backend.copy(x, at.middle);
        cx.backend.add(at.middle, delta);
        cx.arena.release(top);
        self.norm2.forward(cx, at.middle, at.normed2, at.statistics2);
        self.inner(cx, at, images);
        self.activate(cx, at);
    }

    fn inner<B: Backend + ?Sized>(&self, cx: &mut Context<'_, B>, at: &Buffers, images: &ImageInputs) {
        self.up.forward(cx, at.normed2, at.inner, at.inner.slice(0, 0), images.patches);
    }

    fn activate<B: Backend + ?Sized>(&self, cx: &mut Context<'_, B>, at: &Buffers) {
        if self.gated {
            cx.backend.swiglu(at.inner, self.width, at.act);
        } else {
            cx.backend.gelu(Gelu::Tanh, at.inner, at.act);
        }
    }

    /// Computes again what was not kept: the same leaves on the same values.
    pub(super) fn recompute<B: Backend + ?Sized>(
        &self,
        cx: &mut Context<'_, B>,
        at: &Buffers,
        images: &ImageInputs,
        x: Buffer,
        level: Recompute,
    ) {
        match level {
            Recompute::Off => {}
            Recompute::Block => self.compute(cx, at, images, x),
            Recompute::Norms | Recompute::Mlp => {
                self.norm1.forward(cx, x, at.normed1, at.statistics1);
                cx.backend.norm_rope(&self.rotation(images), at.qkv, at.qk);
                self.norm2.forward(cx, at.middle, at.normed2, at.statistics2);
                if level == Recompute::Mlp {
                    self.inner(cx, at, images);
                }
                self.activate(cx, at);
            }
        }
    }

    /// From the gradient `d_x` of the stream after the block to that of the one before it, `x`, in place, and those of its
    /// parameters.
    pub(super) fn backward<B: Backend + ?Sized>(
        &self,
        cx: &mut Context<'_, B>,
        at: &Buffers,
        images: &ImageInputs,
        x: Buffer,
        d_x: Buffer,
    ) {
        let (n, heads, none) = (images.patches, self.heads, x.slice(0, 0));
        let top = cx.arena.mark();
        // [N, W], [N, H]
        let d_act = cx.workspace(cx.dtype, n * self.width);
        let d_normed = cx.workspace(cx.dtype, x.len);
        self.down.backward(cx, packed(d_x, n), at.act, none, d_act, n, true);
        let d_inner = if self.gated {
            cx.backend.swiglu_backward(at.inner, self.width, d_act);
            at.inner
        } else {
            cx.backend.gelu_backward(Gelu::Tanh, at.inner, d_act);
            d_act
        };
        self.up.backward(cx, packed(d_inner, n), at.normed2, none, d_normed, n, true);
        self.norm2.backward(cx, at.middle, at.statistics2, d_normed, d_x);
        cx.arena.release(top);

        let d_normed = cx.workspace(cx.dtype, x.len);
        // [N, H], [N, 3 H], [heads, N]
        let d_attention = cx.workspace(cx.dtype, x.len);
        let d_qkv = cx.workspace(cx.dtype, n * heads.qkv_columns());
        let scratch = cx.workspace(DType::F32, cx.backend.kind().attention_scratch(heads, n));
        self.proj.backward(cx, packed(d_x, n), at.attention, none, d_attention, n, true);
        cx.backend.attention_backward(&self.op(at, images), packed(d_attention, n), d_qkv, scratch);
        cx.backend.norm_rope_backward(&self.rotation(images), at.qkv, d_qkv, None);
        self.qkv.backward(cx, packed(d_qkv, n), at.normed1, none, d_normed, n, true);
        self.norm1.backward(cx, x, at.statistics1, d_normed, d_x);
        cx.arena.release(top);
    }

    fn rotation(&self, images: &ImageInputs) -> NormRope {
        NormRope {
            heads: self.heads,
            rotary: self.heads.dim,
            tokens: images.patches,
            norm: None,
            angles: images.angles,
        }
    }

    fn op(&self, at: &Buffers, images: &ImageInputs) -> backend::Attention {
        let (q, qk) = (self.heads.query_columns(), self.heads.qk_columns());
        backend::Attention {
            heads: self.heads,
            sequences: images.windows.filter(|_| self.windowed).unwrap_or(images.segments),
            window: None,
            causal: false,
            scale: self.heads.scale(),
            q: Rows { buffer: at.qk, stride: qk },
            k: Rows { buffer: at.qk.slice(q, at.qk.len - q), stride: qk },
            v: Rows { buffer: at.qkv.slice(qk, at.qkv.len - qk), stride: self.heads.qkv_columns() },
            out: Rows { buffer: at.attention, stride: q },
            log_sum_exp: at.log_sum_exp,
        }
    }
}
