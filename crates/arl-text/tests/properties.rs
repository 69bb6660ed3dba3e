//! Of any conversation and any template: every piece of the row is in the text once, and trained where a reply says it, or the
//! row is refused, or what is missing is noted.
use crate::common;

use std::cell::Cell;

use arl_text::{Encoded, Outcome, TextEncoder, TextOptions};
use common::templates::{DEEPSEEK, GEMMA, LLAMA, MISTRAL, PHI, SPECIAL};
use common::{CHATML, trained};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use serde_json::{Value, json};

const PLAIN: &str = "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}\
    {%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}";

/// What texts are made of: words, all that marks a turn in some template, and what escaping changes.
const BITS: [&str; 24] = [
    "word",
    "user",
    "assistant",
    "\n",
    "  ",
    "\"",
    "\\",
    "{\"a\": 1}",
    "ü长👍",
    "|",
    "<",
    ">",
    "<|im_start|>assistant\n",
    "<|im_end|>\n",
    "<|endoftext|>",
    "[/INST]",
    "</s>",
    "<start_of_turn>model\n",
    "<end_of_turn>",
    "<|end|>\n<|assistant|>\n",
    "<eos><A>",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "\u{E000}\u{E004}\u{E005}",
    "<tool_call>",
];

/// A reply: its reasoning under a key, or in tags, or none.
#[derive(Clone, Debug)]
enum Thought {
    None,
    Key(String),
    Tags(String),
}

/// A call: the text of its argument, whether it comes as JSON text, and what the tool answers.
type Call = (String, bool, String);

#[derive(Clone, Debug)]
struct Turn {
    user: String,
    calls: Vec<Call>,
    said_with_calls: Option<String>,
    thought: Thought,
    reply: String,
}

#[derive(Clone, Debug)]
struct Talk {
    system: Option<String>,
    tools: usize,
    turns: Vec<Turn>,
}

fn text() -> impl Strategy<Value = String> {
    prop::collection::vec(prop::sample::select(&BITS[..]), 0..5).prop_map(|bits| bits.concat())
}

fn talk() -> impl Strategy<Value = Talk> {
    let thought = prop_oneof![Just(Thought::None), text().prop_map(Thought::Key), text().prop_map(Thought::Tags)];
    let calls = prop::collection::vec((text(), any::<bool>(), text()), 0..3);
    let turn = (text(), calls, prop::option::of(text()), thought, text()).prop_map(
        |(user, calls, said_with_calls, thought, reply)| Turn { user, calls, said_with_calls, thought, reply },
    );
    (prop::option::of(text()), 0..3usize, prop::collection::vec(turn, 1..4)).prop_map(|(system, tools, turns)| Talk {
        system,
        tools,
        turns,
    })
}

/// A piece of a row that must be found again by its mark.
struct Piece {
    mark: String,
    /// The message that says it, where that is a reply.
    reply: Option<usize>,
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Said,
    Thought,
    Tool,
}

#[derive(Default)]
struct Row {
    messages: Vec<Value>,
    pieces: Vec<Piece>,
}

impl Row {
    /// The text with a mark of its own in the middle of its words.
    fn mark(&mut self, kind: Kind, reply: bool, text: &str) -> String {
        let mark = format!("qz{}z", self.pieces.len());
        let half = (0..=text.len() / 2).rev().find(|&at| text.is_char_boundary(at)).unwrap();
        let marked = format!("{}{mark}{}", &text[..half], &text[half..]);
        let reply = reply.then_some(self.messages.len());
        self.pieces.push(Piece { mark, reply, kind });
        marked
    }

    fn of(talk: &Talk) -> (Self, String) {
        let mut row = Self::default();
        let tools: Vec<Value> = (0..talk.tools)
            .map(|_| {
                let name = row.mark(Kind::Tool, false, "");
                json!({ "type": "function", "function": { "name": name, "description": "d", "parameters": {} } })
            })
            .collect();
        if let Some(text) = &talk.system {
            let content = row.mark(Kind::Said, false, text);
            row.messages.push(json!({ "role": "system", "content": content }));
        }
        for turn in &talk.turns {
            row.turn(turn);
        }
        let mut json = json!({ "messages": row.messages });
        if talk.tools > 0 {
            json["tools"] = json!(tools);
        }
        (row, json.to_string())
    }

    fn turn(&mut self, turn: &Turn) {
        let content = self.mark(Kind::Said, false, &turn.user);
        self.messages.push(json!({ "role": "user", "content": content }));
        if !turn.calls.is_empty() {
            let content = turn.said_with_calls.as_ref().map(|text| self.mark(Kind::Said, true, text));
            let calls: Vec<Value> = turn.calls.iter().map(|(text, as_text, _)| {
                let name = self.mark(Kind::Said, true, "");
                let object = json!({ self.mark(Kind::Said, true, ""): self.mark(Kind::Said, true, text), "n": [1, 2.5] });
                let arguments = if *as_text { json!(object.to_string()) } else { object };
                json!({ "id": "c12345678", "type": "function", "function": { "name": name, "arguments": arguments } })
            }).collect();
            self.messages.push(json!({ "role": "assistant", "content": content, "tool_calls": calls }));
            for (_, _, answer) in &turn.calls {
                let content = self.mark(Kind::Said, false, answer);
                self.messages.push(json!({ "role": "tool", "tool_call_id": "c12345678", "content": content }));
            }
        }
        let reply = match &turn.thought {
            Thought::None => json!({ "content": self.mark(Kind::Said, true, &turn.reply) }),
            Thought::Key(text) => {
                json!({ "reasoning_content": self.mark(Kind::Thought, true, text), "content": self.mark(Kind::Said, true, &turn.reply) })
            }
            Thought::Tags(text) => {
                let thought = self.mark(Kind::Thought, true, text);
                let said = self.mark(Kind::Said, true, &turn.reply);
                json!({ "content": format!("<think>\n{thought}\n</think>\n\n{said}") })
            }
        };
        let mut message = json!({ "role": "assistant" });
        message.as_object_mut().unwrap().extend(reply.as_object().unwrap().clone());
        self.messages.push(message);
    }
}

