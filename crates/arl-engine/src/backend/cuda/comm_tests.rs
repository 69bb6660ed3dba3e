//! Ranks on the CUDA leaves, whose kernels run on the host, over an NCCL of tests: what they exchange, and whole steps.

#[path = "../../../../arl-comm/tests/fake/mod.rs"]
mod fake;
#[path = "mesh_tests.rs"]
mod mesh;
#[path = "overlap_tests.rs"]
mod overlap_tests;

use std::sync::{Arc, OnceLock};

use arl_comm::{Gpus, Group, Nccl, Watch, local_groups, with_gpus};

use super::recording::RecordingDevice;
use super::step_tests::common::{HYPER, batch, difference, model, options};
use super::*;
use crate::backend::comm::{Collectives, Part};
use crate::backend::cpu::CpuBackend;
use crate::batch::MicroBatch;
use crate::engine::Engine;
use crate::options::{EngineOptions, Recompute, Weights};
use crate::weights::Kind;

/// The library of tests, made once.
fn nccl() -> Arc<Nccl> {
    static MADE: OnceLock<(tempfile::TempDir, Arc<Nccl>)> = OnceLock::new();
    let (_, nccl) = MADE.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let nccl = Nccl::open(&fake::library(folder.path(), 23_007)).unwrap();
        (folder, nccl)
    });
    Arc::clone(nccl)
}

type Recorded<D> = CudaBackend<RecordingDevice<D>>;

/// What `work` gives on each of `size` threads, with a device and the group that it is to join.
fn on_ranks<T: Send>(size: usize, work: impl Fn(Recorded<EmulatedDevice>, Box<dyn Group>) -> T + Sync) -> Vec<T> {
    on_devices(size, EmulatedDevice::default, work)
}

