//! STUB
#![allow(clippy::unimplemented)]

use super::device::Device;
use crate::backend::CrossEntropy;

/// As the leaf of [`crate::backend::Backend`].
#[allow(clippy::too_many_arguments, reason = "the leaf's signature")]
pub(super) fn cross_entropy<D: Device>(device: &mut D, op: &CrossEntropy) {
    let _ = (device, op);
    unimplemented!("cross_entropy")
}
