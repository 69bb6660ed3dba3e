//! Configurations of models that see, in every spelling; their table of tensors, weight decay, freezing and random weights.

use crate::seeing;

use std::collections::HashMap;

use arl_model::{
    Block, ErrorCode, Family, FreezePart, Mlp, ModelConfig, RopeAxes, RopeScaling, TensorSpec, VisionKind, WeightDtype,
    freeze_patterns, init_f32, tensor_table,
};
use seeing::{FAMILIES, config, model, parse};
use serde_json::{Value, json};

/// As released: Qwen2.5-VL-7B-Instruct.
const RELEASED_2_5: &str = r#"{
  "architectures": ["Qwen2_5_VLForConditionalGeneration"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
  "vision_start_token_id": 151652, "vision_end_token_id": 151653, "vision_token_id": 151654, "image_token_id": 151655,
  "video_token_id": 151656, "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02, "intermediate_size": 18944,
  "max_position_embeddings": 128000, "max_window_layers": 28, "model_type": "qwen2_5_vl", "num_attention_heads": 28,
  "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
  "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.41.2", "use_cache": true,
  "use_sliding_window": false, "vision_config": {"depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420,
  "num_heads": 16, "in_chans": 3, "out_hidden_size": 3584, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14,
  "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2, "temporal_patch_size": 2},
  "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "vocab_size": 152064
}"#;

/// As released: Qwen3-VL-4B-Instruct.
const RELEASED_3: &str = r#"{
  "architectures": ["Qwen3VLForConditionalGeneration"], "image_token_id": 151655, "model_type": "qwen3_vl", "text_config": {
  "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 151643, "dtype": "bfloat16", "eos_token_id": 151645,
  "head_dim": 128, "hidden_act": "silu", "hidden_size": 2560, "initializer_range": 0.02, "intermediate_size": 9728,
  "max_position_embeddings": 262144, "model_type": "qwen3_vl_text", "num_attention_heads": 32, "num_hidden_layers": 36,
  "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": {"mrope_interleaved": true, "mrope_section": [24, 20, 20],
  "rope_type": "default"}, "rope_theta": 5000000, "tie_word_embeddings": true, "use_cache": true, "vocab_size": 151936},
  "tie_word_embeddings": true, "transformers_version": "4.57.0.dev0", "video_token_id": 151656, "vision_config": {
  "deepstack_visual_indexes": [5, 11, 17], "depth": 24, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 1024, "in_channels": 3,
  "initializer_range": 0.02, "intermediate_size": 4096, "model_type": "qwen3_vl", "num_heads": 16, "num_position_embeddings": 2304,
  "out_hidden_size": 2560, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2}, "vision_end_token_id": 151653,
  "vision_start_token_id": 151652
}"#;

fn read(text: &str) -> ModelConfig {
    parse(&serde_json::from_str(text).unwrap()).unwrap()
}

#[test]
fn released_files_are_read_whole_with_the_sizes_that_they_have() {
    let old = read(RELEASED_2_5);
    assert_eq!((old.family, old.nested, old.unknown_keys.as_slice()), (Family::Qwen2_5Vl, false, &[][..]));
    assert_eq!((old.head_dim, old.rope.theta, old.dtype), (128, 1e6, Some(WeightDtype::Bf16)));
    assert!(old.qkv_bias && !old.qk_norm && !old.o_bias && old.rope.scaling == RopeScaling::Default);
    assert_eq!(old.rope.axes, Some(RopeAxes { sections: [16, 24, 24], interleaved: false }));
    let tower = old.vision.as_ref().unwrap();
    assert_eq!(
        (tower.kind, tower.head_dim(), tower.merged_size(), tower.patch_elements()),
        (VisionKind::Qwen2_5, 80, 5120, 1176)
    );
    assert_eq!((tower.window_side(), tower.num_position_embeddings, tower.image_token_id), (Some(4), None, 151_655));
    assert!(tower.is_windowed(6) && !tower.is_windowed(7) && tower.deepstack_visual_indexes.is_empty());
    // The published number of parameters.
    assert_eq!(old.num_parameters(), 8_292_166_656);
    let new = read(RELEASED_3);
    assert_eq!((new.family, new.nested, new.unknown_keys.as_slice()), (Family::Qwen3Vl, true, &[][..]));
    assert!(new.tie_word_embeddings && new.qk_norm && !new.qkv_bias);
    assert_eq!(
        (new.rope.theta, new.rope.axes.unwrap().sections, new.rope.axes.unwrap().interleaved),
        (5e6, [24, 20, 20], true)
    );
    let tower = new.vision.as_ref().unwrap();
    assert_eq!((tower.kind, tower.head_dim(), tower.position_side().unwrap().get()), (VisionKind::Qwen3, 64, 48));
    assert_eq!((tower.deepstack_visual_indexes.as_slice(), tower.window_size), (&[5, 11, 17][..], None));
    assert_eq!(new.num_parameters(), 4_437_815_808);
}

