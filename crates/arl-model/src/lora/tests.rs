//! What configurations name in a model, and an adapter's folder there and back.

use std::path::Path;

use serde_json::{Value, json};

use super::*;
use crate::folder::ModelFiles;
use crate::weights::SafetensorsFile;

fn model(changes: Value) -> ModelConfig {
    let mut config = json!({
        "model_type": "qwen2", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": true,
    });
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    ModelConfig::from_json(&config.to_string(), Path::new("config.json")).unwrap()
}

fn config(text: Value) -> Result<LoraConfig> {
    LoraConfig::from_json(&text.to_string(), Path::new("adapter_config.json"))
}

fn lora(text: Value) -> Result<Lora> {
    Lora::new(&model(json!({})), &config(text)?)
}

fn modules(text: Value) -> Vec<String> {
    lora(text).unwrap().adapters.into_iter().map(|adapter| adapter.module).collect()
}

#[test]
fn all_linear_is_every_linear_layer_but_the_head() {
    let found = lora(json!({ "target_modules": "all-linear", "r": 4 })).unwrap();
    let names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
    assert_eq!(found.counts(), names.map(|name| (name.to_owned(), 3)));
    let (input, output) = (16 * 6 + 24, 16 + 8 + 8 + 16 + 24 + 24 + 16);
    assert_eq!(found.trained_parameters(), 3 * 4 * (input + output));
    assert!(modules(json!({ "target_modules": "ALL-linear" })).len() == 21);
}

/// A hybrid model whose second layer alone has attention.
fn hybrid(family: &str) -> ModelConfig {
    let mut text = json!({
        "model_type": family, "num_hidden_layers": 2, "full_attention_interval": 2, "head_dim": 8, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 3, "linear_value_head_dim": 5,
    });
    if family != "qwen3_5_text" {
        for (key, size) in [("num_experts", 4), ("num_experts_per_tok", 2), ("moe_intermediate_size", 6)] {
            text[key] = json!(size);
        }
        text["shared_expert_intermediate_size"] = json!(10);
    }
    model(text)
}

#[test]
fn all_linear_of_a_hybrid_takes_the_delta_rule_and_the_shared_expert_and_no_expert() {
    let of = |family: &str, targets: Value| {
        Lora::new(&hybrid(family), &config(json!({ "target_modules": targets, "r": 4 })).unwrap())
    };
    let delta = ["in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"].map(|name| (name.to_owned(), 1));
    let attention = ["q_proj", "k_proj", "v_proj", "o_proj"].map(|name| (name.to_owned(), 1));
    let mlp = ["gate_proj", "up_proj", "down_proj"].map(|name| (name.to_owned(), 2));
    let dense = of("qwen3_5_text", json!("all-linear")).unwrap();
    assert_eq!(dense.counts(), [&delta[..], &mlp[..], &attention[..]].concat());
    // Queries have their gates; channels are 2 x 6 + 20.
    let sides = (16 + 32) + (16 + 20) + 2 * (16 + 4) + (20 + 16) + (16 + 64) + 2 * (16 + 16) + (32 + 16);
    assert_eq!(dense.trained_parameters(), 4 * (sides + 2 * 3 * (16 + 24)));
    let experts = of("qwen3_5_moe_text", json!("all-linear")).unwrap();
    let gate = [("shared_expert_gate".to_owned(), 2)];
    assert_eq!(experts.counts(), [&delta[..], &mlp[..], &gate[..], &attention[..]].concat());
    assert!(experts.adapters.iter().all(|adapter| !adapter.module.contains("experts.")));
    assert_eq!(of("qwen3_5_moe_text", json!(["gate_proj"])).unwrap().adapters.len(), 2);
    assert_eq!(of("qwen3_next", json!(["out_proj", "o_proj"])).unwrap().adapters.len(), 2);
    for targets in [json!("all-linear"), json!(["in_proj_qkv"])] {
        let error = of("qwen3_next", targets).unwrap_err();
        assert!(error.message.contains("fused projection"), "{error}");
    }
    // Of Qwen3-Next's experts PEFT makes parameters, and leaves the shared one alone.
    let converted = of("qwen3_next", json!(["gate_proj", "up_proj", "down_proj"])).unwrap();
    assert_eq!(converted.adapters.len(), 4);
    assert!(converted.adapters.iter().all(|adapter| !adapter.module.contains("shared")));
}

