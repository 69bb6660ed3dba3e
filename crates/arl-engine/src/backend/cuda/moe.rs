//! STUB
#![allow(clippy::unimplemented)]

use super::device::Device;
use crate::backend::{Buffer, Permutation, Router};

/// As the leaf of [`crate::backend::Backend`].
#[allow(clippy::too_many_arguments, reason = "the leaf's signature")]
pub(super) fn router<D: Device>(device: &mut D, op: &Router, logits: Buffer, balance: Option<Buffer>) {
    let _ = (device, op, logits, balance);
    unimplemented!("router")
}

/// As the leaf of [`crate::backend::Backend`].
#[allow(clippy::too_many_arguments, reason = "the leaf's signature")]
pub(super) fn router_backward<D: Device>(
    device: &mut D,
    op: &Router,
    d_weights: Buffer,
    balance: Option<(Buffer, f32)>,
    d_logits: Buffer,
) {
    let _ = (device, op, d_weights, balance, d_logits);
    unimplemented!("router_backward")
}

/// As the leaf of [`crate::backend::Backend`].
#[allow(clippy::too_many_arguments, reason = "the leaf's signature")]
pub(super) fn permute<D: Device>(device: &mut D, op: &Router, permutation: &Permutation) {
    let _ = (device, op, permutation);
    unimplemented!("permute")
}

/// As the leaf of [`crate::backend::Backend`].
#[allow(clippy::too_many_arguments, reason = "the leaf's signature")]
pub(super) fn combine<D: Device>(
    device: &mut D,
    x: Buffer,
    permutation: &Permutation,
    weights: Option<Buffer>,
    top_k: usize,
    width: usize,
    out: Buffer,
) {
    let _ = (device, x, permutation, weights, top_k, width, out);
    unimplemented!("combine")
}

/// As the leaf of [`crate::backend::Backend`].
#[allow(clippy::too_many_arguments, reason = "the leaf's signature")]
pub(super) fn combine_backward<D: Device>(
    device: &mut D,
    d_out: Buffer,
    x: Buffer,
    permutation: &Permutation,
    weights: Buffer,
    top_k: usize,
    width: usize,
    d_x: Buffer,
    d_weights: Buffer,
) {
    let _ = (device, d_out, x, permutation, weights, top_k, width, d_x, d_weights);
    unimplemented!("combine_backward")
}
