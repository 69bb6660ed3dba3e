//! Whether a step may change anything. Kernel: `cuda/guard.cu`.

use arl_kernels::constants::guard::THREADS;

use super::device::{Arg, Device, Launch, int, read_or_null};
use crate::backend::{Buffer, Rows};

/// As [`crate::backend::Backend::guard`].
pub(super) fn guard<D: Device>(device: &mut D, losses: Rows, balances: Option<Buffer>, norm_squared: Buffer) {
    assert_eq!(norm_squared.len, 1, "a guard over one norm");
    device.launch(&Launch {
        kernel: "guard_norm",
        grid: [1, 1, 1],
        threads: THREADS,
        shared_bytes: 0,
        args: &[
            Arg::Read(losses.buffer),
            int(losses.stride),
            int(losses.buffer.len.div_ceil(losses.stride)),
            read_or_null(balances),
            int(balances.map_or(0, |balances| balances.len)),
            Arg::Update(norm_squared),
        ],
    });
}
