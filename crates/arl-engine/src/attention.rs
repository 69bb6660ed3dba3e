//! Who computes attention: this project's kernels, or the device's own library where it has one. Knows what each takes.

use arl_model::{Error, ErrorCode, Result};

use crate::backend::{AttentionLibrary, Backend, DType, DeviceKind};
use crate::batch::BatchSize;
use crate::step::{Model, attention_scale};

/// Who computes attention while an engine trains.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AttentionChoice {
    /// cuDNN on a GPU that it serves, over bf16 and heads of 64 or 128 elements; else this project's kernels.
    Auto,
    /// cuDNN, or an error that says why not. Results are not equal in bits from run to run.
    Cudnn,
    /// This project's kernels. Equal inputs give equal bits.
    #[default]
    Own,
}

/// Whether a model's attention may be a library's on such a device; refuses what was asked for and cannot be.
pub(crate) fn planned(choice: AttentionChoice, kind: DeviceKind, model: &Model) -> Result<bool> {
    let training = model.store.training.is_some();
    let possible = kind.has_attention_library(model.shape.heads, model.dtype);
    if choice == AttentionChoice::Cudnn && training && !possible {
        let (dim, dtype) = (model.shape.heads.dim, if model.dtype == DType::F32 { "f32" } else { "bf16" });
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

/// Turns the library on where it was planned and the device has it, for micro-batches of about `size`. Gives what a user
/// should know where `Auto` falls back.
pub(crate) fn settle<B: Backend + ?Sized>(
    choice: AttentionChoice,
    backend: &mut B,
    model: &mut Model,
    size: BatchSize,
) -> Result<Option<String>> {
    if !model.attention_library {
        return Ok(None);
    }
    let Err(reason) = backend.use_attention_library(&expected(model, size)) else { return Ok(None) };
    if choice == AttentionChoice::Cudnn {
        return Err(Error::new(ErrorCode::Device, format!("attention cudnn: {reason}"))
            .hint("use attention auto or own; `arl doctor` shows which cuDNN was found"));
    }
    model.attention_library = false;
    Ok(Some(format!("attention runs on arl's own kernels: {reason}")))
}

/// Attention over micro-batches of about `size`, once for each window that layers have.
fn expected(model: &Model, size: BatchSize) -> Vec<AttentionLibrary> {
    let shape = &model.shape;
    let mut windows: Vec<_> = shape.layers.iter().map(|layer| layer.window).collect();
    windows.sort_unstable();
    windows.dedup();
    let sequences = size.sequences.clamp(1, size.tokens.max(1));
    let asked = |window| AttentionLibrary {
        heads: shape.heads,
        window,
        scale: attention_scale(shape),
        tokens: size.tokens.max(1),
        sequences,
        max_len: size.tokens.max(1).div_ceil(sequences),
        strides: [shape.qk(), shape.qk(), shape.qkv(), shape.q()],
    };
    windows.into_iter().map(asked).collect()
}
