//! What a plan needs to know of a sort of device, without having one.

use arl_model::Result;

use super::{DType, Heads, cuda};
use crate::shape::Shape;

/// What sort of device a backend computes on; what a plan needs to know of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceKind {
    /// The host's processor.
    #[default]
    Cpu,
    /// A CUDA device.
    Cuda,
}

impl DeviceKind {
    /// Rows of f32 logits at a time where the caller does not say: on a processor what stays near its caches, on a GPU
    /// what makes its products large enough. In whole tiles of a product: the hidden gradients of 2,048 rows of 1,024
    /// columns are 128 tiles of 128 by 128, one for each multiprocessor of an H100; those of 2,070 take it a second round.
    pub(crate) fn default_logits_rows(self, vocab: usize) -> usize {
        const TILE: usize = 256;
        let bytes = match self {
            DeviceKind::Cpu => 32 << 20,
            DeviceKind::Cuda => 1200 << 20,
        };
        let rows = bytes / (vocab * DType::F32.bytes());
        (rows / TILE * TILE).max(TILE)
    }

    /// Refuses a model that the device's leaves do not have.
    pub(crate) fn check(self, shape: &Shape, activations: DType) -> Result<()> {
        match self {
            DeviceKind::Cpu => Ok(()),
            DeviceKind::Cuda => cuda::check(shape, activations),
        }
    }

    /// What a user should know of how a model runs on such a device.
    pub(crate) fn notice(self, heads: Heads, activations: DType) -> Option<String> {
        match self {
            DeviceKind::Cpu => None,
            DeviceKind::Cuda => cuda::notice(heads, activations),
        }
    }

    /// Whether the device may have a library of its own for attention over such heads and activations.
    pub(crate) fn has_attention_library(self, heads: Heads, activations: DType) -> bool {
        self == DeviceKind::Cuda && activations == DType::Bf16 && matches!(heads.dim, 64 | 128)
    }

    /// f32 elements of the scratch of attention's backward pass over so many tokens, where no library computes it.
    pub fn attention_scratch(self, heads: Heads, tokens: usize) -> usize {
        match self {
            // Sums of the gradients of queries, too.
            DeviceKind::Cpu => tokens * heads.query * (1 + heads.dim),
            DeviceKind::Cuda => tokens * heads.query,
        }
    }

    /// Elements of scratch that a product takes weights in NF4 of `rows` by `columns` through, in a type; none where it decodes
    /// them as it multiplies.
    pub fn nf4_tile(self, dtype: DType, rows: usize, columns: usize) -> usize {
        match self {
            DeviceKind::Cpu => 0,
            DeviceKind::Cuda => cuda::nf4_tile(dtype, rows, columns),
        }
    }

    /// Bytes of [`Pool::Exchange`](super::Pool) on each of so many ranks with such a device.
    pub(crate) fn exchange_bytes(self, ranks: usize) -> usize {
        match self {
            DeviceKind::Cpu => 0,
            DeviceKind::Cuda => cuda::comm::exchange_bytes(ranks),
        }
    }

    /// Bytes that the device's leaves need for themselves, over matrices of at most so many columns and micro-batches
    /// of at most so many tokens; its libraries' included.
    pub(crate) fn own_bytes(self, columns: usize, tokens: usize) -> usize {
        match self {
            DeviceKind::Cpu => 0,
            DeviceKind::Cuda => cuda::scratch_bytes(columns, tokens) + cuda::LIBRARY_BYTES,
        }
    }
}
