//! What an engine knows of its model that does not change from step to step: sizes, places, and how it is computed.

use arl_model::{ModelConfig, Result};

use crate::attention;
use crate::backend::{DType, DeviceKind, attention_library_scratch};
use crate::batch::BatchSize;
use crate::options::{EngineOptions, Recompute};
use crate::params::Params;
use crate::shape::Shape;
use crate::store::Store;

/// A model on a kind of device; needs no memory of it.
#[derive(Clone, Debug)]
pub(crate) struct Model {
    pub(crate) shape: Shape,
    pub(crate) params: Params,
    pub(crate) store: Store,
    /// Of activations: f32, bf16 or f16.
    pub(crate) dtype: DType,
    pub(crate) recompute: Recompute,
    /// Inputs of layers wait for the backward pass in host memory.
    pub(crate) activation_offloading: bool,
    /// Most rows of logits at a time.
    pub(crate) loss_chunk: usize,
    /// Attention is the device's own library's where it has a plan.
    pub(crate) attention_library: bool,
}

impl Model {
    /// # Errors
    /// `ARL_CONFIG` for options that contradict the model or the kind of device.
    pub(crate) fn new(config: &ModelConfig, options: &EngineOptions, kind: DeviceKind) -> Result<Self> {
        options.check()?;
        let shape = Shape::new(config);
        kind.check(shape.heads, shape.experts())?;
        let params = Params::new(config);
        let store = Store::new(params.len, options);
        let training = store.training.is_some();
        Ok(Model {
            attention_library: attention::planned(options.attention, kind, shape.heads, options.dtype, training)?,
            loss_chunk: options.loss_seq_chunk_size.unwrap_or(kind.default_logits_rows(config.vocab_size)),
            shape,
            params,
            store,
            dtype: options.dtype,
            recompute: options.recompute,
            activation_offloading: options.activation_offloading,
        })
    }

    /// f32 elements of the scratch of attention's backward pass.
    pub(crate) fn attention_scratch(&self, size: BatchSize) -> usize {
        if self.attention_library {
            attention_library_scratch(self.shape.heads, size.tokens, size.sequences)
        } else {
            size.tokens * self.shape.heads.query
        }
    }
}
