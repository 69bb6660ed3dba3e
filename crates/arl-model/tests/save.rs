//! Saving a model: what is written reads back to the same bits, in files that respect their bound, or the error says what
//! stopped it.

use crate::common;

use std::path::Path;

use arl_model::{
    Checkpoint, CheckpointFormat, Dtype, Error, ErrorCode, ModelFiles, SafetensorsFile, SafetensorsWriter, TensorDecl,
    WeightDtype, save_model, tensor_table,
};
use common::{config, model, parameters, save, shards, source};
use half::{bf16, f16};
use serde_json::Value;
use tempfile::TempDir;

#[test]
fn a_saved_model_opens_again_with_the_same_bits() {
    for family in ["qwen2", "qwen3", "qwen3_moe"] {
        for (tied, shard) in [(false, u64::MAX), (true, u64::MAX), (true, 4000), (false, 1)] {
            let (dir, config) = model(family, tied, shard);
            let checkpoint = Checkpoint::open(dir.path(), &config).unwrap();
            assert_eq!(checkpoint.format().dtype(), WeightDtype::F32);
            assert_eq!(shards(dir.path()).len() > 1, shard < u64::MAX);
            for (name, values) in parameters(&config) {
                let mut read = vec![0f32; values.len()];
                checkpoint.read_f32(&name, &mut read).unwrap();
                assert_eq!(read, values, "{name}");
            }
        }
    }
}

#[test]
fn shards_respect_their_bound_and_the_index_agrees() {
    let (dir, config) = model("qwen3", false, 5000);
    let index: Value =
        serde_json::from_slice(&std::fs::read(dir.path().join("model.safetensors.index.json")).unwrap()).unwrap();
    assert_eq!(index["metadata"]["total_size"].as_u64().map(u128::from), Some(config.num_parameters() * 4));
    assert_eq!(index["weight_map"].as_object().unwrap().len(), tensor_table(&config).len());
    let count = shards(dir.path()).len();
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
        assert_eq!(checkpoint.format().dtype(), dtype);
        for (name, values) in parameters(&config) {
            let round = |&value: &f32| match dtype {
                WeightDtype::Bf16 => bf16::from_f32(value).to_f32(),
                _ => f16::from_f32(value).to_f32(),
            };
            let rounded: Vec<f32> = values.iter().map(round).collect();
            let mut read = vec![0f32; values.len()];
            checkpoint.read_f32(&name, &mut read).unwrap();
            assert_eq!(read, rounded);
        }
    }
    // Halfway between two neighbours: to the one with an even last bit.
    assert_eq!(bf16::from_f32(f32::from_bits(0x3f80_8000)).to_bits(), 0x3f80);
    assert_eq!(bf16::from_f32(f32::from_bits(0x3f81_8000)).to_bits(), 0x3f82);
}

#[test]
fn a_value_that_does_not_fit_the_type_stops_a_save() {
    let (text, config) = config("qwen3", true);
    let (source, format) = (source(&text), CheckpointFormat::new(&config));
    for (dtype, value) in [(WeightDtype::F16, 1e6), (WeightDtype::Bf16, f32::MAX), (WeightDtype::F32, f32::NAN)] {
        let dir = tempfile::tempdir().unwrap();
        let files = ModelFiles::read(source.path()).unwrap();
        let error = save_model(dir.path(), &files, &config, &format, Some(dtype), u64::MAX, |_, out| {
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
    let format = CheckpointFormat::new(&config);
    let failed = save_model(dir.path(), &files, &config, &format, None, 1, |_, _| Err(stop()));
    assert_eq!(failed.unwrap_err().code, ErrorCode::Interrupted);
    let error = save(&dir.path().join("absent"), source.path(), &config, WeightDtype::F32, u64::MAX).unwrap_err();
    assert!(error.code == ErrorCode::Io && error.message.contains("absent"), "{error}");
    // A device that is always full, in place of a full disk.
    if Path::new("/dev/full").exists() {
        let tensor = TensorDecl { name: "x".to_owned(), dtype: Dtype::F32, shape: vec![1] };
        let error = SafetensorsWriter::create(Path::new("/dev/full"), &[], &[tensor]).unwrap_err();
        assert!(
            error.code == ErrorCode::Io
                && error.message.contains("/dev/full")
                && error.hint.contains("free some space")
        );
    }
}
