//! Pieces of an offloaded optimizer that stay on the device: equal bits, the order of what is queued, fewer copies, and how
//! long a step then waits for the link.

use std::path::Path;
use std::sync::atomic::Ordering;

use arl_model::ModelFiles;

use super::emulated::EmulatedDevice;
use super::recording::{NoDevice, RecordingDevice};
use super::step_tests::common::{HYPER, batch, deeper, options};
use super::*;
use crate::MicroBatch;
use crate::backend::plan::PlanBackend;
use crate::backend::profile::ProfileBackend;
use crate::backend::timeline::Rates;
use crate::batch::BatchSize;
use crate::engine::Engine;
use crate::kept::{MARGIN, pieces};
use crate::options::{EngineOptions, Recompute, Weights};
use crate::weights::Kind;

type Recorded<D> = CudaBackend<RecordingDevice<D>>;

fn offloaded(dtype: DType) -> EngineOptions {
    EngineOptions { optimizer_offload: true, ..options(dtype, Recompute::Block, 33) }
}

/// An engine on a device with room for so many pieces in addition to the plan.
fn open<D: Device>(device: D, dir: &Path, options: &EngineOptions, room: usize) -> Engine<Recorded<D>> {
    let bare = Engine::open(Box::new(CudaBackend::new(NoDevice)), dir, Weights::Random(7), options).unwrap();
    let piece = bare.model.store.slots.unwrap().kept_bytes();
    let mut device = RecordingDevice::new(device);
    device.free = Some(MARGIN + room * piece + piece / 2);
    Engine::open(Box::new(CudaBackend::new(device)), dir, Weights::Random(7), options).unwrap()
}

fn piece_count<B: Backend>(engine: &Engine<B>) -> usize {
    pieces(&engine.model.placement.runs, engine.model.store.slots.unwrap().piece).len()
}

fn bits<B: Backend>(engine: &mut Engine<B>) -> Vec<u32> {
    let mut bits = Vec::new();
    for kind in [Kind::Weights, Kind::Moment1, Kind::Moment2] {
        for name in engine.tensor_names() {
            bits.extend(engine.read_tensor(&name, kind).unwrap().into_iter().map(f32::to_bits));
        }
    }
    bits
}

#[test]
fn what_stays_on_the_device_changes_no_bit_of_steps_and_states() {
    let dir = deeper("window-bias", 5);
    let batches = [batch(&[9, 3, 21], 1), batch(&[17], 2)];
    let rooms: [(DType, &[usize]); 3] = [(DType::Bf16, &[1, 3, 100]), (DType::F32, &[3]), (DType::F16, &[3])];
    for (dtype, rooms) in rooms {
        let options = offloaded(dtype);
        let run = |room: usize| {
            let mut engine = open(EmulatedDevice::default(), dir.path(), &options, room);
            let count = piece_count(&engine);
            assert_eq!(engine.kept.count, room.min(count));
            let mut found = Vec::new();
            engine.step(&batches, HYPER).unwrap();
            found.push(engine.step(&batches, HYPER).unwrap().loss.to_bits());
            // As generation does, which reads weights alone.
            engine.complete_update();
            engine.interrupt_flag().store(true, Ordering::Relaxed);
            assert!(engine.step(&batches, HYPER).is_err());
            let between = bits(&mut engine);
            // A micro-batch larger than any before: its memory is reserved again, and what stays with it.
            found.push(engine.step(&[batch(&[40], 3)], HYPER).unwrap().loss.to_bits());
            let state = tempfile::tempdir().unwrap();
            engine.save_state(state.path()).unwrap();
            found.push(engine.step(&batches, HYPER).unwrap().loss.to_bits());
            let after = bits(&mut engine);
            engine.restore_state(state.path()).unwrap();
            found.push(engine.step(&batches, HYPER).unwrap().loss.to_bits());
            assert!(bits(&mut engine) == after, "{dtype:?} {room}: a restored state");
            assert_eq!(engine.kept.count, room.min(count));
            assert_eq!(engine.backend_mut().device_mut().faults, Vec::<String>::new(), "{dtype:?} {room}");
            (found, between, after)
        };
        let expected = run(0);
        for &room in rooms {
            assert!(run(room) == expected, "{dtype:?} {room}");
        }
    }
}

#[test]
fn only_the_other_pieces_come_and_go_and_those_that_stay_are_spread_evenly() {
    let dir = deeper("window-bias", 5);
    let options = offloaded(DType::Bf16);
    let batches = [batch(&[9, 3], 1), batch(&[12], 2)];
    for room in [0, 1, 2, 3, 100] {
        let mut engine = open(NoDevice, dir.path(), &options, room);
        let (count, kept) = (piece_count(&engine), engine.kept.count);
        assert!(count > 4);
        let memory = engine.memory();
        let bytes = memory.categories.iter().find(|(name, _)| *name == "optimizer pieces kept").map_or(0, |(_, n)| *n);
        assert_eq!(bytes, kept * engine.model.store.slots.unwrap().kept_bytes());
        assert_eq!(memory.total_bytes, memory.categories.iter().map(|(_, bytes)| bytes).sum::<usize>());
        engine.step(&batches, HYPER).unwrap();
        engine.complete_update();
        let before = engine.backend_mut().device_mut().transfers;
        for _ in 0..2 {
            engine.step(&batches, HYPER).unwrap();
        }
        engine.complete_update();
        let device = engine.backend_mut().device_mut();
        // Two moments and the second half of the masters, each way.
        assert_eq!(device.transfers - before, 2 * 2 * 3 * (count - kept), "{room}");
        assert_eq!(device.faults, Vec::<String>::new(), "{room}");
    }
}

