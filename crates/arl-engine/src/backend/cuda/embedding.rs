//! STUB
#![allow(clippy::unimplemented)]

use super::device::Device;
use crate::backend::Buffer;

/// As the leaf of [`crate::backend::Backend`].
#[allow(clippy::too_many_arguments, reason = "the leaf's signature")]
pub(super) fn gather<D: Device>(device: &mut D, x: Buffer, rows: Buffer, divisor: usize, width: usize, out: Buffer) {
    let _ = (device, x, rows, divisor, width, out);
    unimplemented!("gather")
}

/// As the leaf of [`crate::backend::Backend`].
#[allow(clippy::too_many_arguments, reason = "the leaf's signature")]
pub(super) fn embedding_backward<D: Device>(
    device: &mut D,
    ids: Buffer,
    d_out: Buffer,
    width: usize,
    table_gradient: Buffer,
) {
    let _ = (device, ids, d_out, width, table_gradient);
    unimplemented!("embedding_backward")
}

/// As the leaf of [`crate::backend::Backend`].
#[allow(clippy::too_many_arguments, reason = "the leaf's signature")]
pub(super) fn scatter<D: Device>(device: &mut D, x: Buffer, rows: Buffer, width: usize, out: Buffer) {
    let _ = (device, x, rows, width, out);
    unimplemented!("scatter")
}
