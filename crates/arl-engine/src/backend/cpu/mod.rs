//! The leaf operations on the host's processor: `leaves` has them all, and a file of each family computes.

mod attention;
mod comm;
mod conv;
mod delta;
mod element;
mod elementwise;
mod embedding;
mod gated_norm;
mod gates;
mod gelu;
pub mod gemm;
mod layer_norm;
mod leaves;
mod loss;
mod magnitude;
mod matmul;
mod memory;
mod moe;
mod nf4;
mod norm;
mod optimizer;
pub mod rate;
mod rope;
pub mod simd;
mod swiglu;
#[cfg(test)]
#[allow(clippy::duplicate_mod, reason = "the leaves' tests run against each backend")]
#[path = "../tests/mod.rs"]
mod tests;
mod vector;
mod vision;

pub(crate) use self::elementwise::BLOCK as DOT_BLOCK;
use self::memory::Memory;
#[cfg(any(test, feature = "emulation"))]
use super::Buffer;

/// The leaf operations on the host's processor. They run on rayon's current pool, and are done when they return.
pub struct CpuBackend {
    memory: Memory,
    /// What was read and not asked for yet.
    queued: Vec<u8>,
}

impl CpuBackend {
    /// A backend with empty pools.
    pub fn new() -> Self {
        CpuBackend { memory: Memory::new(), queued: Vec::new() }
    }
}

/// A new backend for the leaves' tests.
#[cfg(test)]
fn test_backend() -> CpuBackend {
    CpuBackend::new()
}

#[cfg(any(test, feature = "emulation"))]
impl CpuBackend {
    /// A buffer's address; for kernels that run on the host.
    pub(super) fn address(&mut self, buffer: Buffer) -> *mut u8 {
        self.memory.lease().write_bytes(buffer).as_mut_ptr()
    }
}

impl Default for CpuBackend {
    fn default() -> Self {
        Self::new()
    }
}
