//! What an engine takes from the folder of a model, when it takes it, and what saved models have of it.

use crate::common;

use std::collections::BTreeMap;
use std::path::Path;

use arl_engine::backend::DType;
use arl_engine::backend::cpu::CpuBackend;
use arl_engine::{Engine, Hyper, Kind, Recompute, Weights};
use arl_model::{
    Checkpoint, CheckpointFormat, ExportOverrides, ModelConfig, ModelFiles, SafetensorsFile, WeightDtype, save_model,
};
use common::{HYPER, TYPES, all, batch, model, options};
use tempfile::TempDir;

/// How folders may hold the model with experts; the first is what transformers writes.
fn formats() -> Vec<CheckpointFormat> {
    let formats = CheckpointFormat::all(&ModelConfig::from_dir(&model("moe-balance")).unwrap());
    assert_eq!(formats.len(), 4);
    formats
}

/// The model with experts in a folder of its own, in this format, with a tokenizer's files.
fn folder(format: &CheckpointFormat, dtype: WeightDtype) -> TempDir {
    let (dir, source) = (tempfile::tempdir().unwrap(), model("moe-balance"));
    let config = ModelConfig::from_dir(&source).unwrap();
    let checkpoint = Checkpoint::open(&source, &config).unwrap();
    let files = ModelFiles::read(&source).unwrap();
    save_model(dir.path(), &files, &config, format, Some(dtype), 20_000, |name, out| checkpoint.read_f32(name, out))
        .unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
    std::fs::write(dir.path().join("chat_template.jinja"), "old").unwrap();
    dir
}

fn opened(dir: &Path, weights: Weights, dtype: DType) -> Engine<CpuBackend> {
    let options = options(dtype, Recompute::Norms, 33);
    Engine::open(Box::new(CpuBackend::new()), dir, weights, &options).unwrap()
}

/// All files of a folder by name; of weights, type, shape and bytes of each tensor.
fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        let name = entry.file_name().into_string().unwrap();
        if !name.ends_with(".safetensors") {
            found.insert(name, std::fs::read(entry.path()).unwrap());
            continue;
        }
        let file = SafetensorsFile::open(&entry.path()).unwrap();
        for tensor in file.names() {
            let (dtype, shape) = file.info(&tensor).unwrap();
            let described = [format!("{dtype:?} {shape:?} ").as_bytes(), file.bytes(&tensor).unwrap()].concat();
            found.insert(tensor, described);
        }
    }
    found.remove("model.safetensors.index.json");
    found
}

#[test]
fn a_model_that_was_not_trained_comes_out_byte_for_byte_in_every_layout_and_type() {
    let still = Hyper { learning_rate: 0.0, ..HYPER };
    for format in &formats() {
        for (stored, dtype) in
            [(WeightDtype::F32, DType::F32), (WeightDtype::Bf16, DType::Bf16), (WeightDtype::F16, DType::F16)]
        {
            let dir = folder(format, stored);
            let mut engine = opened(dir.path(), Weights::Checkpoint, dtype);
            engine.step(&[batch(&[9, 3, 21], 1)], still).unwrap();
            let out = tempfile::tempdir().unwrap();
            engine.export_model(out.path(), None).unwrap();
            assert!(contents(out.path()) == contents(dir.path()), "{format} {stored:?}");
        }
    }
}

#[test]
fn the_layout_of_the_weights_changes_no_bit_of_a_step() {
    let step = |format| {
        let dir = folder(format, WeightDtype::F32);
        let mut engine = opened(dir.path(), Weights::Checkpoint, DType::F32);
        let stats = engine.step(&[batch(&[9, 3, 21], 1)], HYPER).unwrap();
        let state = tempfile::tempdir().unwrap();
        engine.save_state(state.path()).unwrap();
        let saved = std::fs::read(state.path().join("engine.safetensors")).unwrap();
        (stats.loss.to_bits(), stats.grad_norm.to_bits(), saved)
    };
    let formats = formats();
    let first = step(&formats[0]);
    for format in &formats {
        assert!(step(format) == first, "{format}");
    }
}

