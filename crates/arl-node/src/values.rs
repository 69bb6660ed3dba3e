//! What crosses to JavaScript and back: plain objects, and the engine's values that they represent.

use arl_cuda_libraries::places::{Machine, cache_folder};
use arl_engine::backend::DType;
use arl_engine::{Adam, AttentionChoice, BatchSize, GenerateSize, Hyper, LossScaling, Nf4Options, Recompute};
use arl_model::{Error, ErrorCode, Result};
use napi_derive::napi;

use crate::adapter::lora_options;
pub use crate::batch::MicroBatch;
use crate::parts::frozen;

/// What an engine is made of.
#[napi(object)]
#[derive(Clone)]
pub struct EngineOptions {
    /// Folder with `config.json` and weights.
    pub model_dir: String,
    /// Random weights from `seed` instead of the folder's; the folder need not have any.
    pub init_from_config: Option<bool>,
    /// Seed of random weights, and of what is rounded at random.
    pub seed: Option<f64>,
    /// `cpu`, `cuda` or `cuda:N`.
    pub device: String,
    /// Type of weights and activations. With f16 the loss is scaled.
    #[napi(ts_type = "'f32' | 'bf16' | 'f16'")]
    pub dtype: String,
    /// Round the logits of the loss to the 16 bits of the activations.
    #[napi(js_name = "logits16bit")]
    pub logits_16bit: Option<bool>,
    /// Keep no masters for bf16 weights, and round each update up or down at random, with `seed`.
    pub stochastic_rounding: Option<bool>,
    /// Keep AdamW's moments in bf16 instead of f32, and round them up or down at random, with `seed`.
    pub bf16_moments: Option<bool>,
    /// What the backward pass recomputes.
    #[napi(ts_type = "'off' | 'norms' | 'mlp' | 'block'")]
    pub recompute: String,
    /// Keep the layers' inputs in host memory between the passes.
    pub activation_offloading: Option<bool>,
    /// Keep moments, and the masters of 16-bit weights, in host memory.
    pub optimizer_offload: Option<bool>,
    /// Most rows of logits at a time.
    pub loss_seq_chunk_size: Option<u32>,
    /// Tokens of the largest micro-batch expected; a larger one makes the engine plan again.
    pub max_tokens: u32,
    /// Sequences of the micro-batch with the most.
    pub max_sequences: u32,
    /// Patches of the micro-batch with the most.
    pub max_patches: Option<u32>,
    /// Images of the micro-batch with the most.
    pub max_images: Option<u32>,
    /// Tokens of the largest micro-batch that is evaluated, if it is larger; absent: none is.
    pub eval_max_tokens: Option<u32>,
    /// Sequences of the evaluated micro-batch with the most.
    pub eval_max_sequences: Option<u32>,
    /// Tokens of each prompt of each call of `generate` that is expected; absent: none is.
    pub eval_prompts: Option<Vec<Vec<u32>>>,
    /// New tokens that those replies may have.
    pub eval_max_new_tokens: Option<u32>,
    /// Whether the vision tower is opened; else it is carried as it is.
    pub vision: Option<bool>,
    /// Parts that are not trained: `vision`, `merger`, `language`.
    pub freeze: Option<Vec<String>>,
    /// Who computes attention; absent: this project's kernels.
    #[napi(ts_type = "'auto' | 'cudnn' | 'own'")]
    pub attention: Option<String>,
    /// On a GPU: choose the algorithm of each large matrix product by measurement, and keep the choice; absent: yes.
    pub matmul_autotune: Option<bool>,
    /// AdamW: decay of the first moment.
    pub adam_beta1: f64,
    /// AdamW: decay of the second moment.
    pub adam_beta2: f64,
    /// AdamW: added to the root of the second moment.
    pub adam_epsilon: f64,
    /// AdamW: decoupled weight decay of all parameters but norms and biases.
    pub weight_decay: f64,
    /// Compute threads; absent: one a core.
    pub threads: Option<u32>,
    /// Leave out gradients and moments: evaluation and generation only.
    pub inference_only: Option<bool>,
    /// The text of an `adapter_config.json`: adapters are trained next to frozen weights.
    pub lora: Option<String>,
    /// Folder of an adapter with which they begin; absent: they are drawn with `seed`.
    pub adapter_dir: Option<String>,
    /// Keep the frozen weights of linear layers in NF4. A folder that has them so decides by itself.
    #[napi(js_name = "loadIn4bit")]
    pub load_in_4bit: Option<bool>,
    /// Keep the scales of such weights in 8 bits.
    pub nested_quant: Option<bool>,
    /// Sum gradients micro-batch by micro-batch over so many data-parallel ranks, which `joinRanks` brings in; absent: one
    /// rank, whose sums may be in another order.
    pub data_parallel: Option<u32>,
    /// What those ranks divide: 0 nothing (absent: that), 1 moments and masters, 2 also gradients, 3 also weights.
    pub zero: Option<u32>,
    /// Groups of data-parallel ranks that each have all weights, with `zero` 3; absent: 1, as of the four below.
    pub dp_replicate_size: Option<u32>,
    /// Ranks that divide heads and feed-forward columns.
    pub tp_size: Option<u32>,
    /// Ranks that divide the tokens of a micro-batch, and in attention its heads.
    pub cp_size: Option<u32>,
    /// Ranks that divide experts; they are among those that the other sizes count.
    pub ep_size: Option<u32>,
    /// Ranks that divide layers.
    pub pp_size: Option<u32>,
    /// The number of this rank; absent: 0.
    pub rank: Option<u32>,
    /// `restoreState` follows: the weights of the folder are not read, only their type and how they are named.
    pub restored: Option<bool>,
    /// The text of the template that rendered the rows, where it is not the folder's own: saved models have it.
    pub export_chat_template: Option<String>,
    /// The tokens that end a trained reply: saved models stop at them.
    pub export_stop_ids: Option<Vec<u32>>,
}

