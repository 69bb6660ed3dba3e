//! Rows to tokens, and the token cache: conversions only.

mod values;

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use arl_model::{Error, ErrorCode, Result};
use arl_text::{TextEncoder as Encoder, TokenCache as Cache};
use napi::Env;
use napi::bindgen_prelude::{Int32Array, Object, Uint8Array, Uint32Array};
use napi_derive::napi;

use crate::error::{sync, to_napi};
use crate::worker::once;
use values::{
    EncodedImage, EncodedPrompt, EncodedRow, FillReport, ImageRef, MeasuredRowImage, RowNote, RowProblem, RowSpan,
    TextInfo, TextOptions, TokenBatch, core_options, int32, row_images,
};

/// A tokenizer with its chat template.
#[napi]
pub struct TextEncoder {
    core: Arc<Encoder>,
}

#[napi]
impl TextEncoder {
    /// Opens a model folder's tokenizer and chat template.
    #[napi(factory)]
    pub fn open(options: TextOptions) -> napi::Result<Self> {
        sync(|| Ok(Self { core: Arc::new(Encoder::open(core_options(options)?)?) }))
    }

    /// What is known of the tokenizer and the template.
    #[napi]
    pub fn info(&self) -> TextInfo {
        let info = self.core.info();
        TextInfo {
            vocab_size: info.vocab_size as u32,
            stop_ids: info.stop_ids.clone(),
            template_source: info.template_source.clone(),
            fingerprint: info.fingerprint.clone(),
        }
    }

    /// Finds out what shape the rows have; throws where it is none that is known. Later rows must have the same.
    #[napi]
    pub fn detect(&self, rows: Vec<Uint8Array>) -> napi::Result<String> {
        let rows: Vec<&[u8]> = rows.iter().map(|row| row.as_ref()).collect();
        sync(|| self.core.detect(&rows))
    }

    /// The images of a row, in the order of their places; none where images are not trained, and for a row that cannot be
    /// read.
    #[napi]
    pub fn image_refs(&self, row: Uint8Array) -> Vec<ImageRef> {
        self.core.image_refs(&row).into_iter().map(ImageRef::from).collect()
    }

    /// One row as the model sees it, with the images that `imageRefs` names.
    #[napi]
    pub fn encode(&self, row: Uint8Array, images: Option<Vec<MeasuredRowImage>>) -> napi::Result<EncodedRow> {
        let encoded = sync(|| match self.core.encode_with_images(0, &row, &row_images(images.unwrap_or_default())?) {
            Ok(arl_text::Outcome::Sample(sample)) => Ok(sample),
            Ok(arl_text::Outcome::Dropped(tokens)) => {
                Err(Error::new(ErrorCode::Data, format!("the row has {tokens} tokens and is dropped for its length")))
            }
            Err(problem) => Err(Error::new(ErrorCode::Data, format!("{}: {}", problem.reason, problem.message))),
        })?;
        let span = |span: &arl_text::Span| RowSpan {
            message: span.message as u32,
            first: span.first as u32,
            last: span.last as u32,
        };
        Ok(EncodedRow {
            weights: encoded.weights().into(),
            spans: encoded.spans.iter().map(span).collect(),
            images: encoded.images.iter().map(EncodedImage::from).collect(),
            notes: encoded.notes.counts(0).into_iter().map(RowNote::from).collect(),
            text: encoded.text,
            input_ids: int32(encoded.ids),
            record_id: encoded.record_id,
        })
    }

    /// Tokens of a conversation's messages before `until` and the header of a reply.
    #[napi]
    pub fn prompt(
        &self,
        row: Uint8Array,
        until: Option<u32>,
        images: Option<Vec<MeasuredRowImage>>,
    ) -> napi::Result<Int32Array> {
        self.prompt_row(row, until, images).map(|prompt| prompt.input_ids)
    }

    /// The same with its positions and images. `images`: all that `imageRefs` names; those behind `until` are left out.
    #[napi]
    pub fn prompt_row(
        &self,
        row: Uint8Array,
        until: Option<u32>,
        images: Option<Vec<MeasuredRowImage>>,
    ) -> napi::Result<EncodedPrompt> {
        let prompt = sync(|| {
            let images = row_images(images.unwrap_or_default())?;
            self.core.prompt_with_images(&row, until.map(|until| until as usize), &images)
        })?;
        Ok(EncodedPrompt {
            input_ids: int32(prompt.ids),
            positions: prompt.positions.into(),
            images: prompt.images.iter().map(EncodedImage::from).collect(),
        })
    }

