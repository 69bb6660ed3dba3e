//! What is passed to attention's library, against this project's own kernels: a library that knows of a pass what it was passed
//! computes it in plain loops, and whole steps with it are those of the CPU.

use arl_model::ErrorCode;
use half::bf16;

use super::emulated::EmulatedDevice;
use super::recording::{NoDevice, RecordingDevice};
use super::step_tests::common::{HYPER, batch, deeper, difference, options};
use super::*;
use crate::backend::cpu::CpuBackend;
use crate::backend::{DeviceKind, Sequences, attention_library_scratch};
use crate::engine::Engine;
use crate::options::AttentionChoice;
use crate::options::Recompute;
use crate::options::{EngineOptions, Weights};
use crate::weights::Kind;

/// A device whose library has a plan for the shapes that `has_plan` says.
fn device(has_plan: fn(&PackedShape) -> bool) -> EmulatedDevice {
    let mut device = EmulatedDevice::default();
    device.library = Some(has_plan);
    device
}

struct Case {
    heads: Heads,
    bounds: Vec<i32>,
    window: Option<usize>,
    /// Elements between the rows of queries, keys and values, and between those of the output.
    gap: usize,
}

impl Case {
    fn tokens(&self) -> usize {
        *self.bounds.last().unwrap() as usize
    }

    fn asked(&self, op: &Attention) -> AttentionLibrary {
        AttentionLibrary {
            heads: self.heads,
            window: self.window,
            scale: op.scale,
            tokens: self.tokens(),
            sequences: op.sequences.count,
            max_len: op.sequences.max_len,
            strides: [op.q, op.k, op.v, op.out].map(|rows| rows.stride),
        }
    }

    /// Output and gradients of queries, keys and values.
    fn run<D: Device>(&self, backend: &mut CudaBackend<D>, library: bool) -> [Vec<f32>; 2] {
        let Heads { query, key_value, dim } = self.heads;
        let (tokens, count) = (self.tokens(), self.bounds.len() - 1);
        let (width, row) = ((query + 2 * key_value) * dim, (query + 2 * key_value) * dim + self.gap);
        backend.reserve(Pool::Step, 1 << 26).unwrap();
        let bytes = backend.scratch_bytes(1 << 10, tokens);
        backend.reserve(Pool::Scratch, bytes).unwrap();
        let mut next = 0;
        let mut place = |len: usize, dtype: DType| {
            let buffer = Buffer { pool: Pool::Step, offset: next, len, dtype };
            next = (next + buffer.bytes()).next_multiple_of(64) + 64;
            buffer
        };
        let [qkv, out] = [place(tokens * row, DType::Bf16), place(tokens * (query * dim + self.gap), DType::Bf16)];
        let [d_out, d_qkv] = [place(tokens * query * dim, DType::Bf16), place(tokens * width, DType::Bf16)];
        let cu_seqlens = place(count + 1, DType::I32);
        let log_sum_exp = place(tokens * query, DType::F32);
        let scratch = place(attention_library_scratch(self.heads, tokens, count), DType::F32);
        let scratch =
            if library { scratch } else { scratch.slice(0, DeviceKind::Cuda.attention_scratch(self.heads, tokens)) };
        for poisoned in [out, d_qkv, log_sum_exp, scratch, backend.scratch] {
            backend.upload(&vec![0xff; poisoned.bytes()], poisoned);
        }
        let mut state = 7u32;
        for input in [qkv, d_out] {
            let mut values = vec![bf16::ZERO; input.len];
            for value in &mut values {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                *value = bf16::from_f32((state >> 8) as f32 / (1u32 << 23) as f32 - 1.0);
            }
            backend.upload(bytemuck::cast_slice(&values), input);
        }
        backend.upload(bytemuck::cast_slice(&self.bounds), cu_seqlens);
        let part = |head: usize| Rows { buffer: qkv.slice(head * dim, qkv.len - head * dim), stride: row };
        let max_len = self.bounds.windows(2).map(|pair| (pair[1] - pair[0]) as usize).max().unwrap();
        let op = Attention {
            heads: self.heads,
            sequences: Sequences { cu_seqlens, count, max_len },
            causal: true,
            window: self.window,
            scale: 1.0 / (dim as f32).sqrt(),
            q: part(0),
            k: part(query),
            v: part(query + key_value),
            out: Rows { buffer: out, stride: query * dim + self.gap },
            log_sum_exp,
        };
        if library {
            backend.use_attention_library(&[self.asked(&op)]).unwrap();
        }
        backend.attention(&op);
        backend.attention_backward(&op, Rows { buffer: d_out, stride: query * dim }, d_qkv, scratch);
        [out, d_qkv].map(|buffer| {
            let mut values = vec![bf16::ZERO; buffer.len];
            backend.read_back(buffer, bytemuck::cast_slice_mut(&mut values)).unwrap();
            values.into_iter().map(bf16::to_f32).collect()
        })
    }
}

