//! Reads `preprocessor_config.json` in the spellings of all versions of transformers, and `processor_config.json`, in which
//! transformers 5 nests it. What would change pixels in a way that is not built is refused by name.

use std::path::{Path, PathBuf};

use arl_model::{Error, ErrorCode, Result, unreadable};
use serde_json::{Map, Value};

use super::ImageProcessor;
use crate::decode::MAX_PIXELS;

const FILE: &str = "preprocessor_config.json";
/// What transformers 5 writes; read first, as transformers does.
const NESTING_FILE: &str = "processor_config.json";
const NESTED: &str = "image_processor";

/// What the released models have, for keys that a file lacks. Their patch tells them apart.
struct Released {
    patch_size: usize,
    min_pixels: u64,
    max_pixels: u64,
    mean: [f32; 3],
    std: [f32; 3],
}

/// Qwen2.5-VL, with the mean and deviation of CLIP.
const QWEN2_5: Released = Released {
    patch_size: 14,
    min_pixels: 56 * 56,
    max_pixels: 12_845_056,
    mean: [0.481_454_66, 0.457_827_5, 0.408_210_73],
    std: [0.268_629_54, 0.261_302_6, 0.275_777_1],
};
/// Qwen3-VL, Qwen3.5 and later.
const QWEN3: Released =
    Released { patch_size: 16, min_pixels: 65_536, max_pixels: 16_777_216, mean: [0.5; 3], std: [0.5; 3] };

/// Keys that must be absent, null, or have this value, with what another one would do.
const FIXED: &[(&str, bool, &str)] = &[
    ("do_resize", true, "images would keep their size"),
    ("do_rescale", true, "values would stay between 0 and 255"),
    ("do_normalize", true, "values would not be normalised"),
    ("do_center_crop", false, "images would be cropped"),
    ("do_pad", false, "images would be padded"),
];

/// `PIL.Image.Resampling.BICUBIC`.
const BICUBIC: u64 = 3;

pub(super) fn read(dir: &Path) -> Result<ImageProcessor> {
    let nesting = dir.join(NESTING_FILE);
    if let Some(object) = object(&nesting)?
        && let Some(nested) = object.get(NESTED).filter(|value| !value.is_null())
    {
        let Value::Object(nested) = nested else {
            let message = format!("{}: `{NESTED}` is no JSON object", nesting.display());
            return Err(Error::new(ErrorCode::Config, message));
        };
        return Keys { map: nested, path: nesting, prefix: "image_processor." }.processor();
    }
    let path = dir.join(FILE);
    let Some(object) = object(&path)? else {
        let message = format!("{}: no {FILE}, which says how the model's images are prepared", dir.display());
        return Err(Error::new(ErrorCode::Config, message).hint("Copy it from the model that this one was made of."));
    };
    Keys { map: &object, path, prefix: "" }.processor()
}

/// The JSON object in a file; none where there is no file.
fn object(path: &Path) -> Result<Option<Map<String, Value>>> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io(path, &error)),
    };
    if let Some(placeholder) = unreadable(&bytes) {
        return Err(placeholder.error(ErrorCode::Config, path));
    }
    let error = |what: String| Error::new(ErrorCode::Config, format!("{}: {what}", path.display()));
    match serde_json::from_slice(&bytes) {
        Ok(Value::Object(object)) => Ok(Some(object)),
        Ok(_) => Err(error("must be a JSON object".to_owned())),
        Err(problem) => Err(error(format!("no JSON: {problem}"))),
    }
}

/// An object of settings, and where it is.
struct Keys<'a> {
    map: &'a Map<String, Value>,
    path: PathBuf,
    prefix: &'a str,
}

