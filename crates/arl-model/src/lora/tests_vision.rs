//! What configurations name in a model that sees, and the names on the disk.

use std::path::Path;

use serde_json::{Value, json};

use super::*;
use crate::config::Family;
use crate::folder::ModelFiles;
use crate::format::CheckpointFormat;
use crate::weights::{Checkpoint, SafetensorsFile, save_model};

fn model(family: Family) -> ModelConfig {
    let old = family == Family::Qwen2_5Vl;
    let mut config = json!({
        "model_type": family.as_str(), "tie_word_embeddings": false, "image_token_id": 9, "video_token_id": 8,
        "vision_start_token_id": 7, "vision_end_token_id": 6,
        "text_config": {
            "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 4, "rope_parameters": {"mrope_section": [1, 1, 0]}, "num_experts": 4,
            "num_experts_per_tok": 2, "moe_intermediate_size": 6,
        },
        "vision_config": {
            "depth": 2, "hidden_size": 8, "num_heads": 2, "intermediate_size": 6, "patch_size": 2, "out_hidden_size": 16,
            "window_size": 8,
        },
    });
    if !old {
        config["vision_config"]["deepstack_visual_indexes"] = json!([1]);
    }
    ModelConfig::from_json(&config.to_string(), Path::new("config.json")).unwrap()
}

fn lora(model: &ModelConfig, text: Value) -> Result<Lora> {
    Lora::new(model, &LoraConfig::from_json(&text.to_string(), Path::new("adapter_config.json"))?)
}

const ATTENTION: &str = r".*language_model.*\.(q|v)_proj";

#[test]
fn patterns_match_the_names_that_peft_sees_and_adapters_are_stored_under_them() {
    for family in [Family::Qwen2_5Vl, Family::Qwen3Vl, Family::Qwen3VlMoe] {
        let model = model(family);
        for targets in
            [json!(ATTENTION), json!(["q_proj", "v_proj"]), json!(["language_model.layers.0.self_attn.q_proj"])]
        {
            let found = lora(&model, json!({ "target_modules": targets, "r": 3 })).unwrap();
            assert_eq!(
                found.adapters.len(),
                if targets[0].as_str().is_some_and(|name| name.len() > 9) { 1 } else { 4 }
            );
            // This program's own names are those of the table.
            assert_eq!(found.adapters[0].module, "model.layers.0.self_attn.q_proj");
            let stored = found.stored();
            assert_eq!(stored[0].0, "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight");
            assert_eq!(stored[0].1.name, "model.layers.0.self_attn.q_proj.lora_A.weight");
            assert!(found.table.iter().all(|spec| !(spec.block.is_vision() && spec.trainable)), "{family}");
        }
        // The decoder has no other class in transformers, with or without its tower here.
        let alone = model.clone().text_alone();
        assert_eq!(lora(&alone, json!({ "target_modules": ATTENTION })).unwrap().adapters.len(), 4);
        let ranks = json!({ "target_modules": ["q_proj"], "rank_pattern": { "model.language_model.layers.1.self_attn.q_proj": 5 } });
        let ranks: Vec<usize> = lora(&model, ranks).unwrap().adapters.iter().map(|adapter| adapter.rank).collect();
        assert_eq!(ranks, [8, 5]);
    }
    // Qwen3.5 is a causal model of text as well.
    let text = json!({ "target_modules": ["gate_proj"] });
    let mut hybrid = model(Family::Qwen3Vl);
    (hybrid.family, hybrid.rope.axes) = (Family::Qwen3_5, None);
    let first = |model: &ModelConfig| lora(model, text.clone()).unwrap().stored()[0].0.clone();
    assert!(first(&hybrid).starts_with("base_model.model.model.language_model.layers.0."));
    assert!(first(&hybrid.text_alone()).starts_with("base_model.model.model.layers.0."));
}

