//! Micro-batches and prompts on their way to the engine. Images cross as pixels; the thread that computes makes patches of them.

use arl_engine::Images;
use arl_image::ImageProcessor;
use arl_model::{Error, ErrorCode, Result};
use napi::bindgen_prelude::{Float32Array, Int32Array, Uint8Array};
use napi_derive::napi;

/// Pixels of an image, `[height, width, 3]`.
#[napi(object, object_to_js = true)]
pub struct ImagePixels {
    /// RGB, `[height, width, 3]`.
    pub pixels: Uint8Array,
    /// Height after resizing.
    pub height: u32,
    /// Width after resizing.
    pub width: u32,
}

/// Samples side by side, without padding.
#[napi(object, object_to_js = true)]
pub struct MicroBatch {
    /// `[T]`: token ids.
    pub input_ids: Int32Array,
    /// `[T]`: already shifted: the logits at t are scored against `targets[t]`; -100 is not trained.
    pub targets: Int32Array,
    /// `[T]`: position of each token in its sequence; or `[3, T]`: time, height and width.
    pub positions: Int32Array,
    /// `[sequences + 1]`: where each sequence begins, and `T`.
    pub cu_seqlens: Int32Array,
    /// `[T]`: weight of each target; absent: 1.
    pub weights: Option<Float32Array>,
    /// Images in the order of their tokens.
    pub images: Option<Vec<ImagePixels>>,
}

/// What a model sees of a prompt.
#[napi(object, object_to_js = true)]
pub struct PromptImages {
    /// `[T]`, or `[3, T]`: time, height and width of each token.
    pub positions: Int32Array,
    /// Images in the order of their tokens.
    pub images: Vec<ImagePixels>,
}

/// An image that has crossed.
struct Picture {
    /// `[height, width, 3]`.
    pixels: Vec<u8>,
    height: usize,
    width: usize,
}

/// A micro-batch that has crossed; its images are not patches yet.
pub(crate) struct Crossed {
    batch: arl_engine::MicroBatch,
    pictures: Vec<Picture>,
}

/// A prompt that has crossed.
pub(crate) struct CrossedPrompt {
    prompt: arl_engine::Prompt,
    pictures: Vec<Picture>,
}

/// Copies pixels, so that no thread reads memory that JavaScript can write.
fn pictures_from_js(images: &[ImagePixels]) -> Vec<Picture> {
    let picture = |image: &ImagePixels| Picture {
        pixels: image.pixels.to_vec(),
        height: image.height as usize,
        width: image.width as usize,
    };
    images.iter().map(picture).collect()
}

/// Copies the batch, so that no thread reads memory that JavaScript can write.
pub(crate) fn batch_from_js(batch: &MicroBatch) -> Crossed {
    Crossed {
        batch: arl_engine::MicroBatch {
            input_ids: batch.input_ids.to_vec(),
            targets: batch.targets.to_vec(),
            positions: batch.positions.to_vec(),
            cu_seqlens: batch.cu_seqlens.to_vec(),
            weights: batch.weights.as_ref().map(|weights| weights.to_vec()),
            images: None,
        },
        pictures: pictures_from_js(batch.images.as_deref().unwrap_or_default()),
    }
}

pub(crate) fn batches_from_js(batches: &[MicroBatch]) -> Vec<Crossed> {
    batches.iter().map(batch_from_js).collect()
}

/// Prompts with what the model sees of each, if that is given.
pub(crate) fn prompts_from_js(prompts: &[Int32Array], seen: Option<&[PromptImages]>) -> Result<Vec<CrossedPrompt>> {
    if let Some(seen) = seen.filter(|seen| seen.len() != prompts.len()) {
        let message = format!("{} prompts have images, and there are {} prompts", seen.len(), prompts.len());
        return Err(Error::new(ErrorCode::Internal, message));
    }
    let crossed = |(i, ids): (usize, &Int32Array)| {
        let mut prompt = arl_engine::Prompt::from(ids.to_vec());
        let Some(seen) = seen.map(|seen| &seen[i]) else { return CrossedPrompt { prompt, pictures: Vec::new() } };
        // Positions of one axis are those of text.
        if seen.positions.len() > ids.len() {
            prompt.positions = seen.positions.to_vec();
        }
        CrossedPrompt { prompt, pictures: pictures_from_js(&seen.images) }
    };
    Ok(prompts.iter().enumerate().map(crossed).collect())
}

