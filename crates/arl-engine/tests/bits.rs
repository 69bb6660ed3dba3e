//! Numbers of earlier versions, bit by bit: what a change of structure must not move. `bits/figures.json` has them for the
//! vector instructions that they were computed with; `ARL_WRITE_BITS=1 cargo test -p arl-engine --test bits` writes those of
//! this machine, and is for a change that is meant to move them. `bits/state-*` is a saved state in the format of its time.

use crate::common;

use std::path::{Path, PathBuf};

use arl_engine::backend::DType;
use arl_engine::backend::cpu::CpuBackend;
use arl_engine::{Engine, MicroBatch, Recompute, Weights};
use common::{HYPER, MODELS, TYPES, batch, model, open, options, state_bits};
use serde_json::{Value, json};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bits")
}

/// FNV-1a over the bytes of words.
fn hash(words: impl IntoIterator<Item = u64>) -> String {
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    let bytes = words.into_iter().flat_map(u64::to_le_bytes);
    format!("{:016x}", bytes.fold(0xcbf2_9ce4_8422_2325, step))
}

/// The steps that every figure is about: two micro-batches, packed, weighted, the second of another size each time.
fn steps() -> Vec<Vec<MicroBatch>> {
    (0..6).map(|i| vec![batch(&[9, 3, 21], i), batch(&[i as usize + 2], i)]).collect()
}

/// Losses of the steps, and weights and moments after them.
fn figures(engine: &mut Engine<CpuBackend>, steps: &[Vec<MicroBatch>]) -> Value {
    let losses: Vec<u64> = steps.iter().map(|step| engine.step(step, HYPER).unwrap().loss.to_bits()).collect();
    json!({ "losses": hash(losses), "state": hash(state_bits(engine).into_iter().map(u64::from)) })
}

/// The golden models, by name.
fn models() -> Vec<String> {
    let entries = std::fs::read_dir(model("")).unwrap().flatten().filter(|entry| entry.path().is_dir());
    let mut names: Vec<String> = entries.map(|entry| entry.file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn saved_state(name: &str, dtype: DType) -> PathBuf {
    folder().join(format!("state-{name}-{}", format!("{dtype:?}").to_lowercase()))
}

/// Every figure of this machine.
fn computed() -> Value {
    let mut all = serde_json::Map::new();
    for name in models() {
        for dtype in TYPES {
            for recompute in [Recompute::Off, Recompute::Block] {
                let mut engine = open(&name, &options(dtype, recompute, 33));
                all.insert(format!("{name} {dtype:?} {recompute:?}"), figures(&mut engine, &steps()));
            }
        }
    }
    for name in MODELS {
        for dtype in TYPES {
            let options = options(dtype, Recompute::Norms, 33);
            let weights = Weights::Random(7);
            let mut engine = Engine::open(Box::new(CpuBackend::new()), &model(name), weights, &options).unwrap();
            engine.restore_state(&saved_state(name, dtype)).unwrap();
            assert_eq!(engine.steps(), 3);
            all.insert(format!("{name} {dtype:?} resumed"), figures(&mut engine, &steps()[3..]));
        }
    }
    Value::Object(all)
}

#[test]
fn golden_models_and_resumed_states_give_the_bits_of_earlier_versions() {
    let path = folder().join("figures.json");
    let machine = format!("{} {}", std::env::consts::ARCH, arl_engine::backend::cpu::simd::level().name());
    let mut stored: Value = std::fs::read(&path).map_or(json!({}), |bytes| serde_json::from_slice(&bytes).unwrap());
    if std::env::var_os("ARL_WRITE_BITS").is_some() {
        // A state that is there stays: that it is an old one is what it is for.
        for (name, dtype) in MODELS.into_iter().flat_map(|name| TYPES.map(|dtype| (name, dtype))) {
            if !saved_state(name, dtype).exists() {
                let mut engine = open(name, &options(dtype, Recompute::Norms, 33));
                figures(&mut engine, &steps()[..3]);
                std::fs::create_dir_all(saved_state(name, dtype)).unwrap();
                engine.save_state(&saved_state(name, dtype)).unwrap();
            }
        }
        stored[&machine] = computed();
        std::fs::write(&path, format!("{stored:#}\n")).unwrap();
        return;
    }
    let Some(expected) = stored.get(&machine) else {
        eprintln!("SKIPPED: {} has no bits for {machine}", path.display());
        return;
    };
    let computed = computed();
    let keys: std::collections::BTreeSet<&String> =
        [expected, &computed].into_iter().flat_map(|figures| figures.as_object().unwrap().keys()).collect();
    let wrong: Vec<String> = keys
        .into_iter()
        .filter(|key| expected.get(key.as_str()) != computed.get(key.as_str()))
        .map(|key| format!("{key}: {} was {}", computed[key], expected[key]))
        .collect();
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), computed.as_object().unwrap().len(), wrong.join("\n"));
}
