//! Pixels to the rows that a vision tower takes: normalised, and in the order in which patches are merged.

use rayon::prelude::*;

use crate::ImageProcessor;

impl ImageProcessor {
    /// Appends the patches of a resized image (`pixels`: RGB, `[height, width, 3]`, both sides multiples of
    /// [`Self::factor`]) to `out`: `[height / P * width / P, 3 * T * P * P]` with `T` the temporal size, a row ordered by
    /// channel, frame, y, x.
    ///
    /// Patches come by merge blocks: block row, block column, row in the block, column in it. A value is
    /// `(u8 - 255 mean) / (255 std)` in f32, as transformers' torchvision backend fuses it.
    ///
    /// # Panics
    ///
    /// Where `pixels` has another length, or a side is no multiple.
    pub fn patches(&self, pixels: &[u8], height: usize, width: usize, out: &mut Vec<f32>) {
        let (patch, merge, factor) = (self.patch_size, self.merge_size, self.factor());
        assert_eq!(pixels.len(), 3 * height * width, "pixels of {height} x {width}");
        assert!(
            height.is_multiple_of(factor) && width.is_multiple_of(factor),
            "{height} x {width} is not cut into squares of {factor}"
        );
        let table = self.table();
        let row_len = 3 * self.temporal_patch_size * patch * patch;
        let start = out.len();
        out.resize(start + height / patch * (width / patch) * row_len, 0.0);
        // A merge block's patches are neighbours in `out`, and so are the blocks of a row of blocks.
        let blocks = (width / factor).max(1);
        let block_len = merge * merge * row_len;
        out[start..].par_chunks_mut(blocks * block_len).enumerate().for_each(|(block_row, out)| {
            for (at, out) in out.chunks_exact_mut(row_len).enumerate() {
                let (block, within) = (at / (merge * merge), at % (merge * merge));
                let top = block_row * factor + within / merge * patch;
                let left = block * factor + within % merge * patch;
                self.patch(&table, pixels, width, (top, left), out);
            }
        });
    }

    /// One patch, whose first pixel is at `(top, left)`.
    fn patch(
        &self,
        table: &[[f32; 256]; 3],
        pixels: &[u8],
        width: usize,
        (top, left): (usize, usize),
        out: &mut [f32],
    ) {
        let patch = self.patch_size;
        let frame = patch * patch;
        for (c, out) in out.chunks_exact_mut(self.temporal_patch_size * frame).enumerate() {
            let values = &table[c];
            let (first, others) = out.split_at_mut(frame);
            for (y, out) in first.chunks_exact_mut(patch).enumerate() {
                let at = 3 * ((top + y) * width + left);
                for (out, pixel) in out.iter_mut().zip(pixels[at..at + 3 * patch].chunks_exact(3)) {
                    *out = values[usize::from(pixel[c])];
                }
            }
            // All frames of a still image are the same.
            others.chunks_exact_mut(frame).for_each(|other| other.copy_from_slice(first));
        }
    }

    /// The normalised value of each byte, a channel.
    fn table(&self) -> [[f32; 256]; 3] {
        let mut table = [[0.0; 256]; 3];
        for (values, (mean, std)) in table.iter_mut().zip(self.mean.iter().zip(&self.std)) {
            let (mean, std) = (mean * 255.0, std * 255.0);
            for (byte, value) in values.iter_mut().enumerate() {
                *value = (byte as f32 - mean) / std;
            }
        }
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The order of transformers' `patchify`, an index at a time.
    fn reference(processor: &ImageProcessor, pixels: &[u8], height: usize, width: usize) -> Vec<f32> {
        let (patch, merge) = (processor.patch_size, processor.merge_size);
        let mut out = Vec::new();
        for block_row in 0..height / patch / merge {
            for block_column in 0..width / patch / merge {
                for row in 0..merge {
                    for column in 0..merge {
                        for channel in 0..3 {
                            for _ in 0..processor.temporal_patch_size {
                                for y in 0..patch {
                                    for x in 0..patch {
                                        let y = (block_row * merge + row) * patch + y;
                                        let x = (block_column * merge + column) * patch + x;
                                        let value = f32::from(pixels[3 * (y * width + x) + channel]);
                                        let (mean, std) = (processor.mean[channel], processor.std[channel]);
                                        out.push((value - mean * 255.0) / (std * 255.0));
                                    }
                                }
                            }
                        }
                    }
                }
            }
        }
        out
    }

    #[test]
    fn patches_come_by_merge_blocks_with_each_frame_alike() {
        for (patch_size, temporal_patch_size, merge_size) in [(2, 2, 2), (3, 1, 2), (4, 3, 1), (1, 2, 3)] {
            let processor = ImageProcessor {
                patch_size,
                temporal_patch_size,
                merge_size,
                min_pixels: 1,
                max_pixels: 100,
                mean: [0.48, 0.46, 0.41],
                std: [0.27, 0.26, 0.28],
            };
            let (height, width) = (3 * processor.factor(), 2 * processor.factor());
            let pixels: Vec<u8> = (0..3 * height * width).map(|at| (at * 37 % 256) as u8).collect();
            let mut patches = Vec::new();
            processor.patches(&pixels, height, width, &mut patches);
            assert_eq!(patches, reference(&processor, &pixels, height, width));
            // A second image follows the first.
            processor.patches(&pixels, height, width, &mut patches);
            assert_eq!(patches.len(), 2 * 3 * height * width * temporal_patch_size);
        }
    }
}
