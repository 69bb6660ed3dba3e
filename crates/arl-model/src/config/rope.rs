//! The rotary embedding's part of `config.json`: `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`
//! (transformers 4), read into one form. The arithmetic is in `crate::rope`.

use serde_json::{Map, Value};

use super::RopeAxes;
use super::axes;
use super::keys::{Keys, shown};
use crate::{Result, error::Error};

/// How frequencies depend on the position and on the sequence's length.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// Base of the wavelengths.
    pub theta: f64,
    /// Which scaling, with its parameters.
    pub scaling: RopeScaling,
    /// Elements of a head, from the first on, that are rotated; even.
    pub rotary_dim: usize,
    /// How positions of three axes share the frequencies; `None`: positions have one axis.
    pub axes: Option<RopeAxes>,
}

/// The kinds of rope scaling, named as in `rope_type`.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// No scaling.
    Default,
    /// All frequencies divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// NTK scaling: beyond `max_position_embeddings` the base grows with the sequence's length.
    Dynamic {
        /// How strongly the base grows.
        factor: f64,
    },
    /// YaRN: high frequencies kept, low ones divided by `factor`, a ramp between.
    Yarn {
        /// The divisor of low frequencies.
        factor: f64,
        /// Length of the sequences in pre-training.
        original_max_position_embeddings: usize,
        /// Factor on cosine and sine.
        attention_factor: f64,
        /// Rotations above which a frequency is kept.
        beta_fast: f64,
        /// Rotations below which a frequency is divided.
        beta_slow: f64,
        /// Whether the ramp's ends are rounded to whole dimensions.
        truncate: bool,
    },
    /// Llama 3.1's: as YaRN, with bounds on wavelengths.
    Llama3 {
        /// The divisor of low frequencies.
        factor: f64,
        /// Wavelengths above `original_max_position_embeddings / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_position_embeddings / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Length of the sequences in pre-training.
        original_max_position_embeddings: usize,
    },
    /// LongRoPE: one divisor per frequency, one set for short and one for long sequences.
    LongRope {
        /// `[head_dim / 2]`, for sequences up to `original_max_position_embeddings`.
        short_factor: Vec<f64>,
        /// `[head_dim / 2]`, for longer ones.
        long_factor: Vec<f64>,
        /// Length of the sequences in pre-training.
        original_max_position_embeddings: usize,
        /// Factor on cosine and sine.
        attention_factor: f64,
    },
}

/// Largest length that is accepted.
const MAX_LENGTH: usize = 1 << 31;

/// What matters here of the rest of the configuration.
pub(super) struct Around {
    pub(super) head_dim: usize,
    pub(super) max_position_embeddings: usize,
    /// Whether heads may be rotated in part: of a hybrid family, by default a quarter.
    pub(super) hybrid: bool,
    /// `rope_theta` where no key gives it.
    pub(super) default_theta: f64,
    /// The axes of positions where no key gives them; `None`: the family has no images.
    pub(super) axes: Option<RopeAxes>,
}

/// Reads every key that concerns the rotary embedding. Names of keys that nothing reads are added to `unknown`. The axes are those
/// of a model that sees.
pub(super) fn read(keys: &mut Keys<'_>, around: &Around, unknown: &mut Vec<String>) -> Result<RopeConfig> {
    let old = object(keys, "rope_scaling")?.filter(|map| !map.is_empty());
    let new = object(keys, "rope_parameters")?;
    if let (Some(old), Some(new)) = (old, new)
        && old != new
    {
        return Err(keys
            .error("rope_scaling", "and `rope_parameters` are both given and differ")
            .hint("keep `rope_parameters` and remove `rope_scaling`"));
    }
    let outer_theta = theta(keys, "rope_theta")?;
    let outer_original = keys.optional_size("original_max_position_embeddings", 1, MAX_LENGTH)?;
    let outer_part = part(keys, around)?;

    let empty = Map::new();
    let (name, map) = match (new, old) {
        (None, Some(map)) => ("rope_scaling", map),
        (Some(map), _) => ("rope_parameters", map),
        (None, None) => ("rope_parameters", &empty),
    };
    for kind in ["full_attention", "sliding_attention"] {
        if map.contains_key(kind) {
            return Err(keys
                .error(name, format_args!("gives parameters per kind of layer (`{kind}`), which is not supported"))
                .hint("give one set of parameters for all layers"));
        }
    }
    let mut inner = Keys::new(map, keys.path(), format!("{name}."));
    let inner_theta = theta(&mut inner, "rope_theta")?;
    let part = part(&mut inner, around)?.or(outer_part).unwrap_or(if around.hybrid { 0.25 } else { 1.0 });
    let rotary_dim = (around.head_dim as f64 * part) as usize;
    if rotary_dim < 2 || !rotary_dim.is_multiple_of(2) {
        let what = format_args!(
            "is {part}; of `head_dim` ({}) this rotates {rotary_dim} elements, which must be even",
            around.head_dim
        );
        return Err(inner.error("partial_rotary_factor", what));
    }
    let axes = axes::read(&mut inner, around.axes, around.hybrid)?;
    let theta = inner_theta.or(outer_theta).unwrap_or(around.default_theta);

    // Old files call positions of three axes a type, which is no scaling.
    let [new, old] = [inner.optional_text("rope_type")?, inner.optional_text("type")?]
        .map(|name| name.map(|name| if around.axes.is_some() && name == "mrope" { "default" } else { name }));
    let rope_type = match (new, old) {
        (Some(new), Some(old)) if new != old => {
            return Err(inner.error("rope_type", format_args!("({new}) and `type` ({old}) differ")));
        }
        (Some(kind), _) | (None, Some(kind)) => kind,
        (None, None) => "default",
    };
    let around = Around { head_dim: rotary_dim, ..*around };
    let scaling = scaling(&mut inner, rope_type, theta, &around, outer_original)?;
    unknown.extend(inner.not_asked());
    if !matches!(scaling, RopeScaling::Yarn { .. } | RopeScaling::Llama3 { .. } | RopeScaling::LongRope { .. })
        && outer_original.is_some()
    {
        unknown.push("original_max_position_embeddings".to_owned());
    }
    Ok(RopeConfig { theta, scaling, rotary_dim, axes })
}

