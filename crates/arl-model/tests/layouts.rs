//! Layouts of weights files: each is read to the same parameters, and written back as it was read.

#![allow(clippy::unwrap_used, clippy::expect_used)] // helpers of tests

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use arl_model::{
    Checkpoint, Dtype, ErrorCode, Layout, ModelConfig, ModelFiles, SafetensorsFile, SafetensorsWriter, TensorDecl,
    WeightDtype, init_f32, save_model, tensor_table,
};
use half::{bf16, f16};
use tempfile::TempDir;

const LAYOUTS: [Layout; 4] = [
    Layout { prefixed: true, joined_experts: false },
    Layout { prefixed: true, joined_experts: true },
    Layout { prefixed: false, joined_experts: false },
    Layout { prefixed: false, joined_experts: true },
];
const DTYPES: [WeightDtype; 3] = [WeightDtype::F32, WeightDtype::Bf16, WeightDtype::F16];

/// A tensor of a file: its type, shape and bytes.
type Content = (Dtype, Vec<usize>, Vec<u8>);

fn config(tied: bool) -> (TempDir, ModelConfig) {
    let text = format!(
        r#"{{"model_type": "qwen3_moe", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "num_experts": 3,
        "num_experts_per_tok": 2, "moe_intermediate_size": 8, "mlp_only_layers": [1], "tie_word_embeddings": {tied}}}"#
    );
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), text).unwrap();
    let config = ModelConfig::from_dir(dir.path()).unwrap();
    (dir, config)
}

/// Values that f16 and bf16 hold exactly.
fn parameters(config: &ModelConfig) -> HashMap<String, Vec<f32>> {
    let fill = |spec: &arl_model::TensorSpec| {
        let mut values = vec![0f32; spec.elements()];
        init_f32(config, spec, 7, &mut values);
        values.iter_mut().for_each(|value| *value = (*value * 1024.0).round() / 1024.0);
        (spec.name.clone(), values)
    };
    tensor_table(config).iter().map(fill).collect()
}

fn raw(values: &[f32], dtype: WeightDtype) -> Vec<u8> {
    let one = |&value: &f32| match dtype {
        WeightDtype::F32 => value.to_le_bytes().to_vec(),
        WeightDtype::Bf16 => bf16::from_f32(value).to_le_bytes().to_vec(),
        WeightDtype::F16 => f16::from_f32(value).to_le_bytes().to_vec(),
    };
    values.iter().flat_map(one).collect()
}

fn file_dtype(dtype: WeightDtype) -> Dtype {
    match dtype {
        WeightDtype::F32 => Dtype::F32,
        WeightDtype::Bf16 => Dtype::BF16,
        WeightDtype::F16 => Dtype::F16,
    }
}

/// What transformers writes in a layout: joined here by hand, apart from the code under test.
fn contents(config: &ModelConfig, layout: Layout, dtype: WeightDtype) -> BTreeMap<String, Content> {
    let parameters = parameters(config);
    let mut contents = BTreeMap::new();
    for spec in tensor_table(config) {
        let file_name = |name: &str| match (layout.prefixed, name.strip_prefix("model.")) {
            (false, Some(bare)) => bare.to_owned(),
            _ => name.to_owned(),
        };
        let bytes = raw(&parameters[&spec.name], dtype);
        match spec.name.split_once(".experts.").filter(|_| layout.joined_experts) {
            None => {
                contents.insert(file_name(&spec.name), (file_dtype(dtype), spec.shape.clone(), bytes));
            }
            Some((mlp, _)) => {
                let of = |expert: usize, part: &str| {
                    raw(&parameters[&format!("{mlp}.experts.{expert}.{part}_proj.weight")], dtype)
                };
                let joined = |parts: &[&str]| (0..3).flat_map(|e| parts.iter().flat_map(move |p| of(e, p))).collect();
                let name = |part: &str| file_name(&format!("{mlp}.experts.{part}_proj"));
                contents.insert(name("gate_up"), (file_dtype(dtype), vec![3, 16, 16], joined(&["gate", "up"])));
                contents.insert(name("down"), (file_dtype(dtype), vec![3, 16, 8], joined(&["down"])));
            }
        }
    }
    contents
}

