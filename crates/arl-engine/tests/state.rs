//! A saved state: tensors by their names, wherever they are in the file; what does not fit is named and changes nothing.

use crate::common;

use std::path::Path;

use arl_engine::Recompute;
use arl_engine::backend::DType;
use arl_model::{ErrorCode, SafetensorsFile, SafetensorsWriter, TensorDecl};
use common::{HYPER, MODELS, TYPES, batch, open, options, state_bits};

/// The metadata of a state's file.
fn metadata(dir: &Path) -> Vec<(&'static str, String)> {
    let file = SafetensorsFile::open(&dir.join("engine.safetensors")).unwrap();
    let keys = ["format", "steps", "loss_scale", "slices"].into_iter();
    keys.filter_map(|key| Some((key, file.metadata(key)?.to_owned()))).collect()
}

fn names(dir: &Path) -> Vec<String> {
    SafetensorsFile::open(&dir.join("engine.safetensors")).unwrap().names()
}

/// Writes the tensors `names` of one state's file into another's, in their order, each under the name that `rename` gives it.
fn rewrite(from: &Path, to: &Path, names: &[String], rename: impl Fn(&str) -> String) {
    rewrite_with(from, to, names, rename, &metadata(from));
}

/// [`rewrite`] with other metadata.
fn rewrite_with(
    from: &Path,
    to: &Path,
    names: &[String],
    rename: impl Fn(&str) -> String,
    metadata: &[(&str, String)],
) {
    let file = SafetensorsFile::open(&from.join("engine.safetensors")).unwrap();
    let metadata: Vec<(&str, &str)> = metadata.iter().map(|(key, value)| (*key, value.as_str())).collect();
    let declare = |name: &String| {
        let (dtype, shape) = file.info(name).unwrap();
        TensorDecl { name: rename(name), dtype, shape: shape.to_vec() }
    };
    let declared: Vec<TensorDecl> = names.iter().map(declare).collect();
    let path = to.join("engine.safetensors");
    let mut writer = SafetensorsWriter::create(&path, &metadata, &declared).unwrap();
    names.iter().for_each(|name| writer.append(file.bytes(name).unwrap()).unwrap());
    writer.finish().unwrap();
}

#[test]
fn tensors_are_found_by_name_in_any_order() {
    for name in MODELS {
        for dtype in TYPES {
            let options = options(dtype, Recompute::Norms, 33);
            let mut engine = open(name, &options);
            engine.step(&[batch(&[9, 3, 21], 1)], HYPER).unwrap();
            let (saved, turned) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
            engine.save_state(saved.path()).unwrap();
            let mut names = names(saved.path());
            assert!(names.contains(&"moment2/model.norm.weight".to_owned()), "{names:?}");
            names.reverse();
            rewrite(saved.path(), turned.path(), &names, str::to_owned);
            let mut resumed = open(name, &options);
            resumed.restore_state(turned.path()).unwrap();
            assert!(state_bits(&mut resumed) == state_bits(&mut engine), "{name} {dtype:?}");
        }
    }
}

