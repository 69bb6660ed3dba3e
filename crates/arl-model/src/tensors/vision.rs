//! The tensors of a vision tower: their order, shapes and names. Ranks do not divide them.

use super::{Block, Role, Shard, Visitor};
use crate::config::{VisionConfig, VisionKind};

/// Calls `add` for every parameter of the tower, in the order of their places in memory: the embedding of patches, block by block,
/// the merger, the mergers of DeepStack.
pub(super) fn visit(vision: &VisionConfig, add: &mut Visitor<'_>) {
    let (width, patch) = (vision.hidden_size, vision.patch_size);
    let mut embed = |role, shape: &[usize]| add(role, Block::VisionEmbed, shape, Shard::Whole);
    embed(Role::VisionPatchWeight, &[width, vision.in_channels, vision.temporal_patch_size, patch, patch]);
    if vision.kind == VisionKind::Qwen3 {
        embed(Role::VisionPatchBias, &[width]);
    }
    if let Some(rows) = vision.num_position_embeddings {
        embed(Role::VisionPositions, &[rows, width]);
    }
    for index in 0..vision.depth {
        visit_block(vision, index, add);
    }
    visit_merger(vision, Block::VisionMerger, width, add);
    for index in 0..vision.deepstack_visual_indexes.len() {
        visit_merger(vision, Block::DeepStack(index), vision.merged_size(), add);
    }
}

pub(super) fn visit_block(vision: &VisionConfig, index: usize, add: &mut Visitor<'_>) {
    let (width, inner) = (vision.hidden_size, vision.intermediate_size);
    let biased = vision.kind == VisionKind::Qwen3;
    let mut add = |role, shape: &[usize]| add(role, Block::Vision(index), shape, Shard::Whole);
    add(Role::VisionNorm1Weight, &[width]);
    if biased {
        add(Role::VisionNorm1Bias, &[width]);
    }
    add(Role::VisionQkvWeight, &[3 * width, width]);
    add(Role::VisionQkvBias, &[3 * width]);
    add(Role::VisionProjWeight, &[width, width]);
    add(Role::VisionProjBias, &[width]);
    add(Role::VisionNorm2Weight, &[width]);
    match vision.kind {
        VisionKind::Qwen3 => {
            add(Role::VisionNorm2Bias, &[width]);
            add(Role::VisionFc1Weight, &[inner, width]);
            add(Role::VisionFc1Bias, &[inner]);
            add(Role::VisionFc2Weight, &[width, inner]);
            add(Role::VisionFc2Bias, &[width]);
        }
        VisionKind::Qwen2_5 => {
            // One product computes both halves: their weights are adjacent, and their biases.
            add(Role::VisionGateWeight, &[inner, width]);
            add(Role::VisionUpWeight, &[inner, width]);
            add(Role::VisionGateBias, &[inner]);
            add(Role::VisionUpBias, &[inner]);
            add(Role::VisionDownWeight, &[width, inner]);
            add(Role::VisionDownBias, &[width]);
        }
    }
}

/// `normed` is the width of what its norm reads: one patch, or the joined ones.
fn visit_merger(vision: &VisionConfig, block: Block, normed: usize, add: &mut Visitor<'_>) {
    let (merged, out) = (vision.merged_size(), vision.out_hidden_size);
    let mut add = |role, shape: &[usize]| add(role, block, shape, Shard::Whole);
    add(Role::VisionMergerNormWeight, &[normed]);
    if vision.kind == VisionKind::Qwen3 {
        add(Role::VisionMergerNormBias, &[normed]);
    }
    add(Role::VisionMergerFc1Weight, &[merged, merged]);
    add(Role::VisionMergerFc1Bias, &[merged]);
    add(Role::VisionMergerFc2Weight, &[out, merged]);
    add(Role::VisionMergerFc2Bias, &[out]);
}

/// Whether Hugging Face's Trainer applies weight decay to a parameter of the tower. Names decide: Qwen2.5-VL's RMSNorms are called
/// `norm1`, `norm2` and `ln_q`, which no rule covers; `nn.LayerNorm` is covered by its class.
pub(super) fn is_decayed(kind: VisionKind, role: Role) -> bool {
    !role.is_bias() && (kind == VisionKind::Qwen2_5 || !role.is_vision_norm())
}

/// This program's name of a parameter of the tower, which is that of transformers 5.
pub(super) fn name(kind: VisionKind, role: Role, block: Block) -> Option<String> {
    let old = kind == VisionKind::Qwen2_5;
    let inner = match role {
        Role::VisionPatchWeight => "patch_embed.proj.weight",
        Role::VisionPatchBias => "patch_embed.proj.bias",
        Role::VisionPositions => "pos_embed.weight",
        Role::VisionNorm1Weight => "norm1.weight",
        Role::VisionNorm1Bias => "norm1.bias",
        Role::VisionNorm2Weight => "norm2.weight",
        Role::VisionNorm2Bias => "norm2.bias",
        Role::VisionQkvWeight => "attn.qkv.weight",
        Role::VisionQkvBias => "attn.qkv.bias",
        Role::VisionProjWeight => "attn.proj.weight",
        Role::VisionProjBias => "attn.proj.bias",
        Role::VisionFc1Weight => "mlp.linear_fc1.weight",
        Role::VisionFc1Bias => "mlp.linear_fc1.bias",
        Role::VisionFc2Weight => "mlp.linear_fc2.weight",
        Role::VisionFc2Bias => "mlp.linear_fc2.bias",
        Role::VisionGateWeight => "mlp.gate_proj.weight",
        Role::VisionGateBias => "mlp.gate_proj.bias",
        Role::VisionUpWeight => "mlp.up_proj.weight",
        Role::VisionUpBias => "mlp.up_proj.bias",
        Role::VisionDownWeight => "mlp.down_proj.weight",
        Role::VisionDownBias => "mlp.down_proj.bias",
        Role::VisionMergerNormWeight if old => "ln_q.weight",
        Role::VisionMergerNormWeight => "norm.weight",
        Role::VisionMergerNormBias => "norm.bias",
        Role::VisionMergerFc1Weight if old => "mlp.0.weight",
        Role::VisionMergerFc1Weight => "linear_fc1.weight",
        Role::VisionMergerFc1Bias if old => "mlp.0.bias",
        Role::VisionMergerFc1Bias => "linear_fc1.bias",
        Role::VisionMergerFc2Weight if old => "mlp.2.weight",
        Role::VisionMergerFc2Weight => "linear_fc2.weight",
        Role::VisionMergerFc2Bias if old => "mlp.2.bias",
        Role::VisionMergerFc2Bias => "linear_fc2.bias",
        _ => return None,
    };
    Some(match block {
        Block::Vision(index) => format!("model.visual.blocks.{index}.{inner}"),
        Block::VisionMerger => format!("model.visual.merger.{inner}"),
        Block::DeepStack(index) => format!("model.visual.deepstack_merger_list.{index}.{inner}"),
        _ => format!("model.visual.{inner}"),
    })
}