fn scaling(
    keys: &mut Keys<'_>,
    rope_type: &str,
    theta: f64,
    around: &Around,
    outer_original: Option<usize>,
) -> Result<RopeScaling> {
    // The outer key wins over the inner one, and the inner one over the model's own length, as in transformers.
    let original = |keys: &mut Keys<'_>| -> Result<usize> {
        let inner = keys.optional_size("original_max_position_embeddings", 1, MAX_LENGTH)?;
        Ok(outer_original.or(inner).unwrap_or(around.max_position_embeddings))
    };
    Ok(match rope_type {
        "default" => RopeScaling::Default,
        "linear" => RopeScaling::Linear { factor: factor(keys)? },
        "dynamic" => {
            if around.head_dim <= 2 {
                return Err(keys.error("rope_type", "`dynamic` needs a `head_dim` above 2"));
            }
            RopeScaling::Dynamic { factor: factor(keys)? }
        }
        "yarn" => yarn(keys, theta, around, original)?,
        "llama3" => llama3(keys, original)?,
        "longrope" => longrope(keys, around, original)?,
        other => {
            return Err(keys
                .error("rope_type", format_args!("`{other}` is not supported"))
                .hint("supported are default, linear, dynamic, yarn, llama3 and longrope"));
        }
    })
}

fn yarn(
    keys: &mut Keys<'_>,
    theta: f64,
    around: &Around,
    original: impl Fn(&mut Keys<'_>) -> Result<usize>,
) -> Result<RopeScaling> {
    if theta <= 1.0 {
        return Err(keys.error("rope_theta", "must be above 1 for `yarn`"));
    }
    let original_max_position_embeddings = original(keys)?;
    if keys.get("factor").is_none() {
        return Err(missing(keys, "factor", "yarn"));
    }
    let factor = match keys.optional_number("factor")? {
        Some(_) => factor(keys)?,
        None => around.max_position_embeddings as f64 / original_max_position_embeddings as f64,
    };
    let given = attention_factor(keys)?;
    // Zero counts as absent here, as in transformers.
    let mscale = keys.optional_number("mscale")?.filter(|&value| value != 0.0);
    let mscale_all_dim = keys.optional_number("mscale_all_dim")?.filter(|&value| value != 0.0);
    let attention_factor = given.unwrap_or_else(|| match (mscale, mscale_all_dim) {
        (Some(above), Some(below)) => yarn_mscale(factor, above) / yarn_mscale(factor, below),
        _ => yarn_mscale(factor, 1.0),
    });
    if !attention_factor.is_finite() {
        return Err(keys.error("mscale_all_dim", "makes the attention factor infinite"));
    }
    let beta_fast = positive(keys, "beta_fast")?.unwrap_or(32.0);
    let beta_slow = positive(keys, "beta_slow")?.unwrap_or(1.0);
    if beta_fast < beta_slow {
        return Err(keys.error("beta_fast", format_args!("({beta_fast}) must not be below `beta_slow` ({beta_slow})")));
    }
    let truncate = match keys.get("truncate") {
        Some(Value::Null) => false,
        _ => keys.flag("truncate", true)?,
    };
    Ok(RopeScaling::Yarn { factor, original_max_position_embeddings, attention_factor, beta_fast, beta_slow, truncate })
}

/// YaRN's factor on cosine and sine for a scaling by `factor` (its paper, section 3.4).
fn yarn_mscale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

fn llama3(keys: &mut Keys<'_>, original: impl Fn(&mut Keys<'_>) -> Result<usize>) -> Result<RopeScaling> {
    let factor = factor(keys)?;
    let low_freq_factor = required_positive(keys, "low_freq_factor", "llama3")?;
    let high_freq_factor = required_positive(keys, "high_freq_factor", "llama3")?;
    if high_freq_factor <= low_freq_factor {
        return Err(keys.error(
            "high_freq_factor",
            format_args!("({high_freq_factor}) must be above `low_freq_factor` ({low_freq_factor})"),
        ));
    }
    let original_max_position_embeddings = original(keys)?;
    Ok(RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings })
}

