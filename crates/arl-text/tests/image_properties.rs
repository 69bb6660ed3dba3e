//! Of any row with images: as many tokens as the images have, replies that are the same text as without images, positions that
//! only rise, and a cache that gives back what was encoded.
use crate::common;

use std::sync::Arc;

use arl_text::{Encoded, Images, Outcome, RowImage, TextEncoder, TokenCache};
use common::property::holds;
use common::{CHATML, IMAGE_PAD, PARTS, image, trained, vision_encoder};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;
use serde_json::{Value, json};

/// What texts are made of.
const BITS: [&str; 9] =
    ["word", " ", "\n", "|", "<", "ü👍", "<|im_end|>\n", "<|im_start|>assistant\n", "\u{E000}\u{E045}"];

/// A piece of a message: text, or an image of so many rows and columns.
type Piece = Result<String, (u32, u32)>;

/// The pieces of the user, and the reply.
type Turn = (Vec<Piece>, String);

fn text() -> impl Strategy<Value = String> {
    vec(prop::sample::select(&BITS[..]), 0..4).prop_map(|bits| bits.concat())
}

fn turns() -> impl Strategy<Value = Vec<Turn>> {
    let piece = prop_oneof![text().prop_map(Ok), (1..4u32, 1..4u32).prop_map(Err)];
    vec((vec(piece, 0..5), text().prop_map(|text| format!("r{text}"))), 1..4)
}

/// The row, with each image in its part, or all in a column with words where they are; and what was measured of them.
fn row(turns: &[Turn], column: bool) -> (String, Vec<RowImage>) {
    let mut images = Vec::new();
    let mut messages = Vec::new();
    for (pieces, reply) in turns {
        let mut parts = Vec::new();
        for piece in pieces {
            match piece {
                Ok(text) => parts.push(json!({ "type": "text", "text": text })),
                Err((rows, columns)) => {
                    images.push(image(images.len() as u8, *rows, *columns));
                    parts.push(match column {
                        true => json!({ "type": "text", "text": "<image>" }),
                        false => json!({ "type": "image", "image": format!("{}.png", images.len() - 1) }),
                    });
                }
            }
        }
        messages.push(json!({ "role": "user", "content": parts }));
        messages.push(json!({ "role": "assistant", "content": reply }));
    }
    let mut row = json!({ "messages": messages });
    if column && !images.is_empty() {
        row["images"] = (0..images.len()).map(|i| json!(format!("{i}.png"))).collect::<Value>();
    }
    (row.to_string(), images)
}

fn sample(encoder: &TextEncoder, row: &str, images: &[RowImage]) -> Encoded {
    match encoder.encode_with_images(0, row.as_bytes(), images) {
        Ok(Outcome::Sample(sample)) => sample,
        other => panic!("{row}: {other:?}"),
    }
}

fn positions_rise(sample: &Encoded, positions: &[i32]) -> Result<(), TestCaseError> {
    let count = sample.ids.len();
    prop_assert_eq!(positions.len(), 3 * count);
    let at = |i: usize| [positions[i], positions[count + i], positions[2 * count + i]];
    let mut next = 0;
    let mut i = 0;
    while i < count {
        match sample.images.iter().find(|image| image.first == i) {
            None => {
                prop_assert_eq!(at(i), [next; 3]);
                (i, next) = (i + 1, next + 1);
            }
            Some(found) => {
                let (rows, columns) = (found.image.height as i32 / 8, found.image.width as i32 / 8);
                for (token, (row, column)) in
                    (0..rows).flat_map(|row| (0..columns).map(move |column| (row, column))).enumerate()
                {
                    prop_assert_eq!(at(i + token), [next, next + row, next + column]);
                }
                i += found.count;
                next += rows.max(columns);
            }
        }
    }
    Ok(())
}

