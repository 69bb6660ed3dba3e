//! Ranks of a mesh, as threads, whose gradients are given: their sums, norms, updates, files and messages are those of one rank.

mod random;

use std::collections::BTreeMap;
use std::path::Path;

use arl_comm::local_groups;
use arl_model::ModelConfig;

use super::*;
use crate::backend::cpu::CpuBackend;
use crate::backend::{DType, DeviceKind};
use crate::options::{Adam, EngineOptions, Hyper, Weights};
use crate::placement::division::tests::models;
use crate::weights::Kind;
use crate::{GenerateOptions, plan_memory};

type Cpu = Engine<CpuBackend>;

/// A mesh, its data-parallel ranks, and `zero`.
type Case = (Mesh, usize, u8);

const ONE: Mesh = Mesh { tp: 1, cp: 1, ep: 1, pp: 1, dp_replicate: 1 };

/// One rank, then meshes.
fn cases(experts: bool) -> Vec<Case> {
    let ep = |ep: usize| if experts { ep } else { 1 };
    vec![
        (ONE, 1, 2),
        (Mesh { tp: 2, ..ONE }, 1, 1),
        (Mesh { tp: 2, ..ONE }, 2, 3),
        (Mesh { ep: ep(2), tp: 3 - ep(2), ..ONE }, 2, 2),
        (Mesh { tp: 2, cp: 2, ep: ep(4), ..ONE }, 1, 3),
        (Mesh { tp: 2, ep: ep(2), pp: 2, ..ONE }, 1, 2),
        (Mesh { pp: 3, ..ONE }, 2, 1),
        (Mesh { dp_replicate: 2, ..ONE }, 4, 3),
        (Mesh { tp: 2, ep: ep(2), dp_replicate: 2, ..ONE }, 2, 3),
        (Mesh { cp: 2, dp_replicate: 3, ..ONE }, 3, 3),
    ]
}

fn options(dtype: DType, (mesh, data, zero): Case, rank: usize) -> EngineOptions {
    let adam = Adam { weight_decay: 0.1, ..Adam::default() };
    EngineOptions { dtype, adam, data_parallel: Some(data), zero, mesh, rank, ..EngineOptions::default() }
}

