//! The kinds of layout and of tensors that no family of today has, in a row of the table that only these tests know.

use std::collections::BTreeMap;
use std::path::Path;

use half::bf16;
use safetensors::Dtype;

use super::table::{Arrangement, Axes, Join, Other, Row, Spelling};
use super::*;
use crate::weights::{Checkpoint, SafetensorsWriter, TensorDecl};
use crate::{ModelFiles, SharedModel, init_f32, save_model};

/// Spellings, layouts and tensors as Qwen3-VL-MoE and Qwen3-Next have them, on Qwen3-MoE's parameters.
static ROW: Row = Row {
    spellings: &[
        Spelling { what: "nested names", prefixes: &[("model.", "model.language_model.")] },
        Spelling { what: "flat names", prefixes: &[] },
    ],
    arrangements: &[TRANSPOSED, GROUPED],
    others: &[
        ("lm_head.weight", Other::CopyOf("model.embed_tokens.weight")),
        ("*.inv_freq", Other::Derived),
        ("mtp.*", Other::Carried),
        ("model.visual.*", Other::Carried),
    ],
};

const TRANSPOSED: Arrangement = Arrangement {
    what: "experts transposed",
    joins: &[
        Join {
            parameters: &["mlp.experts.#.gate_proj.weight", "mlp.experts.#.up_proj.weight"],
            tensor: "mlp.experts.gate_up_proj",
            axes: Axes::Transposed,
        },
        Join {
            parameters: &["mlp.experts.#.down_proj.weight"],
            tensor: "mlp.experts.down_proj",
            axes: Axes::Transposed,
        },
    ],
};

/// Rows of queries, keys and values by key head, as in Qwen3-Next's `in_proj_qkvz`; the queries are two sections.
const GROUPED: Arrangement = Arrangement {
    what: "projections by key head",
    joins: &[Join {
        parameters: &["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
        tensor: "self_attn.qkv_proj.weight",
        axes: Axes::Grouped(|config| {
            let (groups, dim) = (config.num_key_value_heads, config.head_dim);
            let queries = config.num_attention_heads * dim / 2;
            (groups, vec![queries, queries, groups * dim, groups * dim])
        }),
    }],
};

const CONFIG: &str = r#"{"model_type": "qwen3_moe", "vocab_size": 20, "hidden_size": 6, "intermediate_size": 8,
    "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 4, "num_experts": 3,
    "num_experts_per_tok": 2, "moe_intermediate_size": 5, "mlp_only_layers": [1], "tie_word_embeddings": true}"#;

/// Type, shape and bytes of each tensor of a folder.
type Contents = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn config() -> ModelConfig {
    ModelConfig::from_json(CONFIG, Path::new("config.json")).unwrap()
}

/// Values that bf16 holds, by name.
fn parameters(config: &ModelConfig) -> HashMap<String, Vec<f32>> {
    let fill = |spec: &TensorSpec| {
        let mut values = vec![0f32; spec.elements()];
        init_f32(config, spec, 3, &mut values);
        values.iter_mut().for_each(|value| *value = bf16::from_f32(*value).to_f32());
        (spec.name.clone(), values)
    };
    tensor_table(config).iter().map(fill).collect()
}

fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// A file of the row, put together element by element apart from the code under test. The norms are bf16.
fn contents(config: &ModelConfig, nested: bool, grouped: bool) -> Contents {
    let parameters = parameters(config);
    let mut contents = Contents::new();
    let spelled =
        |name: &str| if nested { name.replacen("model.", "model.language_model.", 1) } else { name.to_owned() };
    let mut add = |name: String, shape: Vec<usize>, values: Vec<f32>| {
        let narrow = || values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect();
        let norm = name.contains("norm");
        let (dtype, bytes) = if norm { (Dtype::BF16, narrow()) } else { (Dtype::F32, f32_bytes(&values)) };
        contents.insert(spelled(&name), (dtype, shape, bytes));
    };
    let of = |layer: &str, name: &str| &parameters[&format!("{layer}.{name}.weight")];
    for spec in tensor_table(config) {
        if spec.name.contains(".experts.") && !grouped
            || spec.name.contains("_proj") && spec.name.contains("attn.") && grouped
        {
            continue;
        }
        let values = parameters[&spec.name].clone();
        add(spec.name, spec.shape, values);
    }
    let (hidden, width) = (6, 5);
    if grouped {
        for layer in ["model.layers.0", "model.layers.1"] {
            let rows = |name: &str| of(layer, &format!("self_attn.{name}_proj")).chunks(hidden).map(<[f32]>::to_vec);
            let (q, k, v): (Vec<_>, Vec<_>, Vec<_>) = (rows("q").collect(), rows("k").collect(), rows("v").collect());
            let mut values = Vec::new();
            for head in 0..3 {
                for section in [&q[..12], &q[12..], &k, &v] {
                    section[4 * head..4 * head + 4].iter().for_each(|row| values.extend(row));
                }
            }
            add(format!("{layer}.self_attn.qkv_proj.weight"), vec![48, hidden], values);
            add(format!("{layer}.self_attn.o_proj.weight"), vec![hidden, 24], of(layer, "self_attn.o_proj").clone());
        }
    } else {
        let expert = |e: usize, part: &str| of("model.layers.0", &format!("mlp.experts.{e}.{part}_proj"));
        let (mut gate_up, mut down) = (Vec::new(), Vec::new());
        for e in 0..3 {
            for h in 0..hidden {
                gate_up.extend(
                    ["gate", "up"].iter().flat_map(|part| (0..width).map(move |w| expert(e, part)[w * hidden + h])),
                );
            }
            (0..width).for_each(|w| down.extend((0..hidden).map(|h| expert(e, "down")[h * width + w])));
        }
        add("model.layers.0.mlp.experts.gate_up_proj".to_owned(), vec![3, hidden, 2 * width], gate_up);
        add("model.layers.0.mlp.experts.down_proj".to_owned(), vec![3, width, hidden], down);
    }
    contents
}

/// Tensors that are carried, of types that weights do not have, one of them longer than what is read at a time.
fn carried() -> Contents {
    let long: Vec<u8> = (0..9_000_001u32).map(|at| (at % 251) as u8).collect();
    Contents::from([
        ("mtp.layers.0.weight".to_owned(), (Dtype::F64, vec![2], f32_bytes(&[f32::NAN, 1.0, 2.0, 3.0]))),
        ("mtp.none".to_owned(), (Dtype::F32, vec![0, 3], Vec::new())),
        ("model.visual.patch_embed.weight".to_owned(), (Dtype::U8, vec![9_000_001], long)),
    ])
}

fn write(path: &Path, contents: &Contents) {
    let declare = |(name, (dtype, shape, _)): (&String, &(Dtype, Vec<usize>, Vec<u8>))| TensorDecl {
        name: name.clone(),
        dtype: *dtype,
        shape: shape.clone(),
    };
    let declared: Vec<TensorDecl> = contents.iter().map(declare).collect();
    let mut writer = SafetensorsWriter::create(path, &[("format", "pt")], &declared).unwrap();
    contents.values().for_each(|(_, _, bytes)| writer.append(bytes).unwrap());
    writer.finish().unwrap();
}

fn read(dir: &Path) -> Contents {
    let mut found = Contents::new();
    for path in std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()) {
        if path.extension().is_some_and(|end| end == "safetensors") {
            let file = SafetensorsFile::open(&path).unwrap();
            for name in file.names() {
                let (dtype, shape) = file.info(&name).unwrap();
                found.insert(name.clone(), (dtype, shape.to_vec(), file.bytes(&name).unwrap().to_vec()));
            }
        }
    }
    found
}

/// A folder with `config.json` and these tensors.
fn folder(contents: &Contents) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), CONFIG).unwrap();
    write(&dir.path().join("model.safetensors"), contents);
    dir
}

#[test]
fn every_element_of_a_stored_tensor_belongs_to_one_parameter_in_every_format() {
    let config = config();
    let table = tensor_table(&config);
    for format in CheckpointFormat::all(&config).into_iter().chain(CheckpointFormat::all_of(&ROW, &config)) {
        let mut parameters = vec![0; table.len()];
        for tensor in format.tensors(&config, &table) {
            let mut owners = vec![0; tensor.shape.iter().product()];
            let mut end = 0;
            for group in tensor.groups() {
                let begin = group.iter().map(|part| part.extent().start).min().unwrap();
                assert_eq!(begin, end, "{format}: a group of {} follows the one before", tensor.name);
                end = group.iter().map(|part| part.extent().end).max().unwrap();
                for part in group {
                    parameters[part.parameter] += part.places().count();
                    part.places().for_each(|place| owners[place] += 1);
                }
            }
            assert!(owners.iter().all(|&owners| owners == 1), "{format}: {}", tensor.name);
        }
        assert!(parameters.iter().zip(&table).all(|(&found, spec)| found == spec.elements()), "{format}");
    }
}

