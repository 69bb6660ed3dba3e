//! What the tests of adapters share: small models with adapters of given values.

#![allow(dead_code, unreachable_pub, reason = "each test file uses a part of it")]

use std::path::Path;

use arl_engine::backend::cpu::CpuBackend;
use arl_engine::{Engine, EngineOptions, Kind, LoraOptions, MicroBatch, Recompute, Weights};
use arl_model::{Lora, LoraConfig, ModelFiles, save_adapter};
use serde_json::Value;

use super::{batch, model};

pub const LEVELS: [Recompute; 4] = [Recompute::Off, Recompute::Norms, Recompute::Mlp, Recompute::Block];

pub fn config(text: &Value) -> LoraConfig {
    LoraConfig::from_json(&text.to_string(), Path::new("adapter_config.json")).unwrap()
}

pub fn with(base: EngineOptions, text: &Value) -> EngineOptions {
    EngineOptions { lora: Some(LoraOptions { config: config(text), seed: 9 }), ..base }
}

pub fn open(name: &str, options: &EngineOptions) -> Engine<CpuBackend> {
    Engine::open(Box::new(CpuBackend::new()), &model(name), Weights::Checkpoint, options).unwrap()
}

/// A folder with an adapter of these values by name and place.
pub fn adapter_of(name: &str, text: &Value, value: impl Fn(&str, usize) -> f32) -> tempfile::TempDir {
    let files = ModelFiles::read(&model(name)).unwrap();
    let lora = Lora::new(&files.config().unwrap(), &config(text)).unwrap();
    let dir = tempfile::tempdir().unwrap();
    save_adapter(dir.path(), &files, &lora, None, |name, out| {
        out.iter_mut().enumerate().for_each(|(place, out)| *out = value(name, place));
        Ok(())
    })
    .unwrap();
    dir
}

/// Numbers from -0.5 to 0.5 that depend on name and place.
pub fn scattered(name: &str, place: usize) -> f32 {
    let seed = name.bytes().fold(place as u32 + 17, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(16_777_619));
    (seed >> 8) as f32 / (1 << 24) as f32 - 0.5
}

pub fn batches() -> [MicroBatch; 2] {
    [batch(&[9, 3, 21], 1), batch(&[17], 2)]
}

pub fn trained(engine: &Engine<CpuBackend>) -> Vec<String> {
    engine.lora().unwrap().stored().into_iter().map(|(_, spec)| spec.name.clone()).collect()
}

pub fn bits(engine: &mut Engine<CpuBackend>, names: &[String], kind: Kind) -> Vec<Vec<u32>> {
    let read = |name: &String| engine.read_tensor(name, kind).unwrap().into_iter().map(f32::to_bits).collect();
    names.iter().map(read).collect()
}