#[test]
fn a_tensor_that_is_missing_or_of_another_model_is_named_and_nothing_changes() {
    let options = options(DType::F32, Recompute::Norms, 33);
    let mut engine = open("window-bias", &options);
    engine.step(&[batch(&[9], 1)], HYPER).unwrap();
    let (saved, changed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    engine.save_state(saved.path()).unwrap();
    let names = names(saved.path());
    let mut other = open("window-bias", &options);
    let before = state_bits(&mut other);
    let mut refused = |message: &str| {
        let error = other.restore_state(changed.path()).unwrap_err();
        assert_eq!(error.code, ErrorCode::State);
        assert!(error.message.contains(message), "{error}");
        assert!(state_bits(&mut other) == before);
    };
    let lost = "moment1/model.layers.1.mlp.down_proj.weight";
    let rest: Vec<String> = names.iter().filter(|name| *name != lost).cloned().collect();
    rewrite(saved.path(), changed.path(), &rest, str::to_owned);
    refused("it has no `moment1/model.layers.1.mlp.down_proj.weight`");
    let rename = |name: &str| if name == lost { "moment1/model.layers.9.x".to_owned() } else { name.to_owned() };
    rewrite(saved.path(), changed.path(), &names, rename);
    refused("it has no `moment1/model.layers.1.mlp.down_proj.weight`");
    let mut doubled = names.clone();
    doubled.push(lost.to_owned());
    let seen = std::cell::Cell::new(false);
    let rename = |name: &str| {
        let again = name == lost && seen.replace(true);
        if again { "moment3/x".to_owned() } else { name.to_owned() }
    };
    rewrite(saved.path(), changed.path(), &doubled, rename);
    refused("the run has no `moment3/x`");
    // A run with masters does not take a state without them, and says which tensor it misses.
    let bf16 = common::options(DType::Bf16, Recompute::Norms, 33);
    let error = open("window-bias", &bf16).restore_state(saved.path()).unwrap_err();
    assert!(error.message.contains("its `weights/") && error.message.contains("F32"), "{error}");
}

#[test]
fn a_state_without_slices_has_whole_tensors_in_the_format_of_its_time() {
    for name in MODELS {
        for dtype in TYPES {
            let options = options(dtype, Recompute::Norms, 33);
            let mut engine = open(name, &options);
            engine.step(&[batch(&[9, 3, 21], 1)], HYPER).unwrap();
            let (saved, older) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
            engine.save_state(saved.path()).unwrap();
            let mut metadata = metadata(saved.path());
            assert_eq!(metadata[0], ("format", "arl engine state 3".to_owned()));
            metadata[0].1 = "arl engine state 2".to_owned();
            metadata.retain(|(key, _)| *key != "slices");
            rewrite_with(saved.path(), older.path(), &names(saved.path()), str::to_owned, &metadata);
            let mut resumed = open(name, &options);
            resumed.restore_state(older.path()).unwrap();
            assert!(state_bits(&mut resumed) == state_bits(&mut engine), "{name} {dtype:?}");
        }
    }
}

#[test]
fn every_tensor_has_its_slice_and_a_part_of_a_parameter_is_not_taken_for_the_whole() {
    let options = options(DType::F32, Recompute::Norms, 33);
    let mut engine = open("moe-balance", &options);
    engine.step(&[batch(&[9], 1)], HYPER).unwrap();
    let (saved, changed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    engine.save_state(saved.path()).unwrap();
    let file = SafetensorsFile::open(&saved.path().join("engine.safetensors")).unwrap();
    let slices: serde_json::Value = serde_json::from_str(file.metadata("slices").unwrap()).unwrap();
    for name in engine.tensor_names() {
        let (_, shape) = file.info(&format!("moment1/{name}")).unwrap();
        assert_eq!(slices[&name], serde_json::json!({ "start": vec![0; shape.len()], "of": shape }), "{name}");
    }
    assert_eq!(slices.as_object().unwrap().len(), engine.tensor_names().len());

    let before = state_bits(&mut engine);
    let mut refused = |slices: Option<&serde_json::Value>| {
        let mut metadata = metadata(saved.path());
        metadata.retain(|(key, _)| *key != "slices");
        metadata.extend(slices.map(|slices| ("slices", slices.to_string())));
        rewrite_with(saved.path(), changed.path(), &names(saved.path()), str::to_owned, &metadata);
        let error = engine.restore_state(changed.path()).unwrap_err();
        assert!(error.code == ErrorCode::State && state_bits(&mut engine) == before);
        error.message
    };
    let mut part = slices.clone();
    part["model.norm.weight"] = serde_json::json!({ "start": [16], "of": [32] });
    let message = refused(Some(&part));
    assert!(message.contains("its part of `model.norm.weight` is {") && message.contains("[16]"), "{message}");
    assert!(refused(None).contains("it does not say which part of `"));
}