fn count(sample: &Encoded, name: &str) -> usize {
    sample.notes.iter().filter(|note| note.kind.name() == name).map(|note| note.count as usize).sum()
}

fn check(encoder: &TextEncoder, row: &Row, json: &str, sample: &Encoded) {
    let spans = trained(encoder, sample);
    let of_message = |message: usize| -> String {
        sample
            .spans
            .iter()
            .zip(&spans)
            .filter(|(span, _)| span.message == message)
            .map(|(_, text)| text.as_str())
            .collect()
    };
    let (mut unthought, mut untold) = (0, false);
    for Piece { mark, reply, kind } in &row.pieces {
        let times = sample.text.matches(mark.as_str()).count();
        match kind {
            Kind::Thought if times == 0 => unthought += 1,
            Kind::Tool if times == 0 => untold = true,
            _ => assert_eq!(times, 1, "{mark} of {json} in {}", sample.text),
        }
        for (span, text) in sample.spans.iter().zip(&spans) {
            let own = times == 1 && *reply == Some(span.message);
            assert!(own || !text.contains(mark.as_str()), "{mark} of {json} is trained in {text}");
        }
        if let Some(message) = reply.filter(|_| times == 1) {
            assert!(of_message(message).contains(mark.as_str()), "{mark} of {json} is not trained in {}", sample.text);
        }
    }
    assert_eq!(unthought, count(sample, "lost reasoning") + count(sample, "earlier reasoning"), "{json}");
    assert_eq!(usize::from(untold), count(sample, "lost tools"), "{json}");
    // The last reply is what follows the generation prompt, but for what that has beyond the header.
    let last = sample.spans.last().unwrap();
    let prompt = encoder.prompt(json.as_bytes(), None).unwrap();
    let extra = prompt.strip_prefix(&sample.ids[..last.first]).map(|extra| encoder.decode(extra, false).unwrap());
    assert!(
        matches!(extra.as_deref(), Some("" | "<think>\n" | "<think>\n\n</think>\n\n")),
        "{json}: {extra:?} {}",
        sample.text
    );
    assert!(encoder.info().stop_ids.contains(&sample.ids[last.last]), "{json}: {}", sample.text);
}

/// The same rows each time; a failure prints its smallest case.
fn every_talk(encoder: &TextEncoder, complete: bool) {
    let config = Config { cases: 150, failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let taken = Cell::new(0);
    runner
        .run(&talk(), |talk| {
            let (row, json) = Row::of(&talk);
            match encoder.encode(0, json.as_bytes()) {
                Ok(Outcome::Sample(sample)) => {
                    taken.set(taken.get() + 1);
                    check(encoder, &row, &json, &sample);
                }
                Err(problem) if !complete => assert!(!problem.message.is_empty()),
                other => panic!("{json}: {other:?}"),
            }
            Ok(())
        })
        .unwrap_or_else(|error| panic!("{error}"));
    assert!(taken.get() >= 10, "{} rows were taken", taken.get());
}

fn with_template(template: &str, eos: &str) -> TextEncoder {
    let dir = common::folder_of(template, &SPECIAL, eos);
    TextEncoder::open(common::options(dir.path())).unwrap()
}

#[test]
fn chatml_has_every_piece() {
    every_talk(&with_template(CHATML, "<|im_end|>"), true);
    let marked = "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}{%- if m.role == 'assistant' %}{% generation %}\
        {{- m.content or '' }}{%- for c in m.tool_calls or [] %}{{- c.function | tojson }}{%- endfor %}{{- '<|im_end|>' }}{% endgeneration %}\
        {%- else %}{{- m.content + '<|im_end|>' }}{%- endif %}{{- '\\n' }}{%- endfor %}\
        {%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}";
    every_talk(&with_template(marked, "<|im_end|>"), true);
    every_talk(&with_template(PLAIN, "<|im_end|>"), false);
}

#[test]
fn other_families_have_every_piece_or_refuse() {
    for (template, eos) in [(LLAMA, "<eos>"), (MISTRAL, "</s>"), (GEMMA, "<eos>"), (PHI, "<eos>"), (DEEPSEEK, "<eos>")]
    {
        every_talk(&with_template(template, eos), false);
    }
}

#[test]
fn the_stock_templates_have_every_piece_or_say_so() {
    let own = std::fs::read_to_string(common::root().join("assets/model/chat_template.jinja")).unwrap();
    every_talk(&with_template(&own, "<|im_end|>"), true);
    for name in ["qwen3", "qwen2_5"] {
        let Some(model) = common::tokenizer(name) else { continue };
        let config: Value =
            serde_json::from_str(&std::fs::read_to_string(model.join("tokenizer_config.json")).unwrap()).unwrap();
        every_talk(&with_template(config["chat_template"].as_str().unwrap(), "<|im_end|>"), true);
    }
    let Some(templates) = common::shared("golden/chat/templates") else { return };
    for name in ["qwen2_5_vl", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6", "qwen3_8", "qwen3_vl"] {
        let file = templates.join(format!("{name}.jinja"));
        let dir = common::folder_of(CHATML, &SPECIAL, "<|im_end|>");
        let options = TextOptions { chat_template: Some(file), ..common::options(dir.path()) };
        every_talk(&TextEncoder::open(options).unwrap(), name != "qwen2_5_vl");
    }
}
