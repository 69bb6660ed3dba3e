//! Weights in and out: what is written reads back to the same bits, and damaged or foreign files are errors that name
//! file and tensor.

#![allow(clippy::unwrap_used, clippy::expect_used)] // helpers of tests

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use arl_model::{
    Checkpoint, Dtype, Error, ErrorCode, Layout, ModelConfig, ModelFiles, SafetensorsFile, SafetensorsWriter,
    TensorDecl, WeightDtype, available_bytes, init_f32, save_model, saved_bytes, tensor_table,
};
use half::{bf16, f16};
use serde_json::{Value, json};
use tempfile::TempDir;

fn config(family: &str, tied: bool) -> (String, ModelConfig) {
    let text = format!(
        "{{\n  \"model_type\": \"{family}\", \"rms_norm_eps\": 1e-06,\n  \"vocab_size\": 40, \"hidden_size\": 16, \
         \"intermediate_size\": 24, \"num_hidden_layers\": 2, \"num_attention_heads\": 4, \"num_key_value_heads\": 2, \
         \"head_dim\": 4, \"num_experts\": 3, \"num_experts_per_tok\": 2, \"moe_intermediate_size\": 8, \
         \"mlp_only_layers\": [1], \"tie_word_embeddings\": {tied},\n  \"a\": {{\"dtype\": \"float32\"}}, \"torch_dtype\" : \"float32\"}}\n"
    );
    let config = ModelConfig::from_json(&text, Path::new("config.json")).unwrap();
    (text, config)
}

/// A source folder with configuration and tokenizer, and no weights.
fn source(text: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), text).unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), "{\"x\": 1.0}").unwrap();
    std::fs::write(dir.path().join("chat_template.jinja"), "{{ messages }}\n").unwrap();
    std::fs::create_dir(dir.path().join("additional_chat_templates")).unwrap();
    std::fs::write(dir.path().join("additional_chat_templates/tool.jinja"), "tool").unwrap();
    std::fs::write(dir.path().join("README.md"), "not part of a model").unwrap();
    dir
}

fn weights(config: &ModelConfig) -> HashMap<String, Vec<f32>> {
    let fill = |spec: &arl_model::TensorSpec| {
        let mut values = vec![0f32; spec.elements()];
        init_f32(config, spec, 7, &mut values);
        (spec.name.clone(), values)
    };
    tensor_table(config).iter().map(fill).collect()
}

fn save(dir: &Path, source: &Path, config: &ModelConfig, dtype: WeightDtype, shard: u64) -> arl_model::Result<()> {
    let weights = weights(config);
    save_model(dir, &ModelFiles::read(source)?, config, Layout::default(), dtype, shard, |name, out| {
        out.copy_from_slice(&weights[name]);
        Ok(())
    })
}

/// A complete folder with weights in f32.
fn model(family: &str, tied: bool, shard: u64) -> (TempDir, ModelConfig) {
    let (text, config) = config(family, tied);
    let source = source(&text);
    let dir = tempfile::tempdir().unwrap();
    save(dir.path(), source.path(), &config, WeightDtype::F32, shard).unwrap();
    (dir, config)
}

fn refused(dir: &Path, config: &ModelConfig) -> Error {
    let error = Checkpoint::open(dir, config).expect_err("must be refused");
    assert_eq!(error.code, ErrorCode::Weights, "{error}");
    error
}

/// A tensor of a file under construction.
type Entry = (String, Dtype, Vec<usize>, Vec<u8>);

fn entries(path: &Path) -> Vec<Entry> {
    let file = SafetensorsFile::open(path).unwrap();
    let entry = |name: String| {
        let (dtype, shape) = file.info(&name).unwrap();
        (name.clone(), dtype, shape.to_vec(), file.bytes(&name).unwrap().to_vec())
    };
    file.names().into_iter().map(entry).collect()
}

