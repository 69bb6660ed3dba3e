//! What an engine knows of its model that does not change from step to step: sizes, places, and how it is computed.

use std::ops::Range;
use std::sync::Arc;

use arl_model::{Block, Error, ErrorCode, Family, Lora, ModelConfig, NF4_BLOCK, Projection, Result, Role, RopeTable};

use crate::attention;
use crate::backend::{Buffer, DType, DeviceKind, NormWeight};
use crate::batch::MicroBatch;
use crate::blocks::linear::Linear;
use crate::blocks::{self, Adapters, EmbeddingAdapter, LowRankDropout, blocks};
use crate::mesh::{Axis, Place};
use crate::mesh_refusals;
use crate::options::{EngineOptions, LoraOptions, Nf4Options, Recompute};
use crate::pipeline_parallel::layers_of_stage;
use crate::placement::cut::{Complete, Cut, Owned, owned};
use crate::placement::division;
use crate::placement::shards::Shards;
use crate::placement::store::Store;
use crate::placement::{Param, Placement, Run};
use crate::shape::Shape;
use crate::vision::Tower;
use crate::whole::Whole;

/// A model on a kind of device; needs no memory of it.
#[derive(Clone, Debug)]
pub(crate) struct Model {
    /// The kind of device, on which what leaves work in depends.
    pub(crate) kind: DeviceKind,
    /// Of this rank.
    pub(crate) place: Place,
    pub(crate) shape: Shape,
    /// Frequencies of the rotary embedding.
    pub(crate) rope: RopeTable,
    pub(crate) placement: Placement,
    /// How ranks divide what is trained; none: every one has all of it.
    pub(crate) cut: Option<Arc<Cut>>,
    /// What this rank's optimizer updates.
    pub(crate) runs: Vec<Run>,
    pub(crate) store: Store,
    /// `[vocab, hidden]`.
    pub(crate) embedding: Param,
    pub(crate) embedding_adapter: Option<EmbeddingAdapter>,
    /// In the order of the forward pass.
    pub(crate) blocks: Vec<blocks::Block>,
    /// Which blocks each layer has; those of other stages of a pipeline have none.
    pub(crate) layers: Vec<Range<usize>>,
    /// The layers of this rank's stage of the pipeline: all, where there is one.
    pub(crate) own_layers: Range<usize>,
    /// What makes rows of images.
    pub(crate) tower: Option<Tower>,
    /// `[hidden]`.
    pub(crate) final_norm: Param,
    /// `[vocab, hidden]`; the embedding itself where they are tied.
    pub(crate) head: Linear,
    /// The lowest layer that the backward pass enters: those below it train nothing and keep nothing.
    pub(crate) lowest_layer: usize,
    /// The lowest block that the backward pass enters, and whether the gradient of its input is of no use.
    pub(crate) lowest_block: (usize, bool),
    /// What gradients are only ever added to: norms, biases, experts, the look-up's embedding. Products assign the others' in
    /// the first micro-batch of a step.
    pub(crate) added: Vec<Added>,
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
    /// Weights in 4 bits have scales that were rounded to 8 bits, however these are kept.
    pub(crate) nested_scales: bool,
    /// Its adapters, and the seed of their dropout.
    pub(crate) lora: Option<(Arc<Lora>, u64)>,
    /// What it is put together from, where no rank has all of it.
    pub(crate) whole: Option<Arc<Whole>>,
}

/// Gradients that are zero before anything is added to them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Added {
    /// First element in the array of gradients.
    pub(crate) first: usize,
    pub(crate) len: usize,
    /// Before what they are to be zeroed; [`Complete::Loss`]: before the backward pass.
    pub(crate) before: Complete,
}

impl Model {
    /// # Errors
    /// `ARL_CONFIG` for options that contradict the model or the kind of device.
    pub(crate) fn new(config: &ModelConfig, options: &EngineOptions, kind: DeviceKind) -> Result<Self> {
        Self::of(config, options, kind, None)
    }

