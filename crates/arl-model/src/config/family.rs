//! The supported families by `model_type`, and why others are refused. A model that sees nests its text part under
//! `text_config`, or has it flat next to `vision_config`; the keys around it are read here.

use std::fmt;

use serde_json::{Map, Value};

use super::RopeAxes;
use super::keys::Keys;
use crate::Result;

/// The supported families.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// Qwen2 and Qwen2.5.
    Qwen2,
    /// Qwen3, dense.
    Qwen3,
    /// Qwen3 with a mixture of experts.
    Qwen3Moe,
    /// Qwen3-Next: delta rule and gated attention, with a mixture of experts.
    Qwen3Next,
    /// Qwen3.5, 3.6 and 3.8, dense.
    Qwen3_5,
    /// Qwen3.5, 3.6 and 3.8 with a mixture of experts.
    Qwen3_5Moe,
    /// Qwen2.5-VL: Qwen2's decoder.
    Qwen2_5Vl,
    /// Qwen3-VL, dense: Qwen3's decoder.
    Qwen3Vl,
    /// Qwen3-VL with a mixture of experts: Qwen3-MoE's decoder.
    Qwen3VlMoe,
}

impl Family {
    /// Every family.
    pub const ALL: [Family; 9] = [
        Family::Qwen2,
        Family::Qwen3,
        Family::Qwen3Moe,
        Family::Qwen3Next,
        Family::Qwen3_5,
        Family::Qwen3_5Moe,
        Family::Qwen2_5Vl,
        Family::Qwen3Vl,
        Family::Qwen3VlMoe,
    ];

