//! Every golden folder opens, and its tensors are those of the table.

use std::path::PathBuf;

use arl_model::{Checkpoint, ModelConfig, tensor_table};

fn shared() -> Option<PathBuf> {
    let default = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared");
    let shared = std::env::var_os("ARL_SHARED").map_or(default, PathBuf::from);
    if shared.join("golden").is_dir() {
        return Some(shared);
    }
    eprintln!("SKIPPED: {} has no golden folder", shared.display());
    None
}

#[test]
fn every_golden_folder_opens_and_reads() {
    let Some(shared) = shared() else { return };
    for case in ["qwen2-tied", "qwen2-untied", "qwen3-tied", "qwen3-moe", "sft-curve/model"] {
        let dir = shared.join("golden").join(case);
        let config = ModelConfig::from_dir(&dir).unwrap();
        assert_eq!(config.unknown_keys, Vec::<String>::new(), "{case}");
        let checkpoint = Checkpoint::open(&dir, &config).unwrap();
        let bytes = std::fs::read(dir.join("model.safetensors")).unwrap();
        let whole = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let table = tensor_table(&config);
        assert_eq!(table.len(), whole.len(), "{case}");
        for spec in table {
            let mut values = vec![0f32; spec.elements()];
            checkpoint.read_f32(&spec.name, &mut values).unwrap();
            assert_eq!(bytemuck::cast_slice::<f32, u8>(&values), whole.tensor(&spec.name).unwrap().data(), "{case}");
        }
    }
}

#[test]
fn every_configuration_of_the_benchmarks_is_read() {
    let Some(shared) = shared() else { return };
    for entry in std::fs::read_dir(shared.join("bench/configs")).unwrap() {
        let dir = entry.unwrap().path();
        let config = ModelConfig::from_dir(&dir).unwrap();
        assert_eq!(config.unknown_keys, Vec::<String>::new(), "{}", dir.display());
    }
}
