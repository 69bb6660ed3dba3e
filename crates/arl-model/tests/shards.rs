//! How ranks divide parameters: together they have every element once, and a model that does not divide is noticed.

use std::path::Path;

use arl_model::{Block, ModelConfig, Role, Shard, TensorSpec, tensor_table};
use serde_json::{Value, json};

fn table(extra: &Value, gate: bool) -> Vec<TensorSpec> {
    let mut config = json!({
        "model_type": "qwen3_moe", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4, "attention_bias": true, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 8, "mlp_only_layers": [1],
    });
    for (key, value) in extra.as_object().unwrap() {
        config[key] = value.clone();
    }
    let config = ModelConfig::from_json(&config.to_string(), Path::new("config.json")).unwrap();
    tensor_table(&ModelConfig { attention_gate: gate, ..config })
}

/// A hybrid model, with layers of the delta rule.
fn hybrid() -> Vec<TensorSpec> {
    let hybrid = json!({
        "model_type": "qwen3_next", "linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 6,
        "linear_value_head_dim": 10, "shared_expert_intermediate_size": 8, "num_hidden_layers": 4, "attention_bias": false,
        "partial_rotary_factor": 0.5,
    });
    table(&hybrid, true)
}

/// How often each element of a parameter is in one of the ranks' slices.
fn covered(spec: &TensorSpec, ranks: usize) -> Vec<usize> {
    let mut count = vec![0; spec.elements()];
    for rank in 0..ranks {
        let slice = spec.slice(rank, ranks).unwrap();
        // Counted in two parts, as pieces of it are.
        let (len, third) = (slice.elements(), slice.elements() / 3);
        let runs = [slice.runs(0..third), slice.runs(third..len)].concat();
        assert_eq!(runs.iter().map(std::ops::Range::len).sum::<usize>(), len);
        runs.into_iter().flatten().for_each(|i| count[i] += 1);
    }
    count
}

#[test]
fn the_ranks_slices_cover_each_parameter_once_and_whole_ones_on_every_rank() {
    for spec in [table(&json!({}), false), table(&json!({}), true), hybrid()].concat() {
        for ranks in [1, 2, 4] {
            let times = if spec.shard == Shard::Whole { ranks } else { 1 };
            assert!(covered(&spec, ranks).iter().all(|&count| count == times), "{} over {ranks}", spec.name);
        }
    }
}

#[test]
fn heads_stay_whole_and_products_meet_the_same_channels() {
    let gated = table(&json!({}), true);
    let find = |role: Role| gated.iter().find(|spec| spec.role == role).unwrap();
    // Two heads of 4 query rows and 4 gate rows; the columns of the output projection are the same two heads.
    let (query, output) = (find(Role::QWeight).slice(1, 4).unwrap(), find(Role::OWeight).slice(1, 4).unwrap());
    assert_eq!((&query.rows[0], query.columns), (&(16..32), 0..16));
    assert_eq!((&output.rows[0], output.columns), (&(0..16), 8..16));
    let (up, down) = (find(Role::Up).slice(1, 2).unwrap(), find(Role::Down).slice(1, 2).unwrap());
    assert_eq!(up.rows, [down.columns]);
    assert_eq!(find(Role::ExpertDown(2)).slice(0, 2).unwrap().elements(), 0);
    assert_eq!(find(Role::ExpertDown(2)).slice(1, 2).unwrap().elements(), 16 * 8);
    // Of the delta rule, the second pair of key heads and what belongs to it: its queries, keys, values and decays.
    let hybrid = hybrid();
    let find = |role: Role| hybrid.iter().find(|spec| spec.role == role).unwrap().slice(1, 2).unwrap();
    assert_eq!(find(Role::InProjQkv).rows, vec![12..24, 36..48, 88..128]);
    assert_eq!(find(Role::Conv1d).rows, vec![12..24, 36..48, 88..128]);
    assert_eq!((&find(Role::ALog).rows[0], find(Role::OutProj).columns), (&(4..8), 40..80));
}

#[test]
fn what_cannot_be_divided_evenly_has_no_slice() {
    for spec in table(&json!({"num_experts": 3}), false) {
        let divides = match (spec.shard, spec.role) {
            (Shard::Whole, _) => true,
            // 4 key heads over 8 ranks; 3 experts over 8.
            (Shard::Expert { .. }, _) | (_, Role::KWeight | Role::VWeight | Role::KBias | Role::VBias) => false,
            _ => true,
        };
        assert_eq!(spec.slice(0, 8).is_some(), divides, "{}", spec.name);
    }
}

#[test]
fn every_parameter_belongs_to_the_block_that_its_name_says() {
    for spec in table(&json!({}), false) {
        let layer = spec.block.layer();
        let expected = match spec.name.trim_start_matches(|c| c != '.').trim_start_matches('.') {
            "embed_tokens.weight" => Block::Embedding,
            "norm.weight" => Block::FinalNorm,
            "weight" => Block::Head,
            name if name.contains("self_attn") || name.contains("input_layernorm") => Block::Attention(layer.unwrap()),
            name if name.starts_with("layers.1") => Block::Mlp(1),
            _ => Block::Experts(0),
        };
        assert_eq!(spec.block, expected, "{}", spec.name);
    }
}
