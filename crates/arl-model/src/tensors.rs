//! THE table of a model's parameters, from the configuration: names, shapes, roles, the block that owns each, which of
//! them weight decay applies to, and how ranks may divide them. No other part of the program builds a name of its own.

use crate::config::{LayerConfig, Mlp, ModelConfig, MoeConfig};

/// What a parameter is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// `[vocab, hidden]`; also the head where tied.
    Embedding,
    /// `[hidden]`, before attention.
    InputNorm,
    /// `[heads * head_dim, hidden]`; with an output gate `[heads * 2 head_dim, hidden]`, head by head query then gate.
    QWeight,
    /// `[kv_heads * head_dim, hidden]`.
    KWeight,
    /// `[kv_heads * head_dim, hidden]`.
    VWeight,
    /// As many as `QWeight` has rows.
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
    /// `[rank, input]`: an adapter's A; of experts one below the other.
    LoraA(Projection),
    /// `[output, rank]`: an adapter's B; of experts one below the other.
    LoraB(Projection),
    /// `[output]`: the magnitudes of a layer's rows with its adapter (DoRA).
    LoraMagnitude(Projection),
}

/// A linear layer of a block that may have an adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Projection {
    /// Of queries.
    Query,
    /// Of keys.
    Key,
    /// Of values.
    Value,
    /// Of what attention gives.
    Output,
    /// The gate of a dense MLP.
    Gate,
    /// The other half of its input.
    Up,
    /// Of a dense MLP's output.
    Down,
    /// Of every expert's gate and other half: gate rows, then up rows.
    ExpertsGateUp,
    /// Of every expert's output.
    ExpertsDown,
    /// Of a mixture's choice of experts.
    Router,
    /// Of the classifier.
    Head,
    /// The look-up of tokens, whose A is `[vocab, rank]`.
    Embedding,
}

impl Projection {
    /// The number of the matrix product, within the block, that computes it.
    pub fn product(self) -> usize {
        match self {
            Projection::Query | Projection::Key | Projection::Value | Projection::Gate | Projection::Up => 0,
            Projection::Output | Projection::Down => 1,
            Projection::ExpertsGateUp => 2,
            Projection::ExpertsDown => 3,
            Projection::Router => 4,
            Projection::Head => 5,
            Projection::Embedding => 6,
        }
    }

    /// Its name within a layer.
    pub(crate) fn module(self) -> &'static str {
        match self {
            Projection::Query => "self_attn.q_proj",
            Projection::Key => "self_attn.k_proj",
            Projection::Value => "self_attn.v_proj",
            Projection::Output => "self_attn.o_proj",
            Projection::Gate => "mlp.gate_proj",
            Projection::Up => "mlp.up_proj",
            Projection::Down => "mlp.down_proj",
            Projection::ExpertsGateUp => "mlp.experts.gate_up_proj",
            Projection::ExpertsDown => "mlp.experts.down_proj",
            Projection::Router => "mlp.gate",
            Projection::Head => "lm_head",
            Projection::Embedding => "model.embed_tokens",
        }
    }
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

/// The part of a model that owns a parameter; those within layers have the layer's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Block {
    /// The look-up of tokens.
    Embedding,
    /// Attention and the norm before it.
    Attention(usize),
    /// A dense MLP and the norm before it.
    Mlp(usize),
    /// A mixture of experts and the norm before it.
    Experts(usize),
    /// The norm after the last layer.
    FinalNorm,
    /// The classifier; owns nothing where it is the embedding.
    Head,
}

impl Block {
    /// Its layer; none outside of the layers.
    pub fn layer(self) -> Option<usize> {
        match self {
            Block::Attention(layer) | Block::Mlp(layer) | Block::Experts(layer) => Some(layer),
            Block::Embedding | Block::FinalNorm | Block::Head => None,
        }
    }
}

