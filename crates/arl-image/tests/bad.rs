//! Whatever the bytes are: an error that says what is wrong and what to do, or the pixels.

use crate::common;

use arl_image::{MAX_PIXELS, measure, prepare};
use arl_model::{Error, ErrorCode};
use common::property::holds;
use common::{FORMATS, gif_of_one_pixel, picture, png, processor, turned};
use proptest::prelude::*;

/// The error of both functions, which must be the same where the header shows it.
fn refused(file: &[u8]) -> Error {
    let error = measure(file, &processor()).unwrap_err();
    let prepared = prepare(file, &processor()).unwrap_err();
    assert_eq!(error.message, prepared.message);
    checked(error)
}

fn checked(error: Error) -> Error {
    assert_eq!(error.code, ErrorCode::Data, "{error}");
    assert!(!error.hint.is_empty(), "{error}");
    error
}

/// A file of each format whose header claims a size, with nothing behind it that could be as much.
fn claims(format: &str, width: u32, height: u32) -> Vec<u8> {
    let mut file = if format == "png" { Vec::new() } else { picture(format, 8, 8) };
    let (w, h) = (width as u16, height as u16);
    match format {
        "png" => return png((width, height), 8, 2, &[], &[&[0; 24]]),
        "jpeg" => {
            let frame = file.windows(2).position(|pair| pair == [0xff, 0xc0]).unwrap();
            file[frame + 5..frame + 7].copy_from_slice(&h.to_be_bytes());
            file[frame + 7..frame + 9].copy_from_slice(&w.to_be_bytes());
        }
        "gif" => {
            file[6..8].copy_from_slice(&w.to_le_bytes());
            file[8..10].copy_from_slice(&h.to_le_bytes());
        }
        "bmp" => {
            file[18..22].copy_from_slice(&width.to_le_bytes());
            file[22..26].copy_from_slice(&height.to_le_bytes());
        }
        // Lossless WebP: 14 bits each, less one.
        "webp" => {
            let bits = u32::from_le_bytes(file[21..25].try_into().unwrap());
            let size = (width - 1) & 0x3fff | ((height - 1) & 0x3fff) << 14;
            file[21..25].copy_from_slice(&(bits & 0xf000_0000 | size).to_le_bytes());
        }
        _ => unreachable!("{format}"),
    }
    file
}

#[test]
fn headers_that_claim_too_many_pixels_are_refused() {
    let sizes = [
        ("png", 100_000, 100_000),
        ("bmp", 100_000, 100_000),
        ("jpeg", 65_535, 65_535),
        ("gif", 65_535, 65_535),
        ("webp", 16_383, 16_383),
    ];
    for (format, width, height) in sizes {
        let message = refused(&claims(format, width, height)).message;
        assert!(message.contains(&format!("has {width} x {height} pixels; more than {MAX_PIXELS}")), "{message}");
    }
}

#[test]
fn a_size_of_zero_is_refused() {
    for (format, width, height) in [
        ("png", 0, 5),
        ("png", 5, 0),
        ("jpeg", 0, 8),
        ("jpeg", 8, 0),
        ("gif", 0, 8),
        ("gif", 8, 0),
        ("bmp", 0, 8),
        ("bmp", 8, 0),
    ] {
        let message = refused(&claims(format, width, height)).message;
        let says = format!("the {} is damaged: its header says {width} x {height} pixels", format.to_uppercase());
        assert_eq!(message, says);
    }
}

#[test]
fn sides_that_differ_200_times_are_the_last_to_pass() {
    let fits = png((200, 1), 8, 0, &[], &[&[9; 200]]);
    assert_eq!(measure(&fits, &processor()).unwrap().resized.0, 4);
    assert!(prepare(&fits, &processor()).unwrap().pixels.iter().all(|value| *value == 9));
    for (width, height) in [(201, 1), (1, 201)] {
        let row = vec![9; width as usize];
        let error = refused(&png((width, height), 8, 0, &[], &vec![row; height as usize]));
        assert!(error.message.contains(&format!("{width} x {height} pixels (width x height)")), "{error}");
        assert!(error.message.contains("more than 200 times"), "{error}");
    }
}

