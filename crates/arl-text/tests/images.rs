//! Rows with images become tokens with images: where each is, how many tokens it has, what is trained, and what is refused.
use crate::common;

use arl_text::{Encoded, ImageSource, Images, Outcome, RowImage, TextEncoder, TextOptions, Truncation, VisionTokens};
use common::{CHATML, IMAGE_PAD, PARTS, image, notes, problem, trained, vision_encoder, vision_folder};

const START: &str = "<|vision_start|>";
const END: &str = "<|vision_end|>";
const IMAGE: &str = "<|vision_start|><|image_pad|><|vision_end|>";

fn training() -> TextEncoder {
    vision_encoder(PARTS, |_| {})
}

fn talk(content: &str, more: &str) -> String {
    format!(
        r#"{{"messages": [{{"role": "user", "content": {content}}}, {{"role": "assistant", "content": "a"}}]{more}}}"#
    )
}

fn with(encoder: &TextEncoder, row: &str, images: &[RowImage]) -> Encoded {
    match encoder.encode_with_images(7, row.as_bytes(), images) {
        Ok(Outcome::Sample(sample)) => sample,
        other => panic!("{row}: {other:?}"),
    }
}

fn refused(encoder: &TextEncoder, row: &str, images: &[RowImage]) -> (String, String) {
    match encoder.encode_with_images(7, row.as_bytes(), images) {
        Err(problem) => (problem.reason, problem.message),
        other => panic!("{row}: {other:?}"),
    }
}

/// What the user says in the rendered text, with `#` for an image.
fn said(sample: &Encoded) -> String {
    let text = sample.text.strip_prefix("<|im_start|>user\n").unwrap();
    text.split("<|im_end|>").next().unwrap().replace(IMAGE, "#")
}

/// The references of a row: place, and URL or path.
fn refs(encoder: &TextEncoder, row: &str) -> Vec<(String, String)> {
    let source = |source| match source {
        ImageSource::Url(text) | ImageSource::Path(text) => text,
        ImageSource::Bytes(bytes) => format!("{bytes:?}"),
    };
    encoder.image_refs(row.as_bytes()).into_iter().map(|image| (image.place, source(image.source))).collect()
}