    /// As [`Model::new`]; with `divided`, put together from that one and what other ranks have.
    pub(crate) fn of(
        config: &ModelConfig,
        options: &EngineOptions,
        kind: DeviceKind,
        divided: Option<&Self>,
    ) -> Result<Self> {
        // A folder in NF4 says itself how its scales are kept. What is put together has no weights in 4 bits.
        let load_in_4bit = config.nf4.map(|nested| Nf4Options { nested }).or(options.load_in_4bit);
        let load_in_4bit = load_in_4bit.filter(|_| divided.is_none());
        let options = &EngineOptions { load_in_4bit, ..options.clone() };
        options.check()?;
        let lora = options.lora.as_ref().map(|lora| adapted(config, lora)).transpose()?;
        let config = lora.as_ref().map_or(config, |(lora, _)| &lora.model);
        division::check(config, options)?;
        let place = options.place()?;
        let own_layers = layers_of_stage(config, place.mesh.pp, place.index(Axis::Pipeline));
        let shape = Shape::new(config);
        kind.check(&shape, options.dtype)?;
        mesh_refusals::check(options.mesh, config)?;
        let nested_scales = load_in_4bit.is_some_and(|nf4| nf4.nested);
        let fused = load_in_4bit.is_some() && config.family == Family::Qwen3Next;
        if fused && !config.hidden_size.is_multiple_of(NF4_BLOCK) {
            let what = format!(
                "load_in_4bit in {}, whose files fuse projections, needs rows of whole blocks of {NF4_BLOCK}; hidden_size is {}",
                config.family, config.hidden_size
            );
            return Err(Error::new(ErrorCode::Config, what).hint("leave load_in_4bit out"));
        }
        // Scales in 8 bits share one by 256 along the whole tensor, fused or divided, not along its parts.
        let parts = fused || place.mesh.tp > 1;
        let load_in_4bit = load_in_4bit.map(|nf4| Nf4Options { nested: nf4.nested && !parts });
        let options = &EngineOptions { load_in_4bit, ..options.clone() };
        let nf4 = load_in_4bit.is_some();
        let mut placement = match &lora {
            None => Placement::new(config, &options.frozen, nf4, &place)?,
            Some((lora, _)) => Placement::adapted(lora, nf4, options.dtype != DType::F32, &place)?,
        };
        placement.quantized.kind = kind;
        division::check_blocks(&placement)?;
        if options.zero > 2 && placement.runs.iter().any(|run| run.wide) {
            let what = "zero 3 divides weights of one type, and use_dora in 16 bits keeps magnitudes in 32";
            return Err(Error::new(ErrorCode::Config, what).hint("set zero to 2, or bf16 and fp16 to false"));
        }
        let ranks = options.data_parallel.filter(|_| options.zero > 0 && !options.inference_only);
        let cut = ranks.map(|_| {
            // Sums over all ranks of a stage are of no use to parameters that not all of them have.
            let cut = Cut::new(&placement, options.zero > 1 || place.mesh.divides_model());
            let cut = cut.overlapping(kind == DeviceKind::Cuda);
            Arc::new(if options.zero > 2 { cut.with_weights(&placement) } else { cut })
        });
        if let Some(cut) = &cut {
            placement.cut(cut);
        }
        let runs = cut.as_ref().map_or_else(|| placement.runs.clone(), |cut| cut.runs(&placement.runs, place.rank));
        let whole = divided.map(|divided| Whole::new(divided, &mut placement));
        let store = Store::new(&placement, cut.as_deref(), options);
        let training = store.training.is_some();
        if let (true, Some((lora, _))) = (training, &lora) {
            lora.check_training()?;
        }
        let embedding = placement.one(Block::Embedding, Role::Embedding);
        let head = Linear {
            adapters: Adapters::new(&[(placement.adapter(Block::Head, Projection::Head), config.vocab_size)]),
            ..Linear::new(placement.span(Block::Head, Role::LmHead, Role::LmHead).unwrap_or(embedding))
        };
        let mut blocks = blocks(config, &placement, &place);
        blocks.retain(|block| own_layers.contains(&block.layer));
        let layer =
            |l| blocks.partition_point(|block| block.layer < l)..blocks.partition_point(|block| block.layer <= l);
        let tower = Tower::new(config, &placement, options.dtype);
        let sees = tower.as_ref().is_some_and(Tower::is_trained);
        let of_head = place.is_last_stage().then(|| head.assigned()).into_iter().flatten();
        let assigned: Vec<Param> = blocks.iter().flat_map(blocks::Block::assigned).chain(of_head).collect();
        let mut model = Model {
            kind,
            place,
            attention_library: attention::planned(options.attention, kind, shape.heads, options.dtype, training)?,
            loss_chunk: options.loss_seq_chunk_size.unwrap_or(kind.default_logits_rows(config.vocab_size)),
            logits_dtype: if options.logits_16bit { options.dtype } else { DType::F32 },
            shape,
            rope: RopeTable::new(config),
            nested_scales,
            store,
            embedding,
            embedding_adapter: placement.adapter(Block::Embedding, Projection::Embedding).map(EmbeddingAdapter),
            layers: (0..config.layers.len()).map(layer).collect(),
            final_norm: placement.one(Block::FinalNorm, Role::FinalNorm),
            head,
            lowest_layer: placement.lowest_layer.max(own_layers.start),
            lowest_block: if sees { (0, false) } else { lowest_block(&blocks, &placement) },
            added: added(&placement, cut.as_deref(), &assigned),
            cut,
            runs,
            tower,
            own_layers,
            blocks,
            placement,
            dtype: options.dtype,
            recompute: options.recompute,
            activation_offloading: options.activation_offloading,
            lora: lora.clone(),
            whole,
        };
        model.place_weights();
        Ok(model)
    }