#[test]
fn a_copy_of_what_stays_that_is_not_waited_for_is_found() {
    let dir = deeper("window-bias", 5);
    let options = offloaded(DType::Bf16);
    let run = |forgotten: usize| {
        let mut engine = open(NoDevice, dir.path(), &options, 2);
        engine.backend_mut().device_mut().forgotten = forgotten;
        let mut copies = Vec::new();
        for _ in 0..2 {
            engine.step(&[batch(&[9, 3], 1)], HYPER).unwrap();
            engine.complete_update();
            let before = engine.backend_mut().device_mut().waits;
            engine.complete_update_in_host();
            copies.push((before, engine.backend_mut().device_mut().waits));
        }
        (copies, engine.backend_mut().device_mut().faults.len())
    };
    let (copies, faults) = run(0);
    assert_eq!(faults, 0);
    let (before, after) = copies[0];
    assert_eq!(after - before, 2);
    assert!(run(before + 1).1 > 0 && run(after).1 > 0);
}

/// Seconds of a step, how much of them it waits for the link, and the share of pieces that stay, on a GPU with these rates and
/// so much memory.
fn modelled(
    dir: &Path,
    options: &EngineOptions,
    batches: &[MicroBatch],
    rates: Rates,
    memory: usize,
) -> (f64, f64, f64) {
    let mut backend = ProfileBackend::new(Box::new(PlanBackend::of(DeviceKind::Cuda).with_memory(memory)));
    backend.model(rates);
    let mut engine = Engine::reserve(Box::new(backend), ModelFiles::read(dir).unwrap(), options).unwrap();
    let mut step = || {
        engine.step(batches, HYPER).unwrap();
        let line = engine.backend_mut().timeline().unwrap();
        (line.end(), line.waited())
    };
    step();
    let (before, after) = (step(), step());
    let share = engine.kept.count as f64 / piece_count(&engine) as f64;
    (after.0 - before.0, after.1 - before.1, share)
}

#[test]
fn the_more_stays_the_less_a_step_waits_for_the_link() {
    let dir = deeper("window-bias", 5);
    let options = offloaded(DType::Bf16);
    let batches = [batch(&[9, 3, 21], 1), batch(&[17], 2)];
    let engine = open(NoDevice, dir.path(), &options, 0);
    let count = piece_count(&engine);
    let piece = engine.model.store.slots.unwrap().kept_bytes();
    let training = engine.model.store.training.unwrap();
    let bytes = training.moment1.bytes() + training.moment2.bytes() + engine.model.store.masters.unwrap().bytes();
    let device = Box::new(PlanBackend::of(DeviceKind::Cuda).with_memory(MARGIN));
    let planned = Engine::reserve(device, ModelFiles::read(dir.path()).unwrap(), &options).unwrap();
    assert_eq!(planned.kept.count, 0);
    let reserved = MARGIN - planned.backend.memory().unwrap().unwrap().0;
    let with = |room: usize, link: f64| {
        let rates = Rates { flops: 1e9, memory: 1e12, link };
        modelled(dir.path(), &options, &batches, rates, reserved + MARGIN + room * piece)
    };
    let (step, none, _) = with(0, f64::INFINITY);
    assert_eq!(none, 0.0);
    // What is offloaded takes four times as long on its way as a step computes: a forward pass hides a part of it.
    let link = bytes as f64 / (4.0 * step);
    let waits: Vec<f64> = (0..=count).map(|room| with(room, link).1).collect();
    assert!(waits[0] > step && waits[0] < 4.0 * step, "{waits:?} of {step}");
    assert!(waits.windows(2).all(|pair| pair[1] < pair[0] || pair[1] == 0.0), "{waits:?}");
    assert_eq!(waits[count], 0.0);
}

/// What `docs/performance.md` says of 8 billion parameters.
#[test]
#[allow(clippy::print_stderr, reason = "the figures of the document, and a skip")]
fn at_8b_what_memory_is_left_decides_how_much_of_the_link_is_hidden() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/bench/configs/qwen3-8b");
    if !dir.join("config.json").exists() {
        eprintln!("SKIPPED: the timeline of a model whose configuration is not here");
        return;
    }
    let (tokens, sequence) = (16_384, 2048);
    let base = EngineOptions {
        dtype: DType::Bf16,
        recompute: Recompute::Mlp,
        optimizer_offload: true,
        max_batch: BatchSize { tokens, sequences: tokens / sequence, ..BatchSize::default() },
        ..EngineOptions::default()
    };
    let one = MicroBatch {
        input_ids: vec![1; tokens],
        targets: vec![2; tokens],
        positions: (0..tokens).map(|t| (t % sequence) as i32).collect(),
        cu_seqlens: (0..=tokens / sequence).map(|s| (s * sequence) as i32).collect(),
        ..MicroBatch::default()
    };
    let batches = vec![one; 8];
    let h100 = Rates { flops: 989e12, memory: 3.35e12, link: 64e9 };
    // Memory that the drivers report, without CUDA's own context.
    let waits = [0, 84_987_740_160 - (1 << 30), 150_754_820_096 - (1 << 30)].map(|memory| {
        let (step, waited, share) = modelled(&dir, &base, &batches, h100, memory);
        let gib = memory as f64 / (1u64 << 30) as f64;
        eprintln!("{gib:.1} GiB: a step of {step:.3} s waits for the link {waited:.3} s, {share:.3} stays");
        waited
    });
    assert!(waits[0] > 0.8 && waits[1] <= waits[0] && waits[2] < 0.1, "{waits:?}");
}
