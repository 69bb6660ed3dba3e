//! Opening a checkpoint: weights that are not those of `config.json` are refused by tensor or file, with the reason.

use crate::common;

use std::path::PathBuf;

use arl_model::{Checkpoint, Dtype, ErrorCode, ModelFiles, WeightDtype, save_model, tensor_table};
use common::{
    Entry, LAYOUTS, config, contents, entries, entry, exact_parameters, model, refused, shards, source, write,
};
use tempfile::TempDir;

/// The folder of a Qwen3-MoE model with these tensors.
fn folder(tied: bool, tensors: &[Entry]) -> TempDir {
    let dir = source(&config("qwen3_moe", tied).0);
    write(&dir.path().join("model.safetensors"), tensors);
    dir
}

/// The refusal of such a folder.
fn refusal(tied: bool, tensors: &[Entry]) -> arl_model::Error {
    refused(folder(tied, tensors).path(), &config("qwen3_moe", tied).1)
}

#[test]
fn missing_surplus_and_misshapen_tensors_are_named() {
    let (dir, config) = model("qwen3_moe", false, u64::MAX);
    let path = dir.path().join("model.safetensors");
    let whole = entries(&path);
    let change = |change: &dyn Fn(&mut Vec<Entry>)| {
        let mut entries = whole.clone();
        change(&mut entries);
        write(&path, &entries);
        refused(dir.path(), &config).message
    };
    let norm = |entries: &mut Vec<Entry>| entries.iter().position(|entry| entry.0 == "model.norm.weight").unwrap();
    let text = change(&|entries| {
        let at = norm(entries);
        entries.remove(at);
    });
    assert!(text.contains("missing (1): model.norm.weight"), "{text}");
    let text = change(&|entries| entries.push(("score.weight".to_owned(), Dtype::F32, vec![1], vec![0; 4])));
    assert!(text.contains("surplus (1): score.weight"), "{text}");
    let text = change(&|entries| {
        let at = norm(entries);
        entries[at].2 = vec![4, 4];
    });
    assert!(text.contains("of the wrong shape (1): model.norm.weight is [4, 4], not [16]"), "{text}");
    let text = change(&|entries| {
        let at = norm(entries);
        entries[at].1 = Dtype::I32;
    });
    assert!(text.contains("model.norm.weight is I32"), "{text}");
    let text = change(&|entries| entries.truncate(2));
    let missing = tensor_table(&config).len() - 2;
    assert!(text.contains(&format!("missing ({missing}): ")) && text.matches("model.layers").count() == 5, "{text}");
    let text = change(&|entries| entries.clear());
    assert!(text.contains("missing"), "{text}");
}

#[test]
fn frequencies_that_old_files_store_are_neither_needed_nor_saved() {
    let (dir, config) = model("qwen3_moe", false, u64::MAX);
    let path = dir.path().join("model.safetensors");
    let whole = entries(&path);
    let mut old = whole.clone();
    old.push(("model.layers.0.self_attn.rotary_emb.inv_freq".to_owned(), Dtype::F32, vec![2], vec![0; 8]));
    write(&path, &old);
    let checkpoint = Checkpoint::open(dir.path(), &config).unwrap();
    let (out, files) = (tempfile::tempdir().unwrap(), ModelFiles::read(dir.path()).unwrap());
    save_model(out.path(), &files, &config, checkpoint.format(), None, u64::MAX, |name, out| {
        checkpoint.read_f32(name, out)
    })
    .unwrap();
    assert_eq!(entries(&out.path().join("model.safetensors")), whole);
}

#[test]
fn files_that_mix_formats_are_refused_with_both() {
    let config = config("qwen3_moe", true).1;
    let [prefixed, joined, bare, _] = LAYOUTS.map(|layout| contents(&config, layout, |_| WeightDtype::F32));
    let mixed = |base: &[Entry], other: &[Entry], foreign: &str| {
        let mut tensors = base.to_vec();
        tensors.extend(other.iter().filter(|entry| entry.0.contains(foreign)).cloned());
        refusal(true, &tensors).message
    };
    for message in [
        // Also where it is the same tensor twice.
        mixed(&prefixed, &bare, "layers.1.self_attn.q_proj"),
        mixed(&prefixed[..prefixed.len() - 1], &bare[bare.len() - 1..], "norm.weight"),
    ] {
        assert!(message.contains("mix two formats: names with `model.`, experts one by one (`model."), "{message}");
        assert!(message.contains("and names without `model.`, experts one by one (`"), "{message}");
    }
    let text = mixed(&prefixed, &joined, "experts.down_proj");
    assert!(
        text.contains(
            "experts one by one (`model.layers.0.mlp.experts.0.down_proj.weight`) and names with `model.`, \
             experts joined in 3-D tensors (`model.layers.0.mlp.experts.down_proj`)"
        ),
        "{text}"
    );
}

