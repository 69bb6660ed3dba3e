//! The classifier pass. Kernels: `cuda/classifier.cu`.

use arl_kernels::constants::classifier::{KEPT_BYTES, THREADS};

use super::device::{Arg, Device, Launch, int, kernel};
use crate::backend::{CrossEntropy, DType};

/// As [`crate::backend::Backend::cross_entropy`].
pub(super) fn cross_entropy<D: Device>(device: &mut D, op: &CrossEntropy) {
    let (rows, vocab, logits) = (op.rows, op.vocab, op.logits);
    assert_eq!(logits.len, rows * vocab, "cross_entropy of {rows} rows of {vocab}");
    assert_eq!((op.targets.len, op.weights.len), (rows, rows), "cross_entropy of {rows} rows");
    assert_eq!((op.nll.len, op.correct.len, op.entropy.len), (rows, rows, rows), "cross_entropy of {rows} rows");
    let [nll, correct, entropy] = [op.nll, op.correct, op.entropy].map(Arg::Write);
    let launch = Launch {
        kernel: kernel!(logits.dtype, "cross_entropy"),
        grid: [rows, 1, 1],
        threads: THREADS,
        shared_bytes: 0,
        args: &[Arg::Read(logits), Arg::Read(op.targets), nll, correct, entropy, int(vocab)],
    };
    let Some(gradient) = op.gradient else {
        return device.launch(&launch);
    };
    let row_bytes = vocab * logits.dtype.bytes();
    let place = (gradient.buffer.pool, gradient.buffer.offset, gradient.stride * gradient.buffer.dtype.bytes());
    assert_eq!(place, (logits.pool, logits.offset, row_bytes), "the gradient is in the logits' memory");
    device.launch(&Launch {
        kernel: match (logits.dtype, gradient.buffer.dtype) {
            (DType::F32, DType::F32) => "cross_entropy_gradient_f32",
            (DType::F32, DType::Bf16) => "cross_entropy_gradient_f32_bf16",
            (DType::F32, DType::F16) => "cross_entropy_gradient_f32_f16",
            (DType::Bf16, DType::Bf16) => "cross_entropy_gradient_bf16",
            (DType::F16, DType::F16) => "cross_entropy_gradient_f16",
            (a, b) => unreachable!("no leaf turns logits of {a:?} into a gradient of {b:?}"),
        },
        shared_bytes: KEPT_BYTES,
        args: &[
            Arg::Update(logits),
            Arg::Read(op.targets),
            Arg::Read(op.weights),
            Arg::Float(op.scale),
            nll,
            correct,
            entropy,
            int(vocab),
        ],
        ..launch
    });
}
