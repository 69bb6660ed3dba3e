//! Images of a sample: the placeholder that the template wrote for each becomes as many tokens as the image has.

use arl_model::{Error, ErrorCode, Result};

use crate::loss_mask;
use crate::options::TextOptions;
use crate::problem::{Refusal, reason};
use crate::row::{ImageRef, Json, Record, Row};
use crate::tokenize::Tokens;
use crate::vision::{IMAGE_PAD, IMAGE_TEXT, VisionTokens};

use super::TextEncoder;

/// An image as it was measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MeasuredImage {
    /// Of its bytes.
    pub hash: [u8; 16],
    /// Pixels that it is resized to.
    pub height: u32,
    /// Pixels that it is resized to.
    pub width: u32,
}

/// An image of a row, or why it cannot be had.
pub type RowImage = std::result::Result<MeasuredImage, String>;

/// An image of a sample: `ids[first..first + count]` stand for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SampleImage {
    /// Which image of its row it is.
    pub place: u32,
    /// Its first token.
    pub first: usize,
    /// Its tokens.
    pub count: usize,
    /// The image itself.
    pub image: MeasuredImage,
}

/// Tokens of a rendered text.
#[derive(Debug, Default)]
pub(super) struct Tokenized {
    pub(super) ids: Vec<u32>,
    /// The range of each reply: `ids[first..end]`.
    pub(super) replies: Vec<(usize, usize)>,
    pub(super) images: Vec<SampleImage>,
}

/// How a folder's model takes images.
///
/// # Errors
/// `ARL_CONFIG` for a model without a tower, `ARL_TEXT` for a tokenizer without its tokens.
pub(super) fn vision(options: &TextOptions, tokens: &Tokens) -> Result<VisionTokens> {
    let dir = &options.model_dir;
    let found = match &options.vision {
        Some(vision) => Some(vision.clone()),
        None => VisionTokens::from_dir(dir)?,
    };
    let Some(vision) = found else {
        let what = format!("{}: the model has no tower for images (config.json has no vision_config)", dir.display());
        return Err(Error::new(ErrorCode::Config, what)
            .hint("use Qwen2.5-VL, Qwen3-VL or Qwen3.5, or train on the text alone with --images drop"));
    };
    let file = dir.join("tokenizer.json");
    for token in ["<|vision_start|>", IMAGE_PAD, "<|vision_end|>"] {
        let what = match tokens.id(token) {
            None => format!("{}: there is no token `{token}`", file.display()),
            Some(id) if token == IMAGE_PAD && id != vision.image_token_id => {
                format!("{}: `{token}` is token {id}, config.json has {}", file.display(), vision.image_token_id)
            }
            Some(_) => continue,
        };
        return Err(Error::new(ErrorCode::Text, what).hint("copy tokenizer.json from the model's original folder"));
    }
    Ok(vision)
}

impl TextEncoder {
    /// The images of a row, in the order of their places. None for a row that cannot be read, and where images are not
    /// trained: encoding it says what becomes of it.
    pub fn image_refs(&self, bytes: &[u8]) -> Vec<ImageRef> {
        let text = std::str::from_utf8(bytes).unwrap_or_default();
        if self.vision.is_none() || !self.reader.may_have_images(text) {
            return Vec::new();
        }
        match self.read(bytes) {
            Ok(Row::Chat(record)) => record.images,
            Ok(Row::Text { images, .. }) => images,
            Ok(Row::Tokens { .. }) | Err(_) => Vec::new(),
        }
    }

    /// How images become tokens, where they are trained.
    pub(crate) fn vision(&self) -> Option<&VisionTokens> {
        self.vision.as_ref()
    }

    /// The images that came with a row as those that it refers to.
    pub(super) fn measured(
        &self,
        refs: &[ImageRef],
        given: &[RowImage],
    ) -> std::result::Result<Vec<MeasuredImage>, Refusal> {
        if refs.len() != given.len() {
            let plural = if refs.len() == 1 { "" } else { "s" };
            let what = format!("the row refers to {} image{plural}, loaded were {}", refs.len(), given.len());
            return Err(Refusal::new(reason::IMAGE, what));
        }
        let Some(vision) = &self.vision else { return Ok(Vec::new()) };
        let one = |(ImageRef { place, .. }, image): (&ImageRef, &RowImage)| {
            let refused = |what: String| Refusal::new(reason::IMAGE, format!("{place}: {what}"));
            let image = image.as_ref().map_err(|what| refused(what.clone()))?;
            vision.grid(image.height, image.width).map_err(refused)?;
            Ok(*image)
        };
        refs.iter().zip(given).map(one).collect()
    }

