//! What kind of file bytes are, by how they begin: the five that are decoded, and names for what else comes in their place.

use arl_model::{Error, ErrorCode, Result};

/// A kind of image that is decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// JPEG, baseline or progressive, with 8 bits a sample.
    Jpeg,
    /// PNG; of an animated one the image that a viewer without animation shows.
    Png,
    /// WebP, with or without loss; of an animated one the first frame.
    WebP,
    /// GIF, its first frame.
    Gif,
    /// Windows bitmap.
    Bmp,
}

impl Format {
    /// The format's name in lower case, for example `jpeg`.
    pub fn as_str(self) -> &'static str {
        match self {
            Format::Jpeg => "jpeg",
            Format::Png => "png",
            Format::WebP => "webp",
            Format::Gif => "gif",
            Format::Bmp => "bmp",
        }
    }

    /// The format's name in a message.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Format::Jpeg => "JPEG",
            Format::Png => "PNG",
            Format::WebP => "WebP",
            Format::Gif => "GIF",
            Format::Bmp => "BMP",
        }
    }

    /// Recognises a file by its first bytes; `ARL_DATA` says what it is instead.
    pub(crate) fn of(bytes: &[u8]) -> Result<Self> {
        let begins = |with: &[u8]| bytes.starts_with(with);
        if begins(b"\xff\xd8\xff") {
            return Ok(Format::Jpeg);
        }
        if begins(b"\x89PNG\r\n\x1a\n") {
            return Ok(Format::Png);
        }
        if begins(b"GIF87a") || begins(b"GIF89a") {
            return Ok(Format::Gif);
        }
        if begins(b"RIFF") && bytes.get(8..12) == Some(b"WEBP") {
            return Ok(Format::WebP);
        }
        if begins(b"BM") && bytes.len() >= 26 {
            return Ok(Format::Bmp);
        }
        let message = format!("not a supported image: {}", describe(bytes));
        Err(Error::new(ErrorCode::Data, message)
            .hint("JPEG, PNG, WebP, GIF and BMP are decoded. Convert it, or leave it out."))
    }
}

/// What bytes are that are none of the formats.
fn describe(bytes: &[u8]) -> String {
    let named = |name: &str| format!("this is {name}");
    if bytes.is_empty() {
        return "it has no bytes".to_owned();
    }
    if bytes.get(4..8) == Some(b"ftyp") {
        let brand = bytes.get(8..12).unwrap_or_default();
        return named(match brand {
            b"avif" | b"avis" => "AVIF",
            b"heic" | b"heix" | b"hevc" | b"heim" | b"mif1" | b"msf1" => "HEIC",
            _ => "a video",
        });
    }
    let binary: &[(&[u8], &str)] = &[
        (b"%PDF", "a PDF"),
        (b"II*\0", "TIFF"),
        (b"MM\0*", "TIFF"),
        (b"\0\0\x01\0", "an icon (ICO)"),
        (b"\xff\x0a", "JPEG XL"),
        (b"\0\0\0\x0cJXL ", "JPEG XL"),
        (b"\0\0\0\x0cjP  ", "JPEG 2000"),
        (b"8BPS", "a Photoshop file"),
        (b"PK\x03\x04", "a ZIP archive"),
        (b"\x1f\x8b", "gzip"),
        (b"\x1aE\xdf\xa3", "a video"),
    ];
    if let Some((_, name)) = binary.iter().find(|(magic, _)| bytes.starts_with(magic)) {
        return named(name);
    }
    let head = &bytes[..bytes.len().min(512)];
    let text = String::from_utf8_lossy(head).trim_start().to_lowercase();
    if text.starts_with("<svg") || (text.starts_with("<?xml") && text.contains("<svg")) {
        return named("an SVG drawing");
    }
    if text.starts_with('<') {
        return named("a page of HTML or XML");
    }
    if text.starts_with('{') || text.starts_with('[') {
        return named("JSON");
    }
    if !head.iter().any(|byte| matches!(byte, 0..=8 | 14..=31 | 128..)) {
        return named("text");
    }
    let first: String = head.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    format!("its bytes begin with {first}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_picture_is_named() {
        let cases: [(&[u8], &str); 11] = [
            (b"", "it has no bytes"),
            (b"%PDF-1.7", "this is a PDF"),
            (b"<!doctype html><title>404</title>", "this is a page of HTML or XML"),
            (b"<?xml version=\"1.0\"?><svg/>", "this is an SVG drawing"),
            (b"{\"error\": 403}", "this is JSON"),
            (b"not found", "this is text"),
            (b"\0\0\0\x1cftypheic\0\0\0\0", "this is HEIC"),
            (b"\0\0\0\x1cftypisom\0\0\0\0", "this is a video"),
            (b"II*\0\x08\0\0\0", "this is TIFF"),
            (b"BM\0\0", "its bytes begin with 424d0000"),
            (b"\x01\x02\x03", "its bytes begin with 010203"),
        ];
        for (bytes, says) in cases {
            let error = Format::of(bytes).unwrap_err();
            assert_eq!(error.code, ErrorCode::Data);
            assert_eq!(error.message, format!("not a supported image: {says}"));
            assert!(error.hint.starts_with("JPEG, PNG, WebP, GIF and BMP are decoded."), "{error}");
        }
    }
}