#[test]
fn transposed_and_reordered_tensors_are_read_in_any_part_and_written_back_byte_for_byte() {
    let config = config();
    for (index, (nested, grouped)) in
        [(true, false), (true, true), (false, false), (false, true)].into_iter().enumerate()
    {
        let expected = contents(&config, nested, grouped);
        let dir = folder(&expected);
        let checkpoint = Checkpoint::open_as(&ROW, dir.path(), &config).unwrap();
        assert_eq!(checkpoint.format().to_string(), CheckpointFormat::all_of(&ROW, &config)[index].to_string());
        for (name, values) in parameters(&config) {
            for (start, len) in [(0, values.len()), (1, values.len() - 2), (values.len() - 1, 1), (0, 0)]
                .into_iter()
                .chain((0..values.len()).step_by(7).map(|start| (start, 7.min(values.len() - start))))
            {
                let mut found = vec![0f32; len];
                checkpoint.read_f32_part(&name, start, &mut found).unwrap();
                assert_eq!(found, values[start..start + len], "{name} from {start}");
            }
        }
        for bound in [u64::MAX, 300] {
            let out = tempfile::tempdir().unwrap();
            let files = ModelFiles::read(dir.path()).unwrap();
            save_model(out.path(), &files, &config, checkpoint.format(), None, bound, |name, out| {
                checkpoint.read_f32(name, out)
            })
            .unwrap();
            assert!(read(out.path()) == expected, "{}", checkpoint.format());
        }
    }
}

#[test]
fn a_value_of_a_transposed_tensor_that_is_not_finite_is_named_with_its_place_in_the_file() {
    let config = config();
    let mut tensors = contents(&config, true, false);
    let name = "model.language_model.layers.0.mlp.experts.gate_up_proj";
    // Row 2 of the second expert's up_proj, column 4.
    let place = (6 + 4) * 10 + 5 + 2;
    tensors.get_mut(name).unwrap().2[4 * place..][..4].copy_from_slice(&f32::INFINITY.to_le_bytes());
    let dir = folder(&tensors);
    let checkpoint = Checkpoint::open_as(&ROW, dir.path(), &config).unwrap();
    checkpoint.read_f32("model.layers.0.mlp.experts.1.gate_proj.weight", &mut [0.0; 30]).unwrap();
    let error = checkpoint.read_f32("model.layers.0.mlp.experts.1.up_proj.weight", &mut [0.0; 30]).unwrap_err();
    assert!(error.message.contains(name) && error.message.contains("[1, 4, 7]"), "{error}");
}

#[test]
fn carried_tensors_are_saved_with_their_bytes_also_when_the_folder_is_gone() {
    let config = config();
    let mut expected = contents(&config, true, false);
    expected.extend(carried());
    let mut stored = expected.clone();
    stored.insert("model.layers.0.rotary_emb.inv_freq".to_owned(), (Dtype::F32, vec![1], vec![0; 4]));
    stored.insert("lm_head.weight".to_owned(), expected["model.language_model.embed_tokens.weight"].clone());
    let dir = folder(&stored);
    let files = ModelFiles::read(dir.path()).unwrap();
    let format = Checkpoint::open_as(&ROW, dir.path(), &config).unwrap().format().clone();
    drop(dir);
    let parameters = parameters(&config);
    for (bound, dtype) in [(u64::MAX, None), (300, None), (u64::MAX, Some(WeightDtype::Bf16))] {
        let out = tempfile::tempdir().unwrap();
        save_model(out.path(), &files, &config, &format, dtype, bound, |name, out| {
            out.copy_from_slice(&parameters[name]);
            Ok(())
        })
        .unwrap();
        let mut found = read(out.path());
        if bound == 300 {
            let index = std::fs::read_to_string(out.path().join("model.safetensors.index.json")).unwrap();
            let index: serde_json::Value = serde_json::from_str(&index).unwrap();
            assert!(found.keys().all(|name| index["weight_map"][name].is_string()), "{index}");
            assert_eq!(index["weight_map"].as_object().unwrap().len(), found.len());
            let bytes: usize = found.values().map(|(_, _, bytes)| bytes.len()).sum();
            assert_eq!(index["metadata"]["total_size"].as_u64(), Some(bytes as u64));
        }
        if dtype.is_none() {
            assert!(found == expected);
        } else {
            // The type that is asked for is that of parameters alone.
            let kept = carried();
            assert!(kept.iter().all(|(name, tensor)| found.remove(name).as_ref() == Some(tensor)));
            assert!(found.values().all(|(dtype, _, _)| *dtype == Dtype::BF16));
        }
        // What was saved is opened and carried again.
        assert_eq!(Checkpoint::open_as(&ROW, out.path(), &config).unwrap().format().carried.len(), 3);
    }
}