/// What `config.json` of a model says, as far as text and plan need it.
#[napi(object)]
pub struct ModelFacts {
    /// `qwen2`, `qwen3`, `qwen3_moe`.
    pub model_type: String,
    /// Rows of the embedding.
    pub vocab_size: u32,
    /// Positions that the model was made for.
    pub max_position_embeddings: u32,
}

/// Bytes of one category of memory.
#[napi(object)]
pub struct MemoryCategory {
    /// `weights`, `gradients`, `moments`, `activations`, ...
    pub name: String,
    /// Bytes.
    pub bytes: f64,
}

/// Layers of one name that have adapters.
#[napi(object)]
#[derive(Clone)]
pub struct AdaptedLayers {
    /// `q_proj`, for example.
    pub name: String,
    /// How many there are.
    pub count: u32,
}

/// Bytes by category, found by a dry run of the step.
#[napi(object)]
pub struct MemoryPlan {
    /// Parameters of the model, tied ones once.
    pub parameters: f64,
    /// Those that are trained: all, or those of adapters and whole copies.
    pub trained_parameters: f64,
    /// Model FLOPs a token without attention's share, as of an open engine.
    pub flops_per_token: f64,
    /// Attention's FLOPs for a token of a sequence of length n are `attentionFlops * n` (causal).
    pub attention_flops: f64,
    /// The layers that have adapters, by their names; absent: adapters were not asked for.
    pub adapted: Option<Vec<AdaptedLayers>>,
    /// Categories that are not empty.
    pub categories: Vec<MemoryCategory>,
    /// All of them.
    pub total_bytes: f64,
    /// What is offloaded to host memory.
    pub host_categories: Vec<MemoryCategory>,
    /// All of them.
    pub host_bytes: f64,
}

/// What an engine holds.
#[napi(object)]
pub struct EngineInfo {
    /// Parameters of the model, tied ones once.
    pub parameters: f64,
    /// Those that are trained: all, or those of adapters and whole copies.
    pub trained_parameters: f64,
    /// `qwen2`, `qwen3`, `qwen3_moe`.
    pub model_type: String,
    /// Rows of the embedding.
    pub vocab_size: u32,
    /// Positions that the model was made for.
    pub max_position_embeddings: u32,
    /// For people.
    pub device: String,
    /// `f32`, `bf16` or `f16`.
    pub dtype: String,
    /// Model FLOPs a token without attention's share: 6 x parameters of the matrix products that a token meets, head included; with
    /// adapters 4 x these, and 6 x the adapters' own.
    pub flops_per_token: f64,
    /// Attention's FLOPs for a token of a sequence of length n are `attentionFlops * n` (causal).
    pub attention_flops: f64,
    /// Keys of `config.json` that are not known to change nothing, and were not used.
    pub unknown_keys: Vec<String>,
    /// What a user should know of how the model runs on this device; absent: nothing.
    pub notice: Option<String>,
    /// What folders of saved models say differently from the folder that the engine was opened on; a sentence each.
    pub export_changes: Vec<String>,
}

