//! THE table of a model's parameters, from the configuration: names, shapes, roles, the block that owns each, which of
//! them weight decay applies to, and how ranks may divide them. No other part of the program builds a name of its own.

mod role;
mod vision;

pub use role::{Projection, Role};

use std::ops::Range;

use crate::config::{DeltaConfig, LayerConfig, Mixer, Mlp, ModelConfig, MoeConfig};

/// The part of a model that owns a parameter; those within layers have the layer's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Block {
    /// The look-up of tokens.
    Embedding,
    /// Attention and the norm before it.
    Attention(usize),
    /// The gated delta rule and the norm before it.
    Delta(usize),
    /// A dense MLP and the norm before it.
    Mlp(usize),
    /// A mixture of experts and the norm before it.
    Experts(usize),
    /// The norm after the last layer.
    FinalNorm,
    /// The classifier; owns nothing where it is the embedding.
    Head,
    /// The vision tower's embedding of patches, with its learned positions.
    VisionEmbed,
    /// A block of the vision tower: both norms, attention and the MLP.
    Vision(usize),
    /// What turns the last block's rows into rows of the decoder.
    VisionMerger,
    /// The DeepStack merger of that number, which reads after the block `deepstack_visual_indexes[number]`.
    DeepStack(usize),
}

impl Block {
    /// The decoder's layer that it is in; none outside of the layers.
    pub fn layer(self) -> Option<usize> {
        match self {
            Block::Attention(layer) | Block::Delta(layer) | Block::Mlp(layer) | Block::Experts(layer) => Some(layer),
            Block::Embedding | Block::FinalNorm | Block::Head => None,
            Block::VisionEmbed | Block::Vision(_) | Block::VisionMerger | Block::DeepStack(_) => None,
        }
    }

