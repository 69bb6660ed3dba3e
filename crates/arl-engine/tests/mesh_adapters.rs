//! Adapters on ranks that divide heads, columns, experts or layers: they train as on one rank, and are saved and resumed as there.

use std::collections::BTreeMap;
use std::path::Path;

use arl_engine::backend::cpu::CpuBackend;
use arl_engine::backend::{DType, DeviceKind};
use arl_engine::{
    Engine, EngineOptions, Kind, Mesh, MicroBatch, Nf4Options, Recompute, Traffic, Weights, plan_memory, plan_traffic,
};
use arl_model::ModelConfig;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::common::adapters::{adapter_of, scattered, trained, with};
use crate::common::alone::{expect_alone, with_room};
use crate::common::ranks::{Cpu, dealt, mesh_step, on_mesh, uneven_steps};
use crate::common::{HYPER, altered, batch, difference, hybrid_config, options};

const ONE: Mesh = Mesh { tp: 1, cp: 1, ep: 1, pp: 1, dp_replicate: 1 };

/// A model, its adapters, and the adapters' values.
struct Case {
    name: &'static str,
    model: TempDir,
    text: Value,
    adapter: TempDir,
}

impl Case {
    fn new(name: &'static str, configuration: &Path, text: Value) -> Self {
        let model = tempfile::tempdir().unwrap();
        let base = options(DType::F32, Recompute::Norms, 33);
        let engine = Engine::open(Box::new(CpuBackend::new()), configuration, Weights::Random(7), &base);
        engine.unwrap().export_model(model.path(), None).unwrap();
        // Small ones, so that routers choose alike; norms and magnitudes are near one.
        let value = |name: &str, place: usize| {
            let near_one = name.contains("magnitude") || name.contains("norm");
            0.3 * scattered(name, place) + if near_one { 1.0 } else { 0.0 }
        };
        let adapter = adapter_of(&model.path().display().to_string(), &text, value);
        Case { name, model, text, adapter }
    }

    fn has_experts(&self) -> bool {
        ModelConfig::from_dir(self.model.path()).unwrap().moe.is_some()
    }

    fn folder(&self) -> String {
        self.model.path().display().to_string()
    }

    fn options(&self, dtype: DType, mesh: Mesh) -> EngineOptions {
        with(EngineOptions { zero: 2, mesh, ..options(dtype, Recompute::Norms, 33) }, &self.text)
    }
}

