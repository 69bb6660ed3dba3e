//! Pictures that tests make, byte by byte where an encoder would not make them.
#![allow(dead_code, reason = "each file of tests uses some")]
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests fail loudly and report what they skip")]

pub(crate) mod property;

use std::io::Cursor;
use std::path::PathBuf;

use arl_image::ImageProcessor;
use image::codecs::bmp::BmpEncoder;
use image::codecs::gif::GifEncoder;
use image::codecs::jpeg::JpegEncoder;
use image::codecs::png::PngEncoder;
use image::codecs::webp::WebPEncoder;
use image::{ExtendedColorType, ImageEncoder};

/// Golden cases, or nothing, with a notice.
pub(crate) fn shared(part: &str) -> Option<PathBuf> {
    let default = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared");
    let path = std::env::var_os("ARL_SHARED").map_or(default, PathBuf::from).join(part);
    if !path.exists() {
        println!("SKIPPED: {} is not there", path.display());
        return None;
    }
    Some(path)
}

/// A processor with small patches, that leaves sides alone which are multiples of 4 pixels.
pub(crate) fn processor() -> ImageProcessor {
    ImageProcessor {
        patch_size: 2,
        temporal_patch_size: 2,
        merge_size: 2,
        min_pixels: 16,
        max_pixels: 4096,
        mean: [0.5; 3],
        std: [0.5; 3],
    }
}

/// The formats that have an encoder here.
pub(crate) const FORMATS: [&str; 5] = ["jpeg", "png", "webp", "gif", "bmp"];

/// Smooth RGB with 64 colours, so that GIF keeps it and JPEG nearly does.
pub(crate) fn rgb(width: u32, height: u32) -> Vec<u8> {
    let pixel = |x: u32, y: u32| [(x * 7 % 64 / 8 * 32) as u8, (y * 5 % 64 / 8 * 32) as u8, 90];
    (0..height).flat_map(|y| (0..width).flat_map(move |x| pixel(x, y))).collect()
}

/// A file of these pixels.
pub(crate) fn encode(format: &str, pixels: &[u8], width: u32, height: u32, colour: ExtendedColorType) -> Vec<u8> {
    encode_with(format, pixels, (width, height), colour, None)
}

fn encode_with(
    format: &str,
    pixels: &[u8],
    (width, height): (u32, u32),
    colour: ExtendedColorType,
    exif: Option<Vec<u8>>,
) -> Vec<u8> {
    fn write(
        mut encoder: impl ImageEncoder,
        exif: Option<Vec<u8>>,
        pixels: &[u8],
        size: (u32, u32),
        colour: ExtendedColorType,
    ) {
        if let Some(exif) = exif {
            encoder.set_exif_metadata(exif).unwrap();
        }
        encoder.write_image(pixels, size.0, size.1, colour).unwrap();
    }
    let mut file = Vec::new();
    let size = (width, height);
    match format {
        "jpeg" => write(JpegEncoder::new_with_quality(&mut file, 95), exif, pixels, size, colour),
        "png" => write(PngEncoder::new(&mut file), exif, pixels, size, colour),
        "webp" => write(WebPEncoder::new_lossless(&mut file), exif, pixels, size, colour),
        "gif" => GifEncoder::new(&mut file).encode(pixels, width, height, colour).unwrap(),
        "bmp" => BmpEncoder::new(&mut Cursor::new(&mut file)).encode(pixels, width, height, colour).unwrap(),
        _ => unreachable!("{format}"),
    }
    file
}

/// [`rgb`] as a file.
pub(crate) fn picture(format: &str, width: u32, height: u32) -> Vec<u8> {
    encode(format, &rgb(width, height), width, height, ExtendedColorType::Rgb8)
}

/// [`rgb`] as a JPEG, PNG or WebP with an orientation.
pub(crate) fn turned(format: &str, width: u32, height: u32, orientation: u8) -> Vec<u8> {
    encode_with(format, &rgb(width, height), (width, height), ExtendedColorType::Rgb8, Some(exif(orientation)))
}

/// EXIF data with an orientation alone: a TIFF header and a directory with one entry.
pub(crate) fn exif(orientation: u8) -> Vec<u8> {
    let mut exif = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0".to_vec();
    exif.extend([orientation, 0, 0, 0, 0, 0, 0]);
    exif
}

/// A PNG of rows as they are, without compression: `extra` are chunks between the header and the pixels.
pub(crate) fn png(
    size: (u32, u32),
    depth: u8,
    colour: u8,
    extra: &[(&[u8; 4], &[u8])],
    rows: &[impl AsRef<[u8]>],
) -> Vec<u8> {
    let mut header = Vec::new();
    header.extend(size.0.to_be_bytes());
    header.extend(size.1.to_be_bytes());
    header.extend([depth, colour, 0, 0, 0]);
    let raw: Vec<u8> = rows.iter().flat_map(|row| [&[0], row.as_ref()].concat()).collect();
    let mut file = b"\x89PNG\r\n\x1a\n".to_vec();
    let mut chunk = |kind: &[u8; 4], data: &[u8]| {
        file.extend((data.len() as u32).to_be_bytes());
        let checked = [kind.as_slice(), data].concat();
        file.extend(&checked);
        file.extend(crc(&checked).to_be_bytes());
    };
    chunk(b"IHDR", &header);
    extra.iter().for_each(|(kind, data)| chunk(kind, data));
    chunk(b"IDAT", &stored(&raw));
    chunk(b"IEND", &[]);
    file
}

/// zlib's format with one block that is not compressed (RFC 1950, 1951).
fn stored(raw: &[u8]) -> Vec<u8> {
    let len = u16::try_from(raw.len()).unwrap();
    let mut zlib = vec![0x78, 0x01, 1];
    zlib.extend(len.to_le_bytes());
    zlib.extend((!len).to_le_bytes());
    zlib.extend(raw);
    let (mut a, mut b) = (1u32, 0u32);
    for byte in raw {
        a = (a + u32::from(*byte)) % 65521;
        b = (b + a) % 65521;
    }
    zlib.extend((b << 16 | a).to_be_bytes());
    zlib
}

/// CRC-32 of a PNG's chunk.
fn crc(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 })
    })
}

/// A GIF whose first frame, of one pixel, is at `(left, top)` of its screen.
pub(crate) fn gif_of_one_pixel(screen: (u16, u16), left: u16, top: u16, frame: (u16, u16)) -> Vec<u8> {
    let mut gif = b"GIF89a".to_vec();
    gif.extend(screen.0.to_le_bytes());
    gif.extend(screen.1.to_le_bytes());
    // A palette of two colours, the second of which is the background.
    gif.extend([0x80, 1, 0, 200, 100, 50, 0, 0, 255]);
    gif.push(0x2c);
    for number in [left, top, frame.0, frame.1] {
        gif.extend(number.to_le_bytes());
    }
    gif.extend([0, 2, 2, 0x44, 0x01, 0, 0x3b]);
    gif
}

/// The pixels of a file, whose sides must be multiples of 4.
pub(crate) fn pixels(file: &[u8]) -> Vec<u8> {
    arl_image::prepare(file, &processor()).unwrap().pixels
}
