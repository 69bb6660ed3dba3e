//! EXIF's eight orientations. Pixels are turned before they are resized, because resizing goes along the width first.

use image::metadata::Orientation;

/// Pixels a side of the squares in which an image is turned, so that neither side of a copy leaves the first-level cache.
const TILE: usize = 32;

/// Whether width and height change places.
pub(super) fn swaps(orientation: Orientation) -> bool {
    use Orientation::{Rotate90, Rotate90FlipH, Rotate270, Rotate270FlipH};
    matches!(orientation, Rotate90 | Rotate270 | Rotate90FlipH | Rotate270FlipH)
}

/// RGB of `size = (width, height)` as it is to be shown.
pub(super) fn upright(pixels: Vec<u8>, (width, height): (usize, usize), orientation: Orientation) -> Vec<u8> {
    let (w, h) = (width as isize, height as isize);
    // The pixel shown at (x, y) is stored at `first + x * right + y * down`.
    let (first, right, down) = match orientation {
        Orientation::NoTransforms => return pixels,
        Orientation::FlipHorizontal => (w - 1, -1, w),
        Orientation::Rotate180 => (w * h - 1, -1, -w),
        Orientation::FlipVertical => (w * (h - 1), 1, -w),
        Orientation::Rotate90FlipH => (0, w, 1),
        Orientation::Rotate90 => (w * (h - 1), -w, 1),
        Orientation::Rotate270FlipH => (w * h - 1, -w, -1),
        Orientation::Rotate270 => (w - 1, w, -1),
    };
    let (shown_width, shown_height) = if swaps(orientation) { (height, width) } else { (width, height) };
    let mut shown = vec![0; pixels.len()];
    for top in (0..shown_height).step_by(TILE) {
        for left in (0..shown_width).step_by(TILE) {
            for y in top..(top + TILE).min(shown_height) {
                let columns = left..(left + TILE).min(shown_width);
                let row = &mut shown[3 * (y * shown_width + columns.start)..3 * (y * shown_width + columns.end)];
                let mut at = first + left as isize * right + y as isize * down;
                for pixel in row.chunks_exact_mut(3) {
                    let from = 3 * at as usize;
                    pixel.copy_from_slice(&pixels[from..from + 3]);
                    at += right;
                }
            }
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 3 x 2 pixels whose red is their number.
    fn numbered() -> Vec<u8> {
        (0..6).flat_map(|number| [number, 100, 200]).collect()
    }

    #[test]
    fn each_orientation_shows_the_pixels_in_exifs_order() {
        // Width, and red row by row, as PIL.ImageOps.exif_transpose gives them.
        let shown: [(usize, [u8; 6]); 8] = [
            (3, [0, 1, 2, 3, 4, 5]),
            (3, [2, 1, 0, 5, 4, 3]),
            (3, [5, 4, 3, 2, 1, 0]),
            (3, [3, 4, 5, 0, 1, 2]),
            (2, [0, 3, 1, 4, 2, 5]),
            (2, [3, 0, 4, 1, 5, 2]),
            (2, [5, 2, 4, 1, 3, 0]),
            (2, [2, 5, 1, 4, 0, 3]),
        ];
        for (exif, (width, reds)) in (1..).zip(shown) {
            let orientation = Orientation::from_exif(exif).unwrap();
            assert_eq!(if swaps(orientation) { 2 } else { 3 }, width, "{exif}");
            let pixels = upright(numbered(), (3, 2), orientation);
            assert_eq!(pixels.iter().step_by(3).copied().collect::<Vec<_>>(), reds, "{exif}");
            assert!(pixels.chunks(3).all(|pixel| pixel[1..] == [100, 200]), "{exif}");
        }
    }

    #[test]
    fn pictures_of_many_tiles_are_turned_as_small_ones() {
        let (width, height) = (2 * TILE + 5, TILE + 3);
        let pixels: Vec<u8> = (0..3 * width * height).map(|at| (at * at / 7) as u8).collect();
        for exif in 1..=8 {
            let orientation = Orientation::from_exif(exif).unwrap();
            let buffer = image::RgbImage::from_raw(width as u32, height as u32, pixels.clone()).unwrap();
            let mut expected = image::DynamicImage::ImageRgb8(buffer);
            expected.apply_orientation(orientation);
            assert_eq!(
                upright(pixels.clone(), (width, height), orientation),
                expected.into_rgb8().into_raw(),
                "{exif}"
            );
        }
    }
}
