//! Weights in 4 bits: an engine with them computes what one with the values that they stand for computes, to the bit, and quantizes
//! as bitsandbytes does.

use crate::common;
use crate::golden::runner::nf4_folder;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use arl_engine::backend::DType;
use arl_engine::backend::cpu::CpuBackend;
use arl_engine::{Engine, EngineOptions, GenerateOptions, Kind, Nf4Options, Recompute, Weights};
use arl_model::{
    CheckpointFormat, Dtype, ErrorCode, MAX_SHARD_BYTES, ModelConfig, ModelFiles, NF4_VALUES, Nf4, Nf4Builder,
    Nf4Scales, SafetensorsFile, SafetensorsWriter, TensorDecl, nf4_scale_values, save_model, tensor_table,
};
use common::adapters::{LEVELS, batches, bits, trained, with};
use common::{HYPER, MODELS, TYPES, difference, model, options};
use serde_json::{Value, json};

fn text() -> Value {
    json!({ "target_modules": ["q_proj", "v_proj", "o_proj"], "r": 3, "lora_alpha": 6 })
}

fn in_nf4(base: EngineOptions, nested: bool) -> EngineOptions {
    EngineOptions { load_in_4bit: Some(Nf4Options { nested }), ..base }
}

fn open(dir: &Path, options: &EngineOptions) -> Engine<CpuBackend> {
    Engine::open(Box::new(CpuBackend::new()), dir, Weights::Checkpoint, options).unwrap()
}

/// A folder with the values that a model's weights in 4 bits stand for.
fn decoded(dir: &Path, nested: bool) -> tempfile::TempDir {
    let base = EngineOptions { inference_only: true, ..options(DType::F32, Recompute::Off, 1) };
    let mut engine = open(dir, &in_nf4(base, nested));
    let files = ModelFiles::read(dir).unwrap();
    let config = files.config().unwrap();
    let values: HashMap<String, Vec<f32>> = tensor_table(&config)
        .iter()
        .map(|spec| (spec.name.clone(), engine.read_tensor(&spec.name, Kind::Weights).unwrap()))
        .collect();
    let out = tempfile::tempdir().unwrap();
    let format = CheckpointFormat::new(&config);
    save_model(out.path(), &files, &config, &format, None, MAX_SHARD_BYTES, |name, out| {
        out.copy_from_slice(&values[name]);
        Ok(())
    })
    .unwrap();
    out
}

#[test]
fn training_and_generation_are_those_of_the_values_to_the_bit() {
    for name in MODELS {
        for nested in [false, true] {
            let folder = decoded(&model(name), nested);
            for dtype in TYPES {
                let mut text = text();
                // Magnitudes are the norms of what the 4 bits stand for.
                text["use_dora"] = json!(nested);
                let run = |dir: &Path, base: EngineOptions| {
                    let mut engine = open(dir, &with(base, &text));
                    let losses: Vec<u64> =
                        (0..3).map(|_| engine.step(&batches(), HYPER).unwrap().loss.to_bits()).collect();
                    let names = trained(&engine);
                    let (options, prompts) = (GenerateOptions::greedy(6), [vec![1, 2, 3], vec![30]]);
                    (losses, bits(&mut engine, &names, Kind::Weights), engine.generate(&prompts, &options).unwrap())
                };
                let expected = run(folder.path(), options(dtype, Recompute::Norms, 33));
                for recompute in LEVELS {
                    let actual = run(&model(name), in_nf4(options(dtype, recompute, 33), nested));
                    assert!(actual == expected, "{name} {nested} {dtype:?} {recompute:?}");
                }
            }
        }
    }
}

