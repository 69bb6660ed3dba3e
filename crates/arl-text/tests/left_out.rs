//! What a template leaves out of a row: lost content and calls make a bad row, lost reasoning, tools and names are noted.
use crate::common;

use arl_text::{TextEncoder, Thinking};
use common::{CHATML, encoder, encoder_with, notes, problem, sample, trained};
use serde_json::{Value, json};

/// ChatML of roles and contents alone.
const PLAIN: &str =
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}";

fn row(messages: &Value) -> String {
    json!({ "messages": messages }).to_string()
}

fn user(content: &str) -> Value {
    json!({ "role": "user", "content": content })
}

fn reply(content: &str) -> Value {
    json!({ "role": "assistant", "content": content })
}

fn calls(content: &Value, arguments: &[Value]) -> Value {
    let call = |arguments: &Value| json!({ "function": { "name": "find", "arguments": arguments } });
    json!({ "role": "assistant", "content": content, "tool_calls": arguments.iter().map(call).collect::<Vec<_>>() })
}

fn refused(template: &str, messages: &Value) -> String {
    let problem = problem(&encoder(template), row(messages).as_bytes());
    assert_eq!(problem.reason, "template");
    let message = problem.message.strip_suffix("; --chat_template FILE gives another");
    message.unwrap_or_else(|| panic!("{}", problem.message)).to_owned()
}

#[test]
fn lost_calls_make_a_bad_row() {
    let call = json!({ "from": "Gouda" });
    for content in [json!(""), json!(null), json!("I look.")] {
        let messages = json!([user("q"), calls(&content, std::slice::from_ref(&call)), reply("a")]);
        assert_eq!(refused(PLAIN, &messages), "the chat template leaves out the tool calls of messages[1]");
    }
    let first = CHATML.replace("{%- for c in m.tool_calls %}", "{%- for c in m.tool_calls[:1] %}");
    sample(&encoder(&first), &row(&json!([user("q"), calls(&json!(""), std::slice::from_ref(&call)), reply("a")])));
    let two = json!([user("q"), calls(&json!(""), &[call.clone(), json!({ "from": "Delft" })]), reply("a")]);
    assert!(refused(&first, &two).contains("tool calls of messages[1]"));
    let names = CHATML.replace("{{- c.function | tojson }}", "{{- c.function.name }}");
    let message = refused(&names, &json!([user("q"), calls(&json!(""), &[call]), reply("a")]));
    assert_eq!(message, "the chat template leaves out the arguments of messages[1].tool_calls[0]");
}

#[test]
fn lost_content_of_any_role_makes_a_bad_row_however_short_it_is() {
    // Each leaves out one message that others would be written of.
    let unless = |condition: &str| {
        PLAIN
            .replace("{{-", &format!("{{%- if not ({condition}) %}}{{{{-"))
            .replace("}}{%- endfor", "}}{%- endif %}{%- endfor")
    };
    let system = unless("m.role == 'system' and not loop.first");
    let tool = unless("m.content == 'user'");
    let long = PLAIN.replace("m.content", "m.content[:40]");
    let empty = PLAIN.replace("m.content", "(m.content if m.content | length > 3 else '')");
    let text = CHATML.replace("+ m.content }}", "+ ('' if m.tool_calls else m.content) }}");
    let far = "a long text of which only the beginning is written, whatever follows";
    let sys = |content: &str| json!({ "role": "system", "content": content });
    for (template, messages, lost) in [
        (&system, json!([user("q"), sys("user"), user("q"), reply("a")]), "messages[1], of role system"),
        (
            &tool,
            json!([user("q"), reply("a"), { "role": "tool", "content": "user" }, reply("b")]),
            "messages[2], of role tool",
        ),
        (&tool, json!([user("user"), reply("a")]), "messages[0], of role user"),
        (&long, json!([user(far), reply("a")]), "messages[0], of role user"),
        (&long, json!([user("q"), reply(far), user("q"), reply("a")]), "messages[1], of role assistant"),
        (&empty, json!([user("question"), reply("im")]), "messages[1], of role assistant"),
        (&empty, json!([user("start"), reply("a|b")]), "messages[1], of role assistant"),
        (
            &text,
            json!([user("q"), calls(&json!("f"), &[json!({ "x": 1 })]), reply("a")]),
            "messages[1], of role assistant",
        ),
    ] {
        assert_ne!(template, PLAIN);
        assert_eq!(refused(template, &messages), format!("the chat template leaves out the content of {lost}"));
    }
}

