//! Whole steps of models that see on the CUDA leaves, whose kernels run on the host: their numbers against the CPU backend's.

use super::emulated::EmulatedDevice;
use super::recording::RecordingDevice;
use super::step_tests::common::vision::{batches, folder, room};
use super::step_tests::common::{HYPER, difference};
use super::*;
use crate::backend::cpu::CpuBackend;
use crate::engine::Engine;
use crate::options::{EngineOptions, Recompute, Weights};
use crate::weights::Kind;

fn open<B: Backend>(backend: B, name: &str, options: &EngineOptions) -> Engine<B> {
    Engine::open(Box::new(backend), folder(name).path(), Weights::Random(7), options).unwrap()
}

fn gradients<B: Backend>(engine: &mut Engine<B>) -> Vec<f32> {
    engine.gradients(&batches()).unwrap();
    let names = engine.tensor_names();
    names.iter().flat_map(|name| engine.read_tensor(name, Kind::Gradients).unwrap()).collect()
}

#[test]
fn losses_gradients_and_steps_of_models_that_see_are_those_of_the_cpu() {
    for name in ["qwen3_vl", "qwen2_5_vl"] {
        for (dtype, bound) in [(DType::F32, 1e-5), (DType::Bf16, 2e-2)] {
            for recompute in [Recompute::Off, Recompute::Block] {
                let options = room(dtype, recompute, &batches());
                let mut cpu = open(CpuBackend::new(), name, &options);
                let mut cuda = open(CudaBackend::new(RecordingDevice::new(EmulatedDevice::default())), name, &options);
                let apart = difference(&gradients(&mut cuda), &gradients(&mut cpu));
                assert!(apart <= bound, "{name} {dtype:?} {recompute:?}: gradients {apart:e} apart");
                for step in [&batches()[..], &batches()[1..2]] {
                    let [actual, expected] =
                        [cuda.step(step, HYPER).unwrap().loss, cpu.step(step, HYPER).unwrap().loss];
                    assert!((actual - expected).abs() <= bound, "{name} {dtype:?}: {actual} instead of {expected}");
                }
                assert_eq!(cuda.backend_mut().device_mut().faults, Vec::<String>::new(), "{name} {dtype:?}");
            }
        }
    }
}
