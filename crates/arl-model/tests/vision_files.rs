//! Files of models that see are read in every spelling and layout, and written back as they were; with text alone the tower is
//! carried. The table is that of transformers' files.

use crate::common;
use crate::seeing;

use std::collections::BTreeMap;
use std::path::PathBuf;

use arl_model::{
    Checkpoint, CheckpointFormat, Dtype, Family, Mlp, ModelConfig, ModelFiles, SafetensorsFile, WeightDtype,
    save_model, tensor_table,
};
use common::{Entry, entries_of, raw, write};
use seeing::FAMILIES;
use serde_json::json;
use tempfile::TempDir;

/// How experts lie in a file.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Experts {
    Apart,
    Joined,
    Transposed,
}

/// Where a file has its parameters: what it has in the place of `model.visual.` and of `model.`.
#[derive(Clone, Copy, Debug)]
struct Layout {
    tower: &'static str,
    decoder: &'static str,
    experts: Experts,
}

const SPELLINGS: [(&str, &str); 4] = [
    ("model.visual.", "model.language_model."),
    ("visual.", "model."),
    ("model.visual.", "model."),
    ("visual.", "language_model."),
];

fn layouts(family: Family) -> Vec<Layout> {
    let experts: &[Experts] = match family {
        Family::Qwen3VlMoe => &[Experts::Transposed, Experts::Joined, Experts::Apart],
        Family::Qwen3_5Moe => &[Experts::Joined, Experts::Apart],
        _ => &[Experts::Apart],
    };
    let all = |&(tower, decoder): &(&'static str, &'static str)| {
        experts.iter().map(move |&experts| Layout { tower, decoder, experts })
    };
    SPELLINGS.iter().flat_map(all).collect()
}

/// `[columns, rows]` of `[rows, columns]`.
fn transposed(values: &[f32], columns: usize) -> Vec<f32> {
    (0..columns).flat_map(|column| values.iter().skip(column).step_by(columns).copied()).collect()
}

/// A file of these parameters, put together apart from the code under test: matrices in bf16, the rest in f32.
fn contents(config: &ModelConfig, layout: Layout) -> Vec<Entry> {
    let parameters = common::exact_parameters(config);
    let mut tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)> = BTreeMap::new();
    for spec in tensor_table(config) {
        tensors.insert(spec.name.clone(), (spec.shape, parameters[&spec.name].clone()));
    }
    let sparse = |layer: &usize| layout.experts != Experts::Apart && matches!(config.layers[*layer].mlp, Mlp::Moe(_));
    for layer in (0..config.layers.len()).filter(sparse) {
        let at = |name: &str| format!("model.layers.{layer}.mlp.experts.{name}");
        let mut take = |e: usize, part: &str| tensors.remove(&at(&format!("{e}.{part}_proj.weight"))).unwrap().1;
        let joined: Vec<(Vec<f32>, Vec<f32>)> =
            (0..3).map(|e| ([take(e, "gate"), take(e, "up")].concat(), take(e, "down"))).collect();
        // Of 12 columns and twice 4 rows; of 4 columns and 12 rows.
        let turned = layout.experts == Experts::Transposed;
        let turn = |values: &[f32], columns| if turned { transposed(values, columns) } else { values.to_vec() };
        let gate_up = joined.iter().flat_map(|(gate_up, _)| turn(gate_up, 12)).collect();
        let down = joined.iter().flat_map(|(_, down)| turn(down, 4)).collect();
        let shapes = if turned { [vec![3, 12, 8], vec![3, 4, 12]] } else { [vec![3, 8, 12], vec![3, 12, 4]] };
        let [of_gate_up, of_down] = shapes;
        tensors.insert(at("gate_up_proj"), (of_gate_up, gate_up));
        tensors.insert(at("down_proj"), (of_down, down));
    }
    let entry = |(name, (shape, values)): (String, (Vec<usize>, Vec<f32>))| {
        let dtype = if shape.len() == 1 { WeightDtype::F32 } else { WeightDtype::Bf16 };
        let (dtype, bytes) = raw(&values, dtype);
        let name = match (name.strip_prefix("model.visual."), name.strip_prefix("model.")) {
            (Some(rest), _) => format!("{}{rest}", layout.tower),
            (None, Some(rest)) => format!("{}{rest}", layout.decoder),
            _ => name,
        };
        (name, dtype, shape, bytes)
    };
    let mut entries: Vec<Entry> = tensors.into_iter().map(entry).collect();
    if matches!(config.family, Family::Qwen3_5 | Family::Qwen3_5Moe) {
        entries.push(("mtp.fc.weight".to_owned(), Dtype::U8, vec![3], vec![255, 0, 7]));
    }
    entries.sort_by(|left, right| left.0.cmp(&right.0));
    entries
}

