//! The images of a micro-batch as a caller hands them in, and what is demanded of them.

use std::fmt::Display;

use arl_model::{Error, ErrorCode, Result, VisionConfig};

use crate::batch::MicroBatch;

/// Images of a micro-batch, in the order in which their tokens come.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Images {
    /// `[N, 3 * 2 * P * P]`: of each patch the channels of both frames, normalised. The patches of an image come by merge
    /// blocks: block row, block column, row in the block, column in the block.
    pub pixel_values: Vec<f32>,
    /// (time, height, width) in patches, one an image.
    pub grids: Vec<[u32; 3]>,
}

impl Images {
    /// Patches that the grids come to.
    pub fn patches(&self) -> usize {
        self.grids.iter().map(patches).sum()
    }
}

fn patches(grid: &[u32; 3]) -> usize {
    grid.iter().map(|&side| side as usize).product()
}

fn invalid(owner: &str, what: impl Display, hint: &str) -> Error {
    let error = Error::new(ErrorCode::Data, format!("{owner}: {what}"));
    if hint.is_empty() { error } else { error.hint(hint) }
}

impl MicroBatch {
    /// Checks that images are such as the tower takes, and that each has as many tokens as it has merge blocks, all in one
    /// sequence; `owner` is what errors call the micro-batch. Demands that [`MicroBatch::validate`] has passed.
    pub(crate) fn validate_images(&self, owner: &str, tower: Option<&VisionConfig>) -> Result<()> {
        let Some(tower) = tower else {
            return match self.images.as_ref().filter(|images| !images.grids.is_empty()) {
                None => Ok(()),
                Some(images) => Err(invalid(
                    owner,
                    format_args!("it has {} images, and this model has no vision tower", images.grids.len()),
                    "train a model that sees (Qwen2.5-VL, Qwen3-VL, Qwen3.5), or drop the images",
                )),
            };
        };
        let nothing = Images::default();
        let images = self.images.as_ref().unwrap_or(&nothing);
        let merge = tower.spatial_merge_size as u32;
        for (image, grid) in images.grids.iter().enumerate() {
            let [frames, height, width] = *grid;
            if frames != 1 {
                let what = format_args!("image {image} has {frames} frames: videos are not built");
                return Err(invalid(owner, what, "train on still images"));
            }
            if height == 0 || width == 0 || !height.is_multiple_of(merge) || !width.is_multiple_of(merge) {
                let what = format_args!("image {image} has {height} x {width} patches, which are no blocks of {merge}");
                return Err(invalid(owner, what, "its sides must be whole multiples of the merger's blocks"));
            }
        }
        let (numbers, expected) = (images.pixel_values.len(), images.patches() * tower.patch_elements());
        if numbers != expected {
            let what = format_args!("pixel_values has {numbers} numbers, and the grids ask for {expected}");
            return Err(invalid(owner, what, ""));
        }
        self.check_places(owner, images, tower)
    }

    /// Each image has its tokens, in one sequence.
    fn check_places(&self, owner: &str, images: &Images, tower: &VisionConfig) -> Result<()> {
        let places = self.image_tokens(tower.image_token_id);
        let tokens: usize = images.patches() / tower.merge_unit();
        if places.len() != tokens {
            let what = format_args!(
                "it has {} image tokens (id {}), and its {} images come to {tokens}",
                places.len(),
                tower.image_token_id,
                images.grids.len()
            );
            return Err(invalid(owner, what, "every image needs its placeholder in the text, and the reverse"));
        }
        let mut first = 0;
        for (image, grid) in images.grids.iter().enumerate() {
            let count = patches(grid) / tower.merge_unit();
            let (start, end) = (places[first], places[first + count - 1]);
            if self.cu_seqlens.iter().any(|&bound| start < bound && bound <= end) {
                let what = format_args!("image {image} begins in one sequence and ends in another");
                return Err(invalid(owner, what, "a sequence was cut within an image"));
            }
            first += count;
        }
        Ok(())
    }

    /// The places of a token.
    pub(crate) fn image_tokens(&self, id: u32) -> Vec<i32> {
        let places = (0..).zip(&self.input_ids);
        places.filter(|(_, other)| u32::try_from(**other) == Ok(id)).map(|(place, _)| place).collect()
    }
}
