//! Parts of a model that sees, which a run may freeze by name.

use crate::config::ModelConfig;
use crate::{Error, ErrorCode, Result};

/// A part of a model that sees. Every parameter is in one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FreezePart {
    /// The vision tower without its mergers.
    Vision,
    /// What turns the tower's rows into rows of the decoder, with the mergers of DeepStack.
    Merger,
    /// The decoder, with the embedding of tokens and the head.
    Language,
}

impl FreezePart {
    /// Every part.
    pub const ALL: [FreezePart; 3] = [FreezePart::Vision, FreezePart::Merger, FreezePart::Language];

    /// Its name in the options of a run.
    pub fn as_str(self) -> &'static str {
        match self {
            FreezePart::Vision => "vision",
            FreezePart::Merger => "merger",
            FreezePart::Language => "language",
        }
    }

    /// The part of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        FreezePart::ALL.into_iter().find(|part| part.as_str() == name)
    }
}

/// Patterns of the names of these parts' parameters, in which `*` stands for any characters; each of them matches some.
///
/// # Errors
/// `ARL_CONFIG` where the model has no vision tower, or none of which anything is read.
pub fn freeze_patterns(config: &ModelConfig, parts: &[FreezePart]) -> Result<Vec<String>> {
    let Some(vision) = config.vision.as_ref().filter(|_| !parts.is_empty()) else {
        return match parts.first() {
            None => Ok(Vec::new()),
            Some(part) => Err(Error::new(
                ErrorCode::Config,
                format!(
                    "freeze: `{}` is a part of a model that sees, and here {} is trained on text alone",
                    part.as_str(),
                    config.family
                ),
            )
            .hint("leave out freeze; without images the vision tower stays as it is")),
        };
    };
    let mut patterns = Vec::new();
    for part in FreezePart::ALL.into_iter().filter(|part| parts.contains(part)) {
        match part {
            FreezePart::Vision => {
                patterns.extend(["model.visual.patch_embed.*", "model.visual.blocks.*"]);
                patterns.extend(vision.num_position_embeddings.map(|_| "model.visual.pos_embed.*"));
            }
            FreezePart::Merger => {
                patterns.push("model.visual.merger.*");
                if !vision.deepstack_visual_indexes.is_empty() {
                    patterns.push("model.visual.deepstack_merger_list.*");
                }
            }
            FreezePart::Language => {
                patterns.extend(["model.embed_tokens.*", "model.layers.*", "model.norm.*"]);
                if !config.tie_word_embeddings {
                    patterns.push("lm_head.*");
                }
            }
        }
    }
    Ok(patterns.into_iter().map(str::to_owned).collect())
}
