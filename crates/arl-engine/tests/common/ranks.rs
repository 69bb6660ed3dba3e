//! Ranks that are threads, each with an engine: for tests of what they divide.

use std::path::Path;

use arl_comm::{Group, local_groups};
use arl_engine::backend::cpu::CpuBackend;
use arl_engine::{Engine, EngineOptions, IGNORED, Kind, LoraOptions, Mesh, MicroBatch, StepStats, Weights};
use arl_model::LoraConfig;
use serde_json::json;
use tempfile::TempDir;

use super::{HYPER, batch, hybrid_config, model};

pub type Cpu = Engine<CpuBackend>;

/// What `work` gives on each of `size` threads, each of which is a rank with an engine of its own.
pub fn on_ranks<T: Send>(
    name: &str,
    options: &EngineOptions,
    size: usize,
    weights: Weights,
    work: impl Fn(&mut Cpu, usize) -> T + Sync,
) -> Vec<T> {
    on_mesh(name, &EngineOptions { mesh: Mesh::default(), ..options.clone() }, size, weights, work)
}

/// As [`on_ranks`], with `data` data-parallel ranks times those of the options' mesh.
pub fn on_mesh<T: Send>(
    name: &str,
    options: &EngineOptions,
    data: usize,
    weights: Weights,
    work: impl Fn(&mut Cpu, usize) -> T + Sync,
) -> Vec<T> {
    let Mesh { tp, cp, pp, .. } = options.mesh;
    let size = data * tp * cp * pp;
    let run = |rank: usize, group: Box<dyn Group>| {
        let options = EngineOptions { data_parallel: Some(data), rank, ..options.clone() };
        let mut engine = Engine::open(Box::new(CpuBackend::new()), &model(name), weights, &options).unwrap();
        engine.join(group).unwrap();
        work(&mut engine, rank)
    };
    std::thread::scope(|scope| {
        let run = &run;
        let groups = local_groups(size).into_iter().enumerate();
        let ranks: Vec<_> = groups.map(|(rank, group)| scope.spawn(move || run(rank, group))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// A model of every kind of layer, with heads, columns and experts that two ranks can have halves of.
pub fn hybrid() -> TempDir {
    let more = json!({
        "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16,
        "linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_value_head_dim": 16, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 64,
    });
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), hybrid_config("qwen3_5_moe_text", more).to_string()).unwrap();
    dir
}

/// A copy of a model's folder in which `change` has changed the bytes of the file of weights.
pub fn with_other_weights(name: &str, change: impl FnOnce(&mut [u8])) -> TempDir {
    let copy = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(model(name)).unwrap().map(Result::unwrap).filter(|file| file.path().is_file()) {
        std::fs::copy(file.path(), copy.path().join(file.file_name())).unwrap();
    }
    let weights = copy.path().join("model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    change(&mut bytes);
    std::fs::write(&weights, bytes).unwrap();
    copy
}

/// The fingerprints of two data-parallel ranks, each of which has read a folder of its own.
pub fn fingerprints(options: &EngineOptions, folders: [&Path; 2]) -> [String; 2] {
    let open = |rank: usize, group: Box<dyn Group>| {
        let options = EngineOptions { data_parallel: Some(2), rank, ..options.clone() };
        let backend = Box::new(CpuBackend::new());
        let mut engine = Engine::open(backend, folders[rank], Weights::Checkpoint, &options).unwrap();
        engine.join(group).unwrap();
        engine.fingerprint().unwrap()
    };
    let [first, last] = <[_; 2]>::try_from(local_groups(2)).map_err(|_| ()).unwrap();
    std::thread::scope(|scope| {
        let other = scope.spawn(|| open(1, last));
        [open(0, first), other.join().unwrap()]
    })
}

/// Weights of all tensors and moments of the trained ones, in bits. All ranks call it.
pub fn state(engine: &mut Cpu) -> Vec<u32> {
    let kinds = [Kind::Weights, Kind::Moment1, Kind::Moment2];
    let mut bits = Vec::new();
    for name in engine.tensor_names() {
        for kind in kinds {
            bits.extend(engine.read_tensor(&name, kind).unwrap_or_default().into_iter().map(f32::to_bits));
        }
    }
    bits
}

pub fn step(engine: &mut Cpu, batches: &[MicroBatch], rank: usize, size: usize) -> String {
    let own: Vec<MicroBatch> = batches.iter().skip(rank).step_by(size).cloned().collect();
    let stats = engine.step(&own, HYPER).unwrap();
    format!("{:?}", arl_engine::StepStats { seconds: 0.0, ..stats })
}

/// A step of which `rank` has the micro-batches that it shares with those that have other slices of them.
pub fn mesh_step(engine: &mut Cpu, batches: &[MicroBatch], rank: usize, data: usize, mesh: Mesh) -> StepStats {
    let stats = engine.step(&dealt(batches, rank, data, mesh), HYPER).unwrap();
    StepStats { seconds: 0.0, ..stats }
}

/// The whole micro-batches of which `rank` has a slice.
pub fn dealt(batches: &[MicroBatch], rank: usize, data: usize, mesh: Mesh) -> Vec<MicroBatch> {
    let first = rank / (mesh.tp * mesh.cp) % data;
    batches.iter().skip(first).step_by(data).cloned().collect()
}

/// Steps of 5, 1 and 4 micro-batches, of which one has no target: ranks are dealt unequally many, or none.
pub fn uneven_steps() -> Vec<Vec<MicroBatch>> {
    let mut empty = batch(&[6], 9);
    empty.targets.fill(IGNORED);
    let five = vec![batch(&[9, 3], 1), batch(&[17], 2), empty, batch(&[5, 5, 5], 3), batch(&[21], 4)];
    vec![five, vec![batch(&[12], 5)], (6..10).map(|seed| batch(&[4 + seed as usize], seed)).collect()]
}

/// Adapters of all products and a copy of the head, with dropout; of a model with experts, of these and of attention.
pub fn with_adapters(name: &str, base: EngineOptions) -> EngineOptions {
    let text = if name.starts_with("moe") {
        r#"{"target_modules": ["q_proj", "v_proj"], "r": 3, "lora_alpha": 6,
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}"#
    } else {
        r#"{"target_modules": "all-linear", "r": 3, "lora_alpha": 6, "lora_dropout": 0.1, "modules_to_save": ["lm_head"]}"#
    };
    adapted(text, base)
}

/// Adapters as a configuration of PEFT's has them.
pub fn adapted(text: &str, base: EngineOptions) -> EngineOptions {
    let config = LoraConfig::from_json(text, Path::new("adapter_config.json")).unwrap();
    EngineOptions { lora: Some(LoraOptions { config, seed: 9 }), ..base }
}