/// Holds of generated rows. `trims`: the template trims contents, so that a text may lose more without its images.
fn all_agree(encoder: TextEncoder, dropping: &TextEncoder, cases: u32, trims: bool) {
    let encoder = Arc::new(encoder);
    holds(cases, (turns(), any::<bool>()), |(turns, column)| {
        let (row, images) = row(&turns, column);
        let refs = encoder.image_refs(row.as_bytes());
        prop_assert_eq!(refs.len(), images.len(), "{}", row);
        let sample = sample(&encoder, &row, &images);
        // As many tokens as the images have, each in its range.
        let tokens: u32 = images.iter().flatten().map(|image| image.height * image.width / 64).sum();
        prop_assert_eq!(sample.ids.iter().filter(|&&id| id == IMAGE_PAD).count(), tokens as usize, "{}", row);
        for (i, found) in sample.images.iter().enumerate() {
            prop_assert_eq!((found.place as usize, Ok(found.image)), (i, images[i].clone()));
            prop_assert!(sample.ids[found.first..found.first + found.count].iter().all(|&id| id == IMAGE_PAD));
        }
        // The text is that of the row, and the replies are those of the row without images.
        let without = self::sample(dropping, &row, &[]);
        let bare = sample.text.replace("<|vision_start|><|image_pad|><|vision_end|>", "");
        prop_assert!(trims || bare == without.text, "{}", row);
        prop_assert_eq!(trained(&encoder, &sample), trained(dropping, &without), "{}", row);
        prop_assert_eq!(sample.target_tokens(), without.target_tokens());
        let positions = encoder.positions(&sample.ids, &sample.images).unwrap();
        positions_rise(&sample, &positions)?;
        in_the_cache(&encoder, &row, &images, &sample, &positions)
    });
}

/// The cache, opened again, has the same.
fn in_the_cache(
    encoder: &Arc<TextEncoder>,
    row: &str,
    images: &[RowImage],
    sample: &Encoded,
    positions: &[i32],
) -> Result<(), TestCaseError> {
    let dir = tempfile::tempdir().unwrap();
    let open = || TokenCache::open(dir.path(), "source", 2, Arc::clone(encoder)).unwrap();
    let plain = br#"{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}"#;
    open().fill_with_images(&[row.as_bytes(), plain], &[1, 0], &[images.to_vec(), vec![]]).unwrap();
    let batch = open().micro_batch(&[0, 1]).unwrap();
    let length = batch.cu_seqlens[1] as usize;
    let ids: Vec<u32> = batch.input_ids[length..].iter().map(|&id| id as u32).collect();
    prop_assert_eq!(&ids, &sample.ids);
    let found: Vec<_> = batch.images.iter().map(|image| (image.row, image.place, image.image)).collect();
    let expected: Vec<_> = sample.images.iter().map(|image| (1, image.place, image.image)).collect();
    prop_assert_eq!(found, expected);
    prop_assert!(batch.targets.iter().all(|&target| target != IMAGE_PAD as i32));
    let count = batch.input_ids.len();
    prop_assert_eq!(batch.positions.len(), 3 * count);
    for axis in 0..3 {
        let own = &batch.positions[axis * count..(axis + 1) * count];
        prop_assert!(own[..length].iter().copied().eq(0..length as i32));
        prop_assert_eq!(&own[length..], &positions[axis * ids.len()..(axis + 1) * ids.len()]);
    }
    Ok(())
}

#[test]
fn tokens_replies_positions_and_the_cache_agree() {
    for template in [PARTS, CHATML] {
        let dropping = vision_encoder(template, |options| options.images = Images::Drop);
        all_agree(vision_encoder(template, |_| {}), &dropping, 100, false);
    }
}

#[test]
fn they_agree_with_the_templates_of_real_models() {
    let Some(templates) = common::shared("golden/chat/templates") else { return };
    for name in ["qwen2_5_vl", "qwen3_vl", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "qwen3_8"] {
        let template = std::fs::read_to_string(templates.join(format!("{name}.jinja"))).unwrap();
        let dropping = vision_encoder(&template, |options| options.images = Images::Drop);
        all_agree(vision_encoder(&template, |_| {}), &dropping, 30, name.starts_with("qwen3_") && name != "qwen3_vl");
    }
}
