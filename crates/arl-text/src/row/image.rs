//! What a row says of an image: where it is, or its bytes. Nothing is loaded here.

use std::collections::VecDeque;

use super::{Json, is_nothing, unread};
use crate::note::Notes;

/// Where an image of a row comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImageSource {
    /// A URL of any scheme, for example `https:`, `file:` or `data:`.
    Url(String),
    /// The path of a file, as the row has it.
    Path(String),
    /// The image's own bytes.
    Bytes(Vec<u8>),
}

/// An image of a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageRef {
    /// Where the row has it, for people: `messages[0].content[1]`, or `images[1]`.
    pub place: String,
    /// Where it comes from.
    pub source: ImageSource,
}

/// Where an image of a column belongs in a text.
pub(super) const IMAGE_WORD: &str = "<image>";

/// The images of a row, as its messages are read.
#[derive(Debug, Default)]
pub(super) struct RowImages {
    /// Of columns, for the places that have none of their own.
    pub(super) queue: VecDeque<ImageRef>,
    /// [`IMAGE_WORD`] is such a place.
    pub(super) where_words_are: bool,
    /// They belong before the first text of the user.
    pub(super) before_user: bool,
    /// In the order of their places.
    pub(super) placed: Vec<ImageRef>,
}

impl RowImages {
    /// A text of `role` has places of images.
    pub(super) fn are_in(&self, role: &str, text: &str) -> bool {
        (self.before_user && role == "user") || (self.where_words_are && text.contains(IMAGE_WORD))
    }
}

/// Keys of a part, or of an object in it, that may say where the image is; of several the first counts. OpenAI's `image_url`,
/// transformers' `image`, `url`, `path` and `base64`, the bytes of Hugging Face's data sets, Anthropic's `source` with
/// `data`, and `value` of LLaMA-Factory's v1 rows.
const KEYS: [&str; 9] = ["image_url", "image", "bytes", "base64", "data", "url", "path", "source", "value"];

/// Texts of this length are no paths: base64 without anything around it.
const LONGEST_PATH: usize = 4096;

/// Takes the image out of a part of a message; nothing where the part has none. `prefix`: the part's path in notes.
///
/// # Errors
/// What is wrong with it.
pub(super) fn of_part(part: &mut Json, prefix: &str, notes: &mut Notes) -> Result<Option<ImageSource>, String> {
    for key in KEYS {
        let Some(value) = part.remove(key).filter(|value| !is_nothing(value)) else { continue };
        let source = match value {
            Json::Str(text) if is_encoded(key) => {
                // The bytes show their type; the path is that of the file that they came from.
                for name in ["path", "media_type", "mime_type"] {
                    part.remove(name);
                }
                Ok(ImageSource::Url(data_url(text)))
            }
            value => of_value(value, &format!("{prefix}{key}."), notes),
        };
        return source.map(Some).map_err(|what| format!("`{key}` {what}"));
    }
    Ok(None)
}

/// The image in a value that says something. `prefix`: the path of the value's own keys in notes.
///
/// # Errors
/// What is wrong with it, as the rest of a sentence.
pub(super) fn of_value(value: Json, prefix: &str, notes: &mut Notes) -> Result<ImageSource, String> {
    match value {
        Json::Str(text) => Ok(of_text(text)),
        Json::Array(items) => {
            let byte = |item: &Json| match item {
                Json::Int(byte) => u8::try_from(*byte).ok(),
                _ => None,
            };
            let bytes: Option<Vec<u8>> = items.iter().map(byte).collect();
            bytes.map(ImageSource::Bytes).ok_or_else(|| "is a list, not of bytes".to_owned())
        }
        mut object @ Json::Object(_) => {
            let found = of_part(&mut object, prefix, notes)?.ok_or("has neither URL nor path nor bytes")?;
            object.remove("type");
            if let Json::Object(rest) = &object {
                let told = rest.iter().filter(|(_, value)| !is_nothing(value));
                told.for_each(|(key, _)| unread::add(prefix, key, notes));
            }
            Ok(found)
        }
        other => Err(format!("is {}, not a URL, a path or bytes", other.kind())),
    }
}

/// The key's text is base64, or a data URL of it.
fn is_encoded(key: &str) -> bool {
    matches!(key, "bytes" | "base64" | "data")
}

fn data_url(base64: String) -> String {
    if is_url(&base64) { base64 } else { format!("data:;base64,{base64}") }
}