fn write(path: &Path, contents: &BTreeMap<String, Content>) {
    let declare = |(name, (dtype, shape, _)): (&String, &Content)| TensorDecl {
        name: name.clone(),
        dtype: *dtype,
        shape: shape.clone(),
    };
    let declared: Vec<TensorDecl> = contents.iter().map(declare).collect();
    let mut writer = SafetensorsWriter::create(path, &[("format", "pt")], &declared).unwrap();
    contents.values().for_each(|(_, _, bytes)| writer.append(bytes).unwrap());
    writer.finish().unwrap();
}

/// The tensors of all weights files of a folder.
fn read(dir: &Path) -> BTreeMap<String, Content> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        if entry.path().extension().is_none_or(|end| end != "safetensors") {
            continue;
        }
        let file = SafetensorsFile::open(&entry.path()).unwrap();
        for name in file.names() {
            let (dtype, shape) = file.info(&name).unwrap();
            found.insert(name.clone(), (dtype, shape.to_vec(), file.bytes(&name).unwrap().to_vec()));
        }
    }
    found
}

#[test]
fn every_layout_and_type_is_read_to_the_same_parameters_and_written_back_byte_for_byte() {
    for tied in [true, false] {
        let (dir, config) = config(tied);
        for layout in LAYOUTS {
            for dtype in DTYPES {
                let expected = contents(&config, layout, dtype);
                write(&dir.path().join("model.safetensors"), &expected);
                let checkpoint = Checkpoint::open(dir.path(), &config).unwrap();
                assert_eq!((checkpoint.layout(), checkpoint.dtype()), (layout, dtype));
                for (name, values) in parameters(&config) {
                    let mut found = vec![0f32; values.len()];
                    checkpoint.read_f32(&name, &mut found).unwrap();
                    assert_eq!(found, values, "{name}");
                    let mut last = [0f32; 3];
                    checkpoint.read_f32_part(&name, values.len() - 3, &mut last).unwrap();
                    assert_eq!(last, values[values.len() - 3..], "{name}");
                }
                for shard in [u64::MAX, 2000] {
                    let out = tempfile::tempdir().unwrap();
                    let files = ModelFiles::read(dir.path()).unwrap();
                    save_model(out.path(), &files, &config, layout, dtype, shard, |name, out| {
                        checkpoint.read_f32(name, out)
                    })
                    .unwrap();
                    assert!(read(out.path()) == expected, "{layout:?} {dtype:?}");
                    let again = Checkpoint::open(out.path(), &config).unwrap();
                    assert_eq!(again.layout(), layout);
                    assert_eq!(again.files().count() > 1, shard == 2000);
                }
            }
        }
    }
}

#[test]
fn reading_more_or_less_than_a_parameter_is_an_error_also_inside_of_a_joined_tensor() {
    let (dir, config) = config(true);
    write(&dir.path().join("model.safetensors"), &contents(&config, LAYOUTS[1], WeightDtype::F32));
    let checkpoint = Checkpoint::open(dir.path(), &config).unwrap();
    let name = "model.layers.0.mlp.experts.1.up_proj.weight";
    for wrong in [127, 129] {
        assert_eq!(checkpoint.read_f32(name, &mut vec![0.0; wrong]).unwrap_err().code, ErrorCode::Internal);
    }
    assert_eq!(checkpoint.read_f32_part(name, 1, &mut [0.0; 128]).unwrap_err().code, ErrorCode::Internal);
    let mut bf16s = vec![bf16::ZERO; 128];
    checkpoint.read_bf16(name, &mut bf16s).unwrap();
    let expected: Vec<bf16> = parameters(&config)[name].iter().map(|&value| bf16::from_f32(value)).collect();
    assert_eq!(bf16s, expected);
}

