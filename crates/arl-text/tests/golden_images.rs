//! The golden conversations with images: text, ids, grids, positions and spans are those of transformers' processors.
use crate::common;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use arl_text::{
    Encoded, ImageSource, Images, MeasuredImage, Outcome, RowImage, TextEncoder, TextOptions, TokenCache, VisionTokens,
};
use serde_json::{Value, json};

/// Height and width in the header of a PNG file.
fn png_size(path: &Path) -> (f64, f64) {
    let bytes = std::fs::read(path).unwrap();
    let word = |at: usize| f64::from(u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap()));
    (word(20), word(16))
}

/// `smart_resize` of transformers, for images whose ratio it takes.
fn resized((height, width): (f64, f64), settings: &Value) -> MeasuredImage {
    let factor = settings["patch_size"].as_f64().unwrap() * 2.0;
    let bound = |name: &str| settings["size"][name].as_f64().unwrap();
    let whole = |size: f64| (size / factor).round_ties_even() * factor;
    let (mut h, mut w) = (whole(height), whole(width));
    if h * w > bound("longest_edge") {
        let beta = (height * width / bound("longest_edge")).sqrt();
        let fit = |size: f64| ((size / beta / factor).floor() * factor).max(factor);
        (h, w) = (fit(height), fit(width));
    } else if h * w < bound("shortest_edge") {
        let beta = (bound("shortest_edge") / (height * width)).sqrt();
        let fit = |size: f64| (size * beta / factor).ceil() * factor;
        (h, w) = (fit(height), fit(width));
    }
    MeasuredImage { hash: [0; 16], height: h as u32, width: w as u32 }
}

fn encoder(model: &Path, template: &Path, patch_size: u32) -> TextEncoder {
    let vision = VisionTokens { image_token_id: 151_655, patch_size, merge_size: 2, axes: true };
    TextEncoder::open(TextOptions {
        images: Images::Train,
        vision: Some(vision),
        chat_template: Some(template.to_path_buf()),
        ..common::options(model)
    })
    .unwrap()
}

fn sample(encoder: &TextEncoder, line: &str, images: &[RowImage]) -> Encoded {
    match encoder.encode_with_images(0, line.as_bytes(), images) {
        Ok(Outcome::Sample(sample)) => sample,
        other => panic!("{line}: {other:?}"),
    }
}

fn files(encoder: &TextEncoder, line: &str) -> Vec<String> {
    let path = |source| match source {
        ImageSource::Path(path) => path,
        other => panic!("{other:?}"),
    };
    encoder.image_refs(line.as_bytes()).into_iter().map(|image| path(image.source)).collect()
}

#[test]
fn conversations_with_images_are_those_of_transformers() {
    let (Some(cases), Some(pictures)) = (common::shared("golden/chat"), common::shared("golden/vision/images")) else {
        return;
    };
    let Some(model) = common::tokenizer("qwen3") else { return };
    let read = |path: &Path| std::fs::read_to_string(path).unwrap();
    let settings: Value = serde_json::from_str(&read(&pictures.join("images.json"))).unwrap();
    let mut count = 0;
    // Opening a real tokenizer takes longer than all else.
    let mut encoders = HashMap::new();
    for line in read(&cases.join("vision.jsonl")).lines() {
        let case: Value = serde_json::from_str(line).unwrap();
        let word = |key: &str| case[key].as_str().unwrap();
        let title = format!("{}: {}", word("template"), word("name"));
        let processor = &settings["processors"][word("processor")];
        let patch = processor["patch_size"].as_u64().unwrap() as u32;
        let encoder = encoders.entry(word("template").to_owned()).or_insert_with(|| {
            let template = cases.join(format!("templates/{}.jinja", word("template")));
            Arc::new(encoder(&model, &template, patch))
        });
        let images: Vec<RowImage> =
            files(encoder, line).iter().map(|file| Ok(resized(png_size(&pictures.join(file)), processor))).collect();
        let sample = sample(encoder, line, &images);
        assert_eq!(sample.text, word("text"), "{title}");
        assert_eq!(json!(sample.ids), case["input_ids"], "{title}");
        let grids: Vec<[u32; 3]> =
            sample.images.iter().map(|image| [1, image.image.height / patch, image.image.width / patch]).collect();
        assert_eq!(json!(grids), case["image_grid_thw"], "{title}");
        let spans: Vec<[usize; 3]> = sample.spans.iter().map(|s| [s.message, s.first, s.last]).collect();
        assert_eq!(json!(spans), case["spans"], "{title}");
        let dir = tempfile::tempdir().unwrap();
        let cache = TokenCache::open(dir.path(), "golden", 1, Arc::clone(encoder)).unwrap();
        cache.fill_with_images(&[line.as_bytes()], &[0], &[images]).unwrap();
        let positions = cache.micro_batch(&[0]).unwrap().positions;
        let axes: Vec<&[i32]> = positions.chunks(sample.ids.len()).collect();
        assert_eq!(json!(axes), case["position_ids"], "{title}");
        count += 1;
    }
    assert_eq!(count, 12);
}

#[test]
fn images_that_the_template_counts_are_rendered_as_transformers_renders_them() {
    let (Some(cases), Some(model)) = (common::shared("golden/chat"), common::tokenizer("qwen3")) else { return };
    let mut count = 0;
    for name in ["qwen3_5_nothink", "qwen3_5_think", "qwen3_6", "qwen3_8", "qwen3_vl"] {
        let encoder = encoder(&model, &cases.join(format!("templates/{name}.jinja")), 16);
        let lines = std::fs::read_to_string(cases.join(format!("{name}.jsonl"))).unwrap();
        for line in lines.lines().filter(|line| line.contains(r#""name": "images counted""#)) {
            let case: Value = serde_json::from_str(line).unwrap();
            // One token each: the case is of the text before the places are expanded.
            let one = MeasuredImage { hash: [0; 16], height: 32, width: 32 };
            let images: Vec<RowImage> = files(&encoder, line).iter().map(|_| Ok(one)).collect();
            let sample = sample(&encoder, line, &images);
            assert_eq!(sample.text, case["text"].as_str().unwrap(), "{name}");
            assert_eq!(json!(sample.ids), case["input_ids"], "{name}");
            let spans: Vec<[usize; 3]> = sample.spans.iter().map(|s| [s.message, s.first, s.last]).collect();
            assert_eq!(json!(spans), case["spans"], "{name}");
            count += 1;
        }
    }
    assert_eq!(count, 5);
}
