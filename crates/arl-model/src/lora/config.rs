//! `adapter_config.json`, in the spelling of PEFT's `LoraConfig`. Absent keys have PEFT's defaults; a key that asks for what is
//! not built is refused by name, whether this program knows it or not.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::base::base_name;
use super::refused;
use crate::{Error, ErrorCode, Result};

/// Names of modules, as PEFT matches them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModuleNames {
    /// `"all-linear"`: every linear layer but the head.
    AllLinear,
    /// A module whose name equals one of these, or ends with it after a dot.
    List(Vec<String>),
    /// A regular expression over the whole name.
    Pattern(String),
}

/// Which biases of the model are trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoraBias {
    /// None.
    None,
    /// Those of adapted layers.
    LoraOnly,
}

/// A LoRA as PEFT's configuration has it. Fields are named as there.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// The rank of adapters.
    pub r: usize,
    /// Over the rank, the factor on `B A`.
    pub lora_alpha: f64,
    /// Probability with which an element of A's input is dropped in training.
    pub lora_dropout: f32,
    /// Divide alpha by the root of the rank instead.
    pub use_rslora: bool,
    /// Train magnitudes of the adapted layers' rows as well (DoRA).
    pub use_dora: bool,
    /// Which biases are trained.
    pub bias: LoraBias,
    /// The adapted layers; `None`: PEFT's choice for the family.
    pub target_modules: Option<ModuleNames>,
    /// Layers that are left out of them.
    pub exclude_modules: Option<ModuleNames>,
    /// Only layers of these numbers; empty: all.
    pub layers_to_transform: Vec<usize>,
    /// Other ranks, by patterns of which the first that matches the end of a name counts.
    pub rank_pattern: Vec<(String, usize)>,
    /// Other alphas, likewise.
    pub alpha_pattern: Vec<(String, f64)>,
    /// Adapted parameters of three dimensions, by the ends of their names: experts' `gate_up_proj` and `down_proj`.
    pub target_parameters: Vec<String>,
    /// Modules of which a whole copy is trained.
    pub modules_to_save: Vec<String>,
}

/// Keys that say nothing about the computation.
const INFORMATION: &[&str] = &[
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
];

/// What is known and not built, and why.
const NOT_BUILT: &[(&str, &str)] = &[
    ("layer_replication", "repeated layers are not built"),
    ("trainable_token_indices", "training single rows of the embedding is not built: modules_to_save trains all of it"),
    ("lora_bias", "a bias on B is not built: set lora_bias to false"),
    ("fan_in_fan_out", "the linear layers of Qwen models are not stored transposed: set fan_in_fan_out to false"),
];

