//! Images to pixels, on threads of their own: conversions only.

use std::path::PathBuf;
use std::sync::Arc;

use arl_image::{ImageProcessor as Processor, Measured, Prepared, measure, prepare};
use napi::Env;
use napi::bindgen_prelude::{Object, Uint8Array};
use napi_derive::napi;

use crate::error::sync;
use crate::worker::pooled;

/// What a processor is set to.
#[napi(object)]
pub struct ImageProcessorInfo {
    /// The side of a patch in pixels.
    pub patch_size: u32,
    /// `mergeSize` x `mergeSize` patches make one token.
    pub merge_size: u32,
    /// Images with fewer pixels are enlarged.
    pub min_pixels: u32,
    /// Images with more pixels are scaled down.
    pub max_pixels: u32,
    /// Changes whenever pixels or token counts do.
    pub fingerprint: String,
}

/// What the header of an image tells.
#[napi(object)]
pub struct MeasuredImage {
    /// The kind of file.
    #[napi(ts_type = "'jpeg' | 'png' | 'webp' | 'gif' | 'bmp'")]
    pub format: String,
    /// Width in pixels, as it is shown.
    pub width: u32,
    /// Height in pixels, as it is shown.
    pub height: u32,
    /// Height that the model sees.
    pub resized_height: u32,
    /// Width that the model sees.
    pub resized_width: u32,
    /// Tokens in a row.
    pub tokens: u32,
    /// Of the file's content, 32 hexadecimal digits.
    pub hash: String,
}

/// An image as the model sees it.
#[napi(object)]
pub struct PreparedImage {
    /// RGB, `[height, width, 3]`.
    pub pixels: Uint8Array,
    /// Height after resizing.
    pub height: u32,
    /// Width after resizing.
    pub width: u32,
    /// Of the file's content, 32 hexadecimal digits.
    pub hash: String,
}

/// Makes pixels for a model out of images. Calls may run at the same time, each on a core.
#[napi]
pub struct ImageProcessor {
    core: Arc<Processor>,
}

#[napi]
impl ImageProcessor {
    /// Opens the settings of a model folder, with other bounds where they are given.
    #[napi(factory)]
    pub fn open(model_dir: String, min_pixels: Option<u32>, max_pixels: Option<u32>) -> napi::Result<Self> {
        let core = sync(|| {
            Processor::from_dir(&PathBuf::from(model_dir))?
                .with_bounds(min_pixels.map(u64::from), max_pixels.map(u64::from))
        })?;
        Ok(Self { core: Arc::new(core) })
    }

    /// What it is set to.
    #[napi]
    pub fn info(&self) -> ImageProcessorInfo {
        // Bounds are at most arl_image::MAX_PIXELS.
        ImageProcessorInfo {
            patch_size: self.core.patch_size as u32,
            merge_size: self.core.merge_size as u32,
            min_pixels: self.core.min_pixels as u32,
            max_pixels: self.core.max_pixels as u32,
            fingerprint: self.core.fingerprint(),
        }
    }

    /// Sizes, tokens and hash of an image, from its header alone.
    #[napi(ts_return_type = "Promise<MeasuredImage>")]
    pub fn measure<'env>(&self, env: &'env Env, bytes: Uint8Array) -> napi::Result<Object<'env>> {
        let core = Arc::clone(&self.core);
        // A copy, because JavaScript may write to its own while a thread reads.
        let bytes = bytes.to_vec();
        let job = move || {
            let measured = measure(&bytes, &core)?;
            let tokens = core.tokens(measured.resized.0, measured.resized.1);
            Ok((measured, tokens))
        };
        pooled(env, job, |(measured, tokens): (Measured, usize)| MeasuredImage {
            format: measured.format.as_str().to_owned(),
            width: measured.width,
            height: measured.height,
            resized_height: measured.resized.0,
            resized_width: measured.resized.1,
            tokens: tokens as u32,
            hash: hex(measured.hash),
        })
    }

    /// Decodes and resizes an image.
    #[napi(ts_return_type = "Promise<PreparedImage>")]
    pub fn prepare<'env>(&self, env: &'env Env, bytes: Uint8Array) -> napi::Result<Object<'env>> {
        let core = Arc::clone(&self.core);
        let bytes = bytes.to_vec();
        pooled(
            env,
            move || prepare(&bytes, &core),
            |prepared: Prepared| PreparedImage {
                pixels: prepared.pixels.into(),
                height: prepared.height,
                width: prepared.width,
                hash: hex(prepared.hash),
            },
        )
    }
}

fn hex(hash: [u8; 16]) -> String {
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}