fn folder(text: &str, tensors: &[Entry]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), text).unwrap();
    write(&dir.path().join("model.safetensors"), tensors);
    dir
}

/// The folder that comes out of one that was not trained.
fn saved(dir: &TempDir, config: &ModelConfig, dtype: Option<WeightDtype>) -> (TempDir, String) {
    let (files, out) = (ModelFiles::read(dir.path()).unwrap(), tempfile::tempdir().unwrap());
    let checkpoint = Checkpoint::open(dir.path(), config).unwrap();
    let read = |name: &str, out: &mut [f32]| checkpoint.read_f32(name, out);
    save_model(out.path(), &files, config, checkpoint.format(), dtype, u64::MAX, read).unwrap();
    (out, checkpoint.format().to_string())
}

#[test]
fn every_spelling_and_layout_is_read_to_the_same_parameters_and_written_back_byte_for_byte() {
    for family in FAMILIES {
        for (nested, tied) in [(true, false), (true, true), (false, false)] {
            if !nested && family != Family::Qwen2_5Vl {
                continue;
            }
            let text = format!("{:#}\n", seeing::config(family, nested, tied));
            let config = seeing::parse(&serde_json::from_str(&text).unwrap()).unwrap();
            let mut formats = Vec::new();
            for layout in layouts(family) {
                let expected = contents(&config, layout);
                let dir = folder(&text, &expected);
                let checkpoint = Checkpoint::open(dir.path(), &config).unwrap();
                for (name, values) in common::exact_parameters(&config) {
                    let mut found = vec![0f32; values.len()];
                    checkpoint.read_f32(&name, &mut found).unwrap();
                    assert_eq!(found, values, "{family} {layout:?} {name}");
                }
                let (out, format) = saved(&dir, &config, None);
                assert!(entries_of(out.path()) == expected, "{family} nested {nested} {layout:?}");
                assert_eq!(std::fs::read_to_string(out.path().join("config.json")).unwrap(), text);
                assert!(!formats.contains(&format), "{format}");
                formats.push(format);
                // With text alone the same bytes are carried past the decoder.
                let alone = config.clone().text_alone();
                let (out, _) = saved(&dir, &alone, None);
                assert!(entries_of(out.path()) == expected, "text of {family} nested {nested} {layout:?}");
            }
            let all: Vec<String> = CheckpointFormat::all(&config).iter().map(ToString::to_string).collect();
            assert_eq!(all.len(), formats.len());
            let first = CheckpointFormat::new(&config).to_string();
            assert_eq!(all[0], first);
            // As they were released.
            assert_eq!(
                first.contains("`model.language_model.` and `model.visual.`"),
                family != Family::Qwen2_5Vl,
                "{first}"
            );
            assert_eq!(first.contains("transposed"), family == Family::Qwen3VlMoe, "{first}");
        }
    }
}

#[test]
fn names_of_two_spellings_and_tensors_that_are_no_parameters_are_refused() {
    for family in FAMILIES {
        let text = seeing::config(family, true, true).to_string();
        let config = seeing::model(family, true);
        let good = contents(&config, layouts(family)[0]);
        let refusal = |change: &dyn Fn(&mut Entry)| {
            let mut tensors = good.clone();
            tensors.iter_mut().for_each(change);
            Checkpoint::open(folder(&text, &tensors).path(), &config).expect_err("must be refused").message
        };
        let said = refusal(&|entry| {
            if let Some(rest) = entry.0.strip_prefix("model.visual.merger.") {
                entry.0 = format!("visual.merger.{rest}");
            }
        });
        assert!(said.contains("the tensors mix two formats") && said.contains("visual.merger."), "{said}");
        let said = refusal(&|entry| {
            if entry.0.ends_with("blocks.1.attn.qkv.bias") {
                entry.0 = "model.visual.blocks.2.attn.qkv.bias".to_owned();
            }
        });
        assert!(said.contains("missing (1): model.visual.blocks.1.attn.qkv.bias"), "{said}");
        assert!(said.contains("surplus (1): model.visual.blocks.2.attn.qkv.bias"), "{said}");
        let said = refusal(&|entry| entry.0 = format!("base_model.model.{}", entry.0));
        assert!(said.contains("the names of all tensors begin with `base_model.model.`"), "{said}");
    }
}

