//! The blocks that layers are made of: `x + f(norm(x))` each. A kind of `f` has a file of its own, with its parameters, its
//! buffers and the last level of recomputation at which each is kept, its forward and backward passes and what it computes
//! again. This file chooses a layer's blocks by its configuration and hands calls on; the residual stream, the norms and
//! the order of blocks are the business of `step`.

mod attention;
pub(crate) mod cache;
mod context;
mod delta;
mod embedding_adapter;
mod expert_adapter;
mod expert_parallel;
mod experts;
pub(crate) mod linear;
mod low_rank;
mod magnitude;
mod mlp;
mod routes;
mod shared_expert;
mod tensor_parallel;
mod ulysses;
mod ulysses_delta;

use arl_model::{self as model, ModelConfig, Role};

pub(crate) use attention::Attention;
pub(crate) use context::{Context, Run, Take};
pub(crate) use embedding_adapter::EmbeddingAdapter;
pub(crate) use low_rank::{Adapters, LowRankDropout};

use crate::backend::{Backend, Buffer, DType};
use crate::mesh::Place;
use crate::options::Recompute;
use crate::placement::{Param, Placement};
use cache::{Cached, NewTokens};
use delta::Delta;
use experts::Experts;
use mlp::Mlp;

/// A block of a model.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Block {
    pub(crate) layer: usize,
    /// Its name in the table of tensors.
    pub(crate) name: model::Block,
    /// `[hidden]`: of the norm before it.
    pub(crate) norm: Param,
    kind: Kind,
}

#[derive(Clone, Copy, Debug)]
#[allow(clippy::large_enum_variant, reason = "two a layer; a box is not Copy")]
enum Kind {
    Attention(Attention),
    Delta(Delta),
    Mlp(Mlp),
    Experts(Experts),
}

/// A block with the buffers of a micro-batch.
#[derive(Clone, Copy, Debug)]
#[allow(clippy::large_enum_variant, reason = "two a layer; a box is not Copy")]
pub(crate) enum Active {
    Attention(Attention, attention::Buffers),
    Delta(Delta, delta::Buffers),
    Mlp(Mlp, mlp::Buffers),
    Experts(Experts, experts::Buffers),
}

/// The blocks of all layers, in the order of the forward pass. The placement has what the rank at `place` has of heads and columns.
pub(crate) fn blocks(config: &ModelConfig, placement: &Placement, place: &Place) -> Vec<Block> {
    let ranks = place.mesh.tp;
    let mut blocks = Vec::with_capacity(2 * config.layers.len());
    for (layer, shape) in config.layers.iter().enumerate() {
        let mut add =
            |block, norm, kind| blocks.push(Block { layer, name: block, norm: placement.one(block, norm), kind });
        match shape.mixer {
            model::Mixer::Attention { window } => {
                let attention = Attention::new(config, placement, layer, window, ranks);
                add(model::Block::Attention(layer), Role::InputNorm, Kind::Attention(attention));
            }
            model::Mixer::Delta(delta) => {
                let delta = Delta::new(config, placement, layer, &delta, ranks);
                add(model::Block::Delta(layer), Role::InputNorm, Kind::Delta(delta));
            }
        }
        match &shape.mlp {
            model::Mlp::Dense { intermediate } => {
                let mlp = Mlp::new(placement, layer, config.hidden_size, *intermediate, ranks);
                add(model::Block::Mlp(layer), Role::PostAttentionNorm, Kind::Mlp(mlp));
            }
            model::Mlp::Moe(moe) => {
                let experts = Experts::new(config, placement, place, layer, moe);
                add(model::Block::Experts(layer), Role::PostAttentionNorm, Kind::Experts(experts));
            }
        }
    }
    blocks
}

impl Block {
    /// Its attention, if it is attention.
    pub(crate) fn attention(&self) -> Option<&Attention> {
        if let Kind::Attention(attention) = &self.kind { Some(attention) } else { None }
    }

    /// Its delta rule, if it is one.
    pub(crate) fn delta(&self) -> Option<&Delta> {
        if let Kind::Delta(delta) = &self.kind { Some(delta) } else { None }
    }

    /// Whether the gradient of its input is of no use where nothing below it is trained.
    pub(crate) fn may_end(&self) -> bool {
        self.norm.trained.is_none() && !matches!(self.kind, Kind::Experts(_))
    }

    /// Parameters whose gradients the first micro-batch of a step assigns; the others' are added to.
    pub(crate) fn assigned(&self) -> Vec<Param> {
        match &self.kind {
            Kind::Attention(attention) => attention.assigned(),
            Kind::Delta(delta) => delta.assigned(),
            Kind::Mlp(mlp) => mlp.assigned(),
            Kind::Experts(experts) => experts.assigned(),
        }
    }

