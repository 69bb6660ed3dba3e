//! A model folder's small files: read once, written from memory, and changed to describe how the model was trained.

use std::path::Path;

use arl_model::{CheckpointFormat, ErrorCode, ExportOverrides, ModelConfig, ModelFiles, save_model, unreadable};
use serde_json::{Value, json};
use tempfile::TempDir;

const CONFIG: &str = r#"{"model_type": "qwen3", "vocab_size": 8, "hidden_size": 4, "intermediate_size": 4,
    "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 4, "eos_token_id": 5,
    "bos_token_id": null, "pad_token_id": 6, "tie_word_embeddings": true, "dtype": "float32"}"#;

fn folder(files: &[(&str, &str)]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in [("config.json", CONFIG)].iter().chain(files) {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    dir
}

/// Saves the model of a folder after the folder was removed.
fn saved(dir: TempDir, overrides: &ExportOverrides) -> (TempDir, Vec<String>) {
    let mut files = ModelFiles::read(dir.path()).unwrap();
    let config = files.config().unwrap();
    let changes = files.apply(overrides);
    drop(dir);
    let out = tempfile::tempdir().unwrap();
    save_model(out.path(), &files, &config, &CheckpointFormat::new(&config), None, u64::MAX, |_, out| {
        out.fill(0.5);
        Ok(())
    })
    .unwrap();
    (out, changes)
}

fn text(dir: &TempDir, name: &str) -> Option<String> {
    std::fs::read_to_string(dir.path().join(name)).ok()
}

fn stops(ids: &[u32]) -> ExportOverrides {
    ExportOverrides { stop_ids: ids.to_vec(), ..ExportOverrides::default() }
}

fn template(text: &str) -> ExportOverrides {
    ExportOverrides { chat_template: Some(text.to_owned()), ..ExportOverrides::default() }
}

#[test]
fn every_file_that_a_loader_reads_is_saved_without_its_folder_and_nothing_else_is() {
    let kept = [
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
        "chat_template.json",
        "additional_chat_templates/tool_use.jinja",
        "additional_chat_templates/rag.jinja",
        "preprocessor_config.json",
    ];
    let left = ["README.md", "LICENSE", "optimizer.pt", "trainer_state.json", "code.py", ".gitattributes"];
    let files: Vec<(&str, String)> =
        kept.iter().chain(&left).map(|&name| (name, format!("{name}\r\n\u{feff}"))).collect();
    let files: Vec<(&str, &str)> = files.iter().map(|(name, text)| (*name, text.as_str())).collect();
    let (out, changes) = saved(folder(&files), &ExportOverrides::default());
    assert_eq!(changes, Vec::<String>::new());
    for (name, content) in &files {
        assert_eq!(text(&out, name).as_deref(), kept.contains(name).then_some(*content), "{name}");
    }
    assert_eq!(text(&out, "config.json").as_deref(), Some(CONFIG));
    ModelConfig::from_dir(out.path()).unwrap();
}

#[test]
fn the_code_of_a_tokenizer_or_model_that_names_some_is_kept() {
    for file in ["tokenizer_config.json", "config.json"] {
        let mut config: Value = serde_json::from_str(CONFIG).unwrap();
        config["auto_map"] = json!({"AutoTokenizer": ["mine.Mine", null]});
        let (out, _) = saved(folder(&[(file, &config.to_string()), ("mine.py", "class Mine: ...")]), &stops(&[]));
        assert_eq!(text(&out, "mine.py").as_deref(), Some("class Mine: ..."));
    }
}

#[test]
fn a_template_that_replaces_the_folders_is_the_only_one_that_a_loader_finds() {
    const NEW: &str = "{{ messages }}\r\n{# caf\u{e9} #}";
    let tokenizer =
        "{\n  \"chat_template\": [{\"name\": \"default\", \"template\": \"old\"}],\n  \"eos_token\": \"</s>\"\n}\n";
    let dir = folder(&[
        ("chat_template.jinja", "old"),
        ("chat_template.json", "{\"chat_template\": \"old\"}"),
        ("additional_chat_templates/tool_use.jinja", "old"),
        ("tokenizer_config.json", tokenizer),
    ]);
    let (out, changes) = saved(dir, &template(NEW));
    assert_eq!(text(&out, "chat_template.jinja").as_deref(), Some(NEW));
    assert_eq!(text(&out, "tokenizer_config.json").as_deref(), Some("{\n  \"eos_token\": \"</s>\"\n}\n"));
    assert!(!out.path().join("chat_template.json").exists() && !out.path().join("additional_chat_templates").exists());
    let [change] = changes.as_slice() else { panic!("{changes:?}") };
    for name in ["--chat_template", "chat_template.jinja", "chat_template in tokenizer_config.json", "tool_use.jinja"] {
        assert!(change.contains(name), "{change}");
    }
    // The saved folder has the template already, so a resumed run reports nothing.
    let (again, changes) = saved(out, &template(NEW));
    assert_eq!((changes.len(), text(&again, "chat_template.jinja").as_deref()), (0, Some(NEW)));
}

#[test]
fn a_template_for_a_folder_without_one_is_added() {
    for files in [&[][..], &[("tokenizer_config.json", "{\"chat_template\": null}")]] {
        let (out, changes) = saved(folder(files), &template("new"));
        assert_eq!(text(&out, "chat_template.jinja").as_deref(), Some("new"));
        assert!(changes.len() == 1 && changes[0].contains("had no template"), "{changes:?}");
    }
}

#[test]
fn without_a_replacement_templates_stay_unless_they_contradict_the_one_that_counts() {
    let named = "{\"chat_template\": [{\"name\": \"default\", \"template\": \"a\"}, {\"name\": \"tool_use\", \"template\": \"b\"}]}";
    let (out, changes) = saved(folder(&[("tokenizer_config.json", named)]), &stops(&[]));
    assert_eq!((changes.len(), text(&out, "tokenizer_config.json").as_deref()), (0, Some(named)));
    let same = "{\"chat_template\": \"one\\ntwo\"}";
    let files = [
        ("chat_template.jinja", "one\r\ntwo\n"),
        ("tokenizer_config.json", same),
        ("additional_chat_templates/x.jinja", "x"),
    ];
    let (out, changes) = saved(folder(&files), &stops(&[]));
    assert_eq!((changes.len(), text(&out, "tokenizer_config.json").as_deref()), (0, Some(same)));
    assert!(out.path().join("additional_chat_templates/x.jinja").exists());
    for other in [named, "{\"chat_template\": \"other\"}"] {
        let (out, changes) =
            saved(folder(&[("chat_template.jinja", "one"), ("tokenizer_config.json", other)]), &stops(&[]));
        assert_eq!(text(&out, "tokenizer_config.json").as_deref(), Some("{}"));
        assert!(
            changes.len() == 1 && changes[0].contains("leave out chat_template in tokenizer_config.json"),
            "{changes:?}"
        );
    }
}

#[test]
fn generation_stops_at_the_ids_that_end_a_reply_and_all_else_stays() {
    for (before, after) in [
        (
            "{\n \"a\": 1.0,\n \"eos_token_id\": 5,\n \"top_p\": 0.80\n}\n",
            "{\n \"a\": 1.0,\n \"eos_token_id\": [7, 5],\n \"top_p\": 0.80\n}\n",
        ),
        ("{\"eos_token_id\": [5, 3]}", "{\"eos_token_id\": [7, 5, 3]}"),
        ("{\"eos_token_id\": null}", "{\"eos_token_id\": [7, 5]}"),
        ("{\n \"top_k\": 20\n}", "{\n \"top_k\": 20,\n \"eos_token_id\": [7, 5]\n}"),
        ("{\"_from_model_config\": true, \"eos_token_id\": 5}", "{ \"eos_token_id\": [7, 5]}"),
    ] {
        let (out, changes) = saved(folder(&[("generation_config.json", before)]), &stops(&[7, 5]));
        assert_eq!(text(&out, "generation_config.json").as_deref(), Some(after));
        assert!(changes.len() == 1 && changes[0].contains("generation_config.json"), "{changes:?}");
        let (out, changes) = saved(out, &stops(&[7, 5]));
        assert_eq!((changes.len(), text(&out, "generation_config.json").as_deref()), (0, Some(after)));
    }
    for known in ["{\"eos_token_id\": [5, 7]}", "{\"eos_token_id\": 7}"] {
        let (out, changes) = saved(folder(&[("generation_config.json", known)]), &stops(&[7]));
        assert_eq!((changes.len(), text(&out, "generation_config.json").as_deref()), (0, Some(known)));
    }
}

#[test]
fn a_generation_config_is_written_only_where_config_json_stops_elsewhere() {
    let (out, changes) = saved(folder(&[]), &stops(&[5]));
    assert_eq!((changes.len(), text(&out, "generation_config.json")), (0, None));
    let (out, changes) = saved(folder(&[]), &stops(&[7, 5]));
    let written: Value = serde_json::from_str(&text(&out, "generation_config.json").unwrap()).unwrap();
    assert_eq!(written, json!({"eos_token_id": [7, 5], "pad_token_id": 6}));
    assert_eq!(
        changes,
        ["saved models have eos_token_id [7, 5] in generation_config.json (config.json has 5): replies end with id 7"]
    );
    let (out, _) =
        saved(folder(&[("config.json", &CONFIG.replace("\"eos_token_id\": 5", "\"temperature\": 0.5"))]), &stops(&[7]));
    let written: Value = serde_json::from_str(&text(&out, "generation_config.json").unwrap()).unwrap();
    assert_eq!(written, json!({"pad_token_id": 6, "temperature": 0.5, "eos_token_id": 7}));
}

/// The refusal of a folder's `config.json`.
fn refusal(dir: &Path) -> String {
    let error = ModelFiles::read(dir).expect_err("must be refused");
    assert_eq!(error.code, ErrorCode::Config);
    assert_eq!(ModelConfig::from_dir(dir).unwrap_err().message, error.message);
    format!("{} {}", error.message, error.hint)
}

#[test]
fn a_folder_without_a_configuration_is_named_for_what_it_is() {
    let with = |files: &[(&str, &str)]| {
        let dir = folder(files);
        std::fs::remove_file(dir.path().join("config.json")).unwrap();
        dir
    };
    let dir = with(&[]);
    assert!(refusal(dir.path()).contains("config.json: no such file: this is not a model folder"));
    let adapter =
        [("adapter_model.safetensors", ""), ("adapter_config.json", "{\"base_model_name_or_path\": \"Qwen/Q\"}")];
    let found = refusal(with(&adapter).path());
    assert!(found.contains("is an adapter of Qwen/Q, not a model") && found.contains("merge_and_unload"), "{found}");
    let found = refusal(with(&[("q4_k_m.gguf", "")]).path());
    assert!(found.contains("holds q4_k_m.gguf") && found.contains("GGUF is for inference"), "{found}");
    std::fs::write(dir.path().join("config.json"), "version https://git-lfs.github.com/spec/v1\noid").unwrap();
    assert!(
        refusal(dir.path()).contains("a pointer of Git LFS in place of the file fetch the file itself: git lfs pull")
    );
    std::fs::remove_file(dir.path().join("config.json")).unwrap();
    std::fs::create_dir(dir.path().join("config.json")).unwrap();
    assert!(refusal(dir.path()).contains("is not a file"));
    assert!(refusal(&dir.path().join("absent")).contains("absent is not a folder"));
    assert!(unreadable(b"version https://git-lfs").is_some() && unreadable(b"{}").is_none());
}
