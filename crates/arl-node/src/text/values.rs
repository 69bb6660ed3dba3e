//! What crosses between JavaScript and the crate of rows and tokens: conversions only.

use std::collections::HashMap;
use std::path::PathBuf;

use arl_model::{Error, ErrorCode, Result};
use arl_text::{ImageSource, Truncation};
use napi::bindgen_prelude::{Float32Array, Int32Array, Uint8Array};
use napi_derive::napi;

/// How rows become tokens. Field names are the configuration's own.
#[napi(object)]
pub struct TextOptions {
    /// Folder with `tokenizer.json`, and a chat template.
    pub model_dir: String,
    /// A template's file that replaces the checkpoint's.
    pub chat_template: Option<String>,
    /// The day that `strftime_now` of a template gives, as `2024-02-29`; absent: today, in UTC.
    pub chat_template_date: Option<String>,
    /// Longest sample in tokens; absent: no bound.
    pub max_length: Option<u32>,
    /// What happens to a longer one.
    #[napi(ts_type = "'error' | 'drop' | 'left' | 'right'")]
    pub truncation: String,
    /// What happens to reasoning of earlier turns; absent: as the template does.
    #[napi(ts_type = "'keep' | 'strip' | 'last'")]
    pub thinking: Option<String>,
    /// What happens to rows with images: absent or `error`: they are problems; `drop`: the images are left out and counted;
    /// `train`: they are trained, by models with a tower.
    #[napi(ts_type = "'error' | 'drop' | 'train'")]
    pub images: Option<String>,
    /// The fingerprint of what measures images, where they are trained.
    pub image_processor: Option<String>,
    /// Names of a file's columns that differ from the known ones, for example `{ prompt: "q", completion: "a" }`.
    pub columns: Option<HashMap<String, String>>,
    /// Replies whose advantage is below are not trained.
    pub minimal_advantage: Option<f64>,
    /// Replies whose advantage is zero are not trained.
    pub drop_zero_advantage: Option<bool>,
    /// Replies whose advantage is zero or negative are not trained.
    pub skip_non_positive_advantage: Option<bool>,
}

/// What is known of a tokenizer and its template.
#[napi(object)]
pub struct TextInfo {
    /// Ids that the tokenizer can produce: one more than the largest.
    pub vocab_size: u32,
    /// The tokens that end a reply.
    pub stop_ids: Vec<u32>,
    /// `chat_template.jinja`, `tokenizer_config.json`, the file that was given, or `none`.
    pub template_source: String,
    /// Changes whenever the template, the tokenizer or an option that changes tokens does.
    pub fingerprint: String,
}

/// A trained reply: tokens `first` to `last`, both ends in.
#[napi(object)]
pub struct RowSpan {
    /// Index of its message.
    pub message: u32,
    /// First token.
    pub first: u32,
    /// Last token.
    pub last: u32,
}

/// One row as the model sees it; for inspection.
#[napi(object)]
pub struct EncodedRow {
    /// The rendered text, before truncation.
    pub text: String,
    /// Token ids.
    pub input_ids: Int32Array,
    /// Weight of each token as a target; 0 where it is not trained.
    pub weights: Float32Array,
    /// The trained replies.
    pub spans: Vec<RowSpan>,
    /// The images.
    pub images: Vec<EncodedImage>,
    /// The row's own name.
    pub record_id: Option<String>,
    /// What was noticed in the row; `firstRow` is 0.
    pub notes: Vec<RowNote>,
}

/// Where an image of a row comes from: one of `url`, `path` and `bytes`.
#[napi(object)]
pub struct ImageRef {
    /// Where the row has it: `messages[0].content[1]`, or `images[1]`.
    pub place: String,
    /// A URL of any scheme, for example `https:`, `file:` or `data:`.
    pub url: Option<String>,
    /// The path of a file, as the row has it.
    pub path: Option<String>,
    /// The image's own bytes.
    pub bytes: Option<Uint8Array>,
}

/// An image of a row as it was measured, or why it cannot be had.
#[napi(object)]
pub struct MeasuredRowImage {
    /// Of its bytes, as 32 hexadecimal digits.
    pub hash: String,
    /// Pixels that it is resized to.
    pub height: u32,
    /// Pixels that it is resized to.
    pub width: u32,
    /// Why it cannot be had: its row is then a problem, and nothing else of this is read.
    pub problem: Option<String>,
}

/// An image of an encoded row: `count` tokens from `first` on.
#[napi(object)]
pub struct EncodedImage {
    /// Which image of its row it is.
    pub place: u32,
    /// Its first token.
    pub first: u32,
    /// Its tokens.
    pub count: u32,
    /// Pixels that it is resized to.
    pub height: u32,
    /// Pixels that it is resized to.
    pub width: u32,
}

/// Tokens of a prompt.
#[napi(object)]
pub struct EncodedPrompt {
    /// Token ids.
    pub input_ids: Int32Array,
    /// `[T]`, or `[3, T]` for models with three axes.
    pub positions: Int32Array,
    /// Its images, the first ones of the row.
    pub images: Vec<EncodedImage>,
}

/// An image of a micro-batch.
#[napi(object)]
pub struct BatchImage {
    /// The row that has it.
    pub index: u32,
    /// Which image of that row it is.
    pub place: u32,
    /// Of its bytes when its tokens were made, as 32 hexadecimal digits.
    pub hash: String,
    /// Pixels that it is resized to.
    pub height: u32,
    /// Pixels that it is resized to.
    pub width: u32,
}

