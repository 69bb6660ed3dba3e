//! Who computes attention: this project's kernels, or the device's own library where it has one. Knows what each takes.

use arl_model::{Error, ErrorCode, Result};

use crate::backend::{AttentionLibrary, Backend, DType, DeviceKind, Heads};
use crate::batch::BatchSize;
use crate::blocks::{Attention, Block};
use crate::options::AttentionChoice;

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

/// Turns the library on, for micro-batches of about `size`, whose tokens `contexts` ranks exchange for heads. Where `Auto` falls
/// back, returns what a user should know.
pub(crate) fn settle<B: Backend + ?Sized>(
    choice: AttentionChoice,
    backend: &mut B,
    blocks: &[Block],
    size: BatchSize,
    contexts: usize,
) -> Result<Option<String>> {
    let max_len = size.tokens.div_ceil(size.sequences.max(1));
    let Err(reason) = backend.use_attention_library(&asked(blocks, size, max_len, contexts)) else { return Ok(None) };
    if choice == AttentionChoice::Cudnn {
        return Err(Error::new(ErrorCode::Device, format!("attention cudnn: {reason}"))
            .hint("use attention auto or own; `arl doctor` shows which cuDNN was found"));
    }
    Ok(Some(format!("attention runs on arl's own kernels: {reason}")))
}

/// Attention over micro-batches of `size`, whose longest sequence has `max_len` tokens: once for each window that layers have. Each
/// of `contexts` ranks has some of the heads.
pub(crate) fn asked(blocks: &[Block], size: BatchSize, max_len: usize, contexts: usize) -> Vec<AttentionLibrary> {
    let mut attentions: Vec<&Attention> = blocks.iter().filter_map(Block::attention).collect();
    attentions.sort_unstable_by_key(|attention| attention.window);
    attentions.dedup_by_key(|attention| attention.window);
    let sequences = size.sequences.clamp(1, size.tokens.max(1));
    let asked = |&Attention { heads, window, .. }: &Attention| {
        let heads = Heads { query: heads.query / contexts, key_value: heads.key_value / contexts, ..heads };
        // What is exchanged comes in rows of all three.
        let normed = if contexts > 1 { heads.qkv_columns() } else { heads.qk_columns() };
        AttentionLibrary {
            heads,
            window,
            scale: heads.scale(),
            tokens: size.tokens.max(1),
            sequences,
            max_len: max_len.max(1),
            strides: [normed, normed, heads.qkv_columns(), heads.query_columns()],
        }
    };
    attentions.into_iter().map(asked).collect()
}
