//! Bytes of a file to upright RGB. The header is read first, so that an image that would take too much is refused before
//! anything is allocated for it; a decoder's own panic is an error like its others.

mod colour;
mod jpeg;
mod orient;
mod other;

use std::panic::{AssertUnwindSafe, catch_unwind};

use arl_model::{Error, ErrorCode, Result};
use image::metadata::Orientation;

use crate::format::Format;

/// An image with more pixels than this is refused. It is where Pillow refuses (`Image.MAX_IMAGE_PIXELS`, twice), far above
/// what any camera takes and any model sees.
pub const MAX_PIXELS: u64 = 178_956_970;

/// What the header of a file tells, of an image of allowed size.
#[derive(Debug)]
pub(crate) struct Header {
    format: Format,
    /// As stored.
    width: u32,
    height: u32,
    orientation: Orientation,
    /// Bytes that decoding allocates at most, RGB included.
    memory: u64,
    /// What only a JPEG has.
    jpeg: Option<jpeg::Frame>,
}

impl Header {
    /// Reads the header of a file of any supported format.
    pub(crate) fn read(bytes: &[u8]) -> Result<Self> {
        let format = Format::of(bytes)?;
        let mut header = guarded(format, || match format {
            Format::Jpeg => jpeg::header(bytes),
            _ => other::header(format, bytes),
        })?;
        let (width, height) = (header.width, header.height);
        let pixels = checked_size(format, width, height)?;
        if header.orientation != Orientation::NoTransforms {
            header.memory += 3 * pixels;
        }
        Ok(header)
    }

    pub(crate) fn format(&self) -> Format {
        self.format
    }

    /// `(width, height)` after the orientation is applied.
    pub(crate) fn shown(&self) -> (u32, u32) {
        match orient::swaps(self.orientation) {
            true => (self.height, self.width),
            false => (self.width, self.height),
        }
    }

    /// Bytes that [`Self::decode`] allocates at most.
    pub(crate) fn memory(&self) -> u64 {
        self.memory
    }

    /// The pixels of the file that this is the header of, upright: RGB, `[height, width, 3]` of [`Self::shown`].
    pub(crate) fn decode(&self, bytes: &[u8]) -> Result<Vec<u8>> {
        let pixels = guarded(self.format, || match &self.jpeg {
            Some(frame) => jpeg::decode(bytes, frame, (self.width, self.height)),
            None => other::decode(self.format, bytes),
        })?;
        if pixels.len() as u64 != 3 * u64::from(self.width) * u64::from(self.height) {
            return Err(damaged(self.format, "its pixels are not as many as its header says"));
        }
        Ok(orient::upright(pixels, (self.width as usize, self.height as usize), self.orientation))
    }
}

/// The number of pixels, which must be neither 0 nor above [`MAX_PIXELS`].
fn checked_size(format: Format, width: u32, height: u32) -> Result<u64> {
    if width == 0 || height == 0 {
        return Err(damaged(format, format_args!("its header says {width} x {height} pixels")));
    }
    let pixels = u64::from(width) * u64::from(height);
    if pixels > MAX_PIXELS {
        let name = format.name();
        let message =
            format!("the {name} has {width} x {height} pixels; more than {MAX_PIXELS} in all are not decoded");
        return Err(Error::new(ErrorCode::Data, message).hint("Scale the image down, or leave it out."));
    }
    Ok(pixels)
}

/// The orientation that EXIF data ask for; none where they have none, or are damaged.
fn orientation(exif: &[u8]) -> Orientation {
    // Some writers of WebP keep JPEG's prefix.
    let tiff = exif.strip_prefix(b"Exif\0\0").unwrap_or(exif);
    Orientation::from_exif_chunk(tiff).unwrap_or(Orientation::NoTransforms)
}

/// The error for a file that begins as an image and cannot be decoded.
fn damaged(format: Format, what: impl std::fmt::Display) -> Error {
    Error::new(ErrorCode::Data, format!("the {} is damaged: {what}", format.name()))
        .hint("Fetch or write the file again, or leave it out.")
}

/// The error for a sound image of a kind that is not decoded.
fn unsupported(format: Format, what: impl std::fmt::Display) -> Error {
    Error::new(ErrorCode::Data, format!("the {} cannot be decoded: {what}", format.name()))
        .hint("Convert it to PNG, or to a JPEG with 8 bits a sample; or leave it out.")
}

/// Runs a decoder. Its panic, which a damaged file can cause, is an error about that file.
fn guarded<T>(format: Format, job: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(job)).unwrap_or_else(|_| Err(damaged(format, "the decoder failed on it")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_decoders_panic_is_an_error_about_the_file() {
        let error = guarded::<()>(Format::Jpeg, || panic!("index out of bounds")).unwrap_err();
        assert_eq!(error.code, ErrorCode::Data);
        assert_eq!(error.message, "the JPEG is damaged: the decoder failed on it");
    }
}
