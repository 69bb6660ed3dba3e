//! STUB
#![allow(clippy::unimplemented)]

use super::device::Device;
use crate::backend::{GroupedMatmul, Matmul};

/// As the leaf of [`crate::backend::Backend`].
#[allow(clippy::too_many_arguments, reason = "the leaf's signature")]
pub(super) fn matmul<D: Device>(device: &mut D, op: &Matmul) {
    let _ = (device, op);
    unimplemented!("matmul")
}

/// As the leaf of [`crate::backend::Backend`].
#[allow(clippy::too_many_arguments, reason = "the leaf's signature")]
pub(super) fn grouped<D: Device>(device: &mut D, op: &GroupedMatmul) {
    let _ = (device, op);
    unimplemented!("grouped")
}
