//! The CUDA leaves. This file names each; the family's file checks shapes and launches its kernels on a [`Device`].

#[cfg(any(test, feature = "cuda"))]
mod algorithms;
mod attention;
mod classifier;
pub(super) mod comm;
#[cfg(test)]
mod comm_tests;
mod delta;
mod device;
mod elementwise;
mod embedding;
#[cfg(any(test, feature = "emulation"))]
mod emulated;
#[cfg(any(test, feature = "emulation"))]
#[allow(clippy::unwrap_used, clippy::panic, reason = "the part of a library on a device for checks")]
mod emulated_library;
mod gated_delta;
mod gates;
#[cfg(feature = "cuda")]
mod gpu;
mod guard;
#[cfg(test)]
mod hybrid_tests;
#[cfg(test)]
mod kept_tests;
#[cfg(any(test, feature = "cuda"))]
mod least_recent;
mod limits;
mod magnitude;
mod matmul;
mod moe;
mod nf4;
mod norm;
mod optimizer;
mod packed;
#[cfg(test)]
mod packed_tests;
#[cfg(any(test, feature = "cuda"))]
mod planner;
#[cfg(test)]
mod recording;
mod rope;
#[cfg(test)]
mod rotary_tests;
#[cfg(test)]
mod step_tests;
mod swiglu;
#[cfg(test)]
#[allow(clippy::duplicate_mod, reason = "the leaves' tests run against each backend")]
#[path = "../tests/mod.rs"]
mod tests;
mod vision;
#[cfg(test)]
mod vision_tests;

use arl_model::Result;

pub use self::device::{Arg, Device, Launch};
#[cfg(any(test, feature = "emulation"))]
pub use self::emulated::EmulatedDevice;
pub(crate) use self::gated_delta::{
    backward_scratch as delta_backward_scratch, forward_scratch as delta_forward_scratch,
    step_scratch as delta_step_scratch,
};
#[cfg(feature = "cuda")]
pub use self::gpu::GpuDevice;
pub(crate) use self::limits::{LIBRARY_BYTES, check, notice, scratch_bytes};
use self::limits::{MOST_HEAD, PARTS};
pub(crate) use self::nf4::nf4_tile;
pub use self::packed::{PackedAttention, PackedShape, attention_library_scratch};
use super::{
    AdamW, Attention, AttentionLibrary, Backend, Buffer, CrossEntropy, DType, DeviceKind, Dropout, Event,
    GroupedMatmul, Heads, Magnitude, Matmul, MatmulAlgorithms, Nf4Matmul, Nf4Weights, NormRope, NormWeight,
    Permutation, Pool, Router, Rows, Stream,
};

/// The leaf operations on a CUDA device. They are queued, and done when something is read back.
pub struct CudaBackend<D> {
    device: D,
    /// f32, the whole of [`Pool::Scratch`]: partial sums of the leaf in progress.
    scratch: Buffer,
    /// Whether attention is the device's own library's where it has a plan.
    attention_library: bool,
}

impl<D: Device> CudaBackend<D> {
    /// A backend with empty pools.
    pub fn new(device: D) -> Self {
        CudaBackend {
            device,
            scratch: Buffer { pool: Pool::Scratch, offset: 0, len: 0, dtype: DType::F32 },
            attention_library: false,
        }
    }

    /// The device; for measurements and tests.
    pub fn device_mut(&mut self) -> &mut D {
        &mut self.device
    }
}

/// A new backend for the leaves' tests.
#[cfg(test)]
fn test_backend() -> CudaBackend<emulated::EmulatedDevice> {
    CudaBackend::new(emulated::EmulatedDevice::default())
}

impl<D: Device> Backend for CudaBackend<D> {
    fn name(&self) -> String {
        self.device.name()
    }

    fn kind(&self) -> DeviceKind {
        DeviceKind::Cuda
    }

    fn scratch_bytes(&self, columns: usize, tokens: usize) -> usize {
        scratch_bytes(columns, tokens)
    }

    fn logits_gradient(&self, activations: DType) -> DType {
        // A product on tensor cores wants both operands in one type.
        activations
    }

    fn use_attention_library(&mut self, asked: &[AttentionLibrary]) -> std::result::Result<(), String> {
        for asked in asked {
            let shape = packed::PackedShape::new(asked).ok_or("cuDNN's attention does not take these sizes")?;
            self.device.plan_attention(&shape)?;
        }
        self.attention_library = true;
        Ok(())
    }

    fn expect_attention(&mut self, asked: &[AttentionLibrary]) {
        if self.attention_library {
            packed::expect(&mut self.device, asked);
        }
    }

