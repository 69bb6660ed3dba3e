//! Gates have no kernels: [`super::check`] refuses the families that have gates before anything is queued. Should one be queued
//! all the same, the device finds no such kernel, and says so when something is read.

use super::{CudaBackend, Device, Launch};
use crate::backend::gates::Gates;
use crate::backend::{Buffer, Heads};

impl<D: Device> CudaBackend<D> {
    fn no_gates(&mut self) {
        self.device.launch(&Launch { kernel: "gates", grid: [1, 1, 1], threads: 32, shared_bytes: 0, args: &[] });
    }
}

impl<D: Device> Gates for CudaBackend<D> {
    fn split_gates(&mut self, _heads: Heads, _joined: Buffer, _qkv: Buffer, _gates: Buffer) {
        self.no_gates();
    }

    fn join_gates(&mut self, _heads: Heads, _qkv: Buffer, _gates: Buffer, _joined: Buffer) {
        self.no_gates();
    }

    fn gate(&mut self, _x: Buffer, _gates: Buffer, _out: Buffer) {
        self.no_gates();
    }

    fn gate_backward(&mut self, _d_out: Buffer, _x: Buffer, _gates: Buffer) {
        self.no_gates();
    }

    fn add_gated_rows(&mut self, _x: Buffer, _logits: Buffer, _width: usize, _out: Buffer) {
        self.no_gates();
    }

    fn gated_rows_backward(&mut self, _d_out: Buffer, _x: Buffer, _logits: Buffer, _width: usize, _d_x: Buffer) {
        self.no_gates();
    }
}
