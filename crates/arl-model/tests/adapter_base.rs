//! The name under which an adapter's configuration refers to its model.

use std::path::Path;

use arl_model::LoraConfig;

fn named(base: &str) -> String {
    let config = LoraConfig::from_json(r#"{"peft_type": "LORA", "r": 2}"#, Path::new("a.json")).unwrap();
    let json: serde_json::Value = serde_json::from_str(&config.to_json(Some(base), &[])).unwrap();
    json["base_model_name_or_path"].as_str().unwrap().to_owned()
}

#[test]
fn a_snapshot_of_the_hubs_cache_is_called_by_its_name_on_the_hub() {
    let commit = "c".repeat(40);
    assert_eq!(
        named(&format!("/me/.cache/huggingface/hub/models--Qwen--Qwen3-0.6B/snapshots/{commit}")),
        "Qwen/Qwen3-0.6B"
    );
    assert_eq!(named(&format!("models--Qwen--Qwen3-0.6B/snapshots/{commit}/")), "Qwen/Qwen3-0.6B");
}

#[test]
fn any_other_folder_is_called_by_its_path() {
    for path in ["/models/Qwen3-0.6B", "models--Qwen--X/snapshots/main", "models--Qwen--X", "out"] {
        assert_eq!(named(path), path);
    }
}