#[test]
fn truncated_files_are_refused_wherever_they_end() {
    for format in FORMATS {
        let file = picture(format, 24, 16);
        // What follows the pixels: a PNG's last chunk, and how a GIF ends.
        let spare = match format {
            "png" => 12 + 4,
            "gif" => 3,
            _ => 0,
        };
        for end in 0..file.len() {
            match prepare(&file[..end], &processor()) {
                Ok(_) => assert!(end + spare >= file.len(), "{format}: {end} bytes of {}", file.len()),
                Err(error) => drop(checked(error)),
            }
        }
        let half = prepare(&file[..file.len() / 2], &processor()).unwrap_err();
        assert!(half.message.contains("damaged"), "{format}: {half}");
    }
    let jpeg = picture("jpeg", 24, 16);
    let error = prepare(&jpeg[..jpeg.len() - 1], &processor()).unwrap_err();
    assert_eq!(error.message, "the JPEG is damaged: it is truncated: its end marker is missing");
    let bmp = picture("bmp", 24, 16);
    let error = prepare(&bmp[..bmp.len() - 1], &processor()).unwrap_err();
    assert_eq!(error.message, "the BMP is damaged: it is truncated: its bytes end before its pixels");
}

#[test]
fn bytes_that_are_no_picture_are_named() {
    for (bytes, says) in [
        (b"".as_slice(), "it has no bytes"),
        (b"<html><body>403 Forbidden</body></html>", "this is a page of HTML or XML"),
        (b"%PDF-1.4 ...", "this is a PDF"),
    ] {
        assert_eq!(refused(bytes).message, format!("not a supported image: {says}"));
    }
}

#[test]
fn kinds_of_jpeg_that_are_not_decoded_are_named() {
    let file = picture("jpeg", 8, 8);
    let frame = file.windows(2).position(|pair| pair == [0xff, 0xc0]).unwrap();
    let with = |at: usize, value: u8| {
        let mut changed = file.clone();
        changed[frame + at] = value;
        refused(&changed).message
    };
    assert_eq!(with(1, 0xc3), "the JPEG cannot be decoded: it is lossless");
    assert_eq!(with(1, 0xc5), "the JPEG cannot be decoded: it is hierarchical");
    assert_eq!(with(1, 0xc9), "the JPEG cannot be decoded: it is with arithmetic coding");
    assert_eq!(with(4, 12), "the JPEG cannot be decoded: it has 12 bits a sample");
    assert_eq!(with(9, 2), "the JPEG cannot be decoded: it has 2 samples a pixel");
    assert_eq!(refused(b"\xff\xd8\xff\xd9").message, "the JPEG is damaged: it ends before its pixels");
}

#[test]
fn a_frame_that_is_larger_than_its_screen_gets_no_memory_for_it() {
    let error = prepare(&gif_of_one_pixel((4, 4), 0, 0, (60_000, 60_000)), &processor()).unwrap_err();
    assert!(checked(error).message.contains("claims more memory"));
    assert!(prepare(&gif_of_one_pixel((4, 4), 0, 0, (5, 5)), &processor()).is_err(), "one pixel of 25");
}

/// Bytes of which some were changed, put in or taken out.
fn damage(file: &[u8]) -> impl Strategy<Value = Vec<u8>> + use<> {
    let file = file.to_vec();
    proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..4u8), 1..8).prop_map(move |changes| {
        let mut file = file.clone();
        for (at, value, kind) in changes {
            let at = at.index(file.len());
            match kind {
                0 => file.insert(at, value),
                1 if file.len() > 1 => drop(file.remove(at)),
                _ => file[at] = value,
            }
        }
        file
    })
}

/// Both functions give an error with advice, or what fits together.
fn answers(file: &[u8]) -> Result<(), TestCaseError> {
    let measured = measure(file, &processor());
    match (measured, prepare(file, &processor())) {
        (Ok(measured), Ok(prepared)) => {
            prop_assert_eq!(measured.resized, (prepared.height, prepared.width));
            prop_assert_eq!(prepared.pixels.len(), 3 * prepared.height as usize * prepared.width as usize);
        }
        (Err(error), Err(_)) | (Ok(_), Err(error)) => {
            prop_assert_eq!(error.code, ErrorCode::Data);
            prop_assert!(!error.hint.is_empty());
        }
        (Err(error), Ok(_)) => prop_assert!(false, "refused by its header, and decoded: {error}"),
    }
    Ok(())
}

#[test]
fn damaged_files_give_pixels_or_errors() {
    for format in FORMATS {
        holds(150, damage(&picture(format, 16, 12)), |file| answers(&file));
    }
    for format in ["jpeg", "png", "webp"] {
        holds(50, damage(&turned(format, 16, 12, 6)), |file| answers(&file));
    }
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    for name in ["baseline", "progressive", "cmyk", "rgb"] {
        holds(100, damage(&std::fs::read(dir.join(format!("{name}.jpg"))).unwrap()), |file| answers(&file));
    }
}

#[test]
fn random_bytes_give_errors() {
    let magics: [&[u8]; 6] = [b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\x40\0\0\0WEBP", b"GIF89a", b"BM", b""];
    for magic in magics {
        holds(100, proptest::collection::vec(any::<u8>(), 0..200), |bytes| answers(&[magic, &bytes].concat()));
    }
}