/// Samples side by side: a micro-batch whose images still lack their pixels.
#[napi(object)]
pub struct TokenBatch {
    /// `[T]`: token ids.
    pub input_ids: Int32Array,
    /// `[T]`: already shifted: the logits at t are scored against `targets[t]`; -100 is not trained.
    pub targets: Int32Array,
    /// `[T]`: position of each token in its sequence; `[3, T]` (time, height, width) for models with three axes.
    pub positions: Int32Array,
    /// `[sequences + 1]`: where each sequence begins, and `T`.
    pub cu_seqlens: Int32Array,
    /// `[T]`: weight of each target; absent: 1.
    pub weights: Option<Float32Array>,
    /// The images, in the order of their tokens.
    pub images: Vec<BatchImage>,
}

/// Why a row cannot be used.
#[napi(object)]
pub struct RowProblem {
    /// Index of the row in its source.
    pub row: u32,
    /// Stable and short, for counting: `not json`, `no messages`, `unknown role`, `no target`, ...
    pub reason: String,
    /// What is wrong with this row.
    pub message: String,
}

/// Something noticed in rows that are trained all the same.
#[napi(object)]
pub struct RowNote {
    /// Stable and short: `end token only`, `parsed arguments`, `unread key`, ...
    pub kind: String,
    /// What it is about, where the kind alone does not say that; else empty.
    pub subject: String,
    /// `warning`: the rows train less, or something else, than their author may expect.
    #[napi(ts_type = "'info' | 'warning'")]
    pub level: String,
    /// A sentence for a person, without a place.
    pub message: String,
    /// Rows in which it occurs.
    pub rows: u32,
    /// Occurrences in all of them.
    pub count: f64,
    /// The lowest index of such a row in its source.
    pub first_row: u32,
}

/// What one call of `fill` did. Rows that were there already count as they did the first time.
#[napi(object)]
pub struct FillReport {
    /// Rows that gave a sample.
    pub rows: u32,
    /// Their tokens.
    pub tokens: f64,
    /// Their targets.
    pub target_tokens: f64,
    /// Samples of which something was cut off.
    pub truncated: u32,
    /// Rows left out for their length.
    pub dropped: u32,
    /// Rows that cannot be used, in the order of the call.
    pub problems: Vec<RowProblem>,
}

impl From<arl_text::NoteCount> for RowNote {
    fn from(count: arl_text::NoteCount) -> Self {
        Self {
            kind: count.kind.name().to_owned(),
            level: if count.is_warning() { "warning" } else { "info" }.to_owned(),
            message: count.message(),
            subject: count.subject,
            rows: count.rows,
            count: count.count as f64,
            first_row: count.first_row,
        }
    }
}

impl From<arl_text::ImageRef> for ImageRef {
    fn from(image: arl_text::ImageRef) -> Self {
        let place = image.place;
        match image.source {
            ImageSource::Url(url) => Self { place, url: Some(url), path: None, bytes: None },
            ImageSource::Path(path) => Self { place, url: None, path: Some(path), bytes: None },
            ImageSource::Bytes(bytes) => Self { place, url: None, path: None, bytes: Some(bytes.into()) },
        }
    }
}

impl From<&arl_text::SampleImage> for EncodedImage {
    fn from(image: &arl_text::SampleImage) -> Self {
        let arl_text::MeasuredImage { height, width, .. } = image.image;
        Self { place: image.place, first: image.first as u32, count: image.count as u32, height, width }
    }
}

impl From<arl_text::MicroBatch> for TokenBatch {
    fn from(batch: arl_text::MicroBatch) -> Self {
        let image = |image: arl_text::BatchImage| BatchImage {
            index: image.row,
            place: image.place,
            hash: image.image.hash.iter().map(|byte| format!("{byte:02x}")).collect(),
            height: image.image.height,
            width: image.image.width,
        };
        Self {
            input_ids: batch.input_ids.into(),
            targets: batch.targets.into(),
            positions: batch.positions.into(),
            cu_seqlens: batch.cu_seqlens.into(),
            weights: batch.weights.map(Float32Array::from),
            images: batch.images.into_iter().map(image).collect(),
        }
    }
}

/// The images of one row as the core takes them.
pub(super) fn row_images(images: Vec<MeasuredRowImage>) -> Result<Vec<arl_text::RowImage>> {
    let one = |image: MeasuredRowImage| {
        if let Some(problem) = image.problem {
            return Ok(Err(problem));
        }
        let digits = u128::from_str_radix(&image.hash, 16).ok().filter(|_| image.hash.len() == 32);
        let what = || Error::new(ErrorCode::Internal, format!("`{}` is not the hash of an image", image.hash));
        let hash = digits.ok_or_else(what)?.to_be_bytes();
        Ok(Ok(arl_text::MeasuredImage { hash, height: image.height, width: image.width }))
    };
    images.into_iter().map(one).collect()
}

pub(super) fn int32(ids: Vec<u32>) -> Int32Array {
    // Token ids are far below 2^31.
    ids.into_iter().map(|id| id as i32).collect::<Vec<_>>().into()
}

pub(super) fn core_options(options: TextOptions) -> Result<arl_text::TextOptions> {
    Ok(arl_text::TextOptions {
        model_dir: options.model_dir.into(),
        chat_template: options.chat_template.map(PathBuf::from),
        chat_template_date: options.chat_template_date,
        max_length: options.max_length.map(|length| length as usize),
        truncation: Truncation::parse(&options.truncation)?,
        thinking: options.thinking.as_deref().map(arl_text::Thinking::parse).transpose()?,
        images: options.images.as_deref().map(arl_text::Images::parse).transpose()?.unwrap_or_default(),
        vision: None,
        image_processor: options.image_processor,
        columns: options.columns.unwrap_or_default().into_iter().collect(),
        minimal_advantage: options.minimal_advantage,
        drop_zero_advantage: options.drop_zero_advantage.unwrap_or(false),
        skip_non_positive_advantage: options.skip_non_positive_advantage.unwrap_or(false),
    })
}
