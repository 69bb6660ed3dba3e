//! STUB
#![allow(clippy::unimplemented)]

use super::device::Device;
use crate::backend::{Attention, Buffer, Heads, Rows};

/// As the leaf of [`crate::backend::Backend`].
#[allow(clippy::too_many_arguments, reason = "the leaf's signature")]
pub(super) fn forward<D: Device>(device: &mut D, op: &Attention) {
    let _ = (device, op);
    unimplemented!("forward")
}

/// As the leaf of [`crate::backend::Backend`].
#[allow(clippy::too_many_arguments, reason = "the leaf's signature")]
pub(super) fn backward<D: Device>(device: &mut D, op: &Attention, d_out: Rows, d_qkv: Buffer, scratch: Buffer) {
    let _ = (device, op, d_out, d_qkv, scratch);
    unimplemented!("backward")
}

/// As the leaf of [`crate::backend::Backend`].
#[allow(clippy::too_many_arguments, reason = "the leaf's signature")]
pub(super) fn cached<D: Device>(
    device: &mut D,
    heads: Heads,
    window: Option<usize>,
    scale: f32,
    q: Rows,
    k_cache: Buffer,
    v_cache: Buffer,
    capacity: usize,
    lengths: Buffer,
    out: Buffer,
) {
    let _ = (device, heads, window, scale, q, k_cache, v_cache, capacity, lengths, out);
    unimplemented!("cached")
}
