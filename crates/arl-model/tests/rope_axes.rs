//! Angles of positions with three axes, and of heads that are rotated in part: against plain f64, and against transformers.

use std::path::Path;

use arl_model::{ModelConfig, RopeAxes, RopeTable};
use serde_json::{Value, json};

/// The table of a model whose heads are rotated in their first `rotary_dim` elements.
fn table(head_dim: usize, rotary_dim: usize, theta: f64, axes: Option<RopeAxes>) -> RopeTable {
    let config = json!({"model_type": "qwen3", "head_dim": head_dim, "rope_theta": theta});
    let mut config = ModelConfig::from_json(&config.to_string(), Path::new("config.json")).unwrap();
    (config.rope.rotary_dim, config.rope.axes) = (rotary_dim, axes);
    RopeTable::new(&config)
}

/// Cosine and sine of each token and frequency.
fn angles(table: &RopeTable, positions: [&[i32]; 3]) -> (Vec<f32>, Vec<f32>) {
    let len = positions[0].len() * table.half();
    let (mut cos, mut sin) = (vec![f32::NAN; len], vec![f32::NAN; len]);
    table.fill_axes(positions[0].len(), positions, &mut cos, &mut sin);
    (cos, sin)
}

const POSITIONS: [[i32; 6]; 3] = [[0, 1, 5, 5, 5, 9], [0, 1, 5, 6, 7, 9], [0, 1, 8, 5, 6, 9]];

#[test]
fn each_frequency_turns_by_its_own_axis() {
    let layouts: [(usize, [usize; 3], bool, &[usize]); 3] = [
        (16, [2, 3, 3], false, &[0, 0, 1, 1, 1, 2, 2, 2]),
        (16, [4, 2, 2], true, &[0, 1, 2, 0, 1, 2, 0, 0]),
        // Sections that are shorter than a third leave the rest to time.
        (24, [9, 1, 2], true, &[0, 1, 2, 0, 0, 2, 0, 0, 0, 0, 0, 0]),
    ];
    for (rotary_dim, sections, interleaved, axes) in layouts {
        // A quarter of the head, as in Qwen3.5.
        let table = table(4 * rotary_dim, rotary_dim, 1e4, Some(RopeAxes { sections, interleaved }));
        let (cos, sin) = angles(&table, [&POSITIONS[0], &POSITIONS[1], &POSITIONS[2]]);
        assert_eq!(table.half(), axes.len());
        for (at, (cos, sin)) in cos.iter().zip(&sin).enumerate() {
            let (t, i) = (at / axes.len(), at % axes.len());
            let angle = f64::from(POSITIONS[axes[i]][t]) * 1e4f64.powf(-2.0 * i as f64 / rotary_dim as f64);
            let error = (f64::from(*cos) - angle.cos()).abs().max((f64::from(*sin) - angle.sin()).abs());
            assert!(error < 2e-6, "{sections:?} {t} {i}: {error:e}");
        }
    }
}

#[test]
fn equal_axes_are_one_axis_in_bits() {
    let axes = RopeAxes { sections: [3, 3, 2], interleaved: true };
    let same = [&POSITIONS[0][..]; 3];
    let one = table(16, 16, 1e6, None);
    let (mut cos, mut sin) = (vec![0f32; 48], vec![0f32; 48]);
    one.fill(6, &POSITIONS[0], &mut cos, &mut sin);
    assert_eq!(angles(&table(16, 16, 1e6, Some(axes)), same), (cos, sin));
}

#[test]
fn three_axes_are_those_of_transformers() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/golden/leaves/rotary.json");
    let Ok(text) = std::fs::read_to_string(&path) else {
        println!("SKIPPED: angles of three axes, because {} is not here", path.display());
        return;
    };
    let data: Value = serde_json::from_str(&text).unwrap();
    let numbers =
        |value: &Value| -> Vec<f64> { value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect() };
    let positions: Vec<Vec<i32>> =
        (0..3).map(|axis| numbers(&data["positions"][axis]).into_iter().map(|x| x as i32).collect()).collect();
    for case in data["cases"].as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        let section = numbers(&case["mrope_section"]);
        let axes = RopeAxes {
            sections: [section[0] as usize, section[1] as usize, section[2] as usize],
            interleaved: !name.contains("one after another"),
        };
        let half = case["half"].as_u64().unwrap() as usize;
        let head_dim = case["head_dim"].as_u64().unwrap() as usize;
        let table = table(head_dim, 2 * half, case["rope_theta"].as_f64().unwrap(), Some(axes));
        let (cos, sin) = angles(&table, [&positions[0], &positions[1], &positions[2]]);
        for (ours, theirs) in [(cos, &case["cos"]), (sin, &case["sin"])] {
            for (t, row) in theirs.as_array().unwrap().iter().enumerate() {
                for (i, theirs) in numbers(row).into_iter().enumerate() {
                    // A frequency is good to a unit in the last place, which a position multiplies.
                    let frequency = 1.0 / case["rope_theta"].as_f64().unwrap().powf(i as f64 / half as f64);
                    let position = positions.iter().map(|axis| axis[t]).max().unwrap();
                    let bound = 4e-7 + f64::from(position) * frequency * 2.5e-7;
                    let error = (f64::from(ours[t * half + i]) - theirs).abs();
                    assert!(error <= bound, "{name}: token {t}, frequency {i}: {error:e} apart, {bound:e} allowed");
                }
            }
        }
    }
}
