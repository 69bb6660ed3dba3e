//! Together the ranks of a mesh have every element of a model, each as often as it should be, and own it once.

use std::collections::HashMap;
use std::path::Path;

use arl_model::{Lora, LoraConfig, ModelConfig, tensor_table};
use serde_json::{Value, json};

use super::*;
use crate::mesh::Mesh;
use crate::placement::Placement;
use crate::placement::cut::{Cut, owned};

/// A dense model with biases whose head is its embedding, and a hybrid with experts.
pub(crate) fn models() -> [(&'static str, Value); 2] {
    let dense = json!({
        "model_type": "qwen2", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 10, "num_hidden_layers": 3,
        "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": true,
    });
    let hybrid = json!({
        "model_type": "qwen3_next", "vocab_size": 32, "hidden_size": 12, "intermediate_size": 10, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "tie_word_embeddings": false,
        "linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 6, "linear_value_head_dim": 10,
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 6, "shared_expert_intermediate_size": 5,
        "norm_topk_prob": true, "mlp_only_layers": [1], "decoder_sparse_step": 1,
    });
    [("dense", dense), ("hybrid", hybrid)]
}

pub(crate) fn config(model: &Value) -> ModelConfig {
    ModelConfig::from_json(&model.to_string(), Path::new("config.json")).unwrap()
}

/// Meshes and data-parallel ranks that divide a model; experts where it has some.
fn meshes(experts: bool) -> Vec<(Mesh, usize)> {
    let ep = |ep: usize| if experts { ep } else { 1 };
    let one = Mesh::default();
    vec![
        (one, 1),
        (Mesh { tp: 2, ..one }, 3),
        (Mesh { ep: ep(4), ..one }, 4),
        (Mesh { tp: 2, cp: 2, ep: ep(2), ..one }, 1),
        (Mesh { pp: 3, ..one }, 2),
        (Mesh { tp: 2, ep: ep(2), pp: 2, ..one }, 2),
        (Mesh { dp_replicate: 3, ..one }, 6),
        (Mesh { tp: 2, cp: 2, ep: ep(2), dp_replicate: 2, ..one }, 4),
    ]
}

#[test]
fn every_element_is_held_by_the_ranks_that_should_and_owned_by_one() {
    for (name, model) in models() {
        let config = config(&model);
        // One product takes all experts of a layer.
        let frozen = ["*embed*", "model.layers.0.*", "model.layers.2.mlp.experts.*", "*o_proj*"];
        let frozen = frozen.iter().take(if name == "hybrid" { 4 } else { 2 }).map(|pattern| (*pattern).to_owned());
        let some: Vec<String> = frozen.collect();
        for (mesh, data) in meshes(name == "hybrid") {
            for divides_weights in [false, mesh.pp == 1] {
                for frozen in [&[][..], &some] {
                    let placement = |place: &Place| Placement::new(&config, frozen, false, place).unwrap();
                    check_mesh(&tensor_table(&config), &placement, (mesh, data), divides_weights);
                }
                for lora in loras(&config) {
                    let placement = |place: &Place| Placement::adapted(&lora, false, true, place).unwrap();
                    check_mesh(&lora.table, &placement, (mesh, data), divides_weights && !lora.config.use_dora);
                }
            }
        }
    }
}

/// Adapters of every kind of layer; and magnitudes, next to biases and a head of its own that are trained.
fn loras(config: &ModelConfig) -> [Lora; 2] {
    let experts = config.moe.is_some();
    // Adapters of fused projections are none.
    let modules = if experts { r".*(self_attn\.[qkvo]_proj|out_proj|shared_expert_gate)" } else { r".*_proj" };
    let parameters: &[&str] = if experts { &["experts.gate_up_proj", "experts.down_proj", "gate.weight"] } else { &[] };
    let all = json!({ "target_modules": modules, "target_parameters": parameters, "r": 3 });
    let dora = json!({
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "r": 2, "use_dora": true, "bias": "lora_only",
        "modules_to_save": ["lm_head"],
    });
    [all, dora].map(|text| {
        let text = LoraConfig::from_json(&text.to_string(), Path::new("adapter_config.json")).unwrap();
        Lora::new(config, &text).unwrap()
    })
}

fn check_mesh(
    table: &[TensorSpec],
    placement: &dyn Fn(&Place) -> Placement,
    (mesh, data): (Mesh, usize),
    divides_weights: bool,
) {
    let zeros = || table.iter().map(|spec| (spec.name.clone(), vec![0; spec.elements()]));
    let (mut held, mut owners): (HashMap<String, Vec<usize>>, HashMap<String, Vec<usize>>) =
        (zeros().collect(), zeros().collect());
    let place = Place::new(mesh, data, 0).unwrap();
    let ranks: Vec<(Placement, Cut)> = (0..place.world())
        .map(|rank| {
            let placement = placement(&Place { rank, ..place });
            let cut = Cut::new(&placement, true);
            let cut = if divides_weights { cut.with_weights(&placement) } else { cut };
            (placement, cut)
        })
        .collect();
    for (placement, cut) in &ranks {
        let names: Vec<&String> = ranks[0].0.table().into_iter().map(|spec| &spec.name).collect();
        assert_eq!(placement.table().into_iter().map(|spec| &spec.name).collect::<Vec<_>>(), names);
        for tensor in &placement.tensors {
            let len = tensor.param.len;
            assert_eq!(tensor.slice.elements(), len);
            let held = held.get_mut(&tensor.spec.name).unwrap();
            tensor.slice.runs(0..len).into_iter().flatten().for_each(|i| held[i] += 1);
            if tensor.copied {
                continue;
            }
            let owners = owners.get_mut(&tensor.spec.name).unwrap();
            for part in owned(Some(cut), tensor.param, placement.place.rank) {
                let runs = tensor.slice.runs(part.start..part.start + part.len);
                runs.into_iter().flatten().for_each(|i| owners[i] += 1);
            }
        }
        // Ranks of an axis have equal pieces of a bucket, and a bucket is of one axis.
        for (i, bucket) in cut.buckets.iter().enumerate() {
            for rank in placement.place.members(bucket.axis) {
                let other = &ranks[rank].1.buckets[i];
                assert_eq!((other.axis, other.len, other.own), (bucket.axis, bucket.len, bucket.own));
            }
            let inside = |param: &crate::placement::Param| {
                param.trained.is_some_and(|first| (bucket.start..bucket.start + bucket.len).contains(&first))
            };
            let mut within = placement.tensors.iter().filter(|tensor| inside(&tensor.param));
            assert!(within.all(|tensor| tensor.param.axis == bucket.axis && tensor.copied == bucket.copied));
        }
    }
    let tied = table.iter().all(|spec| spec.role != Role::LmHead);
    for spec in table {
        let axis = place.axis_of(spec.role);
        let copies = if tied && spec.block == Block::Embedding && mesh.pp > 1 { 2 } else { 1 };
        let times = place.size(axis) * copies;
        assert!(held[&spec.name].iter().all(|&count| count == times), "{mesh:?} {data}: {} {times}", spec.name);
        assert!(owners[&spec.name].iter().all(|&count| count == 1), "{mesh:?} {data}: {}", spec.name);
    }
}

#[test]
fn a_mesh_that_does_not_fit_the_model_is_refused_with_both_numbers() {
    let [(_, dense), (_, hybrid)] = models();
    let message = |model: &Value, mesh: Mesh, base: &EngineOptions| {
        let options = EngineOptions { mesh, ..base.clone() };
        let error = check(&config(model), &options).unwrap_err();
        assert!(error.code == ErrorCode::Config && !error.hint.is_empty());
        error.message
    };
    let base = EngineOptions { data_parallel: Some(12), zero: 2, ..EngineOptions::default() };
    let one = Mesh::default();
    assert_eq!(message(&dense, Mesh { tp: 8, ..one }, &base), "tp_size is 8, and does not divide the 4 key heads");
    let of_rule = message(&hybrid, Mesh { tp: 8, ..one }, &base);
    assert_eq!(of_rule, "tp_size is 8, and does not divide the 4 key heads of the delta rule");
    let mut narrow = dense.clone();
    narrow["intermediate_size"] = 9.into();
    let columns = message(&narrow, Mesh { tp: 2, ..one }, &base);
    assert_eq!(columns, "tp_size is 2, and does not divide the 9 columns of intermediate_size");
    let experts = message(&hybrid, Mesh { ep: 3, ..one }, &base);
    assert_eq!(experts, "ep_size is 3, and does not divide the 4 experts of a layer");
    assert_eq!(message(&dense, Mesh { ep: 2, ..one }, &base), "ep_size is 2, and the model has no experts");
    assert_eq!(message(&dense, Mesh { pp: 4, ..one }, &base), "pp_size is 4, and the model has 3 layers");
    let (two, stages) = (Mesh { tp: 2, ..one }, Mesh { tp: 2, pp: 2, ..one });
    let zero = |zero| EngineOptions { zero, ..base.clone() };
    assert_eq!(message(&dense, two, &zero(0)), "zero 0 cannot be combined with tp_size 2");
    assert_eq!(message(&dense, stages, &zero(3)), "zero 3 cannot be combined with tp_size 2 and pp_size 2");
    assert!(check(&config(&dense), &EngineOptions { mesh: Mesh { cp: 2, ..one }, ..zero(0) }).is_ok());
}

#[test]
fn blocks_of_weights_in_4_bits_are_not_cut() {
    let [(_, mut dense), _] = models();
    let check = |dense: &Value, tp: usize| {
        let place = Place::new(Mesh { tp, ..Mesh::default() }, 1, 0).unwrap();
        let lora = LoraConfig::from_json(r#"{"target_modules": ["q_proj"]}"#, Path::new("a.json")).unwrap();
        let lora = Lora::new(&config(dense), &lora).unwrap();
        check_blocks(&Placement::adapted(&lora, true, false, &place).unwrap()).map_err(|error| error.message)
    };
    let message = "load_in_4bit with tp_size 2 gives a rank 16 x 8 of `model.layers.0.self_attn.o_proj.weight`, which are no whole \
                   blocks of 64";
    assert_eq!((check(&dense, 1), check(&dense, 2)), (Ok(()), Err(message.to_owned())));
    for (key, value) in [("hidden_size", 128), ("intermediate_size", 128)] {
        dense[key] = value.into();
    }
    assert_eq!(check(&dense, 2), Ok(()));
}