fn divisible(name: &str, more: Value) -> TempDir {
    let mut values =
        json!({ "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 8, "num_hidden_layers": 2 });
    values.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    altered(name, values)
}

/// Every layer with dropout, a head and norms that are trained, and biases; several factors and ranks; magnitudes.
fn dense() -> Vec<Case> {
    let all = json!({
        "target_modules": "all-linear", "r": 3, "lora_alpha": 6, "lora_dropout": 0.25, "bias": "lora_only",
        "modules_to_save": ["lm_head", "norm"],
    });
    let some = json!({
        "target_modules": ["k_proj", "v_proj", "o_proj", "up_proj", "embed_tokens"], "r": 4, "lora_alpha": 2, "use_rslora": true,
        "rank_pattern": { "v_proj": 2 }, "alpha_pattern": { "k_proj": 5 },
    });
    let dora = json!({ "target_modules": "all-linear", "r": 3, "lora_alpha": 6, "use_dora": true });
    let layers = ["sliding_attention", "full_attention"];
    let untied = json!({ "hidden_size": 32, "tie_word_embeddings": false, "layer_types": layers });
    vec![
        Case::new("all", divisible("window-bias", json!({})).path(), all),
        Case::new("some", divisible("qwen2-window", untied).path(), some),
        Case::new("magnitudes", divisible("window-bias", json!({})).path(), dora),
    ]
}

/// A mixture with a balance loss and a dense layer, its routers and its experts; and a hybrid with every kind of layer.
fn experts() -> Vec<Case> {
    let text = json!({
        "target_modules": ["q_proj", "o_proj", "gate"], "r": 3, "lora_alpha": 6,
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    });
    let more = json!({
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 16,
        "num_attention_heads": 8, "num_key_value_heads": 4, "linear_num_key_heads": 4, "linear_num_value_heads": 8,
        "tie_word_embeddings": false, "router_aux_loss_coef": 0.1, "output_router_logits": true,
    });
    let every = json!({
        "target_modules": "all-linear", "r": 3, "lora_alpha": 6,
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    });
    let hybrid = tempfile::tempdir().unwrap();
    let config = hybrid_config("qwen3_5_moe_text", more).to_string();
    std::fs::write(hybrid.path().join("config.json"), config).unwrap();
    vec![
        Case::new("experts", divisible("moe-balance", json!({})).path(), text),
        Case::new("hybrid", hybrid.path(), every),
    ]
}

/// Trained tensors by names.
type Values = BTreeMap<String, Vec<f32>>;

fn read(engine: &mut Cpu, kind: Kind) -> Values {
    trained(engine).into_iter().map(|name| (name.clone(), engine.read_tensor(&name, kind).unwrap())).collect()
}

/// The gradients of the first step, losses and norms of all, and the adapters behind them.
#[derive(Clone, PartialEq)]
struct Outcome {
    gradients: Values,
    figures: Vec<[f64; 2]>,
    weights: Values,
}

fn train(case: &Case, options: &EngineOptions, data: usize) -> Vec<Outcome> {
    on_mesh(&case.folder(), options, data, Weights::Checkpoint, |engine, rank| {
        engine.load_adapter(case.adapter.path()).unwrap();
        let steps = uneven_steps();
        engine.gradients(&dealt(&steps[0], rank, data, options.mesh)).unwrap();
        let gradients = read(engine, Kind::Gradients);
        let figures = steps.iter().map(|step| mesh_step(engine, step, rank, data, options.mesh));
        let figures = figures.map(|stats| [stats.loss, stats.grad_norm]).collect();
        Outcome { gradients, figures, weights: read(engine, Kind::Weights) }
    })
}

fn joined(values: &Values) -> Vec<f32> {
    values.values().flatten().copied().collect()
}

/// What is more than `bound` apart of the numbers of ranks and of one rank; a tensor whose gradients are next to nothing counts
/// with all of them.
fn apart(what: &str, ranks: &[Outcome], one: &Outcome, bound: f64) -> Vec<String> {
    assert!(ranks.iter().all(|rank| *rank == ranks[0]), "{what}: ranks differ");
    let mut faults = Vec::new();
    let mut check = |apart: f64, of: String| {
        if apart.is_nan() || apart >= bound {
            faults.push(format!("{what}: {of} is {apart:e} apart"));
        }
    };
    let length = |values: &[f32]| values.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    let (found, all) = (&ranks[0], length(&joined(&one.gradients)));
    assert!(all > 0.0 && found.gradients.keys().eq(one.gradients.keys()));
    for ((name, found), one) in found.gradients.iter().zip(one.gradients.values()) {
        let apart: Vec<f32> = found.iter().zip(one).map(|(a, b)| a - b).collect();
        assert_eq!(found.len(), one.len(), "{what}: {name}");
        check(length(&apart) / length(one).max(1e-3 * all), name.clone());
    }
    for (step, (found, one)) in found.figures.iter().zip(&one.figures).enumerate() {
        for (name, (found, one)) in ["loss", "norm"].iter().zip(found.iter().zip(one)) {
            check((found - one).abs() / one, format!("{name} of step {step}"));
        }
    }
    check(difference(&joined(&found.weights), &joined(&one.weights)) / 10.0, "all of the adapters".to_owned());
    faults
}

fn expect_none(faults: &[String]) {
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

/// In f32 numbers are those of one rank. In bf16 one rank rounds what a layer and its adapter give one after the other, and a sum of
/// partial sums is rounded once: both are as near to f32. Not where routers choose by what is rounded.
fn expect_numbers_of_one_rank(cases: &[Case], meshes: &[(usize, Mesh)]) {
    let mut faults = Vec::new();
    for case in cases {
        let alone = |dtype| train(case, &case.options(dtype, ONE), 1).remove(0);
        let (one, narrow) = (alone(DType::F32), (!case.has_experts()).then(|| alone(DType::Bf16)));
        let far = |outcome: &Outcome| difference(&joined(&outcome.gradients), &joined(&one.gradients));
        for &(data, mesh) in meshes {
            let what = format!("{} {data} x {mesh:?}", case.name);
            faults.extend(apart(&what, &train(case, &case.options(DType::F32, mesh), data), &one, 1e-5));
            let Some(narrow) = &narrow else { continue };
            let ranks = train(case, &case.options(DType::Bf16, mesh), data);
            assert!(ranks.iter().all(|rank| *rank == ranks[0]), "{what}: ranks differ");
            let (found, most) = (far(&ranks[0]), 1.5 * far(narrow));
            if found.is_nan() || found > most {
                faults.push(format!("{what}: gradients in bf16 are {found:e} from those in f32, more than {most:e}"));
            }
        }
    }
    expect_none(&faults);
}

/// Heads, columns, tokens and layers; dropout takes the same elements everywhere.
#[test]
fn adapters_of_dense_models_train_as_on_one_rank() {
    let mesh = |tp, cp, pp| Mesh { tp, cp, pp, ..ONE };
    let meshes = [(1, mesh(2, 1, 1)), (2, mesh(2, 1, 1)), (1, mesh(2, 2, 1)), (1, mesh(1, 1, 2)), (1, mesh(2, 1, 2))];
    expect_numbers_of_one_rank(&dense(), &meshes);
}

#[test]
fn adapters_of_experts_and_hybrids_train_as_on_one_rank() {
    let mesh = |tp, ep, pp| Mesh { tp, ep, pp, ..ONE };
    let meshes = [(2, mesh(1, 2, 1)), (1, mesh(2, 1, 1)), (1, mesh(2, 2, 1)), (2, mesh(1, 2, 2)), (4, mesh(1, 4, 1))];
    expect_numbers_of_one_rank(&experts(), &meshes);
}

#[test]
fn every_level_of_recomputation_and_each_way_of_dividing_gives_the_same_bits() {
    let [all, _, dora] = <[Case; 3]>::try_from(dense()).unwrap_or_else(|_| panic!("three cases"));
    let [_, hybrid] = <[Case; 2]>::try_from(experts()).unwrap_or_else(|_| panic!("two cases"));
    let two = Mesh { tp: 2, ..ONE };
    for (case, data, mesh) in [(&all, 1, two), (&dora, 1, two), (&hybrid, 1, Mesh { ep: 2, ..two })] {
        let run = |recompute, zero| {
            train(case, &EngineOptions { recompute, zero, ..case.options(DType::F32, mesh) }, data).remove(0)
        };
        let first = run(Recompute::Norms, 2);
        for (recompute, zero) in
            [(Recompute::Norms, 2), (Recompute::Off, 3), (Recompute::Mlp, 1), (Recompute::Block, 2)]
        {
            assert!(run(recompute, zero) == first, "{} {mesh:?} {recompute:?}, zero {zero}", case.name);
        }
    }
}

/// The files of an adapter have one rank's bytes, and a state of one mesh is what another resumes from.
#[test]
fn adapters_are_saved_and_resumed_by_any_mesh() {
    let mesh = |tp, ep, pp| Mesh { tp, ep, pp, ..ONE };
    let with_experts = [(1, mesh(2, 1, 1)), (2, mesh(1, 2, 1)), (1, mesh(2, 2, 2))];
    let without = [(1, mesh(2, 1, 1)), (2, mesh(1, 1, 2)), (1, mesh(2, 1, 2))];
    let dense = dense().into_iter().map(|case| (case, without));
    for (case, meshes) in dense.chain(experts().into_iter().map(|case| (case, with_experts))) {
        for dtype in [DType::F32, DType::Bf16] {
            let export = |engine: &mut Cpu, out: &Path| {
                engine.export_adapter(out, None).unwrap();
                engine.fingerprint().unwrap();
            };
            let bytes = |out: &TempDir| std::fs::read(out.path().join("adapter_model.safetensors")).unwrap();
            let loaded = bytes(&case.adapter);
            let (states, mut last) = ([(); 3].map(|()| tempfile::tempdir().unwrap()), None);
            for ((data, mesh), state) in meshes.into_iter().zip(&states) {
                let outs = [(); 2].map(|()| tempfile::tempdir().unwrap());
                on_mesh(
                    &case.folder(),
                    &case.options(dtype, mesh),
                    data,
                    Weights::Checkpoint,
                    |engine: &mut Cpu, rank| {
                        engine.load_adapter(case.adapter.path()).unwrap();
                        export(engine, outs[0].path());
                        mesh_step(engine, &uneven_steps()[0], rank, data, mesh);
                        engine.save_state(state.path()).unwrap();
                        export(engine, outs[1].path());
                    },
                );
                let what = format!("{} {dtype:?} {mesh:?}", case.name);
                assert!(bytes(&outs[0]) == loaded, "{what}: what is loaded is saved as another");
                let behind = bytes(&outs[1]);
                assert!(behind != loaded, "{what}");
                // One rank, and the mesh before this one, read what it has saved.
                let before = last.replace((data, mesh)).unwrap_or((1, ONE));
                for (data, mesh) in [(1, ONE), before] {
                    let out = tempfile::tempdir().unwrap();
                    let options = case.options(dtype, mesh);
                    on_mesh(&case.folder(), &options, data, Weights::Restored, |engine: &mut Cpu, _| {
                        engine.restore_state(state.path()).unwrap();
                        export(engine, out.path());
                    });
                    assert!(bytes(&out) == behind, "{what}: {mesh:?} reads another state");
                }
            }
        }
    }
}

/// Adapters and magnitudes that begin by themselves are those of one rank.
#[test]
fn adapters_begin_as_on_one_rank() {
    for case in dense().into_iter().chain(experts()) {
        let mesh = Mesh { tp: 2, pp: 2, ..ONE };
        for weights in [Weights::Checkpoint, Weights::Random(5)] {
            let begin = |mesh: Mesh| {
                let options = case.options(DType::F32, mesh);
                on_mesh(&case.folder(), &options, 1, weights, |engine: &mut Cpu, _| read(engine, Kind::Weights))
                    .remove(0)
            };
            assert!(begin(mesh) == begin(ONE), "{} {weights:?}", case.name);
        }
    }
}

#[test]
fn a_rank_reserves_and_sends_what_is_planned() {
    let mesh = |tp, ep, pp| Mesh { tp, ep, pp, ..ONE };
    let dense = dense().into_iter().map(|case| (case, [(1, mesh(2, 1, 1)), (2, mesh(2, 1, 2))]));
    // Where each token has all experts, all of them get equally many rows.
    let all = json!({ "num_experts_per_tok": 4 });
    let even = |case: Case| {
        let mut config: Value =
            serde_json::from_slice(&std::fs::read(case.model.path().join("config.json")).unwrap()).unwrap();
        config.as_object_mut().unwrap().extend(all.as_object().unwrap().clone());
        std::fs::write(case.model.path().join("config.json"), config.to_string()).unwrap();
        (case, [(2, mesh(1, 2, 1)), (2, mesh(2, 4, 1))])
    };
    for (case, meshes) in dense.chain(experts().into_iter().map(even)) {
        let config = ModelConfig::from_dir(case.model.path()).unwrap();
        for (data, mesh) in meshes {
            let options = case.options(DType::Bf16, mesh);
            let found = on_mesh(&case.folder(), &options, data, Weights::Checkpoint, |engine: &mut Cpu, rank| {
                let batches: Vec<MicroBatch> = (1..5).map(|seed| batch(&[20, 12], seed)).collect();
                engine.step(&dealt(&batches, rank, data, mesh), HYPER).unwrap();
                (engine.sent(), engine.memory())
            });
            for (rank, (sent, memory)) in found.into_iter().enumerate() {
                let what = format!("{} {mesh:?}: rank {rank}", case.name);
                let max_batch = arl_engine::BatchSize { tokens: 32, sequences: 8, ..options.max_batch };
                let of = |max_batch| EngineOptions { data_parallel: Some(data), rank, max_batch, ..options.clone() };
                let planned = plan_traffic(&config, &of(max_batch), DeviceKind::Cpu, 4 / data as u64).unwrap();
                assert_eq!(sent, Traffic { figures: sent.figures, ..planned }, "{what}");
                let planned = plan_memory(case.model.path(), &of(options.max_batch), DeviceKind::Cpu).unwrap();
                assert_eq!(memory, planned, "{what}");
            }
        }
    }
}

/// The slices that ranks have of weights in 4 bits are those of one rank's, and train as these do.
#[test]
fn weights_in_4_bits_below_adapters_are_those_of_one_rank() {
    let mesh = |tp, ep, pp| Mesh { tp, ep, pp, ..ONE };
    let wide = json!({ "hidden_size": 64, "head_dim": 16, "intermediate_size": 128 });
    let text = json!({ "target_modules": "all-linear", "r": 3, "lora_alpha": 6, "use_dora": true });
    let dense = Case::new("dense", divisible("window-bias", wide).path(), text);
    let cases = [(dense, vec![(1, 2, mesh(2, 1, 1)), (1, 2, mesh(2, 1, 2)), (2, 3, mesh(2, 1, 1))])];
    let experts = experts()
        .into_iter()
        .map(|case| (case, vec![(2, 2, mesh(1, 2, 1)), (2, 3, mesh(1, 2, 1)), (1, 2, mesh(1, 1, 2))]));
    let mut faults = Vec::new();
    for (case, meshes) in cases.into_iter().chain(experts) {
        for nested in [false, true] {
            let options = |zero, mesh| {
                let load_in_4bit = Some(Nf4Options { nested });
                EngineOptions { load_in_4bit, zero, ..case.options(DType::F32, mesh) }
            };
            let weights = |data, zero, mesh| {
                on_mesh(&case.folder(), &options(zero, mesh), data, Weights::Checkpoint, |engine: &mut Cpu, _| {
                    let mut names = engine.tensor_names();
                    names.sort();
                    let read = |name: &String| engine.read_tensor(name, Kind::Weights).unwrap();
                    names.iter().map(read).collect::<Vec<_>>()
                })
            };
            let (one, values) = (train(&case, &options(2, ONE), 1).remove(0), weights(1, 2, ONE).remove(0));
            for &(data, zero, mesh) in &meshes {
                let what = format!("{} {nested} {mesh:?}, zero {zero}", case.name);
                assert!(weights(data, zero, mesh).into_iter().all(|found| found == values), "{what}: weights differ");
                faults.extend(apart(&what, &train(&case, &options(zero, mesh), data), &one, 1e-5));
            }
        }
    }
    expect_none(&faults);
}

/// What rank 0 computes alone it computes with the adapters of all ranks, over weights in 4 bits too.
#[test]
fn rank_0_evaluates_and_generates_with_adapters() {
    let mesh = |tp, ep, pp| Mesh { tp, ep, pp, ..ONE };
    let alone = |case: &Case, load_in_4bit, at| {
        let options = EngineOptions { load_in_4bit, ..with_room(case.options(DType::F32, ONE)) };
        expect_alone(&case.folder(), &options, Weights::Checkpoint, at, 1e-4);
    };
    dense().iter().for_each(|case| alone(case, None, (1, mesh(2, 1, 2))));
    for case in experts() {
        alone(&case, None, (2, mesh(1, 2, 1)));
        alone(&case, Some(Nf4Options { nested: true }), (1, mesh(1, 1, 2)));
    }
}
