//! What the kernels can do: the models that they have no form for, those that are slower than a user would expect, and the
//! memory that leaves and libraries work in.

use arl_model::{Error, ErrorCode, Result};

use super::{attention, gated_delta, matmul, moe, norm, packed};
use crate::backend::{DType, Heads};
use crate::shape::Shape;

/// Most blocks whose partial sums a second kernel adds up. Fixed, so that sums do not depend on the device.
pub(super) const PARTS: usize = 128;

/// Memory of a device that cuBLASLt may use: what its maker recommends for the largest GPUs.
pub(crate) const LIBRARY_BYTES: usize = 32 << 20;

/// The largest head that the kernels of attention and of rotary embedding have.
pub(super) const MOST_HEAD: usize = 256;

/// Refuses a model whose sizes the kernels do not have.
pub(crate) fn check(shape: &Shape, activations: DType) -> Result<()> {
    let refused = |what: String| {
        Err(Error::new(ErrorCode::Config, format!("{what} on a CUDA device"))
            .hint("use device cpu, which has no such bound"))
    };
    if let Some(what) = shape.delta.and_then(|delta| gated_delta::refused(delta, activations)) {
        return refused(what);
    }
    let dim = shape.heads.dim;
    if dim > MOST_HEAD {
        return refused(format!("head_dim is {dim}; at most {MOST_HEAD} is possible"));
    }
    if shape.hidden > norm::MOST_WIDTH {
        return refused(format!("hidden_size is {}; at most {} is possible", shape.hidden, norm::MOST_WIDTH));
    }
    if shape.experts > moe::MOST_EXPERTS {
        return refused(format!("num_experts is {}; at most {} are possible", shape.experts, moe::MOST_EXPERTS));
    }
    Ok(())
}

/// What is slower than a user would expect.
pub(crate) fn notice(heads: Heads, activations: DType) -> Option<String> {
    let slow = activations != DType::F32 && attention::tensor_columns(heads.dim).is_none();
    slow.then(|| {
        format!(
            "attention over heads of {} elements runs without tensor cores; those of 64, 72, 80, 128 and 256 are fast",
            heads.dim
        )
    })
}

/// Bytes of the leaves' scratch.
pub(crate) fn scratch_bytes(columns: usize, tokens: usize) -> usize {
    // Two vectors of partial sums a block: of the norms of queries and of keys. One row number a token: of the
    // embedding's gradient.
    let sums = 2 * PARTS * columns * DType::F32.bytes();
    sums.max(tokens * DType::I32.bytes()).max(matmul::SCRATCH_BYTES).max(moe::SCRATCH_BYTES).max(packed::FORWARD_BYTES)
}
