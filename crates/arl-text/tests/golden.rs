//! The golden conversations: text, ids and spans are those of transformers, for the stock templates of Qwen3 and Qwen2.5.
use crate::common;

use arl_text::{Encoded, NoteKind, Outcome, TextEncoder, TextOptions};
use serde_json::Value;

/// The case whose only reply is an empty text.
const BLANK: &str = "empty reply";
/// Qwen2.5's template quotes arguments that are a text a second time, and transformers lets it. A model must write the
/// object, and servers give the template the object: so this case is that of the object.
const QUOTED_TWICE: &str = "tool call arguments as a string";

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
        if name == "qwen2_5" && case["name"] == QUOTED_TWICE {
            is_that_of_the_object(&encoder, &case, &sample);
            continue;
        }
        assert_eq!(sample.text, case["text"].as_str().unwrap(), "{title}");
        assert_eq!(serde_json::json!(sample.ids), case["input_ids"], "{title}");
        let spans: Vec<[usize; 3]> = sample.spans.iter().map(|s| [s.message, s.first, s.last]).collect();
        assert_eq!(serde_json::json!(spans), case["spans"], "{title}");
    }
    assert_eq!(count, 16, "{name}");
}

fn is_that_of_the_object(encoder: &TextEncoder, case: &Value, sample: &Encoded) {
    let mut with_object = case.clone();
    let arguments = &mut with_object["messages"][1]["tool_calls"][0]["function"]["arguments"];
    let text = arguments.as_str().unwrap().to_owned();
    *arguments = serde_json::from_str(&text).unwrap();
    let same = common::sample(encoder, &with_object.to_string());
    assert_eq!((&sample.text, &sample.ids, &sample.spans), (&same.text, &same.ids, &same.spans));
    let quoted = serde_json::to_string(&text).unwrap();
    assert_eq!(sample.text, case["text"].as_str().unwrap().replace(&quoted, &text));
    // The case's own name, text, ids and spans are keys that are not read.
    let read = sample.notes.iter().filter(|note| note.kind != NoteKind::UnreadKey);
    let notes: Vec<_> = read.map(|note| (note.kind, note.count)).collect();
    assert_eq!(notes, [(NoteKind::ParsedArguments, 1)]);
}

/// Why a case of a newer template is refused; the others are rendered as transformers renders them.
fn refusal(template: &str, case: &Value) -> Option<&'static str> {
    let name = case["name"].as_str().unwrap();
    let calls = case["messages"].as_array().unwrap().iter().any(|message| message.get("tool_calls").is_some());
    match name {
        "images counted" => Some("image"),
        "a system message in the middle" if template == "qwen3_vl" => Some("leaves out the content of messages[1]"),
        _ if template == "qwen2_5_vl" && calls => Some("leaves out the tool calls of messages["),
        _ => None,
    }
}

#[test]
fn newer_templates_render_what_transformers_renders_and_nothing_is_lost() {
    let (Some(cases), Some(model)) = (common::shared("golden/chat"), common::tokenizer("qwen3")) else { return };
    for template in ["qwen2_5_vl", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6", "qwen3_8", "qwen3_vl"] {
        let file = cases.join(format!("templates/{template}.jinja"));
        let encoder = TextEncoder::open(TextOptions { chat_template: Some(file), ..common::options(&model) }).unwrap();
        let lines = std::fs::read_to_string(cases.join(format!("{template}.jsonl"))).unwrap();
        for line in lines.lines() {
            let case: Value = serde_json::from_str(line).unwrap();
            let title = format!("{template}: {}", case["name"]);
            let outcome = encoder.encode(0, line.as_bytes());
            if case["name"] == BLANK {
                assert_eq!(outcome.unwrap_err().reason, "blank reply", "{title}");
                continue;
            }
            if let Some(why) = refusal(template, &case) {
                let Err(problem) = outcome else { panic!("{title}: {outcome:?}") };
                assert!(problem.message.contains(why) || problem.reason == why, "{title}: {}", problem.message);
                continue;
            }
            if case["name"] == QUOTED_TWICE && case.get("error").is_some() {
                // The template iterates over arguments: it gets the object and can be rendered.
                let Ok(Outcome::Sample(sample)) = outcome else { panic!("{title}: {outcome:?}") };
                assert!(sample.text.contains("<parameter=expr>\n1+1\n</parameter>"), "{title}: {}", sample.text);
                continue;
            }
            if let Some(error) = case.get("error").and_then(Value::as_str) {
                let Err(problem) = outcome else { panic!("{title}: {outcome:?}") };
                assert!(problem.message.contains(error.trim()), "{title}: {}", problem.message);
                continue;
            }
            let Ok(Outcome::Sample(sample)) = outcome else { panic!("{title}: {outcome:?}") };
            assert_eq!(sample.text, case["text"].as_str().unwrap(), "{title}");
            if case["spans"].is_null() {
                continue;
            }
            assert_eq!(serde_json::json!(sample.ids), case["input_ids"], "{title}");
            let spans: Vec<[usize; 3]> = sample.spans.iter().map(|s| [s.message, s.first, s.last]).collect();
            assert_eq!(serde_json::json!(spans), case["spans"], "{title}");
        }
    }
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
