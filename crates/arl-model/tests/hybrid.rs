//! The hybrid families: configurations in all spellings, the table of tensors, and files that are written back as they were,
//! with what is carried.

use crate::common;

use std::collections::BTreeMap;
use std::path::Path;

use arl_model::{
    Checkpoint, CheckpointFormat, Dtype, Family, Mixer, Mlp, ModelConfig, ModelFiles, Role, WeightDtype, init_f32,
    save_model, tensor_table,
};
use common::{Entry, entries_of, raw, write};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Two key heads of 3, four value heads of 2; every second layer has attention, and the second one is dense where layers may be.
fn text(family: Family) -> Value {
    let mut text = json!({
        "vocab_size": 11, "hidden_size": 6, "intermediate_size": 10, "num_hidden_layers": 4, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "full_attention_interval": 2, "dtype": "bfloat16",
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 3, "linear_value_head_dim": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
    });
    let experts = json!({
        "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 4, "shared_expert_intermediate_size": 5,
    });
    if family != Family::Qwen3_5 {
        text.as_object_mut().unwrap().extend(experts.as_object().unwrap().clone());
    }
    if family == Family::Qwen3Next {
        text["mlp_only_layers"] = json!([1]);
    }
    text
}

/// The text of a `config.json`; nested with a vision tower next to it.
fn config_text(family: Family, nested: bool, tied: bool) -> String {
    let mut text = text(family);
    let name = family.as_str();
    let text_type = if family == Family::Qwen3Next { name.to_owned() } else { format!("{name}_text") };
    text["model_type"] = json!(text_type);
    if !nested {
        text["tie_word_embeddings"] = json!(tied);
        return format!("{text:#}\n");
    }
    let whole = json!({
        "architectures": ["X"], "model_type": name, "tie_word_embeddings": tied, "text_config": text,
        "image_token_id": 9, "video_token_id": 8, "vision_start_token_id": 7, "vision_end_token_id": 6,
        "vision_config": {"depth": 1, "out_hidden_size": 6}, "dtype": "bfloat16", "transformers_version": "5.24.0",
    });
    format!("{whole:#}\n")
}

/// Of the text alone: a tower is carried.
fn config_of(text: &str) -> ModelConfig {
    ModelConfig::from_json(text, Path::new("config.json")).unwrap().text_alone()
}

/// Where a file has its parameters.
#[derive(Clone, Copy, Debug)]
struct Layout {
    /// In the place of `model.`.
    prefix: &'static str,
    joined: bool,
}

/// A file of these parameters, put together apart from the code under test: weights are bf16, decays f32.
fn contents(config: &ModelConfig, layout: Layout) -> Vec<Entry> {
    let parameters = common::exact_parameters(config);
    let mut tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)> = BTreeMap::new();
    for spec in tensor_table(config) {
        tensors.insert(spec.name.clone(), (spec.shape, parameters[&spec.name].clone()));
    }
    for layer in 0..config.layers.len() {
        let at = |name: &str| format!("model.layers.{layer}.{name}");
        let mut take = |name: &str| tensors.remove(&at(name)).map(|(_, values)| values);
        if config.family == Family::Qwen3Next
            && let Some(qkv) = take("linear_attn.in_proj_qkv.weight")
        {
            let part = |values: &[f32], first: usize, rows: usize| values[6 * first..6 * (first + rows)].to_vec();
            let [z, b, a] = ["z", "b", "a"].map(|name| take(&format!("linear_attn.in_proj_{name}.weight")).unwrap());
            let (mut qkvz, mut ba) = (Vec::new(), Vec::new());
            for head in 0..2 {
                // Queries, then keys, in rows of 3 a head; values behind 12 rows, 4 rows for the two heads of each key head.
                qkvz.extend(part(&qkv, 3 * head, 3));
                qkvz.extend(part(&qkv, 6 + 3 * head, 3));
                qkvz.extend(part(&qkv, 12 + 4 * head, 4));
                qkvz.extend(part(&z, 4 * head, 4));
                ba.extend(part(&b, 2 * head, 2));
                ba.extend(part(&a, 2 * head, 2));
            }
            tensors.insert(at("linear_attn.in_proj_qkvz.weight"), (vec![28, 6], qkvz));
            tensors.insert(at("linear_attn.in_proj_ba.weight"), (vec![8, 6], ba));
        }
        if layout.joined && matches!(config.layers[layer].mlp, Mlp::Moe(_)) {
            let mut expert =
                |e: usize, part: &str| tensors.remove(&at(&format!("mlp.experts.{e}.{part}_proj.weight"))).unwrap().1;
            let gate_up: Vec<f32> = (0..3).flat_map(|e| [expert(e, "gate"), expert(e, "up")].concat()).collect();
            let down: Vec<f32> = (0..3).flat_map(|e| expert(e, "down")).collect();
            tensors.insert(at("mlp.experts.gate_up_proj"), (vec![3, 8, 6], gate_up));
            tensors.insert(at("mlp.experts.down_proj"), (vec![3, 6, 4], down));
        }
    }
    let entry = |(name, (shape, values)): (String, (Vec<usize>, Vec<f32>))| {
        let decay = name.ends_with("A_log");
        let (dtype, bytes) = raw(&values, if decay { WeightDtype::F32 } else { WeightDtype::Bf16 });
        let name = name.strip_prefix("model.").map_or(name.clone(), |rest| format!("{}{rest}", layout.prefix));
        (name, dtype, shape, bytes)
    };
    let mut entries: Vec<Entry> = tensors.into_iter().map(entry).collect();
    entries.sort_by(|left, right| left.0.cmp(&right.0));
    entries
}