impl LoraConfig {
    /// Reads `dir/adapter_config.json`.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        let path = dir.join("adapter_config.json");
        let text = std::fs::read_to_string(&path).map_err(|error| {
            Error::io(&path, &error)
                .hint("a folder with an adapter has adapter_config.json and adapter_model.safetensors")
        })?;
        Self::from_json(&text, &path)
    }

    /// Reads the text of an `adapter_config.json`; errors name it as `path`.
    pub fn from_json(text: &str, path: &Path) -> Result<Self> {
        let value: Value = serde_json::from_str(text)
            .map_err(|error| refused(format!("{}: not JSON: {error}", path.display()), ""))?;
        let Value::Object(map) = value else {
            return Err(refused(format!("{}: not a JSON object", path.display()), ""));
        };
        let mut keys = Keys { map, path };
        let config = keys.config()?;
        keys.check_rest()?;
        Ok(config)
    }

    /// The text of an `adapter_config.json` that PEFT and vLLM read. `target_modules` are those that were found.
    pub fn to_json(&self, base: Option<&str>, target_modules: &[String]) -> String {
        let names = |names: &Option<ModuleNames>| match names {
            None => Value::Null,
            Some(ModuleNames::AllLinear) => json!("all-linear"),
            Some(ModuleNames::List(list)) => json!(list),
            Some(ModuleNames::Pattern(pattern)) => json!(pattern),
        };
        let number = |value: f64| if value.fract() == 0.0 { json!(value as i64) } else { json!(value) };
        let ranks: Map<String, Value> =
            self.rank_pattern.iter().map(|(key, rank)| (key.clone(), json!(rank))).collect();
        let alphas: Map<String, Value> =
            self.alpha_pattern.iter().map(|(key, alpha)| (key.clone(), number(*alpha))).collect();
        let or_null = |list: Value| if list.as_array().is_some_and(Vec::is_empty) { Value::Null } else { list };
        // The shortest decimal of the f32 that was given.
        let dropout: f64 = self.lora_dropout.to_string().parse().unwrap_or_default();
        let config = json!({
            "alpha_pattern": alphas,
            "auto_mapping": null,
            "base_model_name_or_path": base.map(base_name),
            "bias": if self.bias == LoraBias::LoraOnly { "lora_only" } else { "none" },
            "exclude_modules": names(&self.exclude_modules),
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "layers_to_transform": or_null(json!(self.layers_to_transform)),
            "lora_alpha": number(self.lora_alpha),
            "lora_dropout": dropout,
            "modules_to_save": or_null(json!(self.modules_to_save)),
            "peft_type": "LORA",
            "r": self.r,
            "rank_pattern": ranks,
            "revision": null,
            "target_modules": match &self.target_modules {
                Some(ModuleNames::Pattern(pattern)) => json!(pattern),
                _ => json!(target_modules),
            },
            "target_parameters": or_null(json!(self.target_parameters)),
            "task_type": "CAUSAL_LM",
            "use_dora": self.use_dora,
            "use_rslora": self.use_rslora,
        });
        format!("{config:#}\n")
    }
}

/// The keys that were not read yet.
struct Keys<'a> {
    map: Map<String, Value>,
    path: &'a Path,
}