#[test]
fn a_stored_head_of_a_tied_model_must_be_the_embedding() {
    let (dir, config) = model("qwen2", true, u64::MAX);
    let path = dir.path().join("model.safetensors");
    let mut tensors = entries(&path);
    let mut head = entry(&mut tensors, "model.embed_tokens.weight").clone();
    head.0 = "lm_head.weight".to_owned();
    tensors.push(head);
    write(&path, &tensors);
    Checkpoint::open(dir.path(), &config).unwrap();
    tensors.last_mut().unwrap().3[17] ^= 1;
    write(&path, &tensors);
    let error = refused(dir.path(), &config);
    assert!(
        error.message.contains("`lm_head.weight` differs") && error.hint.contains("tie_word_embeddings"),
        "{error}"
    );
}

#[test]
fn a_stored_head_of_a_tied_bare_model_must_be_the_embedding() {
    let config = config("qwen3_moe", true).1;
    let mut tensors = contents(&config, LAYOUTS[2], |_| WeightDtype::Bf16);
    let mut head = entry(&mut tensors, "embed_tokens.weight").clone();
    head.0 = "lm_head.weight".to_owned();
    tensors.push(head);
    Checkpoint::open(folder(true, &tensors).path(), &config).unwrap();
    tensors.last_mut().unwrap().3[0] ^= 1;
    let error = refusal(true, &tensors);
    assert!(error.message.contains("`lm_head.weight` differs from `embed_tokens.weight`"), "{error}");
}

#[test]
fn names_that_all_have_a_wrappers_prefix_are_refused_with_it() {
    let config = config("qwen3_moe", true).1;
    for layout in LAYOUTS {
        let whole = contents(&config, layout, |_| WeightDtype::F32);
        for (prefix, hint) in [
            ("_orig_mod.", "model._orig_mod.save_pretrained"),
            ("module.", "model.module.save_pretrained"),
            ("module._orig_mod.", "inside another module"),
            ("base_model.model.", "merge_and_unload"),
        ] {
            let mut wrapped = whole.clone();
            wrapped.iter_mut().for_each(|entry| entry.0.insert_str(0, prefix));
            let error = refusal(true, &wrapped);
            // Of a bare decoder `model.` may as well be the model's own.
            let prefix = if layout.prefixed { prefix } else { prefix.strip_suffix("model.").unwrap_or(prefix) };
            assert!(error.message.contains(&format!("all tensors begin with `{prefix}`")), "{error}");
            assert!(error.hint.contains(hint) && error.hint.contains(&format!("take `{prefix}` off")), "{error}");
        }
    }
    // Where only some names have it, it is not the reason.
    let mut mixed = contents(&config, LAYOUTS[0], |_| WeightDtype::F32);
    entry(&mut mixed, "model.norm.weight").0 = "module.model.norm.weight".to_owned();
    let message = refusal(true, &mixed).message;
    assert!(message.contains("missing (1): model.norm.weight; surplus (1): module.model.norm"), "{message}");
}

#[test]
fn a_bare_decoder_without_the_head_that_config_json_asks_for_is_refused_with_the_way_out() {
    let mut tensors = contents(&config("qwen3_moe", false).1, LAYOUTS[2], |_| WeightDtype::F32);
    tensors.retain(|entry| entry.0 != "lm_head.weight");
    let error = refusal(false, &tensors);
    assert!(error.message.contains("missing (1): lm_head.weight"), "{error}");
    assert!(error.hint.contains("AutoModelForCausalLM"), "{error}");
}

#[test]
fn experts_joined_the_other_way_round_are_of_the_wrong_shape() {
    let mut tensors = contents(&config("qwen3_moe", true).1, LAYOUTS[1], |_| WeightDtype::F32);
    entry(&mut tensors, "model.layers.0.mlp.experts.down_proj").2 = vec![3, 8, 16];
    let error = refusal(true, &tensors);
    assert!(error.message.contains("experts.down_proj is [3, 8, 16], not [3, 16, 8]"), "{error}");
    assert!(error.hint.contains("another model"), "{error}");
}

