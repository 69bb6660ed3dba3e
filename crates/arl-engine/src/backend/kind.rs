//! What a plan needs to know of a sort of device, without having one.

use arl_model::Result;

use super::{DType, Heads, cuda};

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
    /// Bytes of logits at a time where the caller does not say: on a processor what stays near its caches, on a GPU what
    /// makes its products large enough.
    pub(crate) fn default_logits_bytes(self) -> usize {
        match self {
            DeviceKind::Cpu => 32 << 20,
            DeviceKind::Cuda => 1200 << 20,
        }
    }

    /// Refuses a model whose sizes the device's leaves do not have.
    pub(crate) fn check(self, heads: Heads, experts: usize) -> Result<()> {
        match self {
            DeviceKind::Cpu => Ok(()),
            DeviceKind::Cuda => cuda::check(heads, experts),
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

    /// Bytes that the device's leaves need for themselves, over matrices of at most so many columns and micro-batches
    /// of at most so many tokens; its libraries' included.
    pub(crate) fn own_bytes(self, columns: usize, tokens: usize) -> usize {
        match self {
            DeviceKind::Cpu => 0,
            DeviceKind::Cuda => cuda::scratch_bytes(columns, tokens) + cuda::LIBRARY_BYTES,
        }
    }
}
