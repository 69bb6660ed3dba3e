//! Every format that files of today's families have is read to the same parameters and written back as it was: names,
//! types and bytes.

use crate::common;
use crate::property;

use std::path::Path;

use arl_model::{Checkpoint, CheckpointFormat, ModelConfig, ModelFiles, WeightDtype, save_model};
use common::{Entry, LAYOUTS, Layout, contents, entries_of, exact_parameters, write};
use property::holds;
use proptest::prelude::{Strategy, any};
use proptest::sample::select;
use proptest::test_runner::TestCaseError;
use proptest::{prop_assert, prop_assert_eq};
use serde_json::json;
use tempfile::TempDir;

const DTYPES: [WeightDtype; 3] = [WeightDtype::F32, WeightDtype::Bf16, WeightDtype::F16];

/// A model, the type of each of its tensors, and the bound of its files.
#[derive(Clone, Debug)]
struct Case {
    config: String,
    /// Of a tensor, by the hash of its name; most of them are of the first.
    dtypes: [WeightDtype; 2],
    salt: u64,
    max_shard_bytes: u64,
}

impl Case {
    fn any() -> impl Strategy<Value = Case> {
        let family = select(vec!["qwen2", "qwen3", "qwen3_moe"]);
        let sizes = (1usize..4, 1usize..5, 1usize..4, 1usize..9, 1usize..6);
        let types = (select(DTYPES.to_vec()), select(DTYPES.to_vec()), any::<u64>());
        let bound = select(vec![u64::MAX, 5000, 600]);
        (family, any::<bool>(), sizes, types, bound).prop_map(|(family, tied, sizes, types, max_shard_bytes)| {
            let (layers, experts, heads, width, hidden) = sizes;
            let config = json!({
                "model_type": family, "vocab_size": 11, "hidden_size": 2 * hidden, "intermediate_size": 12,
                "num_hidden_layers": layers, "num_attention_heads": 2 * heads, "num_key_value_heads": heads, "head_dim": 2,
                "num_experts": experts, "num_experts_per_tok": 1, "moe_intermediate_size": width, "mlp_only_layers": [1 % layers],
                "decoder_sparse_step": 1, "tie_word_embeddings": tied, "sliding_window": null,
            });
            Case { config: config.to_string(), dtypes: [types.0, types.1], salt: types.2, max_shard_bytes }
        })
    }

    fn config(&self) -> ModelConfig {
        ModelConfig::from_json(&self.config, Path::new("config.json")).unwrap()
    }

    fn dtype(&self, name: &str) -> WeightDtype {
        let hash =
            name.bytes().fold(self.salt | 1, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        self.dtypes[usize::from((hash >> 32).is_multiple_of(5))]
    }

    /// A folder with its tensors in a layout.
    fn folder(&self, tensors: &[Entry]) -> TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), &self.config).unwrap();
        write(&dir.path().join("model.safetensors"), tensors);
        dir
    }
}

fn words(config: &ModelConfig, layout: Layout) -> String {
    let spelling = if layout.prefixed { "names with `model.`" } else { "names without `model.`" };
    let experts = if layout.joined { "experts joined in 3-D tensors" } else { "experts one by one" };
    if config.moe.is_some() { format!("{spelling}, {experts}") } else { spelling.to_owned() }
}

/// The folder that comes out of a checkpoint that was not trained.
fn saved(dir: &TempDir, checkpoint: &Checkpoint, dtype: Option<WeightDtype>, bound: u64) -> TempDir {
    let (files, out) = (ModelFiles::read(dir.path()).unwrap(), tempfile::tempdir().unwrap());
    let (config, format) = (files.config().unwrap(), checkpoint.format());
    save_model(out.path(), &files, &config, format, dtype, bound, |name, out| checkpoint.read_f32(name, out)).unwrap();
    out
}

#[test]
fn every_format_is_read_to_the_same_parameters_and_written_back_byte_for_byte() {
    holds(16, Case::any(), |case| {
        let config = case.config();
        let sparse = config.moe.is_some();
        for layout in LAYOUTS.into_iter().filter(|layout| sparse || !layout.joined) {
            let expected = contents(&config, layout, |name| case.dtype(name));
            let dir = case.folder(&expected);
            let checkpoint = Checkpoint::open(dir.path(), &config).map_err(|e| TestCaseError::fail(e.to_string()))?;
            // Where no layer has experts the names do not show how they would be.
            if expected.iter().any(|entry| entry.0.contains(".experts.")) {
                prop_assert_eq!(checkpoint.format().to_string(), words(&config, layout));
            }
            for (name, values) in exact_parameters(&config) {
                let mut found = vec![0f32; values.len()];
                checkpoint.read_f32(&name, &mut found).unwrap();
                prop_assert_eq!(&found, &values, "{}", name);
                let last = values.len().min(3);
                let mut found = vec![0f32; last];
                checkpoint.read_f32_part(&name, values.len() - last, &mut found).unwrap();
                prop_assert_eq!(&found, &values[values.len() - last..], "{}", name);
            }
            let out = saved(&dir, &checkpoint, None, case.max_shard_bytes);
            prop_assert!(entries_of(out.path()) == expected, "{layout:?}");
            let again = Checkpoint::open(out.path(), &config).unwrap();
            prop_assert_eq!(again.format().to_string(), checkpoint.format().to_string());
            prop_assert_eq!(again.format().dtype(), checkpoint.format().dtype());
            // A type that is asked for is that of all tensors.
            let wide = saved(&dir, &checkpoint, Some(WeightDtype::F32), u64::MAX);
            prop_assert!(entries_of(wide.path()) == contents(&config, layout, |_| WeightDtype::F32), "{layout:?}");
        }
        Ok(())
    });
}

#[test]
fn the_table_has_each_format_once_and_what_transformers_writes_comes_first() {
    for (family, count) in [("qwen2", 2), ("qwen3", 2), ("qwen3_moe", 4)] {
        let config = common::config(family, true).1;
        let all: Vec<String> = CheckpointFormat::all(&config).iter().map(ToString::to_string).collect();
        let expected: Vec<String> = LAYOUTS.iter().map(|&layout| words(&config, layout)).collect();
        assert_eq!(all.len(), count);
        assert!(expected.iter().all(|words| all.contains(words)), "{all:?}");
        assert_eq!(all[0], CheckpointFormat::new(&config).to_string());
        assert_eq!(all[0], expected[0]);
    }
}
