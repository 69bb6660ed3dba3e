//! A prompt: its tokens, and for a model that sees, positions and images. Knows what of it a plan needs.

use arl_model::{Error, ErrorCode, Result};

use crate::batch::{BatchSize, IGNORED, MicroBatch};
use crate::model::Model;
use crate::vision::Images;

/// What a reply is generated to.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Prompt {
    /// `[T]`: token ids.
    pub input_ids: Vec<i32>,
    /// `[3, T]`: time, height and width of each token, for a model whose positions have three axes; empty: those of text.
    pub positions: Vec<i32>,
    /// Its images, as in [`MicroBatch::images`].
    pub images: Option<Images>,
}

impl From<Vec<i32>> for Prompt {
    /// Of text alone.
    fn from(input_ids: Vec<i32>) -> Self {
        Prompt { input_ids, ..Prompt::default() }
    }
}

/// What a plan needs to know of a prompt.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct PromptSize {
    pub(super) tokens: usize,
    patches: usize,
    images: usize,
    /// The position of the first token of the reply.
    pub(super) next_position: usize,
    /// Its positions have three axes.
    axes: bool,
}

impl PromptSize {
    /// Of a prompt of text.
    pub(super) fn of_text(tokens: usize) -> Self {
        PromptSize { tokens, next_position: tokens, ..PromptSize::default() }
    }
}

/// What prompts that are read together come to.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct PartSize {
    pub(super) size: BatchSize,
    /// Positions of all of them together, or tokens, where these are more.
    pub(super) positions: usize,
    /// Positions have three axes.
    pub(super) axes: bool,
}

impl PartSize {
    pub(super) fn of(prompts: &[PromptSize]) -> Self {
        let sum = |of: fn(&PromptSize) -> usize| prompts.iter().map(of).sum();
        PartSize {
            size: BatchSize {
                tokens: sum(|prompt| prompt.tokens),
                sequences: prompts.len(),
                patches: sum(|prompt| prompt.patches),
                images: sum(|prompt| prompt.images),
            },
            positions: sum(|prompt| prompt.tokens.max(prompt.next_position)),
            axes: prompts.iter().any(|prompt| prompt.axes),
        }
    }

    /// One new token of each of so many sequences.
    pub(super) fn of_new_tokens(sequences: usize) -> Self {
        let size = BatchSize { tokens: sequences, sequences, ..BatchSize::default() };
        PartSize { size, positions: sequences, axes: false }
    }
}

impl Prompt {
    pub(super) fn size(&self) -> PromptSize {
        let tokens = self.input_ids.len();
        let last = self.positions.iter().max().map(|&last| last as usize + 1);
        PromptSize {
            tokens,
            patches: self.images.as_ref().map_or(0, Images::patches),
            images: self.images.as_ref().map_or(0, |images| images.grids.len()),
            next_position: last.unwrap_or(tokens),
            axes: last.is_some(),
        }
    }

    /// Refuses what the model cannot take; `index` names the prompt.
    pub(super) fn check(&self, index: usize, model: &Model) -> Result<()> {
        let refused = |what: String| Err(Error::new(ErrorCode::Data, format!("prompt {index} {what}")));
        let (tokens, vocab) = (self.input_ids.len(), model.shape.vocab);
        if tokens == 0 {
            return refused("has no tokens".into());
        }
        if let Some(id) = self.input_ids.iter().find(|&&id| id < 0 || id as usize >= vocab) {
            let message = format!("prompt {index} has id {id}, the vocabulary has {vocab}");
            return Err(Error::new(ErrorCode::Data, message).hint("the tokenizer does not belong to this model"));
        }
        let of_axes = model.shape.axes && self.positions.len() == 3 * tokens;
        if !self.positions.is_empty() && !of_axes {
            return refused(format!("has {} positions for {tokens} tokens", self.positions.len()));
        }
        if let Some(position) = self.positions.iter().find(|&&position| position < 0) {
            return refused(format!("has a position {position}"));
        }
        let tower = model.tower.as_ref().map(|tower| &tower.config);
        joined(std::slice::from_ref(self)).validate_images(&format!("prompt {index}"), tower)
    }
}

/// Prompts side by side, as a micro-batch without targets.
pub(super) fn joined(prompts: &[Prompt]) -> MicroBatch {
    let axes = if prompts.iter().any(|prompt| !prompt.positions.is_empty()) { 3 } else { 1 };
    let mut batch = MicroBatch { cu_seqlens: vec![0], ..MicroBatch::default() };
    let mut positions = vec![Vec::new(); axes];
    let mut images = Images::default();
    for prompt in prompts {
        let tokens = prompt.input_ids.len();
        batch.input_ids.extend_from_slice(&prompt.input_ids);
        batch.cu_seqlens.push(batch.input_ids.len() as i32);
        for (axis, positions) in positions.iter_mut().enumerate() {
            match prompt.positions.get(axis * tokens..(axis + 1) * tokens) {
                Some(own) if tokens > 0 => positions.extend_from_slice(own),
                _ => positions.extend(0..tokens as i32),
            }
        }
        if let Some(own) = &prompt.images {
            images.pixel_values.extend_from_slice(&own.pixel_values);
            images.grids.extend_from_slice(&own.grids);
        }
    }
    batch.targets = vec![IGNORED; batch.input_ids.len()];
    batch.positions = positions.concat();
    batch.images = (!images.grids.is_empty()).then_some(images);
    batch
}