    /// Text of tokens.
    #[napi]
    pub fn decode(&self, ids: Int32Array, skip_special_tokens: bool) -> napi::Result<String> {
        // A negative id is unknown to the tokenizer just as one beyond its vocabulary is.
        let ids: Vec<u32> = ids.iter().map(|&id| u32::try_from(id).unwrap_or(u32::MAX)).collect();
        sync(|| self.core.decode(&ids, skip_special_tokens))
    }
}

/// The samples of one source, on disk.
#[napi]
pub struct TokenCache {
    core: Mutex<Option<Arc<Cache>>>,
}

#[napi]
impl TokenCache {
    /// Opens the cache of the source that `key` names, for `rows` rows, below `dir`; continues one that exists.
    #[napi(factory)]
    pub fn open(dir: String, key: String, rows: f64, encoder: &TextEncoder) -> napi::Result<Self> {
        let encoder = Arc::clone(&encoder.core);
        sync(|| {
            let cache = Cache::open(&PathBuf::from(dir), &key, rows as usize, encoder)?;
            Ok(Self { core: Mutex::new(Some(Arc::new(cache))) })
        })
    }

    fn core(&self) -> napi::Result<Arc<Cache>> {
        let core = self.core.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        core.clone().ok_or_else(|| to_napi(&Error::new(ErrorCode::Internal, "the token cache is closed")))
    }

    /// Rows are encoded on all cores and appended; each row's tokens land under its index. `images`: of each row, those that
    /// `imageRefs` names; absent: no row has any.
    #[napi(ts_return_type = "Promise<FillReport>")]
    pub fn fill<'env>(
        &self,
        env: &'env Env,
        rows: Vec<Uint8Array>,
        indexes: Uint32Array,
        images: Option<Vec<Vec<MeasuredRowImage>>>,
    ) -> napi::Result<Object<'env>> {
        let core = self.core()?;
        let images = images.unwrap_or_default().into_iter().map(row_images).collect::<Result<Vec<_>>>();
        let images = sync(|| images)?;
        // Copied, so that no thread reads memory that JavaScript can write.
        let rows: Vec<Vec<u8>> = rows.iter().map(|row| row.to_vec()).collect();
        let indexes = indexes.to_vec();
        let job = move || {
            let rows: Vec<&[u8]> = rows.iter().map(Vec::as_slice).collect();
            core.fill_with_images(&rows, &indexes, &images)
        };
        once(env, "arl-text", job, |report| FillReport {
            rows: report.rows as u32,
            tokens: report.tokens as f64,
            target_tokens: report.target_tokens as f64,
            truncated: report.truncated as u32,
            dropped: report.dropped as u32,
            problems: report
                .problems
                .into_iter()
                .map(|problem| RowProblem { row: problem.row as u32, reason: problem.reason, message: problem.message })
                .collect(),
        })
    }

    /// Tokens of every row; 0: not there yet, dropped, or a problem.
    #[napi]
    pub fn lengths(&self) -> napi::Result<Uint32Array> {
        Ok(self.core()?.lengths().into())
    }

    /// What was noticed in the samples that are filled, by this process or an earlier one.
    #[napi]
    pub fn notes(&self) -> napi::Result<Vec<RowNote>> {
        Ok(self.core()?.notes().into_iter().map(RowNote::from).collect())
    }

    /// Rows that are filled, samples or not.
    #[napi]
    pub fn filled(&self) -> napi::Result<f64> {
        Ok(self.core()?.filled() as f64)
    }

    /// Samples side by side, in the order of `indexes`.
    #[napi]
    pub fn micro_batch(&self, indexes: Uint32Array) -> napi::Result<TokenBatch> {
        let core = self.core()?;
        sync(|| core.micro_batch(&indexes)).map(TokenBatch::from)
    }

    /// Groups of positions into `indexes`, each of at most `maxTokens` tokens together, best fit.
    #[napi]
    pub fn pack(&self, indexes: Uint32Array, max_tokens: u32) -> napi::Result<Vec<Uint32Array>> {
        let core = self.core()?;
        let groups = sync(|| core.pack(&indexes, max_tokens as usize))?;
        Ok(groups.into_iter().map(Uint32Array::from).collect())
    }

    /// What is filled is on disk from here on, also if the machine stops.
    #[napi]
    pub fn sync(&self) -> napi::Result<()> {
        let core = self.core()?;
        sync(|| core.sync())
    }

    /// Gives the files free.
    #[napi]
    pub fn close(&self) {
        self.core.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
    }
}
