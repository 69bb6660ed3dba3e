//! Preference rows are named for what they are; the chosen side can be trained, the rejected one never is.
use crate::common;

use common::{CHATML, encoder, encoder_with, problem, sample, trained};

/// The options that a message gives after `--columns`.
fn columns_of(message: &str) -> Vec<(String, String)> {
    let flag = message.split("--columns ").nth(1).unwrap();
    let pairs = flag.split(" trains ").next().unwrap().split(' ');
    pairs.map(|pair| pair.split_once('=').unwrap()).map(|(name, column)| (name.into(), column.into())).collect()
}

#[test]
fn each_form_is_named_and_what_it_says_to_do_trains_the_chosen_side() {
    let ask = r#"{"role": "user", "content": "q"}"#;
    let say = |text: &str| format!(r#"{{"role": "assistant", "content": "{text}"}}"#);
    let (good, bad) = (say("good"), say("bad"));
    let turn = |from: &str, value: &str| format!(r#"{{"from": "{from}", "value": "{value}"}}"#);
    for row in [
        r#"{"prompt": "q", "chosen": "good", "rejected": "bad"}"#.to_owned(),
        r#"{"question": "q", "chosen": "good", "rejected": "bad"}"#.to_owned(),
        r#"{"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"}"#.to_owned(),
        format!(r#"{{"prompt": [{ask}], "chosen": [{good}], "rejected": [{bad}]}}"#),
        format!(r#"{{"prompt": "q", "chosen": [{good}], "rejected": [{bad}]}}"#),
        format!(r#"{{"chosen": [{ask}, {good}], "rejected": [{ask}, {bad}]}}"#),
        format!(r#"{{"prompt": "q", "chosen": [{ask}, {good}], "rejected": [{ask}, {bad}], "score_chosen": 8.0}}"#),
        format!(r#"{{"messages": [{ask}], "chosen": {good}, "rejected": {bad}}}"#),
        format!(r#"{{"messages": [{ask}], "chosen": "good", "rejected": "bad"}}"#),
        format!(
            r#"{{"conversations": [{}], "chosen": {}, "rejected": {}}}"#,
            turn("human", "q"),
            turn("gpt", "good"),
            turn("gpt", "bad")
        ),
        format!(
            r#"{{"chosen": [{0}, {1}], "rejected": [{0}, {2}]}}"#,
            turn("human", "q"),
            turn("gpt", "good"),
            turn("gpt", "bad")
        ),
        format!(r#"{{"chosen_messages": [{ask}, {good}], "rejected_messages": [{ask}, {bad}]}}"#),
    ] {
        let refused = problem(&encoder(CHATML), row.as_bytes());
        assert_eq!(refused.reason, "preference row", "{row}: {}", refused.message);
        let columns = columns_of(&refused.message);
        let named = encoder_with(CHATML, |options| options.columns = columns.iter().cloned().collect());
        named.detect(&[row.as_bytes()]).unwrap();
        let encoded = sample(&named, &row);
        assert_eq!(trained(&named, &encoded), ["good<|im_end|>"], "{row} {columns:?}");
        assert_eq!(encoded.text, "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\ngood<|im_end|>\n", "{row}");
        // That the other side is not read is reported.
        assert!(encoded.notes.iter().any(|note| note.subject.starts_with("rejected")), "{row}");
    }
}

#[test]
fn a_source_of_preference_rows_is_named_before_anything_is_read() {
    let error = encoder(CHATML).detect(&[br#"{"prompt": "q", "chosen": "good", "rejected": "bad"}"#]).unwrap_err();
    assert!(error.message.contains("a preference row") && error.message.contains("completion=chosen"), "{error}");
}

#[test]
fn two_texts_without_a_prompt_are_plain_text() {
    let row = r#"{"chosen": "Human: q\n\nAssistant: good", "rejected": "Human: q\n\nAssistant: bad"}"#;
    let refused = problem(&encoder(CHATML), row.as_bytes());
    assert_eq!(columns_of(&refused.message), [("text".into(), "chosen".into())]);
}

#[test]
fn a_chosen_side_that_repeats_the_prompt_is_refused_as_a_completion() {
    let row = r#"{"prompt": "q", "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "good"}], "rejected": []}"#;
    let named = encoder_with(CHATML, |options| options.columns = [("completion".into(), "chosen".into())].into());
    let refused = problem(&named, row.as_bytes());
    assert_eq!(refused.reason, "bad field");
    assert!(refused.message.contains("--columns messages=chosen"), "{}", refused.message);
}

#[test]
fn an_answer_that_is_not_wanted_is_never_trained() {
    let encoder = encoder(CHATML);
    for shape in [
        r#""prompt": "q", "completion": "a""#,
        r#""messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]"#,
        r#""conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]"#,
    ] {
        for name in ["label", "kto_tag"] {
            let row = |verdict: &str| format!(r#"{{{shape}, "{name}": {verdict}}}"#);
            let refused = problem(&encoder, row("false").as_bytes());
            assert_eq!(refused.reason, "preference row", "{shape}");
            assert!(refused.message.contains(&format!("`{name}` is false")), "{}", refused.message);
            assert_eq!(sample(&encoder, &row("true")).notes.iter().count(), 0, "{shape}");
            // A class is no verdict; it is not read, and that is reported.
            assert_eq!(sample(&encoder, &row("0")).notes.iter().next().unwrap().subject, name);
        }
    }
}
