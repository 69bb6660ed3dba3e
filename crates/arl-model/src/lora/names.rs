//! Names of modules as PEFT sees them: those of the class that transformers loads a folder with. A model that sees has its decoder
//! in `model.language_model`; the same decoder loaded as a causal model of text has it in `model`.

use std::borrow::Cow;

use crate::config::{Family, ModelConfig};

const OUTER: &str = "model.";
const INNER: &str = "model.language_model.";
const TOWER: &str = "model.visual.";

/// Whether PEFT sees the decoder of this model in `model.language_model`.
fn is_nested(model: &ModelConfig) -> bool {
    // Of these families transformers has no causal model of text.
    let always = model.family == Family::Qwen2_5Vl || model.family.is_vl() && model.nested;
    model.vision.is_some() || always
}

/// What PEFT calls a module or a tensor, by its name in the table of tensors.
pub(super) fn peft_name<'a>(model: &ModelConfig, name: &'a str) -> Cow<'a, str> {
    match name.strip_prefix(OUTER).filter(|_| is_nested(model) && !name.starts_with(TOWER)) {
        Some(rest) => Cow::Owned(format!("{INNER}{rest}")),
        None => Cow::Borrowed(name),
    }
}

/// The name in an adapter's file that was trained on the same decoder in the other of the two classes.
pub(super) fn of_other_class(prefix: &str, stored: &str) -> Option<String> {
    let name = stored.strip_prefix(prefix)?;
    match (name.strip_prefix(INNER), name.strip_prefix(OUTER)) {
        (Some(rest), _) => Some(format!("{prefix}{OUTER}{rest}")),
        (None, Some(rest)) if !name.starts_with(TOWER) => Some(format!("{prefix}{INNER}{rest}")),
        _ => None,
    }
}