fn case(query: usize, key_value: usize, dim: usize, bounds: &[i32], window: Option<usize>, gap: usize) -> Case {
    Case { heads: Heads { query, key_value, dim }, bounds: bounds.to_vec(), window, gap }
}

#[test]
fn what_the_library_is_told_is_what_the_own_kernels_compute() {
    for case in [
        case(1, 1, 64, &[0, 1], None, 0),
        case(4, 1, 64, &[0, 65, 66, 130], None, 8),
        case(2, 2, 128, &[0, 0, 40, 40, 41, 70], Some(9), 0),
        case(7, 1, 64, &[0, 33, 90], Some(40), 0),
        case(8, 2, 128, &[0, 20, 45], None, 16),
    ] {
        let mut own = CudaBackend::new(device(|_| true));
        let expected = case.run(&mut own, false);
        assert_eq!(own.device_mut().packed_passes, 0, "a library that is not turned on is not asked");
        let mut backend = CudaBackend::new(device(|_| true));
        let actual = case.run(&mut backend, true);
        let device = backend.device_mut();
        assert_eq!(device.packed_passes, 2);
        let kernels: Vec<_> = device.ran.iter().copied().filter(|name| name.contains("attention")).collect();
        assert_eq!(kernels, ["attention_offsets", "attention_place_bf16"]);
        // The kernels round probabilities to bf16 before the products, the library's loops do not. What is between rows
        // of the output is no number in either.
        for ((actual, expected), bound) in actual.iter().zip(&expected).zip([3e-3, 1e-2]) {
            let numbers = |values: &[f32]| values.iter().copied().filter(|x| !x.is_nan()).collect::<Vec<_>>();
            assert!(actual.iter().zip(expected).all(|(a, b)| a.is_nan() == b.is_nan()), "{:?}", case.heads);
            let apart = difference(&numbers(actual), &numbers(expected));
            assert!(apart <= bound, "{:?} {:?}: {apart:e} apart", case.heads, case.bounds);
        }
    }
}

#[test]
fn shapes_without_a_plan_run_on_the_own_kernels_in_both_passes() {
    let case = case(2, 1, 64, &[0, 30, 90], None, 0);
    let expected = case.run(&mut CudaBackend::new(device(|_| true)), false);
    let mut backend = CudaBackend::new(device(|shape| shape.sequences > 2));
    let asked = |sequences| AttentionLibrary {
        heads: case.heads,
        window: None,
        scale: 1.0,
        tokens: 90,
        sequences,
        max_len: 60,
        strides: [256, 256, 256, 128],
    };
    assert_eq!(backend.use_attention_library(&[asked(3), asked(2)]), Err("no plan".to_string()));
    backend.use_attention_library(&[asked(3)]).unwrap();
    assert_eq!(case.run(&mut backend, false), expected);
    assert_eq!(backend.device_mut().packed_passes, 0);
}

#[test]
fn shapes_are_rounded_so_that_plans_are_few_and_windows_that_hide_nothing_are_none() {
    let asked = |tokens, sequences, max_len, window| AttentionLibrary {
        heads: Heads { query: 14, key_value: 2, dim: 64 },
        window,
        scale: 0.125,
        tokens,
        sequences,
        max_len,
        strides: [1024, 1024, 1152, 896],
    };
    let shape =
        |tokens, sequences, max_len, window| PackedShape::new(&asked(tokens, sequences, max_len, window)).unwrap();
    let one = shape(9000, 5, 2000, None);
    assert_eq!((one.tokens, one.sequences, one.max_len), (10_240, 8, 2048));
    assert_eq!(one, shape(10_240, 8, 1025, Some(2048)));
    assert_ne!(one, shape(9000, 5, 2000, Some(2047)));
    assert_eq!(one.strides, [1024, 1024, 1152, 896, 14, 896, 1152, 128, 128]);
    let least = shape(1, 1, 1, None);
    assert_eq!((least.tokens, least.sequences, least.max_len), (1024, 1, 128));
    // Offsets are ints: 2^31 / 1152 tokens.
    assert!(PackedShape::new(&asked(1 << 21, 8, 4096, None)).is_none());
    let odd = AttentionLibrary { heads: Heads { query: 2, key_value: 1, dim: 96 }, ..asked(9000, 5, 2000, None) };
    assert!(PackedShape::new(&odd).is_none());
}

