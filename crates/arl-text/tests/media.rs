//! Images in rows: in parts of messages and in columns next to them, refused or left out as the options say.
use crate::common;

use arl_text::{Encoded, Images, NoteKind, TextEncoder};
use common::{CHATML, encoder, encoder_with, problem, sample};

fn dropping() -> TextEncoder {
    encoder_with(CHATML, |options| options.images = Images::Drop)
}

fn talk(content: &str, more: &str) -> String {
    format!(
        r#"{{"messages": [{{"role": "user", "content": {content}}}, {{"role": "assistant", "content": "a"}}]{more}}}"#
    )
}

/// What the user says in the rendered text.
fn said(sample: &Encoded) -> &str {
    sample.text.strip_prefix("<|im_start|>user\n").unwrap().split("<|im_end|>").next().unwrap()
}

/// Images left out, and messages that are empty since.
fn counts(sample: &Encoded) -> (u32, u32) {
    let of = |kind| sample.notes.iter().filter(|note| note.kind == kind).map(|note| note.count).sum();
    (of(NoteKind::DroppedImages), of(NoteKind::EmptiedMessages))
}

const IMAGE: &str = r#"{"type": "image_url", "image_url": {"url": "https://a.example/x.png"}}"#;

#[test]
fn image_parts_are_refused_with_their_place_or_left_out_and_counted() {
    let words = |text: &str| format!(r#"{{"type": "text", "text": "{text}"}}"#);
    let (a, b) = (words("a"), words("b"));
    let own = r#"{"type": "image", "image": "file:///x.png"}"#;
    let dropping = dropping();
    for (parts, text, images, emptied, first) in [
        (format!("[{IMAGE}, {a}]"), "a", 1, 0, 0),
        (format!("[{a} , {IMAGE}]"), "a", 1, 0, 1),
        (format!("[{a}, {IMAGE} ,\n{b} ]"), "ab", 1, 0, 1),
        (format!("[{IMAGE},{own}, {a},{IMAGE},{IMAGE},{b},{own}]"), "ab", 5, 0, 0),
        (format!("[ {IMAGE} ]"), "", 1, 1, 0),
        (format!("[{IMAGE}, {own}]"), "", 2, 1, 0),
        (format!(r#"[{{"\u0074ype": "im\u0061ge_url"}}, {a}]"#), "a", 1, 0, 0),
    ] {
        let encoded = sample(&dropping, &talk(&parts, ""));
        assert_eq!((said(&encoded), counts(&encoded)), (text, (images, emptied)), "{parts}");
        let refused = problem(&encoder(CHATML), talk(&parts, "").as_bytes());
        assert_eq!(refused.reason, "image");
        assert!(
            refused.message.starts_with(&format!("messages[0].content[{first}]: a part of type image")),
            "{}",
            refused.message
        );
    }
    assert_eq!(counts(&sample(&dropping, &talk("\"an <image>\"", ""))), (0, 0));
}

#[test]
fn other_media_are_refused_whatever_images_do() {
    for kind in ["video", "video_url", "audio", "audio_url", "input_audio"] {
        let row = talk(&format!(r#"[{{"type": "{kind}"}}, {{"type": "text", "text": "a"}}]"#), "");
        assert_eq!(problem(&dropping(), row.as_bytes()).reason, "image", "{kind}");
    }
    for (word, column) in [("<video>", "videos"), ("<audio>", "audios")] {
        let row = talk(&format!("\"{word}q\""), &format!(r#", "{column}": ["x"]"#));
        for encoder in [encoder(CHATML), dropping()] {
            let refused = problem(&encoder, row.as_bytes());
            assert_eq!(refused.reason, "image", "{column}");
            assert!(refused.message.contains(&format!("`{column}` has 1")), "{}", refused.message);
        }
    }
}

#[test]
fn images_of_a_column_are_where_the_text_says() {
    let dropping = dropping();
    let words = |text: &str| format!(r#"{{"type": "text", "text": "{text}"}}"#);
    for (content, column, text, images, emptied) in [
        (r#""<image>q""#.to_owned(), r#""images": ["x.png"]"#, "q", 1, 0),
        (
            r#""<image>\na<image>b""#.to_owned(),
            r#""images": ["x.png", {"bytes": null, "path": "y.png"}]"#,
            "\nab",
            2,
            0,
        ),
        (r#""<image>""#.to_owned(), r#""images": "x.png""#, "", 1, 1),
        (r#""<image>q""#.to_owned(), r#""image": "x.png""#, "q", 1, 0),
        (format!("[{}, {}]", words("<image>a"), words("b")), r#""images": ["x"]"#, "ab", 1, 0),
        // LLaMA-Factory's parts.
        (r#"[{"type": "text", "value": "<image>a"}]"#.to_owned(), r#""images": ["x"]"#, "a", 1, 0),
        // transformers' and TRL's: a part without an image of its own is filled from the column.
        (format!(r#"[{{"type": "image"}}, {}]"#, words("a")), r#""images": ["x"]"#, "a", 1, 0),
        (
            format!(r#"[{{"type": "image", "text": null}}, {}]"#, words("<image>a")),
            r#""images": ["x", "y"]"#,
            "a",
            2,
            0,
        ),
        // TRL: without a place they belong before the first message of the user.
        (r#""q""#.to_owned(), r#""images": ["x", "y"]"#, "q", 2, 0),
    ] {
        let row = talk(&content, &format!(", {column}"));
        let encoded = sample(&dropping, &row);
        assert_eq!((said(&encoded), counts(&encoded)), (text, (images, emptied)), "{row}");
        assert_eq!(encoded.notes.iter().filter(|note| note.kind == NoteKind::UnreadKey).count(), 0, "{row}");
        assert_eq!(problem(&encoder(CHATML), row.as_bytes()).reason, "image", "{row}");
    }
    for nothing in [r#""images": []"#, r#""images": null"#, r#""images": """#, r#""images": [null]"#, r#""videos": []"#]
    {
        let encoded = sample(&encoder(CHATML), &talk(r#""<image>q""#, &format!(", {nothing}")));
        assert_eq!((said(&encoded), encoded.notes.iter().count()), ("<image>q", 0), "{nothing}");
    }
}

#[test]
fn more_or_fewer_places_than_images_are_an_error_that_names_both_counts() {
    for (content, column, named) in [
        (r#""<image><image>q""#, r#""images": ["x"]"#, "`images` has 1 image, the messages have 2 `<image>`"),
        (r#""<image>q""#, r#""images": ["x", "y", "z"]"#, "`images` has 3 images, the messages have 1 `<image>`"),
        (r#""<video>q""#, r#""videos": ["x", "y"]"#, "`videos` has 2 videos, the messages have 1 `<video>`"),
        (r#""q""#, r#""images": 3"#, "`images` is a number"),
    ] {
        for encoder in [encoder(CHATML), dropping()] {
            let refused = problem(&encoder, talk(content, &format!(", {column}")).as_bytes());
            assert_eq!(refused.reason, "bad field", "{content}");
            assert!(refused.message.contains(named), "{}", refused.message);
        }
    }
    let nobody = r#"{"messages": [{"role": "assistant", "content": "a"}], "images": ["x"]}"#;
    assert!(problem(&dropping(), nobody.as_bytes()).message.contains("no message of the user"));
}

#[test]
fn columns_of_media_are_read_in_every_shape_and_under_other_names() {
    for row in [
        r#"{"conversations": [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}], "images": ["x"]}"#,
        r#"{"instruction": "<image>q", "output": "a", "images": ["x"]}"#,
        r#"{"prompt": [{"role": "user", "content": "<image>q"}], "completion": "a", "images": ["x"]}"#,
    ] {
        let encoded = sample(&dropping(), row);
        assert_eq!((said(&encoded), counts(&encoded)), ("q", (1, 0)), "{row}");
        assert_eq!(problem(&encoder(CHATML), row.as_bytes()).reason, "image", "{row}");
    }
    let text = sample(&dropping(), r#"{"text": "<image>q", "images": ["x"]}"#);
    assert_eq!((text.text.as_str(), counts(&text)), ("q<|im_end|>", (1, 0)));
    let named = encoder_with(CHATML, |options| options.columns = [("images".into(), "bilder".into())].into());
    assert_eq!(problem(&named, talk(r#""<image>q""#, r#", "bilder": ["x"]"#).as_bytes()).reason, "image");
}

#[test]
fn dropping_is_part_of_the_fingerprint() {
    assert_ne!(encoder(CHATML).info().fingerprint, dropping().info().fingerprint);
    assert!(Images::parse("keep").is_err());
}

#[test]
fn a_trained_reply_that_was_nothing_but_an_image_is_blank() {
    let row = format!(
        r#"{{"messages": [{{"role": "user", "content": "q"}}, {{"role": "assistant", "content": [{IMAGE}]}}]}}"#
    );
    assert_eq!(problem(&dropping(), row.as_bytes()).reason, "blank reply");
}
