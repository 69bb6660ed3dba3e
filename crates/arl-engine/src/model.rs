//! What an engine knows of its model that does not change from step to step: sizes, places, and how it is computed.

use std::ops::Range;
use std::sync::Arc;

use arl_model::{Block, Error, ErrorCode, Lora, ModelConfig, Projection, Result, Role, RopeTable};

use crate::attention;
use crate::backend::{DType, DeviceKind, NormWeight};
use crate::blocks::linear::Linear;
use crate::blocks::{self, Adapters, EmbeddingAdapter, LowRankDropout, blocks};
use crate::options::{EngineOptions, LoraOptions, Nf4Options, Recompute};
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
    pub(crate) embedding_adapter: Option<EmbeddingAdapter>,
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
    /// The lowest block that the backward pass enters, and whether the gradient of its input is of no use.
    pub(crate) lowest_block: (usize, bool),
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
        // A folder in NF4 says itself how its scales are kept.
        let load_in_4bit = config.nf4.map(|nested| Nf4Options { nested }).or(options.load_in_4bit);
        let options = &EngineOptions { load_in_4bit, ..options.clone() };
        options.check()?;
        let lora = options.lora.as_ref().map(|lora| adapted(config, lora)).transpose()?;
        let config = lora.as_ref().map_or(config, |(lora, _)| &lora.model);
        let shape = Shape::new(config);
        kind.check(&shape)?;
        if config.attention_gate {
            return Err(Error::new(ErrorCode::Config, "an output gate of attention is not built"));
        }
        if lora.as_ref().is_some_and(|(lora, _)| lora.config.use_dora)
            && (kind != DeviceKind::Cpu || options.dtype != DType::F32)
        {
            return Err(Error::new(ErrorCode::Config, "use_dora is built for float32 on the CPU").hint(
                "add --device cpu --bf16 false, or leave use_dora out: LoRA is built for every type and device",
            ));
        }
        let placement = match &lora {
            None => Placement::new(config, &options.frozen, load_in_4bit.is_some())?,
            Some((lora, _)) => Placement::adapted(lora, load_in_4bit.is_some())?,
        };
        let store = Store::new(&placement, options);
        let training = store.training.is_some();
        if let (true, Some((lora, _))) = (training, &lora) {
            lora.check_training()?;
        }
        let embedding = placement.one(Block::Embedding, Role::Embedding);
        let head = Linear {
            adapters: Adapters::new(&[(placement.adapter(Block::Head, Projection::Head), config.vocab_size)]),
            ..Linear::new(placement.span(Block::Head, Role::LmHead, Role::LmHead).unwrap_or(embedding))
        };
        let blocks = blocks(config, &placement);
        let layer =
            |l| blocks.partition_point(|block| block.layer < l)..blocks.partition_point(|block| block.layer <= l);
        let assigned: Vec<Param> = blocks.iter().flat_map(blocks::Block::assigned).chain(head.assigned()).collect();
        Ok(Model {
            attention_library: attention::planned(options.attention, kind, shape.heads, options.dtype, training)?,
            loss_chunk: options.loss_seq_chunk_size.unwrap_or(kind.default_logits_rows(config.vocab_size)),
            logits_dtype: if options.logits_16bit { options.dtype } else { DType::F32 },
            shape,
            rope: RopeTable::new(config),
            store,
            embedding,
            embedding_adapter: placement.adapter(Block::Embedding, Projection::Embedding).map(EmbeddingAdapter),
            layers: (0..config.layers.len()).map(layer).collect(),
            final_norm: placement.one(Block::FinalNorm, Role::FinalNorm),
            head,
            lowest_layer: placement.lowest_layer,
            lowest_block: lowest_block(&blocks, &placement),
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

/// The lowest block that the backward pass enters, and whether it ends there.
fn lowest_block(blocks: &[blocks::Block], placement: &Placement) -> (usize, bool) {
    if placement.trains(Block::Embedding) {
        return (0, false);
    }
    let lowest = blocks.iter().position(|block| placement.trains(block.name));
    lowest.map_or((blocks.len(), false), |lowest| (lowest, blocks[lowest].may_end()))
}

/// What is adapted in a model, and the seed of its dropout.
fn adapted(config: &ModelConfig, lora: &LoraOptions) -> Result<(Arc<Lora>, u64)> {
    Ok((Arc::new(Lora::new(config, &lora.config)?), lora.seed))
}
