//! Places of patches against transformers' own.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::*;

fn shared() -> Option<Value> {
    let shared = std::env::var_os("ARL_SHARED")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared"), PathBuf::from);
    let path = shared.join("golden/leaves/vision.json");
    let Ok(text) = std::fs::read_to_string(&path) else {
        println!("SKIPPED: {} is missing", path.display());
        return None;
    };
    Some(serde_json::from_str(&text).unwrap())
}

fn numbers(value: &Value) -> Vec<i64> {
    value.as_array().unwrap().iter().map(|number| number.as_i64().unwrap()).collect()
}

fn pairs(value: &Value) -> Vec<Vec<i64>> {
    value.as_array().unwrap().iter().map(numbers).collect()
}

#[test]
fn orders_windows_and_taps_are_transformers() {
    let Some(golden) = shared() else { return };
    let cases = golden["cases"].as_array().unwrap();
    assert!(!cases.is_empty());
    for case in cases {
        let grid = numbers(&case["grid_thw"]);
        let grids = [[grid[0] as u32, grid[1] as u32, grid[2] as u32]];
        let windowed = Geometry { merge: 2, window: Some(4), side: None }.places(&grids);
        let order: Vec<i64> = windowed.order.iter().map(|&at| at as i64).collect();
        assert_eq!(order, numbers(&case["window_index"]), "{grid:?}");
        let windows: Vec<i64> = windowed.windows.iter().map(|&at| i64::from(at)).collect();
        assert_eq!(windows, numbers(&case["cu_window_seqlens"]), "{grid:?}");

        let places = Geometry { merge: 2, window: None, side: Some(48) }.places(&grids);
        let patches = places.axes.len() / 3;
        assert_eq!(patches as i64, grid.iter().product::<i64>());
        for (patch, pair) in pairs(&case["row_column"]).iter().enumerate() {
            let [row, column] = [1, 2].map(|axis| i64::from(places.axes[axis * patches + patch]));
            assert_eq!(&vec![row, column], pair, "{grid:?} {patch}");
        }
        let weights = case["interpolation_weights"].as_array().unwrap();
        for (patch, (taps, weights)) in pairs(&case["interpolation_taps"]).iter().zip(weights).enumerate() {
            let own: Vec<i64> = places.taps[4 * patch..4 * patch + 4].iter().map(|&tap| i64::from(tap)).collect();
            assert_eq!(&own, taps, "{grid:?} {patch}");
            for (own, weight) in places.weights[4 * patch..].iter().zip(weights.as_array().unwrap()) {
                let expected = weight.as_f64().unwrap();
                assert!((f64::from(*own) - expected).abs() < 1e-9, "{grid:?} {patch}: {own} {expected}");
            }
        }
    }
}

#[test]
fn every_patch_is_in_one_window_of_its_image() {
    let geometry = Geometry { merge: 2, window: Some(2), side: None };
    let grids = [[1, 8, 12], [1, 2, 2], [1, 6, 10]];
    let places = geometry.places(&grids);
    let mut seen = places.order.clone();
    seen.sort_unstable();
    assert_eq!(seen, (0..24 + 1 + 15).collect::<Vec<_>>());
    assert_eq!(places.images, [0, 96, 100, 160]);
    assert!(places.images.iter().all(|end| places.windows.contains(end)));
    assert!(places.windows.windows(2).all(|pair| pair[0] < pair[1] && pair[1] - pair[0] <= 16));
    assert_eq!(longest(&places.windows), 16);
}
