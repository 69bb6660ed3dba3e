//! What a model folder says of images: the tokens that stand for them, how many an image has, and the positions of tokens on
//! three axes. Pixels are another crate's.

use std::path::Path;

use arl_model::{Error, ErrorCode, Result};

use crate::row::{Json, parse};

/// The token of which an image has one for each of its merged patches.
pub(crate) const IMAGE_PAD: &str = "<|image_pad|>";
/// How chat templates write an image.
pub(crate) const IMAGE_TEXT: &str = "<|vision_start|><|image_pad|><|vision_end|>";

/// The families with a tower, and the sides of a patch that transformers gives them where a file is silent.
const FAMILIES: [(&str, u32); 5] =
    [("qwen2_5_vl", 14), ("qwen3_vl", 16), ("qwen3_vl_moe", 16), ("qwen3_5", 16), ("qwen3_5_moe", 16)];
/// Patches that are merged into one token, along each side, where a file is silent.
const MERGE_SIZE: u32 = 2;

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
    /// `ARL_CONFIG` for a tower whose images are not known, `ARL_IO` where the file cannot be read.
    pub fn from_dir(model_dir: &Path) -> Result<Option<Self>> {
        let path = model_dir.join("config.json");
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io(&path, &error)),
        };
        let wrong = |what: String| Error::new(ErrorCode::Config, format!("{}: {what}", path.display()));
        let config = parse(&bytes).map_err(|refusal| wrong(refusal.message))?;
        let Some(tower @ Json::Object(_)) = config.get("vision_config") else { return Ok(None) };
        let model_type = config.get("model_type").and_then(Json::as_str).unwrap_or_default();
        let Some((_, patch_size)) = FAMILIES.into_iter().find(|(family, _)| *family == model_type) else {
            return Err(wrong(format!("images of model_type `{model_type}` are not known")));
        };
        let number = |object: &Json, key: &str| match object.get(key) {
            None | Some(Json::Null) => Ok(None),
            Some(Json::Int(value)) if (1..=i64::from(i32::MAX)).contains(value) => Ok(Some(*value as u32)),
            Some(_) => Err(wrong(format!("{key} is not a positive integer"))),
        };
        let Some(image_token_id) = number(&config, "image_token_id")? else {
            return Err(wrong("image_token_id is missing".to_owned()));
        };
        Ok(Some(Self {
            image_token_id,
            patch_size: number(tower, "patch_size")?.unwrap_or(patch_size),
            merge_size: number(tower, "spatial_merge_size")?.unwrap_or(MERGE_SIZE),
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
        let read = |config: &str| {
            std::fs::write(dir.path().join("config.json"), config).unwrap();
            VisionTokens::from_dir(dir.path())
        };
        assert_eq!(VisionTokens::from_dir(dir.path()).unwrap(), None);
        assert_eq!(read(r#"{"model_type": "qwen3"}"#).unwrap(), None);
        let flat = r#"{"model_type": "qwen2_5_vl", "image_token_id": 151655, "vision_config": {"patch_size": 14}}"#;
        let expected = VisionTokens { image_token_id: 151_655, patch_size: 14, merge_size: 2, axes: true };
        assert_eq!(read(flat).unwrap(), Some(expected));
        let own = r#"{"model_type": "qwen3_5", "image_token_id": 3, "vision_config": {"spatial_merge_size": 4}}"#;
        assert_eq!(read(own).unwrap().map(|vision| (vision.patch_size, vision.merge_size)), Some((16, 4)));
        for (config, named) in [
            (r#"{"model_type": "llava", "image_token_id": 3, "vision_config": {}}"#, "llava"),
            (r#"{"model_type": "qwen3_vl", "vision_config": {}}"#, "image_token_id is missing"),
            (r#"{"model_type": "qwen3_vl", "image_token_id": 3, "vision_config": {"patch_size": 0}}"#, "patch_size"),
            ("{", "not JSON"),
        ] {
            let error = read(config).unwrap_err();
            assert!(error.code == ErrorCode::Config && error.message.contains(named), "{error}");
        }
    }
}