/// What `work` gives on each rank.
fn on_mesh<T: Send>(
    dir: &Path,
    dtype: DType,
    case: Case,
    weights: impl Fn(usize) -> Weights + Sync,
    work: impl Fn(&mut Cpu) -> T + Sync,
) -> Vec<T> {
    let run = |rank: usize, group: Box<dyn Group>| {
        let options = options(dtype, case, rank);
        let mut engine = Engine::open(Box::new(CpuBackend::new()), dir, weights(rank), &options).unwrap();
        engine.join(group).unwrap();
        work(&mut engine)
    };
    std::thread::scope(|scope| {
        let run = &run;
        let world = options(dtype, case, 0).place().unwrap().world();
        let groups = local_groups(world).into_iter().enumerate();
        let ranks: Vec<_> = groups.map(|(rank, group)| scope.spawn(move || run(rank, group))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

fn folder(model: &serde_json::Value) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), model.to_string()).unwrap();
    dir
}

/// The gradient of an element over all ranks: a small whole number, so that sums have the same bits in any order.
fn gradient(name: &str, element: usize) -> f32 {
    (name.bytes().map(usize::from).sum::<usize>() + 7 * element) as f32 % 31.0 - 15.0
}

/// What this rank adds to the gradients of a parameter.
fn gradients(engine: &Cpu, tensor: usize) -> Vec<f32> {
    let (tensor, place) = (&engine.model.placement.tensors[tensor], engine.ranks.place);
    let (ranks, rank) = (place.size(tensor.param.axis), place.index(tensor.param.axis));
    let both = engine.model.tied_elements() > 0 && tensor.spec.block == arl_model::Block::Embedding;
    let own = |element: usize| match (gradient(&tensor.spec.name, element), both, tensor.copied) {
        _ if rank > 0 => 1.0,
        (_, true, true) => 4.0 - (ranks - 1) as f32,
        (value, true, false) => value - 4.0 - (ranks - 1) as f32,
        (value, ..) => value - (ranks - 1) as f32,
    };
    tensor.slice.runs(0..tensor.param.len).into_iter().flatten().map(own).collect()
}

/// The sums of given gradients, their norm, and the update by them; gives the norm's square.
fn take_step(engine: &mut Cpu) -> f64 {
    let training = engine.training().unwrap();
    let sums = training.sums.unwrap();
    engine.backend.zero(sums);
    let layers = (0..engine.model.layers.len()).rev().map(Complete::Layer);
    for point in [Complete::Loss].into_iter().chain(layers).chain([Complete::End]) {
        engine.backend.zero(training.gradients);
        let cut = engine.model.cut.clone().unwrap();
        for i in 0..engine.model.placement.tensors.len() {
            let param = engine.model.placement.tensors[i].param;
            let first = param.trained.unwrap();
            let inside =
                |bucket: &&crate::placement::cut::Bucket| (bucket.start..bucket.start + bucket.len).contains(&first);
            if cut.completed(point).any(|bucket| inside(&bucket)) {
                let values = gradients(engine, i);
                engine
                    .backend
                    .upload(bytemuck::cast_slice(&values), training.gradients.slice(param.gradient, param.len));
            }
        }
        engine.ranks.collect(&mut *engine.backend, &engine.model, point).unwrap();
    }
    engine.add_tied(sums).unwrap();
    engine.norm_of_pieces(sums, training.norm_squared).unwrap();
    let mut norm = [0u8; 8];
    engine.backend.read_back(training.norm_squared, &mut norm).unwrap();
    engine.update(&training, Hyper { learning_rate: 0.01, max_grad_norm: 1.0 }, false).unwrap();
    f64::from_ne_bytes(norm)
}

/// Weights and moments, in bits, by name.
type State = BTreeMap<String, Vec<u32>>;

fn state(engine: &mut Cpu) -> State {
    let mut found: Vec<String> = engine.tensor_names();
    let mut of = |name: String| {
        let kinds = [Kind::Weights, Kind::Moment1, Kind::Moment2];
        let values = kinds.into_iter().flat_map(|kind| engine.read_tensor(&name, kind).unwrap());
        (name.clone(), values.map(f32::to_bits).collect())
    };
    found.drain(..).map(&mut of).collect()
}

fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries.map(|path| (path.file_name().unwrap().display().to_string(), std::fs::read(&path).unwrap())).collect()
}

/// Of each rank of a mesh: the norm and the state behind a step, what was sent, and the fingerprint. Saves state and model in a folder
/// each.
fn write(dir: &Path, dtype: DType, case: Case, saved: [&Path; 2]) -> Vec<((f64, State), Traffic, String)> {
    on_mesh(
        dir,
        dtype,
        case,
        |_| Weights::Random(3),
        |engine| {
            let norm = take_step(engine);
            let sent = engine.sent();
            let found = (norm, state(engine));
            engine.save_state(saved[0]).unwrap();
            engine.export_model(saved[1], None).unwrap();
            (found, sent, engine.fingerprint().unwrap())
        },
    )
}

/// The state that each rank of a mesh reads.
fn read_by(dir: &Path, dtype: DType, case: Case, saved: &Path) -> Vec<State> {
    on_mesh(
        dir,
        dtype,
        case,
        |_| Weights::Unset,
        |engine| {
            engine.restore_state(saved).unwrap();
            state(engine)
        },
    )
}

