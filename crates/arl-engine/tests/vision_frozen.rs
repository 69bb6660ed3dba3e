//! Models that see of which parts are frozen, adapted, or left out.

use crate::common;
use crate::common::vision;

use arl_engine::backend::DType;
use arl_engine::backend::cpu::CpuBackend;
use arl_engine::{Engine, EngineOptions, Kind, LoraOptions, Recompute, Weights};
use arl_model::LoraConfig;
use common::{HYPER, all};
use vision::{SEEING, batch, batches, bits, f32_room, folder, names, of_text, open, room};

#[test]
fn what_is_frozen_stays_and_the_others_gradients_are_those_of_a_full_run_in_bits() {
    let patterns: [&[&str]; 6] = [
        &["model.visual.*"],
        &["model.visual.blocks.*", "model.visual.patch_embed.*"],
        &["model.visual.merger.*"],
        &["model.visual.blocks.0.*", "model.visual.patch_embed.*"],
        &["model.layers.*", "model.embed_tokens.weight", "model.norm.weight"],
        &["model.layers.*", "model.embed_tokens.weight", "model.norm.weight", "model.visual.blocks.*"],
    ];
    for name in SEEING {
        let batches = batches();
        for patterns in patterns {
            let mut frozen: Vec<String> = patterns.iter().map(|pattern| (*pattern).to_owned()).collect();
            let mut full = open(name, &f32_room(&batches));
            let names = full.tensor_names();
            if patterns[0].starts_with("model.layers") && names.iter().any(|name| name == "lm_head.weight") {
                frozen.push("lm_head.weight".to_owned());
            }
            if patterns[0].contains("blocks") && names.iter().any(|name| name.contains("pos_embed")) {
                frozen.push("model.visual.pos_embed.*".to_owned());
            }
            full.gradients(&batches).unwrap();
            for recompute in [Recompute::Off, Recompute::Block] {
                let options = EngineOptions { frozen: frozen.clone(), recompute, ..f32_room(&batches) };
                let mut part = open(name, &options);
                let is_frozen =
                    |name: &String| frozen.iter().any(|pattern| name.starts_with(pattern.trim_end_matches('*')));
                let (kept, trained): (Vec<String>, Vec<String>) = names.iter().cloned().partition(is_frozen);
                assert!(!kept.is_empty() && !trained.is_empty());
                part.gradients(&batches).unwrap();
                let same = bits(&mut part, &trained, Kind::Gradients) == bits(&mut full, &trained, Kind::Gradients);
                assert!(same, "{name} {recompute:?} {patterns:?}");
                let before = bits(&mut part, &kept, Kind::Weights);
                part.step(&batches, HYPER).unwrap();
                assert!(bits(&mut part, &kept, Kind::Weights) == before, "{name} {patterns:?}");
                assert!(part.read_tensor(&kept[0], Kind::Moment1).unwrap_err().message.contains("is frozen"));
            }
        }
    }
}

#[test]
fn a_frozen_tower_keeps_nothing_for_the_backward_pass() {
    let large = [batch(&[&[(40, 40)]], 1)];
    let bytes = |frozen: &[&str]| {
        let frozen = frozen.iter().map(|pattern| (*pattern).to_owned()).collect();
        open("qwen3_vl", &EngineOptions { frozen, ..room(DType::F32, Recompute::Off, &large) }).memory().total_bytes
    };
    let merger = ["model.visual.blocks.*", "model.visual.patch_embed.*", "model.visual.pos_embed.*"];
    let (all, merger, none) = (bytes(&[]), bytes(&merger), bytes(&["model.visual.*"]));
    assert!(all > merger && merger > none && 2 * none < all, "{all} {merger} {none}");
}

#[test]
fn adapters_of_the_decoder_are_trained_next_to_a_frozen_tower() {
    for name in SEEING {
        let batches = batches();
        let text = r#"{"target_modules": ["q_proj", "v_proj"], "r": 3, "lora_alpha": 6}"#;
        let config = LoraConfig::from_json(text, std::path::Path::new("adapter_config.json")).unwrap();
        let lora = Some(LoraOptions { config, seed: 9 });
        let mut adapted = open(name, &EngineOptions { lora, ..f32_room(&batches) });
        let whole = open(name, &f32_room(&batches)).evaluate(&batches).unwrap();
        assert_eq!(adapted.evaluate(&batches).unwrap(), whole, "{name}");
        let (tower, _) = names(&adapted);
        let before = bits(&mut adapted, &tower, Kind::Weights);
        let losses: Vec<f64> = (0..12).map(|_| adapted.step(&batches, HYPER).unwrap().loss).collect();
        assert!(losses[11] < losses[0], "{name} {losses:?}");
        assert!(bits(&mut adapted, &tower, Kind::Weights) == before, "{name}");
    }
}

#[test]
fn a_tower_that_is_not_wanted_is_no_part_of_the_engine() {
    let batches = &batches()[1..2];
    for name in SEEING {
        let options = EngineOptions { vision: false, ..f32_room(batches) };
        let dir = folder(name);
        let mut engine = Engine::open(Box::new(CpuBackend::new()), dir.path(), Weights::Random(7), &options).unwrap();
        assert!(names(&engine).0.is_empty());
        let seeing = open(name, &f32_room(batches)).step(batches, HYPER).unwrap().loss;
        let text = engine.step(&[of_text(&batches[0])], HYPER).unwrap().loss;
        assert_eq!(text.to_bits(), seeing.to_bits(), "{name}");
        assert!(!all(&mut engine, Kind::Weights).is_empty());
    }
}