/// The micro-batches as the engine takes them.
pub(crate) fn prepared(
    batches: Vec<Crossed>,
    processor: Option<&ImageProcessor>,
) -> Result<Vec<arl_engine::MicroBatch>> {
    let prepare = |(i, Crossed { batch, pictures }): (usize, Crossed)| {
        let images = patches(&pictures, processor).map_err(|what| refused(&format!("micro-batch {i}"), &what))?;
        Ok(arl_engine::MicroBatch { images, ..batch })
    };
    batches.into_iter().enumerate().map(prepare).collect()
}

/// The prompts as the engine takes them.
pub(crate) fn prepared_prompts(
    prompts: Vec<CrossedPrompt>,
    processor: Option<&ImageProcessor>,
) -> Result<Vec<arl_engine::Prompt>> {
    let prepare = |(i, CrossedPrompt { prompt, pictures }): (usize, CrossedPrompt)| {
        let images = patches(&pictures, processor).map_err(|what| refused(&format!("prompt {i}"), &what))?;
        Ok(arl_engine::Prompt { images, ..prompt })
    };
    prompts.into_iter().enumerate().map(prepare).collect()
}

fn refused(owner: &str, what: &str) -> Error {
    Error::new(ErrorCode::Data, format!("{owner}: {what}"))
}

/// Patches of all pictures, if there are any; else what is wrong.
fn patches(pictures: &[Picture], processor: Option<&ImageProcessor>) -> std::result::Result<Option<Images>, String> {
    if pictures.is_empty() {
        return Ok(None);
    }
    let Some(processor) = processor else {
        return Err(format!("it has {} images, and the engine was opened without the vision tower", pictures.len()));
    };
    let (side, block) = (processor.patch_size, processor.patch_size * processor.merge_size);
    let mut images = Images::default();
    for (i, Picture { pixels, height, width }) in pictures.iter().enumerate() {
        let whole = *height > 0 && *width > 0 && height % block == 0 && width % block == 0;
        if !whole || pixels.len() != 3 * height * width {
            let bytes = pixels.len();
            return Err(format!("image {i} has {bytes} bytes for {height} x {width} pixels in blocks of {block}"));
        }
        processor.patches(pixels, *height, *width, &mut images.pixel_values);
        images.grids.push([1, (height / side) as u32, (width / side) as u32]);
    }
    Ok(Some(images))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn processor() -> ImageProcessor {
        ImageProcessor {
            patch_size: 2,
            temporal_patch_size: 2,
            merge_size: 2,
            min_pixels: 16,
            max_pixels: 1 << 20,
            mean: [0.5; 3],
            std: [0.5; 3],
        }
    }

    fn picture(height: usize, width: usize) -> Picture {
        Picture { pixels: vec![255; 3 * height * width], height, width }
    }

    #[test]
    fn pixels_become_patches_of_their_grids_one_behind_the_other() {
        let images = patches(&[picture(4, 8), picture(8, 4)], Some(&processor())).unwrap().unwrap();
        assert_eq!(images.grids, [[1, 2, 4], [1, 4, 2]]);
        assert_eq!(images.pixel_values, vec![1.0; 16 * 24]);
        assert_eq!(patches(&[], None).unwrap(), None);
    }

    #[test]
    fn pixels_that_do_not_fit_are_refused_by_name() {
        let short = Picture { pixels: vec![0; 7], height: 4, width: 4 };
        for (wrong, what) in [(short, "image 1 has 7 bytes for 4 x 4 pixels"), (picture(6, 4), "for 6 x 4 pixels")] {
            let error = patches(&[picture(4, 4), wrong], Some(&processor())).unwrap_err();
            assert!(error.contains(what), "{error}");
        }
        let error = patches(&[picture(4, 4)], None).unwrap_err();
        assert!(error.contains("opened without the vision tower"), "{error}");
    }
}