#[test]
fn names_that_hit_the_tower_by_pefts_rules_are_refused_with_the_way_around_it() {
    let refusal = |family: Family, targets: Value| {
        let error = lora(&model(family), json!({ "target_modules": targets })).unwrap_err();
        assert_eq!(error.code, ErrorCode::Config);
        format!("{} ({})", error.message, error.hint)
    };
    let new =
        ["qkv", "proj", "linear_fc1", "linear_fc2", "attn.proj", "patch_embed.proj", "merger.linear_fc1", "pos_embed"];
    for item in new {
        let said = refusal(Family::Qwen3Vl, json!([item]));
        assert!(
            said.contains("`model.visual.") && said.contains("vision tower") && said.contains("language_model"),
            "{said}"
        );
    }
    for item in ["gate_proj", "down_proj", "mlp.0", "mlp.2"] {
        assert!(refusal(Family::Qwen2_5Vl, json!([item])).contains("vision tower"), "{item}");
    }
    for family in [Family::Qwen2_5Vl, Family::Qwen3Vl, Family::Qwen3VlMoe] {
        assert!(refusal(family, json!("all-linear")).contains("`model.visual.blocks.0.attn.qkv`"), "{family}");
        assert!(refusal(family, json!(".*")).contains("cannot have an adapter"), "{family}");
        // The tower is not there in a run of text alone, and can be left out by name.
        let found = |model: &ModelConfig, text: Value| lora(model, text).unwrap().counts();
        let alone = found(&model(family).text_alone(), json!({ "target_modules": "all-linear" }));
        let without = json!({ "target_modules": "all-linear", "exclude_modules": ".*visual.*" });
        assert_eq!(found(&model(family), without), alone);
        let whole = json!({ "target_modules": "all-linear", "modules_to_save": ["visual"] });
        assert_eq!(found(&model(family), whole), alone);
        // Neither experts, which are parameters, nor the router.
        assert_eq!(alone.len(), if family == Family::Qwen3VlMoe { 4 } else { 7 }, "{alone:?}");
    }
    let experts = json!({ "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], "r": 2 });
    let experts = lora(&model(Family::Qwen3VlMoe), experts).unwrap();
    let stored: Vec<String> = experts.stored().into_iter().map(|(name, _)| name).collect();
    assert!(
        stored.contains(
            &"base_model.model.model.language_model.layers.1.mlp.experts.base_layer.lora_A.weight".to_owned()
        )
    );
    assert!(stored.contains(&"base_model.model.model.language_model.layers.1.mlp.experts.lora_B.weight".to_owned()));
}

#[test]
fn the_merger_can_be_trained_as_a_whole_next_to_adapters() {
    let model = model(Family::Qwen3Vl);
    let found = lora(&model, json!({ "target_modules": ["q_proj"], "modules_to_save": ["merger"] })).unwrap();
    let trained: Vec<String> =
        found.stored().into_iter().map(|(name, _)| name).filter(|name| !name.contains("lora")).collect();
    let merger =
        ["norm.weight", "norm.bias", "linear_fc1.weight", "linear_fc1.bias", "linear_fc2.weight", "linear_fc2.bias"];
    assert_eq!(trained, merger.map(|name| format!("base_model.model.model.visual.merger.{name}")));
    let error = lora(&model, json!({ "target_modules": ["q_proj"], "modules_to_save": ["mergers"] })).unwrap_err();
    assert!(error.message.contains("no module is called `mergers`"), "{error}");
}

#[test]
fn an_adapter_of_either_class_is_read_and_written_with_the_names_of_its_own() {
    let whole = model(Family::Qwen3Vl);
    // The same decoder as a causal model of text.
    let mut text = whole.clone().text_alone();
    (text.family, text.nested) = (Family::Qwen3, false);
    let of = |model: &ModelConfig| lora(model, json!({ "target_modules": ["q_proj"], "r": 3 })).unwrap();
    let (source, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    std::fs::write(source.path().join("config.json"), "{}").unwrap();
    let files = ModelFiles::read(source.path()).unwrap();
    for (written, read, prefix) in [
        (of(&whole), of(&text), "base_model.model.model.language_model."),
        (of(&text), of(&whole), "base_model.model.model.layers."),
    ] {
        let fill = |name: &str, out: &mut [f32]| {
            out.iter_mut().enumerate().for_each(|(place, out)| *out = (place + name.len()) as f32);
            Ok(())
        };
        save_adapter(dir.path(), &files, &written, None, fill).unwrap();
        let file = SafetensorsFile::open(&dir.path().join("adapter_model.safetensors")).unwrap();
        assert!(file.names().iter().all(|name| name.starts_with(prefix)), "{prefix}");
        for reader in [&written, &read] {
            let file = AdapterFile::open(dir.path(), reader).unwrap();
            for (_, spec) in reader.stored() {
                let (mut found, mut expected) = (vec![0f32; spec.elements()], vec![0f32; spec.elements()]);
                file.read_f32(&spec.name, &mut found).unwrap();
                fill(&spec.name, &mut expected).unwrap();
                assert_eq!(found, expected, "{prefix} {}", spec.name);
            }
        }
    }
}

#[test]
fn a_merge_takes_adapters_of_runs_with_and_without_images_and_leaves_the_tower_as_it_is() {
    let text = |family: Family| {
        let tower = json!({"depth": 1, "hidden_size": 8, "num_heads": 2, "intermediate_size": 6, "patch_size": 2, "out_hidden_size": 16});
        let decoder = json!({"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "rope_parameters": {"mrope_section": [2, 1, 1]}});
        json!({"model_type": family.as_str(), "image_token_id": 9, "text_config": decoder, "vision_config": tower})
            .to_string()
    };
    for (family, module) in [(Family::Qwen2_5Vl, "gate_proj"), (Family::Qwen3_5, "down_proj")] {
        let dirs: [_; 3] = std::array::from_fn(|_| tempfile::tempdir().unwrap());
        let [source, base, adapter] = dirs.each_ref().map(tempfile::TempDir::path);
        std::fs::write(source.join("config.json"), text(family)).unwrap();
        let files = ModelFiles::read(source).unwrap();
        let whole = files.config().unwrap();
        let weights = |name: &str, out: &mut [f32]| {
            out.iter_mut().enumerate().for_each(|(place, out)| *out = (place % 7 + name.len()) as f32 / 8.0);
            Ok(())
        };
        save_model(base, &files, &whole, &CheckpointFormat::new(&whole), None, u64::MAX, weights).unwrap();
        // Of Qwen2.5-VL the name hits the tower too, which a run of text alone does not have.
        let asked = json!({ "target_modules": [module], "r": 1, "lora_alpha": 1 });
        assert_eq!(lora(&whole, asked.clone()).is_err(), family == Family::Qwen2_5Vl);
        let trained = lora(&whole.clone().text_alone(), asked).unwrap();
        let ones = |_: &str, out: &mut [f32]| {
            out.fill(1.0);
            Ok(())
        };
        save_adapter(adapter, &files, &trained, None, ones).unwrap();
        let out = tempfile::tempdir().unwrap();
        merge_adapter(base, adapter, out.path(), None).unwrap();
        let merged = Checkpoint::open(out.path(), &whole).unwrap();
        for spec in tensor_table(&whole) {
            let (mut found, mut expected) = (vec![0f32; spec.elements()], vec![0f32; spec.elements()]);
            merged.read_f32(&spec.name, &mut found).unwrap();
            weights(&spec.name, &mut expected).unwrap();
            if spec.name == format!("model.layers.0.mlp.{module}.weight") {
                expected.iter_mut().for_each(|weight| *weight += 1.0);
            }
            assert_eq!(found, expected, "{family} {}", spec.name);
        }
    }
}