    fn matmul_algorithms(&mut self) -> Option<&mut dyn MatmulAlgorithms> {
        self.device.matmul_algorithms()
    }

    fn reserve(&mut self, pool: Pool, bytes: usize) -> Result<()> {
        if pool == Pool::Scratch {
            self.scratch.len = bytes / DType::F32.bytes();
        }
        self.device.reserve(pool, bytes)
    }

    fn upload(&mut self, source: &[u8], target: Buffer) {
        self.device.upload(source, target);
    }

    fn read_back(&mut self, source: Buffer, target: &mut [u8]) -> Result<()> {
        self.device.read_back(source, target)
    }

    fn queue_read(&mut self, sources: &[Buffer]) {
        self.device.queue_read(sources);
    }

    fn read_arrived(&mut self) -> bool {
        self.device.read_arrived()
    }

    fn finish_read(&mut self, target: &mut [u8]) -> Result<()> {
        self.device.finish_read(target)
    }

    fn transfer(&mut self, stream: Stream, source: Buffer, target: Buffer) {
        assert_eq!(source.bytes(), target.bytes(), "a transfer of unlike buffers");
        self.device.transfer(stream, source, target);
    }

    fn record(&mut self, stream: Stream, event: Event) {
        self.device.record(stream, event);
    }

    fn wait(&mut self, stream: Stream, event: Event) {
        self.device.wait(stream, event);
    }

    fn discard(&mut self, buffer: Buffer) {
        self.device.discard(buffer);
    }

    fn timestamp(&mut self) -> bool {
        self.device.timestamp()
    }

    fn timestamps(&mut self) -> Result<Vec<f64>> {
        self.device.timestamps()
    }

    fn memory(&self) -> Result<Option<(usize, usize)>> {
        self.device.memory()
    }

    fn zero(&mut self, target: Buffer) {
        if target.len > 0 {
            self.device.zero(target);
        }
    }

    fn copy(&mut self, source: Buffer, target: Buffer) {
        if target.len > 0 {
            elementwise::copy(&mut self.device, source, target);
        }
    }

    fn dequantize(&mut self, weights: &Nf4Weights, first: usize, out: Buffer) {
        nf4::dequantize(&mut self.device, weights, first, out);
    }

    fn magnitude(&mut self, op: &Magnitude) {
        magnitude::magnitude(&mut self.device, self.scratch, op);
    }

    fn matmul(&mut self, op: &Matmul) {
        matmul::matmul(&mut self.device, self.scratch, op);
    }

    fn matmul_nf4(&mut self, op: &Nf4Matmul<'_>) {
        nf4::matmul(&mut self.device, self.scratch, op);
    }

    fn grouped_matmul(&mut self, op: &GroupedMatmul) {
        matmul::grouped_matmul(&mut self.device, op);
    }

    fn sum_rows(&mut self, x: Rows, rows: usize, columns: usize, out: Buffer) {
        elementwise::sum_rows(&mut self.device, self.scratch, x, rows, columns, out);
    }

    fn embedding(&mut self, ids: Buffer, table: Buffer, width: usize, out: Buffer) {
        embedding::gather(&mut self.device, table, ids, 1, width, out);
    }

    fn embedding_backward(&mut self, ids: Buffer, d_out: Buffer, width: usize, table_gradient: Buffer) {
        embedding::embedding_backward(&mut self.device, self.scratch, ids, d_out, width, table_gradient);
    }

    fn rms_norm(&mut self, x: Buffer, weight: NormWeight, epsilon: f32, out: Buffer, inverse_rms: Buffer) {
        norm::rms_norm(&mut self.device, x, weight, epsilon, out, inverse_rms);
    }

    fn add_rms_norm(
        &mut self,
        x: Buffer,
        delta: Buffer,
        sum: Buffer,
        weight: NormWeight,
        epsilon: f32,
        out: Buffer,
        inverse_rms: Buffer,
    ) {
        norm::add_rms_norm(&mut self.device, x, delta, sum, weight, epsilon, out, inverse_rms);
    }

    fn rms_norm_recompute(&mut self, x: Buffer, weight: NormWeight, inverse_rms: Buffer, out: Buffer) {
        norm::rms_norm_recompute(&mut self.device, x, weight, inverse_rms, out);
    }

    fn rms_norm_backward(
        &mut self,
        d_out: Buffer,
        x: Buffer,
        weight: NormWeight,
        inverse_rms: Buffer,
        d_x: Buffer,
        d_weight: Buffer,
    ) {
        norm::rms_norm_backward(&mut self.device, self.scratch, d_out, x, weight, inverse_rms, d_x, d_weight);
    }