    /// The family's `model_type`; that of the whole model where its text part has another one.
    pub fn as_str(self) -> &'static str {
        match self {
            Family::Qwen2 => "qwen2",
            Family::Qwen3 => "qwen3",
            Family::Qwen3Moe => "qwen3_moe",
            Family::Qwen3Next => "qwen3_next",
            Family::Qwen3_5 => "qwen3_5",
            Family::Qwen3_5Moe => "qwen3_5_moe",
            Family::Qwen2_5Vl => "qwen2_5_vl",
            Family::Qwen3Vl => "qwen3_vl",
            Family::Qwen3VlMoe => "qwen3_vl_moe",
        }
    }

    /// The `model_type` of a folder with text alone.
    fn text_type(self) -> &'static str {
        match self {
            Family::Qwen3_5 => "qwen3_5_text",
            Family::Qwen3_5Moe => "qwen3_5_moe_text",
            Family::Qwen2_5Vl => "qwen2_5_vl_text",
            Family::Qwen3Vl => "qwen3_vl_text",
            Family::Qwen3VlMoe => "qwen3_vl_moe_text",
            _ => self.as_str(),
        }
    }

    /// Whether its decoder is that of Qwen2: biases on queries, keys and values, and no norms on them.
    pub(super) fn has_qwen2_decoder(self) -> bool {
        matches!(self, Family::Qwen2 | Family::Qwen2_5Vl)
    }

    /// Whether its decoder is a decoder of images alone, for which transformers has no causal model of text.
    pub fn is_vl(self) -> bool {
        matches!(self, Family::Qwen2_5Vl | Family::Qwen3Vl | Family::Qwen3VlMoe)
    }

    /// Which axis turns each frequency where no key says it; none: the family has no images.
    pub(super) fn axes(self) -> Option<RopeAxes> {
        let (sections, interleaved) = match self {
            Family::Qwen2_5Vl => ([16, 24, 24], false),
            Family::Qwen3Vl | Family::Qwen3VlMoe => ([24, 20, 20], true),
            Family::Qwen3_5 | Family::Qwen3_5Moe => ([11, 11, 10], true),
            Family::Qwen2 | Family::Qwen3 | Family::Qwen3Moe | Family::Qwen3Next => return None,
        };
        Some(RopeAxes { sections, interleaved })
    }

    /// Whether layers have experts, unless their configuration says otherwise.
    pub(super) fn has_experts(self) -> bool {
        matches!(self, Family::Qwen3Moe | Family::Qwen3Next | Family::Qwen3_5Moe | Family::Qwen3VlMoe)
    }

    /// Whether most layers follow the delta rule in place of attention.
    pub fn is_hybrid(self) -> bool {
        matches!(self, Family::Qwen3Next | Family::Qwen3_5 | Family::Qwen3_5Moe)
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Where a file has the keys of the text part.
pub(super) enum Layout<'a> {
    /// There is nothing else.
    Text,
    /// Next to those of the vision tower.
    Flat,
    /// Under `text_config`.
    Nested(&'a Map<String, Value>),
}

const SUPPORTED: &str = "supported are qwen2 (Qwen2, Qwen2.5), qwen3, qwen3_moe, qwen3_next, qwen3_5 and qwen3_5_moe (Qwen3.5, 3.6, \
                         3.8), qwen2_5_vl, qwen3_vl and qwen3_vl_moe";

/// Families that are known and not built, and why.
const NOT_BUILT: &[(&str, &str)] = &[
    (
        "qwen4_exp",
        "Qwen4-Exp (Qwen3.8-Flash-Next) has hyper-connections, sparse attention by an indexer and n-gram embeddings",
    ),
    ("qwen2_moe", "Qwen1.5-MoE and Qwen2-MoE combine biases of attention with a shared expert"),
    ("qwen2_vl", "the vision tower of Qwen2-VL combines LayerNorms with QuickGELU; Qwen2.5-VL is its successor"),
];

/// The family, and where the keys of its text part are.
pub(super) fn family<'a>(keys: &mut Keys<'a>) -> Result<(Family, Layout<'a>)> {
    let name = match keys.get("model_type") {
        None => return Err(keys.error("model_type", "is missing").hint(SUPPORTED)),
        Some(Value::String(name)) => name,
        Some(value) => return Err(keys.wrong("model_type", "a string", value).hint(SUPPORTED)),
    };
    if let Some(family) = Family::ALL.into_iter().find(|family| family.text_type() == name) {
        return Ok((family, Layout::Text));
    }
    let Some(family) = Family::ALL.into_iter().find(|family| family.as_str() == name) else {
        let reason = NOT_BUILT.iter().find(|(known, _)| known == name);
        let reason = reason.map_or(String::new(), |(_, reason)| format!(": {reason}"));
        return Err(keys.error("model_type", format_args!("`{name}` is not supported{reason}")).hint(SUPPORTED));
    };
    match keys.get_non_null("text_config") {
        Some(Value::Object(text)) => Ok((family, Layout::Nested(text))),
        Some(value) => Err(keys.wrong("text_config", "an object", value)),
        None if family == Family::Qwen2_5Vl => Ok((family, Layout::Flat)),
        None => Err(keys
            .error("text_config", format_args!("is missing, which {family} has"))
            .hint(format!("a folder with text alone has the model_type {}", family.text_type()))),
    }
}

/// Keys of a model that sees which say nothing about its text part. Some are read with the tower.
const AROUND_TEXT: &[&str] = &[
    "vision_config",
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "vision_token_id",
    "language_model_only",
];

/// Marks the keys around a text part as known.
pub(super) fn check_around(keys: &mut Keys<'_>) {
    for key in AROUND_TEXT {
        keys.get(key);
    }
}

/// Marks as known what transformers 4 repeats around a nested text part: the keys with the same values.
pub(super) fn check_repeated(outer: &mut Keys<'_>, text: &Map<String, Value>) {
    for (key, value) in text {
        outer.get_equal(key, value);
    }
}

/// Marks the keys of images that transformers 4 writes into a nested text part as known.
pub(super) fn check_within(inner: &mut Keys<'_>) {
    for key in AROUND_TEXT.iter().filter(|key| key.ends_with("_token_id")) {
        inner.get(key);
    }
}
