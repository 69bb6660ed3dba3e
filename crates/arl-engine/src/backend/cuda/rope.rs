//! STUB
#![allow(clippy::unimplemented)]

use super::device::Device;
use crate::backend::{Buffer, NormRope};

/// As the leaf of [`crate::backend::Backend`].
#[allow(clippy::too_many_arguments, reason = "the leaf's signature")]
pub(super) fn norm_rope<D: Device>(device: &mut D, op: &NormRope, qkv: Buffer, qk: Buffer) {
    let _ = (device, op, qkv, qk);
    unimplemented!("norm_rope")
}

/// As the leaf of [`crate::backend::Backend`].
#[allow(clippy::too_many_arguments, reason = "the leaf's signature")]
pub(super) fn norm_rope_backward<D: Device>(
    device: &mut D,
    scratch: Buffer,
    op: &NormRope,
    qkv: Buffer,
    d_qkv: Buffer,
    d_norm: Option<(Buffer, Buffer)>,
) {
    let _ = (device, scratch, op, qkv, d_qkv, d_norm);
    unimplemented!("norm_rope_backward")
}
