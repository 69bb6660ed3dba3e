//! A folder with images: its text part is trained, and what is carried comes out as it went in.

use crate::common;

use std::collections::BTreeMap;
use std::path::Path;

use arl_engine::backend::cpu::CpuBackend;
use arl_engine::backend::{DType, DeltaHeads, DeviceKind, GatedDelta};
use arl_engine::{Engine, EngineOptions, Recompute, Weights, plan_memory};
use arl_model::{Dtype, SafetensorsFile, SafetensorsWriter, TensorDecl};
use common::{HYPER, batch, options};

const CONFIG: &str = r#"{
  "architectures": ["Qwen3_5ForConditionalGeneration"],
  "image_token_id": 30,
  "model_type": "qwen3_5_moe",
  "text_config": {
    "model_type": "qwen3_5_moe_text", "dtype": "bfloat16", "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 4,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 4, "num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 12
  },
  "tie_word_embeddings": false,
  "vision_config": {"depth": 1, "out_hidden_size": 16}
}
"#;

/// Type, shape and bytes of each tensor of a file.
type Contents = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn read(path: &Path) -> Contents {
    let file = SafetensorsFile::open(path).unwrap();
    let entry = |name: String| {
        let (dtype, shape) = file.info(&name).unwrap();
        (name.clone(), (dtype, shape.to_vec(), file.bytes(&name).unwrap().to_vec()))
    };
    file.names().into_iter().map(entry).collect()
}

fn write(path: &Path, contents: &Contents) {
    let declared: Vec<TensorDecl> = contents
        .iter()
        .map(|(name, (dtype, shape, _))| TensorDecl { name: name.clone(), dtype: *dtype, shape: shape.clone() })
        .collect();
    let mut writer = SafetensorsWriter::create(path, &[("format", "pt")], &declared).unwrap();
    contents.values().for_each(|(_, _, bytes)| writer.append(bytes).unwrap());
    writer.finish().unwrap();
}

fn open(dir: &Path, weights: Weights, options: &EngineOptions) -> Engine<CpuBackend> {
    Engine::open(Box::new(CpuBackend::new()), dir, weights, options).unwrap()
}

#[test]
fn a_folder_with_images_trains_its_text_and_keeps_all_else() {
    let (random, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    std::fs::write(random.path().join("config.json"), CONFIG).unwrap();
    let options = EngineOptions { vision: false, ..options(DType::Bf16, Recompute::Norms, 64) };
    let whole = tempfile::tempdir().unwrap();
    open(random.path(), Weights::Random(3), &options).export_model(whole.path(), None).unwrap();
    let mut contents = read(&whole.path().join("model.safetensors"));
    assert!(contents.contains_key("model.language_model.layers.0.mlp.experts.gate_up_proj"));
    // Decays in f32, with more digits than bf16 has.
    for (name, (dtype, shape, bytes)) in &mut contents {
        if name.ends_with("A_log") {
            *dtype = Dtype::F32;
            *bytes = (0..shape[0]).flat_map(|i| (0.1 + i as f32 / 3.0).to_le_bytes()).collect();
        }
    }
    let carried = Contents::from([
        ("model.visual.patch_embed.proj.weight".to_owned(), (Dtype::F32, vec![2], vec![255; 8])),
        ("mtp.fc.weight".to_owned(), (Dtype::BF16, vec![3], vec![1, 2, 3, 4, 5, 6])),
    ]);
    contents.extend(carried.clone());
    std::fs::write(dir.path().join("config.json"), CONFIG).unwrap();
    write(&dir.path().join("model.safetensors"), &contents);

    let mut engine = open(dir.path(), Weights::Checkpoint, &options);
    let saved = |engine: &mut Engine<CpuBackend>| {
        let out = tempfile::tempdir().unwrap();
        engine.export_model(out.path(), None).unwrap();
        assert_eq!(std::fs::read_to_string(out.path().join("config.json")).unwrap(), CONFIG);
        read(&out.path().join("model.safetensors"))
    };
    assert!(saved(&mut engine) == contents);
    engine.step(&[batch(&[9, 1, 30], 1)], HYPER).unwrap();
    let trained = saved(&mut engine);
    assert!(trained.keys().eq(contents.keys()));
    for (name, tensor) in &trained {
        assert_eq!(tensor == &contents[name], carried.contains_key(name), "{name}");
        assert_eq!((tensor.0, &tensor.1), (contents[name].0, &contents[name].1), "{name}");
    }
}

#[test]
fn the_plan_has_room_for_the_scratch_of_the_delta_rule_on_each_device() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), CONFIG).unwrap();
    let options = options(DType::Bf16, Recompute::Norms, 64);
    let heads = DeltaHeads { key: 2, value: 4, key_dim: 8, value_dim: 4 };
    for kind in [DeviceKind::Cpu, DeviceKind::Cuda] {
        let plan = plan_memory(dir.path(), &options, kind).unwrap();
        let (_, workspace) = plan.categories.iter().find(|(name, _)| *name == "workspace").unwrap();
        let scratch = 4 * GatedDelta::backward_scratch(kind, heads, 64, options.max_batch.sequences);
        // On a GPU the rule's scratch is most of it.
        let most = if kind == DeviceKind::Cuda { 2 * scratch } else { usize::MAX };
        assert!((scratch..most).contains(workspace), "{kind:?}: {workspace} bytes, {scratch} for the rule");
    }
}
