//! THE table of a model's parameters: Hugging Face's names, shapes, roles, and which of them weight decay touches, all
//! from the configuration. Every other part of the program asks here and builds no name of its own.

use crate::config::{LayerConfig, Mlp, ModelConfig};

/// What a parameter is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// `[vocab, hidden]`; also the head where tied.
    Embedding,
    /// `[hidden]`, before attention.
    InputNorm,
    /// `[heads * head_dim, hidden]`.
    QWeight,
    /// `[kv_heads * head_dim, hidden]`.
    KWeight,
    /// `[kv_heads * head_dim, hidden]`.
    VWeight,
    /// `[heads * head_dim]`.
    QBias,
    /// `[kv_heads * head_dim]`.
    KBias,
    /// `[kv_heads * head_dim]`.
    VBias,
    /// `[head_dim]`, on each query head.
    QNorm,
    /// `[head_dim]`, on each key head.
    KNorm,
    /// `[hidden, heads * head_dim]`.
    OWeight,
    /// `[hidden]`.
    OBias,
    /// `[hidden]`, before the feed-forward part.
    PostAttentionNorm,
    /// `[intermediate, hidden]`.
    Gate,
    /// `[intermediate, hidden]`.
    Up,
    /// `[hidden, intermediate]`.
    Down,
    /// `[experts, hidden]`.
    Router,
    /// `[moe_intermediate, hidden]` of the expert of that number.
    ExpertGate(usize),
    /// `[moe_intermediate, hidden]` of the expert of that number.
    ExpertUp(usize),
    /// `[hidden, moe_intermediate]` of the expert of that number.
    ExpertDown(usize),
    /// `[hidden]`, after the last layer.
    FinalNorm,
    /// `[vocab, hidden]`; absent where tied.
    LmHead,
}

impl Role {
    /// Whether it is the weight of a norm.
    pub fn is_norm(self) -> bool {
        matches!(self, Role::InputNorm | Role::QNorm | Role::KNorm | Role::PostAttentionNorm | Role::FinalNorm)
    }

    /// Whether it is a bias.
    pub fn is_bias(self) -> bool {
        matches!(self, Role::QBias | Role::KBias | Role::VBias | Role::OBias)
    }

    /// Whether Hugging Face's Trainer applies weight decay to it: all but norms and biases.
    pub fn is_decayed(self) -> bool {
        !self.is_norm() && !self.is_bias()
    }
}

/// One parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Hugging Face's name.
    pub name: String,
    /// Row-major.
    pub shape: Vec<usize>,
    /// What it is.
    pub role: Role,
    /// Its layer; none outside of the layers.
    pub layer: Option<usize>,
    /// Whether weight decay applies.
    pub decay: bool,
}

