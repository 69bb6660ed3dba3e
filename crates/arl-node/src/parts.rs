//! Which parts of a model an engine has, which of them it trains, and which ranks divide.

use std::path::PathBuf;

use arl_engine::Mesh;
use arl_model::{Error, ErrorCode, FreezePart, ModelConfig, Result, freeze_patterns};

use crate::values::EngineOptions;

/// Patterns of the names of what is not trained.
pub(crate) fn frozen(options: &EngineOptions) -> Result<Vec<String>> {
    let names = options.freeze.as_deref().unwrap_or_default();
    let part = |name: &String| {
        let known = || Error::new(ErrorCode::Config, format!("freeze: `{name}` is not known"));
        FreezePart::from_name(name).ok_or_else(|| known().hint("use vision, merger or language"))
    };
    let parts = names.iter().map(part).collect::<Result<Vec<_>>>()?;
    if parts.is_empty() {
        return Ok(Vec::new());
    }
    freeze_patterns(&config(options)?, &parts)
}

/// The configuration of the model's folder as the engine has it: with the vision tower, or without.
pub(crate) fn config(options: &EngineOptions) -> Result<ModelConfig> {
    let config = ModelConfig::from_dir(&PathBuf::from(&options.model_dir))?;
    Ok(if options.vision.unwrap_or(false) { config } else { config.text_alone() })
}

/// How ranks divide a model and its tokens.
pub(crate) fn mesh(options: &EngineOptions) -> Mesh {
    let size = |given: Option<u32>| given.map_or(1, |ranks| ranks as usize);
    Mesh {
        tp: size(options.tp_size),
        cp: size(options.cp_size),
        ep: size(options.ep_size),
        pp: size(options.pp_size),
        dp_replicate: size(options.dp_replicate_size),
    }
}