/// What transformers passes over.
fn carried(family: Family) -> Vec<Entry> {
    let mut carried = vec![("mtp.fc.weight".to_owned(), Dtype::F32, vec![2], vec![255, 255, 255, 255, 1, 2, 3, 4])];
    if family != Family::Qwen3Next {
        carried.push(("model.visual.blocks.0.norm1.bias".to_owned(), Dtype::I8, vec![3], vec![7, 8, 9]));
    }
    carried
}

fn folder(text: &str, tensors: &[Entry]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), text).unwrap();
    write(&dir.path().join("model.safetensors"), tensors);
    dir
}

/// The folder that comes out of one that was not trained.
fn saved(dir: &TempDir, dtype: Option<WeightDtype>) -> (TempDir, String) {
    let (files, out) = (ModelFiles::read(dir.path()).unwrap(), tempfile::tempdir().unwrap());
    let config = files.config().unwrap().text_alone();
    let checkpoint = Checkpoint::open(dir.path(), &config).unwrap();
    let read = |name: &str, out: &mut [f32]| checkpoint.read_f32(name, out);
    save_model(out.path(), &files, &config, checkpoint.format(), dtype, u64::MAX, read).unwrap();
    (out, checkpoint.format().to_string())
}

const FAMILIES: [(Family, bool); 5] = [
    (Family::Qwen3Next, false),
    (Family::Qwen3_5, false),
    (Family::Qwen3_5, true),
    (Family::Qwen3_5Moe, false),
    (Family::Qwen3_5Moe, true),
];

fn layouts(family: Family) -> Vec<Layout> {
    let prefixes: &[&str] = if family == Family::Qwen3Next {
        &["model.", ""]
    } else {
        &["model.", "model.language_model.", "", "language_model."]
    };
    let joined: &[bool] = if family == Family::Qwen3_5 { &[false] } else { &[false, true] };
    prefixes.iter().flat_map(|prefix| joined.iter().map(|&joined| Layout { prefix, joined })).collect()
}

#[test]
fn every_spelling_is_read_to_the_same_parameters_and_written_back_byte_for_byte_with_what_is_carried() {
    for (family, nested) in FAMILIES {
        for tied in [false, true] {
            let text = config_text(family, nested, tied);
            let config = config_of(&text);
            assert_eq!((config.family, config.nested, config.tie_word_embeddings), (family, nested, tied));
            assert_eq!(config.unknown_keys, Vec::<String>::new());
            let mut formats = Vec::new();
            for layout in layouts(family) {
                let mut expected = contents(&config, layout);
                expected.extend(carried(family));
                expected.sort_by(|left, right| left.0.cmp(&right.0));
                let dir = folder(&text, &expected);
                let checkpoint = Checkpoint::open(dir.path(), &config).unwrap();
                for (name, values) in common::exact_parameters(&config) {
                    let mut found = vec![0f32; values.len()];
                    checkpoint.read_f32(&name, &mut found).unwrap();
                    assert_eq!(found, values, "{family} {layout:?} {name}");
                }
                let (out, format) = saved(&dir, None);
                assert!(entries_of(out.path()) == expected, "{family} nested {nested} {layout:?}");
                assert_eq!(std::fs::read_to_string(out.path().join("config.json")).unwrap(), text);
                assert!(!formats.contains(&format), "{format}");
                formats.push(format);
            }
            let all: Vec<String> = CheckpointFormat::all(&config).iter().map(ToString::to_string).collect();
            assert_eq!(all.len(), formats.len());
            assert_eq!(all[0], CheckpointFormat::new(&config).to_string());
            assert_eq!(all[0].contains("language_model"), nested, "{}", all[0]);
        }
    }
}

