//! What is trained of a call is what the model must write to be understood, whichever form the row has it in.
use crate::common;

use arl_text::TextEncoder;
use common::templates::DEEPSEEK;
use common::{CHATML, encoder, notes, problem, sample, trained};
use serde_json::{Value, json};

/// ChatML whose calls are written by `call` of a function `f`.
fn chatml(call: &str) -> String {
    format!(
        "{{%- for m in messages %}}{{{{- '<|im_start|>' + m.role + '\\n' }}}}{{{{- m.content or '' }}}}\
         {{%- for c in m.tool_calls or [] %}}{{%- set f = c.function %}}{{{{- '<tool_call>' + f.name + ' ' }}}}{call}\
         {{{{- '</tool_call>' }}}}{{%- endfor %}}{{{{- '<|im_end|>\\n' }}}}{{%- endfor %}}\
         {{%- if add_generation_prompt %}}{{{{- '<|im_start|>assistant\\n' }}}}{{%- endif %}}"
    )
}

const BOTH: &str =
    "{%- if f.arguments is string %}{{- f.arguments }}{%- else %}{{- f.arguments | tojson }}{%- endif %}";
const JSON: &str = "{{- f.arguments | tojson }}";
const PAIRS: &str =
    "{%- for k, v in f.arguments | items %}{{- '<' + k + '>' + (v if v is string else v | tojson) }}{%- endfor %}";
const TEXT: &str = "{{- '' + f.arguments }}";
const PRINTED: &str = "{{- f.arguments }}";

fn row(arguments: &Value) -> String {
    let call = json!({ "id": "c1", "type": "function", "function": { "name": "find", "arguments": arguments } });
    json!({ "messages": [
        { "role": "user", "content": "q" },
        { "role": "assistant", "content": "", "tool_calls": [call] },
        { "role": "tool", "tool_call_id": "c1", "content": "r" },
        { "role": "assistant", "content": "a" },
    ]})
    .to_string()
}

fn call_of(encoder: &TextEncoder, row: &str) -> String {
    trained(encoder, &sample(encoder, row)).remove(0)
}

#[test]
fn a_text_stays_as_it_is_where_the_template_writes_it_so() {
    let odd = "{ \"b\":1.0,\n\"a\" : [1e5] }";
    for call in [BOTH, TEXT, PRINTED] {
        let encoder = encoder(&chatml(call));
        let sample = sample(&encoder, &row(&json!(odd)));
        assert_eq!(trained(&encoder, &sample)[0], format!("<tool_call>find {odd}</tool_call><|im_end|>"), "{call}");
        assert_eq!(notes(&sample), [], "{call}");
    }
    // And even where it is no JSON: the template writes what the row says.
    assert!(call_of(&encoder(&chatml(BOTH)), &row(&json!("{\"cut"))).contains("find {\"cut</tool_call>"));
}