#[test]
fn keys_of_released_files_that_change_nothing_are_known() {
    let released = |family: &str, vision_type: &str, extra: Value| {
        let mut config: Value = serde_json::from_str(RELEASED_3).unwrap();
        config["model_type"] = json!(family);
        config["vision_config"]["model_type"] = json!(vision_type);
        config["text_config"]["model_type"] = json!(format!("{family}_text"));
        for (key, value) in extra.as_object().unwrap() {
            config["text_config"][key] = value.clone();
        }
        if family.starts_with("qwen3_5") {
            config["vision_config"]["deepstack_visual_indexes"] = json!([]);
        }
        parse(&config).unwrap()
    };
    let experts = json!({"decoder_sparse_step": 1, "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": true,
        "num_experts": 128, "num_experts_per_tok": 8});
    let moe = released("qwen3_vl_moe", "qwen3_vl_moe", experts);
    assert_eq!((moe.unknown_keys.as_slice(), moe.moe.unwrap().num_experts), (&[][..], 128));
    assert!(moe.layers.iter().all(|layer| matches!(layer.mlp, Mlp::Moe(moe) if moe.norm_topk_prob)));
    let hybrid = json!({"attn_output_gate": true, "full_attention_interval": 4, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128,
        "linear_num_key_heads": 16, "linear_num_value_heads": 48, "linear_value_head_dim": 128, "mamba_ssm_dtype": "float32",
        "mlp_only_layers": [], "mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": false, "head_dim": 256});
    let hybrid = released("qwen3_5", "qwen3_5", hybrid);
    assert_eq!((hybrid.unknown_keys.as_slice(), hybrid.rope.rotary_dim), (&[][..], 64));
    assert!(hybrid.vision.unwrap().deepstack_visual_indexes.is_empty());
}

#[test]
fn flat_and_nested_files_are_one_configuration() {
    let (flat, nested) = (config(Family::Qwen2_5Vl, false, true), config(Family::Qwen2_5Vl, true, true));
    let expected = parse(&nested).unwrap();
    assert_eq!(ModelConfig { nested: true, ..parse(&flat).unwrap() }, expected);
    // What transformers 4 writes: everything twice, old spellings, the tie inside and tokens of images there too.
    let mut both = flat.clone();
    both["text_config"] = nested["text_config"].clone();
    both["text_config"]["image_token_id"] = Value::Null;
    both["text_config"]["tie_word_embeddings"] = json!(true);
    both["text_config"]["rope_scaling"] = json!({"mrope_section": [1, 1, 1], "rope_type": "default", "type": "mrope"});
    both["text_config"].as_object_mut().unwrap().remove("rope_parameters");
    both.as_object_mut().unwrap().remove("rope_parameters");
    both["tie_word_embeddings"] = json!(false);
    assert_eq!(parse(&both).unwrap(), expected);
    // Of what is there twice the inner one counts, and the outer one is worth a warning where it differs.
    both["hidden_size"] = json!(14);
    assert_eq!(parse(&both).unwrap().unknown_keys, ["hidden_size"]);
    // The tie inside counts for Qwen2.5-VL alone.
    let mut new = config(Family::Qwen3Vl, true, false);
    new["text_config"]["tie_word_embeddings"] = json!(true);
    assert!(!parse(&new).unwrap().tie_word_embeddings);
}

