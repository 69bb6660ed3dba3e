//! Parameters that are not trained: they keep their bytes and cost their weights alone, and the others train as they would.

use crate::common;

use arl_engine::backend::DType;
use arl_engine::backend::cpu::CpuBackend;
use arl_engine::{Engine, EngineOptions, Kind, MicroBatch, Recompute, Weights};
use arl_model::{ErrorCode, SafetensorsFile};
use common::{HYPER, MODELS, TYPES, batch, model, open, options};

/// What is frozen: the lowest layers, as under an adapter or behind a vision tower; kinds of parameters in every layer; and
/// all but the last norm.
const PATTERNS: [&[&str]; 4] = [
    &["*embed_tokens*", "model.layers.0.*"],
    &["*norm.weight", "*bias"],
    &["*self_attn*", "*mlp*"],
    &["model.layers.*", "*embed_tokens*", "lm_head*"],
];

const LEVELS: [Recompute; 4] = [Recompute::Off, Recompute::Norms, Recompute::Mlp, Recompute::Block];

/// Patterns that match something in a model, and its other parameters.
fn freezing(name: &str, patterns: &[&str]) -> (Vec<String>, Vec<String>, Vec<String>) {
    let mut patterns: Vec<String> = patterns.iter().map(|pattern| (*pattern).to_owned()).collect();
    let names = open(name, &options(DType::F32, Recompute::Norms, 33)).tensor_names();
    let hit = |pattern: &str, name: &str| {
        let mut rest = name;
        pattern.split('*').filter(|part| !part.is_empty()).all(|part| {
            let found = rest.find(part);
            rest = found.map_or(rest, |at| &rest[at + part.len()..]);
            found.is_some()
        })
    };
    patterns.retain(|pattern| names.iter().any(|name| hit(pattern, name)));
    let (frozen, trained) = names.into_iter().partition(|name| patterns.iter().any(|pattern| hit(pattern, name)));
    (patterns, frozen, trained)
}

fn bits(engine: &mut Engine<CpuBackend>, names: &[String], kind: Kind) -> Vec<Vec<u32>> {
    let read = |name: &String| engine.read_tensor(name, kind).unwrap().into_iter().map(f32::to_bits).collect();
    names.iter().map(read).collect()
}

fn batches() -> [MicroBatch; 2] {
    [batch(&[9, 3, 21], 1), batch(&[17], 2)]
}

#[test]
fn the_first_steps_gradients_are_those_of_a_full_run_in_bits() {
    for name in MODELS {
        for patterns in PATTERNS {
            let (frozen, _, trained) = freezing(name, patterns);
            assert!(!trained.is_empty());
            for dtype in TYPES {
                for recompute in LEVELS {
                    let base = options(dtype, recompute, 33);
                    let mut full = open(name, &base);
                    let losses = full.gradients(&batches()).unwrap();
                    let mut part = open(name, &EngineOptions { frozen: frozen.clone(), ..base });
                    assert_eq!(part.gradients(&batches()).unwrap(), losses);
                    let same = bits(&mut part, &trained, Kind::Gradients) == bits(&mut full, &trained, Kind::Gradients);
                    assert!(same, "{name} {dtype:?} {recompute:?} {patterns:?}");
                }
            }
        }
    }
}

#[test]
fn frozen_weights_keep_their_bytes_through_training_saving_and_resuming() {
    for name in MODELS {
        for patterns in PATTERNS {
            let (frozen, kept, trained) = freezing(name, patterns);
            for dtype in TYPES {
                let options = EngineOptions { frozen: frozen.clone(), ..options(dtype, Recompute::Block, 33) };
                let what = format!("{name} {dtype:?} {patterns:?}");
                let mut engine = open(name, &options);
                let before = bits(&mut engine, &kept, Kind::Weights);
                let start = bits(&mut engine, &trained, Kind::Weights);
                for _ in 0..3 {
                    engine.step(&batches(), HYPER).unwrap();
                }
                assert!(bits(&mut engine, &kept, Kind::Weights) == before, "{what}");
                let moved = bits(&mut engine, &trained, Kind::Weights);
                assert!(moved.iter().zip(&start).all(|(after, before)| after != before), "{what}");

                let dir = tempfile::tempdir().unwrap();
                engine.export_model(dir.path(), None).unwrap();
                engine.save_state(dir.path()).unwrap();
                let saved = SafetensorsFile::open(&dir.path().join("engine.safetensors")).unwrap().names();
                let of = |names: &[String]| saved.iter().filter(|at| names.iter().any(|n| at.ends_with(n))).count();
                assert_eq!((of(&kept), of(&trained)), (0, saved.len()), "{what}");

                let backend = Box::new(CpuBackend::new());
                let mut resumed = Engine::open(backend, dir.path(), Weights::Restored, &options).unwrap();
                resumed.restore_state(dir.path()).unwrap();
                assert!(bits(&mut resumed, &kept, Kind::Weights) == before, "{what}");
                for engine in [&mut engine, &mut resumed] {
                    engine.step(&batches(), HYPER).unwrap();
                }
                for kind in [Kind::Weights, Kind::Moment1, Kind::Moment2] {
                    assert!(bits(&mut resumed, &trained, kind) == bits(&mut engine, &trained, kind), "{what} {kind:?}");
                }
            }
        }
    }
}

