//! Small models, and weights files tensor by tensor, for the tests.

#![allow(dead_code, reason = "each test takes some of it")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use arl_model::{
    Checkpoint, CheckpointFormat, Dtype, Error, ErrorCode, ModelConfig, ModelFiles, SafetensorsFile, SafetensorsWriter,
    TensorDecl, TensorSpec, WeightDtype, init_f32, save_model, tensor_table,
};
use half::{bf16, f16};
use tempfile::TempDir;

/// The text of a `config.json` and what it says: two layers, of which the first has experts where the family has them.
pub(crate) fn config(family: &str, tied: bool) -> (String, ModelConfig) {
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
pub(crate) fn source(text: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), text).unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), "{\"x\": 1.0}").unwrap();
    std::fs::write(dir.path().join("chat_template.jinja"), "{{ messages }}\n").unwrap();
    std::fs::create_dir(dir.path().join("additional_chat_templates")).unwrap();
    std::fs::write(dir.path().join("additional_chat_templates/tool.jinja"), "tool").unwrap();
    std::fs::write(dir.path().join("README.md"), "not part of a model").unwrap();
    dir
}

/// Random values of all parameters, by name.
pub(crate) fn parameters(config: &ModelConfig) -> HashMap<String, Vec<f32>> {
    let fill = |spec: &TensorSpec| {
        let mut values = vec![0f32; spec.elements()];
        init_f32(config, spec, 7, &mut values);
        (spec.name.clone(), values)
    };
    tensor_table(config).iter().map(fill).collect()
}

/// Saves the random parameters in the format that transformers writes.
pub(crate) fn save(
    dir: &Path,
    source: &Path,
    config: &ModelConfig,
    dtype: WeightDtype,
    shard: u64,
) -> arl_model::Result<()> {
    let (weights, format) = (parameters(config), CheckpointFormat::new(config));
    save_model(dir, &ModelFiles::read(source)?, config, &format, Some(dtype), shard, |name, out| {
        out.copy_from_slice(&weights[name]);
        Ok(())
    })
}

/// A complete folder with weights in f32.
pub(crate) fn model(family: &str, tied: bool, shard: u64) -> (TempDir, ModelConfig) {
    let (text, config) = config(family, tied);
    let source = source(&text);
    let dir = tempfile::tempdir().unwrap();
    save(dir.path(), source.path(), &config, WeightDtype::F32, shard).unwrap();
    (dir, config)
}

/// The error of a folder whose weights must be refused.
pub(crate) fn refused(dir: &Path, config: &ModelConfig) -> Error {
    let error = Checkpoint::open(dir, config).expect_err("must be refused");
    assert_eq!(error.code, ErrorCode::Weights, "{error}");
    error
}

/// A tensor of a file: name, type, shape and bytes.
pub(crate) type Entry = (String, Dtype, Vec<usize>, Vec<u8>);

/// The tensors of a file, in its order.
pub(crate) fn entries(path: &Path) -> Vec<Entry> {
    let file = SafetensorsFile::open(path).unwrap();
    let entry = |name: String| {
        let (dtype, shape) = file.info(&name).unwrap();
        (name.clone(), dtype, shape.to_vec(), file.bytes(&name).unwrap().to_vec())
    };
    file.names().into_iter().map(entry).collect()
}

/// The weights files of a folder, in order.
pub(crate) fn shards(dir: &Path) -> Vec<PathBuf> {
    let paths = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let mut shards: Vec<PathBuf> =
        paths.filter(|path| path.extension().is_some_and(|end| end == "safetensors")).collect();
    shards.sort();
    shards
}

/// The tensors of all weights files of a folder, by name.
pub(crate) fn entries_of(dir: &Path) -> Vec<Entry> {
    let mut found: Vec<Entry> = shards(dir).iter().flat_map(|path| entries(path)).collect();
    found.sort_by(|left, right| left.0.cmp(&right.0));
    found
}

/// The entry of that name.
pub(crate) fn entry<'a>(entries: &'a mut [Entry], name: &str) -> &'a mut Entry {
    entries.iter_mut().find(|entry| entry.0 == name).unwrap()
}

