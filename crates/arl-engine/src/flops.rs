//! Model FLOPs of training, by the formula that figures of speed are quoted with. Recomputation is not counted.

use arl_model::{
    Adapter, LayerConfig, Lora, Mixer, Mlp, ModelConfig, Projection, VisionConfig, VisionKind, tensor_table,
};

/// Parameters and FLOPs of a model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Flops {
    /// Parameters of the model, tied ones once.
    pub parameters: usize,
    /// Those that are trained; with adapters, theirs.
    pub trained: usize,
    /// FLOPs a token, forward and backward, without attention's share: 6 x the parameters of the matrix products that a
    /// token meets (of a mixture of experts, those of the chosen ones), the head included, the embedding not; and
    /// `18 Hv K V` a layer of the gated delta rule, whose recurrence this is without chunks. With adapters 4 x
    /// these, as frozen weights have no gradients, and 6 x the adapters' own; whole copies count as frozen.
    pub per_token: f64,
    /// Attention's FLOPs for a token of a sequence of length `n` are `attention * n`: `6 L Hq d`, over `L` layers of causal attention
    /// (half of the full square). Windows are not accounted for.
    pub attention: f64,
    /// FLOPs a patch of an image, forward and backward, without attention's share: 6 x the parameters of the tower's matrix
    /// products that a patch meets, a merger's divided by the patches that it joins. 0 without a tower.
    pub per_patch: f64,
    /// Attention's FLOPs for a patch of an image of `n` patches are `patch_attention * n`: `12 L H`, over the `L` blocks that see
    /// the whole image; windows are not accounted for.
    pub patch_attention: f64,
}

/// Parameters of the tower's matrix products that a patch meets.
fn patch_products(vision: &VisionConfig) -> f64 {
    let (width, inner, merged) = (vision.hidden_size, vision.intermediate_size, vision.merged_size());
    let mlp = if vision.kind == VisionKind::Qwen2_5 { 3 } else { 2 } * width * inner;
    let blocks = vision.depth * (4 * width * width + mlp);
    let mergers = (1 + vision.deepstack_visual_indexes.len()) * merged * (merged + vision.out_hidden_size);
    (vision.patch_elements() * width + blocks) as f64 + mergers as f64 / vision.merge_unit() as f64
}

/// Parameters of a layer's matrix products that a token meets; of the delta rule also what its recurrence comes to in
/// multiplications with additions.
pub(crate) fn layer_products(config: &ModelConfig, layer: &LayerConfig) -> usize {
    let hidden = config.hidden_size;
    let mixer = match &layer.mixer {
        Mixer::Attention { .. } => {
            let heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads;
            let heads = if config.attention_gate { heads + config.num_attention_heads } else { heads };
            hidden * config.head_dim * heads
        }
        Mixer::Delta(delta) => {
            let (heads, values) = (delta.linear_num_value_heads, delta.value_columns());
            let products = hidden * (delta.channels() + 2 * values + 2 * heads);
            products + 3 * values * delta.linear_key_head_dim
        }
    };
    let mlp = match &layer.mlp {
        Mlp::Dense { intermediate } => 3 * hidden * intermediate,
        Mlp::Moe(moe) => {
            let shared = moe.shared_expert_intermediate_size.map_or(0, |width| 3 * width + 1);
            hidden * (moe.num_experts + 3 * moe.num_experts_per_tok * moe.moe_intermediate_size + shared)
        }
    };
    mixer + mlp
}

/// Parameters of the head, all of which a token meets.
pub(crate) fn head_products(config: &ModelConfig) -> usize {
    config.vocab_size * config.hidden_size
}

impl Flops {
    /// Those of a configuration.
    pub fn of(config: &ModelConfig) -> Self {
        let attentions = config.layers.iter().filter(|layer| matches!(layer.mixer, Mixer::Attention { .. })).count();
        let layers = config.layers.iter().map(|layer| layer_products(config, layer));
        let products = layers.sum::<usize>() + head_products(config);
        let parameters = tensor_table(config).iter().map(arl_model::TensorSpec::elements).sum();
        Flops {
            parameters,
            trained: parameters,
            per_token: 6.0 * products as f64,
            attention: 6.0 * (attentions * config.num_attention_heads * config.head_dim) as f64,
            per_patch: config.vision.as_ref().map_or(0.0, |vision| 6.0 * patch_products(vision)),
            patch_attention: config.vision.as_ref().map_or(0.0, |vision| {
                let whole = (0..vision.depth).filter(|&block| !vision.is_windowed(block)).count();
                12.0 * (whole * vision.hidden_size) as f64
            }),
        }
    }

    /// Those of a configuration with adapters.
    pub fn adapted(config: &ModelConfig, lora: &Lora) -> Self {
        let all = Self::of(config);
        let own = |adapter: &Adapter| match (adapter.projection, adapter.sides(config)) {
            // Its A is looked up.
            (Projection::Embedding, (_, output)) => adapter.rank * output,
            (_, (input, output)) => adapter.rank * (input + output),
        };
        let own: usize = lora.adapters.iter().map(own).sum();
        Flops {
            trained: lora.trained_parameters(),
            per_token: all.per_token * 4.0 / 6.0 + 6.0 * own as f64,
            // Nothing behind the tower's frozen weights is trained: it has a forward pass alone.
            per_patch: all.per_patch / 3.0,
            patch_attention: all.patch_attention / 3.0,
            ..all
        }
    }
}