fn longrope(
    keys: &mut Keys<'_>,
    around: &Around,
    original: impl Fn(&mut Keys<'_>) -> Result<usize>,
) -> Result<RopeScaling> {
    let mut factors = |key: &str| -> Result<Vec<f64>> {
        let list = keys.optional_numbers(key, around.head_dim / 2)?.ok_or_else(|| missing(keys, key, "longrope"))?;
        match list.iter().find(|&&value| value <= 0.0) {
            None => Ok(list),
            Some(value) => Err(keys.error(key, format_args!("must hold positive numbers, but holds {value}"))),
        }
    };
    let short_factor = factors("short_factor")?;
    let long_factor = factors("long_factor")?;
    let original_max_position_embeddings = original(keys)?;
    let length = original_max_position_embeddings as f64;
    let factor = match keys.optional_number("factor")? {
        Some(_) => factor(keys)?,
        None => around.max_position_embeddings as f64 / length,
    };
    let attention_factor = match attention_factor(keys)? {
        Some(given) => given,
        None if factor <= 1.0 => 1.0,
        None if original_max_position_embeddings == 1 => {
            return Err(keys.error("original_max_position_embeddings", "must be above 1 for `longrope`"));
        }
        None => (1.0 + factor.ln() / length.ln()).sqrt(),
    };
    Ok(RopeScaling::LongRope { short_factor, long_factor, original_max_position_embeddings, attention_factor })
}

fn object<'a>(keys: &mut Keys<'a>, key: &str) -> Result<Option<&'a Map<String, Value>>> {
    match keys.get_non_null(key) {
        None => Ok(None),
        Some(Value::Object(map)) => Ok(Some(map)),
        Some(value) => Err(keys.wrong(key, "an object", value)),
    }
}

fn theta(keys: &mut Keys<'_>, key: &str) -> Result<Option<f64>> {
    match keys.get(key) {
        None => Ok(None),
        Some(value) => match value.as_f64() {
            Some(number) if number > 0.0 && (number as f32).is_finite() => Ok(Some(number)),
            _ => Err(keys.wrong(key, "a positive number", value)),
        },
    }
}

/// The part of a head that is rotated.
fn part(keys: &mut Keys<'_>, around: &Around) -> Result<Option<f64>> {
    match keys.optional_number("partial_rotary_factor")? {
        Some(part) if part != 1.0 && !around.hybrid => {
            Err(keys.error("partial_rotary_factor", format_args!("is {part}; only 1 (the whole head) is supported")))
        }
        Some(part) if !(part > 0.0 && part <= 1.0) => {
            Err(keys.error("partial_rotary_factor", format_args!("must be above 0 and at most 1, but is {part}")))
        }
        part => Ok(part),
    }
}

fn factor(keys: &mut Keys<'_>) -> Result<f64> {
    required_positive(keys, "factor", "this rope_type")
}

fn required_positive(keys: &mut Keys<'_>, key: &str, rope_type: &str) -> Result<f64> {
    match keys.get_non_null(key) {
        None => Err(missing(keys, key, rope_type)),
        Some(value) => match value.as_f64() {
            Some(number) if number > 0.0 && (number as f32).is_finite() => Ok(number),
            _ => Err(keys.wrong(key, "a positive number", value)),
        },
    }
}

/// A positive number; absent, null and zero are none.
fn positive(keys: &mut Keys<'_>, key: &str) -> Result<Option<f64>> {
    match keys.optional_number(key)? {
        None => Ok(None),
        Some(0.0) => Ok(None),
        Some(number) if number > 0.0 => Ok(Some(number)),
        Some(number) => Err(keys.error(key, format_args!("must be a positive number, but is {number}"))),
    }
}

fn attention_factor(keys: &mut Keys<'_>) -> Result<Option<f64>> {
    match keys.get_non_null("attention_factor") {
        None => Ok(None),
        Some(value) => match value.as_f64() {
            Some(number) if number > 0.0 && (number as f32).is_finite() => Ok(Some(number)),
            _ => {
                Err(keys.error("attention_factor", format_args!("must be a positive number, but is {}", shown(value))))
            }
        },
    }
}

fn missing(keys: &Keys<'_>, key: &str, rope_type: &str) -> Error {
    keys.error(key, format_args!("is missing, and {rope_type} needs it"))
}