#[test]
fn content_that_is_changed_in_form_is_not_lost() {
    let odd = "  a \"quoted\" <b> text|bar\nof two lines\t\n";
    let messages = json!([user(odd), reply(odd), user("user"), reply("4")]);
    for change in ["| trim", "| upper", "| tojson", "| e", "| replace('text', 'TEXT')", ".strip('\\n')", "| title"] {
        let template = PLAIN.replace("m.content", &format!("(m.content {change})"));
        sample(&encoder(&template), &row(&messages));
    }
    // Order is free: a system message may be brought to the front, and a message may be written twice.
    let moved = PLAIN.replace("{%- for m in messages %}", "{{- messages[-2].content }}{%- for m in messages %}");
    sample(&encoder(&moved), &row(&messages));
    let front = "{%- for m in messages if m.role == 'system' %}{{- m.content }}{%- endfor %}".to_owned()
        + &PLAIN.replace("{%- for m in messages %}", "{%- for m in messages if m.role != 'system' %}");
    sample(&encoder(&front), &row(&json!([user("s"), { "role": "system", "content": "sys" }, user("q"), reply("a")])));
}

#[test]
fn lost_reasoning_is_noted_unless_it_was_asked_for() {
    let thought = |text: &str| json!({ "role": "assistant", "content": "a", "reasoning_content": text });
    let result = json!({ "role": "tool", "content": "r" });
    let messages = json!([user("q"), thought("assistant"), user("q"), thought("long thoughts"), result, reply("b")]);
    let of = |thinking| {
        let encoder = encoder_with(PLAIN, |options| options.thinking = thinking);
        let sample = sample(&encoder, &row(&messages));
        (notes(&sample), trained(&encoder, &sample))
    };
    assert_eq!(of(None).0, [("earlier reasoning", 1), ("lost reasoning", 1)]);
    assert_eq!(of(Some(Thinking::Last)).0, [("lost reasoning", 1)]);
    assert_eq!(of(Some(Thinking::Strip)).0, []);
    let (noted, kept) = of(Some(Thinking::Keep));
    assert_eq!(noted, []);
    assert_eq!(kept[0], "<think>\nassistant\n</think>\n\na<|im_end|>");
    let cuts = PLAIN.replace("m.content", "m.content.split('</think>')[-1]");
    let tagged = json!([user("q"), reply("<think>\nr\n</think>\n\na")]);
    assert_eq!(notes(&sample(&encoder(&cuts), &row(&tagged))), [("lost reasoning", 1)]);
    // Text before the tags is no reasoning.
    let before = json!([user("q"), reply("Well: <think>\nr\n</think>\n\na")]);
    assert!(refused(&cuts, &before).contains("the content of messages[1]"));
    let removes = PLAIN.replace("m.content", "m.content.replace('hidden', '')");
    let keep = encoder_with(&removes, |options| options.thinking = Some(Thinking::Keep));
    let hidden = json!([user("q"), { "role": "assistant", "content": "the answer", "reasoning_content": "hidden" }]);
    let message = problem(&keep, row(&hidden).as_bytes()).message;
    assert_eq!(message, "thinking: keep: the chat template leaves out the reasoning of messages[1]");
}