#[test]
fn absent_keys_take_the_defaults_of_transformers() {
    let with_width = |family: &str, width: usize| {
        let tower = json!({"out_hidden_size": width});
        parse(&json!({"model_type": family, "text_config": {"hidden_size": width}, "vision_config": tower})).unwrap()
    };
    let old = with_width("qwen2_5_vl", 8192);
    assert_eq!((old.vocab_size, old.intermediate_size, old.num_hidden_layers), (152_064, 29_568, 80));
    assert_eq!((old.num_attention_heads, old.num_key_value_heads, old.rms_norm_eps), (64, 8, 1e-5));
    let tower = old.vision.unwrap();
    assert_eq!((tower.depth, tower.hidden_size, tower.intermediate_size, tower.patch_size), (32, 3584, 3420, 14));
    assert_eq!((tower.window_size, tower.fullatt_block_indexes.as_slice()), (Some(112), &[7, 15, 23, 31][..]));
    for (family, layers, theta) in [("qwen3_vl", 32, 5e5), ("qwen3_vl_moe", 24, 5e5), ("qwen3_5", 32, 1e4)] {
        let new = with_width(family, 3584);
        assert_eq!((new.num_hidden_layers, new.rope.theta), (layers, theta), "{family}");
        assert_eq!(new.max_position_embeddings, if family == "qwen3_5" { 32_768 } else { 128_000 });
        let tower = new.vision.unwrap();
        assert_eq!((tower.depth, tower.hidden_size, tower.intermediate_size, tower.num_heads), (27, 1152, 4304, 16));
        assert_eq!((tower.patch_size, tower.num_position_embeddings, tower.rope_theta), (16, Some(2304), 1e4));
        let deep: &[usize] = if family == "qwen3_5" { &[] } else { &[8, 16, 24] };
        assert_eq!(tower.deepstack_visual_indexes, deep, "{family}");
        assert_eq!(tower.image_token_id, if family == "qwen3_5" { 248_056 } else { 151_655 });
    }
    let moe = with_width("qwen3_vl_moe", 3584).moe.unwrap();
    assert_eq!((moe.num_experts, moe.num_experts_per_tok, moe.moe_intermediate_size), (60, 4, 1408));
    assert!(moe.norm_topk_prob);
}

#[test]
fn text_alone_has_no_tower_and_positions_of_one_axis() {
    for family in FAMILIES {
        let whole = model(family, true);
        assert!(whole.vision.is_some() && whole.rope.axes.is_some(), "{family}");
        let text = whole.clone().text_alone();
        assert!(text.vision.is_none() && text.rope.axes.is_none(), "{family}");
        let decoder: Vec<TensorSpec> =
            tensor_table(&whole).into_iter().filter(|spec| !spec.block.is_vision()).collect();
        assert_eq!(tensor_table(&text), decoder);
        // Neither a folder of text nor one that says nothing of a tower has one.
        let mut alone = config(family, true, true)["text_config"].clone();
        alone["tie_word_embeddings"] = json!(true);
        let alone = parse(&alone).unwrap();
        assert!(alone.vision.is_none() && alone.rope.axes.is_none() && !alone.nested, "{family}");
        assert_eq!(tensor_table(&alone), decoder);
        let mut blind = config(family, true, true);
        blind.as_object_mut().unwrap().remove("vision_config");
        assert_eq!(parse(&blind).unwrap().vision, None, "{family}");
    }
}