/// How ranks may divide a parameter: tensor parallelism rows and columns, expert parallelism experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shard {
    /// Every rank has all of it.
    Whole,
    /// Each rank has as many consecutive groups of rows: heads, or channels of an MLP.
    Rows {
        /// Rows that stay together.
        group: usize,
    },
    /// Each rank has as many consecutive groups of columns.
    Columns {
        /// Columns that stay together.
        group: usize,
    },
    /// Each rank has as many consecutive experts.
    Expert {
        /// The expert that this is a parameter of.
        index: usize,
        /// Experts of the layer.
        of: usize,
    },
}

/// A box of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    /// First index along each axis.
    pub start: Vec<usize>,
    /// Length along each axis.
    pub shape: Vec<usize>,
}

impl Slice {
    /// All of a tensor of this shape.
    pub fn whole(shape: &[usize]) -> Self {
        Slice { start: vec![0; shape.len()], shape: shape.to_vec() }
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
    /// The block that owns it.
    pub block: Block,
    /// Whether weight decay applies.
    pub decay: bool,
    /// Whether the optimizer updates it; a run may freeze some.
    pub trainable: bool,
    /// How ranks may divide it.
    pub shard: Shard,
}

impl TensorSpec {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// What `rank` of `ranks` has of it, possibly nothing; none where it cannot be divided evenly.
    pub fn slice(&self, rank: usize, ranks: usize) -> Option<Slice> {
        let mut slice = Slice::whole(&self.shape);
        let (axis, group) = match self.shard {
            Shard::Whole => return Some(slice),
            Shard::Rows { group } => (0, group),
            Shard::Columns { group } => (1, group),
            Shard::Expert { index, of } => {
                let mine = of.is_multiple_of(ranks).then(|| index / (of / ranks) == rank)?;
                return Some(if mine { slice } else { Slice { shape: vec![0; self.shape.len()], ..slice } });
            }
        };
        let len = self.shape[axis].is_multiple_of(group * ranks).then(|| self.shape[axis] / ranks)?;
        (slice.start[axis], slice.shape[axis]) = (rank * len, len);
        Some(slice)
    }
}

/// Every parameter of the model, all of them trainable, in the order of their places in memory: what one matrix product
/// can take together is adjacent. That is, in each layer: query, key and value weights; their biases; gate and up; with experts,
/// gate and up of expert 0, then of expert 1 and so on, then all experts' down in the same order.
pub fn tensor_table(config: &ModelConfig) -> Vec<TensorSpec> {
    let mut table = Vec::new();
    visit(config, &mut |role, block, shape, shard| {
        table.push(TensorSpec {
            name: name(role, block.layer()),
            shape: shape.to_vec(),
            role,
            block,
            decay: role.is_decayed(),
            trainable: true,
            shard,
        });
    });
    table
}

/// Trainable numbers, without building names.
pub(crate) fn num_parameters(config: &ModelConfig) -> u128 {
    let count = |shape: &[usize]| shape.iter().map(|&side| side as u128).product::<u128>();
    let mut outside = 0;
    visit_outside(config, &mut |_, _, shape, _| outside += count(shape));
    // Layers are of few kinds, and a layer may have very many experts.
    let mut kinds: Vec<(LayerConfig, u128)> = Vec::new();
    let mut inside = 0;
    for layer in &config.layers {
        let known = kinds.iter().find(|(kind, _)| kind == layer).map(|&(_, size)| size);
        inside += known.unwrap_or_else(|| {
            let mut size = 0;
            visit_layer(config, 0, layer, &mut |_, _, shape, _| size += count(shape));
            kinds.push((*layer, size));
            size
        });
    }
    inside + outside
}

type Visitor<'a> = dyn FnMut(Role, Block, &[usize], Shard) + 'a;

fn visit(config: &ModelConfig, add: &mut Visitor<'_>) {
    add(Role::Embedding, Block::Embedding, &[config.vocab_size, config.hidden_size], Shard::Whole);
    for (index, layer) in config.layers.iter().enumerate() {
        visit_layer(config, index, layer, add);
    }
    add(Role::FinalNorm, Block::FinalNorm, &[config.hidden_size], Shard::Whole);
    if !config.tie_word_embeddings {
        add(Role::LmHead, Block::Head, &[config.vocab_size, config.hidden_size], Shard::Whole);
    }
}

fn visit_outside(config: &ModelConfig, add: &mut Visitor<'_>) {
    let outside = ModelConfig { layers: Vec::new(), unknown_keys: Vec::new(), ..config.clone() };
    visit(&outside, add);
}

fn visit_layer(config: &ModelConfig, index: usize, layer: &LayerConfig, add: &mut Visitor<'_>) {
    visit_attention(config, Block::Attention(index), add);
    match layer.mlp {
        Mlp::Dense { intermediate } => visit_mlp(config.hidden_size, intermediate, Block::Mlp(index), add),
        Mlp::Moe(moe) => visit_experts(config.hidden_size, &moe, Block::Experts(index), add),
    }
}

fn visit_attention(config: &ModelConfig, block: Block, add: &mut Visitor<'_>) {
    let (hidden, dim) = (config.hidden_size, config.head_dim);
    let (q, kv) = (config.num_attention_heads * dim, config.num_key_value_heads * dim);
    // A head's query rows and gate rows stay together.
    let parts = if config.attention_gate { 2 } else { 1 };
    let (queries, heads) = (Shard::Rows { group: parts * dim }, Shard::Rows { group: dim });
    let mut add = |role, shape: &[usize], shard| add(role, block, shape, shard);
    add(Role::InputNorm, &[hidden], Shard::Whole);
    add(Role::QWeight, &[parts * q, hidden], queries);
    add(Role::KWeight, &[kv, hidden], heads);
    add(Role::VWeight, &[kv, hidden], heads);
    if config.qkv_bias {
        add(Role::QBias, &[parts * q], queries);
        add(Role::KBias, &[kv], heads);
        add(Role::VBias, &[kv], heads);
    }
    if config.qk_norm {
        add(Role::QNorm, &[dim], Shard::Whole);
        add(Role::KNorm, &[dim], Shard::Whole);
    }
    add(Role::OWeight, &[hidden, q], Shard::Columns { group: dim });
    if config.o_bias {
        add(Role::OBias, &[hidden], Shard::Whole);
    }
}

fn visit_mlp(hidden: usize, intermediate: usize, block: Block, add: &mut Visitor<'_>) {
    add(Role::PostAttentionNorm, block, &[hidden], Shard::Whole);
    add(Role::Gate, block, &[intermediate, hidden], Shard::Rows { group: 1 });
    add(Role::Up, block, &[intermediate, hidden], Shard::Rows { group: 1 });
    add(Role::Down, block, &[hidden, intermediate], Shard::Columns { group: 1 });
}

fn visit_experts(hidden: usize, moe: &MoeConfig, block: Block, add: &mut Visitor<'_>) {
    let (width, of) = (moe.moe_intermediate_size, moe.num_experts);
    add(Role::PostAttentionNorm, block, &[hidden], Shard::Whole);
    add(Role::Router, block, &[of, hidden], Shard::Whole);
    for index in 0..of {
        add(Role::ExpertGate(index), block, &[width, hidden], Shard::Expert { index, of });
        add(Role::ExpertUp(index), block, &[width, hidden], Shard::Expert { index, of });
    }
    for index in 0..of {
        add(Role::ExpertDown(index), block, &[hidden, width], Shard::Expert { index, of });
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
        Role::LoraA(projection) => &format!("{}.lora_A.weight", projection.module()),
        Role::LoraB(projection) => &format!("{}.lora_B.weight", projection.module()),
        Role::LoraMagnitude(projection) => &format!("{}.lora_magnitude_vector", projection.module()),
    };
    format!("model.layers.{}.{inner}", layer.unwrap_or_default())
}