#[test]
fn a_text_becomes_an_object_where_the_template_needs_one() {
    let text =
        r#"{"to": "Gouda", "from":{"z":1.0,"a":1}, "n": 123456789012345678901234567890, "f": [1.50, -0.0, 1e5]}"#;
    let json = r#"{"to": "Gouda", "from": {"z": 1.0, "a": 1}, "n": 123456789012345678901234567890, "f": [1.5, -0.0, 100000.0]}"#;
    let pairs = r#"<to>Gouda<from>{"z": 1.0, "a": 1}<n>123456789012345678901234567890<f>[1.5, -0.0, 100000.0]"#;
    for (call, expected) in [(JSON, json), (PAIRS, pairs)] {
        let encoder = encoder(&chatml(call));
        let sample = sample(&encoder, &row(&json!(text)));
        assert_eq!(trained(&encoder, &sample)[0], format!("<tool_call>find {expected}</tool_call><|im_end|>"));
        assert_eq!(notes(&sample), [("parsed arguments", 1)]);
        // The same call as an object gives the same, and nothing was parsed.
        let object = row(&Value::Null).replace(r#""arguments":null"#, &format!(r#""arguments":{text}"#));
        let same = common::sample(&encoder, &object);
        assert_eq!((&same.text, notes(&same)), (&sample.text, vec![]));
        // What is generated from has the same history.
        let prompt = |row: &str| encoder.prompt(row.as_bytes(), Some(3)).unwrap();
        assert_eq!(prompt(&row(&json!(text))), prompt(&object));
    }
}

#[test]
fn every_call_is_counted_and_a_flat_one_is_one_too() {
    let calls = json!([
        { "function": { "name": "f", "arguments": "{\"x\": 1}" } },
        { "function": { "name": "g", "arguments": { "x": 2 } } },
        { "function": { "name": "h", "arguments": "{\"x\": 3}" } },
    ]);
    let row = json!({ "messages": [{ "role": "user", "content": "q" },
        { "role": "assistant", "content": null, "tool_calls": calls }, { "role": "assistant", "content": "a" }]});
    let encoder = encoder(&chatml(JSON));
    let noted = notes(&sample(&encoder, &row.to_string()));
    assert_eq!(noted, [("consecutive replies", 1), ("parsed arguments", 2)]);
}

#[test]
fn arguments_that_are_no_object_are_named_where_one_is_needed() {
    for call in [JSON, PAIRS] {
        let encoder = encoder(&chatml(call));
        for (text, why) in [("{\"a\": ", "no JSON"), ("[1]", "an array"), ("\"{}\"", "a string"), ("1", "a number")] {
            let problem = problem(&encoder, row(&json!(text)).as_bytes());
            assert_eq!(problem.reason, "bad message");
            let names = problem.message.starts_with("messages[1].tool_calls[0].function.arguments is ");
            assert!(names && problem.message.contains(why), "{text}: {}", problem.message);
        }
    }
}

#[test]
fn an_object_is_given_as_text_where_the_template_takes_only_that() {
    for call in [TEXT, PRINTED] {
        let encoder = encoder(&chatml(call));
        let call = call_of(&encoder, &row(&json!({ "b": "ü\"\n", "a": [1, 2.0, true, null] })));
        assert_eq!(call, "<tool_call>find {\"b\": \"ü\\\"\\n\", \"a\": [1, 2.0, true, null]}</tool_call><|im_end|>");
    }
}

#[test]
fn an_empty_text_is_an_empty_object_and_counted() {
    for call in [BOTH, JSON, TEXT] {
        let encoder = encoder(&chatml(call));
        for text in ["", "  \n"] {
            let sample = sample(&encoder, &row(&json!(text)));
            assert_eq!(trained(&encoder, &sample)[0], "<tool_call>find {}</tool_call><|im_end|>", "{call}");
            assert_eq!(notes(&sample), [("empty arguments", 1)]);
        }
    }
    assert_eq!(call_of(&encoder(&chatml(PAIRS)), &row(&json!(""))), "<tool_call>find </tool_call><|im_end|>");
}

fn with_content(content: &str) -> String {
    format!(
        r#"{{"messages": [{{"role": "user", "content": "q"}}, {{"role": "assistant"{content}, "tool_calls":
        [{{"type": "function", "function": {{"name": "find", "arguments": "{{\"a\": 1}}"}}}}]}}, {{"role": "assistant", "content": "b"}}]}}"#
    )
}

#[test]
fn content_that_is_missing_beside_calls_is_what_the_template_takes() {
    // These need a text, print `None` for null, and write calls only where the content is null.
    let needs_text = CHATML.to_owned();
    let prints = CHATML.replace("+ m.content }}", "~ m.content }}");
    let needs_null = chatml(BOTH)
        .replace("{%- for c in m.tool_calls or [] %}", "{%- for c in (m.tool_calls or []) if m.content is none %}");
    assert!(prints != needs_text && needs_null != chatml(BOTH));
    for template in [needs_text, prints, needs_null, chatml(BOTH)] {
        let encoder = encoder(&template);
        let texts = ["", r#", "content": null"#, r#", "content": """#]
            .map(|content| sample(&encoder, &with_content(content)).text);
        assert!(texts[0].contains("find") && !texts[0].contains("None"), "{template}: {}", texts[0]);
        assert!(texts.iter().all(|text| *text == texts[0]), "{template}: {texts:?}");
    }
}

#[test]
fn the_distilled_deepseek_template_gets_null_and_text() {
    let dir = common::folder_of(DEEPSEEK, &common::templates::SPECIAL, "<eos>");
    let encoder = TextEncoder::open(common::options(dir.path())).unwrap();
    let expected = "<call>function<sep>find\n```json\n{\"a\": 1}\n```</call><eos>";
    for content in [r#", "content": null"#, r#", "content": """#] {
        assert_eq!(call_of(&encoder, &with_content(content)), expected);
    }
    let object = with_content("").replace(r#""{\"a\": 1}""#, r#"{"a": 1}"#);
    assert_eq!(call_of(&encoder, &object), expected);
    // Text next to calls is lost in one of both: the row is refused.
    let refused = problem(&encoder, with_content(r#", "content": "I look.""#).as_bytes());
    assert!(refused.message.starts_with("the chat template leaves out the tool calls of messages[1]"));
}

#[test]
fn an_error_of_the_template_is_not_answered_by_another_text() {
    let strict = CHATML.replace(
        "{%- if m.tool_calls %}",
        "{%- if m.tool_calls %}{%- if m.content == '' %}{{- raise_exception('say something') }}{%- endif %}",
    );
    let refused = problem(&encoder(&strict), with_content(r#", "content": null"#).as_bytes());
    assert!(refused.message.contains("say something") || refused.message.contains("none"), "{}", refused.message);
    let picky = CHATML.replace(
        "{{- c.function | tojson }}",
        "{{- raise_exception('no calls here') if c.function.name == 'find' }}{{- c.function | tojson }}",
    );
    for content in ["", r#", "content": null"#] {
        let refused = problem(&encoder(&picky), with_content(content).as_bytes());
        assert!(refused.message.contains("no calls here"), "{}", refused.message);
    }
}
