//! AdamW. Kernels: `cuda/optimizer.cu`.

use super::device::{Arg, Device, Launch, long};
use crate::backend::{AdamW, DType};

const THREADS: usize = 256;
/// Parameters of a block: a thread takes four, four times.
const BLOCK: usize = THREADS * 4 * 4;

/// As [`crate::backend::Backend::adamw`].
pub(super) fn adamw<D: Device>(device: &mut D, op: &AdamW) {
    let len = op.weights.len;
    assert_eq!((op.gradients.len, op.moment1.len, op.moment2.len), (len, len, len), "adamw of {len} weights");
    assert_eq!(op.grad_norm_squared.len, 1, "adamw takes one norm");
    let grid = [len.div_ceil(BLOCK), 1, 1];
    let weights = Arg::Update(op.weights);
    let rest = [
        Arg::Read(op.gradients),
        Arg::Update(op.moment1),
        Arg::Update(op.moment2),
        Arg::Read(op.grad_norm_squared),
        Arg::Float(op.gradient_scale),
        Arg::Float(op.max_grad_norm),
        Arg::Float(op.keep()),
        Arg::Float(op.beta1),
        Arg::Float(op.beta2),
        Arg::Float(op.step_size()),
        Arg::Float(op.root_correction()),
        Arg::Float(op.epsilon),
        long(len),
    ];
    let masters_len = op.masters.map_or(len, |masters| masters.len);
    assert_eq!(masters_len, len, "adamw of {len} weights");
    let (kernel, args) = match (op.weights.dtype, op.masters, op.rounding) {
        (DType::F32, None, None) => ("adamw_f32", [&[weights][..], &rest].concat()),
        (DType::Bf16, Some(low), _) => ("adamw_split", [&[weights, Arg::Update(low)][..], &rest].concat()),
        (DType::F16, Some(masters), _) => ("adamw_f16", [&[weights, Arg::Update(masters)][..], &rest].concat()),
        (DType::Bf16, None, Some(rounding)) => {
            // The bits of two u32 and a u64.
            let [low, high] = rounding.key.map(|word| Arg::Int(word.cast_signed()));
            let first = Arg::Long(rounding.first.cast_signed());
            ("adamw_bf16", [&[weights, low, high, first][..], &rest].concat())
        }
        (dtype, masters, _) => unreachable!("no leaf updates weights of {dtype:?} with masters {masters:?}"),
    };
    device.launch(&Launch { kernel, grid, threads: THREADS, shared_bytes: 0, args: &args });
}
