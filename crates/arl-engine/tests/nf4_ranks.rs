//! Weights in 4 bits that ranks divide: bits are those of one rank, and each rank has its piece and what is gathered.

use arl_engine::backend::{DType, DeviceKind};
use arl_engine::{EngineOptions, Mesh, Nf4Options, Recompute, Weights, plan_memory};
use serde_json::{Value, json};

use crate::common::alone::{expect_alone, with_room};
use crate::common::ranks::{
    adapted, fingerprints, hybrid, on_ranks, state, step, uneven_steps, with_adapters, with_other_weights,
};
use crate::common::{altered, model, options};

fn in_nf4(base: EngineOptions, nested: bool, zero: u8) -> EngineOptions {
    EngineOptions { load_in_4bit: Some(Nf4Options { nested }), zero, ..base }
}

#[test]
fn training_keeps_the_bits_of_one_rank() {
    let hybrid = hybrid();
    let hybrid = hybrid.path().display().to_string();
    let base = |dtype| options(dtype, Recompute::Norms, 33);
    // The first layer has none but frozen weights; magnitudes begin with rows that no rank has all of.
    let last = r#"{"target_modules": ["q_proj", "up_proj"], "r": 3, "lora_alpha": 6, "layers_to_transform": [1]}"#;
    let magnitudes = r#"{"target_modules": "all-linear", "r": 3, "lora_alpha": 6, "use_dora": true}"#;
    let cases = [
        ("window-bias", with_adapters("window-bias", base(DType::Bf16))),
        ("window-bias", adapted(last, base(DType::F32))),
        ("window-bias", adapted(magnitudes, base(DType::F32))),
        (hybrid.as_str(), with_adapters("hybrid", base(DType::F32))),
    ];
    for (name, base) in cases {
        for nested in [false, true] {
            let run = |size: usize, zero: u8| {
                let options = in_nf4(base.clone(), nested, zero);
                on_ranks(name, &options, size, Weights::Random(7), |engine, rank| {
                    let figures: Vec<String> =
                        uneven_steps().iter().map(|batches| step(engine, batches, rank, size)).collect();
                    (figures, state(engine))
                })
            };
            let one = run(1, 0).remove(0);
            for (size, zero) in [(1, 3), (2, 2), (2, 3), (3, 3), (4, 3)] {
                let same = run(size, zero).iter().all(|found| *found == one);
                assert!(same, "{name} {:?} {nested}: {size} ranks, zero {zero}", base.dtype);
            }
        }
    }
}

/// Of a model of many layers a rank has its share, and places for two.
#[test]
fn a_rank_has_its_piece_and_two_layers() {
    let dir = altered(
        "window-bias",
        json!({ "num_hidden_layers": 16, "hidden_size": 256, "intermediate_size": 1024, "layer_types": null }),
    );
    let base = with_adapters("window-bias", options(DType::Bf16, Recompute::Norms, 33));
    for nested in [false, true] {
        let deep = |size: usize, zero: u8| {
            let options = EngineOptions { data_parallel: Some(size), ..in_nf4(base.clone(), nested, zero) };
            let plan = plan_memory(dir.path(), &options, DeviceKind::Cpu).unwrap();
            let of = |name: &str| plan.categories.iter().find(|(other, _)| *other == name).map_or(0, |found| found.1);
            (of("weights in 4 bits"), of("gathered weights in 4 bits"))
        };
        let (whole, none) = deep(4, 2);
        assert_eq!(none, 0);
        let (piece, places) = deep(4, 3);
        let share = |bytes: usize, of: usize| bytes as f64 * of as f64 / whole as f64;
        assert!((1.0..1.02).contains(&share(piece, 4)), "{nested}: a piece is {piece} bytes of {whole}");
        assert!((1.0..1.05).contains(&share(places, 8)), "{nested}: places are {places} bytes of {whole}");
    }
}

/// Changes the sign of a linear layer's first weight, in the bytes of a file of weights.
fn change_a_sign(bytes: &mut [u8]) {
    let data = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..data]).unwrap();
    let first = header["model.layers.1.mlp.up_proj.weight"]["data_offsets"][0].as_u64().unwrap();
    bytes[data + first as usize + 3] ^= 0x80;
}

#[test]
fn ranks_that_have_quantized_other_weights_know_it() {
    let (own, other) = (model("window-bias"), with_other_weights("window-bias", change_a_sign));
    for zero in [0, 3] {
        let base = with_adapters("window-bias", options(DType::F32, Recompute::Norms, 33));
        let options = in_nf4(base, true, zero);
        let [one, same] = fingerprints(&options, [&own, &own]);
        assert_eq!(one, same, "zero {zero}");
        let [one, differs] = fingerprints(&options, [&own, other.path()]);
        assert_ne!(one, differs, "zero {zero}");
    }
}

/// Alone or in a mesh that divides the model too.
#[test]
fn rank_0_computes_alone_with_pieces_of_all() {
    let hybrid = hybrid();
    let options = with_adapters("hybrid", options(DType::F32, Recompute::Norms, 33));
    let options = with_room(in_nf4(options, true, 3));
    let mesh = |tp, ep, pp| Mesh { tp, ep, pp, ..Mesh::default() };
    for at in [(2, mesh(1, 1, 1)), (3, mesh(1, 1, 1)), (2, mesh(2, 1, 1)), (2, mesh(1, 2, 1))] {
        expect_alone(&hybrid.path().display().to_string(), &options, Weights::Random(7), at, 1e-4);
    }
}
