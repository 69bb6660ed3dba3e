//! LoRA (Hu et al., 2021) as PEFT describes it: which layers have an adapter, of which rank, and what else is trained; the
//! folder of an adapter, in and out; and the merge of an adapter into its model. Knows nothing of how one is trained.

mod base;
mod config;
mod convert;
mod files;
mod joined;
mod merge;
mod names;
mod targets;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_experts;
#[cfg(test)]
mod tests_vision;

pub use config::{LoraBias, LoraConfig, ModuleNames};
pub use files::{AdapterFile, save_adapter};
pub use merge::merge_adapter;

use std::collections::HashMap;

use crate::config::{Mlp, ModelConfig};
use crate::tensors::{Block, Projection, Role, Shard, TensorSpec, tensor_table};
use crate::{Error, ErrorCode, Result};

/// The adapter of a linear layer: `y = W x + factor B A x`.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    /// The layer's name in the table of tensors: `model.layers.0.self_attn.q_proj`. PEFT's has `model.language_model` in a model
    /// that sees.
    pub module: String,
    /// The block that owns the layer.
    pub block: Block,
    /// Which of the block's layers it is.
    pub projection: Projection,
    /// Rows of A, columns of B.
    pub rank: usize,
    /// `alpha / rank`; with rsLoRA `alpha / sqrt(rank)`.
    pub factor: f32,
    /// Experts, each of which has an A and a B of its own; none: one layer.
    pub experts: Option<usize>,
}

/// What a LoRA trains in a model.
#[derive(Clone, Debug)]
pub struct Lora {
    /// As it was asked for.
    pub config: LoraConfig,
    /// The model; its head has weights of its own where one of the two ends is trained as a whole.
    pub model: ModelConfig,
    /// In the order of the table of tensors.
    pub adapters: Vec<Adapter>,
    /// The model's tensors, of which only whole copies and biases are trainable, then A and B of each adapter: what one
    /// matrix product takes together is adjacent.
    pub table: Vec<TensorSpec>,
}

impl Lora {
    /// The norms of the rows of an adapted layer's weight, with which its magnitudes begin. Sums are in f64.
    pub fn row_norms(weight: &[f32], out: &mut [f32]) {
        let width = weight.len() / out.len().max(1);
        for (out, row) in out.iter_mut().zip(weight.chunks_exact(width.max(1))) {
            *out = row.iter().map(|&value| f64::from(value) * f64::from(value)).sum::<f64>().sqrt() as f32;
        }
    }

    /// Finds the layers that a configuration names in a model.
    ///
    /// # Errors
    /// `ARL_CONFIG` where a name or pattern finds nothing, or what cannot be adapted.
    pub fn new(model: &ModelConfig, config: &LoraConfig) -> Result<Self> {
        let config = &convert::converted(model, config)?;
        let mut model = model.clone();
        let ends = config.modules_to_save.iter().any(|name| ["lm_head", "embed_tokens"].contains(&last(name)));
        model.tie_word_embeddings &= !ends;
        let mut table = tensor_table(&model);
        let adapters = targets::adapters(&model, &table, config)?;
        let saved = targets::saved_tensors(&model, &table, config, &adapters)?;
        for (spec, saved) in table.iter_mut().zip(saved) {
            spec.trainable = saved || (config.bias == LoraBias::LoraOnly && is_bias_of(spec, &adapters));
        }
        let shards: HashMap<&str, Shard> =
            table.iter().filter_map(|spec| Some((spec.name.strip_suffix(".weight")?, spec.shard))).collect();
        // Products of queries, keys and values, and of gate and up, take their A's together.
        let mut added = Vec::new();
        for (begin, end) in products(&adapters) {
            for matrix in [Matrix::A, Matrix::B, Matrix::Magnitude] {
                if !matches!(matrix, Matrix::Magnitude) || config.use_dora {
                    let of_product = adapters[begin..end].iter();
                    added.extend(of_product.map(|adapter| adapter.spec(&model, matrix, &shards)));
                }
            }
        }
        table.extend(added);
        Ok(Lora { config: config.clone(), model, adapters, table })
    }

