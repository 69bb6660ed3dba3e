//! What a checkpoint says of its images, and the sizes that follow from it.

mod config;

use std::path::Path;

use arl_model::{Error, ErrorCode, Result};

use crate::decode::MAX_PIXELS;

/// An image whose longer side is more than this many times its shorter one is refused, as transformers does.
const MAX_RATIO: f64 = 200.0;

/// How the images of a checkpoint are resized, cut and normalised. The names are those of `preprocessor_config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct ImageProcessor {
    /// The side of a patch in pixels, `P`.
    pub patch_size: usize,
    /// Frames that a patch spans; all of a still image's are equal.
    pub temporal_patch_size: usize,
    /// `merge_size` x `merge_size` patches make one token.
    pub merge_size: usize,
    /// Images with fewer pixels are enlarged.
    pub min_pixels: u64,
    /// Images with more pixels are scaled down.
    pub max_pixels: u64,
    /// Of red, green and blue from 0 to 1, subtracted.
    pub mean: [f32; 3],
    /// Of red, green and blue from 0 to 1, divided by.
    pub std: [f32; 3],
}

impl ImageProcessor {
    /// Reads the settings of a model folder: `image_processor` of `processor_config.json` where it has one, else
    /// `preprocessor_config.json`. `ARL_CONFIG` where a key is wrong or asks for what is not built, with the file and
    /// the key.
    pub fn from_dir(model_dir: &Path) -> Result<Self> {
        config::read(model_dir)
    }

    /// The same with other bounds; none keeps the model's. `ARL_CONFIG` where they contradict each other.
    pub fn with_bounds(mut self, min_pixels: Option<u64>, max_pixels: Option<u64>) -> Result<Self> {
        for (name, given) in [("min_pixels", min_pixels), ("max_pixels", max_pixels)] {
            if given.is_some_and(|pixels| !(1..=MAX_PIXELS).contains(&pixels)) {
                let message = format!("{name} must be from 1 to {MAX_PIXELS}, but is {}", given.unwrap_or_default());
                return Err(Error::new(ErrorCode::Config, message));
            }
        }
        self.min_pixels = min_pixels.unwrap_or(self.min_pixels);
        self.max_pixels = max_pixels.unwrap_or(self.max_pixels);
        if self.min_pixels > self.max_pixels {
            let message = format!("min_pixels {} is above max_pixels {}", self.min_pixels, self.max_pixels);
            let hint = "Give both, or one that fits what preprocessor_config.json has for the other.";
            return Err(Error::new(ErrorCode::Config, message).hint(hint));
        }
        Ok(self)
    }

    /// The side in pixels of the square that makes one token; resized sides are multiples of it.
    pub fn factor(&self) -> usize {
        self.patch_size * self.merge_size
    }

    /// The `(height, width)` that an image of `height` x `width` is resized to: multiples of [`Self::factor`], as near to
    /// the image's size and proportions as the bounds allow. It is transformers' `smart_resize`, in f64 and with Python's
    /// rounding (half to even). Sides shorter than half a factor make the area 0, which is below any bound.
    /// `ARL_DATA` where the sides differ by a factor above 200.
    pub fn smart_resize(&self, height: u32, width: u32) -> Result<(u32, u32)> {
        let (h, w, factor) = (f64::from(height), f64::from(width), self.factor() as f64);
        // Not (ratio <= MAX): a side of 0 gives infinity or NaN.
        let ratio = h.max(w) / h.min(w);
        if ratio.is_nan() || ratio > MAX_RATIO {
            let message = format!(
                "the image has {width} x {height} pixels (width x height): one side is more than 200 times the other"
            );
            return Err(Error::new(ErrorCode::Data, message).hint("Crop or pad the image, or leave it out."));
        }
        let (mut to_h, mut to_w) = ((h / factor).round_ties_even() * factor, (w / factor).round_ties_even() * factor);
        // Whole numbers below 2^53 are exact in f64, so comparisons and products are Python's.
        let (min, max) = (self.min_pixels as f64, self.max_pixels as f64);
        if to_h * to_w > max {
            let beta = (h * w / max).sqrt();
            to_h = factor.max((h / beta / factor).floor() * factor);
            to_w = factor.max((w / beta / factor).floor() * factor);
        } else if to_h * to_w < min {
            let beta = (min / (h * w)).sqrt();
            to_h = (h * beta / factor).ceil() * factor;
            to_w = (w * beta / factor).ceil() * factor;
        }
        Ok((to_h as u32, to_w as u32))
    }

    /// The tokens of an image whose resized size is `height` x `width`.
    pub fn tokens(&self, height: u32, width: u32) -> usize {
        (height as usize / self.factor()) * (width as usize / self.factor())
    }

    /// Changes whenever pixels or token counts of an image do.
    pub fn fingerprint(&self) -> String {
        let bits = |values: &[f32; 3]| values.map(|value| format!("{:08x}", value.to_bits())).join(",");
        format!(
            // The number in front changes with the rules of this crate.
            "images 1: patch {} x {}, merge {}, pixels {}..{}, mean {}, std {}",
            self.patch_size,
            self.temporal_patch_size,
            self.merge_size,
            self.min_pixels,
            self.max_pixels,
            bits(&self.mean),
            bits(&self.std)
        )
    }
}
