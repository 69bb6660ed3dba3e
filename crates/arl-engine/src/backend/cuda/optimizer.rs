//! AdamW. Kernels: `cuda/optimizer.cu`.

use arl_kernels::constants::optimizer::{GROUP, ROUNDS, THREADS};

use super::device::{Arg, Device, Launch, long};
use crate::backend::{AdamW, DType};

/// Parameters of a block.
const BLOCK: usize = THREADS * GROUP * ROUNDS;

/// As [`crate::backend::Backend::adamw`].
pub(super) fn adamw<D: Device>(device: &mut D, op: &AdamW) {
    let len = op.weights.len;
    assert_eq!((op.gradients.len, op.moment1.len, op.moment2.len), (len, len, len), "adamw of {len} weights");
    assert_eq!(op.grad_norm_squared.len, 1, "adamw takes one norm");
    let grid = [len.div_ceil(BLOCK), 1, 1];
    let weights = Arg::Update(op.weights);
    // The bits of two u32 and a u64.
    let [key_low, key_high] = op.rounding.key.map(|word| Arg::Int(word.cast_signed()));
    let rest = [
        Arg::Read(op.gradients),
        Arg::Update(op.moment1),
        Arg::Update(op.moment2),
        key_low,
        key_high,
        Arg::Long(op.rounding.first.cast_signed()),
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
    let kernels = match (op.weights.dtype, op.masters) {
        (DType::F32, None) => ["adamw_f32", "adamw_f32_bf16_moments"],
        (DType::Bf16, Some(_)) => ["adamw_split", "adamw_split_bf16_moments"],
        (DType::F16, Some(_)) => ["adamw_f16", "adamw_f16_bf16_moments"],
        (DType::Bf16, None) => ["adamw_bf16", "adamw_bf16_bf16_moments"],
        (dtype, masters) => unreachable!("no leaf updates weights of {dtype:?} with masters {masters:?}"),
    };
    let kernel = kernels[usize::from(op.moment1.dtype == DType::Bf16)];
    let args: Vec<Arg> = [weights].into_iter().chain(op.masters.map(Arg::Update)).chain(rest).collect();
    device.launch(&Launch { kernel, grid, threads: THREADS, shared_bytes: 0, args: &args });
}
