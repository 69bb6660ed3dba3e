//! Which layers of a model a configuration names, by PEFT's rules: a list matches the ends of names, a text is a regular
//! expression over whole names, and patterns of ranks and alphas match the ends of names, the first that does.

use std::borrow::Cow;

use fancy_regex::Regex;

use super::names::peft_name;
use super::{Adapter, Lora, LoraConfig, ModuleNames, last, refused};
use crate::Result;
use crate::config::{Family, Mlp, ModelConfig};
use crate::tensors::{Block, Projection, Role, TensorSpec};

/// A module with a weight.
struct Module<'a> {
    /// As PEFT matches it.
    name: Cow<'a, str>,
    /// In the table of tensors.
    own: &'a str,
    spec: &'a TensorSpec,
    /// None: not a linear layer that can have an adapter.
    projection: Option<Projection>,
}

/// The adapters of a model, in the order of its table.
pub(super) fn adapters(model: &ModelConfig, table: &[TensorSpec], config: &LoraConfig) -> Result<Vec<Adapter>> {
    // PEFT takes these experts for what they are on disk, parameters of three dimensions, and knows no other names.
    let only_parameters = matches!(model.family, Family::Qwen3_5Moe | Family::Qwen3VlMoe);
    let modules =
        table.iter().filter_map(|spec| module(model, spec)).filter(|module| !(only_parameters && is_expert(module)));
    let modules: Vec<Module<'_>> = modules.collect();
    let target = match &config.target_modules {
        Some(names) => names.clone(),
        None if !config.target_parameters.is_empty() => ModuleNames::List(Vec::new()),
        // PEFT's TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.
        None if matches!(model.family, Family::Qwen2 | Family::Qwen3) => {
            ModuleNames::List(vec!["q_proj".into(), "v_proj".into()])
        }
        None => {
            let what = format!("lora_target_modules is missing, and PEFT has no choice for {}", model.family);
            return Err(refused(what, "for example --lora_target_modules q_proj k_proj v_proj o_proj"));
        }
    };
    if config.use_dora && !config.target_parameters.is_empty() {
        let what = "use_dora: adapters of experts have no magnitudes, in PEFT neither".to_owned();
        return Err(refused(what, "leave out use_dora or lora_target_parameters"));
    }
    let matcher = Matcher::new("lora_target_modules", &target)?;
    let excluded = config.exclude_modules.as_ref().map(|names| Matcher::new("exclude_modules", names)).transpose()?;
    if let ModuleNames::List(list) = &target {
        let ends = |item: &String| modules.iter().any(|module| ends_with(&module.name, item));
        let tied = |item: &&String| model.tie_word_embeddings && ends_with("lm_head", item);
        if list.iter().any(|item| tied(&item)) {
            let what = "lora_target_modules: `lm_head` is the embedding, which has no adapter".to_owned();
            return Err(refused(what, "`lora_modules_to_save lm_head` trains a whole copy of it"));
        }
        if let Some(item) = list.iter().find(|item| !ends(item)) {
            return Err(refused(format!("lora_target_modules: no layer is called `{item}`"), NAMES));
        }
    }
    let mut adapters = Vec::new();
    for module in modules {
        let number = match module.spec.block {
            Block::Vision(number) | Block::DeepStack(number) => Some(number),
            block => block.layer(),
        };
        let chosen = config.layers_to_transform.is_empty()
            || number.is_some_and(|number| config.layers_to_transform.contains(&number));
        if !chosen || !matcher.hits(&module) || excluded.as_ref().is_some_and(|excluded| excluded.hits(&module)) {
            continue;
        }
        if module.spec.block.is_vision() {
            // PEFT adapts nothing of what it trains as a whole.
            if config.modules_to_save.iter().any(|item| of_module(model, module.spec, item)) {
                continue;
            }
            let what = format!(
                "lora_target_modules: `{}` is in the vision tower, of which no adapters are built",
                module.name
            );
            return Err(refused(what, LANGUAGE));
        }
        let Some(projection) = module.projection else {
            return Err(refused(
                format!(
                    "lora_target_modules: `{}` cannot have an adapter: it is no linear layer of a block",
                    module.name
                ),
                "`lora_modules_to_save` trains a whole copy of a module such as lm_head or embed_tokens",
            ));
        };
        if model.family == Family::Qwen3Next
            && projection.product() == 0
            && matches!(module.spec.block, Block::Delta(_))
        {
            return Err(refused(
                format!("lora_target_modules: `{}` is a part of a fused projection of {}", module.name, model.family),
                "adapters of in_proj_qkvz and in_proj_ba are not built: leave them out of lora_target_modules",
            ));
        }
        if projection == Projection::Embedding && (model.tie_word_embeddings || config.use_dora) {
            let why = if config.use_dora { "has no magnitudes" } else { "is the head too, and has no adapter" };
            let what = format!("lora_target_modules: `{}` {why}", module.name);
            return Err(refused(what, "`lora_modules_to_save embed_tokens` trains a whole copy of it"));
        }
        let found = adapter(config, &module.name, module.spec.block, projection, None)?;
        adapters.push(Adapter { module: module.own.to_owned(), ..found });
    }
    adapters.extend(of_parameters(model, config)?);
    // In the order of the blocks, with the experts behind their layer's attention.
    adapters.sort_by_key(|adapter| adapter.block.layer());
    if adapters.is_empty() {
        return Err(refused("lora_target_modules: no layer is left to adapt".into(), NAMES));
    }
    Ok(adapters)
}