    fn add(&mut self, x: Buffer, delta: Buffer) {
        if x.len > 0 {
            elementwise::add(&mut self.device, x, delta);
        }
    }

    fn scale(&mut self, x: Buffer, factor: f32, dropout: Option<Dropout>, out: Buffer) {
        if x.len > 0 {
            elementwise::scale(&mut self.device, x, factor, dropout, out);
        }
    }

    fn norm_rope(&mut self, op: &NormRope, qkv: Buffer, qk: Buffer) {
        rope::norm_rope(&mut self.device, op, qkv, qk);
    }

    fn norm_rope_backward(&mut self, op: &NormRope, qkv: Buffer, d_qkv: Buffer, d_norm: Option<(Buffer, Buffer)>) {
        rope::norm_rope_backward(&mut self.device, self.scratch, op, qkv, d_qkv, d_norm);
    }

    fn attention(&mut self, op: &Attention) {
        if !self.attention_library || !packed::forward(&mut self.device, op, self.scratch) {
            attention::forward(&mut self.device, op);
        }
    }

    fn attention_backward(&mut self, op: &Attention, d_out: Rows, d_qkv: Buffer, scratch: Buffer) {
        if !self.attention_library || !packed::backward(&mut self.device, op, d_out, d_qkv, scratch) {
            attention::backward(&mut self.device, op, d_out, d_qkv, scratch);
        }
    }

    fn attention_cached(
        &mut self,
        heads: Heads,
        window: Option<usize>,
        scale: f32,
        q: Rows,
        k_cache: Buffer,
        v_cache: Buffer,
        capacity: usize,
        lengths: Buffer,
        out: Buffer,
    ) {
        attention::cached(&mut self.device, heads, window, scale, q, k_cache, v_cache, capacity, lengths, out);
    }

    fn swiglu(&mut self, gate_up: Buffer, width: usize, out: Buffer) {
        swiglu::swiglu(&mut self.device, gate_up, width, out);
    }

    fn swiglu_backward(&mut self, gate_up: Buffer, width: usize, d_out: Buffer) {
        swiglu::swiglu_backward(&mut self.device, gate_up, width, d_out);
    }

    fn gather_rows(&mut self, x: Buffer, rows: Buffer, divisor: usize, width: usize, out: Buffer) {
        embedding::gather(&mut self.device, x, rows, divisor, width, out);
    }

    fn scatter_rows(&mut self, x: Buffer, rows: Buffer, width: usize, out: Buffer) {
        embedding::scatter(&mut self.device, x, rows, width, out);
    }

    fn copy_columns(&mut self, source: Rows, target: Rows, rows: usize, columns: usize) {
        embedding::copy_columns(&mut self.device, source, target, rows, columns);
    }

    fn cross_entropy(&mut self, op: &CrossEntropy) {
        classifier::cross_entropy(&mut self.device, op);
    }

    fn dot(&mut self, a: Buffer, b: Buffer, out: Buffer) {
        elementwise::dot(&mut self.device, self.scratch, a, b, out);
    }

    fn guard(&mut self, losses: Rows, balances: Option<Buffer>, norm_squared: Buffer) {
        guard::guard(&mut self.device, losses, balances, norm_squared);
    }

    fn adamw(&mut self, op: &AdamW) {
        optimizer::adamw(&mut self.device, op);
    }

    fn router(&mut self, op: &Router, logits: Buffer, balance: Option<Buffer>) {
        moe::router(&mut self.device, self.scratch, op, logits, balance);
    }

    fn router_backward(&mut self, op: &Router, d_weights: Buffer, balance: Option<(Buffer, f32)>, d_logits: Buffer) {
        moe::router_backward(&mut self.device, op, d_weights, balance, d_logits);
    }

    fn permute(&mut self, op: &Router, permutation: &Permutation) {
        moe::permute(&mut self.device, self.scratch, op, permutation);
    }

    fn combine(
        &mut self,
        x: Buffer,
        permutation: &Permutation,
        weights: Option<Buffer>,
        top_k: usize,
        width: usize,
        out: Buffer,
    ) {
        moe::combine(&mut self.device, x, permutation, weights, top_k, width, out);
    }

    fn combine_backward(
        &mut self,
        d_out: Buffer,
        x: Buffer,
        permutation: &Permutation,
        weights: Buffer,
        top_k: usize,
        width: usize,
        d_x: Buffer,
        d_weights: Buffer,
    ) {
        moe::combine_backward(&mut self.device, d_out, x, permutation, weights, top_k, width, d_x, d_weights);
    }
}