fn of_text(text: String) -> ImageSource {
    if is_url(&text) {
        ImageSource::Url(text)
    } else if text.len() > LONGEST_PATH {
        ImageSource::Url(data_url(text))
    } else {
        ImageSource::Path(text)
    }
}

/// `data:`, `file:`, or a scheme with two slashes. A single letter before the colon is a drive.
fn is_url(text: &str) -> bool {
    let Some((scheme, rest)) = text.trim_start().get(..64).unwrap_or(text.trim_start()).split_once(':') else {
        return false;
    };
    let is_scheme =
        scheme.len() > 1 && scheme.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte));
    is_scheme && (rest.starts_with("//") || ["data", "file"].iter().any(|known| scheme.eq_ignore_ascii_case(known)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::row::parse;

    fn found(json: &str) -> (Result<Option<ImageSource>, String>, Vec<String>) {
        let mut notes = Notes::default();
        let source = of_part(&mut parse(json.as_bytes()).unwrap(), "p.", &mut notes);
        (source, notes.iter().map(|note| note.subject.clone()).collect())
    }

    #[test]
    fn an_image_is_a_url_a_path_or_bytes_in_every_spelling() {
        let url = |text: &str| ImageSource::Url(text.to_owned());
        let path = |text: &str| ImageSource::Path(text.to_owned());
        for (json, source) in [
            (r#"{"image_url": {"url": "https://a.example/x.png"}}"#, url("https://a.example/x.png")),
            (r#"{"image_url": "http://a.example/x.png"}"#, url("http://a.example/x.png")),
            (r#"{"image": "file:///x.png"}"#, url("file:///x.png")),
            (r#"{"image": "DATA:image/png;base64,AAAA"}"#, url("DATA:image/png;base64,AAAA")),
            (r#"{"image": "s3://bucket/x.png"}"#, url("s3://bucket/x.png")),
            (r#"{"image": "a/b: c.png"}"#, path("a/b: c.png")),
            (r#"{"image": "C:\\x.png"}"#, path("C:\\x.png")),
            (r#"{"path": "x.png"}"#, path("x.png")),
            (r#"{"value": "x.png"}"#, path("x.png")),
            (r#"{"image": {"bytes": null, "path": "x.png"}}"#, path("x.png")),
            (r#"{"image": {"bytes": "AAAA", "path": "x.png"}}"#, url("data:;base64,AAAA")),
            (r#"{"image": {"bytes": "data:image/png;base64,AAAA", "path": null}}"#, url("data:image/png;base64,AAAA")),
            (r#"{"bytes": [137, 80]}"#, ImageSource::Bytes(vec![137, 80])),
            (r#"{"base64": "AAAA"}"#, url("data:;base64,AAAA")),
            (r#"{"source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}"#, url("data:;base64,AAAA")),
            (r#"{"source": {"type": "url", "url": "https://a.example/x"}}"#, url("https://a.example/x")),
        ] {
            assert_eq!(found(json), (Ok(Some(source)), Vec::new()), "{json}");
        }
        let long = "A".repeat(LONGEST_PATH + 1);
        let source = found(&format!(r#"{{"image": "{long}"}}"#)).0.unwrap();
        assert_eq!(source, Some(url(&format!("data:;base64,{long}"))));
    }

    #[test]
    fn what_says_nothing_is_no_image_and_what_is_wrong_is_named() {
        for json in ["{}", r#"{"image": null}"#, r#"{"image": "", "bytes": [], "foo": 1}"#] {
            assert_eq!(found(json).0, Ok(None), "{json}");
        }
        for (json, named) in [
            (r#"{"image": 3}"#, "`image` is a number"),
            (r#"{"image": ["x.png"]}"#, "`image` is a list, not of bytes"),
            (r#"{"bytes": [256]}"#, "`bytes` is a list, not of bytes"),
            (r#"{"image_url": {"url": ""}}"#, "`image_url` has neither URL nor path nor bytes"),
            (r#"{"image": {"path": true}}"#, "`image` `path` is a boolean"),
        ] {
            let message = found(json).0.unwrap_err();
            assert!(message.starts_with(named), "{json}: {message}");
        }
    }

    #[test]
    fn keys_of_an_image_that_nothing_reads_are_noticed() {
        let (_, subjects) = found(r#"{"image_url": {"url": "https://a.example/x", "detail": "low", "more": null}}"#);
        assert_eq!(subjects, ["p.image_url.detail"]);
    }
}
