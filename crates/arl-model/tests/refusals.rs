//! Weights that cannot be read are refused for the real cause, with advice.

use arl_model::{Checkpoint, ErrorCode, ModelConfig};

const CONFIG: &str = r#"{"model_type": "qwen3", "vocab_size": 8, "hidden_size": 4, "intermediate_size": 4,
    "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 4}"#;
const POINTER: &str = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1200000000\n";

/// The refusal of a folder with these files.
fn refusal(files: &[(&str, &str)]) -> String {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), CONFIG).unwrap();
    files.iter().for_each(|(name, text)| std::fs::write(dir.path().join(name), text).unwrap());
    let config = ModelConfig::from_dir(dir.path()).unwrap();
    let error = Checkpoint::open(dir.path(), &config).expect_err("must be refused");
    assert_eq!(error.code, ErrorCode::Weights, "{error}");
    format!("{} | {}", error.message, error.hint)
}

#[test]
fn pointers_of_git_lfs_are_named_wherever_they_are() {
    let index = r#"{"weight_map": {"a": "part-1.safetensors"}}"#;
    for files in [
        &[("model.safetensors", POINTER)][..],
        &[("model.safetensors.index.json", POINTER)],
        &[("model.safetensors.index.json", index), ("part-1.safetensors", POINTER)],
    ] {
        let found = refusal(files);
        assert!(
            found.contains("a pointer of Git LFS in place of the file | fetch the file itself: git lfs pull"),
            "{found}"
        );
        assert!(found.contains(files.last().unwrap().0), "{found}");
    }
}

#[test]
fn folders_without_safetensors_are_named_for_what_they_hold() {
    for (files, message, hint) in [
        (&[("pytorch_model.bin", "")][..], "only pytorch_model.bin", "model.save_pretrained(folder)"),
        (
            &[("pytorch_model-00001-of-00002.bin", ""), ("optimizer.pt", "")],
            "only pytorch_model-00001",
            "save_pretrained",
        ),
        (&[("model.gguf", ""), ("pytorch_model.bin", "")], "only model.gguf", "GGUF is for inference"),
        (&[("tf_model.h5", "")], "only tf_model.h5", "PyTorch weights"),
        (
            &[("adapter_model.safetensors", "")],
            "adapter_model.safetensors is an adapter, not a model",
            "merge_and_unload",
        ),
        (&[("adapter_model.bin", "")], "adapter_model.bin is an adapter, not a model", "merge_and_unload"),
        (&[("weights.safetensors", "")], "only weights.safetensors", "rename it to model.safetensors"),
        (
            &[("model-00001-of-00002.safetensors", ""), ("model-00002-of-00002.safetensors", "")],
            "has no model.safetensors.index.json",
            "complete the download",
        ),
        (&[("optimizer.pt", ""), ("training_args.bin", "")], "has no weights", "--init_from_config"),
    ] {
        let found = refusal(files);
        assert!(found.contains(message) && found.contains(hint), "{found}");
    }
}

#[test]
fn missing_shards_are_counted() {
    let index =
        r#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-3.safetensors"}}"#;
    let found = refusal(&[("model.safetensors.index.json", index), ("model-2.safetensors", "")]);
    assert!(found.contains("missing (2): model-1.safetensors, model-3.safetensors"), "{found}");
    assert!(found.contains("complete the download: 2 of 3 files"), "{found}");
}