impl Keys<'_> {
    /// The value of `key`; null is the same as absent.
    fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn error(&self, key: &str, what: impl std::fmt::Display) -> Error {
        Error::new(ErrorCode::Config, format!("{}: `{}{key}` {what}", self.path.display(), self.prefix))
    }

    fn wrong(&self, key: &str, expected: &str, value: &Value) -> Error {
        self.error(key, format_args!("must be {expected}, but is {value}"))
            .hint(format!("Correct it in {}.", self.path.display()))
    }

    /// An integer from 1 to `max`; none where the key is absent.
    fn number(&self, key: &str, max: u64) -> Result<Option<u64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64().filter(|number| (1..=max).contains(number)) {
            Some(number) => Ok(Some(number)),
            None => Err(self.wrong(key, &format!("an integer from 1 to {max}"), value)),
        }
    }

    fn processor(&self) -> Result<ImageProcessor> {
        self.refuse()?;
        let patch_size = self.number("patch_size", 256)?.unwrap_or(QWEN2_5.patch_size as u64) as usize;
        let released = if patch_size == QWEN3.patch_size { QWEN3 } else { QWEN2_5 };
        let (min_pixels, max_pixels) = self.bounds(&released)?;
        Ok(ImageProcessor {
            patch_size,
            temporal_patch_size: self.number("temporal_patch_size", 16)?.unwrap_or(2) as usize,
            merge_size: self.number("merge_size", 16)?.unwrap_or(2) as usize,
            min_pixels,
            max_pixels,
            mean: self.channels("image_mean", false)?.unwrap_or(released.mean),
            std: self.channels("image_std", true)?.unwrap_or(released.std),
        })
    }

    /// Refuses what would make other pixels.
    fn refuse(&self) -> Result<()> {
        let not_built = |key: &str, value: &Value, effect: &str| {
            self.error(key, format_args!("is {value}: {effect}, which is not implemented"))
        };
        for (key, required, effect) in FIXED {
            match self.get(key) {
                None => {}
                Some(Value::Bool(value)) if value == required => {}
                Some(value @ Value::Bool(_)) => return Err(not_built(key, value, effect)),
                Some(value) => return Err(self.wrong(key, "true or false", value)),
            }
        }
        if let Some(value) = self.get("resample")
            && value.as_u64() != Some(BICUBIC)
        {
            return Err(not_built("resample", value, "images would be resized by another filter than bicubic (3)"));
        }
        if let Some(value) = self.get("rescale_factor")
            && !value.as_f64().is_some_and(|factor| (factor - 1.0 / 255.0).abs() < 1e-9)
        {
            return Err(not_built("rescale_factor", value, "values would not be from 0 to 1"));
        }
        if let Some(value) = self.get("image_processor_type")
            && !value.as_str().is_some_and(|name| name.starts_with("Qwen") && name.contains("ImageProcessor"))
        {
            return Err(not_built(
                "image_processor_type",
                value,
                "images would be prepared by other rules than Qwen's",
            ));
        }
        Ok(())
    }

    /// Least and greatest number of pixels. Keys at the top, of old files, count more than `size`, as in transformers.
    fn bounds(&self, released: &Released) -> Result<(u64, u64)> {
        let (mut min, mut max) = (None, None);
        if let Some(value) = self.get("size") {
            let Value::Object(map) = value else { return Err(self.wrong("size", "an object", value)) };
            let prefix = format!("{}size.", self.prefix);
            let size = Keys { map, path: self.path.clone(), prefix: &prefix };
            let spelled = |new: &str, old: &str| match size.number(new, MAX_PIXELS)? {
                Some(pixels) => Ok(pixels),
                None => size.number(old, MAX_PIXELS)?.ok_or_else(|| {
                    size.error(new, "is missing: the numbers of pixels between which images are resized")
                }),
            };
            (min, max) = (Some(spelled("shortest_edge", "min_pixels")?), Some(spelled("longest_edge", "max_pixels")?));
        }
        let min = self.number("min_pixels", MAX_PIXELS)?.or(min).unwrap_or(released.min_pixels);
        let max = self.number("max_pixels", MAX_PIXELS)?.or(max).unwrap_or(released.max_pixels);
        if min > max {
            let key = if self.get("min_pixels").is_some() { "min_pixels" } else { "size" };
            return Err(self.error(key, format_args!("asks for at least {min} and at most {max} pixels")));
        }
        Ok((min, max))
    }

    /// A number for each of red, green and blue, or one for all.
    fn channels(&self, key: &str, positive: bool) -> Result<Option<[f32; 3]>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let one = |value: &Value| {
            value.as_f64().map(|number| number as f32).filter(|n| n.is_finite() && !(positive && *n <= 0.0))
        };
        let all = match value {
            Value::Array(values) => match values.as_slice() {
                [red, green, blue] => [one(red), one(green), one(blue)],
                _ => [None; 3],
            },
            value => [one(value); 3],
        };
        match all {
            [Some(red), Some(green), Some(blue)] => Ok(Some([red, green, blue])),
            _ if positive => Err(self.wrong(key, "three numbers above 0, or one", value)),
            _ => Err(self.wrong(key, "three numbers, or one", value)),
        }
    }
}
