//! `config.json` of the supported families, in the spellings of transformers 4 and 5, as plain facts for the engine.
//! Absent keys take the defaults of transformers' configuration classes; a key that would change the computation in a
//! way that is not built is refused by name; keys that nothing reads are collected for a warning.

mod dtype;
mod keys;
mod refused;
mod rope;

use std::fmt;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::folder::read_config;
use crate::{Error, ErrorCode, Result};
pub use dtype::WeightDtype;
use keys::Keys;
pub use rope::{RopeConfig, RopeScaling};

/// The supported families, by `model_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// Qwen2 and Qwen2.5.
    Qwen2,
    /// Qwen3, dense.
    Qwen3,
    /// Qwen3 with a mixture of experts.
    Qwen3Moe,
}

impl Family {
    /// The family's `model_type`.
    pub fn as_str(self) -> &'static str {
        match self {
            Family::Qwen2 => "qwen2",
            Family::Qwen3 => "qwen3",
            Family::Qwen3Moe => "qwen3_moe",
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A mixture of experts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MoeConfig {
    /// Experts of a layer.
    pub num_experts: usize,
    /// Experts that each token visits.
    pub num_experts_per_tok: usize,
    /// Inner width of one expert.
    pub moe_intermediate_size: usize,
    /// Whether the weights of the chosen experts are divided by their sum.
    pub norm_topk_prob: bool,
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
    /// Sliding window: a token sees itself and the `window - 1` tokens before it. None: all tokens before it.
    pub window: Option<usize>,
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
    /// Longest sequence the model was made for.
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
    /// `pad_token_id` as torch's embedding takes it: this row gets no gradient from the look-up (from a tied head it
    /// does), and is zero in random weights.
    pub padding_idx: Option<usize>,
    /// The rotary embedding.
    pub rope: RopeConfig,
    /// The experts, for the family that has them.
    pub moe: Option<MoeConfig>,
    /// Layer by layer.
    pub layers: Vec<LayerConfig>,
    /// The type in which the weights are said to be stored.
    pub dtype: Option<WeightDtype>,
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

    /// Reads the text of a `config.json`; `path` is what errors call it.
    pub fn from_json(text: &str, path: &Path) -> Result<Self> {
        let value: Value = serde_json::from_str(text)
            .map_err(|error| Error::new(ErrorCode::Config, format!("{}: not JSON: {error}", path.display())))?;
        let Value::Object(map) = &value else {
            return Err(Error::new(ErrorCode::Config, format!("{}: not a JSON object", path.display())));
        };
        let mut keys = Keys::new(map, path, "");
        let family = family(&mut keys)?;
        refused::check(&mut keys, family)?;
        let config = read(&mut keys, family)?;
        config.check_size()?;
        Ok(config)
    }

    /// Trainable numbers, tied ones once.
    pub fn num_parameters(&self) -> u128 {
        crate::tensors::num_parameters(self)
    }

    fn check_size(&self) -> Result<()> {
        let experts = self.moe.map_or(0, |moe| moe.num_experts);
        let tensors = self.num_hidden_layers * (experts * 3 + 16);
        let parameters = self.num_parameters();
        if parameters > MAX_PARAMETERS || tensors > 1 << 22 {
            return Err(Error::new(
                ErrorCode::Config,
                format!(
                    "{}: the sizes multiply to {parameters} parameters in about {tensors} tensors, which no model has",
                    self.path.display()
                ),
            )
            .hint("check hidden_size, intermediate_size, vocab_size, num_hidden_layers and num_experts"));
        }
        Ok(())
    }
}

fn family(keys: &mut Keys<'_>) -> Result<Family> {
    const SUPPORTED: &str = "supported are qwen2 (Qwen2, Qwen2.5), qwen3 and qwen3_moe";
    match keys.get("model_type") {
        None => Err(keys.error("model_type", "is missing").hint(SUPPORTED)),
        Some(Value::String(name)) => [Family::Qwen2, Family::Qwen3, Family::Qwen3Moe]
            .into_iter()
            .find(|family| family.as_str() == name)
            .ok_or_else(|| keys.error("model_type", format_args!("`{name}` is not supported")).hint(SUPPORTED)),
        Some(value) => Err(keys.wrong("model_type", "a string", value).hint(SUPPORTED)),
    }
}

fn read(keys: &mut Keys<'_>, family: Family) -> Result<ModelConfig> {
    let moe_family = family == Family::Qwen3Moe;
    let defaults = if moe_family { (2048, 6144, 24) } else { (4096, 22016, 32) };
    let vocab_size = keys.size("vocab_size", 151_936, 1, MAX_VOCAB)?;
    let hidden_size = keys.size("hidden_size", defaults.0, 1, MAX_WIDTH)?;
    let intermediate_size = keys.size("intermediate_size", defaults.1, 1, MAX_WIDTH)?;
    let num_hidden_layers = keys.size("num_hidden_layers", defaults.2, 1, MAX_LAYERS)?;
    let num_attention_heads = keys.size("num_attention_heads", 32, 1, MAX_HEADS)?;
    let num_key_value_heads = match keys.get("num_key_value_heads") {
        None => {
            if moe_family {
                4
            } else {
                32
            }
        }
        Some(Value::Null) if !moe_family => num_attention_heads,
        Some(_) => keys.size("num_key_value_heads", 0, 1, MAX_HEADS)?,
    };
    if num_attention_heads % num_key_value_heads != 0 {
        return Err(keys.error(
            "num_attention_heads",
            format_args!("({num_attention_heads}) is not a multiple of `num_key_value_heads` ({num_key_value_heads})"),
        ));
    }
    let head_dim = head_dim(keys, family, hidden_size, num_attention_heads)?;
    let max_position_embeddings = keys.size("max_position_embeddings", 32_768, 1, 1 << 31)?;
    let rms_norm_eps = keys.number("rms_norm_eps", 1e-6)?;
    if !(0.0..1.0).contains(&rms_norm_eps) {
        return Err(keys.error("rms_norm_eps", format_args!("must be from 0 to below 1, but is {rms_norm_eps}")));
    }
    let initializer_range = keys.number("initializer_range", 0.02)?;
    if !(0.0..=1e3).contains(&initializer_range) {
        return Err(keys.error("initializer_range", format_args!("must not be negative, but is {initializer_range}")));
    }
    let tie_word_embeddings = keys.flag("tie_word_embeddings", false)?;
    // Qwen2 has biases on query, key and value whatever its configuration says, and never one on the output.
    let attention_bias = family != Family::Qwen2 && keys.flag("attention_bias", false)?;
    let moe = if moe_family { Some(moe(keys)?) } else { None };
    let layers = layers(keys, family, num_hidden_layers, intermediate_size, moe)?;
    let padding_idx = padding_idx(keys, vocab_size)?;
    let dtype = dtype::read(keys)?;
    let mut unknown_keys = Vec::new();
    let around = rope::Around { head_dim, max_position_embeddings };
    let rope = rope::read(keys, &around, &mut unknown_keys)?;
    unknown_keys.extend(keys.not_asked());
    Ok(ModelConfig {
        path: keys.path().to_path_buf(),
        family,
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
        qkv_bias: family == Family::Qwen2 || attention_bias,
        o_bias: attention_bias,
        qk_norm: family != Family::Qwen2,
        padding_idx,
        rope,
        moe,
        layers,
        dtype,
        unknown_keys,
    })
}

fn head_dim(keys: &mut Keys<'_>, family: Family, hidden_size: usize, heads: usize) -> Result<usize> {
    let given = match family {
        Family::Qwen3 => Some(keys.size("head_dim", 128, 1, MAX_HEAD_DIM)?),
        Family::Qwen2 | Family::Qwen3Moe => keys.optional_size("head_dim", 1, MAX_HEAD_DIM)?,
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
    if head_dim % 2 != 0 || head_dim > MAX_HEAD_DIM {
        return Err(keys.error("head_dim", format_args!("must be even and at most {MAX_HEAD_DIM}, but is {head_dim}")));
    }
    Ok(head_dim)
}

fn moe(keys: &mut Keys<'_>) -> Result<MoeConfig> {
    let local = keys.optional_size("num_local_experts", 1, MAX_EXPERTS)?;
    let plain = keys.optional_size("num_experts", 1, MAX_EXPERTS)?;
    let num_experts = match (local, plain) {
        (Some(local), Some(plain)) if local != plain => {
            return Err(keys.error("num_experts", format_args!("({plain}) and `num_local_experts` ({local}) differ")));
        }
        (Some(number), _) | (None, Some(number)) => number,
        (None, None) => 128,
    };
    let num_experts_per_tok = keys.size("num_experts_per_tok", 8, 1, MAX_EXPERTS)?;
    if num_experts_per_tok > num_experts {
        return Err(keys.error(
            "num_experts_per_tok",
            format_args!("({num_experts_per_tok}) is more than the {num_experts} experts there are"),
        ));
    }
    let coefficient = keys.number("router_aux_loss_coef", 0.001)?;
    let balanced = keys.flag("output_router_logits", false)? && coefficient != 0.0;
    Ok(MoeConfig {
        num_experts,
        num_experts_per_tok,
        router_aux_loss_coef: balanced.then_some(coefficient as f32),
        moe_intermediate_size: keys.size("moe_intermediate_size", 768, 1, MAX_WIDTH)?,
        norm_topk_prob: keys.flag("norm_topk_prob", false)?,
    })
}

fn layers(
    keys: &mut Keys<'_>,
    family: Family,
    count: usize,
    intermediate: usize,
    moe: Option<MoeConfig>,
) -> Result<Vec<LayerConfig>> {
    let windows = windows(keys, family, count)?;
    let dense = Mlp::Dense { intermediate };
    let Some(moe) = moe else {
        return Ok(windows.into_iter().map(|window| LayerConfig { window, mlp: dense }).collect());
    };
    let step = keys.size("decoder_sparse_step", 1, 1, MAX_LAYERS)?;
    let mut mlp_only = vec![false; count];
    for value in keys.optional_list("mlp_only_layers")?.unwrap_or_default() {
        let layer = value.as_u64().and_then(|layer| usize::try_from(layer).ok());
        match layer.and_then(|layer| mlp_only.get_mut(layer)) {
            Some(flag) => *flag = true,
            None => {
                let expected = format!("a list of layers from 0 to {}", count - 1);
                return Err(keys.error("mlp_only_layers", format_args!("must be {expected}, but holds {value}")));
            }
        }
    }
    let layer = |(index, window): (usize, Option<usize>)| {
        let sparse = !mlp_only[index] && (index + 1) % step == 0;
        LayerConfig { window, mlp: if sparse { Mlp::Moe(moe) } else { dense } }
    };
    Ok(windows.into_iter().enumerate().map(layer).collect())
}

/// The sliding window of each layer. Qwen3-MoE has one for all layers or none; the dense families choose by
/// `layer_types`, or else by `max_window_layers`.
fn windows(keys: &mut Keys<'_>, family: Family, count: usize) -> Result<Vec<Option<usize>>> {
    const MAX_WINDOW: usize = 1 << 31;
    let used = keys.flag("use_sliding_window", false)?;
    let window = match keys.get("sliding_window") {
        None => Some(4096),
        Some(Value::Null) => None,
        // Where windows are off, 0 stands in some files and means nothing.
        Some(_) => Some(keys.size("sliding_window", 0, usize::from(used), MAX_WINDOW)?),
    };
    let window = if used { window } else { None };
    let types = keys.optional_list("layer_types")?;
    if let Some(types) = types
        && types.len() != count
    {
        return Err(
            keys.error("layer_types", format_args!("has {} entries, but `num_hidden_layers` is {count}", types.len()))
        );
    }
    let mut listed = Vec::new();
    for value in types.unwrap_or_default() {
        match value.as_str() {
            Some("full_attention" | "attention") => listed.push(None),
            Some("sliding_attention") if window.is_some() => listed.push(window),
            Some("sliding_attention") => {
                return Err(keys
                    .error("layer_types", "names `sliding_attention`, but no window is in force")
                    .hint("set `use_sliding_window` to true and `sliding_window` to its length"));
            }
            _ => {
                return Err(keys
                    .error("layer_types", format_args!("holds {}, which is not supported", keys::shown(value)))
                    .hint("supported are full_attention and sliding_attention"));
            }
        }
    }
    if family == Family::Qwen3Moe {
        if types.is_some() && listed.iter().any(|&listed| listed != window) {
            return Err(keys
                .error("layer_types", "disagrees with `use_sliding_window`: qwen3_moe has one window for all layers")
                .hint("remove `layer_types`"));
        }
        return Ok(vec![window; count]);
    }
    let full_layers = keys.size("max_window_layers", 28, 0, usize::MAX)?;
    if types.is_some() {
        return Ok(listed);
    }
    Ok((0..count).map(|layer| window.filter(|_| layer >= full_layers)).collect())
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