/// What one micro-batch gave.
#[napi(object)]
pub struct MicroBatchStats {
    /// Tokens.
    pub tokens: u32,
    /// Targets of positive weight.
    pub target_tokens: u32,
    /// Sum of the targets' weights.
    pub target_weight: f64,
    /// Sum of weight x negative log-likelihood, in nats.
    pub loss_sum: f64,
    /// Targets whose logit was the greatest.
    pub correct: u32,
    /// Sum of the predicted distributions' entropies over the targets, in nats.
    pub entropy_sum: f64,
    /// The router's balance loss times its coefficient; 0 where none is added.
    pub balance_loss: f64,
}

/// What one optimizer step gave.
#[napi(object)]
pub struct StepStats {
    /// Sum of all losses over the weight of all targets, plus the micro-batches' balance losses.
    pub loss: f64,
    /// Norm of all gradients before clipping.
    pub grad_norm: f64,
    /// In the order of the micro-batches.
    pub micro_batches: Vec<MicroBatchStats>,
    /// Of each sequence of each micro-batch, the sum of weight x negative log-likelihood, in nats.
    pub sequence_losses: Vec<Vec<f64>>,
    /// With f16, the factor on the loss that gradients were computed with.
    pub loss_scale: Option<f64>,
    /// With f16: the loss or a gradient was not finite, nothing was updated, and the loss scale was halved.
    pub skipped: bool,
    /// Wall-clock time from the step's submission, or from the end of the step before it where that came later, until its
    /// figures were on the host.
    pub seconds: f64,
}

/// What changes from step to step.
#[napi(object)]
pub struct StepHyper {
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Gradients are scaled down to this norm; 0: never.
    pub max_grad_norm: f64,
}

/// How text is generated.
#[napi(object)]
pub struct GenerateOptions {
    /// Most tokens a reply.
    pub max_new_tokens: u32,
    /// Tokens that end a reply; the one that ends it is not part of it.
    pub stop_ids: Vec<u32>,
    /// 0, and where absent: the most probable token always.
    pub temperature: Option<f64>,
    /// Draw from this many of the most probable tokens; absent or 0: from all.
    pub top_k: Option<u32>,
    /// Draw from the fewest most probable tokens whose probabilities sum to this; absent: from all.
    pub top_p: Option<f64>,
    /// Seed of the draws; absent: 0.
    pub seed: Option<f64>,
}

pub(crate) fn dtype(word: &str) -> Result<DType> {
    match word {
        "f32" => Ok(DType::F32),
        "bf16" => Ok(DType::Bf16),
        "f16" => Ok(DType::F16),
        _ => Err(Error::new(ErrorCode::Config, format!("dtype: `{word}` is not known")).hint("use f32, bf16 or f16")),
    }
}

pub(crate) fn recompute(word: &str) -> Result<Recompute> {
    match word {
        "off" => Ok(Recompute::Off),
        "norms" => Ok(Recompute::Norms),
        "mlp" => Ok(Recompute::Mlp),
        "block" => Ok(Recompute::Block),
        _ => Err(Error::new(ErrorCode::Config, format!("recompute: `{word}` is not known"))
            .hint("use off, norms, mlp or block")),
    }
}

pub(crate) fn attention(word: Option<&str>) -> Result<AttentionChoice> {
    match word {
        None | Some("own") => Ok(AttentionChoice::Own),
        Some("auto") => Ok(AttentionChoice::Auto),
        Some("cudnn") => Ok(AttentionChoice::Cudnn),
        Some(word) => {
            Err(Error::new(ErrorCode::Config, format!("attention: `{word}` is not known"))
                .hint("use auto, cudnn or own"))
        }
    }
}

pub(crate) fn seed(options: &EngineOptions) -> u64 {
    options.seed.unwrap_or(0.0) as u64
}