#[test]
fn what_is_not_built_or_wrong_is_refused_by_name() {
    let refused = |family: Family, change: &dyn Fn(&mut Value)| {
        let mut changed = config(family, true, false);
        change(&mut changed);
        let error = parse(&changed).expect_err("must be refused");
        assert_eq!(error.code, ErrorCode::Config);
        format!("{} ({})", error.message, error.hint)
    };
    let tower = |family: Family, key: &str, value: Value, why: &str| {
        let said = refused(family, &|config| config["vision_config"][key] = value.clone());
        assert!(said.contains(&format!("`vision_config.{key}`")) && said.contains(why), "{said}");
    };
    for family in FAMILIES {
        tower(family, "hidden_act", json!("quick_gelu"), "quick_gelu");
        tower(family, "spatial_merge_size", json!(3), "built is 2");
        tower(family, "temporal_patch_size", json!(1), "built is 2");
        tower(family, "in_channels", json!(4), "built is 3");
        tower(family, "patch_size", json!([2, 2]), "an integer");
        tower(family, "patch_size", json!(0), "an integer");
        tower(family, "depth", json!(0), "an integer");
        tower(family, "hidden_size", json!(12), "multiple of 4");
        tower(family, "head_dim", json!(8), "8");
        tower(family, "out_hidden_size", json!(8), "12");
        tower(family, "rope_parameters", json!(3), "an object");
        tower(family, "initializer_range", json!(-1), "negative");
        let said = refused(family, &|config| config["vision_config"] = json!("x"));
        assert!(said.contains("`vision_config` must be an object"), "{said}");
        let said = refused(family, &|config| config["image_token_id"] = json!(11));
        assert!(said.contains("`image_token_id` is 11, but `vocab_size` is 11"), "{said}");
        let said = refused(family, &|config| config["video_token_id"] = json!(9));
        assert!(said.contains("`video_token_id` is `image_token_id`"), "{said}");
        let said = refused(family, &|config| config["text_config"]["rope_parameters"]["mrope_section"] = json!([1, 2]));
        assert!(said.contains("mrope_section") && said.contains("three whole numbers"), "{said}");
        let said = refused(family, &|config| {
            config["quantization_config"] =
                json!({"quant_method": "bitsandbytes", "load_in_4bit": true, "bnb_4bit_quant_type": "nf4"});
        });
        assert!(said.contains("NF4"), "{said}");
    }
    for (value, why) in
        [(json!([0, 2]), "2 blocks"), (json!([1, 0]), "ascend"), (json!([0, 0]), "ascend"), (json!([-1]), "no block")]
    {
        tower(Family::Qwen3Vl, "deepstack_visual_indexes", value, why);
    }
    tower(Family::Qwen3_5, "deepstack_visual_indexes", json!([0]), "no DeepStack");
    tower(Family::Qwen3Vl, "num_position_embeddings", json!(8), "square");
    tower(Family::Qwen2_5Vl, "window_size", json!(3), "smaller");
    tower(Family::Qwen2_5Vl, "in_chans", json!(1), "built is 3");
    let said = refused(Family::Qwen2_5Vl, &|config| {
        config["text_config"]["rope_parameters"]["mrope_section"] = json!([1, 1, 2])
    });
    assert!(said.contains("mrope_section") && said.contains("half of a head, 3"), "{said}");
    let said = refused(Family::Qwen2_5Vl, &|config| config["text_config"]["head_dim"] = json!(8));
    assert!(said.contains("`text_config.head_dim` is 8"), "{said}");
    let said = refused(Family::Qwen3Vl, &|config| config["text_config"]["use_sliding_window"] = json!(true));
    assert!(said.contains("use_sliding_window") && said.contains("no window"), "{said}");
    let said =
        refused(Family::Qwen3Vl, &|config| config["vision_config"]["rope_parameters"] = json!({"rope_type": "yarn"}));
    assert!(said.contains("vision_config.rope_parameters.rope_type"), "{said}");
    let said = refused(Family::Qwen3Vl, &|config| config["model_type"] = json!("qwen2_vl"));
    assert!(said.contains("QuickGELU"), "{said}");
    let mut strange = config(Family::Qwen3Vl, true, false);
    strange["vision_config"]["dept"] = json!(1);
    strange["vision_config"]["rope_parameters"] = json!({"rope_theta": 5e3, "rope_type": "axial", "factor": 2});
    let strange = parse(&strange).unwrap();
    assert_eq!(strange.unknown_keys, ["vision_config.rope_parameters.factor", "vision_config.dept"]);
    assert_eq!(strange.vision.unwrap().rope_theta, 5e3);
}

#[test]
fn weight_decay_goes_by_names_and_classes_as_in_the_trainer() {
    for family in FAMILIES {
        for spec in tensor_table(&model(family, false)) {
            let by_name = ["bias", "layernorm", "_norm.", ".norm."].iter().any(|part| spec.name.contains(part));
            // LayerNorms, whatever they are called; RMSNorms of the old tower are known by name alone.
            let layer_norm = family != Family::Qwen2_5Vl && spec.block.is_vision() && spec.name.contains(".norm");
            assert_eq!(spec.decay, !by_name && !layer_norm, "{family} {}", spec.name);
        }
    }
    let decayed = |family: Family, name: &str| {
        tensor_table(&model(family, false)).into_iter().find(|spec| spec.name == name).map(|spec| spec.decay)
    };
    assert_eq!(decayed(Family::Qwen2_5Vl, "model.visual.merger.ln_q.weight"), Some(true));
    assert_eq!(decayed(Family::Qwen2_5Vl, "model.visual.blocks.1.norm2.weight"), Some(true));
    assert_eq!(decayed(Family::Qwen3Vl, "model.visual.blocks.1.norm2.weight"), Some(false));
    assert_eq!(decayed(Family::Qwen3Vl, "model.visual.pos_embed.weight"), Some(true));
}