    /// Refuses what can be used, and cannot be trained.
    ///
    /// # Errors
    /// `ARL_CONFIG` for dropout next to adapters of parameters.
    pub fn check_training(&self) -> Result<()> {
        if self.config.lora_dropout > 0.0 && self.config.use_dora {
            let what = "use_dora: magnitudes next to lora_dropout are not built".to_owned();
            return Err(refused(what, "add --lora_dropout 0"));
        }
        if self.config.lora_dropout > 0.0 && self.adapters.iter().any(Adapter::is_parameter) {
            let what = "lora_dropout: adapters of experts and routers have no dropout, in PEFT neither".to_owned();
            return Err(refused(what, "add --lora_dropout 0"));
        }
        if self.config.lora_dropout > 0.0 && self.adapters.iter().any(|a| a.projection == Projection::Head) {
            let what = "lora_dropout: an adapter of lm_head has no dropout".to_owned();
            return Err(refused(what, "add --lora_dropout 0"));
        }
        Ok(())
    }

    /// Numbers that are trained.
    pub fn trained_parameters(&self) -> usize {
        self.table.iter().filter(|spec| spec.trainable).map(TensorSpec::elements).sum()
    }

    /// The adapted layers by the last part of their names, with how many there are of each: `("q_proj", 28)`.
    pub fn counts(&self) -> Vec<(String, usize)> {
        let mut counts: Vec<(String, usize)> = Vec::new();
        for adapter in &self.adapters {
            match counts.iter_mut().find(|(name, _)| name == last(&adapter.module)) {
                Some((_, count)) => *count += 1,
                None => counts.push((last(&adapter.module).to_owned(), 1)),
            }
        }
        counts
    }

    /// The trained tensors, with the names that an adapter's file gives them.
    pub fn stored(&self) -> Vec<(String, &TensorSpec)> {
        let trained = self.table.iter().filter(|spec| spec.trainable);
        trained.map(|spec| (files::stored_name(&self.model, spec, &self.adapters), spec)).collect()
    }

    /// The adapter of a matrix, and the expert and the first row of B that are its own.
    fn adapter_of(&self, spec: &TensorSpec) -> Option<(&Adapter, usize, usize)> {
        let (projection, expert) = match spec.role {
            Role::ExpertGate(expert) | Role::ExpertUp(expert) => (Projection::ExpertsGateUp, expert),
            Role::ExpertDown(expert) => (Projection::ExpertsDown, expert),
            _ => {
                let module = spec.name.strip_suffix(".weight")?;
                return self.adapters.iter().find(|adapter| adapter.module == module).map(|adapter| (adapter, 0, 0));
            }
        };
        let of_block = |adapter: &&Adapter| (adapter.block, adapter.projection) == (spec.block, projection);
        let first = if matches!(spec.role, Role::ExpertUp(_)) { spec.shape[0] } else { 0 };
        self.adapters.iter().find(of_block).map(|adapter| (adapter, expert, first))
    }
}

/// One of an adapter's two matrices, or the magnitudes of its layer's rows.
#[derive(Clone, Copy)]
enum Matrix {
    A,
    B,
    Magnitude,
}

impl Adapter {
    /// Whether PEFT adapts a parameter of a module here, by `target_parameters`, and not a linear layer.
    pub fn is_parameter(&self) -> bool {
        self.experts.is_some() || self.projection == Projection::Router
    }

