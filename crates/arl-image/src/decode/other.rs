//! PNG, WebP, GIF and BMP, by the crate `image`. Of a file with several frames it gives the first.

use std::io::Cursor;

use arl_model::Result;
use image::codecs::bmp::BmpDecoder;
use image::codecs::gif::GifDecoder;
use image::codecs::png::PngDecoder;
use image::codecs::webp::WebPDecoder;
use image::metadata::Orientation;
use image::{ImageDecoder, ImageError, ImageResult, Limits};

use super::{Header, MAX_PIXELS, checked_size, colour, damaged, orientation, unsupported};
use crate::format::Format;

/// Bytes for what a PNG's header may hold, such as a compressed colour profile.
const PNG_CHUNKS: u64 = 64 << 20;
/// Bytes for a GIF's first frame next to its screen.
const GIF_SPARE: u64 = 1 << 20;

/// Reads the header of a file that begins as `format`.
pub(super) fn header(format: Format, bytes: &[u8]) -> Result<Header> {
    // Before the decoder reads further, and because BMP's gives another reason for a size of 0.
    if let Some((width, height)) = claimed_size(format, bytes) {
        checked_size(format, width, height)?;
    }
    let mut decoder = open(format, bytes).map_err(|problem| error(format, &problem))?;
    let (width, height) = decoder.dimensions();
    // Damaged EXIF data are no reason to refuse sound pixels.
    let exif = decoder.exif_metadata().ok().flatten();
    let pixels = u64::from(width) * u64::from(height);
    let colour = decoder.color_type();
    let own = match format {
        // A canvas, a frame and what is decoded of it.
        Format::WebP => 8 * pixels,
        Format::Gif => frame_limit(pixels),
        _ => 0,
    };
    let memory = decoder.total_bytes().saturating_add(own + colour::bytes_per_pixel(colour) * pixels);
    let orientation = exif.map_or(Orientation::NoTransforms, |exif| orientation(&exif));
    Ok(Header { format, width, height, orientation, memory, jpeg: None })
}

/// The size at the beginning of a PNG or BMP.
fn claimed_size(format: Format, bytes: &[u8]) -> Option<(u32, u32)> {
    let four = |at: usize| bytes.get(at..at + 4)?.try_into().ok();
    match format {
        Format::Png => Some((u32::from_be_bytes(four(16)?), u32::from_be_bytes(four(20)?))),
        // A negative height means that rows are stored from top to bottom. An old header has 2 bytes for each.
        Format::Bmp if u32::from_le_bytes(four(14)?) >= 40 => {
            let side = |at| Some(i32::from_le_bytes(four(at)?).unsigned_abs());
            Some((side(18)?, side(22)?))
        }
        _ => None,
    }
}

/// RGB of a file that [`header`] has read.
pub(super) fn decode(format: Format, bytes: &[u8]) -> Result<Vec<u8>> {
    let decoder = open(format, bytes).map_err(|problem| error(format, &problem))?;
    let colour = decoder.color_type();
    let mut pixels = vec![0; decoder.total_bytes() as usize];
    decoder.read_image(&mut pixels).map_err(|problem| error(format, &problem))?;
    colour::to_rgb(pixels, colour).ok_or_else(|| unsupported(format, format_args!("its pixels are {colour:?}")))
}

/// Bytes that a GIF's frame, which may be larger than its screen, may take.
fn frame_limit(screen: u64) -> u64 {
    8 * screen.min(MAX_PIXELS) + GIF_SPARE
}

fn open(format: Format, bytes: &[u8]) -> ImageResult<Box<dyn ImageDecoder + '_>> {
    let reader = Cursor::new(bytes);
    let mut limits = Limits::no_limits();
    Ok(match format {
        Format::Png => {
            limits.max_alloc = Some(PNG_CHUNKS);
            Box::new(PngDecoder::with_limits(reader, limits)?)
        }
        Format::Gif => {
            let mut decoder = GifDecoder::new(reader)?;
            let (width, height) = decoder.dimensions();
            limits.max_alloc = Some(frame_limit(u64::from(width) * u64::from(height)));
            decoder.set_limits(limits)?;
            Box::new(decoder)
        }
        Format::WebP => Box::new(WebPDecoder::new(reader)?),
        // JPEG never comes here.
        Format::Bmp | Format::Jpeg => Box::new(BmpDecoder::new(reader)?),
    })
}

/// What a decoder says, as this program says it.
fn error(format: Format, problem: &ImageError) -> arl_model::Error {
    match problem {
        ImageError::Unsupported(_) => unsupported(format, problem),
        ImageError::Limits(_) => damaged(format, "a part of it claims more memory than its image needs"),
        ImageError::IoError(io) if io.kind() == std::io::ErrorKind::UnexpectedEof => {
            damaged(format, "it is truncated: its bytes end before its pixels")
        }
        ImageError::Parameter(_) => damaged(format, "it has no frame"),
        _ => damaged(format, problem),
    }
}
