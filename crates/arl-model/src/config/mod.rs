//! `config.json` of the supported families, in the spellings of transformers 4 and 5, as plain facts for the engine.
//! Absent keys get the defaults of transformers' configuration classes; a key that would change the computation in a way
//! that is not implemented is refused by name; keys that nothing reads are collected for a warning.

mod axes;
mod defaults;
mod dtype;
mod family;
mod keys;
mod layers;
mod mixer;
mod quantization;
mod refused;
mod rope;
mod vision;

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::folder::read_config;
use crate::{Error, ErrorCode, Result};
pub use axes::RopeAxes;
use defaults::Defaults;
pub use dtype::WeightDtype;
pub use family::Family;
use family::Layout;
use keys::Keys;
use layers::{layers, moe};
pub use mixer::{DeltaConfig, Mixer};
pub use rope::{RopeConfig, RopeScaling};
pub use vision::{VisionConfig, VisionKind};

/// A mixture of experts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MoeConfig {
    /// Experts of a layer.
    pub num_experts: usize,
    /// Experts that process each token.
    pub num_experts_per_tok: usize,
    /// Inner width of one expert.
    pub moe_intermediate_size: usize,
    /// Whether the weights of the chosen experts are divided by their sum.
    pub norm_topk_prob: bool,
    /// Inner width of the expert that processes every token, behind a gate of its own.
    pub shared_expert_intermediate_size: Option<usize>,
    /// Coefficient of the load-balancing loss, where transformers adds it to the loss: with `output_router_logits`.
    pub router_aux_loss_coef: Option<f32>,
}

/// The feed-forward part of a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mlp {
    /// One gated MLP.
    Dense {
        /// Its inner width.
        intermediate: usize,
    },
    /// A router and experts.
    Moe(MoeConfig),
}

/// What differs from layer to layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LayerConfig {
    /// What mixes tokens.
    pub mixer: Mixer,
    /// The feed-forward part.
    pub mlp: Mlp,
}

/// A model's configuration with every default filled in. Fields are named as in `config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// The file it was read from.
    pub path: PathBuf,
    /// `model_type`.
    pub family: Family,
    /// Whether the file nests what is read here under `text_config`.
    pub nested: bool,
    /// The vision tower. `None`: the folder has none, or it is carried: every saved model has its bytes.
    pub vision: Option<VisionConfig>,
    /// Rows of the embedding and of the head.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Inner width of a dense MLP.
    pub intermediate_size: usize,
    /// Layers; also the length of `layers`.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; divides `num_attention_heads`.
    pub num_key_value_heads: usize,
    /// Width of one head; even.
    pub head_dim: usize,
    /// Longest sequence that the model is meant for.
    pub max_position_embeddings: usize,
    /// Epsilon of every RMSNorm.
    pub rms_norm_eps: f64,
    /// Standard deviation of random weights.
    pub initializer_range: f64,
    /// Whether the head is the embedding.
    pub tie_word_embeddings: bool,
    /// Whether the query, key and value projections have biases.
    pub qkv_bias: bool,
    /// Whether the output projection of attention has a bias.
    pub o_bias: bool,
    /// Whether queries and keys are normalised per head.
    pub qk_norm: bool,
    /// Whether each query head has an output gate, whose rows follow the head's query in the query projection.
    pub attention_gate: bool,
    /// What a norm adds to its stored weight, except where that is centred on one: 0, or 1 where it is centred on zero.
    pub norm_offset: f32,
    /// `pad_token_id` as torch's embedding takes it: this row gets no gradient from the look-up (it does from a tied
    /// head), and is zero in random weights.
    pub padding_idx: Option<usize>,
    /// The rotary embedding.
    pub rope: RopeConfig,
    /// The experts, if the family has them.
    pub moe: Option<MoeConfig>,
    /// The delta rule of a hybrid family.
    pub delta: Option<DeltaConfig>,
    /// Layer by layer.
    pub layers: Vec<LayerConfig>,
    /// The type of the weights, as the file says.
    pub dtype: Option<WeightDtype>,
    /// The folder has its linear layers in NF4, as bitsandbytes writes them; `true`: their scales in 8 bits.
    pub nf4: Option<bool>,
    /// Keys of the file that neither this program nor transformers' model of this family reads; worth a warning.
    pub unknown_keys: Vec<String>,
}

const MAX_LAYERS: usize = 10_000;
const MAX_WIDTH: usize = 1 << 22;
const MAX_HEADS: usize = 1 << 16;
const MAX_HEAD_DIM: usize = 1024;
const MAX_EXPERTS: usize = 1 << 16;
/// Token ids are 32-bit integers with sign.
const MAX_VOCAB: usize = i32::MAX as usize;
/// More than any model has; keeps sizes in bytes far from overflow.
const MAX_PARAMETERS: u128 = 1 << 44;

