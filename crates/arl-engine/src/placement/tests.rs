//! Places cover the arenas, and frozen parameters have none in the optimizer's.

use std::path::Path;

use arl_model::{Block, ErrorCode, Mlp, Role, Shard};

use super::freeze::matches;
use super::*;
use crate::mesh::Mesh;

fn config(name: &str) -> ModelConfig {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../__test__/golden").join(name);
    ModelConfig::from_dir(&dir).unwrap()
}

fn alone() -> Place {
    Place::new(Mesh::default(), 1, 0).unwrap()
}

fn frozen(patterns: &[&str]) -> Vec<String> {
    patterns.iter().map(|pattern| (*pattern).to_owned()).collect()
}

const MODELS: [&str; 3] = ["moe-balance", "window-bias", "qwen2-window"];

#[test]
fn parameters_and_gaps_fill_both_arenas_alike_where_all_are_trained() {
    for name in MODELS {
        let placement = Placement::new(&config(name), &[], false, &alone()).unwrap();
        let gaps: usize = placement.gaps().iter().map(|gap| gap.len).sum();
        assert_eq!(placement.tensors.iter().map(|tensor| tensor.param.len).sum::<usize>() + gaps, placement.weights);
        assert_eq!((placement.weights, placement.lowest_layer), (placement.optimizer, 0));
        let [decayed, others] = placement.runs[..] else { panic!("{name}: {:?}", placement.runs) };
        assert_eq!((decayed.weights, decayed.optimizer, decayed.decay), (0, 0, true));
        assert_eq!((others.weights, others.optimizer, others.decay), (decayed.len, decayed.len, false));
        assert_eq!(decayed.len + others.len, placement.weights);
        for Tensor { spec, param, .. } in &placement.tensors {
            assert_eq!(param.trained, Some(param.offset), "{}", spec.name);
            assert_eq!(spec.decay, param.offset < decayed.len, "{}", spec.name);
        }
        for gap in placement.gaps() {
            assert_eq!(gap.trained, Some(gap.offset));
        }
    }
}

#[test]
fn what_one_product_takes_is_one_span() {
    for name in MODELS {
        let config = config(name);
        let placement = Placement::new(&config, &[], false, &alone()).unwrap();
        let (h, d) = (config.hidden_size, config.head_dim);
        let len = |block, first, last| placement.span(block, first, last).map(|param| param.len);
        for (l, layer) in config.layers.iter().enumerate() {
            let rows = (config.num_attention_heads + 2 * config.num_key_value_heads) * d;
            assert_eq!(len(Block::Attention(l), Role::QWeight, Role::VWeight), Some(rows * h));
            match layer.mlp {
                Mlp::Dense { intermediate } => {
                    assert_eq!(len(Block::Mlp(l), Role::Gate, Role::Up), Some(2 * intermediate * h));
                }
                Mlp::Moe(moe) => {
                    let (last, one) = (moe.num_experts - 1, moe.moe_intermediate_size * h);
                    let gate_up = len(Block::Experts(l), Role::ExpertGate(0), Role::ExpertUp(last));
                    let down = len(Block::Experts(l), Role::ExpertDown(0), Role::ExpertDown(last));
                    assert_eq!((gate_up, down), (Some(2 * moe.num_experts * one), Some(moe.num_experts * one)));
                }
            }
        }
    }
}

#[test]
fn frozen_parameters_have_no_place_in_the_optimizers_arena() {
    for name in MODELS {
        let whole = Placement::new(&config(name), &[], false, &alone()).unwrap();
        let patterns = frozen(&["*embed*", "model.layers.0.*", "*.o_proj.weight"]);
        let placement = Placement::new(&config(name), &patterns, false, &alone()).unwrap();
        assert_eq!((placement.weights, placement.lowest_layer), (whole.weights, 1), "{name}");
        let mut covered = vec![0; placement.optimizer];
        for (Tensor { spec, param, .. }, before) in placement.tensors.iter().zip(&whole.tensors) {
            assert_eq!((param.offset, param.len), (before.param.offset, before.param.len), "{}", spec.name);
            let matched =
                spec.name.contains("embed") || spec.name.contains("layers.0.") || spec.name.contains("o_proj.w");
            assert_eq!(param.trained.is_none(), matched, "{}", spec.name);
            let Some(first) = param.trained else { continue };
            covered[first..first + param.len].iter_mut().for_each(|count| *count += 1);
            // One run has it at its places in both arenas, and decays it if it is to be decayed.
            let run =
                placement.runs.iter().find(|run| (run.optimizer..run.optimizer + run.len).contains(&first)).unwrap();
            assert_eq!((param.offset - run.weights, spec.decay), (first - run.optimizer, run.decay), "{}", spec.name);
            assert!(first + param.len <= run.optimizer + run.len, "{}", spec.name);
        }
        for gap in placement.gaps() {
            let first = gap.trained.unwrap();
            covered[first..first + gap.len].iter_mut().for_each(|count| *count += 1);
        }
        assert!(covered.iter().all(|&count| count == 1), "{name}");
        // A run touches no frozen weight.
        for run in &placement.runs {
            for Tensor { spec, param, .. } in placement.tensors.iter().filter(|tensor| tensor.param.trained.is_none()) {
                let apart = param.offset >= run.weights + run.len || param.offset + param.len <= run.weights;
                assert!(apart, "{name}: an update would touch {}", spec.name);
            }
        }
    }
}

#[test]
fn the_rest_of_some_parameters_is_everything_else() {
    let placement = Placement::new(&config("window-bias"), &frozen(&["*embed*"]), false, &alone()).unwrap();
    let products: Vec<Param> =
        placement.tensors.iter().filter(|tensor| tensor.spec.shape.len() == 2).map(|tensor| tensor.param).collect();
    let mut covered = vec![0; placement.optimizer];
    let taken = products.iter().filter_map(|param| param.trained.map(|first| (first, param.len)));
    for (first, len) in placement.all_but(&products).into_iter().chain(taken) {
        covered[first..first + len].iter_mut().for_each(|count| *count += 1);
    }
    assert!(covered.iter().all(|&count| count == 1));
}

#[test]
fn patterns_that_match_nothing_or_a_part_of_a_product_or_everything_are_refused() {
    let refused = |patterns: &[&str]| {
        let error = Placement::new(&config("window-bias"), &frozen(patterns), false, &alone()).unwrap_err();
        assert_eq!(error.code, ErrorCode::Config);
        error.message
    };
    assert!(refused(&["*", "*visual*"]).contains("no parameter is called `*visual*`"));
    let part = refused(&["*.1.self_attn.k_proj.weight"]);
    assert!(part.contains("`model.layers.1.self_attn.k_proj.weight` is frozen and `"), "{part}");
    assert!(refused(&["*"]).contains("no parameter is left to train"));
    assert!(matches("a*b*c", "a.b.b.c") && !matches("a*b*c", "a.c") && matches("*", "") && !matches("a", "ab"));
}

#[test]
fn every_parameter_of_a_product_may_be_divided_alike() {
    for name in MODELS {
        for pair in tensor_table(&config(name)).windows(2).filter(|pair| continues(Some(&pair[0]), &pair[1])) {
            let kind = |spec: &TensorSpec| std::mem::discriminant(&spec.shard);
            assert_eq!(kind(&pair[0]), kind(&pair[1]), "{} and {}", pair[0].name, pair[1].name);
            assert_ne!(pair[1].shard, Shard::Whole, "{}", pair[1].name);
        }
    }
}
