//! Where each parameter lies: one flat array, what is decayed first, then what is not, so that an optimizer step is
//! two leaves. Fused weights are several tensors of a checkpoint side by side. Knows names and shapes, no values.

use std::collections::HashMap;

use arl_model::{Mlp, ModelConfig, Role, TensorSpec, tensor_table};

use crate::arena::ALIGNMENT;

/// A parameter: a part of each of the flat arrays (weights, gradients, moments).
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Param {
    /// First element.
    pub(crate) offset: usize,
    /// Elements.
    pub(crate) len: usize,
}

/// A tensor of a checkpoint, and where its elements lie in the flat arrays.
#[derive(Clone, Debug)]
pub(crate) struct Tensor {
    /// Its name and shape.
    pub(crate) spec: TensorSpec,
    /// First element in the flat arrays.
    pub(crate) offset: usize,
}

impl Tensor {
    /// The place of its elements.
    pub(crate) fn param(&self) -> Param {
        Param { offset: self.offset, len: self.spec.elements() }
    }
}

/// The parameters of a layer's feed-forward part.
#[derive(Clone, Copy, Debug)]
pub(crate) enum MlpParams {
    Dense {
        /// `[2 width, hidden]`: gate, then up.
        gate_up: Param,
        /// `[hidden, width]`.
        down: Param,
    },
    Experts {
        /// `[experts, hidden]`.
        router: Param,
        /// `[experts, 2 width, hidden]`.
        gate_up: Param,
        /// `[experts, hidden, width]`.
        down: Param,
    },
}

/// The parameters of a layer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LayerParams {
    /// `[hidden]`.
    pub(crate) input_norm: Param,
    /// `[(query + 2 key_value) dim, hidden]`.
    pub(crate) qkv: Param,
    /// `[(query + 2 key_value) dim]`.
    pub(crate) qkv_bias: Option<Param>,
    /// `[dim]` each: of queries, of keys.
    pub(crate) qk_norm: Option<(Param, Param)>,
    /// `[hidden, query dim]`.
    pub(crate) output: Param,
    /// `[hidden]`.
    pub(crate) output_bias: Option<Param>,
    /// `[hidden]`.
    pub(crate) post_norm: Param,
    pub(crate) mlp: MlpParams,
}

/// All parameters of a model.
#[derive(Clone, Debug)]
pub(crate) struct Params {
    /// `[vocab, hidden]`.
    pub(crate) embedding: Param,
    pub(crate) layers: Vec<LayerParams>,
    /// `[hidden]`.
    pub(crate) final_norm: Param,
    /// `[vocab, hidden]`; the embedding itself where they are tied.
    pub(crate) head: Param,
    /// Elements of the flat arrays; elements between parameters are zero and stay zero.
    pub(crate) len: usize,
    /// The first so many are decayed.
    pub(crate) decayed: usize,
    /// By layers: where its decayed parameters end.
    pub(crate) layer_ends: Vec<usize>,
    /// Every tensor of the checkpoint, in the order in which they lie here.
    pub(crate) tensors: Vec<Tensor>,
}

/// Whether a parameter lies right behind the one before it in the table, because one matrix product takes both.
fn continues(role: Role) -> bool {
    match role {
        Role::KWeight | Role::VWeight | Role::KBias | Role::VBias | Role::Up | Role::ExpertUp(_) => true,
        Role::ExpertGate(expert) | Role::ExpertDown(expert) => expert > 0,
        _ => false,
    }
}

