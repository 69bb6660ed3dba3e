//! Every format and kind of pixel is decoded to what it shows.

use crate::common;

use arl_image::{Format, measure, prepare};
use common::{FORMATS, encode, exif, gif_of_one_pixel, picture, pixels, png, processor, rgb, turned};
use image::ExtendedColorType;

/// How far samples are apart at most.
fn distance(a: &[u8], b: &[u8]) -> u8 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a.abs_diff(*b)).max().unwrap()
}

#[test]
fn files_of_all_formats_have_their_pixels() {
    for format in FORMATS {
        let file = picture(format, 32, 24);
        let measured = measure(&file, &processor()).unwrap();
        assert_eq!((measured.format.as_str(), measured.width, measured.height), (format, 32, 24));
        assert_eq!(measured.resized, (24, 32));
        // JPEG alone loses something, at the edges of the squares.
        let bound = if format == "jpeg" { 40 } else { 0 };
        assert!(distance(&pixels(&file), &rgb(32, 24)) <= bound, "{format}");
    }
}

#[test]
fn grey_is_repeated_and_transparent_pixels_are_white() {
    let grey: Vec<u8> = (0..16).map(|n| n * 16).collect();
    let repeated: Vec<u8> = grey.iter().flat_map(|value| [*value; 3]).collect();
    for format in ["png", "jpeg", "bmp"] {
        let file = encode(format, &grey, 4, 4, ExtendedColorType::L8);
        assert!(distance(&pixels(&file), &repeated) <= if format == "jpeg" { 16 } else { 0 }, "{format}");
    }
    let transparent: Vec<u8> =
        grey.iter().flat_map(|value| [*value, 30, 60, if *value < 128 { 0 } else { 255 }]).collect();
    let on_white: Vec<u8> =
        grey.iter().flat_map(|value| if *value < 128 { [255; 3] } else { [*value, 30, 60] }).collect();
    for format in ["png", "webp", "gif"] {
        let file = encode(format, &transparent, 4, 4, ExtendedColorType::Rgba8);
        assert_eq!(pixels(&file), on_white, "{format}");
    }
    let pairs: Vec<u8> = grey.iter().flat_map(|value| [*value, if *value < 128 { 0 } else { 255 }]).collect();
    let on_white: Vec<u8> = grey.iter().flat_map(|value| [if *value < 128 { 255 } else { *value }; 3]).collect();
    assert_eq!(pixels(&encode("png", &pairs, 4, 4, ExtendedColorType::La8)), on_white);
}

#[test]
fn of_16_bits_the_upper_8_count() {
    let samples: Vec<u8> = (0..16u16).flat_map(|n| (n * 4096 + 255).to_ne_bytes()).collect();
    let upper: Vec<u8> = (0..16).flat_map(|n| [n * 16; 3]).collect();
    assert_eq!(pixels(&encode("png", &samples, 4, 4, ExtendedColorType::L16)), upper);
    let colours: Vec<u8> = samples.chunks(2).flat_map(|sample| sample.repeat(3)).collect();
    assert_eq!(pixels(&encode("png", &colours, 4, 4, ExtendedColorType::Rgb16)), upper);
    let opaque: Vec<u8> = colours.chunks(6).flat_map(|pixel| [pixel, &[255, 255]].concat()).collect();
    assert_eq!(pixels(&encode("png", &opaque, 4, 4, ExtendedColorType::Rgba16)), upper);
}

#[test]
fn pngs_of_few_bits_and_of_palettes_have_their_colours() {
    // One bit: 1010 and 0101.
    let bits = png((4, 4), 1, 0, &[], &[&[0xa0], &[0x50], &[0xa0], &[0x50]]);
    let row = |values: [u8; 4]| values.iter().flat_map(|value| [*value; 3]).collect::<Vec<_>>();
    let expected = [row([255, 0, 255, 0]), row([0, 255, 0, 255])].concat().repeat(2);
    assert_eq!(pixels(&bits), expected);
    // Two bits: the four greys.
    let greys = png((4, 4), 2, 0, &[], &[&[0x1b]; 4]);
    assert_eq!(pixels(&greys), row([0, 85, 170, 255]).repeat(4));
    // A palette whose first colour is half transparent, as Pillow 13 puts it on white; of the fourth there is none.
    let colours = [10, 20, 30, 40, 50, 60, 70, 80, 90];
    let palette = png((4, 4), 8, 3, &[(b"PLTE", &colours), (b"tRNS", &[128])], &[&[0, 1, 2, 1]; 4]);
    assert_eq!(pixels(&palette), [132, 137, 142, 40, 50, 60, 70, 80, 90, 40, 50, 60].repeat(4));
    // One grey that is transparent.
    let keyed = png((4, 4), 8, 0, &[(b"tRNS", &[0, 5])], &[&[0, 5, 6, 255]; 4]);
    assert_eq!(pixels(&keyed), row([0, 255, 6, 255]).repeat(4));
    // One colour that is.
    let pixel = [1, 2, 3, 1, 2, 4, 9, 9, 9, 1, 2, 3];
    let keyed = png((4, 4), 8, 2, &[(b"tRNS", &[0, 1, 0, 2, 0, 3])], &[&pixel; 4]);
    assert_eq!(pixels(&keyed), [255, 255, 255, 1, 2, 4, 9, 9, 9, 255, 255, 255].repeat(4));
}