fn write(path: &Path, entries: &[Entry]) {
    let declared: Vec<TensorDecl> = entries
        .iter()
        .map(|(name, dtype, shape, _)| TensorDecl { name: name.clone(), dtype: *dtype, shape: shape.clone() })
        .collect();
    let mut writer = SafetensorsWriter::create(path, &[("format", "pt")], &declared).unwrap();
    for (_, _, _, bytes) in entries {
        writer.append(bytes).unwrap();
    }
    writer.finish().unwrap();
}

#[test]
fn a_saved_model_opens_again_with_the_same_bits() {
    for family in ["qwen2", "qwen3", "qwen3_moe"] {
        for (tied, shard) in [(false, u64::MAX), (true, u64::MAX), (true, 4000), (false, 1)] {
            let (dir, config) = model(family, tied, shard);
            let checkpoint = Checkpoint::open(dir.path(), &config).unwrap();
            assert_eq!(checkpoint.dtype(), WeightDtype::F32);
            assert_eq!(checkpoint.files().count() > 1, shard < u64::MAX);
            let mut bytes = 0;
            for (name, values) in weights(&config) {
                let mut read = vec![0f32; values.len()];
                checkpoint.read_f32(&name, &mut read).unwrap();
                assert_eq!(read, values, "{name}");
                bytes += values.len() as u128 * 4;
            }
            assert_eq!(bytes, saved_bytes(&config, WeightDtype::F32));
        }
    }
}

#[test]
fn shards_respect_their_bound_and_the_index_agrees() {
    let (dir, config) = model("qwen3", false, 5000);
    let index: Value =
        serde_json::from_slice(&std::fs::read(dir.path().join("model.safetensors.index.json")).unwrap()).unwrap();
    assert_eq!(index["metadata"]["total_size"].as_u64().map(u128::from), Some(saved_bytes(&config, WeightDtype::F32)));
    assert_eq!(index["weight_map"].as_object().unwrap().len(), tensor_table(&config).len());
    let count = Checkpoint::open(dir.path(), &config).unwrap().files().count();
    for number in 1..=count {
        let path = dir.path().join(format!("model-{number:05}-of-{count:05}.safetensors"));
        let file = SafetensorsFile::open(&path).unwrap();
        assert_eq!(file.metadata("format"), Some("pt"));
        let sizes: Vec<usize> = file.names().iter().map(|name| file.bytes(name).unwrap().len()).collect();
        assert!(sizes.iter().sum::<usize>() <= 5000 || sizes.len() == 1, "{sizes:?}");
    }
}

#[test]
fn the_configuration_is_copied_but_for_the_type_and_the_tokenizer_as_it_is() {
    let (text, config) = config("qwen3", true);
    let source = source(&text);
    let read = |dir: &TempDir, name: &str| std::fs::read_to_string(dir.path().join(name));
    for (dtype, expected) in [
        (WeightDtype::F32, text.clone()),
        (WeightDtype::Bf16, text.replace("\"torch_dtype\" : \"float32\"", "\"torch_dtype\" : \"bfloat16\"")),
    ] {
        let dir = tempfile::tempdir().unwrap();
        save(dir.path(), source.path(), &config, dtype, u64::MAX).unwrap();
        assert_eq!(read(&dir, "config.json").unwrap(), expected);
        for name in ["tokenizer.json", "chat_template.jinja", "additional_chat_templates/tool.jinja"] {
            assert_eq!(read(&dir, name).unwrap(), read(&source, name).unwrap());
        }
        assert!(read(&dir, "README.md").is_err());
    }
}