#[test]
fn images_are_where_the_row_has_them_and_their_references_in_that_order() {
    let text = |text: &str| format!(r#"{{"type": "text", "text": "{text}"}}"#);
    let (a, b) = (text("a"), text("b"));
    let url = r#"{"type": "image_url", "image_url": {"url": "https://h.example/u.png"}}"#;
    let own = r#"{"type": "image", "image": "o.png"}"#;
    let input = r#"{"type": "input_image", "image_url": "data:image/png;base64,AA"}"#;
    let v1 = r#"{"type": "image_url", "value": "v.png"}"#;
    let bare = r#"{"type": "image"}"#;
    let at = |i: usize| format!("messages[0].content[{i}]");
    for (content, column, rendered, expected) in [
        (format!("[{url}, {a}]"), "", "#a", vec![(at(0), "https://h.example/u.png")]),
        (
            format!("[{a}, {own}, {b}, {input}]"),
            "",
            "a#b#",
            vec![(at(1), "o.png"), (at(3), "data:image/png;base64,AA")],
        ),
        (format!("[{a}, {b}, {v1}]"), "", "ab#", vec![(at(2), "v.png")]),
        (format!("[{own}]"), "", "#", vec![(at(0), "o.png")]),
        // A column, with its places as words, as bare parts, or as both.
        (
            r#""<image>\nx<image>""#.to_owned(),
            r#", "images": ["p.png", {"bytes": null, "path": "q.png"}]"#,
            "#\nx#",
            vec![("images[0]".to_owned(), "p.png"), ("images[1]".to_owned(), "q.png")],
        ),
        (
            format!("[{}, {bare}, {own}, {}]", text("a<image>b"), text("<image>")),
            r#", "images": ["p", null, "q", "r"]"#,
            "a#b###",
            vec![
                ("images[0]".to_owned(), "p"),
                ("images[2]".to_owned(), "q"),
                (at(2), "o.png"),
                ("images[3]".to_owned(), "r"),
            ],
        ),
        (r#""<image>q""#.to_owned(), r#", "image": "p.png""#, "#q", vec![("image".to_owned(), "p.png")]),
        // TRL: before the first text of the user.
        (
            r#""q""#.to_owned(),
            r#", "images": ["p", {"bytes": [1, 2]}]"#,
            "##q",
            vec![("images[0]".to_owned(), "p"), ("images[1]".to_owned(), "[1, 2]")],
        ),
        (format!("[{a}]"), r#", "images": ["p"]"#, "#a", vec![("images[0]".to_owned(), "p")]),
        // Without a column the word is text.
        (r#""an <image>""#.to_owned(), "", "an <image>", vec![]),
    ] {
        for template in [PARTS, CHATML] {
            let encoder = vision_encoder(template, |_| {});
            let row = talk(&content, column);
            let found = refs(&encoder, &row);
            let places: Vec<(String, &str)> =
                found.iter().map(|(place, source)| (place.clone(), source.as_str())).collect();
            assert_eq!(places, expected, "{row}");
            let images: Vec<RowImage> = (0..expected.len()).map(|i| image(i as u8, 1, 1)).collect();
            assert_eq!(said(&with(&encoder, &row, &images)), rendered, "{row}");
        }
    }
}

#[test]
fn images_are_read_in_every_shape_of_rows_and_under_other_names() {
    let encoder = vision_encoder(PARTS, |options| options.columns = [("images".into(), "bilder".into())].into());
    for row in [
        r#"{"conversations": [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}], "bilder": ["x"]}"#,
        r#"{"instruction": "<image>q", "output": "a", "bilder": ["x"]}"#,
        r#"{"prompt": [{"role": "user", "content": "<image>q"}], "completion": "a", "bilder": ["x"]}"#,
        r#"{"question": "q", "answer": "a", "\u0062ilder": "x"}"#,
    ] {
        assert_eq!(refs(&encoder, row).len(), 1, "{row}");
        assert_eq!(said(&with(&encoder, row, &[image(1, 1, 1)])), "#q", "{row}");
    }
}

#[test]
fn an_image_has_its_tokens_and_everything_behind_it_moves() {
    let encoder = training();
    let row = talk(r#""x<image>y<image>""#, r#", "images": ["p", "q"]"#);
    let sample = with(&encoder, &row, &[image(1, 2, 3), image(2, 1, 1)]);
    let pads = |count| "<|image_pad|>".repeat(count);
    let user = format!("x{START}{}{END}y{START}{}{END}", pads(6), pads(1));
    let whole = format!("<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n");
    assert_eq!(encoder.decode(&sample.ids, false).unwrap(), whole);
    let images: Vec<_> = sample.images.iter().map(|image| (image.place, image.count, image.image.hash[0])).collect();
    assert_eq!(images, [(0, 6, 1), (1, 1, 2)]);
    for image in &sample.images {
        assert!(sample.ids[image.first..image.first + image.count].iter().all(|&id| id == IMAGE_PAD));
    }
    assert_eq!(trained(&encoder, &sample), ["a<|im_end|>"]);
    assert_eq!(sample.weights().len(), sample.ids.len());
    let positions = encoder.positions(&sample.ids, &sample.images).unwrap();
    let (count, first) = (sample.ids.len(), sample.images[0].first);
    assert_eq!(positions.len(), 3 * count);
    let height: Vec<i32> = positions[count + first..count + first + 7].to_vec();
    let p = first as i32;
    assert_eq!(height, [p, p, p, p + 1, p + 1, p + 1, p + 3]);
    // The last token: six tokens of the first image took three positions.
    assert!([1, 2, 3].iter().all(|axis| positions[axis * count - 1] == count as i32 - 1 - 3));
}

#[test]
fn images_in_a_trained_reply_or_text_are_no_targets() {
    let encoder = training();
    let row = r#"{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": [{"type": "text", "text": "see "}, {"type": "image", "image": "p"}, {"type": "text", "text": "."}]}]}"#;
    let sample = with(&encoder, row, &[image(1, 2, 2)]);
    assert_eq!(trained(&encoder, &sample), [format!("see {START}{}{END}.<|im_end|>", "<|image_pad|>".repeat(4))]);
    let text = with(&encoder, r#"{"text": "a<image>b", "images": ["p"]}"#, &[image(1, 1, 2)]);
    assert_eq!(text.text, format!("a{IMAGE}b<|im_end|>"));
    for sample in [sample, text] {
        for (id, weight) in sample.ids.iter().zip(sample.weights()) {
            assert!(*id != IMAGE_PAD || weight == 0.0);
        }
        assert!(sample.target_tokens() > 0);
    }
}

#[test]
fn a_template_of_strings_gets_the_places_as_text_and_one_without_places_is_refused() {
    let strings = vision_encoder(CHATML, |_| {});
    let row = talk(r#"[{"type": "text", "text": "|"}, {"type": "image", "image": "p"}]"#, "");
    assert_eq!(said(&with(&strings, &row, &[image(1, 1, 2)])), "|#");
    // Images of the system are left out by templates of real models.
    let deaf = PARTS.replace("m.content is string", "m.content is string or m.role == 'system'").replace(
        "{{- m.content }}",
        "{{- m.content if m.content is string else (m.content | selectattr('text') | map(attribute='text') | join) }}",
    );
    let deaf = vision_encoder(&deaf, |_| {});
    let row = r#"{"messages": [{"role": "system", "content": [{"type": "image", "image": "p"}, {"type": "text", "text": "s"}]}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}"#;
    let (reason, message) = refused(&deaf, row, &[image(1, 1, 1)]);
    assert_eq!(reason, "template");
    assert_eq!(message, "the chat template writes 0 places for 1 image, perhaps not those of messages[0]");
}

#[test]
fn text_that_spells_the_token_of_an_image_is_refused() {
    let encoder = training();
    for (row, place) in [
        (talk(r#""x <|image_pad|>""#, ""), "messages[0]: "),
        (talk(r#""<image><|image_pad|>""#, r#", "images": ["p"]"#), "messages[0]: "),
        (talk(r#""q""#, r#", "tools": [{"name": "<|image_pad|>"}]"#), "`tools`: "),
        (r#"{"text": "<|image_pad|>"}"#.to_owned(), "`text`: "),
        (r#"{"input_ids": [1, 260, 2]}"#.to_owned(), "input_ids[1] stands for an image"),
    ] {
        let images = vec![image(1, 1, 1); refs(&encoder, &row).len()];
        let (reason, message) = refused(&encoder, &row, &images);
        assert_eq!(reason, "image token", "{row}");
        assert!(message.starts_with(place), "{message}");
        assert!(encoder.prompt_with_images(row.as_bytes(), None, &images).is_err(), "{row}");
    }
    // Other special tokens are text as ever.
    assert_eq!(said(&with(&encoder, &talk(&format!(r#""{START}|""#), ""), &[])), format!("{START}|"));
}

#[test]
fn a_place_without_an_image_and_an_image_without_a_place_are_named() {
    let encoder = training();
    let part = |part: &str| talk(&format!(r#"[{part}, {{"type": "text", "text": "q"}}]"#), "");
    for (row, reason, named) in [
        (part(r#"{"type": "image"}"#), "no image", "messages[0].content[0]: a part of type image without an image"),
        (part(r#"{"type": "image_url"}"#), "no image", "messages[0].content[0]: a part of type image_url without"),
        (part(r#"{"type": "image", "foo": 1}"#), "no image", "messages[0].content[0]"),
        (part(r#"{"type": "image", "image": 3}"#), "bad message", "messages[0].content[0]: `image` is a number"),
        (talk(r#""<image>q""#, r#", "images": []"#), "bad field", "`images` has 0 images, the messages have 1"),
        (talk(r#""<image>q""#, r#", "images": ["p", "q"]"#), "bad field", "`images` has 2 images, the messages have 1"),
        (talk(r#""q""#, r#", "images": [7]"#), "bad field", "`images[0]` is a number"),
        (talk(r#""q""#, r#", "images": [{"path": null}]"#), "bad field", "`images[0]` has neither URL nor path"),
        (r#"{"input_ids": [1, 2], "images": ["p"]}"#.to_owned(), "image", "a row of `input_ids` cannot have images"),
        (talk(r#""<video>q""#, r#", "videos": ["p"]"#), "image", "videos and sounds are not built"),
        (part(r#"{"type": "video", "video": "p"}"#), "image", "a part of type video; text and images are trained"),
        (part(r#"{"type": "input_audio"}"#), "image", "videos and sounds are not built"),
    ] {
        let (found, message) = refused(&encoder, &row, &[]);
        assert_eq!(found, reason, "{row}: {message}");
        assert!(message.contains(named), "{row}: {message}");
        assert!(refs(&encoder, &row).is_empty(), "{row}");
    }
    let word = with(&encoder, &talk(r#""an <image>, an <image>""#, ""), &[]);
    assert_eq!(notes(&word), [("word without image", 2)]);
    assert!(word.notes.counts(0)[0].is_warning());
}

#[test]
fn images_that_did_not_come_or_cannot_be_had_make_a_problem_of_their_row() {
    let encoder = training();
    let row = talk(r#""<image><image>""#, r#", "images": ["p", "q"]"#);
    let broken: RowImage = Err("p.png: not a supported image: this is a PDF".to_owned());
    for (images, named) in [
        (vec![], "the row refers to 2 images, loaded were 0"),
        (vec![image(1, 1, 1)], "refers to 2 images, loaded were 1"),
        (vec![image(1, 1, 1), broken], "images[1]: p.png: not a supported image: this is a PDF"),
        (vec![image(1, 1, 1), image(2, 0, 1)], "images[1]: 0 x 8 pixels are no blocks of 8 x 8"),
    ] {
        let (reason, message) = refused(&encoder, &row, &images);
        assert_eq!(reason, "image");
        assert!(message.contains(named), "{message}");
    }
    let (reason, _) = refused(&encoder, &talk(r#""q""#, ""), &[image(1, 1, 1)]);
    assert_eq!(reason, "image");
}

#[test]
fn truncation_keeps_whole_images_and_refuses_to_cut_one() {
    // 11 tokens before the first image's, 4 of it, then `<|vision_end|>`.
    let row = talk(r#""<image>b<image>""#, r#", "images": ["p", "q"]"#);
    let images = [image(1, 2, 2), image(2, 1, 2)];
    let whole = with(&training(), &row, &images);
    let length = whole.ids.len();
    for truncation in [Truncation::Left, Truncation::Right] {
        for limit in 2..length {
            let encoder = vision_encoder(PARTS, |options| {
                options.max_length = Some(limit);
                options.truncation = truncation;
            });
            let range = if truncation == Truncation::Left { length - limit..length } else { 0..limit };
            let cuts = |first: usize, count: usize| {
                let within = (first..first + count).filter(|i| range.contains(i)).count();
                (within != 0 && within != count).then_some(())
            };
            let cut = whole.images.iter().find_map(|image| cuts(image.first, image.count));
            let outcome = encoder.encode_with_images(0, row.as_bytes(), &images);
            match outcome {
                Ok(Outcome::Sample(sample)) => {
                    assert!(cut.is_none(), "{limit}");
                    assert_eq!(sample.ids, whole.ids[range.clone()]);
                    let pads = sample.ids.iter().filter(|&&id| id == IMAGE_PAD).count();
                    assert_eq!(pads, sample.images.iter().map(|image| image.count).sum::<usize>());
                    encoder.positions(&sample.ids, &sample.images).unwrap();
                    let lost = (2 - sample.images.len()) as u32;
                    let noted = notes(&sample).iter().find(|note| note.0 == "cut images").map_or(0, |note| note.1);
                    assert_eq!(noted, lost);
                    if truncation == Truncation::Left {
                        assert!(sample.images.iter().all(|image| image.place >= lost));
                    }
                }
                Err(problem) if cut.is_some() => {
                    assert_eq!(problem.reason, "cut image");
                    assert!(problem.message.contains("cuts through image"), "{}", problem.message);
                }
                Err(problem) => assert_eq!(problem.reason, "no target left", "{limit}"),
                other => panic!("{other:?}"),
            }
        }
    }
    let dropping = vision_encoder(PARTS, |options| {
        options.max_length = Some(length - 1);
        options.truncation = Truncation::Drop;
    });
    assert_eq!(dropping.encode_with_images(0, row.as_bytes(), &images), Ok(Outcome::Dropped(length)));
}

#[test]
fn a_prompt_has_the_images_before_the_reply_and_no_others() {
    let encoder = training();
    let row = r#"{"messages": [{"role": "user", "content": "<image>q"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "<image>r"}, {"role": "assistant", "content": "b"}], "images": ["p", "q"]}"#;
    let images = [image(1, 2, 2), image(2, 1, 2)];
    let sample = with(&encoder, row, &images);
    let last = encoder.prompt_with_images(row.as_bytes(), None, &images).unwrap();
    assert_eq!(last.ids, sample.ids[..sample.spans[1].first]);
    assert_eq!(last.images, sample.images);
    let first = encoder.prompt_with_images(row.as_bytes(), Some(1), &images).unwrap();
    assert_eq!(first.ids, sample.ids[..sample.spans[0].first]);
    assert_eq!(first.images, sample.images[..1]);
    assert_eq!(first.positions, encoder.positions(&first.ids, &first.images).unwrap());
    assert_eq!(encoder.prompt_with_images(row.as_bytes(), Some(1), &images[..1]).unwrap(), first);
    assert!(encoder.prompt(row.as_bytes(), None).unwrap_err().message.contains("refers to 2 images"));
}

#[test]
fn a_model_without_a_tower_or_its_tokens_is_refused_by_name() {
    let open = |change: &dyn Fn(&mut TextOptions)| {
        let dir = vision_folder(PARTS);
        let mut options = TextOptions { images: Images::Train, ..common::options(dir.path()) };
        change(&mut options);
        TextEncoder::open(options).map(|encoder| encoder.info().fingerprint.clone())
    };
    let blind = common::folder(PARTS);
    let error = open(&|options| options.model_dir = blind.path().to_path_buf()).unwrap_err();
    assert!(error.message.contains("the model has no tower for images"), "{error}");
    let vision = VisionTokens { image_token_id: 5, patch_size: 4, merge_size: 2, axes: true };
    let error = open(&|options| options.vision = Some(vision.clone())).unwrap_err();
    assert!(error.message.contains("`<|image_pad|>` is token 260, config.json has 5"), "{error}");
    let no_tokens = |options: &mut TextOptions| {
        options.model_dir = blind.path().to_path_buf();
        options.vision = Some(vision.clone());
    };
    assert!(open(&no_tokens).unwrap_err().message.contains("there is no token `<|vision_start|>`"));
    // What decides tokens is in the fingerprint.
    let plain = open(&|_| {}).unwrap();
    assert_eq!(open(&|_| {}).unwrap(), plain);
    assert_ne!(open(&|options| options.image_processor = Some("p".to_owned())).unwrap(), plain);
    assert_ne!(open(&|options| options.images = Images::Drop).unwrap(), plain);
}

#[test]
fn where_images_are_not_trained_a_row_has_no_references_and_the_reason_fits_the_model() {
    let row = talk(r#"[{"type": "image", "image": "p"}]"#, "");
    for (images, why) in [(Images::Refuse, "text alone is trained (images error)"), (Images::Drop, "")] {
        let encoder = vision_encoder(PARTS, |options| options.images = images);
        assert!(refs(&encoder, &row).is_empty());
        if !why.is_empty() {
            assert!(problem(&encoder, row.as_bytes()).message.ends_with(why));
        }
    }
}