impl TensorSpec {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Every parameter of the model, in the order in which they should lie in memory: what one matrix product can take
/// together is adjacent. That is, in each layer: query, key and value weights; their biases; gate and up; with experts,
/// gate and up of expert 0, then of expert 1 and so on, then all experts' down in the same order.
pub fn tensor_table(config: &ModelConfig) -> Vec<TensorSpec> {
    let mut table = Vec::new();
    visit(config, &mut |role, layer, shape| {
        table.push(TensorSpec {
            name: name(role, layer),
            shape: shape.to_vec(),
            role,
            layer,
            decay: role.is_decayed(),
        });
    });
    table
}

/// Trainable numbers, without building names.
pub(crate) fn num_parameters(config: &ModelConfig) -> u128 {
    let count = |shape: &[usize]| shape.iter().map(|&side| side as u128).product::<u128>();
    let mut outside = 0;
    visit_outside(config, &mut |_, _, shape| outside += count(shape));
    // Layers are of few kinds, and a layer may have very many experts.
    let mut kinds: Vec<(LayerConfig, u128)> = Vec::new();
    let mut inside = 0;
    for layer in &config.layers {
        let known = kinds.iter().find(|(kind, _)| kind == layer).map(|&(_, size)| size);
        inside += known.unwrap_or_else(|| {
            let mut size = 0;
            visit_layer(config, 0, layer, &mut |_, _, shape| size += count(shape));
            kinds.push((*layer, size));
            size
        });
    }
    inside + outside
}

type Visitor<'a> = dyn FnMut(Role, Option<usize>, &[usize]) + 'a;

fn visit(config: &ModelConfig, add: &mut Visitor<'_>) {
    add(Role::Embedding, None, &[config.vocab_size, config.hidden_size]);
    for (index, layer) in config.layers.iter().enumerate() {
        visit_layer(config, index, layer, add);
    }
    add(Role::FinalNorm, None, &[config.hidden_size]);
    if !config.tie_word_embeddings {
        add(Role::LmHead, None, &[config.vocab_size, config.hidden_size]);
    }
}

fn visit_outside(config: &ModelConfig, add: &mut Visitor<'_>) {
    let outside = ModelConfig { layers: Vec::new(), unknown_keys: Vec::new(), ..config.clone() };
    visit(&outside, add);
}

fn visit_layer(config: &ModelConfig, index: usize, layer: &LayerConfig, add: &mut Visitor<'_>) {
    let hidden = config.hidden_size;
    let q = config.num_attention_heads * config.head_dim;
    let kv = config.num_key_value_heads * config.head_dim;
    let mut add = |role, shape: &[usize]| add(role, Some(index), shape);
    add(Role::InputNorm, &[hidden]);
    add(Role::QWeight, &[q, hidden]);
    add(Role::KWeight, &[kv, hidden]);
    add(Role::VWeight, &[kv, hidden]);
    if config.qkv_bias {
        add(Role::QBias, &[q]);
        add(Role::KBias, &[kv]);
        add(Role::VBias, &[kv]);
    }
    if config.qk_norm {
        add(Role::QNorm, &[config.head_dim]);
        add(Role::KNorm, &[config.head_dim]);
    }
    add(Role::OWeight, &[hidden, q]);
    if config.o_bias {
        add(Role::OBias, &[hidden]);
    }
    add(Role::PostAttentionNorm, &[hidden]);
    match layer.mlp {
        Mlp::Dense { intermediate } => {
            add(Role::Gate, &[intermediate, hidden]);
            add(Role::Up, &[intermediate, hidden]);
            add(Role::Down, &[hidden, intermediate]);
        }
        Mlp::Moe(moe) => {
            add(Role::Router, &[moe.num_experts, hidden]);
            for expert in 0..moe.num_experts {
                add(Role::ExpertGate(expert), &[moe.moe_intermediate_size, hidden]);
                add(Role::ExpertUp(expert), &[moe.moe_intermediate_size, hidden]);
            }
            for expert in 0..moe.num_experts {
                add(Role::ExpertDown(expert), &[hidden, moe.moe_intermediate_size]);
            }
        }
    }
}

fn name(role: Role, layer: Option<usize>) -> String {
    let inner = match role {
        Role::Embedding => return "model.embed_tokens.weight".to_owned(),
        Role::FinalNorm => return "model.norm.weight".to_owned(),
        Role::LmHead => return "lm_head.weight".to_owned(),
        Role::InputNorm => "input_layernorm.weight",
        Role::QWeight => "self_attn.q_proj.weight",
        Role::KWeight => "self_attn.k_proj.weight",
        Role::VWeight => "self_attn.v_proj.weight",
        Role::QBias => "self_attn.q_proj.bias",
        Role::KBias => "self_attn.k_proj.bias",
        Role::VBias => "self_attn.v_proj.bias",
        Role::QNorm => "self_attn.q_norm.weight",
        Role::KNorm => "self_attn.k_norm.weight",
        Role::OWeight => "self_attn.o_proj.weight",
        Role::OBias => "self_attn.o_proj.bias",
        Role::PostAttentionNorm => "post_attention_layernorm.weight",
        Role::Gate => "mlp.gate_proj.weight",
        Role::Up => "mlp.up_proj.weight",
        Role::Down => "mlp.down_proj.weight",
        Role::Router => "mlp.gate.weight",
        Role::ExpertGate(expert) => &format!("mlp.experts.{expert}.gate_proj.weight"),
        Role::ExpertUp(expert) => &format!("mlp.experts.{expert}.up_proj.weight"),
        Role::ExpertDown(expert) => &format!("mlp.experts.{expert}.down_proj.weight"),
    };
    format!("model.layers.{}.{inner}", layer.unwrap_or_default())
}
