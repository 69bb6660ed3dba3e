//! The rotary embedding's tables in whole steps: bits of angles that are computed for every token, what is uploaded, and
//! positions of three axes against the CPU.

use std::path::Path;

use arl_model::{ModelConfig, RopeAxes, RopeTable};

use super::emulated::EmulatedDevice;
use super::recording::{NoDevice, RecordingDevice};
use super::step_tests::common::{HYPER, batch, difference, model, options};
use super::*;
use crate::backend::cpu::CpuBackend;
use crate::engine::Engine;
use crate::options::{EngineOptions, Recompute, Weights};
use crate::plan::StepPlan;
use crate::rotary::RotaryTables;
use crate::weights::Kind;
use crate::{GenerateOptions, MicroBatch};

fn open<B: Backend>(backend: B, name: &str, options: &EngineOptions) -> Engine<B> {
    Engine::open(Box::new(backend), &model(name), Weights::Random(7), options).unwrap()
}

fn recorded() -> CudaBackend<RecordingDevice<EmulatedDevice>> {
    CudaBackend::new(RecordingDevice::new(EmulatedDevice::default()))
}

/// Losses, gradients' norms and trained weights of some steps, and what the model then generates.
fn bits<B: Backend>(backend: B, name: &str, dtype: DType, direct: bool) -> (Vec<u64>, Vec<Vec<i32>>) {
    let mut engine = open(backend, name, &options(dtype, Recompute::Norms, 33));
    engine.tables.direct = direct;
    let mut bits = Vec::new();
    for step in 0..3 {
        let batches = [batch(&[9, 3, 21], step), batch(&[5, 28 + step as usize], step), batch(&[7], step)];
        let stats = engine.step(&batches, HYPER).unwrap();
        bits.extend([stats.loss.to_bits(), stats.grad_norm.to_bits()]);
    }
    for tensor in engine.tensor_names() {
        bits.extend(engine.read_tensor(&tensor, Kind::Weights).unwrap().iter().map(|x| u64::from(x.to_bits())));
    }
    // More tokens than any micro-batch before.
    let prompts = [vec![1, 2, 3], vec![4; 12]];
    (bits, engine.generate(&prompts, &GenerateOptions::greedy(30)).unwrap())
}

#[test]
fn whole_steps_and_generation_have_the_bits_of_angles_computed_for_every_token() {
    for name in ["window-bias", "rope-yarn", "rope-dynamic", "rope-longrope"] {
        for dtype in [DType::F32, DType::Bf16] {
            let cpu = |direct| bits(CpuBackend::new(), name, dtype, direct);
            assert!(cpu(false) == cpu(true), "{name} {dtype:?}, CPU");
            let cuda = |direct| bits(CudaBackend::new(EmulatedDevice::default()), name, dtype, direct);
            assert!(cuda(false) == cuda(true), "{name} {dtype:?}, kernels");
        }
    }
}

#[test]
fn a_micro_batch_uploads_four_bytes_a_token_of_its_positions() {
    let base = options(DType::Bf16, Recompute::Norms, 64);
    let mut engine = open(CudaBackend::new(RecordingDevice::new(NoDevice)), "rope-yarn", &base);
    let mut uploaded = |batch: &MicroBatch| {
        let before = engine.backend_mut().device_mut().uploaded;
        engine.gradients(std::slice::from_ref(batch)).unwrap();
        let device = engine.backend_mut().device_mut();
        assert_eq!(device.faults, Vec::<String>::new());
        device.uploaded - before
    };
    // Ids and rows of the tables of every token; four numbers of every target; the sequences' bounds.
    let inputs = |batch: &MicroBatch| {
        let targets = (0..batch.input_ids.len()).filter(|t| batch.weight(*t) > 0.0).count();
        4 * (2 * batch.input_ids.len() + 4 * targets + batch.cu_seqlens.len())
    };
    let (long, short) = (batch(&[9, 40], 1), batch(&[20, 33, 5], 2));
    // The table of 64 positions, in heads of 8: cosine and sine of 4 frequencies.
    assert_eq!(uploaded(&long), inputs(&long) + 64 * 2 * 4 * 4);
    for batch in [&short, &long, &short] {
        assert_eq!(uploaded(batch), inputs(batch));
    }
}

/// An engine whose model takes positions of three axes; no configuration that is read has them yet.
fn with_axes<B: Backend>(backend: B, dtype: DType) -> Engine<B> {
    let mut engine = open(backend, "window-bias", &options(dtype, Recompute::Norms, 33));
    let mut config = ModelConfig::from_dir(Path::new(&model("window-bias"))).unwrap();
    config.rope.axes = Some(RopeAxes { sections: [2, 1, 1], interleaved: true });
    engine.model.rope = RopeTable::new(&config);
    engine.model.shape.axes = true;
    (engine.plan, engine.tables) = (StepPlan::nothing(), RotaryTables::default());
    engine
}

#[test]
fn positions_of_three_axes_are_those_of_the_cpu() {
    let mut batch = batch(&[9, 3, 21], 1);
    let tokens = batch.positions.len();
    for axis in 1..3 {
        let further: Vec<i32> = batch.positions[..tokens].iter().map(|t| t + t % 4 * axis).collect();
        batch.positions.extend(further);
    }
    for (dtype, bound) in [(DType::F32, 1e-5), (DType::Bf16, 1e-2)] {
        let (mut cpu, mut cuda) = (with_axes(CpuBackend::new(), dtype), with_axes(recorded(), dtype));
        let flat = MicroBatch { positions: batch.positions[..tokens].to_vec(), ..batch.clone() };
        let [other, expected] = [flat, batch.clone()].map(|batch| {
            cpu.gradients(&[batch]).unwrap();
            let names = cpu.tensor_names();
            names.iter().flat_map(|name| cpu.read_tensor(name, Kind::Gradients).unwrap()).collect::<Vec<f32>>()
        });
        assert!(difference(&other, &expected) > 10.0 * bound, "{dtype:?}: the axes change nothing");
        cuda.gradients(std::slice::from_ref(&batch)).unwrap();
        let names = cuda.tensor_names();
        let actual: Vec<f32> = names.iter().flat_map(|name| cuda.read_tensor(name, Kind::Gradients).unwrap()).collect();
        let apart = difference(&actual, &expected);
        assert!(apart <= bound, "{dtype:?}: gradients {apart:e} apart");
        assert_eq!(cuda.backend_mut().device_mut().faults, Vec::<String>::new(), "{dtype:?}");
    }
}
