//! The vision tower of a model that sees: its sizes, from `vision_config` and the keys around it.

use std::num::NonZeroUsize;

use serde_json::{Map, Value};

use super::keys::{Keys, shown};
use super::{Family, MAX_HEADS, MAX_LAYERS, MAX_WIDTH, ModelConfig, refused};
use crate::Result;

/// The kinds of vision towers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum VisionKind {
    /// Of Qwen2.5-VL: RMSNorms, SwiGLU with biases, attention within windows but in a few blocks.
    Qwen2_5,
    /// Of Qwen3-VL and of Qwen3.5, 3.6 and 3.8: LayerNorms, GELU, learned positions, attention to the whole image.
    Qwen3,
}

/// A vision tower. Fields are named as in `config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct VisionConfig {
    /// Which computation.
    pub kind: VisionKind,
    /// Blocks.
    pub depth: usize,
    /// Width of a patch's row in the tower.
    pub hidden_size: usize,
    /// Heads of attention; divides `hidden_size`.
    pub num_heads: usize,
    /// Inner width of a block's MLP.
    pub intermediate_size: usize,
    /// Height and width of a patch in pixels.
    pub patch_size: usize,
    /// Frames of a patch; a still image repeats its only one.
    pub temporal_patch_size: usize,
    /// Patches in a row, and in a column, that the merger joins to one token.
    pub spatial_merge_size: usize,
    /// Colours of a pixel.
    pub in_channels: usize,
    /// Width of what the mergers give: that of the decoder's residual stream.
    pub out_hidden_size: usize,
    /// Rows of the learned positions, the square of a whole number; none: the tower has no such table.
    pub num_position_embeddings: Option<usize>,
    /// The blocks after which a DeepStack merger reads, ascending; merger `i` adds to the decoder's stream after its layer `i`.
    pub deepstack_visual_indexes: Vec<usize>,
    /// Height and width in pixels of the windows of attention; none: every block sees the whole image.
    pub window_size: Option<usize>,
    /// With windows, the blocks that see the whole image all the same.
    pub fullatt_block_indexes: Vec<usize>,
    /// Base of the wavelengths of the tower's rotation.
    pub rope_theta: f64,
    /// Epsilon of every norm of the tower; no configuration says it.
    pub norm_eps: f64,
    /// Standard deviation of random weights.
    pub initializer_range: f64,
    /// The token that stands for one merged patch of an image.
    pub image_token_id: u32,
    /// The token that stands for one merged patch of a video.
    pub video_token_id: u32,
    /// The token before an image.
    pub vision_start_token_id: u32,
    /// The token after an image.
    pub vision_end_token_id: u32,
}

impl VisionConfig {
    /// Elements of one head of the tower's attention.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_heads
    }

    /// Numbers of one patch: `in_channels * temporal_patch_size * patch_size * patch_size`.
    pub fn patch_elements(&self) -> usize {
        self.in_channels * self.temporal_patch_size * self.patch_size * self.patch_size
    }

    /// Patches that the merger joins to one token.
    pub fn merge_unit(&self) -> usize {
        self.spatial_merge_size * self.spatial_merge_size
    }

    /// Width of the rows that the mergers' linear layers read: `hidden_size` of each joined patch.
    pub fn merged_size(&self) -> usize {
        self.merge_unit() * self.hidden_size
    }

    /// Height and width of the table of learned positions.
    pub fn position_side(&self) -> Option<NonZeroUsize> {
        NonZeroUsize::new(self.num_position_embeddings?.isqrt())
    }

    /// Height and width of a window of attention in merged patches.
    pub fn window_side(&self) -> Option<usize> {
        Some(self.window_size? / self.patch_size / self.spatial_merge_size)
    }

    /// Whether a block's attention stays within windows.
    pub fn is_windowed(&self, block: usize) -> bool {
        self.window_size.is_some() && !self.fullatt_block_indexes.contains(&block)
    }
}

/// The model with the tower that the keys around its text part describe; without `vision_config` it has none.
pub(super) fn with_tower(mut config: ModelConfig, outer: &mut Keys<'_>) -> Result<ModelConfig> {
    let map = match outer.get_non_null("vision_config") {
        None => return Ok(config.text_alone()),
        Some(Value::Object(map)) => map,
        Some(value) => return Err(outer.wrong("vision_config", "an object", value)),
    };
    let mut keys = Keys::new(map, outer.path(), "vision_config.");
    let mut unknown = Vec::new();
    let vision = read(&mut keys, outer, &config, &mut unknown)?;
    // Consecutive sections are cut from the frequencies, which they must use up.
    if let Some(axes) = config.rope.axes.filter(|axes| !axes.interleaved)
        && axes.sections.iter().sum::<usize>() != config.rope.rotary_dim / 2
    {
        let what =
            format!("is {:?}; together they must be half of a head, {}", axes.sections, config.rope.rotary_dim / 2);
        return Err(outer.error("mrope_section", what));
    }
    config.unknown_keys.extend(unknown);
    config.vision = Some(vision);
    Ok(config)
}

