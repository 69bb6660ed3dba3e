//! Any kind of pixel to 8-bit RGB, as transformers' `convert_to_rgb` and Pillow do: transparent pixels are put on white, grey
//! is repeated, of 16 bits the upper 8 count.

use image::ColorType;

/// RGB of decoded pixels; none for a kind that no supported format has.
pub(super) fn to_rgb(pixels: Vec<u8>, colour: ColorType) -> Option<Vec<u8>> {
    Some(match colour {
        ColorType::Rgb8 => pixels,
        ColorType::L8 => grey(pixels.iter().copied()),
        ColorType::L16 => grey(upper(&pixels)),
        ColorType::Rgb16 => upper(&pixels).collect(),
        ColorType::La8 => on_white::<2>(&pixels),
        ColorType::Rgba8 => on_white::<4>(&pixels),
        ColorType::La16 => on_white::<2>(&upper(&pixels).collect::<Vec<_>>()),
        ColorType::Rgba16 => on_white::<4>(&upper(&pixels).collect::<Vec<_>>()),
        _ => return None,
    })
}

/// Bytes of RGB that [`to_rgb`] allocates for a pixel, at most.
pub(super) fn bytes_per_pixel(colour: ColorType) -> u64 {
    match colour {
        ColorType::Rgb8 => 0,
        ColorType::La16 => 3 + 2,
        ColorType::Rgba16 => 3 + 4,
        _ => 3,
    }
}

/// The upper byte of each 16-bit sample. Pillow does so with colours and with transparent grey; grey alone it clips at 255,
/// which leaves white.
fn upper(pixels: &[u8]) -> impl ExactSizeIterator<Item = u8> {
    pixels.chunks_exact(2).map(|sample| (u16::from_ne_bytes([sample[0], sample[1]]) >> 8) as u8)
}

fn grey(samples: impl ExactSizeIterator<Item = u8>) -> Vec<u8> {
    let mut rgb = vec![0; 3 * samples.len()];
    for (pixel, sample) in rgb.chunks_exact_mut(3).zip(samples) {
        pixel.fill(sample);
    }
    rgb
}

/// Pixels of `N` samples, the last of which is alpha, on white.
fn on_white<const N: usize>(pixels: &[u8]) -> Vec<u8> {
    let mut rgb = vec![0; pixels.len() / N * 3];
    for (pixel, from) in rgb.chunks_exact_mut(3).zip(pixels.chunks_exact(N)) {
        let alpha = u32::from(from[N - 1]);
        for (c, value) in pixel.iter_mut().enumerate() {
            *value = blend(u32::from(from[if N == 2 { 0 } else { c }]), alpha);
        }
    }
    rgb
}

/// `Image.alpha_composite` on opaque white: Pillow has 7 more bits than a byte, and divides by 255 with shifts.
fn blend(value: u32, alpha: u32) -> u8 {
    const BITS: u32 = 7;
    let sum = ((value * alpha + 255 * (255 - alpha)) << BITS) + (0x80 << BITS);
    ((((sum >> 8) + sum) >> 8) >> BITS) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn opaque_pixels_stay_and_transparent_ones_are_white() {
        for value in 0..=255 {
            assert_eq!(u32::from(blend(value, 255)), value);
            assert_eq!(blend(value, 0), 255);
        }
        // Image.alpha_composite of Pillow 13 on white.
        assert_eq!([blend(10, 128), blend(20, 128), blend(30, 128)], [132, 137, 142]);
    }

    #[test]
    fn all_kinds_of_pixels_become_rgb() {
        let sixteen = |samples: &[u16]| samples.iter().flat_map(|sample| sample.to_ne_bytes()).collect::<Vec<_>>();
        let cases = [
            (ColorType::L8, vec![7, 9], vec![7, 7, 7, 9, 9, 9]),
            (ColorType::La8, vec![7, 255, 9, 0], vec![7, 7, 7, 255, 255, 255]),
            (ColorType::Rgb8, vec![1, 2, 3], vec![1, 2, 3]),
            (ColorType::Rgba8, vec![1, 2, 3, 255, 1, 2, 3, 0], vec![1, 2, 3, 255, 255, 255]),
            (ColorType::L16, sixteen(&[0x12ff, 0xff00]), vec![0x12, 0x12, 0x12, 255, 255, 255]),
            (ColorType::La16, sixteen(&[0x1234, 0xffff]), vec![0x12, 0x12, 0x12]),
            (ColorType::Rgb16, sixteen(&[0x00ff, 0x1234, 0xffff]), vec![0, 0x12, 0xff]),
            (ColorType::Rgba16, sixteen(&[0x00ff, 0x1234, 0xffff, 0x00ff]), vec![255, 255, 255]),
        ];
        for (colour, pixels, rgb) in cases {
            assert_eq!(to_rgb(pixels, colour).unwrap(), rgb, "{colour:?}");
        }
        assert!(to_rgb(vec![0; 12], ColorType::Rgb32F).is_none());
    }
}
