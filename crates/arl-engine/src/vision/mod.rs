//! The vision tower: what images of a micro-batch become rows of the decoder by. Patches are embedded, go through the tower's
//! blocks, and a merger makes a row of the decoder of each merge block, which takes the place of its token's embedding. DeepStack
//! mergers read after inner blocks; what they give is added to the decoder's stream after its first layers. A part of it has a
//! file of its own; `pass.rs` knows their order and the stream between them.

mod block;
mod embed;
mod geometry;
mod images;
mod inputs;
mod merger;
mod norm;
mod pass;

use arl_model::{self as model, ModelConfig, VisionConfig};

use crate::backend::DType;
use crate::placement::Placement;
use block::Block;
use embed::Embed;
use geometry::Geometry;
pub use images::Images;
pub(crate) use inputs::ImageInputs;
use merger::Merger;
pub(crate) use pass::Seen;

/// A model's vision tower.
#[derive(Clone, Debug)]
pub(crate) struct Tower {
    pub(crate) config: VisionConfig,
    pub(crate) geometry: Geometry,
    /// Of activations.
    dtype: DType,
    embed: Embed,
    blocks: Vec<Block>,
    merger: Merger,
    /// Each with the block after which it reads.
    deepstack: Vec<(usize, Merger)>,
    /// The lowest part that is trained: 0 the embedding, `1 + b` block `b`, `1 + depth` the merger; a DeepStack merger counts as
    /// the block behind the one that it reads. None: nothing is trained.
    lowest: Option<usize>,
    /// Where its parameters end in the weights' arena.
    pub(crate) end: usize,
    /// This rank has it: the first stage of a pipeline, where its rows take the place of embeddings.
    here: bool,
}

impl Tower {
    /// The tower of a configuration, if it has one.
    pub(crate) fn new(config: &ModelConfig, placement: &Placement, dtype: DType) -> Option<Self> {
        let config = config.vision.clone()?;
        let (merged, epsilon) = (config.merged_size(), config.norm_eps as f32);
        let merger = |block| Merger::new(placement, block, merged, epsilon);
        let deepstack = config.deepstack_visual_indexes.iter().enumerate();
        let ends = placement.tensors.iter().filter(|tensor| tensor.spec.block.is_vision() && tensor.spec.decay);
        Some(Tower {
            geometry: Geometry::of(&config),
            dtype,
            embed: Embed::new(placement, config.hidden_size),
            blocks: (0..config.depth).map(|index| Block::new(&config, placement, index)).collect(),
            merger: merger(model::Block::VisionMerger),
            deepstack: deepstack.map(|(i, &after)| (after, merger(model::Block::DeepStack(i)))).collect(),
            lowest: lowest(&config, placement),
            end: ends.map(|tensor| tensor.param.offset + tensor.param.len).max().unwrap_or(0),
            here: placement.place.is_first_stage(),
            config,
        })
    }

    /// Whether anything of it is trained.
    pub(crate) fn is_trained(&self) -> bool {
        self.lowest.is_some()
    }

    /// The angle by which a step along an axis rotates pair `pair` of that axis.
    fn frequency(&self, pair: usize) -> f32 {
        let of_axis = self.config.head_dim() / 2;
        (1.0 / self.config.rope_theta.powf((2 * pair) as f64 / of_axis as f64)) as f32
    }

    /// Most rows, or columns, of patches that images of so many patches may have: each has a merge block in its other side.
    fn most_places(&self, patches: usize) -> usize {
        patches / self.geometry.merge
    }

    /// The widest vector whose gradient is a sum over patches or merge blocks.
    pub(crate) fn widest(config: &VisionConfig) -> usize {
        config.merged_size().max(3 * config.hidden_size).max(2 * config.intermediate_size)
    }
}

/// The lowest part that is trained.
fn lowest(config: &VisionConfig, placement: &Placement) -> Option<usize> {
    let parts = [(0, model::Block::VisionEmbed), (1 + config.depth, model::Block::VisionMerger)];
    let blocks = (0..config.depth).map(|index| (1 + index, model::Block::Vision(index)));
    let deepstack = config.deepstack_visual_indexes.iter().enumerate();
    let deepstack = deepstack.map(|(i, &after)| (2 + after, model::Block::DeepStack(i)));
    let all = parts.into_iter().chain(blocks).chain(deepstack);
    all.filter(|&(_, block)| placement.trains(block)).map(|(part, _)| part).min()
}
