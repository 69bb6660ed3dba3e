//! STUB
#![allow(clippy::unimplemented)]

use super::device::Device;
use crate::backend::Buffer;

/// As the leaf of [`crate::backend::Backend`].
#[allow(clippy::too_many_arguments, reason = "the leaf's signature")]
pub(super) fn swiglu<D: Device>(device: &mut D, gate_up: Buffer, width: usize, out: Buffer) {
    let _ = (device, gate_up, width, out);
    unimplemented!("swiglu")
}

/// As the leaf of [`crate::backend::Backend`].
#[allow(clippy::too_many_arguments, reason = "the leaf's signature")]
pub(super) fn swiglu_backward<D: Device>(device: &mut D, gate_up: Buffer, width: usize, d_out: Buffer) {
    let _ = (device, gate_up, width, d_out);
    unimplemented!("swiglu_backward")
}
