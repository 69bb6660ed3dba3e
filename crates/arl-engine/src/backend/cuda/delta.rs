//! The gated delta rule has no kernels: [`super::check`] refuses the families that have it before anything is queued. Should one
//! be queued all the same, the device finds no such kernel, and says so when something is read.

use super::{CudaBackend, Device, Launch};
use crate::backend::{Buffer, CausalConv, DeltaRule, GatedDelta, GatedNorm};

macro_rules! no_kernel {
    ($($name:ident($($arg:ident: $type:ty),*);)*) => {
        $(fn $name(&mut self, $($arg: $type),*) {
            $(let _ = $arg;)*
            self.device.launch(&Launch {
                kernel: stringify!($name),
                grid: [1, 1, 1],
                threads: 32,
                shared_bytes: 0,
                args: &[],
            });
        })*
    };
}

impl<D: Device> DeltaRule for CudaBackend<D> {
    no_kernel! {
        causal_conv(op: &CausalConv, out: Buffer);
        causal_conv_backward(op: &CausalConv, d_out: Buffer, d_weight: Buffer);
        causal_conv_keep(op: &CausalConv, inputs: Buffer);
        causal_conv_step(op: &CausalConv, inputs: Buffer, out: Buffer);
        gated_delta(op: &GatedDelta, out: Buffer, states: Option<Buffer>);
        gated_delta_backward(op: &GatedDelta, d_out: Buffer, d_a_log: Buffer, d_dt_bias: Buffer);
        gated_delta_step(op: &GatedDelta, states: Buffer, out: Buffer);
        gated_norm(op: &GatedNorm, out: Buffer);
        gated_norm_backward(op: &GatedNorm, d: Buffer, d_weight: Buffer);
    }
}