#[test]
fn reading_more_or_less_than_a_parameter_is_an_error_also_inside_of_a_joined_tensor() {
    let config = config("qwen3_moe", true).1;
    let dir = folder(true, &contents(&config, LAYOUTS[1], |_| WeightDtype::F32));
    let checkpoint = Checkpoint::open(dir.path(), &config).unwrap();
    let name = "model.layers.0.mlp.experts.1.up_proj.weight";
    for wrong in [127, 129] {
        assert_eq!(checkpoint.read_f32(name, &mut vec![0.0; wrong]).unwrap_err().code, ErrorCode::Internal);
    }
    assert_eq!(checkpoint.read_f32_part(name, 1, &mut [0.0; 128]).unwrap_err().code, ErrorCode::Internal);
    let mut part = [0.0; 100];
    checkpoint.read_f32_part(name, 28, &mut part).unwrap();
    assert_eq!(part, exact_parameters(&config)[name][28..]);
}

#[test]
fn a_value_of_a_joined_tensor_that_is_not_finite_is_named_with_its_place() {
    let config = config("qwen3_moe", true).1;
    let mut tensors = contents(&config, LAYOUTS[1], |_| WeightDtype::F32);
    let name = "model.layers.0.mlp.experts.down_proj";
    let place = (2 * 16 + 5) * 8 + 3;
    entry(&mut tensors, name).3[place * 4..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
    let dir = folder(true, &tensors);
    let checkpoint = Checkpoint::open(dir.path(), &config).unwrap();
    let expert = |number: usize| format!("model.layers.0.mlp.experts.{number}.down_proj.weight");
    checkpoint.read_f32(&expert(1), &mut [0.0; 128]).unwrap();
    let error = checkpoint.read_f32(&expert(2), &mut [0.0; 128]).unwrap_err();
    assert!(error.message.contains(name) && error.message.contains("[2, 5, 3]"), "{error}");
}

#[test]
fn folders_without_usable_weights_are_errors_with_advice() {
    let (text, config) = config("qwen3", true);
    let dir = source(&text);
    let error = refused(dir.path(), &config);
    assert!(error.message.contains("no weights") && error.hint.contains("--init_from_config"), "{error}");
    std::fs::write(dir.path().join("pytorch_model.bin"), "x").unwrap();
    let error = refused(dir.path(), &config);
    assert!(error.message.contains("pytorch_model.bin") && error.hint.contains("safetensors"), "{error}");
    std::fs::create_dir(dir.path().join("model.safetensors")).unwrap();
    assert!(refused(dir.path(), &config).message.contains("not a file"));
    std::fs::remove_dir(dir.path().join("model.safetensors")).unwrap();
    std::fs::write(dir.path().join("model.safetensors"), "").unwrap();
    assert!(refused(dir.path(), &config).message.contains("is empty"));
}

#[test]
fn shards_that_are_missing_or_disagree_with_the_index_are_named() {
    let (dir, config) = model("qwen3", true, 4000);
    let index = dir.path().join("model.safetensors.index.json");
    let good = std::fs::read(&index).unwrap();
    let shards = shards(dir.path());
    let name = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().to_owned();
    let aside = dir.path().join("aside");
    std::fs::rename(&shards[1], &aside).unwrap();
    let error = refused(dir.path(), &config);
    assert!(error.message.contains(&format!("missing (1): {}", name(&shards[1]))), "{error}");
    std::fs::copy(&shards[0], &shards[1]).unwrap();
    assert!(refused(dir.path(), &config).message.contains(&name(&shards[1])));
    std::fs::rename(&aside, &shards[1]).unwrap();
    for bad in [
        "",
        "{",
        "[]",
        "{}",
        "{\"weight_map\": []}",
        "{\"weight_map\": {\"a\": 3}}",
        "{\"weight_map\": {\"a\": \"../x\"}}",
        "{\"weight_map\": {\"a\": \"/etc/passwd\"}}",
        "{\"weight_map\": {\"a\": \"\"}}",
    ] {
        std::fs::write(&index, bad).unwrap();
        assert!(refused(dir.path(), &config).message.contains("index.json"), "{bad}");
    }
    std::fs::write(&index, "{\"weight_map\": {}}").unwrap();
    assert!(refused(dir.path(), &config).message.contains("missing"));
    std::fs::write(&index, &good).unwrap();
    Checkpoint::open(dir.path(), &config).unwrap();
}
