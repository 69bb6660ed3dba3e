//! The vision tower of a model that sees: its sizes, from `vision_config` and the keys around it.

use std::num::NonZeroUsize;

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