#[test]
fn narrow_types_round_to_nearest_even_and_widen_exactly() {
    let (text, config) = config("qwen2", true);
    let source = source(&text);
    for dtype in [WeightDtype::Bf16, WeightDtype::F16] {
        let dir = tempfile::tempdir().unwrap();
        save(dir.path(), source.path(), &config, dtype, u64::MAX).unwrap();
        let checkpoint = Checkpoint::open(dir.path(), &config).unwrap();
        assert_eq!(checkpoint.dtype(), dtype);
        for (name, values) in weights(&config) {
            let round = |&value: &f32| match dtype {
                WeightDtype::Bf16 => bf16::from_f32(value).to_f32(),
                _ => f16::from_f32(value).to_f32(),
            };
            let rounded: Vec<f32> = values.iter().map(round).collect();
            let mut read = vec![0f32; values.len()];
            checkpoint.read_f32(&name, &mut read).unwrap();
            assert_eq!(read, rounded);
            let mut read = vec![bf16::ZERO; values.len()];
            checkpoint.read_bf16(&name, &mut read).unwrap();
            assert_eq!(read, rounded.iter().map(|&value| bf16::from_f32(value)).collect::<Vec<_>>());
        }
    }
    // Halfway between two neighbours: to the one with an even last bit.
    assert_eq!(bf16::from_f32(f32::from_bits(0x3f80_8000)).to_bits(), 0x3f80);
    assert_eq!(bf16::from_f32(f32::from_bits(0x3f81_8000)).to_bits(), 0x3f82);
}

#[test]
fn missing_surplus_and_misshapen_tensors_are_named() {
    let (dir, config) = model("qwen3_moe", false, u64::MAX);
    let path = dir.path().join("model.safetensors");
    let whole = entries(&path);
    let change = |change: &dyn Fn(&mut Vec<Entry>)| {
        let mut entries = whole.clone();
        change(&mut entries);
        write(&path, &entries);
        refused(dir.path(), &config).message
    };
    let norm = |entries: &mut Vec<Entry>| entries.iter().position(|entry| entry.0 == "model.norm.weight").unwrap();
    let text = change(&|entries| {
        let at = norm(entries);
        entries.remove(at);
    });
    assert!(text.contains("missing (1): model.norm.weight"), "{text}");
    let text = change(&|entries| entries.push(("score.weight".to_owned(), Dtype::F32, vec![1], vec![0; 4])));
    assert!(text.contains("surplus (1): score.weight"), "{text}");
    let text = change(&|entries| {
        let at = norm(entries);
        entries[at].2 = vec![4, 4];
    });
    assert!(text.contains("of the wrong shape (1): model.norm.weight is [4, 4], not [16]"), "{text}");
    let text = change(&|entries| {
        let at = norm(entries);
        entries[at].1 = Dtype::I32;
    });
    assert!(text.contains("model.norm.weight is I32"), "{text}");
    let text = change(&|entries| entries.truncate(2));
    let missing = tensor_table(&config).len() - 2;
    assert!(text.contains(&format!("missing ({missing}): ")) && text.matches("model.layers").count() == 5, "{text}");
    let text = change(&|entries| entries.clear());
    assert!(text.contains("missing"), "{text}");
    // What follows from the configuration may be there, as in old files.
    let mut old = whole.clone();
    old.push(("model.layers.0.self_attn.rotary_emb.inv_freq".to_owned(), Dtype::F32, vec![2], vec![0; 8]));
    write(&path, &old);
    Checkpoint::open(dir.path(), &config).unwrap();
}

#[test]
fn a_stored_head_of_a_tied_model_must_be_the_embedding() {
    let (dir, config) = model("qwen2", true, u64::MAX);
    let path = dir.path().join("model.safetensors");
    let mut tensors = entries(&path);
    let mut head = tensors.iter().find(|entry| entry.0 == "model.embed_tokens.weight").unwrap().clone();
    head.0 = "lm_head.weight".to_owned();
    tensors.push(head);
    write(&path, &tensors);
    Checkpoint::open(dir.path(), &config).unwrap();
    tensors.last_mut().unwrap().3[17] ^= 1;
    write(&path, &tensors);
    let error = refused(dir.path(), &config);
    assert!(
        error.message.contains("`lm_head.weight` differs") && error.hint.contains("tie_word_embeddings"),
        "{error}"
    );
}

