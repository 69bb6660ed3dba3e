//! What an engine knows of its model that does not change from step to step: sizes, places, and how it is computed.

use std::ops::Range;
use std::sync::Arc;

use arl_model::{Block, Lora, ModelConfig, Result, Role, RopeTable};

use crate::attention;
use crate::backend::{DType, DeviceKind, NormWeight};
use crate::blocks::linear::Linear;
use crate::blocks::{self, LowRankDropout, blocks};
use crate::options::{EngineOptions, LoraOptions, Recompute};
use crate::placement::store::Store;
use crate::placement::{Param, Placement};
use crate::shape::Shape;

/// A model on a kind of device; needs no memory of it.
#[derive(Clone, Debug)]
pub(crate) struct Model {
    pub(crate) shape: Shape,
    /// Frequencies of the rotary embedding.
    pub(crate) rope: RopeTable,
    pub(crate) placement: Placement,
    pub(crate) store: Store,
    /// `[vocab, hidden]`.
    pub(crate) embedding: Param,
    /// In the order of the forward pass.
    pub(crate) blocks: Vec<blocks::Block>,
    /// Which blocks each layer has.
    pub(crate) layers: Vec<Range<usize>>,
    /// `[hidden]`.
    pub(crate) final_norm: Param,
    /// `[vocab, hidden]`; the embedding itself where they are tied.
    pub(crate) head: Linear,
    /// The lowest layer that the backward pass enters: those below it train nothing and keep nothing.
    pub(crate) lowest_layer: usize,
    /// First element and length, in the optimizer's arena, of what gradients are only ever added to: norms, biases, experts,
    /// the look-up's embedding. Products assign the others' in the first micro-batch of a step.
    pub(crate) added: Vec<(usize, usize)>,
    /// Of activations: f32, bf16 or f16.
    pub(crate) dtype: DType,
    pub(crate) recompute: Recompute,
    /// Inputs of layers wait for the backward pass in host memory.
    pub(crate) activation_offloading: bool,
    /// Most rows of logits at a time.
    pub(crate) loss_chunk: usize,
    /// The type of the loss's logits.
    pub(crate) logits_dtype: DType,
    /// Attention is the device's own library's where it has a plan.
    pub(crate) attention_library: bool,
    /// Its adapters, and the seed of their dropout.
    pub(crate) lora: Option<(Arc<Lora>, u64)>,
}

impl Model {
    /// # Errors
    /// `ARL_CONFIG` for options that contradict the model or the kind of device.
    pub(crate) fn new(config: &ModelConfig, options: &EngineOptions, kind: DeviceKind) -> Result<Self> {
        options.check()?;
        let lora = options.lora.as_ref().map(|lora| adapted(config, lora)).transpose()?;
        let config = lora.as_ref().map_or(config, |(lora, _)| &lora.model);
        let shape = Shape::new(config);
        kind.check(&shape)?;
        let placement = match &lora {
            None => Placement::new(config, &options.frozen)?,
            Some((lora, _)) => Placement::adapted(lora)?,
        };
        let store = Store::new(&placement, options);
        let training = store.training.is_some();
        let embedding = placement.one(Block::Embedding, Role::Embedding);
        let head = Linear::new(placement.span(Block::Head, Role::LmHead, Role::LmHead).unwrap_or(embedding));
        let blocks = blocks(config, &placement);
        let layer =
            |l| blocks.partition_point(|block| block.layer < l)..blocks.partition_point(|block| block.layer <= l);
        let assigned: Vec<Param> = blocks.iter().flat_map(blocks::Block::assigned).chain([head.weight]).collect();
        Ok(Model {
            attention_library: attention::planned(options.attention, kind, shape.heads, options.dtype, training)?,
            loss_chunk: options.loss_seq_chunk_size.unwrap_or(kind.default_logits_rows(config.vocab_size)),
            logits_dtype: if options.logits_16bit { options.dtype } else { DType::F32 },
            shape,
            rope: RopeTable::new(config),
            store,
            embedding,
            layers: (0..config.layers.len()).map(layer).collect(),
            final_norm: placement.one(Block::FinalNorm, Role::FinalNorm),
            head,
            lowest_layer: placement.lowest_layer,
            added: placement.all_but(&assigned),
            blocks,
            placement,
            dtype: options.dtype,
            recompute: options.recompute,
            activation_offloading: options.activation_offloading,
            lora: lora.clone(),
        })
    }

    /// Dropout of a micro-batch of a step; none where nothing is dropped.
    pub(crate) fn dropout(&self, step: u64, micro_batch: usize) -> Option<LowRankDropout> {
        let (lora, seed) = self.lora.as_ref()?;
        let probability = lora.config.lora_dropout;
        let words = [*seed, step, micro_batch as u64];
        (probability > 0.0).then_some(LowRankDropout { probability, words })
    }

    /// The weight of a norm.
    pub(crate) fn norm(&self, weight: Param) -> NormWeight {
        NormWeight { weight: self.store.weight(weight), offset: self.shape.norm_offset }
    }
}

/// What is adapted in a model, and the seed of its dropout.
fn adapted(config: &ModelConfig, lora: &LoraOptions) -> Result<(Arc<Lora>, u64)> {
    Ok((Arc::new(Lora::new(config, &lora.config)?), lora.seed))
}
