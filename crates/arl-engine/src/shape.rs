//! What the step needs to know of a model as a whole; what differs between layers is known to their blocks.

use arl_model::{DeltaConfig, Mlp, ModelConfig};

use crate::backend::Heads;
use crate::vision::Tower;

/// The sizes of a model.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    pub(crate) vocab: usize,
    pub(crate) hidden: usize,
    pub(crate) heads: Heads,
    /// Epsilon of every norm.
    pub(crate) epsilon: f32,
    /// What norms add to their weights.
    pub(crate) norm_offset: f32,
    /// The widest vector of the vision tower whose gradient is a sum over patches; 0 without one.
    tower_widest: usize,
    /// Whether positions may have three axes.
    pub(crate) axes: bool,
    /// This row of the embedding gets no gradient from the look-up.
    pub(crate) padding_idx: Option<usize>,
    /// Coefficient of the router's balance loss, where it is added.
    pub(crate) balance: Option<f32>,
    /// Experts of the layers that have any; all have the same number.
    pub(crate) experts: usize,
    /// Layers that have experts.
    pub(crate) expert_layers: usize,
    /// The gated delta rule, where layers follow it.
    pub(crate) delta: Option<DeltaConfig>,
}

impl Shape {
    /// The sizes that a configuration gives.
    pub(crate) fn new(config: &ModelConfig) -> Self {
        let expert_layers = config.layers.iter().filter(|layer| matches!(layer.mlp, Mlp::Moe(_))).count();
        let moe = config.moe.filter(|_| expert_layers > 0);
        Shape {
            vocab: config.vocab_size,
            hidden: config.hidden_size,
            heads: Heads {
                query: config.num_attention_heads,
                key_value: config.num_key_value_heads,
                dim: config.head_dim,
            },
            epsilon: config.rms_norm_eps as f32,
            norm_offset: config.norm_offset,
            tower_widest: config.vision.as_ref().map_or(0, Tower::widest),
            axes: config.rope.axes.is_some(),
            padding_idx: config.padding_idx,
            balance: config.moe.and_then(|moe| moe.router_aux_loss_coef),
            experts: moe.map_or(0, |moe| moe.num_experts),
            expert_layers,
            delta: config.delta,
        }
    }

    /// Columns of the widest vector whose gradient is a sum over tokens: a norm's weight or a bias.
    pub(crate) fn widest(&self) -> usize {
        self.hidden.max(self.heads.qkv_columns()).max(self.tower_widest)
    }
}