#[test]
fn a_list_matches_ends_and_a_text_whole_names() {
    let names = |targets: Value| modules(json!({ "target_modules": targets, "layers_to_transform": [1] }));
    assert_eq!(
        names(json!(["v_proj", "mlp.up_proj"])),
        ["model.layers.1.self_attn.v_proj", "model.layers.1.mlp.up_proj"]
    );
    assert_eq!(names(json!(["model.layers.1.self_attn.o_proj"])), ["model.layers.1.self_attn.o_proj"]);
    assert_eq!(
        names(json!(r".*\.(?!k_|v_)\w_proj")),
        ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.o_proj"]
    );
    assert_eq!(names(Value::Null), ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]);
    let without = json!({ "target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*layers\.[02].*" });
    assert_eq!(modules(without), ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"]);
    let without = json!({ "target_modules": ["q_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"] });
    assert_eq!(modules(without).len(), 2);
}

#[test]
fn what_cannot_be_adapted_is_refused_by_name() {
    let message = |text: Value| {
        let error = lora(text).unwrap_err();
        assert_eq!(error.code, ErrorCode::Config);
        format!("{} ({})", error.message, error.hint)
    };
    let targets = |targets: Value| message(json!({ "target_modules": targets }));
    assert!(targets(json!(["q_porj"])).contains("no layer is called `q_porj`"));
    assert!(targets(json!("q_proj")).contains("no layer is left to adapt"));
    assert!(targets(json!(["embed_tokens"])).contains("`model.embed_tokens` is the head too"));
    assert!(targets(json!(["model.norm"])).contains("`model.norm` cannot have an adapter"));
    assert!(targets(json!("[")).contains("`[` is no regular expression"));
    assert!(message(json!({ "target_modules": ["q_proj"], "modules_to_save": ["score"] })).contains("`score`"));
    let both = json!({ "target_modules": ["q_proj"], "modules_to_save": ["q_proj"] });
    assert!(message(both).contains("has an adapter already"));
    for (key, value) in [
        ("trainable_token_indices", json!([1])),
        ("layer_replication", json!([[0, 1]])),
        ("lora_bias", json!(true)),
        ("a_key_of_the_future", json!(3)),
    ] {
        assert!(message(json!({ key: value })).contains(&format!("`{key}`")), "{key}");
    }
    for (key, value) in [
        ("peft_type", json!("IA3")),
        ("init_lora_weights", json!("pissa")),
        ("task_type", json!("SEQ_CLS")),
        ("bias", json!("all")),
        ("r", json!(0)),
        ("lora_dropout", json!(1)),
    ] {
        assert!(message(json!({ key: value })).contains(&format!("`{key}` must be")), "{key}");
    }
    let head = targets(json!(["lm_head"]));
    assert!(head.contains("`lm_head` is the embedding"), "{head}");
    let experts = |text: Value| {
        let model = model(json!({ "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2 }));
        Lora::new(&model, &config(text).unwrap()).unwrap_err().message
    };
    let parameter = json!({ "target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_proj"] });
    assert!(experts(parameter).contains("no parameter is called `mlp.experts.gate_proj`"));
    assert!(experts(json!({ "target_modules": ["gate_proj"] })).contains("together with `up_proj` alone"));
    assert!(experts(json!({ "target_modules": ["down_proj"], "use_dora": true })).contains("have no magnitudes"));
}

#[test]
fn adapters_of_experts_are_stored_as_peft_wraps_them() {
    let experts = model(json!({
        "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 6, "num_hidden_layers": 1,
    }));
    let stored = |parameters: Value| {
        let text = json!({ "target_modules": ["q_proj"], "target_parameters": parameters, "r": 3 });
        let lora = Lora::new(&experts, &config(text).unwrap()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let files = ModelFiles::read(&golden()).unwrap();
        save_adapter(dir.path(), &files, &lora, None, |_, out| {
            out.iter_mut().enumerate().for_each(|(place, out)| *out = place as f32);
            Ok(())
        })
        .unwrap();
        let file = AdapterFile::open(dir.path(), &lora).unwrap();
        for (_, spec) in lora.stored() {
            let mut values = vec![0.0; spec.elements()];
            file.read_f32(&spec.name, &mut values).unwrap();
            assert!((0..values.len()).all(|place| values[place] == place as f32), "{}", spec.name);
        }
        let file = SafetensorsFile::open(&dir.path().join("adapter_model.safetensors")).unwrap();
        let experts =
            |name: &String| name.contains("experts").then(|| name.replace("base_model.model.model.layers.0.mlp.", ""));
        let names: Vec<String> = file.names().iter().filter_map(experts).collect();
        let shape = |name: &str| {
            let name = format!("base_model.model.model.layers.0.mlp.{name}");
            let mut values = vec![0.0; file.info(&name).unwrap().1.iter().product()];
            file.read_f32(&name, &mut values).unwrap();
            (file.info(&name).unwrap().1.to_vec(), values[1])
        };
        let shapes: Vec<(Vec<usize>, f32)> = names.iter().map(|name| shape(name)).collect();
        (names, shapes)
    };
    let (mut names, _) = stored(json!(["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]));
    names.sort();
    let both = ["base_layer.lora_A", "base_layer.lora_B", "lora_A", "lora_B"];
    assert_eq!(names, both.map(|name| format!("experts.{name}.weight")));
    // The second column of B's first row is the second expert's first: 12 rows of 3 further in memory.
    let (names, shapes) = stored(json!(["mlp.experts.gate_up_proj"]));
    assert_eq!(names.len(), 2);
    assert!(shapes.contains(&(vec![4 * 3, 16], 1.0)) && shapes.contains(&(vec![12, 3 * 4], 36.0)), "{shapes:?}");
}

#[test]
fn ranks_and_factors_follow_the_first_pattern_that_matches_the_end_of_a_name() {
    let of = |changes: Value| {
        let mut text = json!({ "target_modules": ["q_proj", "o_proj"], "r": 4, "lora_alpha": 8 });
        changes.as_object().unwrap().iter().for_each(|(key, value)| text[key] = value.clone());
        lora(text).unwrap().adapters.iter().map(|adapter| (adapter.rank, adapter.factor)).collect::<Vec<_>>()
    };
    assert_eq!(of(json!({})), [(4, 2.0); 6]);
    assert_eq!(of(json!({ "use_rslora": true })), [(4, 4.0); 6]);
    let patterns =
        json!({ "rank_pattern": { "layers.1.self_attn.o_proj": 2, "o_proj": 16 }, "alpha_pattern": { "q_proj": 1 } });
    assert_eq!(of(patterns), [(4, 0.25), (16, 0.5), (4, 0.25), (2, 4.0), (4, 0.25), (16, 0.5)]);
}

#[test]
fn whole_copies_untie_the_head_and_biases_of_adapted_layers_are_trained() {
    let text = json!({ "target_modules": ["q_proj", "k_proj", "v_proj"], "modules_to_save": ["lm_head"], "bias": "lora_only" });
    let found = lora(text).unwrap();
    assert!(!found.model.tie_word_embeddings);
    let stored: Vec<String> = found.stored().into_iter().map(|(name, _)| name).collect();
    assert_eq!(stored.iter().filter(|name| name.ends_with("self_attn.k_proj.base_layer.bias")).count(), 3);
    assert!(stored.contains(&"base_model.model.lm_head.weight".to_owned()));
    assert!(stored.contains(&"base_model.model.model.layers.2.self_attn.v_proj.lora_B.weight".to_owned()));
    assert!(lora(json!({ "target_modules": ["q_proj"] })).unwrap().model.tie_word_embeddings);
}

#[test]
fn a_configuration_is_what_it_was_after_writing_and_reading() {
    let text = json!({
        "target_modules": ["v_proj", "q_proj"], "r": 3, "lora_alpha": 4.5, "lora_dropout": 0.05, "use_rslora": true,
        "exclude_modules": ".*2.*", "layers_to_transform": [0, 1], "rank_pattern": { "q_proj": 2 }, "alpha_pattern": { "q": 1 },
        "modules_to_save": ["lm_head"], "bias": "lora_only", "peft_type": "LORA", "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "somewhere", "megatron_core": "megatron.core", "loftq_config": {}, "eva_config": null,
    });
    let read = config(text).unwrap();
    let written = read.to_json(Some("base"), &["q_proj".into(), "v_proj".into()]);
    let again = LoraConfig::from_json(&written, Path::new("again")).unwrap();
    let targets = Some(ModuleNames::List(vec!["q_proj".into(), "v_proj".into()]));
    assert_eq!(again, LoraConfig { target_modules: targets, ..read });
    let json: Value = serde_json::from_str(&written).unwrap();
    assert_eq!((&json["lora_dropout"], &json["base_model_name_or_path"]), (&json!(0.05), &json!("base")));
}

#[test]
fn targets_are_stored_as_peft_stores_them() {
    let names = |layers: usize| {
        let config = config(json!({ "target_modules": "all-linear" })).unwrap();
        let lora = Lora::new(&model(json!({ "num_hidden_layers": layers })), &config).unwrap();
        targets::target_names(&lora)
    };
    // Whole names below twenty, and last parts above.
    assert_eq!(names(2).len(), 14);
    assert_eq!(names(2)[0], "model.layers.0.mlp.down_proj");
    assert_eq!(names(3), ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]);
}

/// The small model of a golden case of this project.
fn golden() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../__test__/golden/window-bias")
}

#[test]
fn a_folder_has_what_was_written_and_another_models_is_refused() {
    let files = ModelFiles::read(&golden()).unwrap();
    let lora = |targets: Value| {
        let config = config(json!({ "target_modules": targets, "r": 2 })).unwrap();
        Lora::new(&files.config().unwrap(), &config).unwrap()
    };
    let dir = tempfile::tempdir().unwrap();
    let written = lora(json!(["q_proj", "down_proj"]));
    let value = |name: &str, place: usize| (name.len() * 100 + place) as f32;
    save_adapter(dir.path(), &files, &written, None, |name, out| {
        out.iter_mut().enumerate().for_each(|(place, out)| *out = value(name, place));
        Ok(())
    })
    .unwrap();
    assert!(!dir.path().join("config.json").exists());
    let file = SafetensorsFile::open(&dir.path().join("adapter_model.safetensors")).unwrap();
    assert_eq!(file.metadata("format"), Some("pt"));
    let read = Lora::new(&files.config().unwrap(), &LoraConfig::from_dir(dir.path()).unwrap()).unwrap();
    let file = AdapterFile::open(dir.path(), &read).unwrap();
    for (_, spec) in read.stored() {
        let mut values = vec![0.0; spec.elements()];
        file.read_f32(&spec.name, &mut values).unwrap();
        assert!((0..values.len()).all(|place| values[place] == value(&spec.name, place)), "{}", spec.name);
    }
    let message = |targets: Value| AdapterFile::open(dir.path(), &lora(targets)).unwrap_err().message;
    assert!(
        message(json!(["q_proj", "down_proj", "up_proj"]))
            .contains("has no `base_model.model.model.layers.0.mlp.up_proj")
    );
    assert!(message(json!(["q_proj"])).contains("is no part of this adapter"));
    let error = save_adapter(dir.path(), &files, &written, None, |_, out| {
        out.fill(f32::NAN);
        Ok(())
    });
    assert_eq!(error.unwrap_err().code, ErrorCode::NonFinite);
}

#[test]
fn a_merge_adds_the_product_and_unties_a_head_that_was_trained() {
    let files = ModelFiles::read(&golden()).unwrap();
    let tied = files.config().unwrap().tie_word_embeddings;
    let text = json!({ "target_modules": ["o_proj"], "r": 2, "lora_alpha": 3, "modules_to_save": ["lm_head"] });
    let lora = Lora::new(&files.config().unwrap(), &config(text).unwrap()).unwrap();
    let (adapter, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let value = |name: &str, place: usize| ((name.len() * 7 + place * 13) % 31) as f32 / 31.0 - 0.4;
    save_adapter(adapter.path(), &files, &lora, None, |name, out| {
        out.iter_mut().enumerate().for_each(|(place, out)| *out = value(name, place));
        Ok(())
    })
    .unwrap();
    merge_adapter(&golden(), adapter.path(), out.path(), None).unwrap();

    let merged = ModelConfig::from_dir(out.path()).unwrap();
    assert!(!merged.tie_word_embeddings);
    let (before, after) = (
        crate::Checkpoint::open(&golden(), &files.config().unwrap()).unwrap(),
        crate::Checkpoint::open(out.path(), &merged).unwrap(),
    );
    for spec in tensor_table(&merged) {
        let mut values = vec![0.0; spec.elements()];
        after.read_f32(&spec.name, &mut values).unwrap();
        if spec.role == Role::LmHead {
            assert!((0..values.len()).all(|place| values[place] == value(&spec.name, place)));
            continue;
        }
        let mut expected = vec![0.0; spec.elements()];
        before.read_f32(&spec.name, &mut expected).unwrap();
        if let Role::OWeight = spec.role {
            let module = spec.name.strip_suffix(".weight").unwrap();
            let (a, b) = (format!("{module}.lora_A.weight"), format!("{module}.lora_B.weight"));
            let columns = spec.shape[1];
            for (place, expected) in expected.iter_mut().enumerate() {
                let (row, column) = (place / columns, place % columns);
                let product: f32 = (0..2).map(|r| value(&b, row * 2 + r) * value(&a, r * columns + column)).sum();
                *expected += 1.5 * product;
            }
        }
        for (value, expected) in values.iter().zip(&expected) {
            assert!((value - expected).abs() <= 1e-6, "{}: {value} instead of {expected}", spec.name);
        }
    }
    assert!(tied, "the case is about a tied head");
}
