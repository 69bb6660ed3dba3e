//! Adapters of low rank: what a configuration adapts, and the merge of an adapter into its model.

use std::path::PathBuf;

use arl_engine::{Flops, LoraOptions};
use arl_model::{Error, ErrorCode, Lora, LoraConfig, ModelConfig, Result, WeightDtype};
use napi::Env;
use napi::bindgen_prelude::Object;
use napi_derive::napi;

use crate::values::{AdaptedLayers, EngineOptions, seed};
use crate::worker::once;

/// Merges the adapter in `adapterDir` into the model in `modelDir`, and writes the result to `outDir` in Hugging Face's layout.
/// `dtype` absent: tensors keep the types of the model's folder.
#[napi(ts_return_type = "Promise<void>")]
pub fn merge_adapter(
    env: &Env,
    model_dir: String,
    adapter_dir: String,
    out_dir: String,
    #[napi(ts_arg_type = "'f32' | 'bf16' | 'f16'")] dtype: Option<String>,
) -> napi::Result<Object<'_>> {
    let [model, adapter, out] = [model_dir, adapter_dir, out_dir].map(PathBuf::from);
    let merge = move || arl_model::merge_adapter(&model, &adapter, &out, weight_dtype(dtype.as_deref())?);
    once(env, "arl-merge", merge, |()| ())
}

/// The type in which a model is saved; none: that of its folder.
pub(crate) fn weight_dtype(word: Option<&str>) -> Result<Option<WeightDtype>> {
    match word {
        None => Ok(None),
        Some("f32") => Ok(Some(WeightDtype::F32)),
        Some("bf16") => Ok(Some(WeightDtype::Bf16)),
        Some("f16") => Ok(Some(WeightDtype::F16)),
        Some(word) => {
            Err(Error::new(ErrorCode::Config, format!("a model cannot be saved as `{word}`"))
                .hint("use f32, bf16 or f16"))
        }
    }
}

/// The adapters of an engine, if it has any.
pub(crate) fn lora_options(options: &EngineOptions) -> Result<Option<LoraOptions>> {
    let Some(text) = &options.lora else { return Ok(None) };
    let path = match &options.adapter_dir {
        Some(dir) => PathBuf::from(dir).join("adapter_config.json"),
        None => PathBuf::from("the options of LoRA"),
    };
    Ok(Some(LoraOptions { config: LoraConfig::from_json(text, &path)?, seed: seed(options) }))
}

/// The layers that are adapted, and the sizes of the model; none without adapters.
pub(crate) fn sizes(config: &ModelConfig, lora: Option<&Lora>) -> (Flops, Option<Vec<AdaptedLayers>>) {
    let layers = |lora: &Lora| {
        let counts = lora.counts().into_iter();
        counts.map(|(name, count)| AdaptedLayers { name, count: count as u32 }).collect()
    };
    match lora {
        None => (Flops::of(config), None),
        Some(lora) => (Flops::adapted(config, lora), Some(layers(lora))),
    }
}