#[test]
fn a_value_of_a_joined_tensor_that_is_not_finite_is_named_with_its_place() {
    let (dir, config) = config(true);
    let mut tensors = contents(&config, LAYOUTS[1], WeightDtype::F32);
    let name = "model.layers.2.mlp.experts.down_proj";
    let place = (2 * 16 + 5) * 8 + 3;
    tensors.get_mut(name).unwrap().2[place * 4..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
    write(&dir.path().join("model.safetensors"), &tensors);
    let checkpoint = Checkpoint::open(dir.path(), &config).unwrap();
    let expert = |number: usize| format!("model.layers.2.mlp.experts.{number}.down_proj.weight");
    checkpoint.read_f32(&expert(1), &mut [0.0; 128]).unwrap();
    let error = checkpoint.read_f32(&expert(2), &mut [0.0; 128]).unwrap_err();
    assert!(error.message.contains(name) && error.message.contains("[2, 5, 3]"), "{error}");
}

#[test]
fn a_stored_head_of_a_tied_bare_model_must_be_the_embedding() {
    let (dir, config) = config(true);
    let path = dir.path().join("model.safetensors");
    let mut tensors = contents(&config, LAYOUTS[2], WeightDtype::Bf16);
    tensors.insert("lm_head.weight".to_owned(), tensors["embed_tokens.weight"].clone());
    write(&path, &tensors);
    Checkpoint::open(dir.path(), &config).unwrap();
    tensors.get_mut("lm_head.weight").unwrap().2[0] ^= 1;
    write(&path, &tensors);
    let error = Checkpoint::open(dir.path(), &config).expect_err("must be refused");
    assert!(error.message.contains("`lm_head.weight` differs from `embed_tokens.weight`"), "{error}");
}

/// The refusal of a folder with these tensors.
fn refused(tied: bool, tensors: &BTreeMap<String, Content>) -> arl_model::Error {
    let (dir, config) = config(tied);
    write(&dir.path().join("model.safetensors"), tensors);
    let error = Checkpoint::open(dir.path(), &config).expect_err("must be refused");
    assert_eq!(error.code, ErrorCode::Weights);
    error
}

#[test]
fn names_that_all_have_a_wrappers_prefix_are_refused_with_it() {
    let (_, config) = config(true);
    for layout in LAYOUTS {
        let whole = contents(&config, layout, WeightDtype::F32);
        for (prefix, hint) in [
            ("_orig_mod.", "model._orig_mod.save_pretrained"),
            ("module.", "model.module.save_pretrained"),
            ("module._orig_mod.", "inside of another module"),
            ("base_model.model.", "merge_and_unload"),
        ] {
            let wrapped = whole.iter().map(|(name, tensor)| (format!("{prefix}{name}"), tensor.clone())).collect();
            let error = refused(true, &wrapped);
            // Of a bare decoder `model.` may as well be the model's own.
            let prefix = if layout.prefixed { prefix } else { prefix.strip_suffix("model.").unwrap_or(prefix) };
            assert!(error.message.contains(&format!("all tensors begin with `{prefix}`")), "{error}");
            assert!(error.hint.contains(hint) && error.hint.contains(&format!("take `{prefix}` off")), "{error}");
        }
    }
    // Where only some names have it, it is not the reason.
    let mut mixed = contents(&config, LAYOUTS[0], WeightDtype::F32);
    let norm = mixed.remove("model.norm.weight").unwrap();
    mixed.insert("module.model.norm.weight".to_owned(), norm);
    assert!(refused(true, &mixed).message.contains("missing (1): model.norm.weight; surplus (1): module.model.norm"));
}

#[test]
fn a_bare_decoder_without_the_head_that_config_json_asks_for_is_refused_with_the_way_out() {
    let (_, config) = config(false);
    let mut tensors = contents(&config, LAYOUTS[2], WeightDtype::F32);
    tensors.remove("lm_head.weight");
    let error = refused(false, &tensors);
    assert!(error.message.contains("missing (1): lm_head.weight"), "{error}");
    assert!(error.hint.contains("AutoModelForCausalLM"), "{error}");
}

#[test]
fn experts_joined_the_other_way_round_are_of_the_wrong_shape() {
    let (_, config) = config(true);
    let mut tensors = contents(&config, LAYOUTS[1], WeightDtype::F32);
    tensors.get_mut("model.layers.0.mlp.experts.down_proj").unwrap().1 = vec![3, 8, 16];
    let error = refused(true, &tensors);
    assert!(error.message.contains("experts.down_proj is [3, 8, 16], not [3, 16, 8]"), "{error}");
}