pub(crate) fn write(path: &Path, entries: &[Entry]) {
    let declare =
        |(name, dtype, shape, _): &Entry| TensorDecl { name: name.clone(), dtype: *dtype, shape: shape.clone() };
    let declared: Vec<TensorDecl> = entries.iter().map(declare).collect();
    let mut writer = SafetensorsWriter::create(path, &[("format", "pt")], &declared).unwrap();
    entries.iter().for_each(|(_, _, _, bytes)| writer.append(bytes).unwrap());
    writer.finish().unwrap();
}

/// How files of today's families are: names with `model.` or without, experts joined or one by one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    pub(crate) prefixed: bool,
    pub(crate) joined: bool,
}

pub(crate) const LAYOUTS: [Layout; 4] = [
    Layout { prefixed: true, joined: false },
    Layout { prefixed: true, joined: true },
    Layout { prefixed: false, joined: false },
    Layout { prefixed: false, joined: true },
];

/// Values that f16 and bf16 hold exactly.
pub(crate) fn exact_parameters(config: &ModelConfig) -> HashMap<String, Vec<f32>> {
    let mut parameters = parameters(config);
    parameters.values_mut().flatten().for_each(|value| *value = (*value * 1024.0).round() / 1024.0);
    parameters
}

/// What transformers writes in a layout, sorted by name and put together apart from the code under test; `dtype` is the
/// type of a tensor by its name in the file.
pub(crate) fn contents(config: &ModelConfig, layout: Layout, dtype: impl Fn(&str) -> WeightDtype) -> Vec<Entry> {
    let parameters = exact_parameters(config);
    let mut contents: HashMap<String, (Vec<usize>, Vec<f32>)> = HashMap::new();
    for spec in tensor_table(config) {
        let file_name = |name: &str| match (layout.prefixed, name.strip_prefix("model.")) {
            (false, Some(bare)) => bare.to_owned(),
            _ => name.to_owned(),
        };
        let Some((mlp, _)) = spec.name.split_once(".experts.").filter(|_| layout.joined) else {
            contents.insert(file_name(&spec.name), (spec.shape, parameters[&spec.name].clone()));
            continue;
        };
        let moe = config.moe.unwrap();
        let (experts, width, hidden) = (moe.num_experts, moe.moe_intermediate_size, config.hidden_size);
        let join = |parts: &[&str]| -> Vec<f32> {
            let one = |expert: usize, part: &str| &parameters[&format!("{mlp}.experts.{expert}.{part}_proj.weight")];
            (0..experts).flat_map(|e| parts.iter().flat_map(move |part| one(e, part))).copied().collect()
        };
        let name = |part: &str| file_name(&format!("{mlp}.experts.{part}_proj"));
        contents.insert(name("gate_up"), (vec![experts, 2 * width, hidden], join(&["gate", "up"])));
        contents.insert(name("down"), (vec![experts, hidden, width], join(&["down"])));
    }
    let entry = |(name, (shape, values)): (String, (Vec<usize>, Vec<f32>))| {
        let (dtype, bytes) = raw(&values, dtype(&name));
        (name, dtype, shape, bytes)
    };
    let mut contents: Vec<Entry> = contents.into_iter().map(entry).collect();
    contents.sort_by(|left, right| left.0.cmp(&right.0));
    contents
}

/// The type in the file, and the bytes, of values in a type.
pub(crate) fn raw(values: &[f32], dtype: WeightDtype) -> (Dtype, Vec<u8>) {
    let bytes = |one: &dyn Fn(f32) -> Vec<u8>| values.iter().flat_map(|&value| one(value)).collect();
    match dtype {
        WeightDtype::F32 => (Dtype::F32, bytes(&|value| value.to_le_bytes().to_vec())),
        WeightDtype::Bf16 => (Dtype::BF16, bytes(&|value| bf16::from_f32(value).to_le_bytes().to_vec())),
        WeightDtype::F16 => (Dtype::F16, bytes(&|value| f16::from_f32(value).to_le_bytes().to_vec())),
    }
}