#[test]
fn values_that_are_not_finite_are_errors_with_tensor_and_place() {
    let (dir, config) = model("qwen3", true, u64::MAX);
    let path = dir.path().join("model.safetensors");
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut tensors = entries(&path);
        let tensor = tensors.iter_mut().find(|entry| entry.0 == "model.embed_tokens.weight").unwrap();
        tensor.3[(3 * 16 + 5) * 4..][..4].copy_from_slice(&bad.to_le_bytes());
        write(&path, &tensors);
        let checkpoint = Checkpoint::open(dir.path(), &config).unwrap();
        let error = checkpoint.read_f32("model.embed_tokens.weight", &mut [0.0; 640]).unwrap_err();
        assert_eq!(error.code, ErrorCode::Weights);
        assert!(
            error.message.contains("`model.embed_tokens.weight`") && error.message.contains("at [3, 5]"),
            "{error}"
        );
        let error = checkpoint.read_bf16("model.embed_tokens.weight", &mut [bf16::ZERO; 640]).unwrap_err();
        assert!(error.message.contains("at [3, 5]"), "{error}");
    }
}

#[test]
fn a_place_beyond_the_first_window_is_named_rightly() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    let (rows, columns) = (3000, 1000);
    let mut values = vec![1f32; rows * columns];
    values[2345 * columns + 678] = f32::NAN;
    let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    write(&path, &[("w".to_owned(), Dtype::F32, vec![rows, columns], bytes)]);
    let file = SafetensorsFile::open(&path).unwrap();
    let error = file.read_f32("w", &mut values).unwrap_err();
    assert!(error.message.contains("at [2345, 678]"), "{error}");
}

#[test]
fn a_file_cut_at_any_byte_is_an_error() {
    let (dir, config) = model("qwen3", true, u64::MAX);
    let path = dir.path().join("model.safetensors");
    let whole = std::fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(*whole.first_chunk().unwrap()) as usize;
    let inside = (header..whole.len()).step_by(97);
    for length in
        (0..header).step_by(7).chain(0..24).chain(header - 3..header + 3).chain(inside).chain([whole.len() - 1])
    {
        std::fs::write(&path, &whole[..length]).unwrap();
        let error = refused(dir.path(), &config);
        assert!(error.message.contains("model.safetensors"), "{length}: {error}");
    }
    let mut longer = whole.clone();
    longer.push(0);
    std::fs::write(&path, &longer).unwrap();
    assert!(refused(dir.path(), &config).message.contains("bytes too many"));
    std::fs::write(&path, &whole).unwrap();
    Checkpoint::open(dir.path(), &config).unwrap();
}

