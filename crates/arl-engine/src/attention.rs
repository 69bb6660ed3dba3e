//! Who computes attention: this project's kernels, or the device's own library where it has one. Knows what each takes.

use arl_model::{Error, ErrorCode, Result};

use crate::backend::{AttentionLibrary, Backend, DType, DeviceKind, Heads};
use crate::batch::BatchSize;
use crate::options::AttentionChoice;
use crate::shape::Shape;

/// Whether attention over such heads may be a library's on such a device; refuses what was asked for and cannot be.
pub(crate) fn planned(
    choice: AttentionChoice,
    kind: DeviceKind,
    heads: Heads,
    dtype: DType,
    training: bool,
) -> Result<bool> {
    let possible = kind.has_attention_library(heads, dtype);
    if choice == AttentionChoice::Cudnn && training && !possible {
        let (dim, dtype) = (heads.dim, if dtype == DType::F32 { "f32" } else { "bf16" });
        let device = if kind == DeviceKind::Cpu { "the CPU" } else { "a GPU" };
        return Err(Error::new(
            ErrorCode::Config,
            format!(
                "attention cudnn takes bf16 and heads of 64 or 128 elements on a GPU; this is {dtype}, {dim}, {device}"
            ),
        )
        .hint("use attention auto, which takes cuDNN where it can"));
    }
    Ok(possible && training && choice != AttentionChoice::Own)
}

/// Turns the library on, for micro-batches of about `size`. Where `Auto` falls back, returns what a user should know.
pub(crate) fn settle<B: Backend + ?Sized>(
    choice: AttentionChoice,
    backend: &mut B,
    shape: &Shape,
    size: BatchSize,
) -> Result<Option<String>> {
    let Err(reason) = backend.use_attention_library(&expected(shape, size)) else { return Ok(None) };
    if choice == AttentionChoice::Cudnn {
        return Err(Error::new(ErrorCode::Device, format!("attention cudnn: {reason}"))
            .hint("use attention auto or own; `arl doctor` shows which cuDNN was found"));
    }
    Ok(Some(format!("attention runs on arl's own kernels: {reason}")))
}

/// Attention over micro-batches of about `size`, once for each window that layers have.
fn expected(shape: &Shape, size: BatchSize) -> Vec<AttentionLibrary> {
    let mut windows: Vec<_> = shape.layers.iter().map(|layer| layer.window).collect();
    windows.sort_unstable();
    windows.dedup();
    let sequences = size.sequences.clamp(1, size.tokens.max(1));
    let asked = |window| AttentionLibrary {
        heads: shape.heads,
        window,
        scale: shape.attention_scale(),
        tokens: size.tokens.max(1),
        sequences,
        max_len: size.tokens.max(1).div_ceil(sequences),
        strides: [shape.qk(), shape.qk(), shape.qkv(), shape.q()],
    };
    windows.into_iter().map(asked).collect()
}