impl Keys<'_> {
    fn config(&mut self) -> Result<LoraConfig> {
        self.one_of("peft_type", &[json!("LORA")])?;
        self.one_of("task_type", &[json!("CAUSAL_LM")])?;
        self.one_of("init_lora_weights", &[json!(true), json!(false), json!("gaussian")])?;
        let bias = match self.take("bias") {
            None => LoraBias::None,
            Some(Value::String(word)) if word == "none" => LoraBias::None,
            Some(Value::String(word)) if word == "lora_only" => LoraBias::LoraOnly,
            Some(value) => return Err(self.wrong("bias", "\"none\" or \"lora_only\"", &value)),
        };
        let r = self.size("r", 8)?;
        let lora_alpha = self.number("lora_alpha", 8.0)?;
        let dropout = self.number("lora_dropout", 0.0)?;
        if !(0.0..1.0).contains(&dropout) {
            return Err(self.wrong("lora_dropout", "a number from 0 to below 1", &json!(dropout)));
        }
        Ok(LoraConfig {
            r,
            lora_alpha,
            lora_dropout: dropout as f32,
            use_rslora: self.flag("use_rslora")?,
            use_dora: self.flag("use_dora")?,
            bias,
            target_modules: self.names("target_modules", true)?,
            exclude_modules: self.names("exclude_modules", false)?,
            layers_to_transform: self.layers()?,
            rank_pattern: self.pattern("rank_pattern", "a whole number of 1 or more", |value| {
                value.as_u64().filter(|&rank| rank > 0).map(|rank| rank as usize)
            })?,
            alpha_pattern: self.pattern("alpha_pattern", "a number", Value::as_f64)?,
            target_parameters: self.list("target_parameters")?,
            modules_to_save: self.list("modules_to_save")?,
        })
    }

    /// What nobody asked for must change nothing.
    fn check_rest(&self) -> Result<()> {
        for (key, value) in &self.map {
            let empty = match value {
                Value::Null | Value::Bool(false) => true,
                Value::Object(map) => map.is_empty(),
                Value::Array(list) => list.is_empty(),
                _ => false,
            };
            if empty || INFORMATION.contains(&key.as_str()) {
                continue;
            }
            let known = NOT_BUILT.iter().find(|(name, _)| name == key);
            let why = known
                .map_or("this version does not know it, and it may change what the adapter computes", |&(_, why)| why);
            return Err(refused(format!("{}: `{key}` is {value}", self.path.display()), why));
        }
        Ok(())
    }

    fn take(&mut self, key: &str) -> Option<Value> {
        self.map.shift_remove(key).filter(|value| !value.is_null())
    }

    fn wrong(&self, key: &str, expected: &str, value: &Value) -> Error {
        Error::new(ErrorCode::Config, format!("{}: `{key}` must be {expected}, but is {value}", self.path.display()))
    }

    fn one_of(&mut self, key: &str, allowed: &[Value]) -> Result<()> {
        match self.take(key) {
            Some(value) if !allowed.contains(&value) => {
                let allowed: Vec<String> = allowed.iter().map(Value::to_string).collect();
                Err(self.wrong(key, &allowed.join(" or "), &value))
            }
            _ => Ok(()),
        }
    }

    fn flag(&mut self, key: &str) -> Result<bool> {
        let value = self.take(key).unwrap_or(Value::Bool(false));
        value.as_bool().ok_or_else(|| self.wrong(key, "true or false", &value))
    }

    fn number(&mut self, key: &str, default: f64) -> Result<f64> {
        let value = self.take(key).unwrap_or_else(|| json!(default));
        value.as_f64().filter(|number| number.is_finite()).ok_or_else(|| self.wrong(key, "a number", &value))
    }

    fn size(&mut self, key: &str, default: usize) -> Result<usize> {
        let value = self.take(key).unwrap_or_else(|| json!(default));
        let size = value.as_u64().filter(|size| (1..=1 << 16).contains(size));
        size.map(|size| size as usize).ok_or_else(|| self.wrong(key, "a whole number of 1 or more", &value))
    }

    fn list(&mut self, key: &str) -> Result<Vec<String>> {
        let Some(value) = self.take(key) else { return Ok(Vec::new()) };
        let strings = value.as_array().map(|list| list.iter().map(|item| item.as_str().map(str::to_owned)).collect());
        strings.flatten().ok_or_else(|| self.wrong(key, "a list of names", &value))
    }

    fn names(&mut self, key: &str, all_linear: bool) -> Result<Option<ModuleNames>> {
        match self.map.get(key) {
            Some(Value::String(text)) => {
                let all = all_linear && text.eq_ignore_ascii_case("all-linear");
                let names = if all { ModuleNames::AllLinear } else { ModuleNames::Pattern(text.clone()) };
                self.map.shift_remove(key);
                Ok(Some(names))
            }
            _ => Ok(Some(self.list(key)?).filter(|list| !list.is_empty()).map(ModuleNames::List)),
        }
    }

    fn layers(&mut self) -> Result<Vec<usize>> {
        let key = "layers_to_transform";
        let Some(value) = self.take(key) else { return Ok(Vec::new()) };
        let numbers: Option<Vec<usize>> = match &value {
            Value::Array(list) => list.iter().map(|item| item.as_u64().map(|layer| layer as usize)).collect(),
            one => one.as_u64().map(|layer| vec![layer as usize]),
        };
        numbers.ok_or_else(|| self.wrong(key, "a layer's number or a list of them", &value))
    }

    fn pattern<T>(
        &mut self,
        key: &str,
        expected: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Vec<(String, T)>> {
        let value = self.take(key).unwrap_or_else(|| json!({}));
        let read_all =
            |map: &Map<String, Value>| map.iter().map(|(key, value)| Some((key.clone(), read(value)?))).collect();
        let entries: Option<Vec<(String, T)>> = value.as_object().and_then(read_all);
        entries.ok_or_else(|| self.wrong(key, &format!("names, each with {expected}"), &value))
    }
}