fn read(
    keys: &mut Keys<'_>,
    outer: &mut Keys<'_>,
    text: &ModelConfig,
    unknown: &mut Vec<String>,
) -> Result<VisionConfig> {
    let old = text.family == Family::Qwen2_5Vl;
    let kind = if old { VisionKind::Qwen2_5 } else { VisionKind::Qwen3 };
    refused::without_effect(keys);
    // `spatial_patch_size` is read by nobody; `tokens_per_second` is of videos.
    for key in ["model_type", "dtype", "torch_dtype", "spatial_patch_size", "tokens_per_second"] {
        keys.get(key);
    }
    let act = if old { "silu" } else { "gelu_pytorch_tanh" };
    match keys.optional_text("hidden_act")? {
        Some(other) if other != act => {
            let what = format_args!("`{other}` is not built for the tower of {}", text.family);
            return Err(keys.error("hidden_act", what).hint(format!("built is {act}")));
        }
        _ => {}
    }
    let depth = keys.size("depth", if old { 32 } else { 27 }, 1, MAX_LAYERS)?;
    let hidden_size = keys.size("hidden_size", if old { 3584 } else { 1152 }, 1, MAX_WIDTH)?;
    let num_heads = keys.size("num_heads", 16, 1, MAX_HEADS)?;
    // A quarter of a head's elements are the frequencies of one axis.
    if !hidden_size.is_multiple_of(4 * num_heads) {
        let what = format_args!("({hidden_size}) must be `num_heads` ({num_heads}) heads of a multiple of 4 elements");
        return Err(keys.error("hidden_size", what));
    }
    if let Some(given) = keys.optional_size("head_dim", 1, MAX_WIDTH)?
        && given * num_heads != hidden_size
    {
        let what = format_args!("is {given}; heads are `hidden_size` ({hidden_size}) over `num_heads` ({num_heads})");
        return Err(keys.error("head_dim", what));
    }
    let out_hidden_size = keys.size("out_hidden_size", 3584, 1, MAX_WIDTH)?;
    if out_hidden_size != text.hidden_size {
        let what = format_args!(
            "is {out_hidden_size}, but rows of the decoder, whose place an image takes, have {} (`hidden_size`)",
            text.hidden_size
        );
        return Err(keys.error("out_hidden_size", what));
    }
    let patch_size = keys.size("patch_size", if old { 14 } else { 16 }, 1, 256)?;
    let spatial_merge_size = built(keys, "spatial_merge_size", 2)?;
    let [image_token_id, video_token_id, vision_start_token_id, vision_end_token_id] = token_ids(outer, text)?;
    let vision = VisionConfig {
        kind,
        depth,
        hidden_size,
        num_heads,
        intermediate_size: keys.size("intermediate_size", if old { 3420 } else { 4304 }, 1, MAX_WIDTH)?,
        patch_size,
        temporal_patch_size: built(keys, "temporal_patch_size", 2)?,
        spatial_merge_size,
        in_channels: channels(keys)?,
        out_hidden_size,
        num_position_embeddings: if old { None } else { Some(positions(keys)?) },
        deepstack_visual_indexes: deepstack(keys, text, depth)?,
        window_size: if old { Some(window(keys, patch_size * spatial_merge_size)?) } else { None },
        fullatt_block_indexes: match old {
            true => blocks(keys, "fullatt_block_indexes", &[7, 15, 23, 31])?,
            false => Vec::new(),
        },
        rope_theta: theta(keys, unknown)?,
        norm_eps: 1e-6,
        initializer_range: deviation(keys)?,
        image_token_id,
        video_token_id,
        vision_start_token_id,
        vision_end_token_id,
    };
    unknown.extend(keys.not_asked());
    Ok(vision)
}

/// A size of which one value is built.
fn built(keys: &mut Keys<'_>, key: &str, value: usize) -> Result<usize> {
    match keys.size(key, value, 1, MAX_WIDTH)? {
        given if given != value => Err(keys.error(key, format_args!("is {given}; built is {value}"))),
        given => Ok(given),
    }
}

/// Released files of Qwen2.5-VL call it `in_chans`, which transformers passes over: it is 3 all the same.
fn channels(keys: &mut Keys<'_>) -> Result<usize> {
    built(keys, "in_chans", 3)?;
    built(keys, "in_channels", 3)
}

