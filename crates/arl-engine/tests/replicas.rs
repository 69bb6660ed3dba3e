//! Replicas: groups of ranks that each divide all weights among them. Bits, memory and messages are those that this implies.

use arl_engine::backend::{DType, DeviceKind};
use arl_engine::{EngineOptions, Mesh, Nf4Options, Recompute, Traffic, Weights, plan_memory, plan_traffic};
use arl_model::ModelConfig;

use crate::common::alone::{expect_alone, with_room};
use crate::common::ranks::with_other_weights;
use crate::common::ranks::{adapted, fingerprints, hybrid, mesh_step, on_mesh, state, uneven_steps, with_adapters};
use crate::common::{batch, model, options};

fn replicas(dp_replicate: usize) -> Mesh {
    Mesh { dp_replicate, ..Mesh::default() }
}

/// Options that divide weights.
fn divided(base: EngineOptions) -> EngineOptions {
    EngineOptions { zero: 3, ..base }
}

#[test]
fn results_have_the_bits_of_one_rank() {
    let of = |dtype| divided(options(dtype, Recompute::Norms, 33));
    let nf4 = |nested| Some(Nf4Options { nested });
    let magnitudes = r#"{"target_modules": "all-linear", "r": 3, "lora_alpha": 6, "use_dora": true}"#;
    let random = EngineOptions { stochastic_rounding: true, bf16_moments: true, ..of(DType::Bf16) };
    let frozen = vec!["*embed*".to_owned(), "model.layers.0.*".to_owned(), "*.o_proj.weight".to_owned()];
    let cases = [
        ("moe-top1", of(DType::F32)),
        ("qwen2-window", of(DType::Bf16)),
        ("window-bias", of(DType::F16)),
        ("window-bias", random),
        ("qwen2-window", EngineOptions { frozen, ..of(DType::F32) }),
        ("window-bias", EngineOptions { load_in_4bit: nf4(true), ..with_adapters("window-bias", of(DType::Bf16)) }),
        ("window-bias", EngineOptions { load_in_4bit: nf4(false), ..adapted(magnitudes, of(DType::F32)) }),
    ];
    for (name, base) in cases {
        let run = |data: usize, mesh: Mesh| {
            let options = EngineOptions { mesh, ..base.clone() };
            on_mesh(name, &options, data, Weights::Checkpoint, |engine, rank| {
                let steps = uneven_steps();
                let stats: Vec<_> = steps.iter().map(|batches| mesh_step(engine, batches, rank, data, mesh)).collect();
                (format!("{stats:?}"), state(engine))
            })
        };
        let one = run(1, Mesh::default()).remove(0);
        // Of one rank each, of several, and next to more ranks than micro-batches.
        for (data, mesh) in [(2, replicas(2)), (4, replicas(2)), (6, replicas(3)), (6, replicas(2))] {
            for (rank, found) in run(data, mesh).into_iter().enumerate() {
                assert!(found == one, "{name} {:?}: rank {rank} of {data} in {mesh:?}", base.dtype);
            }
        }
    }
}

/// Ranks with the same heads, or the same experts, divide weights within their replica.
#[test]
fn replicas_of_a_mesh_train_as_the_mesh_does_without_them() {
    let hybrid = hybrid();
    let name = hybrid.path().display().to_string();
    let mesh = |tp, cp, ep| Mesh { tp, cp, ep, ..Mesh::default() };
    for (data, mesh) in [(4, mesh(1, 1, 2)), (2, mesh(2, 1, 1)), (2, mesh(1, 2, 1)), (2, mesh(2, 1, 2))] {
        let run = |dp_replicate: usize| {
            let mesh = Mesh { dp_replicate, ..mesh };
            let options = EngineOptions { mesh, ..divided(options(DType::F32, Recompute::Norms, 33)) };
            on_mesh(&name, &options, data, Weights::Random(7), |engine, rank| {
                let steps = uneven_steps();
                let stats: Vec<_> = steps.iter().map(|batches| mesh_step(engine, batches, rank, data, mesh)).collect();
                (format!("{stats:?}"), state(engine))
            })
        };
        assert!(run(2) == run(1), "{mesh:?}");
    }
}

#[test]
fn rank_0_computes_alone_with_the_pieces_of_its_replica() {
    let hybrid = hybrid();
    let adapters = with_adapters("hybrid", options(DType::F32, Recompute::Norms, 33));
    let nf4 = EngineOptions { load_in_4bit: Some(Nf4Options { nested: true }), ..adapters };
    for base in [nf4, options(DType::F32, Recompute::Norms, 33)] {
        let base = with_room(divided(base));
        for at in [(4, replicas(2)), (2, Mesh { tp: 2, ..replicas(2) }), (4, Mesh { ep: 2, ..replicas(2) })] {
            expect_alone(&hybrid.path().display().to_string(), &base, Weights::Random(7), at, 1e-4);
        }
    }
}