#[test]
fn the_norm_is_of_trained_gradients_and_frozen_parameters_have_none() {
    let (frozen, kept, trained) = freezing("moe-balance", PATTERNS[0]);
    let mut engine = open("moe-balance", &EngineOptions { frozen, ..options(DType::F32, Recompute::Norms, 33) });
    let norm = engine.step(&batches(), HYPER).unwrap().grad_norm;
    let squares = |value: f32| f64::from(value) * f64::from(value);
    let sum: f64 =
        trained.iter().flat_map(|name| engine.read_tensor(name, Kind::Gradients).unwrap()).map(squares).sum();
    assert!((sum.sqrt() - norm).abs() < 1e-9 * norm, "{} {norm}", sum.sqrt());
    let error = engine.read_tensor(&kept[0], Kind::Moment1).unwrap_err();
    assert!(error.message.contains("is frozen and has weights alone"), "{error}");
}

#[test]
fn offloading_changes_no_bit_of_a_run_with_frozen_parameters() {
    for (name, layers) in [("window-bias", 7), ("moe-balance", 6)] {
        let dir = common::deeper(name, layers);
        for patterns in
            [&["*embed_tokens*", "model.layers.0.*", "model.layers.1.*"][..], &["model.layers.1.*", "*.o_proj.weight"]]
        {
            let frozen: Vec<String> = patterns.iter().map(|pattern| (*pattern).to_owned()).collect();
            for recompute in LEVELS {
                let run = |activation_offloading, optimizer_offload| {
                    let base = options(DType::Bf16, recompute, 33);
                    let frozen = frozen.clone();
                    let options = EngineOptions { activation_offloading, optimizer_offload, frozen, ..base };
                    let backend = Box::new(CpuBackend::new());
                    let mut engine = Engine::open(backend, dir.path(), Weights::Random(7), &options).unwrap();
                    let losses: Vec<u64> =
                        (0..3).map(|_| engine.step(&batches(), HYPER).unwrap().loss.to_bits()).collect();
                    let names = engine.tensor_names();
                    (losses, bits(&mut engine, &names, Kind::Weights))
                };
                let plain = run(false, false);
                for (activations, optimizer) in [(true, false), (false, true), (true, true)] {
                    assert!(run(activations, optimizer) == plain, "{name} {recompute:?} {activations} {optimizer}");
                }
            }
        }
    }
}

#[test]
fn frozen_parameters_need_their_weights_alone_and_frozen_layers_keep_nothing() {
    let bytes = |engine: &Engine<CpuBackend>, name: &str| {
        engine.memory().categories.iter().find(|(category, _)| *category == name).map_or(0, |(_, bytes)| *bytes)
    };
    let (frozen, _, trained) = freezing("moe-balance", PATTERNS[0]);
    let base = options(DType::Bf16, Recompute::Off, 4096);
    let full = open("moe-balance", &base);
    let mut part = open("moe-balance", &EngineOptions { frozen, ..base });
    let elements: usize = trained.iter().map(|name| part.read_tensor(name, Kind::Weights).unwrap().len()).sum();
    let gaps = 32 * trained.len();
    for (category, size) in [("gradients", 4), ("master weights", 2), ("moments", 8)] {
        let planned = bytes(&part, category);
        assert!((size * elements..=size * (elements + gaps)).contains(&planned), "{category}: {planned}");
        assert!(planned < bytes(&full, category), "{category}");
    }
    assert_eq!(bytes(&part, "weights"), bytes(&full, "weights"));
    assert!(bytes(&part, "activations") < bytes(&full, "activations") * 2 / 3);
    assert!(part.memory().total_bytes < full.memory().total_bytes);
}

#[test]
fn what_cannot_be_frozen_is_refused_by_name() {
    let refused = |pattern: &str| {
        let frozen = vec![pattern.to_owned()];
        let options = EngineOptions { frozen, ..options(DType::F32, Recompute::Norms, 33) };
        let weights = Weights::Random(1);
        let opened = Engine::open(Box::new(CpuBackend::new()), &model("window-bias"), weights, &options);
        let error = opened.map(|_| ()).unwrap_err();
        assert_eq!(error.code, ErrorCode::Config);
        error.message
    };
    assert!(refused("model.visual.*").contains("no parameter is called `model.visual.*`"));
    assert!(refused("*.0.self_attn.v_proj.weight").contains("one matrix product takes both"));
    assert!(refused("*").contains("no parameter is left to train"));
}
