//! Rows to tokens, and the token cache: conversions only.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use arl_model::{Error, ErrorCode, Result};
use arl_text::{TextEncoder as Encoder, TokenCache as Cache, Truncation};
use napi::Env;
use napi::bindgen_prelude::{Float32Array, Int32Array, Object, Uint8Array, Uint32Array};
use napi_derive::napi;

use crate::error::{sync, to_napi};
use crate::values::MicroBatch;
use crate::worker::once;

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
    /// What happens to rows with images: absent or `error`: they are problems; `drop`: the images are left out and counted.
    #[napi(ts_type = "'error' | 'drop'")]
    pub images: Option<String>,
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
    /// The row's own name.
    pub record_id: Option<String>,
    /// What was noticed in the row; `firstRow` is 0.
    pub notes: Vec<RowNote>,
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

fn int32(ids: Vec<u32>) -> Int32Array {
    // Token ids are far below 2^31.
    ids.into_iter().map(|id| id as i32).collect::<Vec<_>>().into()
}

fn core_options(options: TextOptions) -> Result<arl_text::TextOptions> {
    Ok(arl_text::TextOptions {
        model_dir: options.model_dir.into(),
        chat_template: options.chat_template.map(PathBuf::from),
        chat_template_date: options.chat_template_date,
        max_length: options.max_length.map(|length| length as usize),
        truncation: Truncation::parse(&options.truncation)?,
        thinking: options.thinking.as_deref().map(arl_text::Thinking::parse).transpose()?,
        images: options.images.as_deref().map(arl_text::Images::parse).transpose()?.unwrap_or_default(),
        columns: options.columns.unwrap_or_default().into_iter().collect(),
        minimal_advantage: options.minimal_advantage,
        drop_zero_advantage: options.drop_zero_advantage.unwrap_or(false),
        skip_non_positive_advantage: options.skip_non_positive_advantage.unwrap_or(false),
    })
}

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

    /// One row as the model sees it.
    #[napi]
    pub fn encode(&self, row: Uint8Array) -> napi::Result<EncodedRow> {
        let encoded = sync(|| match self.core.encode(0, &row) {
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
            notes: encoded.notes.counts(0).into_iter().map(RowNote::from).collect(),
            text: encoded.text,
            input_ids: int32(encoded.ids),
            record_id: encoded.record_id,
        })
    }

    /// Tokens of a conversation's messages before `until` and the header of a reply.
    #[napi]
    pub fn prompt(&self, row: Uint8Array, until: Option<u32>) -> napi::Result<Int32Array> {
        sync(|| self.core.prompt(&row, until.map(|until| until as usize)).map(int32))
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

    /// Rows are encoded on all cores and appended; each row's tokens land under its index.
    #[napi(ts_return_type = "Promise<FillReport>")]
    pub fn fill<'env>(
        &self,
        env: &'env Env,
        rows: Vec<Uint8Array>,
        indexes: Uint32Array,
    ) -> napi::Result<Object<'env>> {
        let core = self.core()?;
        // Copied, so that no thread reads memory that JavaScript can write.
        let rows: Vec<Vec<u8>> = rows.iter().map(|row| row.to_vec()).collect();
        let indexes = indexes.to_vec();
        let job = move || {
            let rows: Vec<&[u8]> = rows.iter().map(Vec::as_slice).collect();
            core.fill(&rows, &indexes)
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
    pub fn micro_batch(&self, indexes: Uint32Array) -> napi::Result<MicroBatch> {
        let core = self.core()?;
        let batch = sync(|| core.micro_batch(&indexes))?;
        Ok(MicroBatch {
            input_ids: batch.input_ids.into(),
            targets: batch.targets.into(),
            positions: batch.positions.into(),
            cu_seqlens: batch.cu_seqlens.into(),
            weights: batch.weights.map(Float32Array::from),
            images: None,
        })
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