#[test]
fn the_tower_follows_the_decoder_block_by_block() {
    let order = |block: Block| match block {
        Block::VisionEmbed => (1, 0),
        Block::Vision(index) => (2, index),
        Block::VisionMerger => (3, 0),
        Block::DeepStack(index) => (4, index),
        _ => (0, 0),
    };
    for family in FAMILIES {
        let config = model(family, true);
        let table = tensor_table(&config);
        assert!(table.windows(2).all(|pair| order(pair[0].block) <= order(pair[1].block)), "{family}");
        let names: std::collections::HashSet<&String> = table.iter().map(|spec| &spec.name).collect();
        assert_eq!(names.len(), table.len(), "{family}");
        let counted: usize = table.iter().map(TensorSpec::elements).sum();
        assert_eq!(config.num_parameters(), counted as u128, "{family}");
        assert!(table.iter().all(|spec| spec.name.starts_with("model.visual.") == spec.block.is_vision()));
        // A rank has a whole tower.
        let divided =
            |spec: &TensorSpec| spec.block.is_vision() && spec.slice(1, 2).unwrap().elements() != spec.elements();
        assert!(!table.iter().any(divided), "{family}");
    }
}

/// As the engine matches: `*` stands for any characters.
fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((start, end)) => name.strip_prefix(start).is_some_and(|rest| rest.ends_with(end)),
    }
}

#[test]
fn every_parameter_is_in_one_part_that_can_be_frozen_and_every_pattern_finds_some() {
    for family in FAMILIES {
        for tied in [false, true] {
            let config = model(family, tied);
            let table = tensor_table(&config);
            let mut found: HashMap<&str, Vec<FreezePart>> = HashMap::new();
            for part in FreezePart::ALL {
                assert_eq!(FreezePart::from_name(part.as_str()), Some(part));
                for pattern in freeze_patterns(&config, &[part]).unwrap() {
                    let hit: Vec<&str> =
                        table.iter().map(|spec| spec.name.as_str()).filter(|name| matches(&pattern, name)).collect();
                    assert!(!hit.is_empty(), "{family} {pattern}");
                    hit.into_iter().for_each(|name| found.entry(name).or_default().push(part));
                }
            }
            for spec in &table {
                let part = match spec.block {
                    Block::VisionEmbed | Block::Vision(_) => FreezePart::Vision,
                    Block::VisionMerger | Block::DeepStack(_) => FreezePart::Merger,
                    _ => FreezePart::Language,
                };
                assert_eq!(found[spec.name.as_str()], [part], "{family} {}", spec.name);
            }
            assert_eq!(freeze_patterns(&config, &[]).unwrap(), Vec::<String>::new());
            let error = freeze_patterns(&config.text_alone(), &[FreezePart::Merger]).unwrap_err();
            assert!(error.message.contains("`merger`") && error.code == ErrorCode::Config, "{error}");
        }
    }
    assert_eq!(FreezePart::from_name("tower"), None);
}

#[test]
fn random_weights_of_a_tower_are_those_of_its_own_configuration() {
    for family in FAMILIES {
        let mut wide = config(family, true, false);
        wide["text_config"]["initializer_range"] = json!(0.5);
        wide["vision_config"]["initializer_range"] = json!(0.04);
        wide["vision_config"]["intermediate_size"] = json!(600);
        let config = parse(&wide).unwrap();
        for spec in tensor_table(&config).into_iter().filter(|spec| spec.block.is_vision()) {
            let mut values = vec![f32::NAN; spec.elements()];
            init_f32(&config, &spec, 1, &mut values);
            let all = |expected: f32| values.iter().all(|&value| value == expected);
            let norm = spec.name.contains("norm") || spec.name.contains("ln_q");
            if spec.name.ends_with("bias") {
                assert!(all(0.0), "{family} {}", spec.name);
            } else if norm {
                assert!(all(1.0), "{family} {}", spec.name);
            } else {
                let count = values.len() as f64;
                let deviation = (values.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>() / count).sqrt();
                assert!(
                    (deviation / 0.04 - 1.0).abs() < 5.0 / (2.0 * count).sqrt(),
                    "{family} {}: {deviation}",
                    spec.name
                );
            }
        }
    }
}