    /// Columns and rows of the layer's weight; of one expert's.
    pub fn sides(&self, model: &ModelConfig) -> (usize, usize) {
        let hidden = model.hidden_size;
        let (q, kv) = (model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim);
        let gates = if model.attention_gate { 2 } else { 1 };
        let (inner, shared) = match self.block.layer().and_then(|layer| model.layers.get(layer)) {
            Some(layer) => match layer.mlp {
                Mlp::Dense { intermediate } => (intermediate, 0),
                Mlp::Moe(moe) => (moe.moe_intermediate_size, moe.shared_expert_intermediate_size.unwrap_or(0)),
            },
            None => (model.intermediate_size, 0),
        };
        let [channels, values, heads] =
            model.delta.map_or([0; 3], |delta| [delta.channels(), delta.value_columns(), delta.linear_num_value_heads]);
        match self.projection {
            Projection::Query => (hidden, gates * q),
            Projection::Key | Projection::Value => (hidden, kv),
            Projection::Output => (q, hidden),
            Projection::Gate | Projection::Up => (hidden, inner),
            Projection::Down | Projection::ExpertsDown => (inner, hidden),
            Projection::ExpertsGateUp => (hidden, 2 * inner),
            Projection::InProjQkv => (hidden, channels),
            Projection::InProjZ => (hidden, values),
            Projection::InProjB | Projection::InProjA => (hidden, heads),
            Projection::OutProj => (values, hidden),
            Projection::SharedGate | Projection::SharedUp => (hidden, shared),
            Projection::SharedDown => (shared, hidden),
            Projection::SharedExpertGate => (hidden, 1),
            Projection::Router => (hidden, model.moe.map_or(0, |moe| moe.num_experts)),
            Projection::Head => (hidden, model.vocab_size),
            Projection::Embedding => (model.vocab_size, hidden),
        }
    }

    /// The name of one of its tensors in the table.
    fn tensor(&self, matrix: Matrix) -> String {
        let name = match (matrix, self.projection) {
            (Matrix::A, Projection::Embedding) => "lora_embedding_A",
            (Matrix::B, Projection::Embedding) => "lora_embedding_B",
            (Matrix::A, _) => "lora_A.weight",
            (Matrix::B, _) => "lora_B.weight",
            (Matrix::Magnitude, _) => "lora_magnitude_vector",
        };
        format!("{}.{name}", self.module)
    }

    /// How ranks may divide one of its tensors: A as the columns of its layer's weight, of which `shards` has the division by modules,
    /// B and magnitudes as its rows; of experts each rank has those of its own.
    fn shard(&self, matrix: Matrix, output: usize, shards: &HashMap<&str, Shard>) -> Shard {
        match (matrix, shards.get(self.module.as_str()).copied().unwrap_or(Shard::Whole)) {
            (Matrix::A, _) if self.experts.is_some() => Shard::Rows { group: self.rank },
            (_, _) if self.experts.is_some() => Shard::Rows { group: output },
            (Matrix::A, columns @ Shard::Columns { .. }) => columns,
            (Matrix::B | Matrix::Magnitude, rows @ (Shard::Rows { .. } | Shard::Sections { .. })) => rows,
            _ => Shard::Whole,
        }
    }

    fn spec(&self, model: &ModelConfig, matrix: Matrix, shards: &HashMap<&str, Shard>) -> TensorSpec {
        let (input, output) = self.sides(model);
        let experts = self.experts.unwrap_or(1);
        let (shape, role) = match matrix {
            // Rows of tokens are looked up.
            Matrix::A if self.projection == Projection::Embedding => {
                (vec![input, self.rank], Role::LoraA(self.projection))
            }
            Matrix::A => (vec![experts * self.rank, input], Role::LoraA(self.projection)),
            Matrix::B => (vec![experts * output, self.rank], Role::LoraB(self.projection)),
            Matrix::Magnitude => (vec![output], Role::LoraMagnitude(self.projection)),
        };
        TensorSpec {
            name: self.tensor(matrix),
            shape,
            role,
            block: self.block,
            decay: true,
            trainable: true,
            shard: self.shard(matrix, output, shards),
        }
    }
}

/// First and end of the adapters whose layers one matrix product computes.
fn products(adapters: &[Adapter]) -> Vec<(usize, usize)> {
    let product = |adapter: &Adapter| (adapter.block, adapter.projection.product());
    let mut products = Vec::new();
    let mut begin = 0;
    for end in 1..=adapters.len() {
        if end == adapters.len() || product(&adapters[end]) != product(&adapters[begin]) {
            products.push((begin, end));
            begin = end;
        }
    }
    products
}

/// Whether a tensor is the bias of an adapted layer.
fn is_bias_of(spec: &TensorSpec, adapters: &[Adapter]) -> bool {
    let module = spec.name.strip_suffix(".bias");
    module.is_some_and(|module| adapters.iter().any(|adapter| adapter.module == module))
}

/// The last part of a name.
fn last(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
}

fn refused(what: String, hint: &str) -> Error {
    Error::new(ErrorCode::Config, what).hint(hint)
}