/// A layer's adapter, with the rank and the factor that the patterns give its name.
fn adapter(
    config: &LoraConfig,
    name: &str,
    block: Block,
    projection: Projection,
    experts: Option<usize>,
) -> Result<Adapter> {
    let rank = first_match(&config.rank_pattern, name)?.unwrap_or(config.r);
    let alpha = first_match(&config.alpha_pattern, name)?.unwrap_or(config.lora_alpha);
    let divisor = if config.use_rslora { (rank as f64).sqrt() } else { rank as f64 };
    let factor = (alpha / divisor) as f32;
    Ok(Adapter { module: name.to_owned(), block, projection, rank, factor, experts })
}

/// The adapters of experts.
fn of_parameters(model: &ModelConfig, config: &LoraConfig) -> Result<Vec<Adapter>> {
    if config.target_parameters.is_empty() {
        return Ok(Vec::new());
    }
    let mut parameters = Vec::new();
    for (layer, shape) in model.layers.iter().enumerate() {
        let Mlp::Moe(moe) = shape.mlp else { continue };
        if !config.layers_to_transform.is_empty() && !config.layers_to_transform.contains(&layer) {
            continue;
        }
        for projection in [Projection::Router, Projection::ExpertsGateUp, Projection::ExpertsDown] {
            let module = format!("model.layers.{layer}.{}", projection.module());
            let router = projection == Projection::Router;
            let name = peft_name(model, &module);
            let name = if router { format!("{name}.weight") } else { name.into_owned() };
            let experts = (!router).then_some(moe.num_experts);
            parameters.push((name, module, Block::Experts(layer), projection, experts));
        }
    }
    for item in &config.target_parameters {
        if !parameters.iter().any(|(name, ..)| ends_with(name, item)) {
            let what = format!("lora_target_parameters: no parameter is called `{item}`");
            let hint = "a mixture's are mlp.experts.gate_up_proj, mlp.experts.down_proj and mlp.gate.weight";
            return Err(refused(what, hint));
        }
    }
    parameters.retain(|(name, ..)| config.target_parameters.iter().any(|item| ends_with(name, item)));
    let all = parameters.iter();
    let adapted = |(name, module, block, projection, experts): &(String, String, Block, Projection, Option<usize>)| {
        Ok(Adapter { module: module.clone(), ..adapter(config, name, *block, *projection, *experts)? })
    };
    all.map(adapted).collect()
}

const NAMES: &str = "layers of a Qwen model are called q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj (of the delta \
                     rule in_proj_qkv, in_proj_z, in_proj_b, in_proj_a and out_proj); all-linear means all of these";

const LANGUAGE: &str = r"name the decoder's layers alone by a regular expression: --lora_target_modules '.*language_model.*\.(q|k|v|o|gate|up|down)_proj'";

/// By the table, whether a whole copy of a tensor is trained.
pub(super) fn saved_tensors(
    model: &ModelConfig,
    table: &[TensorSpec],
    config: &LoraConfig,
    adapters: &[Adapter],
) -> Result<Vec<bool>> {
    let of_module = |spec: &TensorSpec, item: &String| of_module(model, spec, item);
    for item in &config.modules_to_save {
        if let Some(adapter) = adapters.iter().find(|adapter| ends_with(&peft_name(model, &adapter.module), item)) {
            let what = format!("lora_modules_to_save: `{}` has an adapter already", adapter.module);
            return Err(refused(what, "leave it out of lora_target_modules or of lora_modules_to_save"));
        }
        if !table.iter().any(|spec| of_module(spec, item)) {
            let what = format!("lora_modules_to_save: no module is called `{item}`");
            return Err(refused(what, "for example lm_head, embed_tokens or norm"));
        }
    }
    Ok(table.iter().map(|spec| config.modules_to_save.iter().any(|item| of_module(spec, item))).collect())
}

/// Whether a tensor is one of a module whose name ends with `item`; of the vision tower also of a module in it, as `merger`.
fn of_module(model: &ModelConfig, spec: &TensorSpec, item: &str) -> bool {
    let name = peft_name(model, &spec.name);
    let mut module = name.rsplit_once('.').map(|(module, _)| module);
    while let Some(name) = module.filter(|name| !ends_with(name, item)) {
        module = name.rsplit_once('.').map(|(outer, _)| outer).filter(|_| spec.block.is_vision());
    }
    module.is_some()
}