/// As [`on_ranks`], with devices of another sort.
fn on_devices<D: Device, T: Send>(
    size: usize,
    device: impl Fn() -> D + Sync,
    work: impl Fn(Recorded<D>, Box<dyn Group>) -> T + Sync,
) -> Vec<T> {
    let (nccl, work, device) = (nccl(), &work, &device);
    let id = nccl.unique_id().unwrap();
    std::thread::scope(|scope| {
        let nccl = &nccl;
        let run = |host: Box<dyn Group>| {
            scope.spawn(move || {
                let gpus = Gpus { nccl: Arc::clone(nccl), id, watch: Arc::new(Watch::new()) };
                work(CudaBackend::new(RecordingDevice::new(device())), with_gpus(host, gpus))
            })
        };
        let ranks: Vec<_> = local_groups(size).into_iter().map(run).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// Numbers that all ranks can compute, whose sums depend on their order.
fn values(from: usize, to: usize, len: usize) -> Vec<f32> {
    let number = |i: usize| (i * 7 + from * 31 + to * 13) as f32;
    (0..len).map(|i| (number(i) * 0.37).sin() * (number(i) % 9.0 * 3.0 - 12.0).exp2()).collect()
}

/// A place in [`Pool::State`], in elements of f32.
fn floats(start: usize, len: usize) -> Buffer {
    Buffer { pool: Pool::State, offset: 4 * start, len, dtype: DType::F32 }
}

#[test]
fn sums_over_ranks_are_those_of_a_loop_in_their_order() {
    for (size, len) in [(1, 5), (2, 1), (2, 4099), (3, 64), (3, 1000), (4, 257)] {
        on_ranks(size, |mut backend, group| {
            let rank = group.rank();
            // The last rank's piece is one shorter, or empty, and begins where no pack of 16 bytes does.
            let of = |to: usize| if to + 1 == size && size > 1 { len - 1 } else { len };
            backend.reserve(Pool::State, 4 * (size + 2) * (len + 1)).unwrap();
            backend.join_ranks(&*group).unwrap();
            let parts: Vec<Buffer> = (0..size).map(|to| floats(to * len, of(to))).collect();
            for (to, part) in parts.iter().enumerate() {
                backend.upload(bytemuck::cast_slice(&values(rank, to, of(to))), *part);
            }
            let sum = floats(size * len + 1, of(rank));
            let before = values(99, rank, of(rank));
            backend.upload(bytemuck::cast_slice(&before), sum);
            backend.exchange_sum(&*group, &parts, sum).unwrap();
            let mut found = vec![0f32; of(rank)];
            backend.read_back(sum, bytemuck::cast_slice_mut(&mut found)).unwrap();
            for (i, found) in found.iter().enumerate() {
                let expected = (0..size).fold(before[i], |sum, from| sum + values(from, rank, of(rank))[i]);
                assert_eq!(found.to_bits(), expected.to_bits(), "element {i} of {len} on rank {rank} of {size}");
            }
            assert_eq!(backend.device_mut().faults, Vec::<String>::new());
        });
    }
}

#[test]
fn what_ranks_give_in_parts_comes_to_its_places_on_all() {
    for size in [1, 2, 3] {
        on_ranks(size, |mut backend, group| {
            let rank = group.rank();
            backend.reserve(Pool::State, 4 * 100 * (size + 1)).unwrap();
            backend.join_ranks(&*group).unwrap();
            // Two parts of each rank, a gap between them, and no part at the end of what is given.
            let parts = |of: usize| {
                vec![Part { buffer: floats(100 * of + 3, 5), at: 0 }, Part { buffer: floats(100 * of + 40, 7), at: 32 }]
            };
            for (number, part) in parts(rank).iter().enumerate() {
                backend.upload(bytemuck::cast_slice(&values(rank, number, part.buffer.len)), part.buffer);
            }
            let all: Vec<_> = (0..size).map(parts).collect();
            backend.all_gather(&*group, 64, &parts(rank), &all).unwrap();
            // And what a rank has comes to another place of its own, too.
            let moved = |of: usize| vec![Part { buffer: floats(100 * size + 10 * of, 5), at: 0 }];
            let all: Vec<_> = (0..size).map(moved).collect();
            backend.all_gather(&*group, 20, &parts(rank)[..1], &all).unwrap();
            let mut found = vec![0f32; 100 * (size + 1)];
            backend.read_back(floats(0, found.len()), bytemuck::cast_slice_mut(&mut found)).unwrap();
            for of in 0..size {
                assert_eq!(found[100 * of + 3..][..5], values(of, 0, 5));
                assert_eq!(found[100 * of + 40..][..7], values(of, 1, 7));
                assert_eq!(found[100 * size + 10 * of..][..5], values(of, 0, 5));
                assert_eq!(found[100 * of + 50], 0.0);
            }
            let device = backend.device_mut();
            assert_eq!((device.faults.clone(), device.collectives), (Vec::new(), if size > 1 { 2 } else { 0 }));
        });
    }
}

#[test]
fn what_ranks_send_each_other_comes_to_its_places_however_uneven_it_is() {
    for size in [1, 2, 3] {
        on_ranks(size, |mut backend, group| {
            let rank = group.rank();
            backend.reserve(Pool::State, 4 * 200 * size).unwrap();
            backend.join_ranks(&*group).unwrap();
            // Two buffers of each pair, of which some are empty.
            let buffers = |first: usize, from: usize, to: usize, of: usize| {
                let lens = [5 + from + 2 * to, 3 * ((from + to) % 2)];
                [0, 1].map(|i| floats(first + 40 * of + 20 * i, lens[i])).to_vec()
            };
            let sends: Vec<_> = (0..size).map(|to| buffers(0, rank, to, to)).collect();
            let receives: Vec<_> = (0..size).map(|from| buffers(40 * size, from, rank, from)).collect();
            for (to, parts) in sends.iter().enumerate() {
                for (i, part) in parts.iter().enumerate() {
                    backend.upload(bytemuck::cast_slice(&values(rank, 10 * to + i, part.len)), *part);
                }
            }
            backend.exchange(&*group, &sends, &receives).unwrap();
            backend.gather(&*group, sends[0][0].slice(0, 5), floats(80 * size, 5 * size)).unwrap();
            let mut read = |buffer: Buffer| {
                let mut found = vec![0f32; buffer.len];
                backend.read_back(buffer, bytemuck::cast_slice_mut(&mut found)).unwrap();
                found
            };
            for (from, parts) in receives.iter().enumerate() {
                for (i, part) in parts.iter().enumerate() {
                    assert_eq!(read(*part), values(from, 10 * rank + i, part.len), "{i} from {from} of {size}");
                }
                assert_eq!(read(floats(80 * size + 5 * from, 5)), values(from, 0, 5));
            }
            assert_eq!(backend.device_mut().faults, Vec::<String>::new());
        });
    }
}

/// A block's sum depends on its elements alone: not on where they are, nor on which of them came from another rank.
#[test]
fn the_squares_of_a_block_are_the_same_wherever_its_elements_are() {
    const BLOCK: usize = crate::backend::cpu::DOT_BLOCK;
    assert_eq!(BLOCK, arl_kernels::constants::ranks::BLOCK);
    let mut cuda = CudaBackend::new(RecordingDevice::new(EmulatedDevice::default()));
    let mut cpu = CpuBackend::new();
    let len = 2 * BLOCK + 777;
    let all = values(1, 2, len);
    let run = |backend: &mut dyn Backend, shift: usize, split: usize| {
        backend.reserve(Pool::State, 4 * (len + 4)).unwrap();
        backend.reserve(Pool::Scratch, 1 << 20).unwrap();
        backend.upload(bytemuck::cast_slice(&all[..split]), floats(shift, split));
        let sums = backend.block_squares(floats(shift, split), &all[split..]).unwrap();
        sums.into_iter().map(f64::to_bits).collect::<Vec<_>>()
    };
    for backend in [&mut cuda as &mut dyn Backend, &mut cpu] {
        let expected = run(backend, 0, len);
        for (shift, split) in [(1, len), (0, len - 777), (3, len - 776), (2, len - 1)] {
            assert_eq!(run(backend, shift, split), expected, "{shift} {split}");
        }
        let exact = |block: &[f32]| block.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>();
        for (sum, block) in expected.iter().zip(all.chunks(BLOCK)) {
            assert!((f64::from_bits(*sum) - exact(block)).abs() <= 1e-12 * exact(block));
        }
    }
    assert_eq!(cuda.device_mut().faults, Vec::<String>::new());
}

/// What steps leave: losses and norms, weights and moments.
#[derive(Debug, PartialEq)]
struct Outcome {
    figures: Vec<(f64, f64)>,
    state: Vec<f32>,
}

fn take<B: Backend>(
    mut engine: Engine<B>,
    steps: &[Vec<MicroBatch>],
    rank: usize,
    size: usize,
) -> (Engine<B>, Outcome) {
    let figures = steps
        .iter()
        .map(|step| {
            let own: Vec<MicroBatch> = step.iter().skip(rank).step_by(size).cloned().collect();
            let stats = engine.step(&own, HYPER).unwrap();
            assert!(!stats.skipped);
            (stats.loss, stats.grad_norm)
        })
        .collect();
    let mut state = Vec::new();
    for name in engine.tensor_names() {
        for kind in [Kind::Weights, Kind::Moment1, Kind::Moment2] {
            // What is frozen has weights alone.
            state.extend(engine.read_tensor(&name, kind).unwrap_or_default());
        }
    }
    (engine, Outcome { figures, state })
}

/// A rank more than there are micro-batches in the last step, so that one computes nothing there.
fn steps() -> Vec<Vec<MicroBatch>> {
    vec![vec![batch(&[9, 3], 1), batch(&[17], 2), batch(&[5, 5], 3)], vec![batch(&[12], 5)]]
}

#[test]
fn steps_of_several_ranks_have_the_bits_of_one_and_the_numbers_of_the_cpu() {
    for (name, dtype, bound) in
        [("window-bias", DType::F32, 1e-5), ("window-bias", DType::Bf16, 1e-2), ("moe-balance", DType::F32, 1e-5)]
    {
        let base = EngineOptions { data_parallel: Some(1), ..options(dtype, Recompute::Norms, 33) };
        let weights = Weights::Checkpoint;
        let cpu = Engine::open(Box::new(CpuBackend::new()), &model(name), weights, &base).unwrap();
        let (_, cpu) = take(cpu, &steps(), 0, 1);
        let device = CudaBackend::new(EmulatedDevice::default());
        let alone = Engine::open(Box::new(device), &model(name), weights, &base).unwrap();
        let (_, one) = take(alone, &steps(), 0, 1);
        for ((loss, norm), expected) in one.figures.iter().zip(&cpu.figures) {
            assert!((loss - expected.0).abs() <= bound * expected.0, "{name} {dtype:?}: {loss} {expected:?}");
            assert!((norm - expected.1).abs() <= bound * expected.1, "{name} {dtype:?}: {norm} {expected:?}");
        }
        let apart = difference(&one.state, &cpu.state);
        assert!(apart <= bound, "{name} {dtype:?}: {apart:e} apart from the CPU's");
        for (size, zero) in [(2, 0), (2, 1), (2, 2), (3, 2), (2, 3), (3, 3)] {
            let found = on_ranks(size, |backend, group| {
                let rank = group.rank();
                let options = EngineOptions { data_parallel: Some(size), rank, zero, ..base.clone() };
                let mut engine = Engine::open(Box::new(backend), &model(name), weights, &options).unwrap();
                engine.join(group).unwrap();
                let (mut engine, outcome) = take(engine, &steps(), rank, size);
                let device = engine.backend_mut().device_mut();
                assert_eq!(device.faults, Vec::<String>::new(), "{name} {dtype:?} zero {zero}");
                assert!(device.collectives > 0);
                outcome
            });
            for (rank, found) in found.into_iter().enumerate() {
                assert_eq!(found.figures, one.figures, "{name} {dtype:?} zero {zero}: rank {rank} of {size}");
                assert!(found == one, "{name} {dtype:?} zero {zero}: rank {rank} of {size}");
            }
        }
    }
}
