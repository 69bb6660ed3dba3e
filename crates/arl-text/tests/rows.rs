//! Rows of every known shape become the right conversation; rows that cannot be used say why.
use crate::common;

use common::property::holds;
use common::{CHATML, encoder, encoder_with, options, problem, sample, trained};
use proptest::prelude::*;

const TALK: &str = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n";

#[test]
fn every_shape_gives_the_same_conversation() {
    let encoder = encoder(CHATML);
    for row in [
        r#"{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}"#,
        r#"{"prompt": "q", "completion": "a"}"#,
        r#"{"question": "q", "answer": "a"}"#,
        r#"{"problem": "q", "solution": "a", "level": 3}"#,
        r#"{"instruction": "q", "output": "a", "input": ""}"#,
        r#"{"instruction": "q", "response": "a"}"#,
        r#"{"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}"#,
        r#"{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}"#,
        r#"{"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}"#,
        r#"{"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, {"role": "assistant", "content": "a"}], "tools": null, "advantages": {}}"#,
    ] {
        let sample = sample(&encoder, row);
        assert_eq!(sample.text, TALK, "{row}");
        assert_eq!(trained(&encoder, &sample), ["a<|im_end|>"], "{row}");
        // The reply and the stop token, nothing else.
        assert_eq!(sample.target_tokens(), 2, "{row}");
    }
}