impl ModelConfig {
    /// Reads `dir/config.json`.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        Self::from_json(&read_config(dir)?, &dir.join("config.json"))
    }

    /// Reads the text of a `config.json`; errors name it as `path`.
    pub fn from_json(text: &str, path: &Path) -> Result<Self> {
        let value: Value = serde_json::from_str(text)
            .map_err(|error| Error::new(ErrorCode::Config, format!("{}: not JSON: {error}", path.display())))?;
        let Value::Object(map) = &value else {
            return Err(Error::new(ErrorCode::Config, format!("{}: not a JSON object", path.display())));
        };
        let mut keys = Keys::new(map, path, "");
        let (family, layout) = family::family(&mut keys)?;
        let config = match layout {
            Layout::Text => {
                refused::check(&mut keys, family, false)?;
                read(&mut keys, family)?.text_alone()
            }
            Layout::Flat => {
                family::check_around(&mut keys);
                refused::check_around(&mut keys)?;
                refused::check(&mut keys, family, true)?;
                let config = read(&mut keys, family)?;
                vision::with_tower(config, &mut keys)?
            }
            Layout::Nested(text) => nested(&mut keys, text, family)?,
        };
        config.check_size()?;
        Ok(config)
    }

    /// The same model without its vision tower: no parameter of it is read or trained, and saved models have its tensors byte for
    /// byte. Positions have one axis, as those of text do.
    #[must_use]
    pub fn text_alone(self) -> Self {
        let rope = RopeConfig { axes: None, ..self.rope };
        ModelConfig { vision: None, rope, ..self }
    }

    /// Number of parameters, tied ones counted once.
    pub fn num_parameters(&self) -> u128 {
        crate::tensors::num_parameters(self)
    }

    fn check_size(&self) -> Result<()> {
        let experts = self.moe.map_or(0, |moe| moe.num_experts);
        let tower =
            self.vision.as_ref().map_or(0, |vision| vision.depth * 14 + vision.deepstack_visual_indexes.len() * 6);
        let tensors = self.num_hidden_layers * (experts * 3 + 16) + tower;
        let parameters = self.num_parameters();
        if parameters > MAX_PARAMETERS || tensors > 1 << 22 {
            return Err(Error::new(
                ErrorCode::Config,
                format!(
                    "{}: the sizes give {parameters} parameters in about {tensors} tensors, more than any model has",
                    self.path.display()
                ),
            )
            .hint(
                "check hidden_size, intermediate_size, vocab_size, num_hidden_layers, num_experts and vision_config",
            ));
        }
        Ok(())
    }
}

/// A file that nests its text part. What counts for the whole model is outside.
fn nested(outer: &mut Keys<'_>, text: &Map<String, Value>, family: Family) -> Result<ModelConfig> {
    let inner = &mut Keys::new(text, outer.path(), "text_config.");
    family::check_around(outer);
    family::check_within(inner);
    refused::check_around(outer)?;
    refused::check(inner, family, false)?;
    inner.get("model_type");
    let tie_word_embeddings = outer.flag("tie_word_embeddings", false)?;
    let dtype = dtype::read(outer)?;
    let mut config = read(inner, family)?;
    // transformers 4 tied Qwen2.5-VL by the key inside.
    let tied_within = family == Family::Qwen2_5Vl && config.tie_word_embeddings;
    family::check_repeated(outer, text);
    config.unknown_keys.extend(outer.not_asked());
    let tie_word_embeddings = tie_word_embeddings || tied_within;
    let config = ModelConfig { nested: true, tie_word_embeddings, dtype: dtype.or(config.dtype), ..config };
    vision::with_tower(config, outer)
}

