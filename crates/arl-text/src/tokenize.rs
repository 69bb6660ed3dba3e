//! Text to token ids, with the checkpoint's `tokenizer.json`.

use std::path::Path;

use arl_model::{Error, ErrorCode, Result};
use tokenizers::Tokenizer;

/// A checkpoint's tokenizer.
pub(crate) struct Tokens {
    tokenizer: Tokenizer,
    /// One more than the largest id.
    pub(crate) vocab_size: usize,
    /// `blake3` of the file.
    pub(crate) hash: blake3::Hash,
}

impl Tokens {
    /// # Errors
    /// `ARL_TEXT` where `tokenizer.json` is missing or cannot be used.
    pub(crate) fn open(model_dir: &Path) -> Result<Self> {
        let path = model_dir.join("tokenizer.json");
        let bytes = std::fs::read(&path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => Error::new(ErrorCode::Text, format!("{}: not found", path.display()))
                .hint("a model folder needs tokenizer.json; copy it from the model's original folder"),
            _ => Error::io(&path, &error),
        })?;
        let unusable = |error: tokenizers::Error| Error::new(ErrorCode::Text, format!("{}: {error}", path.display()));
        let mut tokenizer = Tokenizer::from_bytes(&bytes).map_err(unusable)?;
        // A file may ask for truncation or padding; either would change samples in silence.
        tokenizer.with_truncation(None).map_err(unusable)?;
        tokenizer.with_padding(None);
        let largest = tokenizer.get_vocab(true).into_values().max();
        let vocab_size = largest.map_or(0, |id| id as usize + 1);
        Ok(Self { tokenizer, vocab_size, hash: blake3::hash(&bytes) })
    }

    /// Appends the tokens of `text`. `whole`: with what the tokenizer adds to a text (a start token, for example).
    pub(crate) fn append(&self, text: &str, whole: bool, ids: &mut Vec<u32>) -> std::result::Result<(), String> {
        if text.is_empty() && !whole {
            return Ok(());
        }
        let encoding = self.tokenizer.encode_fast(text, whole).map_err(|error| error.to_string())?;
        ids.extend_from_slice(encoding.get_ids());
        Ok(())
    }

    /// The id of a token's text.
    pub(crate) fn id(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    /// # Errors
    /// `ARL_TEXT` for an id that there is not, and where the tokenizer fails.
    pub(crate) fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        self.tokenizer
            .decode(ids, skip_special_tokens)
            .map_err(|error| Error::new(ErrorCode::Text, format!("the tokens cannot be decoded: {error}")))
    }
}