#[test]
fn a_type_that_is_asked_for_is_also_the_towers_unless_that_is_carried() {
    let mut text = seeing::config(Family::Qwen3Vl, true, false);
    text["vision_config"]["dtype"] = json!("bfloat16");
    text["text_config"]["dtype"] = json!("bfloat16");
    let config = seeing::parse(&text).unwrap();
    let text = format!("{text:#}");
    let dir = folder(&text, &contents(&config, layouts(Family::Qwen3Vl)[0]));
    let written = |config: &ModelConfig| {
        let (out, _) = saved(&dir, config, Some(WeightDtype::F32));
        let types: Vec<(String, Dtype)> = entries_of(out.path()).into_iter().map(|entry| (entry.0, entry.1)).collect();
        (std::fs::read_to_string(out.path().join("config.json")).unwrap(), types)
    };
    let (whole, types) = written(&config);
    assert_eq!(whole, text.replace("bfloat16", "float32"));
    assert!(types.iter().all(|(_, dtype)| *dtype == Dtype::F32));
    let (alone, types) = written(&config.text_alone());
    assert_eq!(alone.matches("bfloat16").count(), 1, "{alone}");
    let carried = |(name, dtype): &(String, Dtype)| name.contains(".qkv.weight") && *dtype == Dtype::BF16;
    assert_eq!(types.iter().filter(|entry| carried(entry)).count(), 2);
}

#[test]
fn saved_models_have_the_files_of_the_image_processor() {
    let text = seeing::config(Family::Qwen3Vl, true, false).to_string();
    let config = seeing::model(Family::Qwen3Vl, false);
    let dir = folder(&text, &contents(&config, layouts(Family::Qwen3Vl)[0]));
    let names = [
        "preprocessor_config.json",
        "video_preprocessor_config.json",
        "processor_config.json",
        "chat_template.json",
        "chat_template.jinja",
    ];
    for name in names {
        std::fs::write(dir.path().join(name), format!("{{\"of\": \"{name}\"}}\n")).unwrap();
    }
    let (out, _) = saved(&dir, &config, None);
    for name in names {
        assert_eq!(std::fs::read_to_string(out.path().join(name)).unwrap(), format!("{{\"of\": \"{name}\"}}\n"));
    }
}

fn golden() -> Option<PathBuf> {
    let default = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared");
    let golden = std::env::var_os("ARL_SHARED").map_or(default, PathBuf::from).join("golden/vision");
    if golden.is_dir() {
        return Some(golden);
    }
    eprintln!("SKIPPED: there is no {}", golden.display());
    None
}

#[test]
fn the_tables_of_the_golden_cases_are_those_of_transformers_files() {
    let Some(golden) = golden() else { return };
    for (case, nested) in [("qwen2_5-vl", false), ("qwen3-vl", true), ("qwen3_5-vl", true)] {
        let dir = golden.join(case);
        let config = ModelConfig::from_dir(&dir).unwrap();
        assert_eq!(config.unknown_keys, Vec::<String>::new(), "{case}");
        let spelled = |name: &str| match (nested, name.strip_prefix("model.")) {
            (true, Some(rest)) if !rest.starts_with("visual.") => format!("model.language_model.{rest}"),
            (false, Some(rest)) if rest.starts_with("visual.") => rest.to_owned(),
            _ => name.to_owned(),
        };
        let mut expected: Vec<(String, Vec<usize>)> =
            tensor_table(&config).into_iter().map(|spec| (spelled(&spec.name), spec.shape)).collect();
        expected.sort();
        let files = ["model", "grads", "trained"].map(|name| dir.join(format!("{name}.safetensors")));
        for path in &files {
            let file = SafetensorsFile::open(path).unwrap();
            let shape = |name: String| (name.clone(), file.info(&name).unwrap().1.to_vec());
            let mut found: Vec<(String, Vec<usize>)> = file.names().into_iter().map(shape).collect();
            found.sort();
            assert_eq!(found, expected, "{}", path.display());
        }
        let checkpoint = Checkpoint::open(&dir, &config).unwrap();
        let bytes = std::fs::read(&files[0]).unwrap();
        let whole = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        for spec in tensor_table(&config) {
            let mut values = vec![0f32; spec.elements()];
            checkpoint.read_f32(&spec.name, &mut values).unwrap();
            assert_eq!(
                bytemuck::cast_slice::<f32, u8>(&values),
                whole.tensor(&spelled(&spec.name)).unwrap().data(),
                "{case}"
            );
        }
    }
}