impl Params {
    /// The layout of a model's parameters.
    pub(crate) fn new(config: &ModelConfig) -> Self {
        let table = tensor_table(config);
        let mut tensors = Vec::with_capacity(table.len());
        let mut decayed = 0;
        let mut len = 0;
        for decay in [true, false] {
            for spec in table.iter().filter(|spec| spec.decay == decay) {
                if !continues(spec.role) {
                    len = usize::next_multiple_of(len, ALIGNMENT / 2);
                }
                tensors.push((spec, len));
                len += spec.elements();
            }
            len = len.next_multiple_of(ALIGNMENT / 2);
            if decay {
                decayed = len;
            }
        }

        let mut layer_ends = vec![0; config.layers.len()];
        for (spec, offset) in tensors.iter().filter(|(spec, _)| spec.decay) {
            if let Some(end) = spec.block.layer().and_then(|l| layer_ends.get_mut(l)) {
                *end = usize::max(*end, offset + spec.elements());
            }
        }

        // From the first tensor of `first`'s role to the last one of `last`'s.
        let places: HashMap<(Option<usize>, Role), (usize, usize)> =
            tensors.iter().map(|(spec, offset)| ((spec.block.layer(), spec.role), (*offset, spec.elements()))).collect();
        let find = |layer: Option<usize>, first: Role, last: Role| -> Option<Param> {
            let (offset, _) = places.get(&(layer, first))?;
            let (last, len) = places.get(&(layer, last))?;
            Some(Param { offset: *offset, len: last + len - offset })
        };
        let layers = (0..config.layers.len()).map(|l| layer_params(config, l, &find)).collect();
        // These are in every model's table.
        let one = |role| find(None, role, role).unwrap_or_default();
        let embedding = one(Role::Embedding);
        Params {
            embedding,
            layers,
            final_norm: one(Role::FinalNorm),
            head: find(None, Role::LmHead, Role::LmHead).unwrap_or(embedding),
            len,
            decayed,
            layer_ends,
            tensors: tensors.into_iter().map(|(spec, offset)| Tensor { spec: spec.clone(), offset }).collect(),
        }
    }
}

impl Params {
    /// First element and length of each gap between parameters.
    pub(crate) fn gaps(&self) -> Vec<(usize, usize)> {
        let mut gaps = Vec::new();
        let mut end = 0;
        let places = self.tensors.iter().map(|tensor| (tensor.offset, tensor.param().len));
        for (start, len) in places.chain([(self.len, 0)]) {
            if start > end {
                gaps.push((end, start - end));
            }
            end = start + len;
        }
        gaps
    }
}

/// Where layer `l`'s parameters lie.
fn layer_params(
    config: &ModelConfig,
    l: usize,
    find: &impl Fn(Option<usize>, Role, Role) -> Option<Param>,
) -> LayerParams {
    let span = |first, last| find(Some(l), first, last);
    // Which of them a layer has follows from the configuration, as the table does.
    let always = |first, last| span(first, last).unwrap_or_default();
    let one = |role| always(role, role);
    LayerParams {
        input_norm: one(Role::InputNorm),
        qkv: always(Role::QWeight, Role::VWeight),
        qkv_bias: span(Role::QBias, Role::VBias),
        qk_norm: span(Role::QNorm, Role::QNorm).zip(span(Role::KNorm, Role::KNorm)),
        output: one(Role::OWeight),
        output_bias: span(Role::OBias, Role::OBias),
        post_norm: one(Role::PostAttentionNorm),
        mlp: match config.layers[l].mlp {
            Mlp::Dense { .. } => MlpParams::Dense { gate_up: always(Role::Gate, Role::Up), down: one(Role::Down) },
            Mlp::Moe(moe) => {
                let last = moe.num_experts - 1;
                MlpParams::Experts {
                    router: one(Role::Router),
                    gate_up: always(Role::ExpertGate(0), Role::ExpertUp(last)),
                    down: always(Role::ExpertDown(0), Role::ExpertDown(last)),
                }
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn parameters_and_gaps_fill_the_arrays_and_fused_weights_are_whole() {
        for name in ["moe-balance", "window-bias", "qwen2-window"] {
            let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../__test__/golden").join(name);
            let config = ModelConfig::from_dir(&dir).unwrap();
            let params = Params::new(&config);
            let gaps: usize = params.gaps().iter().map(|(_, len)| len).sum();
            assert_eq!(params.tensors.iter().map(|t| t.param().len).sum::<usize>() + gaps, params.len);
            for tensor in &params.tensors {
                assert_eq!(tensor.spec.decay, tensor.offset < params.decayed, "{}", tensor.spec.name);
            }
            let (h, d) = (config.hidden_size, config.head_dim);
            for (layer, shape) in params.layers.iter().zip(&config.layers) {
                assert_eq!(layer.qkv.len, (config.num_attention_heads + 2 * config.num_key_value_heads) * d * h);
                match (layer.mlp, shape.mlp) {
                    (MlpParams::Dense { gate_up, down }, Mlp::Dense { intermediate }) => {
                        assert_eq!((gate_up.len, down.len), (2 * intermediate * h, intermediate * h));
                    }
                    (MlpParams::Experts { gate_up, down, router }, Mlp::Moe(moe)) => {
                        let one = moe.num_experts * moe.moe_intermediate_size * h;
                        assert_eq!((gate_up.len, down.len, router.len), (2 * one, one, moe.num_experts * h));
                    }
                    _ => panic!("{name}: a layer is dense in one and has experts in the other"),
                }
            }
        }
    }
}