fn module<'a>(model: &ModelConfig, spec: &'a TensorSpec) -> Option<Module<'a>> {
    let own = spec.name.strip_suffix(".weight")?;
    let name = peft_name(model, own);
    let projection = match spec.role {
        Role::QWeight => Some(Projection::Query),
        Role::KWeight => Some(Projection::Key),
        Role::VWeight => Some(Projection::Value),
        Role::OWeight => Some(Projection::Output),
        Role::Gate => Some(Projection::Gate),
        Role::Up => Some(Projection::Up),
        Role::Down => Some(Projection::Down),
        Role::InProjQkv => Some(Projection::InProjQkv),
        Role::InProjZ => Some(Projection::InProjZ),
        Role::InProjB => Some(Projection::InProjB),
        Role::InProjA => Some(Projection::InProjA),
        Role::OutProj => Some(Projection::OutProj),
        Role::SharedGate => Some(Projection::SharedGate),
        Role::SharedUp => Some(Projection::SharedUp),
        Role::SharedDown => Some(Projection::SharedDown),
        Role::SharedExpertGate => Some(Projection::SharedExpertGate),
        Role::LmHead => Some(Projection::Head),
        Role::Embedding => Some(Projection::Embedding),
        _ => None,
    };
    Some(Module { name, own, spec, projection })
}

/// Whether it is a linear layer of the vision tower; the embedding of patches is a convolution.
fn is_of_tower(role: Role) -> bool {
    matches!(
        role,
        Role::VisionQkvWeight
            | Role::VisionProjWeight
            | Role::VisionFc1Weight
            | Role::VisionFc2Weight
            | Role::VisionGateWeight
            | Role::VisionUpWeight
            | Role::VisionDownWeight
            | Role::VisionMergerFc1Weight
            | Role::VisionMergerFc2Weight
    )
}

fn is_expert(module: &Module<'_>) -> bool {
    matches!(module.spec.role, Role::Router | Role::ExpertGate(_) | Role::ExpertUp(_) | Role::ExpertDown(_))
}

pub(super) fn ends_with(name: &str, item: &str) -> bool {
    name == item || name.strip_suffix(item).is_some_and(|start| start.ends_with('.'))
}

enum Matcher {
    AllLinear,
    List(Vec<String>),
    Pattern(Regex),
}

impl Matcher {
    fn new(option: &str, names: &ModuleNames) -> Result<Self> {
        Ok(match names {
            ModuleNames::AllLinear => Matcher::AllLinear,
            ModuleNames::List(list) => Matcher::List(list.clone()),
            ModuleNames::Pattern(pattern) => Matcher::Pattern(regex(option, pattern, &format!("^(?:{pattern})$"))?),
        })
    }

    fn hits(&self, module: &Module<'_>) -> bool {
        match self {
            Matcher::AllLinear => {
                let end = |projection| matches!(projection, Projection::Head | Projection::Embedding);
                module.projection.is_some_and(|projection| !end(projection)) || is_of_tower(module.spec.role)
            }
            Matcher::List(list) => list.iter().any(|item| ends_with(&module.name, item)),
            // Too much backtracking counts as no match.
            Matcher::Pattern(regex) => regex.is_match(&module.name).unwrap_or(false),
        }
    }
}

/// The value of the first pattern that matches the end of a name.
fn first_match<T: Copy>(patterns: &[(String, T)], name: &str) -> Result<Option<T>> {
    for (pattern, value) in patterns {
        let regex = regex("rank_pattern or alpha_pattern", pattern, &format!(r"^(?:.*\.)?(?:{pattern})$"))?;
        if regex.is_match(name).unwrap_or(false) {
            return Ok(Some(*value));
        }
    }
    Ok(None)
}

pub(super) fn regex(option: &str, given: &str, whole: &str) -> Result<Regex> {
    Regex::new(whole).map_err(|error| refused(format!("{option}: `{given}` is no regular expression: {error}"), NAMES))
}

/// The names under which PEFT stores what was found: whole names where there are fewer than 20, else their last parts.
pub(super) fn target_names(lora: &Lora) -> Vec<String> {
    let adapters: Vec<&Adapter> = lora.adapters.iter().filter(|adapter| !adapter.is_parameter()).collect();
    let whole = |adapter: &&Adapter| peft_name(&lora.model, &adapter.module).into_owned();
    let mut names: Vec<String> = match &lora.config.target_modules {
        Some(ModuleNames::List(list)) => list.clone(),
        Some(ModuleNames::AllLinear) if adapters.len() < 20 => adapters.iter().map(whole).collect(),
        _ => adapters.iter().map(|adapter| last(&adapter.module).to_owned()).collect(),
    };
    names.sort();
    names.dedup();
    names
}