    /// Whether it is a part of the vision tower, mergers included.
    pub fn is_vision(self) -> bool {
        matches!(self, Block::VisionEmbed | Block::Vision(_) | Block::VisionMerger | Block::DeepStack(_))
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
    /// Rows are in three sections, and each rank has as many consecutive groups of rows of each.
    Sections {
        /// Rows of each section.
        rows: [usize; 3],
        /// Rows of each that stay together.
        groups: [usize; 3],
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

/// A part of a tensor, seen as a matrix of its first axis and all others: some rows, and the same columns of each. Its elements are
/// counted row by row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    /// The tensor's shape.
    pub of: Vec<usize>,
    /// Ranges of rows, ascending.
    pub rows: Vec<Range<usize>>,
    /// Columns.
    pub columns: Range<usize>,
}

impl Slice {
    /// All of a tensor of this shape.
    pub fn whole(shape: &[usize]) -> Self {
        let (rows, columns) = shape.split_first().map_or((1, 1), |(rows, rest)| (*rows, rest.iter().product()));
        Slice { of: shape.to_vec(), rows: std::iter::once(0..rows).collect(), columns: 0..columns }
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.rows.iter().map(Range::len).sum::<usize>() * self.columns.len()
    }

    /// Its elements, of all those of the tensor.
    #[must_use]
    pub fn of_whole(&self, values: Vec<f32>) -> Vec<f32> {
        let len = self.elements();
        if len == values.len() {
            return values;
        }
        self.runs(0..len).into_iter().flat_map(|run| values[run].iter().copied()).collect()
    }

    /// Where elements of it are in the whole tensor, counted row-major: in their order, and adjacent ones together.
    pub fn runs(&self, elements: Range<usize>) -> Vec<Range<usize>> {
        let (width, taken) = (self.of.iter().skip(1).product::<usize>(), self.columns.len());
        let (mut runs, mut first): (Vec<Range<usize>>, usize) = (Vec::new(), 0);
        for rows in &self.rows {
            let end = first + rows.len() * taken;
            let (mut at, last) = (elements.start.max(first), elements.end.min(end));
            while at < last {
                let (row, column) = ((at - first) / taken, (at - first) % taken);
                let len = if taken == width { last - at } else { (taken - column).min(last - at) };
                let start = (rows.start + row) * width + self.columns.start + column;
                match runs.last_mut().filter(|run| run.end == start) {
                    Some(run) => run.end += len,
                    None => runs.push(start..start + len),
                }
                at += len;
            }
            first = end;
        }
        runs
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
        let whole = Slice::whole(&self.shape);
        let part = |first: usize, len: usize, group: usize| {
            let each = len.is_multiple_of(group * ranks).then(|| len / ranks)?;
            Some(first + rank * each..first + (rank + 1) * each)
        };
        match self.shard {
            Shard::Whole => Some(whole),
            Shard::Rows { group } => Some(Slice { rows: vec![part(0, self.shape[0], group)?], ..whole }),
            Shard::Sections { rows: [a, b, c], groups } => {
                let rows = [part(0, a, groups[0])?, part(a, b, groups[1])?, part(a + b, c, groups[2])?];
                Some(Slice { rows: rows.to_vec(), ..whole })
            }
            Shard::Columns { group } => Some(Slice { columns: part(0, self.shape[1], group)?, ..whole }),
            Shard::Expert { index, of } => {
                let mine = part(0, of, 1)?.contains(&index);
                Some(if mine { whole } else { Slice { rows: Vec::new(), ..whole } })
            }
        }
    }
}

/// Every parameter of the model, all of them trainable, in the order of their places in memory: what one matrix product
/// can take together is adjacent. That is, in each layer: query, key and value weights; their biases; the four input projections
/// of the delta rule; gate and up; with experts, gate and up of expert 0, then of expert 1 and so on, then all experts' down in
/// the same order; gate and up of the shared expert. The vision tower follows the decoder.
pub fn tensor_table(config: &ModelConfig) -> Vec<TensorSpec> {
    let mut table = Vec::new();
    visit(config, &mut |role, block, shape, shard| {
        let tower = config.vision.as_ref().filter(|_| block.is_vision()).map(|vision| vision.kind);
        let name = tower.and_then(|kind| vision::name(kind, role, block));
        table.push(TensorSpec {
            name: name.unwrap_or_else(|| role::name(role, block.layer())),
            shape: shape.to_vec(),
            role,
            block,
            decay: tower.map_or_else(|| role.is_decayed(), |kind| vision::is_decayed(kind, role)),
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
    if let Some(vision) = &config.vision {
        vision::visit(vision, add);
    }
}

fn visit_outside(config: &ModelConfig, add: &mut Visitor<'_>) {
    let outside = ModelConfig { layers: Vec::new(), unknown_keys: Vec::new(), ..config.clone() };
    visit(&outside, add);
}

fn visit_layer(config: &ModelConfig, index: usize, layer: &LayerConfig, add: &mut Visitor<'_>) {
    match layer.mixer {
        Mixer::Attention { .. } => visit_attention(config, Block::Attention(index), add),
        Mixer::Delta(delta) => visit_delta(config.hidden_size, &delta, Block::Delta(index), add),
    }
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

/// Ranks divide key heads, each with its value heads.
fn visit_delta(hidden: usize, delta: &DeltaConfig, block: Block, add: &mut Visitor<'_>) {
    let (channels, heads, values) = (delta.channels(), delta.linear_num_value_heads, delta.value_columns());
    let (keys, each) = (delta.key_columns(), heads / delta.linear_num_key_heads);
    let (key_dim, value_dim) = (delta.linear_key_head_dim, delta.linear_value_head_dim);
    let qkv = Shard::Sections { rows: [keys, keys, values], groups: [key_dim, key_dim, each * value_dim] };
    let (of_heads, of_values) = (Shard::Rows { group: each }, Shard::Rows { group: each * value_dim });
    let mut add = |role, shape: &[usize], shard| add(role, block, shape, shard);
    add(Role::InputNorm, &[hidden], Shard::Whole);
    add(Role::InProjQkv, &[channels, hidden], qkv);
    add(Role::InProjZ, &[values, hidden], of_values);
    add(Role::InProjB, &[heads, hidden], of_heads);
    add(Role::InProjA, &[heads, hidden], of_heads);
    add(Role::Conv1d, &[channels, 1, delta.linear_conv_kernel_dim], qkv);
    add(Role::ALog, &[heads], of_heads);
    add(Role::DtBias, &[heads], of_heads);
    add(Role::Norm, &[value_dim], Shard::Whole);
    add(Role::OutProj, &[hidden, values], Shard::Columns { group: each * value_dim });
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
    if let Some(shared) = moe.shared_expert_intermediate_size {
        add(Role::SharedGate, block, &[shared, hidden], Shard::Rows { group: 1 });
        add(Role::SharedUp, block, &[shared, hidden], Shard::Rows { group: 1 });
        add(Role::SharedDown, block, &[hidden, shared], Shard::Columns { group: 1 });
        add(Role::SharedExpertGate, block, &[1, hidden], Shard::Whole);
    }
}