fn read(keys: &mut Keys<'_>, family: Family) -> Result<ModelConfig> {
    let (defaults, hybrid) = (Defaults::of(family), family.is_hybrid());
    let vocab_size = keys.size("vocab_size", defaults.vocab_size, 1, MAX_VOCAB)?;
    let hidden_size = keys.size("hidden_size", defaults.hidden_size, 1, MAX_WIDTH)?;
    let intermediate_size = keys.size("intermediate_size", defaults.intermediate_size, 1, MAX_WIDTH)?;
    let num_hidden_layers = keys.size("num_hidden_layers", defaults.num_hidden_layers, 1, MAX_LAYERS)?;
    let num_attention_heads = keys.size("num_attention_heads", defaults.num_attention_heads, 1, MAX_HEADS)?;
    let num_key_value_heads = match keys.get("num_key_value_heads") {
        None => defaults.num_key_value_heads,
        Some(Value::Null) if matches!(family, Family::Qwen2 | Family::Qwen3) || family.is_vl() => num_attention_heads,
        Some(_) => keys.size("num_key_value_heads", 0, 1, MAX_HEADS)?,
    };
    if num_attention_heads % num_key_value_heads != 0 {
        return Err(keys.error(
            "num_attention_heads",
            format_args!("({num_attention_heads}) is not a multiple of `num_key_value_heads` ({num_key_value_heads})"),
        ));
    }
    let head_dim = head_dim(keys, family, hidden_size, num_attention_heads)?;
    let max_position_embeddings = keys.size("max_position_embeddings", defaults.max_position_embeddings, 1, 1 << 31)?;
    let rms_norm_eps = keys.number("rms_norm_eps", defaults.rms_norm_eps)?;
    if !(0.0..1.0).contains(&rms_norm_eps) {
        return Err(keys.error("rms_norm_eps", format_args!("must be from 0 to below 1, but is {rms_norm_eps}")));
    }
    let initializer_range = keys.number("initializer_range", 0.02)?;
    if !(0.0..=1e3).contains(&initializer_range) {
        return Err(keys.error("initializer_range", format_args!("must not be negative, but is {initializer_range}")));
    }
    let tie_word_embeddings = keys.flag("tie_word_embeddings", family == Family::Qwen3VlMoe)?;
    // Qwen2 has biases on query, key and value whatever its configuration says, and never one on the output.
    let qwen2 = family.has_qwen2_decoder();
    let attention_bias = !qwen2 && keys.flag("attention_bias", false)?;
    let moe = if family.has_experts() { Some(moe(keys, family)?) } else { None };
    let delta = if hybrid { Some(mixer::delta(keys)?) } else { None };
    let layers = layers(keys, family, num_hidden_layers, intermediate_size, moe, delta)?;
    let padding_idx = padding_idx(keys, vocab_size)?;
    let dtype = dtype::read(keys)?;
    let nf4 = quantization::read(keys)?;
    let mut unknown_keys = Vec::new();
    let (default_theta, axes) = (defaults.rope_theta, family.axes());
    let around = rope::Around { head_dim, max_position_embeddings, hybrid, default_theta, axes };
    let rope = rope::read(keys, &around, &mut unknown_keys)?;
    unknown_keys.extend(keys.not_asked());
    Ok(ModelConfig {
        path: keys.path().to_path_buf(),
        family,
        nested: false,
        vision: None,
        vocab_size,
        hidden_size,
        intermediate_size,
        num_hidden_layers,
        num_attention_heads,
        num_key_value_heads,
        head_dim,
        max_position_embeddings,
        rms_norm_eps,
        initializer_range,
        tie_word_embeddings,
        qkv_bias: qwen2 || attention_bias,
        o_bias: attention_bias,
        qk_norm: !qwen2,
        attention_gate: hybrid,
        norm_offset: if hybrid { 1.0 } else { 0.0 },
        padding_idx,
        rope,
        moe,
        delta,
        layers,
        dtype,
        nf4,
        unknown_keys,
    })
}

fn head_dim(keys: &mut Keys<'_>, family: Family, hidden_size: usize, heads: usize) -> Result<usize> {
    let given = match family {
        Family::Qwen3 | Family::Qwen3Vl => Some(keys.size("head_dim", 128, 1, MAX_HEAD_DIM)?),
        _ if family.is_hybrid() => Some(keys.size("head_dim", 256, 1, MAX_HEAD_DIM)?),
        _ => keys.optional_size("head_dim", 1, MAX_HEAD_DIM)?,
    };
    let head_dim = match given {
        Some(head_dim) => head_dim,
        None if hidden_size.is_multiple_of(heads) => hidden_size / heads,
        None => {
            return Err(keys.error(
                "hidden_size",
                format_args!("({hidden_size}) is not a multiple of `num_attention_heads` ({heads})"),
            ));
        }
    };
    // Qwen2.5-VL's attention divides the width, whatever the key says.
    if family == Family::Qwen2_5Vl && head_dim * heads != hidden_size {
        let what = format_args!("is {head_dim}; heads of {family} are `hidden_size` ({hidden_size}) over {heads}");
        return Err(keys.error("head_dim", what));
    }
    if head_dim % 2 != 0 || head_dim > MAX_HEAD_DIM {
        return Err(keys.error("head_dim", format_args!("must be even and at most {MAX_HEAD_DIM}, but is {head_dim}")));
    }
    Ok(head_dim)
}

fn padding_idx(keys: &mut Keys<'_>, vocab_size: usize) -> Result<Option<usize>> {
    let Some(value) = keys.get_non_null("pad_token_id") else { return Ok(None) };
    // torch counts a negative index from the end.
    let index =
        value.as_i64().and_then(|id| if id < 0 { id.checked_add_unsigned(vocab_size as u64) } else { Some(id) });
    match index.and_then(|id| usize::try_from(id).ok()).filter(|&id| id < vocab_size) {
        Some(id) => Ok(Some(id)),
        None => Err(keys.wrong("pad_token_id", &format!("null or an id below `vocab_size` ({vocab_size})"), value)),
    }
}