/// A model of the delta rule and of experts with a shared one, with random weights.
fn hybrid(model_type: &str, hidden: usize) -> tempfile::TempDir {
    let config = json!({
        "model_type": model_type, "vocab_size": 32, "hidden_size": hidden, "num_hidden_layers": 4, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 8, "linear_value_head_dim": 4, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 8, "shared_expert_intermediate_size": 12, "tie_word_embeddings": false,
    });
    let (source, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    std::fs::write(source.path().join("config.json"), config.to_string()).unwrap();
    let base = EngineOptions { inference_only: true, ..options(DType::F32, Recompute::Off, 1) };
    let cpu = Box::new(CpuBackend::new());
    let mut engine = Engine::open(cpu, source.path(), Weights::Random(7), &base).unwrap();
    engine.export_model(out.path(), None).unwrap();
    out
}

#[test]
fn projections_of_the_delta_rule_and_the_shared_expert_are_in_4_bits_too() {
    let dir = hybrid("qwen3_5_moe_text", 16);
    let folder = decoded(dir.path(), true);
    let base = EngineOptions { inference_only: true, ..options(DType::F32, Recompute::Off, 1) };
    let (mut plain, mut values) = (open(dir.path(), &base), open(folder.path(), &base));
    for (name, narrow) in [
        ("linear_attn.in_proj_qkv", true),
        ("linear_attn.in_proj_z", true),
        ("linear_attn.in_proj_b", true),
        ("linear_attn.in_proj_a", true),
        ("linear_attn.out_proj", true),
        ("linear_attn.conv1d", false),
        ("mlp.shared_expert.gate_proj", true),
        ("mlp.shared_expert.down_proj", true),
        ("mlp.shared_expert_gate", true),
        ("mlp.gate", false),
    ] {
        let name = format!("model.layers.0.{name}.weight");
        let [a, b] = [&mut plain, &mut values].map(|engine| engine.read_tensor(&name, Kind::Weights).unwrap());
        assert_eq!(a != b, narrow, "{name}");
    }
    let text = json!({ "target_modules": "all-linear", "r": 3, "lora_alpha": 6 });
    for dtype in TYPES {
        let run = |dir: &Path, base: EngineOptions| {
            let mut engine = open(dir, &with(base, &text));
            let losses: Vec<u64> = (0..3).map(|_| engine.step(&batches(), HYPER).unwrap().loss.to_bits()).collect();
            let names = trained(&engine);
            let prompts = [vec![1, 2, 3], vec![30]];
            let replies = engine.generate(&prompts, &GenerateOptions::greedy(6)).unwrap();
            (losses, bits(&mut engine, &names, Kind::Weights), replies)
        };
        let expected = run(folder.path(), options(dtype, Recompute::Norms, 33));
        for recompute in LEVELS {
            let actual = run(dir.path(), in_nf4(options(dtype, recompute, 33), true));
            assert!(actual == expected, "{dtype:?} {recompute:?}");
        }
    }
}

/// Writes a model's folder as bitsandbytes does: these tensors of its file in NF4, with scales in 8 bits.
fn write_quantized(dir: &Path, out: &Path, is_linear: impl Fn(&str) -> bool) {
    let mut config: Value = serde_json::from_str(&std::fs::read_to_string(dir.join("config.json")).unwrap()).unwrap();
    config["quantization_config"] = json!({
        "quant_method": "bitsandbytes", "load_in_4bit": true, "load_in_8bit": false, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": true, "bnb_4bit_compute_dtype": "float32", "bnb_4bit_quant_storage": "uint8",
    });
    std::fs::write(out.join("config.json"), config.to_string()).unwrap();
    let file = SafetensorsFile::open(&dir.join("model.safetensors")).unwrap();
    let floats = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
    let mut tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
    for name in file.names() {
        let (dtype, shape) = file.info(&name).map(|(dtype, shape)| (dtype, shape.to_vec())).unwrap();
        if !is_linear(&name) {
            tensors.push((name.clone(), dtype, shape, file.bytes(&name).unwrap().to_vec()));
            continue;
        }
        let nf4 = quantized(&file, &name);
        let Nf4Scales::Nested { codes, largest, offset } = nf4.scales else { panic!("nested scales") };
        let about = json!({
            "quant_type": "nf4", "blocksize": 64, "shape": shape, "dtype": "float32", "nested_blocksize": 256,
            "nested_offset": offset, "nested_dtype": "float32",
        });
        let about = about.to_string().into_bytes();
        for (end, dtype, bytes) in [
            ("", Dtype::U8, nf4.codes),
            (".absmax", Dtype::U8, codes),
            (".nested_absmax", Dtype::F32, floats(&largest)),
            (".quant_map", Dtype::F32, floats(&NF4_VALUES)),
            (".nested_quant_map", Dtype::F32, floats(nf4_scale_values())),
            (".quant_state.bitsandbytes__nf4", Dtype::U8, about),
        ] {
            let len = if dtype == Dtype::F32 { bytes.len() / 4 } else { bytes.len() };
            tensors.push((format!("{name}{end}"), dtype, vec![len], bytes));
        }
    }
    tensors.sort_by_key(|(_, dtype, ..)| *dtype != Dtype::F32);
    let declare = |(name, dtype, shape, _): &(String, Dtype, Vec<usize>, Vec<u8>)| TensorDecl {
        name: name.clone(),
        dtype: *dtype,
        shape: shape.clone(),
    };
    let declared: Vec<TensorDecl> = tensors.iter().map(declare).collect();
    let path = out.join("model.safetensors");
    let mut writer = SafetensorsWriter::create(&path, &[("format", "pt")], &declared).unwrap();
    tensors.iter().for_each(|(.., bytes)| writer.append(bytes).unwrap());
    writer.finish().unwrap();
}

/// A tensor of a file in NF4 as a whole.
fn quantized(file: &SafetensorsFile, name: &str) -> Nf4 {
    let mut values = vec![0f32; file.info(name).unwrap().1.iter().product()];
    file.read_f32(name, &mut values).unwrap();
    let mut builder = Nf4Builder::default();
    builder.push(&values);
    builder.finish(true)
}

#[test]
fn fused_projections_have_the_numbers_of_the_tensors_in_their_files() {
    let dir = hybrid("qwen3_next", 64);
    let folder = decoded(dir.path(), true);
    let read = |dir: &Path| SafetensorsFile::open(&dir.join("model.safetensors")).unwrap();
    let (original, values) = (read(dir.path()), read(folder.path()));
    for name in ["linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba", "linear_attn.out_proj"] {
        let name = format!("model.layers.0.{name}.weight");
        let mut stored = vec![0f32; values.info(&name).unwrap().1.iter().product()];
        let mut expected = stored.clone();
        values.read_f32(&name, &mut stored).unwrap();
        quantized(&original, &name).read(0, &mut expected);
        assert!(stored == expected, "{name}");
    }
    let base = EngineOptions { inference_only: true, ..options(DType::F32, Recompute::Off, 1) };
    let by_others = tempfile::tempdir().unwrap();
    let linear =
        ["in_proj_qkvz", "in_proj_ba", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj", "shared_expert_gate"];
    write_quantized(dir.path(), by_others.path(), |name| {
        let layer = linear.iter().any(|layer| name.ends_with(&format!(".{layer}.weight")));
        layer || name.contains(".shared_expert.")
    });
    let (mut stored, mut quantized) = (open(by_others.path(), &base), open(dir.path(), &in_nf4(base, true)));
    for name in stored.tensor_names() {
        let [a, b] = [&mut stored, &mut quantized].map(|engine| engine.read_tensor(&name, Kind::Weights).unwrap());
        assert!(a == b, "{name}");
    }
    let text = json!({ "target_modules": ["o_proj", "out_proj"], "r": 3, "lora_alpha": 6 });
    let run = |dir: &Path, base: EngineOptions| {
        let mut engine = open(dir, &with(base, &text));
        let losses: Vec<u64> = (0..2).map(|_| engine.step(&batches(), HYPER).unwrap().loss.to_bits()).collect();
        let names = trained(&engine);
        (losses, bits(&mut engine, &names, Kind::Weights))
    };
    let base = options(DType::F32, Recompute::Norms, 33);
    assert!(run(dir.path(), in_nf4(base.clone(), true)) == run(folder.path(), base));
}

#[test]
fn fused_projections_whose_rows_are_no_whole_blocks_are_refused_by_name() {
    let dir = hybrid("qwen3_next", 16);
    let base = EngineOptions { inference_only: true, ..options(DType::F32, Recompute::Off, 1) };
    let opened = Engine::open(Box::new(CpuBackend::new()), dir.path(), Weights::Checkpoint, &in_nf4(base, true));
    let error = opened.map(|_| ()).unwrap_err();
    assert!(error.code == ErrorCode::Config && error.message.contains("hidden_size is 16"), "{error}");
}

#[test]
fn they_take_half_a_byte_and_their_scales_and_no_workspace() {
    let bytes = |dir: &Path, options: &EngineOptions| open(dir, options).memory().categories;
    let deep = |categories: &[(&str, usize)], name: &str| {
        categories.iter().find(|(category, _)| *category == name).map_or(0, |(_, bytes)| *bytes)
    };
    let base = EngineOptions { inference_only: true, ..options(DType::Bf16, Recompute::Norms, 33) };
    let dir = model("qwen2-window");
    let (plain, nf4) = (bytes(&dir, &base), bytes(&dir, &in_nf4(base.clone(), true)));
    assert!(deep(&nf4, "weights in 4 bits") > 0 && deep(&plain, "weights in 4 bits") == 0);
    assert!(deep(&nf4, "weights") < deep(&plain, "weights"));
    // Up to gaps, what left the one is in the other: 16 bits became 4.13, with 64 bytes for what begins.
    let config = ModelConfig::from_dir(&dir).unwrap();
    let linear = |name: &str| name.ends_with("_proj.weight");
    let table = tensor_table(&config);
    let elements: usize = table.iter().filter(|spec| linear(&spec.name)).map(arl_model::TensorSpec::elements).sum();
    let gone = deep(&plain, "weights") - deep(&nf4, "weights");
    assert!(gone >= 2 * elements && gone < 2 * elements + 64 * table.len(), "{gone} of {}", 2 * elements);
    assert_eq!(deep(&nf4, "workspace"), deep(&plain, "workspace"));
}

#[test]
fn without_adapters_they_are_refused_for_training_and_saving() {
    let base = in_nf4(options(DType::F32, Recompute::Norms, 33), true);
    let opened = Engine::open(Box::new(CpuBackend::new()), &model("window-bias"), Weights::Checkpoint, &base);
    let error = opened.map(|_| ()).unwrap_err();
    assert!(error.code == ErrorCode::Config && error.message.contains("weights in 4 bits are frozen"), "{error}");
    let mut engine = open(&model("window-bias"), &EngineOptions { inference_only: true, ..base });
    let dir = tempfile::tempdir().unwrap();
    assert!(engine.export_model(dir.path(), None).unwrap_err().message.contains("in 4 bits saves no model"));
}

fn shared_case() -> Option<PathBuf> {
    let default = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared");
    let case = std::env::var_os("ARL_SHARED").map_or_else(default, PathBuf::from).join("golden/lora/qlora-qwen3");
    if case.is_dir() {
        return Some(case);
    }
    eprintln!("SKIPPED: {} is not there", case.display());
    None
}

#[test]
fn a_model_quantized_as_it_is_read_is_the_folder_that_bitsandbytes_wrote() {
    let Some(case) = shared_case() else { return };
    let folder = tempfile::tempdir().unwrap();
    nf4_folder::write_nf4_folder(&case, folder.path()).unwrap();
    let base = EngineOptions { inference_only: true, ..options(DType::F32, Recompute::Off, 1) };
    let mut stored = open(folder.path(), &base);
    let mut quantized = open(&case.join("base"), &in_nf4(base, true));
    for name in stored.tensor_names() {
        let (a, b) =
            (stored.read_tensor(&name, Kind::Weights).unwrap(), quantized.read_tensor(&name, Kind::Weights).unwrap());
        // But for the mean of the scales, which may be summed in another order.
        assert!(difference(&b, &a) < 1e-6, "{name}");
    }
    let changed = |key: &str, value: Value| {
        let text = std::fs::read_to_string(folder.path().join("config.json")).unwrap();
        let mut config: Value = serde_json::from_str(&text).unwrap();
        config["quantization_config"][key] = value;
        ModelConfig::from_json(&config.to_string(), Path::new("config.json"))
    };
    assert_eq!(changed("bnb_4bit_quant_type", json!("nf4")).unwrap().nf4, Some(true));
    assert_eq!(changed("bnb_4bit_use_double_quant", json!(false)).unwrap().nf4, Some(false));
    for (key, value) in [
        ("bnb_4bit_quant_type", json!("fp4")),
        ("load_in_4bit", json!(false)),
        ("quant_method", json!("gptq")),
        ("llm_int8_skip_modules", json!(["lm_head", "model.layers.0.mlp"])),
    ] {
        assert!(changed(key, value).unwrap_err().message.contains("`quantization_config`"), "{key}");
    }
}