#[test]
fn nothing_of_the_folder_is_needed_once_it_is_open() {
    let dir = folder(&formats()[0], WeightDtype::Bf16);
    let mut kept = opened(dir.path(), Weights::Checkpoint, DType::F32);
    let mut gone = opened(dir.path(), Weights::Checkpoint, DType::F32);
    let out = tempfile::tempdir().unwrap();
    let (with, without) = (out.path().join("with"), out.path().join("without"));
    kept.step(&[batch(&[9, 3, 21], 1)], HYPER).unwrap();
    kept.export_model(&with, None).unwrap();
    drop(dir);
    gone.step(&[batch(&[9, 3, 21], 1)], HYPER).unwrap();
    gone.save_state(&out.path().join("state")).unwrap();
    gone.export_model(&without, None).unwrap();
    assert!(contents(&without) == contents(&with));
    assert_eq!(std::fs::read_to_string(without.join("chat_template.jinja")).unwrap(), "old");
}

#[test]
fn what_was_trained_is_described_by_every_folder_that_comes_out() {
    let dir = folder(&formats()[0], WeightDtype::F32);
    let mut engine = opened(dir.path(), Weights::Checkpoint, DType::F32);
    let overrides = ExportOverrides { chat_template: Some("new".to_owned()), stop_ids: vec![3] };
    assert_eq!(engine.describe_export(&overrides).len(), 2);
    for _ in 0..2 {
        let out = tempfile::tempdir().unwrap();
        engine.export_model(out.path(), None).unwrap();
        assert_eq!(std::fs::read_to_string(out.path().join("chat_template.jinja")).unwrap(), "new");
        let generation = std::fs::read_to_string(out.path().join("generation_config.json")).unwrap();
        assert!(generation.contains("\"eos_token_id\": 3") || generation.contains("3,"), "{generation}");
        let mut again = opened(out.path(), Weights::Checkpoint, DType::F32);
        assert_eq!(again.describe_export(&overrides), Vec::<String>::new());
    }
}

#[test]
fn a_restored_engine_reads_no_weights_of_its_folder_and_goes_on_with_equal_bits() {
    let formats = formats();
    for format in [&formats[0], &formats[3]] {
        for dtype in TYPES {
            let dir = folder(format, WeightDtype::Bf16);
            let mut whole = opened(dir.path(), Weights::Checkpoint, dtype);
            whole.step(&[batch(&[9, 3, 21], 1)], HYPER).unwrap();
            let saved = tempfile::tempdir().unwrap();
            whole.export_model(&saved.path().join("model"), None).unwrap();
            whole.save_state(&saved.path().join("state")).unwrap();
            // Values that would be refused if they were read.
            for entry in std::fs::read_dir(saved.path().join("model")).unwrap().flatten() {
                if entry.path().extension().is_some_and(|end| end == "safetensors") {
                    let mut bytes = std::fs::read(entry.path()).unwrap();
                    let header = 8 + u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
                    bytes[header..].fill(0xff);
                    std::fs::write(entry.path(), bytes).unwrap();
                }
            }
            let mut resumed = opened(&saved.path().join("model"), Weights::Restored, dtype);
            resumed.restore_state(&saved.path().join("state")).unwrap();
            let exports = [&mut whole, &mut resumed].map(|engine| {
                engine.step(&[batch(&[5, 17], 2)], HYPER).unwrap();
                let out = tempfile::tempdir().unwrap();
                engine.export_model(out.path(), None).unwrap();
                let bits = [Kind::Weights, Kind::Moment1, Kind::Moment2].map(|kind| all(engine, kind));
                (contents(out.path()), bits)
            });
            assert!(exports[0] == exports[1], "{format} {dtype:?}");
        }
    }
}