#[test]
fn a_lying_header_is_an_error() {
    let (dir, config) = model("qwen3", true, u64::MAX);
    let path = dir.path().join("model.safetensors");
    let whole = std::fs::read(&path).unwrap();
    let length = u64::from_le_bytes(*whole.first_chunk().unwrap());
    for lie in [0, 1, length - 1, length + 1, length + 8, whole.len() as u64, 1 << 30, 1 << 40, u64::MAX] {
        let mut bytes = whole.clone();
        bytes[..8].copy_from_slice(&lie.to_le_bytes());
        std::fs::write(&path, &bytes).unwrap();
        refused(dir.path(), &config);
    }
    // Every byte of the header in turn: either refused, or a change that changes nothing that counts (in a space, or in
    // the free entries).
    let mut survived = 0;
    for at in 8..8 + length as usize {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x15;
        std::fs::write(&path, &bytes).unwrap();
        match Checkpoint::open(dir.path(), &config) {
            Err(error) => assert_eq!(error.code, ErrorCode::Weights),
            Ok(_) => survived += 1,
        }
    }
    assert!(survived < 32, "{survived}");
    for tensor in [
        json!({"dtype": "F32", "shape": [2], "data_offsets": [0, 800]}),
        json!({"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}),
        json!({"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}),
        json!({"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}),
        json!({"dtype": "F32", "shape": [u64::MAX, u64::MAX], "data_offsets": [0, 8]}),
        json!({"dtype": "F32", "shape": [-1], "data_offsets": [0, 8]}),
        json!({"dtype": "Q4", "shape": [2], "data_offsets": [0, 8]}),
        json!({"dtype": "F32", "shape": [2]}),
        json!([]),
        json!(null),
    ] {
        let header = json!({ "w": tensor }).to_string();
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend_from_slice(&[0; 8]);
        std::fs::write(&path, &bytes).unwrap();
        let error = SafetensorsFile::open(&path).expect_err(&header);
        assert!(error.code == ErrorCode::Weights && error.message.contains("model.safetensors"), "{error}");
    }
}

#[test]
fn folders_without_usable_weights_are_errors_with_advice() {
    let (text, config) = config("qwen3", true);
    let dir = source(&text);
    let error = refused(dir.path(), &config);
    assert!(error.message.contains("no weights") && error.hint.contains("--init_from_config"), "{error}");
    std::fs::write(dir.path().join("pytorch_model.bin"), "x").unwrap();
    let error = refused(dir.path(), &config);
    assert!(error.message.contains("pytorch_model.bin") && error.hint.contains("safetensors"), "{error}");
    std::fs::create_dir(dir.path().join("model.safetensors")).unwrap();
    assert!(refused(dir.path(), &config).message.contains("not a file"));
    std::fs::remove_dir(dir.path().join("model.safetensors")).unwrap();
    std::fs::write(dir.path().join("model.safetensors"), "").unwrap();
    assert!(refused(dir.path(), &config).message.contains("is empty"));
}

#[test]
fn shards_that_are_missing_or_disagree_with_the_index_are_named() {
    let (dir, config) = model("qwen3", true, 4000);
    let index = dir.path().join("model.safetensors.index.json");
    let good = std::fs::read(&index).unwrap();
    let shards: Vec<PathBuf> = Checkpoint::open(dir.path(), &config).unwrap().files().map(Path::to_path_buf).collect();
    let name = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().to_owned();
    let aside = dir.path().join("aside");
    std::fs::rename(&shards[1], &aside).unwrap();
    let error = refused(dir.path(), &config);
    assert!(error.message.contains(&format!("missing (1): {}", name(&shards[1]))), "{error}");
    std::fs::copy(&shards[0], &shards[1]).unwrap();
    assert!(refused(dir.path(), &config).message.contains(&name(&shards[1])));
    std::fs::rename(&aside, &shards[1]).unwrap();
    for bad in [
        "",
        "{",
        "[]",
        "{}",
        "{\"weight_map\": []}",
        "{\"weight_map\": {\"a\": 3}}",
        "{\"weight_map\": {\"a\": \"../x\"}}",
        "{\"weight_map\": {\"a\": \"/etc/passwd\"}}",
        "{\"weight_map\": {\"a\": \"\"}}",
    ] {
        std::fs::write(&index, bad).unwrap();
        assert!(refused(dir.path(), &config).message.contains("index.json"), "{bad}");
    }
    std::fs::write(&index, "{\"weight_map\": {}}").unwrap();
    assert!(refused(dir.path(), &config).message.contains("missing"));
    std::fs::write(&index, &good).unwrap();
    Checkpoint::open(dir.path(), &config).unwrap();
}

#[test]
fn a_value_that_does_not_fit_the_type_stops_a_save() {
    let (text, config) = config("qwen3", true);
    let source = source(&text);
    for (dtype, value) in [(WeightDtype::F16, 1e6), (WeightDtype::Bf16, f32::MAX), (WeightDtype::F32, f32::NAN)] {
        let dir = tempfile::tempdir().unwrap();
        let files = ModelFiles::read(source.path()).unwrap();
        let error = save_model(dir.path(), &files, &config, Layout::default(), dtype, u64::MAX, |_, out| {
            out.fill(value);
            Ok(())
        })
        .unwrap_err();
        assert_eq!(error.code, ErrorCode::NonFinite);
        assert!(error.message.contains("model.embed_tokens.weight"), "{error}");
    }
}

#[test]
fn an_error_while_fetching_or_writing_comes_back_with_its_place() {
    let (text, config) = config("qwen3", true);
    let source = source(&text);
    let dir = tempfile::tempdir().unwrap();
    let (files, stop) = (ModelFiles::read(source.path()).unwrap(), || Error::new(ErrorCode::Interrupted, "stopped"));
    let failed = save_model(dir.path(), &files, &config, Layout::default(), WeightDtype::F32, 1, |_, _| Err(stop()));
    assert_eq!(failed.unwrap_err().code, ErrorCode::Interrupted);
    let error = save(&dir.path().join("absent"), source.path(), &config, WeightDtype::F32, u64::MAX).unwrap_err();
    assert!(error.code == ErrorCode::Io && error.message.contains("absent"), "{error}");
    // A device that is always full stands for a full disk.
    if Path::new("/dev/full").exists() {
        let tensor = TensorDecl { name: "x".to_owned(), dtype: Dtype::F32, shape: vec![1] };
        let error = SafetensorsWriter::create(Path::new("/dev/full"), &[], &[tensor]).unwrap_err();
        assert!(error.code == ErrorCode::Io && error.message.contains("/dev/full") && error.hint.contains("room"));
    }
    assert!(available_bytes(dir.path()).unwrap() > 0);
    assert!(available_bytes(&dir.path().join("absent")).unwrap_err().message.contains("absent"));
}

#[test]
fn a_state_file_of_mixed_types_reads_back_and_wrong_sizes_are_caught() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.safetensors");
    let tensor =
        |name: &str, dtype, shape: &[usize]| TensorDecl { name: name.to_owned(), dtype, shape: shape.to_vec() };
    let tensors = [tensor("b", Dtype::U16, &[3]), tensor("a", Dtype::F64, &[]), tensor("none", Dtype::F32, &[0, 4])];
    let mut writer = SafetensorsWriter::create(&path, &[("step", "12")], &tensors).unwrap();
    writer.append(&[1, 2, 3]).unwrap();
    writer.append(&[4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]).unwrap();
    assert_eq!(writer.append(&[0]).unwrap_err().code, ErrorCode::Internal);
    writer.finish().unwrap();
    let file = SafetensorsFile::open(&path).unwrap();
    assert_eq!(file.names(), ["b", "a", "none"]);
    assert_eq!(file.metadata("step"), Some("12"));
    assert_eq!(file.info("a"), Some((Dtype::F64, &[][..])));
    assert_eq!(file.bytes("b").unwrap(), [1, 2, 3, 4, 5, 6]);
    let mut out = [0; 8];
    file.read_bytes("a", &mut out).unwrap();
    assert_eq!(out, [7, 8, 9, 10, 11, 12, 13, 14]);
    assert_eq!(file.read_bytes("a", &mut [0; 7]).unwrap_err().code, ErrorCode::Internal);
    assert!(file.read_f32("b", &mut [0.0; 3]).unwrap_err().message.contains("`b` is U16"));
    assert!(file.bytes("c").unwrap_err().message.contains("no tensor `c`"));
    let writer = SafetensorsWriter::create(&path, &[], &tensors).unwrap();
    assert_eq!(writer.finish().unwrap_err().code, ErrorCode::Internal);
    let twice = [tensor("b", Dtype::U16, &[3]), tensor("b", Dtype::U16, &[3])];
    assert_eq!(SafetensorsWriter::create(&path, &[], &twice).unwrap_err().code, ErrorCode::Internal);
}
