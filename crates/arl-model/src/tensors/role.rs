//! What a parameter is: its role, its name in a layer, and which of the matrices may have an adapter.

/// What a parameter is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// `[vocab, hidden]`; also the head where tied.
    Embedding,
    /// `[hidden]`, before attention or the delta rule.
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
    /// `[channels, hidden]` of the delta rule: queries of all heads, keys, values.
    InProjQkv,
    /// `[value_heads * value_dim, hidden]`: the output gate.
    InProjZ,
    /// `[value_heads, hidden]`: how strongly a token is written.
    InProjB,
    /// `[value_heads, hidden]`: how much is forgotten.
    InProjA,
    /// `[channels, 1, taps]`, depthwise; the last tap meets the token itself.
    Conv1d,
    /// `[value_heads]`: the logarithm of the rate of decay.
    ALog,
    /// `[value_heads]`, added to what [`Role::InProjA`] gives.
    DtBias,
    /// `[value_dim]`, on each value head of the delta rule; centred on one in every family.
    Norm,
    /// `[hidden, value_heads * value_dim]`.
    OutProj,
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
    /// `[shared_intermediate, hidden]` of the expert of every token.
    SharedGate,
    /// `[shared_intermediate, hidden]`.
    SharedUp,
    /// `[hidden, shared_intermediate]`.
    SharedDown,
    /// `[1, hidden]`: the gate of the shared expert's output.
    SharedExpertGate,
    /// `[hidden]`, after the last layer.
    FinalNorm,
    /// `[vocab, hidden]`; absent where tied.
    LmHead,
    /// `[vision hidden, channels, frames, patch, patch]`: the embedding of patches, a product with a patch's numbers.
    VisionPatchWeight,
    /// `[vision hidden]`.
    VisionPatchBias,
    /// `[side * side, vision hidden]`: the tower's learned positions, of which a patch has a weighted sum.
    VisionPositions,
    /// `[vision hidden]`, before a tower block's attention.
    VisionNorm1Weight,
    /// `[vision hidden]`.
    VisionNorm1Bias,
    /// `[vision hidden]`, before a tower block's MLP.
    VisionNorm2Weight,
    /// `[vision hidden]`.
    VisionNorm2Bias,
    /// `[3 * vision hidden, vision hidden]`: queries of all heads, keys, values.
    VisionQkvWeight,
    /// `[3 * vision hidden]`.
    VisionQkvBias,
    /// `[vision hidden, vision hidden]`, of what a tower block's attention gives.
    VisionProjWeight,
    /// `[vision hidden]`.
    VisionProjBias,
    /// `[vision intermediate, vision hidden]`, before GELU.
    VisionFc1Weight,
    /// `[vision intermediate]`.
    VisionFc1Bias,
    /// `[vision hidden, vision intermediate]`, after GELU.
    VisionFc2Weight,
    /// `[vision hidden]`.
    VisionFc2Bias,
    /// `[vision intermediate, vision hidden]`, of a tower with SwiGLU.
    VisionGateWeight,
    /// `[vision intermediate]`.
    VisionGateBias,
    /// `[vision intermediate, vision hidden]`.
    VisionUpWeight,
    /// `[vision intermediate]`.
    VisionUpBias,
    /// `[vision hidden, vision intermediate]`.
    VisionDownWeight,
    /// `[vision hidden]`.
    VisionDownBias,
    /// `[vision hidden]` of the merger, before patches are joined; `[merged]` of a DeepStack merger, after it. Merged is
    /// `merge * merge * vision hidden`.
    VisionMergerNormWeight,
    /// As long as `VisionMergerNormWeight`.
    VisionMergerNormBias,
    /// `[merged, merged]`, before GELU.
    VisionMergerFc1Weight,
    /// `[merged]`.
    VisionMergerFc1Bias,
    /// `[hidden, merged]`, after GELU.
    VisionMergerFc2Weight,
    /// `[hidden]`.
    VisionMergerFc2Bias,
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
    /// Of the delta rule's queries, keys and values.
    InProjQkv,
    /// Of the delta rule's output gate.
    InProjZ,
    /// Of how strongly a token is written.
    InProjB,
    /// Of how much is forgotten.
    InProjA,
    /// Of what the delta rule gives.
    OutProj,
    /// The gate of the shared expert's input.
    SharedGate,
    /// The other half of its input.
    SharedUp,
    /// Of the shared expert's output.
    SharedDown,
    /// The gate of the shared expert's output.
    SharedExpertGate,
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
            Projection::InProjQkv | Projection::InProjZ | Projection::InProjB | Projection::InProjA => 0,
            Projection::Output | Projection::Down | Projection::OutProj => 1,
            Projection::ExpertsGateUp => 2,
            Projection::ExpertsDown => 3,
            Projection::SharedGate | Projection::SharedUp => 4,
            Projection::SharedDown => 5,
            Projection::SharedExpertGate => 6,
            Projection::Router => 7,
            Projection::Head => 8,
            Projection::Embedding => 9,
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
            Projection::InProjQkv => "linear_attn.in_proj_qkv",
            Projection::InProjZ => "linear_attn.in_proj_z",
            Projection::InProjB => "linear_attn.in_proj_b",
            Projection::InProjA => "linear_attn.in_proj_a",
            Projection::OutProj => "linear_attn.out_proj",
            Projection::SharedGate => "mlp.shared_expert.gate_proj",
            Projection::SharedUp => "mlp.shared_expert.up_proj",
            Projection::SharedDown => "mlp.shared_expert.down_proj",
            Projection::SharedExpertGate => "mlp.shared_expert_gate",
            Projection::Router => "mlp.gate",
            Projection::Head => "lm_head",
            Projection::Embedding => "model.embed_tokens",
        }
    }
}

