//! What an engine is made of and what changes from step to step: plain values, and what is wrong with them.

use std::path::PathBuf;

use arl_model::{Error, ErrorCode, LoraConfig, ModelConfig, Result};

use crate::backend::DType;
use crate::batch::BatchSize;
use crate::generate::GenerateSize;
use crate::loss_scale::LossScaling;
use crate::mesh::{Mesh, Place};

/// What the backward pass computes again instead of finding it in memory. Results are equal in bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Recompute {
    /// Nothing.
    Off,
    /// Norms, rotations and SwiGLU: no matrix product is repeated.
    Norms,
    /// The feed-forward part as well.
    Mlp,
    /// The whole layer: only its input is kept.
    Block,
}

/// Who computes attention while an engine trains.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AttentionChoice {
    /// cuDNN on a GPU that it serves, over bf16 and heads of 64 or 128 elements; else this project's kernels.
    Auto,
    /// cuDNN, or an error that says why not. Results are not equal in bits from run to run.
    Cudnn,
    /// This project's kernels. Equal inputs give equal bits.
    #[default]
    Own,
}

/// What an engine is made of.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Type of weights and activations: f32, bf16 or f16. Masters and gradients are f32 in either case.
    pub dtype: DType,
    /// Round the logits of the loss to `dtype`, which has 16 bits, before their statistics are summed in f32. Off: they are f32.
    pub logits_16bit: bool,
    /// Keep no masters of bf16 weights, and round each update up or down at random.
    pub stochastic_rounding: bool,
    /// Keep both moments in bf16 instead of f32, and round them up or down at random.
    pub bf16_moments: bool,
    /// Seeds random rounding, together with the step and the parameter's place.
    pub rounding_seed: u64,
    /// How the loss is scaled in f16.
    pub loss_scaling: LossScaling,
    /// What the backward pass computes again.
    pub recompute: Recompute,
    /// Keep the layers' inputs in host memory between the passes. Results are equal in bits.
    pub activation_offloading: bool,
    /// Keep moments, and the masters of weights of 16 bits, in host memory. Results are equal in bits.
    pub optimizer_offload: bool,
    /// Most rows of logits at a time; `None`: as many as fit in 32 MiB (1.2 GiB on a GPU), in whole 256s, at
    /// least one.
    pub loss_seq_chunk_size: Option<usize>,
    /// Have the vision tower of a model that sees in the engine. Off: its bytes are carried to every saved model, and images are
    /// refused.
    pub vision: bool,
    /// The largest micro-batch expected. A larger one makes the engine plan and reserve again before the step.
    pub max_batch: BatchSize,
    /// The largest micro-batch expected of which the loss alone is computed, where it is larger; of no tokens: none.
    pub eval_batch: BatchSize,
    /// Replies that are expected to be generated. Larger ones make the engine reserve more before they are generated.
    pub generate: GenerateSize,
    /// AdamW's constants.
    pub adam: Adam,
    /// Parameters that are not trained, as patterns of their names in which `*` stands for any characters. They have no
    /// gradients, moments or masters, and are no part of a saved state.
    pub frozen: Vec<String>,
    /// Train adapters of low rank next to frozen weights.
    pub lora: Option<LoraOptions>,
    /// Keep the frozen weights of linear layers in NF4. A folder that has them so decides by itself.
    pub load_in_4bit: Option<Nf4Options>,
    /// Who computes attention. A library's share of memory is planned where it may be used.
    pub attention: AttentionChoice,
    /// Have a device with several algorithms for a matrix product choose by measurement; off, and for inference only: the first
    /// that it proposes. Equal inputs give equal bits on one device only under equal choices, which a saved state and
    /// `matmul_cache` keep.
    pub matmul_autotune: bool,
    /// Folder in which such choices are kept for later runs; `None`: they are not.
    pub matmul_cache: Option<PathBuf>,
    /// Leave out gradients and moments: evaluation and generation only.
    pub inference_only: bool,
    /// Sum the gradients of micro-batches one by one in the order of the step, over so many data-parallel ranks. Results do
    /// not depend on their number. `None`: one rank, which accumulates inside its products.
    pub data_parallel: Option<usize>,
    /// What these ranks divide, on CPUs: 0 nothing; 1 moments and masters; 2 also gradients; 3 also weights. Results
    /// are equal in bits.
    pub zero: u8,
    /// What ranks divide besides micro-batches: there are `data_parallel` times the product of `tp`, `cp` and `pp`. Needs
    /// `data_parallel`, which may be 1.
    pub mesh: Mesh,
    /// The number of this rank, from 0.
    pub rank: usize,
}

impl Default for EngineOptions {
    fn default() -> Self {
        EngineOptions {
            dtype: DType::F32,
            logits_16bit: false,
            stochastic_rounding: false,
            bf16_moments: false,
            rounding_seed: 0,
            loss_scaling: LossScaling::default(),
            recompute: Recompute::Norms,
            activation_offloading: false,
            optimizer_offload: false,
            loss_seq_chunk_size: None,
            vision: true,
            max_batch: BatchSize { tokens: 1, sequences: 1, ..BatchSize::default() },
            eval_batch: BatchSize::default(),
            generate: GenerateSize::default(),
            adam: Adam::default(),
            frozen: Vec::new(),
            lora: None,
            load_in_4bit: None,
            attention: AttentionChoice::default(),
            matmul_autotune: true,
            matmul_cache: None,
            inference_only: false,
            data_parallel: None,
            zero: 0,
            mesh: Mesh::default(),
            rank: 0,
        }
    }
}