/// The scratch of a larger micro-batch holds that of a smaller one.
#[test]
fn the_librarys_scratch_grows_with_tokens_and_sequences() {
    let heads = Heads { query: 32, key_value: 8, dim: 128 };
    let len = |tokens, sequences| attention_library_scratch(heads, tokens, sequences);
    for tokens in (1..40_000).step_by(37) {
        assert!(len(tokens, 3) <= len(tokens + 37, 3) && len(tokens, 3) <= len(tokens, 4));
        assert!(len(tokens, 3) >= tokens * heads.query);
    }
    // In bytes, of 16,384 tokens: sums of queries (a row of all three) and of keys and values for each query head, in f32;
    // one f32 a query and head; keys' and values' gradients in bf16; 1 MiB, and lengths and offsets of 16 sequences.
    let token = 4 * (48 * 128) + 2 * 4 * (32 * 128) + 4 * 32 + 2 * 2 * (8 * 128);
    let bytes = 4 * len(16_384, 16);
    assert!((bytes - 16_384 * token - (1 << 20)) < 4096, "{bytes}");
}

#[test]
fn steps_with_the_library_are_those_of_the_cpu_and_keep_the_order() {
    let batches = [batch(&[9, 3, 21], 1), batch(&[17], 2)];
    let dir = deeper("window-bias", 3);
    let path = dir.path().join("config.json");
    let config = std::fs::read_to_string(&path).unwrap().replace("\"head_dim\":8", "\"head_dim\":64");
    std::fs::write(&path, config).unwrap();
    let gradients = |engine: &mut Engine<CudaBackend<RecordingDevice<EmulatedDevice>>>| {
        let names = engine.tensor_names();
        names.iter().flat_map(|name| engine.read_tensor(name, Kind::Gradients).unwrap()).collect::<Vec<f32>>()
    };
    let base = options(DType::Bf16, Recompute::Norms, 33);
    let mut cpu = Engine::open(Box::new(CpuBackend::new()), dir.path(), Weights::Random(7), &base).unwrap();
    cpu.gradients(&batches).unwrap();
    let names = cpu.tensor_names();
    let expected: Vec<f32> = names.iter().flat_map(|name| cpu.read_tensor(name, Kind::Gradients).unwrap()).collect();
    for recompute in [Recompute::Norms, Recompute::Block] {
        let options = EngineOptions { recompute, attention: AttentionChoice::Auto, ..base.clone() };
        let backend = CudaBackend::new(RecordingDevice::new(device(|_| true)));
        let mut engine = Engine::open(Box::new(backend), dir.path(), Weights::Random(7), &options).unwrap();
        engine.gradients(&batches).unwrap();
        let apart = difference(&gradients(&mut engine), &expected);
        assert!(apart <= 1e-2, "{recompute:?}: gradients {apart:e} apart");
        engine.step(&batches, HYPER).unwrap();
        assert_eq!(engine.backend_mut().device_mut().faults, Vec::<String>::new(), "{recompute:?}");
        assert_eq!(engine.notice(), None);
    }
}

#[test]
fn plans_for_all_micro_batches_of_a_step_are_begun_before_anything_of_it_is_queued() {
    let dir = deeper("window-bias", 2);
    let path = dir.path().join("config.json");
    let config = std::fs::read_to_string(&path).unwrap().replace("\"head_dim\":8", "\"head_dim\":64");
    std::fs::write(&path, config).unwrap();
    let options = EngineOptions { attention: AttentionChoice::Auto, ..options(DType::Bf16, Recompute::Norms, 300) };
    let backend = CudaBackend::new(RecordingDevice::new(NoDevice));
    let mut engine = Engine::open(Box::new(backend), dir.path(), Weights::Random(7), &options).unwrap();
    let opened = engine.backend_mut().device_mut().planned.len();
    let batches = [batch(&[9, 3, 21], 1), batch(&[17], 2), batch(&[300], 3)];
    for evaluated in [false, true] {
        let device = engine.backend_mut().device_mut();
        let (before, queued) = (device.expected.len(), device.kernels.len());
        let asked = device.planned.len();
        if evaluated {
            engine.evaluate(&batches).unwrap();
        } else {
            engine.gradients(&batches).unwrap();
        }
        let device = engine.backend_mut().device_mut();
        let expected = &device.expected[before..];
        // Two windows, three micro-batches.
        assert_eq!(expected.len(), 6);
        assert!(expected.iter().all(|(kernels, _)| *kernels == queued));
        let planned = &device.planned[asked..];
        assert!(planned.iter().all(|(_, shape)| expected.iter().any(|(_, other)| other == shape)));
        assert!(!planned.is_empty() && opened > 0);
    }
}