    /// Takes its buffers for so many tokens; `of_all`: of all ranks together that divide experts.
    pub(crate) fn activate(&self, dtype: DType, tokens: usize, of_all: usize, take: &mut Take<'_>) -> Active {
        match self.kind {
            Kind::Attention(attention) => Active::Attention(attention, attention.buffers(dtype, tokens, take)),
            Kind::Delta(delta) => Active::Delta(delta, delta.buffers(dtype, tokens, take)),
            Kind::Mlp(mlp) => Active::Mlp(mlp, mlp.buffers(dtype, tokens, take)),
            Kind::Experts(experts) => Active::Experts(experts, experts.buffers(dtype, tokens, of_all, take)),
        }
    }
}

impl Active {
    /// From the normed input to all that [`Active::output`] and the backward pass read.
    pub(crate) fn compute<B: Backend + ?Sized>(&self, cx: &mut Context<'_, B>, input: Buffer, run: &Run) {
        match self {
            Active::Attention(attention, at) => attention.compute(cx, at, input, run),
            Active::Delta(delta, at) => delta.compute(cx, at, input, run),
            Active::Mlp(mlp, at) => mlp.compute(cx, at, input, run),
            Active::Experts(experts, at) => experts.compute(cx, at, input, run),
        }
    }

    /// As [`Active::compute`] where tokens see those of `cached`, which the new ones join.
    pub(crate) fn compute_cached<B: Backend + ?Sized>(
        &self,
        cx: &mut Context<'_, B>,
        input: Buffer,
        run: &Run,
        cached: Option<&Cached>,
        new: &NewTokens,
    ) {
        match (self, cached) {
            (Active::Attention(attention, at), Some(Cached::Attention(cached))) => {
                attention.compute_cached(cx, at, input, run, cached, new);
            }
            (Active::Delta(delta, at), Some(Cached::Delta(cached))) => {
                delta.compute_cached(cx, at, input, run, cached, new);
            }
            _ => self.compute(cx, input, run),
        }
    }

    /// What the block adds to the residual stream, into `run.delta`.
    pub(crate) fn output<B: Backend + ?Sized>(&self, cx: &mut Context<'_, B>, run: &Run) {
        match self {
            Active::Attention(attention, at) => attention.output(cx, at, run),
            Active::Delta(delta, at) => delta.output(cx, at, run),
            Active::Mlp(mlp, at) => mlp.output(cx, at, run),
            Active::Experts(experts, at) => experts.output(cx, at, run),
        }
    }

    /// Whether [`Active::output`] leaves anything for the backward pass.
    pub(crate) fn output_is_kept(&self) -> bool {
        // The last block of a layer is a feed-forward part.
        matches!(self, Active::Mlp(mlp, _) if mlp.output_is_kept())
    }

    /// Computes again what was not kept at a level.
    pub(crate) fn recompute<B: Backend + ?Sized>(
        &self,
        cx: &mut Context<'_, B>,
        input: Buffer,
        run: &Run,
        level: Recompute,
    ) {
        match self {
            Active::Attention(attention, at) => attention.recompute(cx, at, input, run, level),
            Active::Delta(delta, at) => delta.recompute(cx, at, input, run, level),
            Active::Mlp(mlp, at) => mlp.recompute(cx, at, input, run, level),
            Active::Experts(experts, at) => experts.recompute(cx, at, input, run, level),
        }
    }

    /// From `d_x`, the residual stream's gradient, to `d_input`, that of the normed input, and the gradients of the
    /// block's parameters. Of a block that [may end](Block::may_end) the backward pass `d_input` may be empty.
    pub(crate) fn backward<B: Backend + ?Sized>(
        &self,
        cx: &mut Context<'_, B>,
        input: Buffer,
        run: &Run,
        d_x: Buffer,
        d_input: Buffer,
    ) {
        match self {
            Active::Attention(attention, at) => attention.backward(cx, at, input, run, d_x, d_input),
            Active::Delta(delta, at) => delta.backward(cx, at, input, run, d_x, d_input),
            Active::Mlp(mlp, at) => mlp.backward(cx, at, input, run, d_x, d_input),
            Active::Experts(experts, at) => experts.backward(cx, at, input, run, d_x, d_input),
        }
    }

    /// What the forward pass of a rank without tokens does for others'.
    pub(crate) fn serve<B: Backend + ?Sized>(&self, cx: &mut Context<'_, B>) {
        if let Active::Experts(experts, at) = self {
            experts.serve(cx, at);
        }
    }

    /// What computing again by a rank without tokens does for others'.
    pub(crate) fn serve_again<B: Backend + ?Sized>(&self, cx: &mut Context<'_, B>, level: Recompute) {
        if let Active::Experts(experts, at) = self {
            experts.serve_again(cx, at, level);
        }
    }

    /// What the backward pass of a rank without tokens does for others'.
    pub(crate) fn serve_backward<B: Backend + ?Sized>(&self, cx: &mut Context<'_, B>) {
        if let Active::Experts(experts, at) = self {
            experts.serve_backward(cx, at);
        }
    }

    /// The router's logits, f32 `[T, experts]`, of a block that has one. Lasting only where everything is kept.
    pub(crate) fn router_logits(&self) -> Option<Buffer> {
        if let Active::Experts(_, at) = self { Some(at.logits) } else { None }
    }
}