/// Adapters of low rank.
#[derive(Clone, Debug)]
pub struct LoraOptions {
    /// Which layers are adapted, and how.
    pub config: LoraConfig,
    /// Seeds A's random values, and the masks of dropout together with the step and the layer.
    pub seed: u64,
}

/// Weights in NF4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Nf4Options {
    /// Keep their scales in 8 bits, for 4.13 bits a weight instead of 4.5 (double quantization).
    pub nested: bool,
}

/// AdamW's constants; weight decay is decoupled, and applies to all parameters but norms and biases.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Adam {
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub epsilon: f32,
    /// Weight decay a step, times the learning rate.
    pub weight_decay: f32,
}

impl Default for Adam {
    fn default() -> Self {
        Adam { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0 }
    }
}

/// What changes from step to step.
#[derive(Clone, Copy, Debug)]
pub struct Hyper {
    /// Learning rate; 0 moves no weight, but moments as ever.
    pub learning_rate: f32,
    /// Gradients are scaled down to this norm; 0: never.
    pub max_grad_norm: f32,
}

/// Where weights come from.
#[derive(Clone, Copy, Debug)]
pub enum Weights {
    /// The folder's safetensors.
    Checkpoint,
    /// Random ones, as Hugging Face's initialisation draws them, from this seed.
    Random(u64),
    /// A saved state, which [`Engine::restore_state`](crate::Engine::restore_state) reads: of the folder's safetensors, type,
    /// layout and frozen parameters count.
    Restored,
    /// None: for a device that computes nothing, on which a step is counted.
    Unset,
}

impl EngineOptions {
    /// A folder's configuration as an engine has it: with the vision tower, or without.
    pub(crate) fn seeing(&self, config: ModelConfig) -> ModelConfig {
        if self.vision { config } else { config.text_alone() }
    }

    /// The place of this rank in its mesh.
    pub(crate) fn place(&self) -> Result<Place> {
        Place::new(self.mesh, self.data_parallel.unwrap_or(1), self.rank)
    }

    /// Refuses values that no engine can work with.
    pub(crate) fn check(&self) -> Result<()> {
        let option = |what: &str, hint: &str| Err(Error::new(ErrorCode::Config, what.to_string()).hint(hint));
        if !matches!(self.dtype, DType::F32 | DType::Bf16 | DType::F16) {
            return option("weights and activations are f32, bf16 or f16", "choose one of them");
        }
        if self.stochastic_rounding && self.dtype != DType::Bf16 {
            return option(
                &format!("stochastic rounding is for bf16 weights, and these are {:?}", self.dtype),
                "add --bf16, or leave bf16_stochastic_round out: other types keep exact masters",
            );
        }
        if self.logits_16bit && self.dtype == DType::F32 {
            return option(
                "logits_16bit rounds logits to the type of the activations, which is float32",
                "add --bf16 or --fp16, or leave logits_16bit out",
            );
        }
        if self.stochastic_rounding && self.lora.is_some() {
            return option(
                "adapters keep exact f32 masters, and stochastic rounding would leave them out",
                "leave bf16_stochastic_round out: with adapters it saves next to nothing",
            );
        }
        if self.lora.is_some() && !self.frozen.is_empty() {
            return option("adapters freeze the model by themselves", "leave the frozen parameters out");
        }
        if self.load_in_4bit.is_some() && self.lora.is_none() && !self.inference_only {
            return option(
                "weights in 4 bits are frozen, and nothing else would be trained",
                "add --use_peft: adapters are trained next to them",
            );
        }
        if self.data_parallel == Some(0) {
            return option("there are 0 data-parallel ranks", "one rank is the least");
        }
        if self.zero > 3 {
            return option(&format!("zero is {}", self.zero), "it is 0, 1, 2 or 3");
        }
        if self.zero > 0 && self.data_parallel.is_none() {
            return option("zero divides among data-parallel ranks, and there are none", "take zero 0");
        }
        if self.mesh != Mesh::default() && self.data_parallel.is_none() {
            return option("a mesh is of data-parallel ranks too, and there are none", "say that there is one");
        }
        self.place()?;
        if self.loss_seq_chunk_size == Some(0) {
            return option("loss_seq_chunk_size is 0", "it is the number of rows of logits at a time");
        }
        let Adam { beta1, beta2, epsilon, weight_decay } = self.adam;
        let decay = |beta: f32| (0.0..1.0).contains(&beta);
        if !decay(beta1) || !decay(beta2) {
            return option("AdamW's betas must be at least 0 and below 1", "usual are 0.9 and 0.95 or 0.999");
        }
        let finite = epsilon.is_finite() && weight_decay.is_finite();
        if !finite || epsilon <= 0.0 || weight_decay < 0.0 {
            return option(
                "AdamW's epsilon must be above 0, its weight decay at least 0, both finite",
                "usual are 1e-8 and 0.1",
            );
        }
        Ok(())
    }
}
