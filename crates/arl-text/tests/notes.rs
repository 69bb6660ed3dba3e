//! Keys that nobody reads, and replies that follow each other, are noticed in the rows that are trained all the same.
use crate::common;

use std::sync::Arc;

use arl_text::{NoteKind, TokenCache};
use common::{CHATML, encoder, sample};

/// Path and count of each key that is not read.
fn unread(template: &str, row: &str) -> Vec<(String, u32)> {
    let encoded = sample(&encoder(template), row);
    let notes = encoded.notes.iter().filter(|note| note.kind == NoteKind::UnreadKey);
    notes.map(|note| (note.subject.clone(), note.count)).collect()
}

fn talk(user: &str, reply: &str, more: &str) -> String {
    format!(
        r#"{{"messages": [{{"role": "user", "content": "q"{user}}}, {{"role": "assistant", "content": "a"{reply}}}]{more}}}"#
    )
}

#[test]
fn a_key_that_nobody_reads_is_noticed_by_its_path() {
    for (row, paths) in [
        (talk("", "", r#", "source": "web", "mask": [0, 1]"#), vec![("source", 1), ("mask", 1)]),
        (talk(r#", "foo": 1"#, r#", "foo": false, "loss": true"#, ""), vec![("messages[].foo", 2), ("messages[].loss", 1)]),
        (talk("", r#", "trainable": false"#, ""), vec![("messages[].trainable", 1)]),
        (talk(r#", "reasoning_content": "x""#, "", ""), vec![("messages[].reasoning_content", 1)]),
        // These have no effect where they are.
        (talk(r#", "weight": 1, "train": false"#, "", ""), vec![("messages[].weight", 1)]),
        (talk("", "", r#", "weight": 0"#), vec![("weight", 1)]),
        (
            r#"{"messages": [{"role": "user", "content": [{"type": "text", "text": "q", "cache_control": {"type": "ephemeral"}}]}, {"role": "assistant", "content": "a"}]}"#.to_owned(),
            vec![("messages[].content[].cache_control", 1)],
        ),
        (
            r#"{"conversations": [{"from": "human", "value": "q", "mood": "x"}, {"from": "gpt", "value": "a"}], "topic": "t"}"#.to_owned(),
            vec![("conversations[].mood", 1), ("topic", 1)],
        ),
        (r#"{"prompt": "q", "completion": "a", "response": "b", "level": 3}"#.to_owned(), vec![("response", 1), ("level", 1)]),
        (r#"{"text": "t", "label": false}"#.to_owned(), vec![("label", 1)]),
        (r#"{"input_ids": [1, 2], "attention_mask": [0, 1]}"#.to_owned(), vec![("attention_mask", 1)]),
    ] {
        let expected: Vec<(String, u32)> = paths.into_iter().map(|(path, count)| (path.to_owned(), count)).collect();
        assert_eq!(unread(CHATML, &row), expected, "{row}");
    }
}

#[test]
fn what_is_read_or_says_nothing_is_not_noticed() {
    let tool = r#"{"role": "tool", "tool_call_id": "c", "name": "f", "content": "r"}"#;
    for row in [
        talk(
            r#", "id": "m", "foo": null"#,
            r#", "refusal": null, "annotations": [], "audio": null, "function_call": null"#,
            "",
        ),
        talk("", r#", "index": 0, "x": "", "y": {}"#, r#", "source": null, "tags": [], "z": """#),
        talk(
            "",
            "",
            r#", "record_id": "r", "reward": 1.0, "step": -1, "split": "train", "scores": {"1": 1}, "id": 7, "tools": null, "label": true"#,
        ),
        format!(
            r#"{{"messages": [{{"role": "user", "content": "q"}}, {{"role": "assistant", "content": "a", "tool_calls": [{{"id": "c", "type": "function", "index": 0, "function": {{"name": "f", "arguments": {{}}}}}}]}}, {tool}, {{"role": "assistant", "content": "a"}}], "advantages": {{}}, "created_at_step": {{}}, "logprobs": null, "chat_template_kwargs": {{"x": 1}}}}"#
        ),
        r#"{"system": "s", "instruction": "q", "input": "i", "output": "a"}"#.to_owned(),
        r#"{"input_ids": [1, 2], "labels": [-100, 2], "attention_mask": [1, 1]}"#.to_owned(),
    ] {
        assert_eq!(unread(CHATML, &row), [], "{row}");
    }
    // The template looks at this one.
    let template = CHATML.replace("'\\n' + m.content", "(m.mood or '') + '\\n' + m.content");
    assert_eq!(unread(&template, &talk(r#", "mood": "x""#, "", "")), []);
    assert_eq!(unread(CHATML, &talk(r#", "mood": "x""#, "", "")), [("messages[].mood".to_owned(), 1)]);
}

#[test]
fn a_row_with_any_number_of_keys_has_few_notes() {
    let keys: Vec<String> = (0..10_000).map(|i| format!(r#""k{i}": {i}"#)).collect();
    let long = "x".repeat(100_000);
    let notes = unread(CHATML, &talk("", "", &format!(r#", "{long}": 1, {}"#, keys.join(", "))));
    assert_eq!(notes.len(), 65);
    assert!(notes.iter().all(|(path, _)| path.len() < 100));
    assert_eq!(notes.last().unwrap(), &("...".to_owned(), 10_001 - 64));
}

#[test]
fn many_rows_with_keys_of_their_own_have_few_totals() {
    let dir = tempfile::tempdir().unwrap();
    let encoder = Arc::new(encoder(CHATML));
    let rows: Vec<String> = (0..1000).map(|i| talk("", "", &format!(r#", "k{i}": 1, "source": "s""#))).collect();
    let bytes: Vec<&[u8]> = rows.iter().map(String::as_bytes).collect();
    let indexes: Vec<u32> = (0..1000).collect();
    let cache = TokenCache::open(dir.path(), "key", rows.len(), encoder).unwrap();
    cache.fill(&bytes, &indexes).unwrap();
    let notes = cache.notes();
    assert_eq!(notes.len(), 129);
    let of = |subject: &str| notes.iter().find(|note| note.subject == subject).unwrap();
    assert_eq!((of("source").rows, of("source").first_row), (1000, 0));
    assert_eq!(of("source").message(), "`source` is not read");
    assert_eq!((of("...").rows, of("...").message().as_str()), (1000 - 127, "further keys are not read"));
}

#[test]
fn replies_that_follow_a_reply_are_counted_from_every_source() {
    let reply = r#"{"role": "assistant", "content": "a"}"#;
    let ask = r#"{"role": "user", "content": "q"}"#;
    for (row, count) in [
        (format!(r#"{{"messages": [{ask}, {reply}, {reply}, {reply}]}}"#), 2),
        (format!(r#"{{"messages": [{ask}, {reply}, {ask}, {reply}]}}"#), 0),
        (format!(r#"{{"prompt": [{ask}, {reply}], "completion": [{reply}]}}"#), 1),
        (
            r#"{"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "{\"name\": \"f\", \"arguments\": {}}"}, {"from": "gpt", "value": "a"}]}"#.to_owned(),
            1,
        ),
    ] {
        let encoded = sample(&encoder(CHATML), &row);
        let found: u32 =
            encoded.notes.iter().filter(|note| note.kind == NoteKind::ConsecutiveReplies).map(|note| note.count).sum();
        assert_eq!(found, count, "{row}");
    }
}