pub(crate) fn core_options(options: &EngineOptions) -> Result<arl_engine::EngineOptions> {
    Ok(arl_engine::EngineOptions {
        dtype: dtype(&options.dtype)?,
        logits_16bit: options.logits_16bit.unwrap_or(false),
        stochastic_rounding: options.stochastic_rounding.unwrap_or(false),
        bf16_moments: options.bf16_moments.unwrap_or(false),
        rounding_seed: seed(options),
        loss_scaling: LossScaling::default(),
        recompute: recompute(&options.recompute)?,
        activation_offloading: options.activation_offloading.unwrap_or(false),
        optimizer_offload: options.optimizer_offload.unwrap_or(false),
        loss_seq_chunk_size: options.loss_seq_chunk_size.map(|rows| rows as usize),
        max_batch: BatchSize {
            tokens: options.max_tokens as usize,
            sequences: options.max_sequences as usize,
            patches: options.max_patches.unwrap_or(0) as usize,
            images: options.max_images.unwrap_or(0) as usize,
        },
        eval_batch: BatchSize {
            tokens: options.eval_max_tokens.unwrap_or(0) as usize,
            sequences: options.eval_max_sequences.unwrap_or(0) as usize,
            ..BatchSize::default()
        },
        generate: GenerateSize {
            prompts: options
                .eval_prompts
                .iter()
                .flatten()
                .map(|call| call.iter().map(|&n| n as usize).collect())
                .collect(),
            max_new_tokens: options.eval_max_new_tokens.unwrap_or(0) as usize,
        },
        vision: options.vision.unwrap_or(false),
        frozen: frozen(options)?,
        lora: lora_options(options)?,
        load_in_4bit: nf4(options),
        attention: attention(options.attention.as_deref())?,
        matmul_autotune: options.matmul_autotune.unwrap_or(true),
        matmul_cache: cache_folder(&Machine).map(|folder| folder.join("algorithms")),
        adam: Adam {
            beta1: options.adam_beta1 as f32,
            beta2: options.adam_beta2 as f32,
            epsilon: options.adam_epsilon as f32,
            weight_decay: options.weight_decay as f32,
        },
        inference_only: options.inference_only.unwrap_or(false),
        data_parallel: options.data_parallel.map(|ranks| ranks as usize),
        zero: u8::try_from(options.zero.unwrap_or(0)).unwrap_or(u8::MAX),
        mesh: crate::parts::mesh(options),
        rank: options.rank.unwrap_or(0) as usize,
    })
}

fn nf4(options: &EngineOptions) -> Option<Nf4Options> {
    (options.load_in_4bit == Some(true)).then(|| Nf4Options { nested: options.nested_quant == Some(true) })
}

pub(crate) fn plan_to_js(
    plan: arl_engine::MemoryPlan,
    (flops, adapted): (arl_engine::Flops, Option<Vec<AdaptedLayers>>),
) -> MemoryPlan {
    let category = |(name, bytes): (&str, usize)| MemoryCategory { name: name.to_string(), bytes: bytes as f64 };
    MemoryPlan {
        parameters: flops.parameters as f64,
        trained_parameters: flops.trained as f64,
        flops_per_token: flops.per_token,
        attention_flops: flops.attention,
        adapted,
        categories: plan.categories.into_iter().map(category).collect(),
        total_bytes: plan.total_bytes as f64,
        host_categories: plan.host_categories.into_iter().map(category).collect(),
        host_bytes: plan.host_bytes as f64,
    }
}

pub(crate) fn stats_to_js(stats: arl_engine::MicroBatchStats) -> MicroBatchStats {
    MicroBatchStats {
        tokens: stats.tokens as u32,
        target_tokens: stats.target_tokens as u32,
        target_weight: stats.target_weight,
        loss_sum: stats.loss_sum,
        correct: stats.correct as u32,
        entropy_sum: stats.entropy_sum,
        balance_loss: stats.balance_loss,
    }
}

pub(crate) fn step_to_js(stats: arl_engine::StepStats) -> StepStats {
    StepStats {
        loss: stats.loss,
        grad_norm: stats.grad_norm,
        micro_batches: stats.micro_batches.into_iter().map(stats_to_js).collect(),
        sequence_losses: stats.sequence_losses,
        loss_scale: stats.loss_scale.map(f64::from),
        skipped: stats.skipped,
        seconds: stats.seconds,
    }
}

pub(crate) fn hyper_from_js(hyper: &StepHyper) -> Hyper {
    Hyper { learning_rate: hyper.learning_rate as f32, max_grad_norm: hyper.max_grad_norm as f32 }
}
