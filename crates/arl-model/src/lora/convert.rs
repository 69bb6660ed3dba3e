//! The layers of a mixture of experts by the names that they had as modules of their own: PEFT makes parameters of them, as
//! transformers 5 has them, and so does this. `gate_proj` and `up_proj` share one adapter there, of twice the rank and alpha.

use super::targets::{ends_with, regex};
use super::{LoraConfig, ModuleNames, last, refused};
use crate::Result;
use crate::config::{Family, Mlp, ModelConfig};
use crate::tensors::tensor_table;

/// Names of modules, and of the parameters that they are now.
const PARAMETERS: [(&str, &str); 4] =
    [("gate", "gate.weight"), ("gate_proj", "gate_up_proj"), ("up_proj", "gate_up_proj"), ("down_proj", "down_proj")];

/// The configuration as PEFT converts it for a model (`transformers_weight_conversion.py`).
pub(super) fn converted(model: &ModelConfig, config: &LoraConfig) -> Result<LoraConfig> {
    let mut config = config.clone();
    // Of Qwen3-Next all-linear takes fused projections too, which are refused.
    let all = matches!(config.target_modules, Some(ModuleNames::AllLinear));
    if !matches!(model.family, Family::Qwen3Moe | Family::Qwen3Next) || all && model.family == Family::Qwen3Next {
        return Ok(config);
    }
    let names = match &config.target_modules {
        None => return Ok(config),
        Some(ModuleNames::List(list)) => list.clone(),
        Some(ModuleNames::AllLinear) => {
            let linear = ["q_proj", "k_proj", "v_proj", "o_proj"].into_iter();
            linear.chain(PARAMETERS.map(|(module, _)| module)).map(str::to_owned).collect()
        }
        Some(ModuleNames::Pattern(pattern)) => matched(model, pattern)?,
    };
    let parameter_of = |name: &String| PARAMETERS.iter().find(|(module, _)| ends_with(name, module));
    let (moved, rest): (Vec<String>, Vec<String>) = names.into_iter().partition(|name| parameter_of(name).is_some());
    if moved.is_empty() {
        // A pattern stays one.
        return Ok(config);
    }
    let has = |module: &str| moved.iter().any(|name| parameter_of(name).is_some_and(|found| found.0 == module));
    match (has("gate_proj"), has("up_proj")) {
        (true, true) => {
            let key = r".*\.gate_up_proj".to_owned();
            config.rank_pattern.retain(|(other, _)| *other != key);
            config.alpha_pattern.retain(|(other, _)| *other != key);
            config.rank_pattern.push((key.clone(), 2 * config.r));
            config.alpha_pattern.push((key, 2.0 * config.lora_alpha));
        }
        (false, false) => {}
        (gate, _) => {
            let (given, missing) = if gate { ("gate_proj", "up_proj") } else { ("up_proj", "gate_proj") };
            let what =
                format!("lora_target_modules: `{given}` of experts has an adapter together with `{missing}` alone");
            return Err(refused(what, "name both: gate_proj up_proj"));
        }
    }
    for (module, parameter) in PARAMETERS {
        if has(module) && !config.target_parameters.iter().any(|known| known == parameter) {
            config.target_parameters.push(parameter.to_owned());
        }
    }
    config.target_modules = Some(ModuleNames::List(rest));
    Ok(config)
}

/// The last parts of the names that a pattern matches, those of experts by their old names and as parameters.
fn matched(model: &ModelConfig, pattern: &str) -> Result<Vec<String>> {
    let regex = regex("lora_target_modules", pattern, &format!("^(?:{pattern})$"))?;
    let mut names: Vec<String> = Vec::new();
    let mut add = |name: &str| {
        if regex.is_match(name).unwrap_or(false) && !names.iter().any(|known| known == last(name)) {
            names.push(last(name).to_owned());
        }
    };
    for (layer, shape) in model.layers.iter().enumerate() {
        if matches!(shape.mlp, Mlp::Moe(_)) {
            let experts = format!("model.layers.{layer}.mlp.experts");
            ["gate_proj", "up_proj", "down_proj"].iter().for_each(|name| add(&format!("{experts}.{name}")));
        }
    }
    // Experts of their own are no modules any more.
    let outside = |name: &&str| !name.contains(".mlp.experts.");
    let table = tensor_table(model);
    table.iter().filter_map(|spec| spec.name.strip_suffix(".weight")).filter(outside).for_each(add);
    Ok(names)
}