#[test]
fn blocks_that_are_launched_are_at_most_a_few_times_those_with_work() {
    // One long sequence among many short ones, and sequences alike.
    let (ragged, even) = ([vec![4096], vec![20; 50]].concat(), vec![1025; 9]);
    for (lengths, sparse) in [(&ragged, true), (&even, false)] {
        let bounds: Vec<i32> = std::iter::once(0)
            .chain(lengths.iter().scan(0, |end, length| {
                Some({
                    *end += length;
                    *end
                })
            }))
            .collect();
        let case = case(2, 1, 64, &bounds, None, 0);
        let mut backend = CudaBackend::new(RecordingDevice::new(NoDevice));
        case.run(&mut backend, true);
        let device = backend.device_mut();
        assert_eq!(device.planned.len(), if sparse { 1 } else { 3 }, "by the library where it is not sparse");
        let mut own = CudaBackend::new(RecordingDevice::new(NoDevice));
        case.run(&mut own, false);
        let blocks = &own.device_mut().blocks;
        let tiles = |size: i32| lengths.iter().map(|length| (length + size - 1) / size).sum::<i32>() as usize;
        // Both query heads forward; backward one key head as well.
        let (forward, backward) = (2 * tiles(128), 3 * tiles(128));
        for (kernel, working) in [("attention_forward_64_bf16", forward), ("attention_backward_64_bf16", backward)] {
            assert!((working..=2 * working).contains(&blocks[kernel]), "{kernel}: {} of {working}", blocks[kernel]);
        }
    }
}

#[test]
fn who_computes_attention_is_chosen_settled_and_told() {
    let dir = deeper("window-bias", 2);
    let path = dir.path().join("config.json");
    let small = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, small.replace("\"head_dim\":8", "\"head_dim\":128")).unwrap();
    let open = |has_plan: fn(&PackedShape) -> bool, attention, dtype| {
        let options = EngineOptions { attention, ..options(dtype, Recompute::Norms, 33) };
        Engine::open(Box::new(CudaBackend::new(device(has_plan))), dir.path(), Weights::Random(7), &options)
    };
    let passes = |mut engine: Engine<CudaBackend<EmulatedDevice>>| {
        engine.gradients(&[batch(&[9, 3], 1)]).unwrap();
        engine.backend_mut().device_mut().packed_passes
    };
    let (bf16, f32) = (DType::Bf16, DType::F32);
    assert_eq!(passes(open(|_| true, AttentionChoice::Auto, bf16).unwrap()), 4);
    assert_eq!(passes(open(|_| true, AttentionChoice::Cudnn, bf16).unwrap()), 4);
    assert_eq!(passes(open(|_| true, AttentionChoice::Own, bf16).unwrap()), 0);
    assert_eq!(passes(open(|_| true, AttentionChoice::Auto, f32).unwrap()), 0);
    // One of its two windows has no plan.
    let windowed = |shape: &PackedShape| shape.window.is_none();
    let fallen_back = open(windowed, AttentionChoice::Auto, bf16).unwrap();
    assert_eq!(fallen_back.notice().unwrap(), "attention runs on arl's own kernels: no plan");
    assert_eq!(passes(fallen_back), 0);
    let error = open(windowed, AttentionChoice::Cudnn, bf16).err().unwrap();
    assert_eq!((error.code, error.message.as_str()), (ErrorCode::Device, "attention cudnn: no plan"));
    let error = open(|_| true, AttentionChoice::Cudnn, f32).err().unwrap();
    assert_eq!(error.code, ErrorCode::Config);
    assert!(error.message.contains("f32, 128, a GPU"), "{}", error.message);
}
