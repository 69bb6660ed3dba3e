//! What opening a model folder finds, and what it says where something is missing or wrong.
use crate::common;

use arl_model::{Error, ErrorCode};
use arl_text::{TextEncoder, TextOptions, Thinking, Truncation};
use common::{CHATML, folder, options};

fn refused(options: TextOptions) -> Error {
    match TextEncoder::open(options) {
        Err(error) => error,
        Ok(_) => panic!("it opened"),
    }
}

#[test]
fn the_template_is_found_where_checkpoints_keep_it() {
    let dir = folder(CHATML);
    assert_eq!(TextEncoder::open(options(dir.path())).unwrap().info().template_source, "chat_template.jinja");
    let config = |template: serde_json::Value| {
        let config = serde_json::json!({ "eos_token": { "content": "<|im_end|>" }, "chat_template": template });
        std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    };
    std::fs::remove_file(dir.path().join("chat_template.jinja")).unwrap();
    config(serde_json::json!(CHATML));
    let text = TextEncoder::open(options(dir.path())).unwrap();
    assert_eq!(text.info().template_source, "tokenizer_config.json");
    assert_eq!(text.info().stop_ids, [258]);
    config(serde_json::json!([{"name": "rag", "template": "x"}, {"name": "default", "template": CHATML}]));
    let list = TextEncoder::open(options(dir.path())).unwrap();
    assert_eq!(list.info().template_source, "tokenizer_config.json (default, rag)");
    assert_ne!(list.info().fingerprint, text.info().fingerprint);
    let own = dir.path().join("own.jinja");
    std::fs::write(&own, CHATML).unwrap();
    let given = TextEncoder::open(TextOptions { chat_template: Some(own.clone()), ..options(dir.path()) }).unwrap();
    assert_eq!(given.info().template_source, own.display().to_string());
}

#[test]
fn without_a_template_text_and_token_rows_still_work() {
    let dir = folder(CHATML);
    std::fs::remove_file(dir.path().join("chat_template.jinja")).unwrap();
    let encoder = TextEncoder::open(options(dir.path())).unwrap();
    assert_eq!(encoder.info().template_source, "none");
    let error = encoder.detect(&[br#"{"question": "q", "answer": "a"}"#]).unwrap_err();
    assert!(error.code == ErrorCode::Text && error.message.contains("no chat template"), "{error}");
    assert_eq!(encoder.detect(&[br#"{"text": "a"}"#]).unwrap(), "text");
    common::sample(&encoder, r#"{"text": "a"}"#);
}

#[test]
fn what_cannot_be_used_is_named() {
    let dir = folder("{% for %}");
    let error = refused(options(dir.path()));
    assert!(error.code == ErrorCode::Text && error.message.contains("chat_template.jinja"), "{error}");
    let missing = TextOptions { chat_template: Some(dir.path().join("absent.jinja")), ..options(dir.path()) };
    assert!(refused(missing).message.contains("absent.jinja"));
    std::fs::write(dir.path().join("chat_template.jinja"), CHATML).unwrap();
    let zero = TextOptions { max_length: Some(0), ..options(dir.path()) };
    assert_eq!(refused(zero).code, ErrorCode::Config);
    std::fs::write(dir.path().join("tokenizer_config.json"), "{").unwrap();
    assert!(refused(options(dir.path())).message.contains("tokenizer_config.json"));
    std::fs::remove_file(dir.path().join("tokenizer_config.json")).unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
    assert!(refused(options(dir.path())).message.contains("tokenizer.json"));
    std::fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
    let error = refused(options(dir.path()));
    assert!(error.code == ErrorCode::Text && error.message.contains("tokenizer.json: not found"), "{error}");
    assert!(Truncation::parse("middle").is_err() && Thinking::parse("maybe").is_err());
}

#[test]
fn a_tokenizer_that_asks_for_truncation_is_not_obeyed() {
    let dir = folder(CHATML);
    let path = dir.path().join("tokenizer.json");
    let file = std::fs::read_to_string(&path).unwrap();
    let cutting = r#""truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}"#;
    std::fs::write(&path, file.replace(r#""truncation": null"#, cutting)).unwrap();
    let encoder = TextEncoder::open(options(dir.path())).unwrap();
    assert_eq!(common::sample(&encoder, r#"{"text": "abcdef"}"#).ids.len(), 7);
}

#[test]
fn tokens_become_text_again() {
    let encoder = common::encoder(CHATML);
    let row = r#"{"messages": [{"role": "user", "content": "ü|q"}, {"role": "assistant", "content": "a"}]}"#;
    let sample = common::sample(&encoder, row);
    assert_eq!(encoder.decode(&sample.ids, false).unwrap(), sample.text);
    assert_eq!(encoder.decode(&sample.ids, true).unwrap(), "user\nü|q\nassistant\na\n");
    let prompt = encoder.prompt(row.as_bytes(), None).unwrap();
    assert_eq!(encoder.decode(&prompt, false).unwrap(), "<|im_start|>user\nü|q<|im_end|>\n<|im_start|>assistant\n");
    assert_eq!(encoder.prompt(row.as_bytes(), Some(1)).unwrap(), prompt);
    assert!(encoder.prompt(row.as_bytes(), Some(0)).is_err());
    assert!(encoder.prompt(row.as_bytes(), Some(3)).is_err());
}

#[test]
fn the_day_that_a_template_prints_is_given_and_part_of_the_fingerprint() {
    let dated = format!("{{{{- strftime_now('%d %b %Y %H:%M') }}}}{CHATML}");
    let open = |template: &str, date: Option<&str>| {
        common::encoder_with(template, |options| options.chat_template_date = date.map(str::to_owned))
    };
    let row = r#"{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}"#;
    let (leap, next) = (open(&dated, Some("2024-02-29")), open(&dated, Some("2024-03-01")));
    assert!(common::sample(&leap, row).text.starts_with("29 Feb 2024 00:00<|im_start|>"));
    assert!(leap.info().fingerprint.ends_with(", chat_template_date 2024-02-29"));
    assert_ne!(leap.info().fingerprint, next.info().fingerprint);
    assert!(open(&dated, None).info().fingerprint.contains("chat_template_date 20"));
    // A template that prints no date does not care.
    assert_eq!(open(CHATML, Some("2024-02-29")).info().fingerprint, open(CHATML, None).info().fingerprint);
    let dir = folder(&dated);
    let error = refused(TextOptions { chat_template_date: Some("29.2.2024".to_owned()), ..options(dir.path()) });
    assert!(error.code == ErrorCode::Config && error.message.contains("29.2.2024"), "{error}");
}