#[test]
fn steps_and_files_of_a_mesh_are_those_of_one_rank_and_any_mesh_reads_them() {
    for ((name, model), dtype) in models().into_iter().zip([DType::F32, DType::Bf16]) {
        let (dir, cases) = (folder(&model), cases(name == "hybrid"));
        let mut saved = Vec::new();
        let mut one = None;
        for &case in &cases {
            let (state_dir, export) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
            let all = write(dir.path(), dtype, case, [state_dir.path(), export.path()]);
            let config = ModelConfig::from_dir(dir.path()).unwrap();
            let (found, exported) = (all[0].0.clone(), files(export.path()));
            let (first, written) = one.get_or_insert_with(|| (found.clone(), exported.clone()));
            for (rank, ((norm, state), sent, fingerprint)) in all.iter().enumerate() {
                let what = format!("{name} {case:?} rank {rank}");
                assert_eq!(norm, &first.0, "{what}");
                for (name, values) in &first.1 {
                    assert!(state.get(name) == Some(values), "{what}: {name}");
                }
                assert_eq!(fingerprint, &all[0].2, "{what}");
                let planned = plan_traffic(&config, &options(dtype, case, rank), DeviceKind::Cpu, 1).unwrap();
                assert_eq!([sent.gradients, sent.replicas], [planned.gradients, planned.replicas], "{what}");
                if case.2 < 3 {
                    assert_eq!(sent.weights, planned.weights, "{what}");
                }
            }
            assert!(&exported == written, "{name} {case:?}: the model's folder");
            saved.push(state_dir);
        }
        let (_, first) = one.map(|(found, _)| found).unwrap();
        for (from, writer) in saved.iter().zip(&cases) {
            for &reader in &cases {
                let read = read_by(dir.path(), dtype, reader, from.path());
                assert!(read.iter().all(|state| *state == first), "{name}: {writer:?} to {reader:?}");
            }
        }
    }
}

#[test]
fn what_a_rank_reserves_and_reads_is_its_part_and_a_difference_is_noticed() {
    let [_, (_, model)] = models();
    let dir = folder(&model);
    let case = (Mesh { tp: 2, ep: 2, ..ONE }, 2, 2);
    let open = |seeds: [u64; 4]| {
        on_mesh(
            dir.path(),
            DType::F32,
            case,
            |rank| Weights::Random(seeds[rank]),
            |engine| {
                let options = options(DType::F32, case, engine.ranks.place.rank);
                assert_eq!(engine.memory(), plan_memory(dir.path(), &options, DeviceKind::Cpu).unwrap());
                let replies = engine.generate(&[], &GenerateOptions::greedy(1)).map(|replies| replies.len());
                for found in [engine.evaluate(&[]).map(|stats| stats.len()), replies] {
                    match found {
                        Ok(count) => assert_eq!((count, engine.ranks.place.rank), (0, 0)),
                        Err(error) => assert!(error.message.contains("only rank 0 may"), "{error}"),
                    }
                }
                (engine.fingerprint().unwrap(), engine.memory().categories[0].1)
            },
        )
    };
    let same = open([1; 4]);
    assert!(same.windows(2).all(|pair| pair[0] == pair[1]));
    let one =
        on_mesh(dir.path(), DType::F32, (ONE, 1, 2), |_| Weights::Random(1), |engine| engine.memory().categories[0].1);
    assert!(same[0].1 * 10 < one[0] * 7, "{} of {}", same[0].1, one[0]);
    for rank in 0..4 {
        let mut seeds = [1; 4];
        seeds[rank] = 2;
        let found = open(seeds);
        assert!(found.iter().any(|other| other.0 != found[0].0), "rank {rank}");
    }
}

/// Pieces that several ranks keep can come to differ, as whole weights can.
#[test]
fn a_replica_whose_pieces_have_come_to_differ_is_noticed() {
    let [(_, model), _] = models();
    let dir = folder(&model);
    let case = (Mesh { dp_replicate: 2, ..ONE }, 4, 3);
    let found = |changed: Option<usize>| {
        let work = |engine: &mut Cpu| {
            if changed == Some(engine.ranks.place.rank) {
                let own = engine.model.store.weights.slice(0, 1);
                engine.backend.upload(&7f32.to_ne_bytes(), own);
            }
            engine.fingerprint().unwrap()
        };
        on_mesh(dir.path(), DType::F32, case, |_| Weights::Random(3), work)
    };
    assert!(found(None).windows(2).all(|pair| pair[0] == pair[1]));
    for rank in 0..4 {
        let found = found(Some(rank));
        assert!(found.iter().any(|other| *other != found[0]), "rank {rank}");
    }
}