    /// Dropout of a micro-batch of a step, of which this rank has the tokens `first` on ([`Sliced::first`]); none where nothing is
    /// dropped.
    ///
    /// [`Sliced::first`]: crate::token_slice::Sliced::first
    pub(crate) fn dropout(&self, step: u64, micro_batch: usize, first: [usize; 2]) -> Option<LowRankDropout> {
        let (lora, seed) = self.lora.as_ref()?;
        let probability = lora.config.lora_dropout;
        let words = [*seed, step, micro_batch as u64];
        (probability > 0.0).then_some(LowRankDropout { probability, words, first })
    }

    /// Refuses a micro-batch that the model cannot take; `index` names it in errors.
    pub(crate) fn check(&self, index: usize, batch: &MicroBatch) -> Result<()> {
        batch.validate(index, self.shape.vocab, self.shape.axes)?;
        batch.validate_images(&format!("micro-batch {index}"), self.tower.as_ref().map(|tower| &tower.config))
    }

    /// Whether gradients, too, exist in pieces.
    pub(crate) fn divides_gradients(&self) -> bool {
        self.cut.as_ref().is_some_and(|cut| cut.gradients)
    }

    /// What this rank owns of a parameter's moments and masters; of a frozen one, what it writes to files.
    pub(crate) fn owned(&self, param: Param) -> Vec<Owned> {
        let cut = self.cut.as_deref();
        owned(cut, param, self.place.rank)
    }

    /// How ranks divide weights; none: every one has all of them.
    pub(crate) fn shards(&self) -> Option<&Shards> {
        self.cut.as_ref()?.weights.as_ref()
    }

    /// What this rank has of a parameter's weights all the time: first elements within it, and their places. All of it, unless
    /// ranks divide weights.
    pub(crate) fn weight_parts(&self, param: Param) -> Vec<(usize, Buffer)> {
        match self.shards() {
            None => vec![(0, self.store.weight(param))],
            Some(shards) => shards.parts(param, self.store.weights),
        }
    }

    /// Bytes that ranks send each other of a weight.
    pub(crate) fn weight_bytes(&self) -> usize {
        let wide = self.placement.runs.iter().any(|run| run.wide);
        if wide { DType::F32.bytes() } else { self.dtype.bytes() }
    }

    /// Whether parameters of a role are f32 in a weights' arena of 16 bits ([`Param::wide`]).
    pub(crate) fn is_wide(&self, role: Role) -> bool {
        self.dtype != DType::F32 && matches!(role, Role::LoraMagnitude(_))
    }

    /// The weight of a norm.
    pub(crate) fn norm(&self, weight: Param) -> NormWeight {
        NormWeight { weight: self.store.weight(weight), offset: self.shape.norm_offset }
    }
}

/// What is only ever added to: all but what products assign.
fn added(placement: &Placement, cut: Option<&Cut>, assigned: &[Param]) -> Vec<Added> {
    let all = placement.all_but(assigned).into_iter();
    let Some(cut) = cut.filter(|cut| cut.gradients) else {
        return all.map(|(first, len)| Added { first, len, before: Complete::Loss }).collect();
    };
    let parts = |(first, len): (usize, usize)| {
        cut.buckets.iter().filter_map(move |bucket| {
            let (start, end) = (first.max(bucket.start), (first + len).min(bucket.start + bucket.len));
            let before = if bucket.shared { bucket.complete } else { Complete::Loss };
            (start < end).then(|| Added { first: bucket.gradient + start - bucket.start, len: end - start, before })
        })
    };
    all.flat_map(parts).collect()
}

/// The lowest block that the backward pass enters, and whether it ends there.
fn lowest_block(blocks: &[blocks::Block], placement: &Placement) -> (usize, bool) {
    // What an earlier stage trains needs the gradient of this one's input.
    let below = blocks.first().is_some_and(|first| placement.lowest_layer < first.layer);
    if below || placement.trains(Block::Embedding) {
        return (0, false);
    }
    let lowest = blocks.iter().position(|block| placement.trains(block.name));
    lowest.map_or((blocks.len(), false), |lowest| (lowest, blocks[lowest].may_end()))
}

/// What is adapted in a model, and the seed of its dropout.
fn adapted(config: &ModelConfig, lora: &LoraOptions) -> Result<(Arc<Lora>, u64)> {
    Ok((Arc::new(Lora::new(config, &lora.config)?), lora.seed))
}
