//! `quantization_config`: NF4 as bitsandbytes writes it is read; every other way to quantize weights is refused by name.

use serde_json::Value;

use super::keys::Keys;
use super::refused::is_off;
use crate::Result;

pub(super) const HINT: &str =
    "use the folder of the model that this one was quantized from, with weights in bfloat16 or float32";

/// Keys that decide what the weights stand for, and the values that are built.
const BUILT: &[(&str, &[&str])] = &[
    ("load_in_8bit", &["null", "false"]),
    ("_load_in_8bit", &["null", "false"]),
    ("bnb_4bit_quant_type", &["\"nf4\""]),
    ("bnb_4bit_quant_storage", &["null", "\"uint8\""]),
    ("llm_int8_skip_modules", &["null", "[]", "[\"lm_head\"]"]),
    ("llm_int8_has_fp16_weight", &["null", "false"]),
];

/// Whether the folder's linear layers are in NF4, and with `true` their scales in 8 bits.
pub(super) fn read(keys: &mut Keys<'_>) -> Result<Option<bool>> {
    let off = |value: &&Value| !is_off(value);
    for key in ["compression_config", "quantization_config"] {
        let Some(value) = keys.get(key).filter(off) else { continue };
        let method = value.get("quant_method").and_then(Value::as_str).unwrap_or_default();
        if key == "compression_config"
            || method != "bitsandbytes"
            || value.get("load_in_4bit") != Some(&Value::Bool(true))
        {
            let method = if method.is_empty() { String::new() } else { format!(" ({method})") };
            let what =
                format_args!("says that the weights are quantized{method}; of quantized weights NF4 alone is built")
                    .to_string();
            return Err(keys.error(key, what).hint(HINT));
        }
        for &(name, built) in BUILT {
            let given = value.get(name).unwrap_or(&Value::Null).to_string();
            if !built.contains(&given.as_str()) {
                let what = format!("has {name} {given}; built is {}", built.last().unwrap_or(&"null"));
                return Err(keys.error(key, what).hint(HINT));
            }
        }
        return Ok(Some(value.get("bnb_4bit_use_double_quant") == Some(&Value::Bool(true))));
    }
    Ok(None)
}
