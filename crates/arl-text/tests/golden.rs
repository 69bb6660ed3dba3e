//! The golden conversations: text, ids and spans are those of transformers, for the stock templates of Qwen3 and Qwen2.5.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stderr, reason = "helpers of tests fail loudly")]

mod common;

use arl_text::{Outcome, TextEncoder};
use serde_json::Value;

/// The case whose only reply is an empty text.
const BLANK: &str = "empty reply";

fn golden(name: &str) {
    let (Some(cases), Some(model)) = (common::shared("golden/chat"), common::tokenizer(name)) else { return };
    let encoder = TextEncoder::open(common::options(&model)).unwrap();
    let lines = std::fs::read_to_string(cases.join(format!("{name}.jsonl"))).unwrap();
    let mut count = 0;
    for line in lines.lines() {
        let case: Value = serde_json::from_str(line).unwrap();
        let title = format!("{name}: {}", case["name"]);
        count += 1;
        let outcome = encoder.encode(0, line.as_bytes());
        if case["name"] == BLANK {
            // transformers renders a reply with nothing to learn; here the row is a problem.
            assert_eq!(outcome.unwrap_err().reason, "blank reply", "{title}");
            continue;
        }
        let Ok(Outcome::Sample(sample)) = outcome else { panic!("{title}: {outcome:?}") };
        assert_eq!(sample.text, case["text"].as_str().unwrap(), "{title}");
        assert_eq!(serde_json::json!(sample.ids), case["input_ids"], "{title}");
        let spans: Vec<[usize; 3]> = sample.spans.iter().map(|s| [s.message, s.first, s.last]).collect();
        assert_eq!(serde_json::json!(spans), case["spans"], "{title}");
    }
    assert_eq!(count, 16, "{name}");
}

#[test]
fn qwen3_conversations_are_those_of_transformers() {
    golden("qwen3");
}

#[test]
fn qwen2_5_conversations_are_those_of_transformers() {
    golden("qwen2_5");
}

#[test]
fn the_tokens_that_end_a_reply_are_found() {
    let Some(model) = common::tokenizer("qwen3") else { return };
    let encoder = TextEncoder::open(common::options(&model)).unwrap();
    assert_eq!(encoder.info().stop_ids, [151_645]);
    assert_eq!(encoder.vocab_size(), 151_669);
    assert_eq!(encoder.info().template_source, "tokenizer_config.json");
}

#[test]
fn a_prompt_is_what_training_puts_before_the_reply() {
    let (Some(cases), Some(model)) = (common::shared("golden/chat"), common::tokenizer("qwen3")) else { return };
    let encoder = TextEncoder::open(common::options(&model)).unwrap();
    let lines = std::fs::read_to_string(cases.join("qwen3.jsonl")).unwrap();
    let blank = format!(r#""name": "{BLANK}""#);
    for line in lines.lines().filter(|line| !line.contains(&blank)) {
        let Ok(Outcome::Sample(sample)) = encoder.encode(0, line.as_bytes()) else { panic!("{line}") };
        let prompt = encoder.prompt(line.as_bytes(), None).unwrap();
        let last = sample.spans.last().unwrap();
        assert_eq!(prompt, sample.ids[..last.first], "{line}");
    }
}
