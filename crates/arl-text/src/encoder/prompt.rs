//! What a model answers: a conversation's messages before a reply, and that reply's header.

use arl_model::{Error, ErrorCode, Result};

use crate::loss_mask;
use crate::problem::Refusal;
use crate::row::{Row, image_count, is_reply};

use super::TextEncoder;
use super::images::{RowImage, SampleImage, Tokenized, with_images};

/// Tokens of a prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Prompt {
    /// Token ids.
    pub ids: Vec<u32>,
    /// `[T]`, or `[3, T]` for models with three axes.
    pub positions: Vec<i32>,
    /// Its images, the first ones of the row.
    pub images: Vec<SampleImage>,
}

impl TextEncoder {
    /// Tokens of a conversation's messages before `until` and the header of a reply. `until` absent: before the last
    /// message if that is the assistant's, else all messages.
    ///
    /// # Errors
    /// `ARL_DATA` where the row is no conversation, or has no message `until`.
    pub fn prompt(&self, bytes: &[u8], until: Option<usize>) -> Result<Vec<u32>> {
        self.prompt_with_images(bytes, until, &[]).map(|prompt| prompt.ids)
    }

    /// The same with the images of the row, all of them; those behind `until` are left out.
    ///
    /// # Errors
    /// As [`TextEncoder::prompt`].
    pub fn prompt_with_images(&self, bytes: &[u8], until: Option<usize>, images: &[RowImage]) -> Result<Prompt> {
        let failed = |refusal: Refusal| Error::new(ErrorCode::Data, refusal.message);
        let tokens = match self.read(bytes).map_err(failed)? {
            Row::Chat(mut record) => {
                let count = record.messages.len();
                let until = until.unwrap_or(count - usize::from(record.messages.last().is_some_and(is_reply)));
                if until == 0 || until > count {
                    let what = format!("prompt until message {until}: the row has {count}");
                    return Err(Error::new(ErrorCode::Data, what));
                }
                record.messages.truncate(until);
                record.images.truncate(record.messages.iter().map(image_count).sum());
                self.templates.as_ref().map_err(Clone::clone)?;
                let given = images.get(..record.images.len()).unwrap_or(images);
                let measured = self.measured(&record.images, given).map_err(failed)?;
                self.check_record(&record).map_err(failed)?;
                let probed = self.template_of(&record).map_err(failed)?;
                let rendered = loss_mask::render(probed, &record, self.options.thinking, true).map_err(failed)?;
                let tokens = self.cut_and_tokenize(&rendered.text, &rendered.replies).map_err(failed)?;
                self.expand(tokens, &measured, &record.messages).map_err(failed)?
            }
            Row::Text { texts, images: refs, .. } => {
                let measured = self.measured(&refs, images).map_err(failed)?;
                self.check_texts(&texts).map_err(failed)?;
                let mut tokens = Tokenized::default();
                self.append(&with_images(&texts), true, &mut tokens.ids).map_err(failed)?;
                self.expand(tokens, &measured, &[]).map_err(failed)?
            }
            Row::Tokens { ids, .. } => {
                self.expand(Tokenized { ids, ..Tokenized::default() }, &[], &[]).map_err(failed)?
            }
        };
        let positions = self.positions(&tokens.ids, &tokens.images)?;
        Ok(Prompt { ids: tokens.ids, positions, images: tokens.images })
    }
}
