//! What a caller can choose about rows and tokens. The names are the configuration's own.

use std::collections::BTreeMap;
use std::path::PathBuf;

use arl_model::{Error, ErrorCode, Result};

use crate::vision::VisionTokens;

/// What happens to a sample that is longer than `max_length`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Truncation {
    /// The row is a problem.
    #[default]
    Error,
    /// The row is left out, and counted.
    Drop,
    /// The start is cut off, the end kept.
    Left,
    /// The end is cut off, the start kept.
    Right,
}

impl Truncation {
    /// From the configuration's word.
    ///
    /// # Errors
    /// `ARL_CONFIG` for any other word.
    pub fn parse(word: &str) -> Result<Self> {
        match word {
            "error" => Ok(Self::Error),
            "drop" => Ok(Self::Drop),
            "left" => Ok(Self::Left),
            "right" => Ok(Self::Right),
            _ => Err(Error::new(ErrorCode::Config, format!("truncation: `{word}` is not known"))
                .hint("use error, drop, left or right")),
        }
    }
}

/// What happens to the reasoning of earlier turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thinking {
    /// Every reply keeps its reasoning, also where the template would leave it out.
    Keep,
    /// No reply keeps its reasoning.
    Strip,
    /// Only replies after the last message of the user keep it.
    Last,
}

impl Thinking {
    /// From the configuration's word.
    ///
    /// # Errors
    /// `ARL_CONFIG` for any other word.
    pub fn parse(word: &str) -> Result<Self> {
        match word {
            "keep" => Ok(Self::Keep),
            "strip" => Ok(Self::Strip),
            "last" => Ok(Self::Last),
            _ => Err(Error::new(ErrorCode::Config, format!("thinking: `{word}` is not known"))
                .hint("use keep, strip or last")),
        }
    }
}

/// What happens to a row that holds images.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Images {
    /// The row is a problem.
    #[default]
    Refuse,
    /// The images are left out and counted; the text is trained.
    Drop,
    /// They are trained, by models that have a tower.
    Train,
}

impl Images {
    /// From the configuration's word.
    ///
    /// # Errors
    /// `ARL_CONFIG` for any other word.
    pub fn parse(word: &str) -> Result<Self> {
        match word {
            "error" => Ok(Self::Refuse),
            "drop" => Ok(Self::Drop),
            "train" => Ok(Self::Train),
            _ => Err(Error::new(ErrorCode::Config, format!("images: `{word}` is not known"))
                .hint("use train, error or drop")),
        }
    }
}

/// How rows become tokens.
#[derive(Clone, Debug, Default)]
pub struct TextOptions {
    /// Folder with `tokenizer.json`, and a chat template.
    pub model_dir: PathBuf,
    /// A template's file that replaces the checkpoint's.
    pub chat_template: Option<PathBuf>,
    /// The day that `strftime_now` of a template gives, as `2024-02-29`; absent: today, in UTC.
    pub chat_template_date: Option<String>,
    /// Longest sample in tokens; absent: no bound.
    pub max_length: Option<usize>,
    /// What happens to a longer one.
    pub truncation: Truncation,
    /// What happens to reasoning; absent: as the template does.
    pub thinking: Option<Thinking>,
    /// What happens to images in rows.
    pub images: Images,
    /// How images become tokens, where they are trained; absent: as the folder's `config.json` says.
    pub vision: Option<VisionTokens>,
    /// What decides the sizes of images, for the fingerprint.
    pub image_processor: Option<String>,
    /// The file's name of a known column, for example `prompt` -> `q`.
    pub columns: BTreeMap<String, String>,
    /// Replies whose advantage is below are not trained.
    pub minimal_advantage: Option<f64>,
    /// Replies whose advantage is zero are not trained.
    pub drop_zero_advantage: bool,
    /// Replies whose advantage is zero or negative are not trained.
    pub skip_non_positive_advantage: bool,
}