#[test]
fn a_carried_tensor_is_read_a_piece_at_a_time() {
    let dir = folder(&carried());
    let file = SafetensorsFile::open(&dir.path().join("model.safetensors")).unwrap();
    let view = file.view("model.visual.patch_embed.weight").unwrap();
    let pieces: Vec<usize> = view.windows().map(<[u8]>::len).collect();
    assert_eq!(pieces, [4 << 20, 4 << 20, 9_000_001 - (8 << 20)]);
}

#[test]
fn a_family_without_tensors_to_carry_refuses_them_by_name() {
    let config = config();
    let mut tensors = contents(&config, false, true);
    tensors.extend(carried());
    let error = Checkpoint::open(folder(&tensors).path(), &config).unwrap_err();
    assert!(error.message.contains("surplus (5): ") && error.message.contains("mtp.layers.0.weight"), "{error}");
    tensors.insert("visual.patch_embed.weight".to_owned(), (Dtype::U8, vec![1], vec![0]));
    let error = Checkpoint::open_as(&ROW, folder(&tensors).path(), &config).unwrap_err();
    assert!(error.message.contains("surplus (1): visual.patch_embed.weight"), "{error}");
}

#[test]
fn a_folder_that_several_write_in_parts_has_the_bytes_of_one_that_is_written_as_a_whole() {
    let config = config();
    let parameters = parameters(&config);
    let bytes_of = |dir: &Path| {
        let mut files: Vec<(String, Vec<u8>)> = std::fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap())
            .map(|entry| (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap()))
            .collect();
        files.sort();
        files
    };
    for (nested, grouped) in [(true, false), (true, true), (false, false), (false, true)] {
        let mut stored = contents(&config, nested, grouped);
        stored.extend(carried());
        let dir = folder(&stored);
        let files = ModelFiles::read(dir.path()).unwrap();
        let format = Checkpoint::open_as(&ROW, dir.path(), &config).unwrap().format().clone();
        for (bound, dtype) in [(u64::MAX, None), (300, None), (u64::MAX, Some(WeightDtype::Bf16))] {
            let (whole, shared) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
            save_model(whole.path(), &files, &config, &format, dtype, bound, |name, out| {
                out.copy_from_slice(&parameters[name]);
                Ok(())
            })
            .unwrap();
            let model = SharedModel {
                dir: shared.path(),
                files: &files,
                config: &config,
                format: &format,
                dtype,
                max_shard_bytes: bound,
            };
            model.lay_out().unwrap();
            assert!(bytes_of(shared.path()) != bytes_of(whole.path()));
            // Three writers, of which one has nothing of some parameters.
            for writer in [2, 0, 1] {
                let owned = |name: &str| {
                    let len = parameters[name].len();
                    let at = |i: usize| (i * len / 3 + i).min(len);
                    let end = if writer == 2 { len } else { at(writer + 1) };
                    std::iter::once(at(writer)..end).collect()
                };
                let fetch = |name: &str, start: usize, out: &mut [f32]| {
                    out.copy_from_slice(&parameters[name][start..start + out.len()]);
                    Ok(())
                };
                model.fill(owned, fetch).unwrap();
            }
            assert!(bytes_of(shared.path()) == bytes_of(whole.path()), "{format} {bound} {dtype:?}");
        }
    }
}

#[test]
fn a_folder_that_another_writer_has_not_laid_out_is_not_shared() {
    let config = config();
    let dir = folder(&contents(&config, false, false));
    let files = ModelFiles::read(dir.path()).unwrap();
    let format = Checkpoint::open_as(&ROW, dir.path(), &config).unwrap().format().clone();
    let out = tempfile::tempdir().unwrap();
    let (dtype, max_shard_bytes) = (None, u64::MAX);
    let model =
        SharedModel { dir: out.path(), files: &files, config: &config, format: &format, dtype, max_shard_bytes };
    let error = model.fill(|_| Vec::new(), |_, _, _| Ok(())).unwrap_err();
    assert!(error.message.contains("rank 0 has made this file, and here it is missing"), "{error}");
    std::fs::write(out.path().join("model.safetensors"), "short").unwrap();
    let error = model.fill(|_| Vec::new(), |_, _, _| Ok(())).unwrap_err();
    assert!(error.message.contains("has 5 bytes, not "), "{error}");
}
