//! What a model folder says of images: the tokens that stand for them, how many an image has, and the positions of tokens on
//! three axes. Pixels are another crate's.

use std::path::Path;

use arl_model::{ModelConfig, Result};

/// The token of which an image has one for each of its merged patches.
pub(crate) const IMAGE_PAD: &str = "<|image_pad|>";
/// How chat templates write an image.
pub(crate) const IMAGE_TEXT: &str = "<|vision_start|><|image_pad|><|vision_end|>";

/// More tokens than an image of any processor has: the greatest is 16,384.
const MOST_TOKENS: u64 = 1 << 24;

/// How images become tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VisionTokens {
    /// The id of `<|image_pad|>`.
    pub image_token_id: u32,
    /// The side of a patch in pixels.
    pub patch_size: u32,
    /// Patches along each side that are merged into one token.
    pub merge_size: u32,
    /// Positions have three axes: time, height, width.
    pub axes: bool,
}

impl VisionTokens {
    /// From the `config.json` of a model folder; nothing where the model has no tower.
    ///
    /// # Errors
    /// As [`ModelConfig::from_dir`].
    pub fn from_dir(model_dir: &Path) -> Result<Option<Self>> {
        if !model_dir.join("config.json").exists() {
            return Ok(None);
        }
        let vision = ModelConfig::from_dir(model_dir)?.vision;
        Ok(vision.map(|vision| Self {
            image_token_id: vision.image_token_id,
            patch_size: vision.patch_size as u32,
            merge_size: vision.spatial_merge_size as u32,
            // All families with a tower have them.
            axes: true,
        }))
    }

    /// Rows and columns of the tokens of an image of `height` x `width` pixels, as the tower gets it.
    ///
    /// # Errors
    /// Why an image cannot have that size.
    pub(crate) fn grid(&self, height: u32, width: u32) -> std::result::Result<(usize, usize), String> {
        let side = u64::from(self.patch_size) * u64::from(self.merge_size);
        let (height, width) = (u64::from(height), u64::from(width));
        let whole = |size: u64| size > 0 && size.is_multiple_of(side);
        let (rows, columns) = (height / side, width / side);
        if !whole(height) || !whole(width) || rows.saturating_mul(columns) > MOST_TOKENS {
            return Err(format!("{height} x {width} pixels are no blocks of {side} x {side}"));
        }
        Ok((rows as usize, columns as usize))
    }

    /// Positions of a sample's tokens on three axes, each from `out[axis].len()` on; `get_rope_index` of transformers for one
    /// sequence: text advances all axes together, an image's tokens share a time and have their row and column added, and
    /// what follows begins behind the greatest of them. `grids`: rows and columns of tokens of each image, in order.
    ///
    /// # Errors
    /// Where the images are not those of the tokens.
    pub(crate) fn positions(
        &self,
        ids: &[u32],
        grids: &[(usize, usize)],
        out: &mut [Vec<i32>; 3],
    ) -> std::result::Result<(), &'static str> {
        let mut grids = grids.iter();
        let (mut at, mut next) = (0, 0);
        while at < ids.len() {
            if ids[at] != self.image_token_id {
                out.iter_mut().for_each(|axis| axis.push(next));
                (at, next) = (at + 1, next + 1);
                continue;
            }
            let &(rows, columns) = grids.next().ok_or("more image tokens than its images have")?;
            let tokens = ids.get(at..at + rows * columns).ok_or("fewer image tokens than its images have")?;
            if tokens.iter().any(|&id| id != self.image_token_id) {
                return Err("fewer image tokens than its images have");
            }
            for token in 0..rows * columns {
                out[0].push(next);
                out[1].push(next + (token / columns) as i32);
                out[2].push(next + (token % columns) as i32);
            }
            at += rows * columns;
            next += rows.max(columns) as i32;
        }
        if grids.next().is_some() { Err("fewer image tokens than its images have") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use arl_model::ErrorCode;
    use serde_json::json;

    use super::*;

    const PAD: u32 = 9;

    fn vision() -> VisionTokens {
        VisionTokens { image_token_id: PAD, patch_size: 4, merge_size: 2, axes: true }
    }

    #[test]
    fn an_image_advances_by_its_longer_side() {
        let mut axes = [vec![7], vec![7], vec![7]];
        let ids = [1, PAD, PAD, PAD, PAD, PAD, PAD, 2, PAD, 3];
        vision().positions(&ids, &[(2, 3), (1, 1)], &mut axes).unwrap();
        assert_eq!(axes[0], [7, 0, 1, 1, 1, 1, 1, 1, 4, 5, 6]);
        assert_eq!(axes[1], [7, 0, 1, 1, 1, 2, 2, 2, 4, 5, 6]);
        assert_eq!(axes[2], [7, 0, 1, 2, 3, 1, 2, 3, 4, 5, 6]);
    }

    #[test]
    fn images_that_are_not_those_of_the_tokens_are_seen() {
        for (ids, grids) in
            [(vec![PAD], vec![]), (vec![1], vec![(1, 1)]), (vec![PAD, 1], vec![(1, 2)]), (vec![PAD], vec![(1, 2)])]
        {
            assert!(vision().positions(&ids, &grids, &mut Default::default()).is_err(), "{ids:?} {grids:?}");
        }
    }

    #[test]
    fn a_size_is_whole_blocks_or_refused() {
        assert_eq!(vision().grid(8, 24), Ok((1, 3)));
        for (height, width) in [(0, 8), (8, 12), (4, 8), (u32::MAX - 7, u32::MAX - 7)] {
            assert!(vision().grid(height, width).is_err(), "{height} x {width}");
        }
    }

    #[test]
    fn a_folder_says_which_token_and_how_large_patches_are() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(VisionTokens::from_dir(dir.path()).unwrap(), None);
        let read = |config: serde_json::Value| {
            std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
            VisionTokens::from_dir(dir.path())
        };
        let text = json!({
            "model_type": "qwen2", "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1,
            "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 300,
        });
        assert_eq!(read(text.clone()).unwrap(), None);
        // The flat file of a released Qwen2.5-VL.
        let mut flat = text;
        flat["model_type"] = json!("qwen2_5_vl");
        flat["image_token_id"] = json!(260);
        flat["rope_scaling"] = json!({ "type": "mrope", "mrope_section": [2, 1, 1] });
        flat["vision_config"] = json!({
            "depth": 1, "hidden_size": 8, "num_heads": 2, "intermediate_size": 4, "out_hidden_size": 16,
            "fullatt_block_indexes": [0],
        });
        let expected = VisionTokens { image_token_id: 260, patch_size: 14, merge_size: 2, axes: true };
        assert_eq!(read(flat.clone()).unwrap(), Some(expected));
        flat["image_token_id"] = json!(300);
        let error = read(flat).unwrap_err();
        assert!(error.code == ErrorCode::Config && error.message.contains("image_token_id"), "{error}");
    }
}
