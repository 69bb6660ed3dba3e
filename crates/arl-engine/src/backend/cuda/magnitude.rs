//! Magnitudes of weights with an adapter (DoRA). Kernels: `cuda/magnitude.cu`, `cuda/reduce.cu`.

use arl_kernels::constants::magnitude::{ROWS, STEP, THREADS};

use super::PARTS;
use super::device::{Arg, Device, Launch, int, kernel, long, read_or_null, scratch_of};
use super::elementwise::add_parts;
use crate::backend::{Buffer, DType, Magnitude};

/// Rows that a block of the gradient takes at least: eight of each of its warps.
const LEAST_ROWS: usize = 64;

/// As [`crate::backend::Backend::magnitude`].
pub(super) fn magnitude<D: Device>(device: &mut D, scratch: Buffer, op: &Magnitude) {
    match *op {
        Magnitude::Norms { weight, a, b, factor, out } => {
            let (width, rank) = (weight.len / out.len, b.len / out.len);
            assert_eq!((a.len, weight.len), (rank * width, out.len * width), "norms of rows of {width}");
            let arrays = [Arg::Read(weight), Arg::Read(a), Arg::Read(b), Arg::Float(factor), Arg::Write(out)];
            launch(
                device,
                kernel!(weight.dtype, "magnitude_norms"),
                [out.len.div_ceil(ROWS), 1, 1],
                &[&arrays[..], &[int(out.len), int(width), int(rank)]].concat(),
            );
        }
        Magnitude::Rescale { x, rows, magnitude, norms, bias } => {
            let threads = rows * norms.len.div_ceil(STEP);
            let place = [Arg::Update(x.buffer), long(x.stride), long(rows), int(norms.len)];
            launch(
                device,
                kernel!(x.buffer.dtype, "magnitude_rescale"),
                [threads.div_ceil(THREADS), 1, 1],
                &[&place[..], &[Arg::Read(magnitude), Arg::Read(norms), read_or_null(bias)]].concat(),
            );
        }
        Magnitude::Gradient { d_out, x, rows, norms, out } => {
            if rows == 0 {
                return;
            }
            let parts = rows.div_ceil(LEAST_ROWS).min(PARTS);
            let partial = scratch_of(scratch, DType::F32, parts * norms.len);
            let arrays = [Arg::Read(d_out.buffer), long(d_out.stride), Arg::Read(x.buffer), long(x.stride)];
            launch(
                device,
                kernel!(x.buffer.dtype, "magnitude_gradient"),
                [norms.len.div_ceil(32), parts, 1],
                &[&arrays[..], &[int(rows), int(norms.len), Arg::Read(norms), Arg::Write(partial)]].concat(),
            );
            add_parts(device, partial, parts, out);
        }
    }
}

fn launch<D: Device>(device: &mut D, kernel: &'static str, grid: [usize; 3], args: &[Arg]) {
    device.launch(&Launch { kernel, grid, threads: THREADS, shared_bytes: 0, args });
}