#[test]
fn alpaca_and_sharegpt_keep_input_system_and_tools() {
    let encoder = encoder(CHATML);
    let text = sample(&encoder, r#"{"system": "s", "instruction": "do", "input": "it", "output": "a"}"#).text;
    assert!(text.starts_with("<|im_start|>system\ns<|im_end|>\n<|im_start|>user\ndo\n\nit<|im_end|>\n"), "{text}");
    let text = sample(
        &encoder,
        r#"{"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "{\"name\": \"f\", \"arguments\": {\"x\": 1.0}}"}, {"from": "observation", "value": "r"}, {"from": "gpt", "value": "a"}]}"#,
    )
    .text;
    assert!(text.contains(r#"{"name": "f", "arguments": {"x": 1.0}}"#), "{text}");
    assert!(text.contains("<|im_start|>tool\nr<|im_end|>"), "{text}");
}

#[test]
fn columns_are_found_under_the_names_that_are_given() {
    let encoder = encoder_with(CHATML, |options| {
        options.columns = [("prompt", "frage"), ("completion", "antwort")].map(|(a, b)| (a.into(), b.into())).into();
    });
    assert_eq!(encoder.detect(&[br#"{"frage": "q", "antwort": "a"}"#]).unwrap(), "frage -> antwort");
    assert_eq!(sample(&encoder, r#"{"frage": "q", "antwort": "a"}"#).text, TALK);
    let dir = common::folder(CHATML);
    let mut wrong = options(dir.path());
    wrong.columns = [("promt".to_owned(), "q".to_owned())].into();
    let error = arl_text::TextEncoder::open(wrong).err().unwrap();
    assert!(error.message.contains("promt") && error.hint.contains("prompt"), "{error}");
}

#[test]
fn plain_text_is_trained_whole_and_ends() {
    let encoder = encoder(CHATML);
    let sample = sample(&encoder, r#"{"text": "abc"}"#);
    assert_eq!(sample.ids, [97, 98, 99, 258]);
    assert_eq!(sample.target_tokens(), 3);
}

#[test]
fn token_rows_are_taken_as_they_are() {
    let encoder = encoder(CHATML);
    let sample = sample(&encoder, r#"{"input_ids": [1, 2, 3, 258], "labels": [-100, -100, 3, 258]}"#);
    assert_eq!((sample.ids.as_slice(), sample.weights()), ([1, 2, 3, 258].as_slice(), vec![0.0, 0.0, 1.0, 1.0]));
    for row in [
        r#"{"input_ids": [1, 2], "labels": [2, 3]}"#,
        r#"{"input_ids": [1, 2], "labels": [1]}"#,
        r#"{"input_ids": [1, 999]}"#,
        r#"{"input_ids": [1, -1]}"#,
        r#"{"input_ids": [1, 1.5]}"#,
    ] {
        assert_eq!(problem(&encoder, row.as_bytes()).reason, "bad tokens", "{row}");
    }
    assert_eq!(problem(&encoder, br#"{"input_ids": [1, 2], "labels": [-100, -100]}"#).reason, "no target");
}

#[test]
fn the_shape_is_found_once_and_then_strict() {
    let encoder = encoder(CHATML);
    assert_eq!(encoder.detect(&[br#"{"question": "q", "answer": "a"}"#]).unwrap(), "question -> answer");
    assert_eq!(problem(&encoder, br#"{"messages": []}"#).reason, "other shape");
    assert_eq!(problem(&encoder, br#"{"question": "q"}"#).reason, "other shape");
    let mixed: [&[u8]; 2] = [br#"{"question": "q", "answer": "a"}"#, br#"{"text": "t"}"#];
    assert!(encoder.detect(&mixed).unwrap_err().message.contains("row 1"));
    assert!(encoder.detect(&[br#"{"x": 1}"#]).unwrap_err().message.contains("the keys x"));
    assert!(encoder.detect(&[]).is_err());
}

#[test]
fn a_row_that_cannot_be_used_says_why() {
    let encoder = encoder(CHATML);
    let deep = format!("{}{}", "[".repeat(10_000), "]".repeat(10_000));
    let deep_in_tools = format!(
        r#"{{"messages": [{{"role": "user", "content": "q"}}, {{"role": "assistant", "content": "a"}}], "tools": [{deep}]}}"#
    );
    let utf16: Vec<u8> = "{\"text\": \"a\"}".encode_utf16().flat_map(u16::to_le_bytes).collect();
    let talk = |user: &str, reply: &str, more: &str| {
        format!(r#"{{"messages": [{{"role": "user", {user}}}, {{"role": "assistant", {reply}}}]{more}}}"#).into_bytes()
    };
    let plain = |more: &str| talk(r#""content": "q""#, r#""content": "a""#, more);
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (b"".to_vec(), "empty row"),
        (b"  \r\n".to_vec(), "empty row"),
        (b"\xEF\xBB\xBF".to_vec(), "empty row"),
        (b"{".to_vec(), "not json"),
        (b"{} {}".to_vec(), "not json"),
        (b"{\"text\": NaN}".to_vec(), "not json"),
        (b"{\"text\": 1e400}".to_vec(), "not json"),
        (b"{\"text\": 01}".to_vec(), "not json"),
        (b"{\"text\": \"a\nb\"}".to_vec(), "not json"),
        (b"{\"text\": \"\\x\"}".to_vec(), "not json"),
        (b"{'text': 'a'}".to_vec(), "not json"),
        (b"[1]".to_vec(), "other shape"),
        (b"3".to_vec(), "other shape"),
        (b"{\"text\": \"\\ud800\"}".to_vec(), "lone surrogate"),
        (b"{\"text\": \"\\ud800\\u0041\"}".to_vec(), "lone surrogate"),
        (b"{\"text\": \"\\udc00\\ud800\"}".to_vec(), "lone surrogate"),
        (b"{\"text\": \"\xFF\"}".to_vec(), "wrong encoding"),
        (b"{\"text\": \"\xED\xA0\x80\"}".to_vec(), "wrong encoding"),
        (utf16.clone(), "wrong encoding"),
        ([b"\xFF\xFE".as_slice(), &utf16].concat(), "wrong encoding"),
        (deep.into_bytes(), "nested too deep"),
        (deep_in_tools.into_bytes(), "nested too deep"),
        (format!("{}1", "{\"a\":".repeat(10_000)).into_bytes(), "nested too deep"),
        (b"{}".to_vec(), "no messages"),
        (b"{\"messages\": []}".to_vec(), "no messages"),
        (b"{\"messages\": null}".to_vec(), "no messages"),
        (b"{\"messages\": \"hello\"}".to_vec(), "bad field"),
        (b"{\"messages\": [1]}".to_vec(), "bad message"),
        (b"{\"messages\": [{\"content\": \"q\"}]}".to_vec(), "bad message"),
        (b"{\"messages\": [{\"role\": \"robot\", \"content\": \"q\"}]}".to_vec(), "unknown role"),
        (b"{\"conversations\": [{\"from\": \"robot\", \"value\": \"q\"}]}".to_vec(), "unknown role"),
        (b"{\"messages\": [{\"role\": \"user\", \"content\": \"q\"}]}".to_vec(), "last message not from the assistant"),
        (talk(r#""content": 1"#, r#""content": "a""#, ""), "bad message"),
        (talk(r#""content": null"#, r#""content": "a""#, ""), "bad message"),
        (talk(r#""content": "q""#, r#""content": null"#, ""), "bad message"),
        (talk(r#""content": "q""#, r#""x": 1"#, ""), "bad message"),
        (talk(r#""content": [{"type": "image_url", "image_url": {"url": "x"}}]"#, r#""content": "a""#, ""), "image"),
        (talk(r#""content": [{"type": "sound"}]"#, r#""content": "a""#, ""), "bad message"),
        (talk(r#""content": [{"type": "text"}]"#, r#""content": "a""#, ""), "bad message"),
        (talk(r#""content": "q""#, r#""content": "a", "tool_calls": "f()""#, ""), "bad message"),
        (talk(r#""content": "q", "tool_calls": [{}]"#, r#""content": "a""#, ""), "bad message"),
        (talk(r#""content": "q""#, r#""content": "a", "weight": -1"#, ""), "bad message"),
        (talk(r#""content": "q""#, r#""content": "a", "train": "no""#, ""), "bad message"),
        (talk(r#""content": "q", "train": true"#, r#""content": "a""#, ""), "bad message index"),
        (talk(r#""content": "q""#, r#""content": "a", "train": false"#, ""), "no target"),
        (talk(r#""content": "q""#, r#""content": "a", "weight": 0"#, ""), "no target"),
        (plain(r#", "tools": 1"#), "bad field"),
        (plain(r#", "tools": "{}""#), "bad field"),
        (plain(r#", "record_id": []"#), "bad field"),
        (plain(r#", "advantages": [1]"#), "bad field"),
        (plain(r#", "advantages": {"1": null}"#), "bad field"),
        (plain(r#", "advantages": {"0": 1}"#), "bad message index"),
        (plain(r#", "advantages": {"2": 1}"#), "bad message index"),
        (plain(r#", "advantages": {"-1": 1}"#), "bad message index"),
        (plain(r#", "scores": {"0": 1}"#), "bad message index"),
        (plain(r#", "logprobs": {"5": []}"#), "bad message index"),
    ];
    for (row, reason) in cases {
        let problem = problem(&encoder, &row);
        let shown = String::from_utf8_lossy(&row[..row.len().min(200)]).into_owned();
        assert_eq!((problem.reason.as_str(), problem.row), (reason, 7), "{shown}: {}", problem.message);
        assert!(problem.message.len() > 10, "{shown}: {}", problem.message);
    }
}

#[test]
fn a_huge_row_is_refused_quickly() {
    let encoder = encoder(CHATML);
    let row = format!(r#"{{"text": "{}"}}"#, "a".repeat(200 << 20));
    let start = std::time::Instant::now();
    assert_eq!(problem(&encoder, row.as_bytes()).reason, "row too large");
    assert!(start.elapsed().as_secs() < 2);
}

#[test]
fn many_keys_and_many_items_take_linear_time() {
    let encoder = encoder(CHATML);
    let keys: Vec<String> = (0..300_000).map(|i| format!(r#""k{i}": {i}"#)).collect();
    let row = format!(r#"{{"question": "q", "answer": "a", {}}}"#, keys.join(", "));
    let start = std::time::Instant::now();
    sample(&encoder, &row);
    let row = format!(
        r#"{{"messages": [{{"role": "user", "content": "q"}}, {{"role": "assistant", "content": "", "tool_calls": [{{"function": {{"name": "f", "arguments": {{{}}}}}}}]}}]}}"#,
        keys.join(", ")
    );
    assert!(sample(&encoder, &row).text.contains(r#""k299999": 299999"#));
    assert!(start.elapsed().as_secs() < 60, "{:?}", start.elapsed());
}

#[test]
fn a_byte_order_mark_at_the_start_is_no_text() {
    let encoder = encoder(CHATML);
    assert_eq!(sample(&encoder, "\u{FEFF}{\"question\": \"q\", \"answer\": \"a\"}").text, TALK);
}

#[test]
fn numbers_keys_and_nulls_reach_the_template_as_they_are() {
    let encoder = encoder(CHATML);
    let arguments = r#"{"z": 1.0, "a": 1, "e": 1e-07, "big": 123456789012345678901234567890123456789012345678901234567890, "neg": -0.0, "n": null, "t": true, "l": [1.50, 2E5, 1e16, 0.1], "u": 18446744073709551615, "x<|y": "ü\"\\\u0001\u007f/<>&'"}"#;
    let printed = r#"{"z": 1.0, "a": 1, "e": 1e-07, "big": 123456789012345678901234567890123456789012345678901234567890, "neg": -0.0, "n": null, "t": true, "l": [1.5, 200000.0, 1e+16, 0.1], "u": 18446744073709551615, "x<|y": "ü\"\\\u0001"#;
    let row = format!(
        r#"{{"messages": [{{"role": "user", "content": "q"}}, {{"role": "assistant", "content": "", "tool_calls": [{{"function": {{"name": "f", "arguments": {arguments}}}}}]}}]}}"#
    );
    let text = sample(&encoder, &row).text;
    assert!(text.contains(&format!("{printed}\u{7f}/<>&'\"}}")), "{text}");
}

#[test]
fn a_repeated_key_keeps_its_place_and_its_last_value() {
    let encoder = encoder(CHATML);
    let row = r#"{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [{"function": {"b": 1, "a": 2, "b": 3}}]}]}"#;
    assert!(sample(&encoder, row).text.contains(r#"{"b": 3, "a": 2}"#));
}

#[test]
fn advantages_choose_the_replies_that_are_trained() {
    let row = |more: &str| {
        format!(
            r#"{{"messages": [{{"role": "user", "content": "q"}}, {{"role": "assistant", "content": "a"}}, {{"role": "user", "content": "q"}}, {{"role": "assistant", "content": "b"}}]{more}}}"#
        )
    };
    let spans = |encoder: &arl_text::TextEncoder, row: &str| trained(encoder, &sample(encoder, row));
    let both = ["a<|im_end|>", "b<|im_end|>"];
    let all = encoder(CHATML);
    assert_eq!(spans(&all, &row("")), both);
    assert_eq!(spans(&all, &row(r#", "advantages": {"1": 0.5}"#)), both[..1]);
    assert_eq!(spans(&all, &row(r#", "advantages": {"3": -1, "1": 0}"#)), both);
    assert_eq!(spans(&all, &row(r#", "advantages": null, "scores": {"1": 1}"#)), both);
    let minimal = encoder_with(CHATML, |options| options.minimal_advantage = Some(0.25));
    assert_eq!(spans(&minimal, &row(r#", "advantages": {"1": 0.2, "3": 0.25}"#)), both[1..]);
    let zero = encoder_with(CHATML, |options| options.drop_zero_advantage = true);
    assert_eq!(spans(&zero, &row(r#", "advantages": {"1": 0.0, "3": -2}"#)), both[1..]);
    let positive = encoder_with(CHATML, |options| options.skip_non_positive_advantage = true);
    assert_eq!(spans(&positive, &row(r#", "advantages": {"1": 3, "3": -2}"#)), both[..1]);
    assert_eq!(problem(&positive, row(r#", "advantages": {"1": 0}"#).as_bytes()).reason, "no target");
}

#[test]
fn a_message_may_carry_its_own_weight() {
    let encoder = encoder(CHATML);
    let row = r#"{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "train": false}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "b", "weight": 0.5}], "record_id": 12}"#;
    let sample = sample(&encoder, row);
    assert_eq!(trained(&encoder, &sample), ["b<|im_end|>"]);
    let weights = sample.weights();
    assert_eq!(weights.iter().filter(|&&w| w == 0.5).count(), 2);
    assert_eq!(weights.iter().filter(|&&w| w == 0.0).count(), weights.len() - 2);
    assert_eq!(sample.record_id.as_deref(), Some("12"));
}

#[test]
fn only_the_completion_of_a_conversational_prompt_is_trained() {
    let encoder = encoder(CHATML);
    let row = r#"{"prompt": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "old"}, {"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "new"}]}"#;
    assert_eq!(trained(&encoder, &sample(&encoder, row)), ["new<|im_end|>"]);
}

#[test]
fn no_bytes_make_the_reader_panic() {
    let encoder = encoder(CHATML);
    let seed = br#"{"messages": [{"role": "user", "content": "q\ud83d\ude00"}, {"role": "assistant", "content": "a", "tool_calls": [{"x": -1.5e3}]}], "advantages": {"1": 1}}"#;
    #[derive(Clone, Debug)]
    enum Change {
        Put(u8),
        CutOff,
        Remove,
    }
    let put = prop::sample::select(&b"{}[]\":,\\u0-e\xFF\x00 "[..]).prop_map(Change::Put);
    let change = prop_oneof![put, Just(Change::CutOff), Just(Change::Remove)];
    // Where a change would be beyond the end of what an earlier one left, it comes around.
    let changes = prop::collection::vec((0..seed.len(), change), 1..=3);
    let good = std::cell::Cell::new(0);
    holds(20_000, changes, |changes| {
        let mut row = seed.to_vec();
        for (at, change) in changes {
            let at = at % row.len();
            match change {
                Change::Put(byte) => row[at] = byte,
                Change::CutOff => row.truncate(at.max(1)),
                Change::Remove => drop(row.remove(at)),
            }
            if row.is_empty() {
                row.push(b' ');
            }
        }
        good.set(good.get() + usize::from(encoder.encode(0, &row).is_ok()));
        Ok(())
    });
    let good = good.get();
    assert!(good > 0);
}