    /// No text of a row may spell the token that stands for an image: nothing could tell it from one.
    pub(super) fn check_texts(&self, texts: &[String]) -> std::result::Result<(), Refusal> {
        let spelt = self.vision.is_some() && texts.iter().any(|text| text.contains(IMAGE_PAD));
        if spelt { Err(spells("`text`")) } else { Ok(()) }
    }

    /// The same for everything that a conversation says.
    pub(super) fn check_record(&self, record: &Record) -> std::result::Result<(), Refusal> {
        if self.vision.is_none() {
            return Ok(());
        }
        let has = |value: &Json| {
            let mut found = false;
            value.strings(&mut |text| found |= text.contains(IMAGE_PAD));
            found
        };
        if let Some(i) = record.messages.iter().position(has) {
            return Err(spells(&format!("messages[{i}]")));
        }
        for (name, value) in [("`tools`", &record.tools), ("`chat_template_kwargs`", &record.variables)] {
            if value.as_ref().is_some_and(has) {
                return Err(spells(name));
            }
        }
        Ok(())
    }

    /// Repeats the placeholder of each image by its tokens; replies move with them. `messages`: of the conversation, to name
    /// the one whose images the template left out.
    pub(super) fn expand(
        &self,
        given: Tokenized,
        images: &[MeasuredImage],
        messages: &[Json],
    ) -> std::result::Result<Tokenized, Refusal> {
        let Some(vision) = &self.vision else { return Ok(given) };
        let written = given.ids.iter().filter(|&&id| id == vision.image_token_id).count();
        if written != images.len() {
            let of_message = match loss_mask::suspect(messages).filter(|_| written < images.len()) {
                Some(i) => format!(", perhaps not those of messages[{i}]"),
                None => String::new(),
            };
            let plural = if images.len() == 1 { "" } else { "s" };
            let what =
                format!("the chat template writes {written} places for {} image{plural}{of_message}", images.len());
            return Err(Refusal::new(reason::TEMPLATE, what));
        }
        if images.is_empty() {
            return Ok(given);
        }
        let mut tokens = Tokenized::default();
        // Where each token of before begins now, and the end.
        let mut moved = Vec::with_capacity(given.ids.len() + 1);
        let mut next = images.iter();
        for id in given.ids {
            moved.push(tokens.ids.len());
            let image = if id == vision.image_token_id { next.next() } else { None };
            let Some(&image) = image else {
                tokens.ids.push(id);
                continue;
            };
            let refused = |what| Refusal::new(reason::IMAGE, what);
            let (rows, columns) = vision.grid(image.height, image.width).map_err(refused)?;
            let (place, first, count) = (tokens.images.len() as u32, tokens.ids.len(), rows * columns);
            tokens.images.push(SampleImage { place, first, count, image });
            tokens.ids.extend(std::iter::repeat_n(id, count));
        }
        moved.push(tokens.ids.len());
        tokens.replies = given.replies.into_iter().map(|(first, end)| (moved[first], moved[end])).collect();
        Ok(tokens)
    }

    /// Positions of tokens: `[T]`, or `[3, T]` for models with three axes.
    ///
    /// # Errors
    /// `ARL_INTERNAL` where the images are not those of the tokens.
    pub fn positions(&self, ids: &[u32], images: &[SampleImage]) -> Result<Vec<i32>> {
        let Some(vision) = self.vision.as_ref().filter(|vision| vision.axes) else {
            return Ok((0..ids.len() as i32).collect());
        };
        let mut axes = Default::default();
        let images: Vec<MeasuredImage> = images.iter().map(|image| image.image).collect();
        vision.push_positions(ids, &images, &mut axes)?;
        Ok(axes.concat())
    }
}

/// A text as it is rendered where an image is between each two of `texts`.
pub(super) fn with_images(texts: &[String]) -> String {
    texts.join(IMAGE_TEXT)
}

fn spells(place: &str) -> Refusal {
    Refusal::new(reason::IMAGE_TOKEN, format!("{place}: the text has `{IMAGE_PAD}`, which stands for an image"))
}

impl VisionTokens {
    /// [`VisionTokens::positions`] of measured images.
    ///
    /// # Errors
    /// `ARL_INTERNAL` where the images are not those of the tokens.
    pub(crate) fn push_positions(&self, ids: &[u32], images: &[MeasuredImage], out: &mut [Vec<i32>; 3]) -> Result<()> {
        let failed = |what: String| Error::new(ErrorCode::Internal, format!("positions of images: {what}"));
        let grids: std::result::Result<Vec<_>, String> =
            images.iter().map(|image| self.grid(image.height, image.width)).collect();
        self.positions(ids, &grids.map_err(failed)?, out).map_err(|what| failed(what.to_owned()))
    }
}