#[test]
fn jpegs_of_every_kind_are_near_to_pillows() {
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    // Kept as they are: 26 x 18 is resized to nothing else by squares of 2 pixels.
    let processor = arl_image::ImageProcessor { patch_size: 1, ..processor() };
    for (name, bound) in
        [("baseline", 3), ("progressive", 3), ("grey", 1), ("cmyk", 3), ("ycck", 3), ("rgb", 1), ("rgb-named", 1)]
    {
        let file = std::fs::read(dir.join(format!("{name}.jpg"))).unwrap();
        let pillows = std::fs::read(dir.join(format!("{name}.rgb"))).unwrap();
        let prepared = prepare(&file, &processor).unwrap();
        assert_eq!((prepared.width, prepared.height), (26, 18), "{name}");
        let far = distance(&prepared.pixels, &pillows);
        assert!(far <= bound, "{name}: {far}");
    }
}

#[test]
fn a_jpeg_with_adobes_mark_for_plain_samples_is_what_its_other_marks_say() {
    // The encoder's JFIF segment says that three samples are YCbCr, whatever Adobe's says.
    let file = picture("jpeg", 32, 24);
    let adobe = |transform: u8| [&[0xff, 0xee, 0, 14], b"Adobe".as_slice(), &[0, 100, 0, 0, 0, 0, transform]].concat();
    let with = |transform: u8| [&file[..2], &adobe(transform), &file[2..]].concat();
    for transform in [0, 1, 2] {
        assert_eq!(pixels(&with(transform)), pixels(&file), "{transform}");
    }
}

#[test]
fn orientation_of_each_format_is_applied() {
    let (width, height) = (32, 24);
    for format in ["jpeg", "png", "webp"] {
        let plain = pixels(&picture(format, width, height));
        for orientation in 1..=8 {
            let file = turned(format, width, height, orientation);
            let mut expected =
                image::DynamicImage::ImageRgb8(image::RgbImage::from_raw(width, height, plain.clone()).unwrap());
            expected.apply_orientation(image::metadata::Orientation::from_exif(orientation).unwrap());
            let measured = measure(&file, &processor()).unwrap();
            let prepared = prepare(&file, &processor()).unwrap();
            assert_eq!(
                (measured.width, measured.height),
                (expected.width(), expected.height()),
                "{format} {orientation}"
            );
            assert_eq!(measured.resized, (prepared.height, prepared.width), "{format} {orientation}");
            assert_eq!(prepared.pixels, expected.into_rgb8().into_raw(), "{format} {orientation}");
        }
    }
}

#[test]
fn orientations_that_exif_does_not_have_turn_nothing() {
    let plain = pixels(&picture("png", 8, 4));
    for orientation in [0, 9, 255] {
        assert_eq!(pixels(&turned("png", 8, 4, orientation)), plain, "{orientation}");
    }
    // EXIF data that are cut anywhere, and with the prefix that JPEG has.
    for end in 0..26 {
        let file = png((8, 4), 8, 0, &[(b"eXIf", &exif(6)[..end])], &[&[7; 8]; 4]);
        let measured = measure(&file, &processor()).unwrap();
        assert!([8, 4].contains(&measured.width), "{end}");
    }
    let prefixed = [b"Exif\0\0".as_slice(), &exif(6)].concat();
    let file = png((8, 4), 8, 0, &[(b"eXIf", &prefixed)], &[&[7; 8]; 4]);
    assert_eq!(measure(&file, &processor()).unwrap().width, 4);
}

#[test]
fn of_an_animation_the_first_frame_is_taken() {
    let mut file = Vec::new();
    let frame = |value: u8| image::Frame::new(image::RgbaImage::from_pixel(8, 8, image::Rgba([value, 10, 20, 255])));
    image::codecs::gif::GifEncoder::new(&mut file).encode_frames([200, 90, 30].map(frame)).unwrap();
    assert_eq!(pixels(&file), [200, 10, 20].repeat(64));
    // A frame that is smaller than its screen, and one that reaches beyond it: what it leaves is transparent.
    let one = pixels(&gif_of_one_pixel((4, 4), 1, 2, (1, 1)));
    let mut expected = vec![255; 48];
    expected[3 * 9..3 * 10].copy_from_slice(&[200, 100, 50]);
    assert_eq!(one, expected);
    assert_eq!(pixels(&gif_of_one_pixel((4, 4), 9, 9, (1, 1))), [255; 48]);
}

#[test]
fn what_follows_a_picture_does_not_change_it() {
    for format in FORMATS {
        let file = picture(format, 16, 12);
        let longer = [&file, b"trailing bytes, \xff\xd8\xff and \x89PNG".as_slice()].concat();
        assert_eq!(pixels(&longer), pixels(&file), "{format}");
        let (one, other) = (measure(&file, &processor()).unwrap(), measure(&longer, &processor()).unwrap());
        assert_ne!(one.hash, other.hash, "{format}");
        assert_eq!(one.resized, other.resized, "{format}");
    }
}

#[test]
fn the_hash_is_the_first_half_of_blake3() {
    let file = picture("png", 8, 8);
    let measured = measure(&file, &processor()).unwrap();
    assert_eq!(measured.format, Format::Png);
    assert_eq!(measured.hash, blake3::hash(&file).as_bytes()[..16]);
    assert_eq!(measured.hash, prepare(&file, &processor()).unwrap().hash);
}
