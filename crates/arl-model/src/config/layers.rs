//! What differs between layers: attention windows, and which have experts.

use serde_json::Value;

use super::keys::{self, Keys};
use super::{DeltaConfig, Family, LayerConfig, MAX_EXPERTS, MAX_LAYERS, MAX_WIDTH, Mixer, Mlp, MoeConfig, mixer};
use crate::Result;

pub(super) fn moe(keys: &mut Keys<'_>, family: Family) -> Result<MoeConfig> {
    let [experts, chosen, width] = match family {
        Family::Qwen3Next => [512, 10, 512],
        Family::Qwen3_5Moe => [256, 8, 512],
        Family::Qwen3VlMoe => [60, 4, 1408],
        _ => [128, 8, 768],
    };
    let local = keys.optional_size("num_local_experts", 1, MAX_EXPERTS)?;
    let plain = keys.optional_size("num_experts", 1, MAX_EXPERTS)?;
    let num_experts = match (local, plain) {
        (Some(local), Some(plain)) if local != plain => {
            return Err(keys.error("num_experts", format_args!("({plain}) and `num_local_experts` ({local}) differ")));
        }
        (Some(number), _) | (None, Some(number)) => number,
        (None, None) => experts,
    };
    let num_experts_per_tok = keys.size("num_experts_per_tok", chosen, 1, MAX_EXPERTS)?;
    if num_experts_per_tok > num_experts {
        return Err(keys.error(
            "num_experts_per_tok",
            format_args!("({num_experts_per_tok}) is more than the number of experts ({num_experts})"),
        ));
    }
    let coefficient = keys.number("router_aux_loss_coef", 0.001)?;
    let balanced = keys.flag("output_router_logits", false)? && coefficient != 0.0;
    let shared_expert_intermediate_size = match family.is_hybrid() {
        true => Some(keys.size("shared_expert_intermediate_size", 512, 1, MAX_WIDTH)?),
        false => None,
    };
    // Qwen3.5's router always normalises, and Qwen3-VL's, whose released files have the key.
    let norm_topk_prob = match family {
        Family::Qwen3_5Moe => true,
        Family::Qwen3VlMoe => {
            keys.get("norm_topk_prob");
            true
        }
        _ => keys.flag("norm_topk_prob", family == Family::Qwen3Next)?,
    };
    Ok(MoeConfig {
        num_experts,
        num_experts_per_tok,
        router_aux_loss_coef: balanced.then_some(coefficient as f32),
        moe_intermediate_size: keys.size("moe_intermediate_size", width, 1, MAX_WIDTH)?,
        norm_topk_prob,
        shared_expert_intermediate_size,
    })
}

pub(super) fn layers(
    keys: &mut Keys<'_>,
    family: Family,
    count: usize,
    intermediate: usize,
    moe: Option<MoeConfig>,
    delta: Option<DeltaConfig>,
) -> Result<Vec<LayerConfig>> {
    let mixers = match delta {
        Some(delta) => mixer::hybrid(keys, count, delta)?,
        None => windows(keys, family, count)?.into_iter().map(|window| Mixer::Attention { window }).collect(),
    };
    let dense = Mlp::Dense { intermediate };
    let all = |mlp| -> Vec<LayerConfig> { mixers.iter().map(|&mixer| LayerConfig { mixer, mlp }).collect() };
    let Some(moe) = moe else { return Ok(all(dense)) };
    if family == Family::Qwen3_5Moe {
        return Ok(all(Mlp::Moe(moe)));
    }
    let step = keys.size("decoder_sparse_step", 1, 1, MAX_LAYERS)?;
    let mut mlp_only = vec![false; count];
    for value in keys.optional_list("mlp_only_layers")?.unwrap_or_default() {
        let layer = value.as_u64().and_then(|layer| usize::try_from(layer).ok());
        match layer.and_then(|layer| mlp_only.get_mut(layer)) {
            Some(flag) => *flag = true,
            None => {
                let expected = format!("a list of layers from 0 to {}", count - 1);
                return Err(keys.error("mlp_only_layers", format_args!("must be {expected}, but holds {value}")));
            }
        }
    }
    let layer = |(index, mixer): (usize, Mixer)| {
        let sparse = !mlp_only[index] && (index + 1) % step == 0;
        LayerConfig { mixer, mlp: if sparse { Mlp::Moe(moe) } else { dense } }
    };
    Ok(mixers.into_iter().enumerate().map(layer).collect())
}

/// The sliding window of each layer. Qwen3-MoE has one for all layers or none; the dense families choose by
/// `layer_types`, or else by `max_window_layers`.
fn windows(keys: &mut Keys<'_>, family: Family, count: usize) -> Result<Vec<Option<usize>>> {
    const MAX_WINDOW: usize = 1 << 31;
    let used = keys.flag("use_sliding_window", false)?;
    if used && matches!(family, Family::Qwen3Vl | Family::Qwen3VlMoe) {
        return Err(keys.error("use_sliding_window", format_args!("is true, but layers of {family} have no window")));
    }
    let window = match keys.get("sliding_window") {
        None => Some(4096),
        Some(Value::Null) => None,
        // Some files have 0 where windows are off.
        Some(_) => Some(keys.size("sliding_window", 0, usize::from(used), MAX_WINDOW)?),
    };
    let window = if used { window } else { None };
    let types = keys.optional_list("layer_types")?;
    if let Some(types) = types
        && types.len() != count
    {
        return Err(
            keys.error("layer_types", format_args!("has {} entries, but `num_hidden_layers` is {count}", types.len()))
        );
    }
    let mut listed = Vec::new();
    for value in types.unwrap_or_default() {
        match value.as_str() {
            Some("full_attention" | "attention") => listed.push(None),
            Some("sliding_attention") if window.is_some() => listed.push(window),
            Some("sliding_attention") => {
                return Err(keys
                    .error("layer_types", "lists `sliding_attention`, but there is no window")
                    .hint("set `use_sliding_window` to true and `sliding_window` to its length"));
            }
            _ => {
                return Err(keys
                    .error("layer_types", format_args!("holds {}, which is not supported", keys::shown(value)))
                    .hint("supported are full_attention and sliding_attention"));
            }
        }
    }
    if matches!(family, Family::Qwen3Moe | Family::Qwen3VlMoe) {
        if types.is_some() && listed.iter().any(|&listed| listed != window) {
            return Err(keys
                .error(
                    "layer_types",
                    format_args!("disagrees with `use_sliding_window`: {family} has one window for all layers"),
                )
                .hint("remove `layer_types`"));
        }
        return Ok(vec![window; count]);
    }
    let most = if family == Family::Qwen2_5Vl { 80 } else { 28 };
    let full_layers = keys.size("max_window_layers", most, 0, usize::MAX)?;
    if types.is_some() {
        return Ok(listed);
    }
    Ok((0..count).map(|layer| window.filter(|_| layer >= full_layers)).collect())
}