#[test]
fn a_rank_keeps_its_share_of_a_replicas_weights_and_of_everyones_moments() {
    let dir = crate::common::deeper("qwen2-window", 24);
    let plan = |data: usize, dp_replicate: usize| {
        let base = divided(options(DType::Bf16, Recompute::Norms, 33));
        let options = EngineOptions { data_parallel: Some(data), mesh: replicas(dp_replicate), ..base };
        let plan = plan_memory(dir.path(), &options, DeviceKind::Cpu).unwrap();
        ["weights", "moments", "master weights", "gradient sums", "gathered weights"]
            .map(|name| plan.categories.iter().find(|(other, _)| *other == name).unwrap().1)
    };
    let near = |a: usize, b: usize| (0.9..1.1).contains(&(a as f64 / b as f64));
    let ([two, _, _, _, place], [four, moments, masters, sums, _]) = (plan(2, 1), plan(4, 1));
    let replicated = plan(4, 2);
    assert!(near(replicated[0], two) && two * 10 > four * 15, "{replicated:?} {two} {four}");
    assert_eq!(replicated[1..4], [moments, masters, sums]);
    assert!(near(replicated[4], place));
}

#[test]
fn a_rank_sends_what_is_planned_and_fewer_weights_than_without_replicas() {
    for (name, dtype) in [("moe-top1", DType::F32), ("qwen2-window", DType::Bf16)] {
        let base = divided(options(dtype, Recompute::Norms, 33));
        let config = ModelConfig::from_dir(&model(name)).unwrap();
        let (data, mesh) = (4, replicas(2));
        let of = |rank: usize, mesh: Mesh| EngineOptions { data_parallel: Some(data), rank, mesh, ..base.clone() };
        let sent = on_mesh(name, &EngineOptions { mesh, ..base.clone() }, data, Weights::Checkpoint, |engine, rank| {
            let batches: Vec<_> = (0..2 * data as u64).map(|seed| batch(&[9], seed + 1)).collect();
            mesh_step(engine, &batches, rank, data, mesh);
            engine.sent()
        });
        let mut gradients = [0; 2];
        for (rank, found) in sent.into_iter().enumerate() {
            let planned = plan_traffic(&config, &of(rank, mesh), DeviceKind::Cpu, 2).unwrap();
            assert_eq!(found, Traffic { figures: found.figures, ..planned }, "{name}: rank {rank}");
            assert!(found.replicas > 0 && found.figures < 16_000, "{found:?}");
            let without = plan_traffic(&config, &of(rank, replicas(1)), DeviceKind::Cpu, 2).unwrap();
            assert!(found.weights * 10 < without.weights * 8, "{found:?} {without:?}");
            assert_eq!(without.replicas, 0);
            gradients[0] += found.gradients;
            gradients[1] += without.gradients;
        }
        assert_eq!(gradients[0], gradients[1], "{name}: of all ranks");
    }
}

#[test]
fn replicas_that_have_read_other_weights_know_it() {
    let own = model("window-bias");
    let other = with_other_weights("window-bias", |bytes| *bytes.last_mut().unwrap() ^= 1);
    let base = divided(options(DType::F32, Recompute::Norms, 33));
    let options = EngineOptions { mesh: replicas(2), ..base };
    let [one, same] = fingerprints(&options, [&own, &own]);
    assert_eq!(one, same);
    let [one, differs] = fingerprints(&options, [&own, other.path()]);
    assert_ne!(one, differs);
}

#[test]
fn replicas_that_cannot_be_are_refused_with_what_to_do() {
    let message = |data: usize, zero: u8, mesh: Mesh| {
        let base = options(DType::F32, Recompute::Norms, 33);
        let options = EngineOptions { data_parallel: Some(data), zero, mesh, ..base };
        let error = plan_memory(&model("moe-top1"), &options, DeviceKind::Cpu).unwrap_err();
        assert!(!error.hint.is_empty());
        error.message
    };
    assert_eq!(message(3, 3, replicas(2)), "dp_replicate_size is 2, and does not divide dp_size 3");
    assert_eq!(message(4, 2, replicas(2)), "dp_replicate_size 2 cannot be combined with zero 2");
    let experts = Mesh { ep: 2, ..replicas(4) };
    assert_eq!(message(4, 3, experts), "ep_size is 2, and does not divide the 1 ranks of a replica");
    assert_eq!(message(4, 3, replicas(0)), "a mesh has 0 ranks along an axis");
}