#[test]
fn a_type_that_is_asked_for_is_said_where_the_configuration_has_one_and_spares_what_is_carried() {
    let text = config_text(Family::Qwen3_5, true, false);
    let config = config_of(&text);
    let mut tensors = contents(&config, Layout { prefix: "model.language_model.", joined: false });
    tensors.extend(carried(Family::Qwen3_5));
    let (out, _) = saved(&folder(&text, &tensors), Some(WeightDtype::F32));
    let written = std::fs::read_to_string(out.path().join("config.json")).unwrap();
    assert_eq!(written, text.replace("bfloat16", "float32"));
    for (name, dtype, _, bytes) in entries_of(out.path()) {
        match carried(Family::Qwen3_5).into_iter().find(|entry| entry.0 == name) {
            Some(entry) => assert_eq!((dtype, bytes), (entry.1, entry.3)),
            None => assert_eq!(dtype, Dtype::F32, "{name}"),
        }
    }
}

#[test]
fn layers_alternate_by_the_interval_or_by_name() {
    let kinds = |extra: Value| -> Vec<bool> {
        let mut text = text(Family::Qwen3_5);
        text["model_type"] = json!("qwen3_5_text");
        text.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        let config = config_of(&text.to_string());
        config.layers.iter().map(|layer| matches!(layer.mixer, Mixer::Delta(_))).collect()
    };
    assert_eq!(kinds(json!({"num_hidden_layers": 5, "full_attention_interval": 4})), [true, true, true, false, true]);
    let types = json!(["full_attention", "linear_attention", "linear_attention", "full_attention"]);
    assert_eq!(kinds(json!({ "layer_types": types })), [false, true, true, false]);
    for (key, value, why) in [
        ("layer_types", json!(["full_attention"]), "1 entries"),
        ("layer_types", json!(vec!["sliding_attention"; 4]), "linear_attention and full_attention"),
        ("linear_num_value_heads", json!(3), "multiple"),
        ("partial_rotary_factor", json!(1.5), "at most 1"),
        ("rope_parameters", json!({"partial_rotary_factor": 0.125}), "even"),
        ("attn_output_gate", json!(false), "gate"),
        ("quantization_config", json!({"quant_method": "fp8"}), "quantized"),
    ] {
        let mut text = text(Family::Qwen3_5);
        text["model_type"] = json!("qwen3_5_text");
        text[key] = value;
        let error = ModelConfig::from_json(&text.to_string(), Path::new("config.json")).unwrap_err();
        let said = format!("{} {}", error.message, error.hint);
        assert!(said.contains(key) && said.contains(why), "{said}");
    }
}