fn positions(keys: &mut Keys<'_>) -> Result<usize> {
    let rows = keys.size("num_position_embeddings", 48 * 48, 1, 1 << 24)?;
    match rows.isqrt().pow(2) == rows {
        true => Ok(rows),
        false => {
            Err(keys.error("num_position_embeddings", format_args!("({rows}) is not the square of a whole number")))
        }
    }
}

fn window(keys: &mut Keys<'_>, merged_patch: usize) -> Result<usize> {
    let window = keys.size("window_size", 112, 1, MAX_WIDTH)?;
    if window < merged_patch {
        let what = format_args!("({window} pixels) is smaller than one token's patches ({merged_patch} pixels)");
        return Err(keys.error("window_size", what));
    }
    Ok(window)
}

fn blocks(keys: &mut Keys<'_>, key: &str, default: &[usize]) -> Result<Vec<usize>> {
    let Some(list) = keys.optional_list(key)? else { return Ok(default.to_vec()) };
    let block = |value: &Value| value.as_u64().and_then(|block| usize::try_from(block).ok());
    let number = |value| block(value).ok_or_else(|| keys.error(key, format_args!("holds {}, no block", shown(value))));
    list.iter().map(number).collect()
}

/// The blocks after which DeepStack reads. Merger `i` reads after the `i`-th of them, and its rows are added after layer `i`.
fn deepstack(keys: &mut Keys<'_>, text: &ModelConfig, depth: usize) -> Result<Vec<usize>> {
    let key = "deepstack_visual_indexes";
    let has = matches!(text.family, Family::Qwen3Vl | Family::Qwen3VlMoe);
    let indexes = blocks(keys, key, if has { &[8, 16, 24] } else { &[] })?;
    if !has && !indexes.is_empty() {
        return Err(keys.error(key, format_args!("is {indexes:?}, but {} has no DeepStack", text.family)));
    }
    if let Some(index) = indexes.iter().find(|&&index| index >= depth) {
        return Err(
            keys.error(key, format_args!("holds {index}, but the tower has {depth} blocks (`depth`), from 0 on"))
        );
    }
    if indexes.windows(2).any(|pair| pair[0] >= pair[1]) {
        return Err(keys.error(key, format_args!("is {indexes:?}; the blocks must ascend")));
    }
    if indexes.len() > text.num_hidden_layers {
        let what = format_args!("has {} blocks, but the decoder {} layers", indexes.len(), text.num_hidden_layers);
        return Err(keys.error(key, what));
    }
    Ok(indexes)
}

fn theta(keys: &mut Keys<'_>, unknown: &mut Vec<String>) -> Result<f64> {
    const DEFAULT: f64 = 10_000.0;
    let map: &Map<String, Value> = match keys.get_non_null("rope_parameters") {
        None => return Ok(DEFAULT),
        Some(Value::Object(map)) => map,
        Some(value) => return Err(keys.wrong("rope_parameters", "an object", value)),
    };
    let mut inner = Keys::new(map, keys.path(), "vision_config.rope_parameters.");
    let theta = inner.number("rope_theta", DEFAULT)?;
    if theta <= 0.0 || !(theta as f32).is_finite() {
        return Err(inner.error("rope_theta", format_args!("must be a positive number, but is {theta}")));
    }
    match inner.optional_text("rope_type")? {
        None | Some("axial" | "default") => {}
        Some(other) => return Err(inner.error("rope_type", format_args!("`{other}` is not built; built is axial"))),
    }
    unknown.extend(inner.not_asked());
    Ok(theta)
}

fn deviation(keys: &mut Keys<'_>) -> Result<f64> {
    match keys.number("initializer_range", 0.02)? {
        range if (0.0..=1e3).contains(&range) => Ok(range),
        range => Err(keys.error("initializer_range", format_args!("must not be negative, but is {range}"))),
    }
}

/// The tokens of an image, of a video, and before and after either. Of images alone there must be a row of the embedding, whose place
/// they take.
fn token_ids(outer: &mut Keys<'_>, text: &ModelConfig) -> Result<[u32; 4]> {
    let keys = ["image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"];
    let defaults = match text.family {
        Family::Qwen3_5 | Family::Qwen3_5Moe => [248_056, 248_057, 248_053, 248_054],
        _ => [151_655, 151_656, 151_652, 151_653],
    };
    let mut ids = [0; 4];
    for ((id, key), default) in ids.iter_mut().zip(keys).zip(defaults) {
        let given = outer.optional_size(key, 0, i32::MAX as usize)?.unwrap_or(default);
        *id = given as u32;
    }
    if ids[0] as usize >= text.vocab_size {
        let what = format_args!("is {}, but `vocab_size` is {}", ids[0], text.vocab_size);
        return Err(outer.error("image_token_id", what));
    }
    if ids[0] == ids[1] {
        return Err(outer.error("video_token_id", format_args!("is `image_token_id` ({})", ids[0])));
    }
    Ok(ids)
}
