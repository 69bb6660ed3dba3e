//! What the step needs to know of a model: sizes, and which parts each layer has.

use arl_model::{Mlp, ModelConfig};

use crate::backend::Heads;

/// The sizes of a model.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    pub(crate) vocab: usize,
    pub(crate) hidden: usize,
    pub(crate) heads: Heads,
    /// Epsilon of every norm.
    pub(crate) epsilon: f32,
    /// This row of the embedding gets no gradient from the look-up.
    pub(crate) padding_idx: Option<usize>,
    /// Coefficient of the router's balance loss, where it is added.
    pub(crate) balance: Option<f32>,
    pub(crate) layers: Vec<LayerShape>,
}

/// What differs between layers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LayerShape {
    /// Keys that a query may see, itself included.
    pub(crate) window: Option<usize>,
    pub(crate) mlp: MlpShape,
}

/// A layer's feed-forward part.
#[derive(Clone, Copy, Debug)]
pub(crate) enum MlpShape {
    Dense { width: usize },
    Experts { experts: usize, top_k: usize, width: usize, normalise: bool },
}

impl Shape {
    /// The sizes that a configuration says.
    pub(crate) fn new(config: &ModelConfig) -> Self {
        let layers = config.layers.iter().map(|layer| LayerShape {
            window: layer.window,
            mlp: match layer.mlp {
                Mlp::Dense { intermediate } => MlpShape::Dense { width: intermediate },
                Mlp::Moe(moe) => MlpShape::Experts {
                    experts: moe.num_experts,
                    top_k: moe.num_experts_per_tok,
                    width: moe.moe_intermediate_size,
                    normalise: moe.norm_topk_prob,
                },
            },
        });
        Shape {
            vocab: config.vocab_size,
            hidden: config.hidden_size,
            heads: Heads {
                query: config.num_attention_heads,
                key_value: config.num_key_value_heads,
                dim: config.head_dim,
            },
            epsilon: config.rms_norm_eps as f32,
            padding_idx: config.padding_idx,
            balance: config.moe.and_then(|moe| moe.router_aux_loss_coef),
            layers: layers.collect(),
        }
    }

    /// Factor on the products of queries and keys: one over the root of a head's size.
    pub(crate) fn attention_scale(&self) -> f32 {
        1.0 / (self.heads.dim as f32).sqrt()
    }

    /// Columns of the fused projection to queries, keys and values.
    pub(crate) fn qkv(&self) -> usize {
        (self.heads.query + 2 * self.heads.key_value) * self.heads.dim
    }

    /// Columns of the widest vector whose gradient is a sum over tokens: a norm's weight or a bias.
    pub(crate) fn widest(&self) -> usize {
        self.hidden.max(self.qkv())
    }

    /// Columns of queries and keys together.
    pub(crate) fn qk(&self) -> usize {
        (self.heads.query + self.heads.key_value) * self.heads.dim
    }

    /// Columns of queries alone.
    pub(crate) fn q(&self) -> usize {
        self.heads.query * self.heads.dim
    }

    /// Layers that have experts.
    pub(crate) fn expert_layers(&self) -> usize {
        self.layers.iter().filter(|l| matches!(l.mlp, MlpShape::Experts { .. })).count()
    }

    /// Experts of the layers that have any; all have the same number.
    pub(crate) fn experts(&self) -> usize {
        self.layers
            .iter()
            .map(|l| if let MlpShape::Experts { experts, .. } = l.mlp { experts } else { 0 })
            .max()
            .unwrap_or(0)
    }
}
