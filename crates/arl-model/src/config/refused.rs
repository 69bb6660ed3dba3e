//! Keys that change what a model computes in a way that is not implemented (refused unless they have the value that
//! changes nothing), and keys that never change it (accepted silently).

use serde_json::Value;

use super::keys::{Keys, shown};
use super::{Family, quantization};
use crate::Result;

/// Keys that must be absent, null, or a value that means "off", with what they would do.
const OFF: &[(&str, &str)] = &[
    ("text_config", "the model is multimodal, with its text part nested"),
    ("vision_config", "the model sees images"),
    ("audio_config", "the model hears sound"),
    ("per_layer_config", "layers would have configurations of their own"),
    ("is_encoder_decoder", "the model would have an encoder"),
    ("add_cross_attention", "layers would attend to an encoder"),
    ("pruned_heads", "heads would be removed"),
    ("use_mrope", "positions would have three axes"),
    ("mlp_bias", "the MLP would have biases"),
    ("use_bidirectional_attention", "attention would not be causal"),
    ("attention_chunk_size", "attention would be cut in chunks"),
    ("router_jitter_noise", "the router would add noise"),
    ("shared_expert_intermediate_size", "a layer would have a shared expert"),
    ("num_shared_experts", "a layer would have shared experts"),
    ("n_shared_experts", "a layer would have shared experts"),
    ("resid_pdrop", "training would drop activations"),
    ("embd_pdrop", "training would drop activations"),
    ("hidden_dropout", "training would drop activations"),
];

/// Keys without influence on logits, loss or gradients of these families.
const WITHOUT_EFFECT: &[&str] = &[
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_commit_hash",
    "_name_or_path",
    "architectures",
    "attn_implementation",
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "chunk_size_feed_forward",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "eos_token_id",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "id2label",
    "is_decoder",
    "label2id",
    "length_penalty",
    "max_length",
    "max_window_layers",
    "min_length",
    "name_or_path",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_labels",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "prefix",
    "problem_type",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict",
    "return_dict_in_generate",
    "sep_token_id",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torchscript",
    "transformers_version",
    "typical_p",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
    "use_cache",
];

/// Keys of released hybrid models that transformers does not read either: the type of a cache, heads that predict more than
/// one token (which are carried), and layers without experts where all have them.
const WITHOUT_EFFECT_ON_HYBRIDS: &[&str] = &[
    "mamba_ssm_dtype",
    "mlp_only_layers",
    "mtp_num_hidden_layers",
    "mtp_use_dedicated_embeddings",
    "output_gate_type",
];

/// Refuses what is not implemented and marks both kinds of keys as known. `sees`: the tower's keys are next to these.
pub(super) fn check(keys: &mut Keys<'_>, family: Family, sees: bool) -> Result<()> {
    let shared = family.is_hybrid() && family.has_experts();
    let own = |key: &str| match key {
        "shared_expert_intermediate_size" => shared,
        "text_config" | "vision_config" => sees,
        _ => false,
    };
    for &(key, meaning) in OFF.iter().filter(|(key, _)| !own(key)) {
        if let Some(value) = keys.get(key)
            && !is_off(value)
        {
            return Err(keys
                .error(key, format_args!("is {}: {meaning}, which is not supported for {family}", shown(value)))
                .hint("use a plain, unquantized text model of a supported family, or remove the key if it is wrong"));
        }
    }
    if family.is_hybrid() {
        if !keys.flag("attn_output_gate", true)? {
            return Err(keys.error("attn_output_gate", "is false; transformers always computes the gate"));
        }
        for key in WITHOUT_EFFECT_ON_HYBRIDS {
            keys.get(key);
        }
    }
    match keys.optional_text("hidden_act")? {
        None | Some("silu" | "swish") => {}
        Some(other) => {
            return Err(keys.error("hidden_act", format_args!("`{other}` is not supported")).hint("supported is silu"));
        }
    }
    let dropout = keys.number("attention_dropout", 0.0)?;
    if dropout != 0.0 {
        return Err(keys
            .error("attention_dropout", format_args!("is {dropout}; dropout is not supported"))
            .hint("set it to 0.0"));
    }
    if !keys.flag("is_causal", true)? {
        return Err(keys.error("is_causal", "is false; only causal attention is supported"));
    }
    without_effect(keys);
    Ok(())
}

/// Refuses quantized weights, and marks what never changes the computation as known, around a nested text part.
pub(super) fn check_around(keys: &mut Keys<'_>) -> Result<()> {
    if quantization::read(keys)?.is_some() {
        let what = "says that the weights are in NF4, which is not built for a model that sees";
        return Err(keys.error("quantization_config", what).hint(quantization::HINT));
    }
    without_effect(keys);
    Ok(())
}

/// Marks what never changes the computation as known.
pub(super) fn without_effect(keys: &mut Keys<'_>) {
    for key in WITHOUT_EFFECT {
        keys.get(key);
    }
}

/// Null, false, zero and empty collections switch nothing on.
pub(super) fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::Bool(true) | Value::String(_) => false,
    }
}
