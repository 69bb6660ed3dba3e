//! STUB
#![allow(clippy::unimplemented)]

use super::device::Device;
use crate::backend::AdamW;

/// As the leaf of [`crate::backend::Backend`].
#[allow(clippy::too_many_arguments, reason = "the leaf's signature")]
pub(super) fn adamw<D: Device>(device: &mut D, op: &AdamW) {
    let _ = (device, op);
    unimplemented!("adamw")
}
