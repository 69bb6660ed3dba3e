//! JPEG, by the crate `zune-jpeg`. The markers before the first scan are read here as well: for sizes and orientation without
//! decoding, for the kinds that the decoder lacks or takes for another, and to tell a truncated file, of which it would
//! fill the rest with grey.

use arl_model::Result;
use image::metadata::Orientation;
use zune_core::bytestream::ZCursor;
use zune_core::colorspace::ColorSpace;
use zune_core::options::DecoderOptions;
use zune_jpeg::JpegDecoder;
use zune_jpeg::errors::DecodeErrors;

use super::{Header, damaged, orientation, unsupported};
use crate::format::Format;

/// What decoding needs to know besides the size.
#[derive(Debug)]
pub(super) struct Frame {
    /// Where the entropy-coded data of the first scan begin.
    scan: usize,
    /// Where Adobe's segment says how samples are transformed, if the decoder must be told something else, and what the
    /// decoder is then asked for. It takes three samples that are not transformed for CMYK.
    recast: Option<(usize, ColorSpace)>,
}

/// Reads the segments before the first scan (ITU T.81, annex B).
pub(super) fn header(bytes: &[u8]) -> Result<Header> {
    let truncated = || damaged(Format::Jpeg, "it is truncated: its bytes end within its header");
    let mut size: Option<Size> = None;
    let (mut turned, mut adobe, mut jfif) = (None, None, false);
    let mut at = 2;
    loop {
        // Bytes between segments are passed over, as libjpeg does; 0xff may be repeated.
        while *bytes.get(at).ok_or_else(truncated)? != 0xff {
            at += 1;
        }
        while *bytes.get(at).ok_or_else(truncated)? == 0xff {
            at += 1;
        }
        let marker = bytes[at];
        at += 1;
        if matches!(marker, 0 | 1 | 0xd0..=0xd8) {
            continue;
        }
        if marker == 0xd9 {
            return Err(damaged(Format::Jpeg, "it ends before its pixels"));
        }
        let length = match bytes.get(at..at + 2) {
            Some(length) => usize::from(u16::from_be_bytes([length[0], length[1]])),
            None => return Err(truncated()),
        };
        let body = bytes.get(at + 2..at + length.max(2)).ok_or_else(truncated)?;
        match marker {
            0xc0..=0xcf if !matches!(marker, 0xc4 | 0xc8 | 0xcc) => size = Some(Size::read(marker, body)?),
            0xe0 => jfif |= body.starts_with(b"JFIF\0"),
            0xe1 if turned.is_none() && body.starts_with(b"Exif\0\0") => turned = Some(orientation(body)),
            0xee if body.starts_with(b"Adobe") && body.len() >= 12 => adobe = Some((at + 2 + 11, body[11])),
            0xda => {
                let size = size.ok_or_else(|| damaged(Format::Jpeg, "its scan comes before its frame"))?;
                let in_scan = u64::from(body.first().copied().unwrap_or(0));
                let recast = match adobe {
                    // The samples are RGB; the decoder gives them as they are where no other space is asked for.
                    Some((place, 0)) if size.components == 3 && !jfif && !size.named_rgb => {
                        Some((place, ColorSpace::YCbCr))
                    }
                    Some((place, 0 | 2)) if size.components == 3 => Some((place, ColorSpace::RGB)),
                    _ => None,
                };
                let memory = size.memory(in_scan < size.components) + recast.map_or(0, |_| bytes.len() as u64);
                return Ok(Header {
                    format: Format::Jpeg,
                    width: size.width,
                    height: size.height,
                    orientation: turned.unwrap_or(Orientation::NoTransforms),
                    memory,
                    jpeg: Some(Frame { scan: at + length, recast }),
                });
            }
            _ => {}
        }
        at += length.max(2);
    }
}

/// What the frame's header tells.
struct Size {
    width: u32,
    height: u32,
    components: u64,
    progressive: bool,
    /// Whether the components are called R, G and B, which the decoder knows.
    named_rgb: bool,
}

impl Size {
    fn read(marker: u8, body: &[u8]) -> Result<Self> {
        let kind = match marker {
            0xc0..=0xc2 => None,
            0xc3 => Some("lossless"),
            0xc5..=0xc7 => Some("hierarchical"),
            _ => Some("with arithmetic coding"),
        };
        if let Some(kind) = kind {
            return Err(unsupported(Format::Jpeg, format_args!("it is {kind}")));
        }
        let &[bits, h1, h0, w1, w0, components, ref parts @ ..] = body else {
            return Err(damaged(Format::Jpeg, "its frame's header is too short"));
        };
        if bits != 8 {
            return Err(unsupported(Format::Jpeg, format_args!("it has {bits} bits a sample")));
        }
        if !matches!(components, 1 | 3 | 4) {
            return Err(unsupported(Format::Jpeg, format_args!("it has {components} samples a pixel")));
        }
        Ok(Self {
            width: u32::from(u16::from_be_bytes([w1, w0])),
            height: u32::from(u16::from_be_bytes([h1, h0])),
            components: u64::from(components),
            progressive: marker == 0xc2,
            named_rgb: parts.chunks_exact(3).map(|part| part[0]).eq(*b"RGB"),
        })
    }

    /// Bytes that decoding takes at most: RGB, some rows of blocks, and all coefficients where they come in several scans.
    fn memory(&self, several_scans: bool) -> u64 {
        let (width, height) = (u64::from(self.width), u64::from(self.height));
        // Blocks of 8 x 8 come in groups of up to 4 x 4.
        let (padded_width, padded_height) = (width + 32, height + 32);
        let rows = 512 * self.components * padded_width;
        let coefficients = 2 * self.components * padded_width * padded_height;
        3 * width * height + rows + if self.progressive || several_scans { coefficients } else { 0 }
    }
}

/// RGB of a file that [`header`] has read.
pub(super) fn decode(bytes: &[u8], frame: &Frame, (width, height): (u32, u32)) -> Result<Vec<u8>> {
    // Within coded data a byte 0xff is followed by 0, so this is the end of the file's image, or of another after it.
    let ends = bytes.get(frame.scan..).is_some_and(|data| data.windows(2).rev().any(|pair| pair == [0xff, 0xd9]));
    if !ends {
        return Err(damaged(Format::Jpeg, "it is truncated: its end marker is missing"));
    }
    match frame.recast {
        None => run(bytes, ColorSpace::RGB, (width, height)),
        Some((place, space)) => {
            let mut patched = bytes.to_vec();
            patched[place] = 1;
            run(&patched, space, (width, height))
        }
    }
    .map_err(|problem| match problem {
        DecodeErrors::Unsupported(_) => unsupported(Format::Jpeg, problem),
        _ => damaged(Format::Jpeg, problem),
    })
}

fn run(bytes: &[u8], space: ColorSpace, (width, height): (u32, u32)) -> std::result::Result<Vec<u8>, DecodeErrors> {
    let options = DecoderOptions::default()
        .set_max_width(usize::from(u16::MAX))
        .set_max_height(usize::from(u16::MAX))
        .jpeg_set_out_colorspace(space);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), options);
    let mut pixels = vec![0; 3 * width as usize * height as usize];
    decoder.decode_into(&mut pixels)?;
    Ok(pixels)
}
