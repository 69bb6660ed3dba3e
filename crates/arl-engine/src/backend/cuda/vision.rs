//! The leaves of vision towers have no kernels yet: a device that is asked for one finds none, and says so when something is read.

use super::{CudaBackend, Device, Launch};
use crate::backend::{Buffer, Gelu, LayerNorm, Vision};

impl<D: Device> CudaBackend<D> {
    fn no_vision(&mut self) {
        self.device.launch(&Launch { kernel: "vision", grid: [1, 1, 1], threads: 32, shared_bytes: 0, args: &[] });
    }
}

impl<D: Device> Vision for CudaBackend<D> {
    fn layer_norm(&mut self, _op: &LayerNorm) {
        self.no_vision();
    }

    fn layer_norm_backward(
        &mut self,
        _op: &LayerNorm,
        _d_out: Buffer,
        _d_x: Buffer,
        _d_weight: Buffer,
        _d_bias: Buffer,
    ) {
        self.no_vision();
    }

    fn gelu(&mut self, _kind: Gelu, _x: Buffer, _out: Buffer) {
        self.no_vision();
    }

    fn gelu_backward(&mut self, _kind: Gelu, _x: Buffer, _d_x: Buffer) {
        self.no_vision();
    }

    fn interpolate(&mut self, _table: Buffer, _taps: Buffer, _weights: Buffer, _width: usize, _out: Buffer) {
        self.no_vision();
    }

    fn interpolate_backward(&mut self, _d: Buffer, _taps: Buffer, _weights: Buffer, _width: usize, _d_table: Buffer) {
        self.no_vision();
    }

    fn add_rows(&mut self, _x: Buffer, _rows: Buffer, _width: usize, _out: Buffer) {
        self.no_vision();
    }

    fn zero_rows(&mut self, _rows: Buffer, _width: usize, _x: Buffer) {
        self.no_vision();
    }
}
