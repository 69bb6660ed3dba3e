//! Configurations: both spellings, defaults, which keys have an effect and which are refused by name.

use std::path::Path;

use arl_model::{ErrorCode, Family, Mixer, Mlp, ModelConfig, RopeScaling, WeightDtype};
use serde_json::{Value, json};

fn parse(value: &Value) -> arl_model::Result<ModelConfig> {
    ModelConfig::from_json(&value.to_string(), Path::new("dir/config.json"))
}

/// A small model of the family, with the keys of `extra` added or replaced (null in `extra` is kept).
fn with(family: &str, extra: Value) -> Value {
    let mut config = json!({
        "model_type": family, "vocab_size": 320, "hidden_size": 48, "intermediate_size": 112, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    });
    for (key, value) in extra.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

fn accepted(family: &str, extra: Value) -> ModelConfig {
    parse(&with(family, extra)).unwrap()
}

/// The message and the hint of the error.
fn refused(family: &str, extra: Value) -> String {
    let shown = extra.to_string();
    let error = parse(&with(family, extra)).expect_err(&shown);
    assert_eq!(error.code, ErrorCode::Config);
    assert!(error.message.starts_with("dir/config.json: "), "{}", error.message);
    format!("{} {}", error.message, error.hint)
}

#[test]
fn absent_keys_take_the_defaults_of_transformers() {
    let qwen2 = parse(&json!({"model_type": "qwen2"})).unwrap();
    assert_eq!((qwen2.vocab_size, qwen2.hidden_size, qwen2.intermediate_size), (151_936, 4096, 22_016));
    assert_eq!((qwen2.num_hidden_layers, qwen2.num_attention_heads, qwen2.num_key_value_heads), (32, 32, 32));
    assert_eq!((qwen2.head_dim, qwen2.max_position_embeddings), (128, 32_768));
    assert_eq!((qwen2.rms_norm_eps, qwen2.initializer_range, qwen2.rope.theta), (1e-6, 0.02, 10_000.0));
    assert!(!qwen2.tie_word_embeddings && qwen2.qkv_bias && !qwen2.o_bias && !qwen2.qk_norm);
    let qwen3 = parse(&json!({"model_type": "qwen3", "hidden_size": 1024})).unwrap();
    assert_eq!((qwen3.head_dim, qwen3.num_key_value_heads), (128, 32));
    assert!(!qwen3.qkv_bias && !qwen3.o_bias && qwen3.qk_norm && qwen3.padding_idx.is_none());
    let moe = parse(&json!({"model_type": "qwen3_moe"})).unwrap();
    assert_eq!((moe.hidden_size, moe.intermediate_size, moe.num_hidden_layers), (2048, 6144, 24));
    assert_eq!((moe.num_attention_heads, moe.num_key_value_heads, moe.head_dim), (32, 4, 64));
    let experts = moe.moe.unwrap();
    assert_eq!((experts.num_experts, experts.num_experts_per_tok, experts.moe_intermediate_size), (128, 8, 768));
    assert!(!experts.norm_topk_prob);
    assert!(
        moe.layers
            .iter()
            .all(|layer| layer.mlp == Mlp::Moe(experts) && layer.mixer == Mixer::Attention { window: None })
    );
    assert!(moe.delta.is_none() && experts.shared_expert_intermediate_size.is_none());
}

#[test]
fn both_spellings_are_the_same_configuration() {
    let yarn = json!({"factor": 4.0, "original_max_position_embeddings": 1024});
    let mut old_rope = yarn.clone();
    old_rope["type"] = json!("yarn");
    let mut new_rope = yarn;
    new_rope["rope_type"] = json!("yarn");
    new_rope["rope_theta"] = json!(1e6);
    let old = accepted(
        "qwen3",
        json!({"torch_dtype": "bfloat16", "rope_theta": 1e6, "rope_scaling": old_rope, "use_sliding_window": true,
            "sliding_window": 7, "max_window_layers": 2}),
    );
    let new = accepted(
        "qwen3",
        json!({"dtype": "bfloat16", "rope_parameters": new_rope, "use_sliding_window": true, "sliding_window": 7,
            "layer_types": ["full_attention", "full_attention", "sliding_attention", "sliding_attention"]}),
    );
    assert_eq!(old, new);
    assert_eq!(old.dtype, Some(WeightDtype::Bf16));
    assert!(matches!(old.rope.scaling, RopeScaling::Yarn { factor: 4.0, .. }));
    let old = accepted("qwen3_moe", json!({"num_experts": 8, "rope_theta": 5e5, "rope_scaling": null}));
    let new = accepted("qwen3_moe", json!({"num_local_experts": 8, "rope_parameters": {"rope_theta": 500_000}}));
    assert_eq!(old, new);
}

#[test]
fn the_type_of_weights_is_read_as_torch_names_it_and_auto_leaves_it_to_the_files() {
    for (name, dtype) in [
        ("bfloat16", Some(WeightDtype::Bf16)),
        ("torch.bfloat16", Some(WeightDtype::Bf16)),
        ("torch.float32", Some(WeightDtype::F32)),
        ("half", Some(WeightDtype::F16)),
        ("auto", None),
    ] {
        for key in ["dtype", "torch_dtype"] {
            assert_eq!(accepted("qwen3", json!({ key: name })).dtype, dtype, "{name}");
        }
    }
    // The newer key counts, as in transformers.
    let both = accepted("qwen3", json!({"torch_dtype": "float16", "dtype": "torch.bfloat16"}));
    assert_eq!(both.dtype, Some(WeightDtype::Bf16));
    for name in ["float8_e4m3fn", "torch.auto", "torch.int8", ""] {
        assert!(refused("qwen3", json!({ "dtype": name })).contains(&format!("`dtype` `{name}` is not supported")));
    }
}

#[test]
fn windows_are_per_layer_in_the_dense_families_and_for_all_in_the_moe() {
    let window = |mixer| if let Mixer::Attention { window } = mixer { window } else { Some(0) };
    let windows = |config: ModelConfig| config.layers.iter().map(|layer| window(layer.mixer)).collect::<Vec<_>>();
    let on = json!({"use_sliding_window": true, "sliding_window": 7, "max_window_layers": 3});
    assert_eq!(windows(accepted("qwen2", on.clone())), [None, None, None, Some(7)]);
    assert_eq!(windows(accepted("qwen3_moe", on)), [Some(7); 4]);
    let off = json!({"use_sliding_window": false, "sliding_window": 7, "max_window_layers": 0});
    assert_eq!(windows(accepted("qwen2", off)), [None; 4]);
    let unset = json!({"use_sliding_window": true, "max_window_layers": 0});
    assert_eq!(windows(accepted("qwen3", unset)), [Some(4096); 4]);
    let text = refused("qwen3", json!({"layer_types": vec!["sliding_attention"; 4]}));
    assert!(text.contains("`layer_types`") && text.contains("use_sliding_window"), "{text}");
    for types in
        [json!(["full_attention"]), json!(vec!["linear_attention"; 4]), json!("full_attention"), json!([1, 2, 3, 4])]
    {
        assert!(refused("qwen2", json!({"layer_types": types})).contains("`layer_types`"));
    }
    let mixed = json!({"layer_types": ["full_attention", "full_attention", "sliding_attention", "full_attention"],
        "use_sliding_window": true});
    assert!(refused("qwen3_moe", mixed).contains("`layer_types`"));
}

#[test]
fn experts_are_where_the_configuration_puts_them() {
    let sparse = |extra: Value| {
        let config = accepted("qwen3_moe", extra);
        config.layers.iter().map(|layer| matches!(layer.mlp, Mlp::Moe(_))).collect::<Vec<_>>()
    };
    assert_eq!(sparse(json!({})), [true; 4]);
    assert_eq!(sparse(json!({"decoder_sparse_step": 2})), [false, true, false, true]);
    assert_eq!(sparse(json!({"mlp_only_layers": [0, 3]})), [false, true, true, false]);
    assert_eq!(sparse(json!({"mlp_only_layers": null})), [true; 4]);
    assert!(refused("qwen3_moe", json!({"mlp_only_layers": [4]})).contains("`mlp_only_layers`"));
    assert!(refused("qwen3_moe", json!({"decoder_sparse_step": 0})).contains("`decoder_sparse_step`"));
    assert!(
        refused("qwen3_moe", json!({"num_experts": 4, "num_experts_per_tok": 5})).contains("`num_experts_per_tok`")
    );
    assert!(refused("qwen3_moe", json!({"num_experts": 4, "num_local_experts": 5})).contains("`num_experts`"));
}

#[test]
fn biases_follow_the_family() {
    let bias = |family, value| {
        let config = accepted(family, json!({ "attention_bias": value }));
        (config.qkv_bias, config.o_bias, config.unknown_keys.len())
    };
    assert_eq!(bias("qwen3", true), (true, true, 0));
    assert_eq!(bias("qwen3_moe", false), (false, false, 0));
    // transformers' Qwen2 never reads the key.
    assert_eq!(bias("qwen2", false), (true, false, 1));
}

#[test]
fn what_is_not_built_is_refused_by_name() {
    for (key, value) in [
        ("quantization_config", json!({"quant_method": "gptq"})),
        ("text_config", json!({"hidden_size": 8})),
        ("vision_config", json!({"depth": 2})),
        ("hidden_act", json!("gelu")),
        ("attention_dropout", json!(0.1)),
        ("partial_rotary_factor", json!(0.5)),
        ("is_causal", json!(false)),
        ("use_mrope", json!(true)),
        ("mlp_bias", json!(true)),
        ("per_layer_config", json!({"0": {"hidden_size": 4}})),
        ("router_jitter_noise", json!(0.01)),
        ("shared_expert_intermediate_size", json!(64)),
        ("is_encoder_decoder", json!(true)),
        ("dtype", json!("float64")),
        ("torch_dtype", json!("float8_e4m3fn")),
    ] {
        for family in ["qwen2", "qwen3", "qwen3_moe"] {
            let text = refused(family, json!({ key: value }));
            assert!(text.contains(&format!("`{key}`")), "{text}");
        }
    }
    accepted(
        "qwen2",
        json!({"use_mrope": false, "quantization_config": null, "attention_dropout": 0, "hidden_act": "silu"}),
    );
}

#[test]
fn other_models_are_refused_with_the_supported_ones_named() {
    for name in ["llama", "qwen2_moe", "qwen2_vl", "qwen4_exp", "qwen3_5_vision", "Qwen3", ""] {
        let text = refused(name, json!({}));
        assert!(
            text.contains(&format!("`{name}`")) && text.contains("qwen2 (Qwen2, Qwen2.5), qwen3, qwen3_moe"),
            "{text}"
        );
        assert_eq!(text.contains("hyper-connections"), name == "qwen4_exp", "{text}");
    }
    let error = parse(&json!({"hidden_size": 4})).unwrap_err();
    assert!(error.message.contains("`model_type` is missing"));
    for (family, name) in [
        ("qwen2", Family::Qwen2),
        ("qwen3", Family::Qwen3),
        ("qwen3_moe", Family::Qwen3Moe),
        ("qwen3_next", Family::Qwen3Next),
        ("qwen3_5_text", Family::Qwen3_5),
        ("qwen3_5_moe_text", Family::Qwen3_5Moe),
        ("qwen3_vl_text", Family::Qwen3Vl),
        ("qwen3_vl_moe_text", Family::Qwen3VlMoe),
    ] {
        assert_eq!(accepted(family, json!({})).family, name);
    }
}

#[test]
fn wrong_values_are_refused_with_key_and_value() {
    let sizes = [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
    ];
    for key in sizes {
        for value in
            [json!(0), json!(-1), json!(48.5), json!("48"), json!(true), json!([1]), json!(u64::MAX), json!(1e300)]
        {
            let text = refused("qwen3", json!({ key: value }));
            assert!(text.contains(&format!("`{key}`")), "{text}");
        }
    }
    for (key, value) in [
        ("num_attention_heads", json!(5)),
        ("head_dim", json!(15)),
        ("head_dim", json!(2048)),
        ("rms_norm_eps", json!(-1e-6)),
        ("rms_norm_eps", json!("1e-6")),
        ("rms_norm_eps", json!(null)),
        ("initializer_range", json!(-0.1)),
        ("tie_word_embeddings", json!(1)),
        ("tie_word_embeddings", json!("true")),
        ("attention_bias", json!(null)),
        ("pad_token_id", json!(320)),
        ("pad_token_id", json!(-321)),
        ("pad_token_id", json!("0")),
        ("sliding_window", json!(-1)),
        ("rope_theta", json!(0)),
        ("rope_theta", json!(-1e4)),
        ("rope_theta", json!("1e4")),
        ("rope_scaling", json!("yarn")),
        ("max_window_layers", json!(-1)),
    ] {
        let text = refused("qwen3", json!({ key: value }));
        assert!(text.contains(&format!("`{key}`")), "{text}");
    }
    let text = refused("qwen2", json!({"head_dim": null, "hidden_size": 50}));
    assert!(text.contains("`hidden_size` (50)"), "{text}");
    // Each size is possible, but not all of them together.
    let text = refused("qwen3", json!({"hidden_size": 4_000_000, "intermediate_size": 4_000_000}));
    assert!(text.contains("parameters"), "{text}");
}

#[test]
fn wrong_rope_parameters_are_refused_with_key() {
    let factors = |count: usize| vec![1.5; count];
    for (rope, key) in [
        (json!({"rope_type": "proportional"}), "rope_type"),
        (json!({"rope_type": 3}), "rope_type"),
        (json!({"rope_type": "linear", "type": "yarn", "factor": 2}), "rope_type"),
        (json!({"rope_type": "linear"}), "factor"),
        (json!({"rope_type": "linear", "factor": 0}), "factor"),
        (json!({"rope_type": "dynamic", "factor": "2"}), "factor"),
        (json!({"rope_type": "yarn"}), "factor"),
        (json!({"rope_type": "yarn", "factor": 2, "beta_fast": 1, "beta_slow": 2}), "beta_fast"),
        (json!({"rope_type": "yarn", "factor": 2, "attention_factor": -1}), "attention_factor"),
        (json!({"rope_type": "yarn", "factor": 2, "truncate": 1}), "truncate"),
        (json!({"rope_type": "llama3", "factor": 2, "low_freq_factor": 1}), "high_freq_factor"),
        (json!({"rope_type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 1}), "high_freq_factor"),
        (json!({"rope_type": "longrope", "short_factor": factors(8)}), "long_factor"),
        (json!({"rope_type": "longrope", "short_factor": factors(7), "long_factor": factors(8)}), "short_factor"),
        (json!({"rope_type": "longrope", "short_factor": vec![0.0; 8], "long_factor": factors(8)}), "short_factor"),
        (json!({"partial_rotary_factor": 0.25}), "partial_rotary_factor"),
        (json!({"rope_theta": null}), "rope_theta"),
    ] {
        let text = refused("qwen3", json!({ "rope_parameters": rope }));
        assert!(text.contains(&format!("`rope_parameters.{key}`")), "{text}");
    }
    let text = refused("qwen3", json!({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}));
    assert!(text.contains("`rope_parameters`"), "{text}");
    let text = refused(
        "qwen3",
        json!({"rope_parameters": {"rope_theta": 1.0}, "rope_scaling": {"type": "linear", "factor": 2}}),
    );
    assert!(text.contains("`rope_scaling`"), "{text}");
}

#[test]
fn keys_that_nobody_reads_are_named_and_known_ones_are_not() {
    let config = accepted(
        "qwen3",
        json!({"hiden_size": 3, "num_experts": 8, "transformers_version": "5.0", "eos_token_id": [1, 2], "use_cache": true,
            "rope_parameters": {"rope_type": "linear", "factor": 2, "beta_fast": 3}}),
    );
    assert_eq!(config.unknown_keys, ["rope_parameters.beta_fast", "hiden_size", "num_experts"]);
}

#[test]
fn the_row_for_padding_is_counted_as_torch_does() {
    let padding = |value: Value| accepted("qwen2", json!({ "pad_token_id": value })).padding_idx;
    assert_eq!(padding(json!(null)), None);
    assert_eq!(padding(json!(7)), Some(7));
    assert_eq!(padding(json!(-1)), Some(319));
}

#[test]
fn texts_that_are_no_configuration_are_errors_with_the_file() {
    let deep = "[".repeat(100_000);
    let deep_key = format!("{{\"model_type\":{deep}");
    for text in ["", "[]", "null", "{", "{\"model_type\": }", "\u{feff}{}", &deep, &deep_key] {
        let error = ModelConfig::from_json(text, Path::new("x/config.json")).unwrap_err();
        assert_eq!(error.code, ErrorCode::Config);
        assert!(error.message.starts_with("x/config.json"), "{}", error.message);
    }
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(ModelConfig::from_dir(&dir.path().join("absent")).unwrap_err().code, ErrorCode::Config);
    assert!(ModelConfig::from_dir(dir.path()).unwrap_err().message.contains("config.json"));
    std::fs::write(dir.path().join("config.json"), [b'{', 0xff]).unwrap();
    assert!(ModelConfig::from_dir(dir.path()).unwrap_err().message.contains("not UTF-8 at byte 1"));
    std::fs::remove_file(dir.path().join("config.json")).unwrap();
    std::fs::create_dir(dir.path().join("config.json")).unwrap();
    assert_eq!(ModelConfig::from_dir(dir.path()).unwrap_err().code, ErrorCode::Config);
}

#[test]
fn the_balance_loss_is_taken_up_where_transformers_adds_it() {
    let coefficient = |keys| accepted("qwen3_moe", keys).moe.and_then(|moe| moe.router_aux_loss_coef);
    assert_eq!(coefficient(json!({})), None);
    assert_eq!(coefficient(json!({"output_router_logits": true})), Some(0.001));
    assert_eq!(coefficient(json!({"output_router_logits": true, "router_aux_loss_coef": 0.02})), Some(0.02));
    assert_eq!(coefficient(json!({"output_router_logits": true, "router_aux_loss_coef": 0.0})), None);
}