#[test]
fn absent_keys_take_the_defaults_of_transformers() {
    let next = config_of(r#"{"model_type": "qwen3_next"}"#);
    assert_eq!((next.vocab_size, next.hidden_size, next.intermediate_size), (151_936, 2048, 5632));
    assert_eq!((next.num_hidden_layers, next.num_attention_heads, next.num_key_value_heads), (48, 16, 2));
    let moe = next.moe.unwrap();
    assert_eq!((moe.num_experts, moe.num_experts_per_tok, moe.moe_intermediate_size), (512, 10, 512));
    assert!(moe.norm_topk_prob && moe.shared_expert_intermediate_size == Some(512));
    let dense = config_of(r#"{"model_type": "qwen3_5", "text_config": {}}"#);
    assert_eq!((dense.vocab_size, dense.hidden_size, dense.intermediate_size), (248_320, 4096, 12_288));
    assert_eq!((dense.num_hidden_layers, dense.num_attention_heads, dense.num_key_value_heads), (32, 16, 4));
    let experts = config_of(r#"{"model_type": "qwen3_5_moe_text", "norm_topk_prob": false, "mlp_only_layers": [1]}"#);
    assert_eq!((experts.num_hidden_layers, experts.num_attention_heads, experts.num_key_value_heads), (40, 16, 2));
    // Neither key is read for this family.
    assert!(experts.moe.unwrap().norm_topk_prob);
    assert!(experts.layers.iter().all(|layer| matches!(layer.mlp, Mlp::Moe(_))));
    for config in [next, dense, experts] {
        assert_eq!((config.head_dim, config.rope.rotary_dim), (256, 64));
        assert!(config.attention_gate && config.norm_offset == 1.0 && config.qk_norm);
        let delta = config.delta.unwrap();
        assert_eq!((delta.linear_num_key_heads, delta.linear_num_value_heads), (16, 32));
        assert_eq!(
            (delta.linear_key_head_dim, delta.linear_value_head_dim, delta.linear_conv_kernel_dim),
            (128, 128, 4)
        );
        assert_eq!((delta.key_columns(), delta.value_columns(), delta.channels()), (2048, 4096, 8192));
        assert!(config.layers.iter().skip(3).step_by(4).all(|layer| layer.mixer == Mixer::Attention { window: None }));
    }
}

#[test]
fn weight_decay_goes_by_names_as_in_the_trainer() {
    for (family, nested) in FAMILIES {
        let config = config_of(&config_text(family, nested, false));
        let table = tensor_table(&config);
        for spec in &table {
            let spared = ["bias", "layernorm", "_norm.", ".norm."].iter().any(|part| spec.name.contains(part));
            assert_eq!(spec.decay, !spared, "{}", spec.name);
        }
        assert!(table.iter().any(|spec| spec.role == Role::ALog && spec.decay));
        assert!(table.iter().any(|spec| spec.role == Role::DtBias && !spec.decay));
        let counted: usize = table.iter().map(arl_model::TensorSpec::elements).sum();
        assert_eq!(config.num_parameters(), counted as u128);
    }
}

#[test]
fn random_norms_are_centred_and_decays_are_drawn_from_a_range() {
    let mut wide = text(Family::Qwen3Next);
    wide["model_type"] = json!("qwen3_next");
    (wide["linear_num_value_heads"], wide["linear_num_key_heads"]) = (json!(4000), json!(1));
    let config = config_of(&wide.to_string());
    for spec in tensor_table(&config) {
        let mut values = vec![f32::NAN; spec.elements()];
        init_f32(&config, &spec, 1, &mut values);
        match spec.role {
            Role::Norm | Role::DtBias => assert!(values.iter().all(|&value| value == 1.0), "{}", spec.name),
            Role::ALog => {
                let rates: Vec<f64> = values.iter().map(|&value| f64::from(value).exp()).collect();
                let mean = rates.iter().sum::<f64>() / rates.len() as f64;
                // Five standard errors of the mean of a uniform distribution.
                let error = 5.0 * 16.0 / (12.0 * rates.len() as f64).sqrt();
                assert!(rates.iter().all(|rate| (0.0099..16.001).contains(rate)) && (mean - 8.005).abs() < error);
            }
            role if role.is_norm() => assert!(values.iter().all(|&value| value == 0.0), "{}", spec.name),
            _ => assert!(values.iter().any(|&value| value != 0.0), "{}", spec.name),
        }
    }
}

#[test]
fn what_a_nested_text_part_lacks_is_said() {
    for (text, why) in [
        (json!({"model_type": "qwen3_5"}), "qwen3_5_text"),
        (json!({"model_type": "qwen3_5", "text_config": 3}), "an object"),
        (
            json!({"model_type": "qwen3_5", "text_config": {}, "quantization_config": {"quant_method": "fp8"}}),
            "quantized",
        ),
        (
            json!({"model_type": "qwen3_5", "text_config": {"quantization_config": {"bits": 4}}}),
            "text_config.quantization",
        ),
        (json!({"model_type": "qwen3_5", "text_config": {"hidden_size": 0}}), "text_config.hidden_size"),
        (json!({"model_type": "qwen4_exp", "text_config": {}}), "hyper-connections"),
    ] {
        let error = ModelConfig::from_json(&text.to_string(), Path::new("config.json")).unwrap_err();
        let said = format!("{} {}", error.message, error.hint);
        assert!(said.contains(why), "{said}");
    }
    let unknown = json!({"model_type": "qwen3_5", "text_config": {"hiden_size": 1}, "visoin_config": {}});
    assert_eq!(config_of(&unknown.to_string()).unknown_keys, ["text_config.hiden_size", "visoin_config"]);
}
