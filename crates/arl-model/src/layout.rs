//! How a weights file names and joins the parameters of the table. transformers loads several layouts of one model; a
//! file is read as it is, and a trained model is written in the layout that was read.

use std::ops::Range;

use crate::tensors::{JOINED_GATE_UP, Role, TensorSpec, joined_name};

/// What every name begins with but for that of the head, unless the file is of a bare decoder.
const MODEL: &str = "model.";

/// The layout of a weights file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Names begin with `model.`, as `Qwen3ForCausalLM` saves them; those of a bare decoder (`Qwen3Model`) do not.
    pub prefixed: bool,
    /// The experts of a layer are two tensors, `experts.gate_up_proj [experts, 2 width, hidden]`, gate before up, and
    /// `experts.down_proj [experts, hidden, width]`, instead of three for each expert.
    pub joined_experts: bool,
}

impl Default for Layout {
    fn default() -> Self {
        Self { prefixed: true, joined_experts: false }
    }
}

/// A tensor of a weights file: one parameter of the table, or several that follow each other there and in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredTensor {
    /// Its name in the file.
    pub name: String,
    /// Row-major.
    pub shape: Vec<usize>,
    /// Indexes of its parameters in the table.
    pub parts: Range<usize>,
}

impl Layout {
    /// The layout of a file with tensors of these names.
    pub fn of<'a>(names: impl IntoIterator<Item = &'a str>) -> Self {
        let (mut prefixed, mut bare, mut joined_experts) = (false, false, false);
        for name in names {
            prefixed |= name.starts_with(MODEL);
            bare |= name.starts_with("layers.") || name.starts_with("embed_tokens.");
            joined_experts |= name.ends_with(JOINED_GATE_UP);
        }
        Self { prefixed: prefixed || !bare, joined_experts }
    }

    /// The tensors of a file in this layout, in the order of the table.
    pub fn tensors(self, table: &[TensorSpec]) -> Vec<StoredTensor> {
        let mut stored: Vec<StoredTensor> = Vec::with_capacity(table.len());
        for (index, spec) in table.iter().enumerate() {
            let joined = if self.joined_experts { joined_name(spec.role, spec.block.layer()) } else { None };
            let whole = joined.is_none();
            let name = self.name(&joined.unwrap_or_else(|| spec.name.clone()));
            match stored.last_mut().filter(|last| !whole && last.name == name) {
                Some(last) => last.parts.end = index + 1,
                None => stored.push(StoredTensor { name, shape: spec.shape.clone(), parts: index..index + 1 }),
            }
            if let (false, Some(last), &[rows, columns]) = (whole, stored.last_mut(), spec.shape.as_slice()) {
                let parts = last.parts.len();
                last.shape = match spec.role {
                    Role::ExpertDown(_) => vec![parts, rows, columns],
                    _ => vec![parts.div_ceil(2), 2 * rows, columns],
                };
            }
        }
        stored
    }

    /// The name in the file of what the table calls `name`.
    pub(crate) fn name(self, name: &str) -> String {
        match name.strip_prefix(MODEL) {
            Some(rest) if !self.prefixed => rest.to_owned(),
            _ => name.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::{ModelConfig, tensor_table};

    #[test]
    fn every_parameter_is_in_one_stored_tensor_of_its_size_whatever_the_layout() {
        let text = r#"{"model_type": "qwen3_moe", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "num_experts": 3,
            "num_experts_per_tok": 2, "moe_intermediate_size": 8, "mlp_only_layers": [1]}"#;
        let table = tensor_table(&ModelConfig::from_json(text, Path::new("config.json")).unwrap());
        for prefixed in [true, false] {
            for joined_experts in [true, false] {
                let layout = Layout { prefixed, joined_experts };
                let stored = layout.tensors(&table);
                assert_eq!(Layout::of(stored.iter().map(|tensor| tensor.name.as_str())), layout);
                let mut next = 0;
                for tensor in &stored {
                    assert_eq!(tensor.parts.start, next);
                    next = tensor.parts.end;
                    let elements: usize = table[tensor.parts.clone()].iter().map(TensorSpec::elements).sum();
                    assert_eq!(tensor.shape.iter().product::<usize>(), elements, "{}", tensor.name);
                }
                assert_eq!(next, table.len());
                let experts = stored.iter().filter(|tensor| tensor.name.contains(".experts."));
                assert_eq!(experts.count(), if joined_experts { 4 } else { 18 });
                assert_eq!(stored[0].name, if prefixed { "model.embed_tokens.weight" } else { "embed_tokens.weight" });
                assert_eq!(stored.last().map(|tensor| tensor.name.as_str()), Some("lm_head.weight"));
            }
        }
        let joined = Layout { joined_experts: true, ..Layout::default() }.tensors(&table);
        let shape = |name: &str| joined.iter().find(|tensor| tensor.name == name).map(|tensor| tensor.shape.clone());
        assert_eq!(shape("model.layers.0.mlp.experts.gate_up_proj"), Some(vec![3, 16, 16]));
        assert_eq!(shape("model.layers.2.mlp.experts.down_proj"), Some(vec![3, 16, 8]));
        assert_eq!(shape("model.layers.1.mlp.experts.gate_up_proj"), None);
    }
}