impl Role {
    /// Whether it is the weight of a norm.
    pub fn is_norm(self) -> bool {
        matches!(
            self,
            Role::InputNorm | Role::QNorm | Role::KNorm | Role::Norm | Role::PostAttentionNorm | Role::FinalNorm
        ) || self.is_vision_norm()
    }

    /// Whether it is the weight of a norm of the vision tower.
    pub(crate) fn is_vision_norm(self) -> bool {
        matches!(self, Role::VisionNorm1Weight | Role::VisionNorm2Weight | Role::VisionMergerNormWeight)
    }

    /// Whether it is a bias.
    pub fn is_bias(self) -> bool {
        matches!(self, Role::QBias | Role::KBias | Role::VBias | Role::OBias | Role::DtBias) || self.is_vision_bias()
    }

    fn is_vision_bias(self) -> bool {
        matches!(
            self,
            Role::VisionPatchBias
                | Role::VisionNorm1Bias
                | Role::VisionNorm2Bias
                | Role::VisionQkvBias
                | Role::VisionProjBias
                | Role::VisionFc1Bias
                | Role::VisionFc2Bias
                | Role::VisionGateBias
                | Role::VisionUpBias
                | Role::VisionDownBias
                | Role::VisionMergerNormBias
                | Role::VisionMergerFc1Bias
                | Role::VisionMergerFc2Bias
        )
    }

    /// Whether Hugging Face's Trainer applies weight decay to it: all but norms and biases, by their names. Of the decoder;
    /// the vision tower has rules of its own.
    pub(super) fn is_decayed(self) -> bool {
        !self.is_norm() && !self.is_bias()
    }
}

/// Hugging Face's name of a parameter of the decoder.
pub(super) fn name(role: Role, layer: Option<usize>) -> String {
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
        Role::InProjQkv => "linear_attn.in_proj_qkv.weight",
        Role::InProjZ => "linear_attn.in_proj_z.weight",
        Role::InProjB => "linear_attn.in_proj_b.weight",
        Role::InProjA => "linear_attn.in_proj_a.weight",
        Role::Conv1d => "linear_attn.conv1d.weight",
        Role::ALog => "linear_attn.A_log",
        Role::DtBias => "linear_attn.dt_bias",
        Role::Norm => "linear_attn.norm.weight",
        Role::OutProj => "linear_attn.out_proj.weight",
        Role::PostAttentionNorm => "post_attention_layernorm.weight",
        Role::Gate => "mlp.gate_proj.weight",
        Role::Up => "mlp.up_proj.weight",
        Role::Down => "mlp.down_proj.weight",
        Role::Router => "mlp.gate.weight",
        Role::ExpertGate(expert) => &format!("mlp.experts.{expert}.gate_proj.weight"),
        Role::ExpertUp(expert) => &format!("mlp.experts.{expert}.up_proj.weight"),
        Role::ExpertDown(expert) => &format!("mlp.experts.{expert}.down_proj.weight"),
        Role::SharedGate => "mlp.shared_expert.gate_proj.weight",
        Role::SharedUp => "mlp.shared_expert.up_proj.weight",
        Role::SharedDown => "mlp.shared_expert.down_proj.weight",
        Role::SharedExpertGate => "mlp.shared_expert_gate.weight",
        Role::LoraA(projection) => &format!("{}.lora_A.weight", projection.module()),
        Role::LoraB(projection) => &format!("{}.lora_B.weight", projection.module()),
        Role::LoraMagnitude(projection) => &format!("{}.lora_magnitude_vector", projection.module()),
        // Of the vision tower, which names its own.
        _ => "",
    };
    format!("model.layers.{}.{inner}", layer.unwrap_or_default())
}