#[test]
fn lost_tools_and_names_are_noted() {
    let tool = |name: &str| {
        json!({ "type": "function", "function": { "name": name, "description": "Finds \"it\"",
        "parameters": { "type": "object", "properties": { "town": { "type": "string" } } } } })
    };
    let with = |tools: Value, messages: Value| json!({ "messages": messages, "tools": tools }).to_string();
    let talk = json!([user("q"), reply("a")]);
    let plain = encoder(PLAIN);
    assert_eq!(notes(&sample(&plain, &with(json!([tool("find")]), talk.clone()))), [("lost tools", 1)]);
    assert_eq!(notes(&sample(&plain, &with(json!([]), talk.clone()))), []);
    for (written, noted) in [
        ("{%- for t in tools or [] %}{{- t | tojson }}{%- endfor %}", false),
        (
            "{%- for t in tools or [] %}{{- t.function.name + t.function.description + t.function.parameters.properties | join }}{%- endfor %}",
            false,
        ),
        ("{{- (tools or []) | map(attribute='function') | map(attribute='name') | join(',') }}", true),
        ("{%- for t in (tools or [])[:1] %}{{- t | tojson }}{%- endfor %}", true),
        ("{%- for t in tools or [] if t.function.name != 'book' %}{{- t | tojson }}{%- endfor %}", true),
    ] {
        let encoder = encoder(&(written.to_owned() + PLAIN));
        let sample = sample(&encoder, &with(json!([tool("find"), tool("book")]), talk.clone()));
        assert_eq!(notes(&sample), if noted { vec![("lost tools", 1)] } else { vec![] }, "{written}");
    }
    let mut named = user("q");
    named["name"] = json!("Ada");
    let named = row(&json!([named, reply("a")]));
    assert_eq!(notes(&sample(&plain, &named)), [("lost name", 1)]);
    let writes = PLAIN.replace("m.role +", "m.role + (' ' + m.name if m.name else '') +");
    assert_eq!(notes(&sample(&encoder(&writes), &named)), []);
}

#[test]
fn replies_without_text_are_noted_whatever_the_template_writes_for_no_reasoning() {
    let thinks =
        PLAIN.replace("+ m.content", "+ ('<think>\\n\\n</think>\\n\\n' if m.role == 'assistant' else '') + m.content");
    let marks = "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}{%- if m.role == 'assistant' %}{% generation %}\
        {{- m.content + '<|im_end|>\\n' }}{% endgeneration %}{%- else %}{{- m.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}";
    let halves = marks.replace(
        "{{- m.content + '<|im_end|>\\n' }}{% endgeneration %}",
        "{{- m.content }}{% endgeneration %}\
        {{- '-' }}{% generation %}{{- '<|im_end|>' }}{% endgeneration %}",
    );
    for template in [PLAIN, &thinks, marks, &halves] {
        let encoder = encoder(template);
        let short = sample(&encoder, &row(&json!([user("q"), reply("4")])));
        assert_eq!(notes(&short), [], "{template}");
        let call = json!({ "role": "assistant", "content": "", "tool_calls": [] });
        if let Ok(arl_text::Outcome::Sample(blank)) =
            encoder.encode(0, row(&json!([user("q"), call, user("q"), reply("a")])).as_bytes())
        {
            assert_eq!(notes(&blank), [("end token only", 1)], "{template}");
        }
    }
}

#[test]
fn the_real_templates_note_what_they_leave_out() {
    let thought = |text: &str| json!({ "role": "assistant", "content": "a", "reasoning_content": text });
    let messages = json!([user("q"), thought("r1"), user("q"), thought("r2")]);
    for (name, expected) in
        [("qwen3", vec![("earlier reasoning", 1)]), ("qwen2_5", vec![("earlier reasoning", 1), ("lost reasoning", 1)])]
    {
        let Some(model) = common::tokenizer(name) else { return };
        let encoder = TextEncoder::open(common::options(&model)).unwrap();
        assert_eq!(notes(&sample(&encoder, &row(&messages))), expected, "{name}");
    }
}
