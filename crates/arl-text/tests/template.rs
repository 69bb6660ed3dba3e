//! What a template prints is what Python's jinja2 prints under transformers.
use crate::common;

use common::{encoder, sample};

/// Renders an expression over the arguments of a tool call; the expected texts were printed by jinja2 3.1 set up as
/// transformers does.
fn prints(template: &str, row_content: &str) -> String {
    let tail = "{{ '<|im_start|>assistant\\n' + messages[-1].content + '<|im_end|>' }}";
    let row = format!(
        r#"{{"messages": [{{"role": "user", "content": "", "x": {row_content}}}, {{"role": "assistant", "content": "a"}}]}}"#
    );
    let text = sample(&encoder(&format!("{{%- set x = messages[0].x %}}{template}{tail}")), &row).text;
    text.strip_suffix("<|im_start|>assistant\na<|im_end|>").unwrap().to_owned()
}

fn fails(template: &str, row_content: &str) -> String {
    let row = format!(
        r#"{{"messages": [{{"role": "user", "content": "", "x": {row_content}}}, {{"role": "assistant", "content": "a"}}]}}"#
    );
    let problem = common::problem(&encoder(&format!("{{%- set x = messages[0].x %}}{template}")), row.as_bytes());
    assert_eq!(problem.reason, "template");
    problem.message
}

#[test]
fn values_are_printed_as_python_prints_them() {
    for (content, expected) in [
        ("1.0", "1.0"),
        ("1e-07", "1e-07"),
        ("1e16", "1e+16"),
        ("true", "True"),
        ("null", "None"),
        ("[1, 2.0, \"a\", null, true]", "[1, 2.0, 'a', None, True]"),
        ("{\"a\": \"it's\", \"b\": {}}", "{'a': \"it's\", 'b': {}}"),
        ("12345678901234567890123456789012345678901234567890", "12345678901234567890123456789012345678901234567890"),
    ] {
        assert_eq!(prints("{{ x }}", content), expected);
    }
    assert_eq!(prints("{{ x.missing }}|{{ x | string }}", "1e-05"), "|1e-05");
}

#[test]
fn tojson_is_json_dumps() {
    let x = r#"{"b": [1, 2.50, {}], "a": "<é'&\n>", "c": []}"#;
    assert_eq!(prints("{{ x | tojson }}", x), r#"{"b": [1, 2.5, {}], "a": "<é'&\n>", "c": []}"#);
    assert_eq!(
        prints("{{ x | tojson(indent=2) }}", x),
        "{\n  \"b\": [\n    1,\n    2.5,\n    {}\n  ],\n  \"a\": \"<é'&\\n>\",\n  \"c\": []\n}"
    );
    assert_eq!(
        prints("{{ x | tojson(separators=(',', ':'), sort_keys=true, ensure_ascii=true) }}", x),
        r#"{"a":"<\u00e9'&\n>","b":[1,2.5,{}],"c":[]}"#
    );
    assert!(fails("{{ x.missing | tojson }}", x).contains("not JSON serializable"));
}

#[test]
fn text_and_lists_do_not_mix() {
    fails("{{ 'a' + x }}", "[\"b\"]");
    fails("{{ 'a' + x }}", "null");
    fails("{{ 'a' + x }}", "1");
    fails("{{ 'a' + x.missing }}", "{}");
    fails("{{ x.missing.more }}", "{}");
    assert!(fails("{{ x }}", r#"[{"type": "text", "text": "b"}]"#).contains("content parts"));
}

#[test]
fn blocks_are_trimmed_as_transformers_trims_them() {
    let template =
        "{% for i in [1, 2] %}\n  {% if i == 1 %}\n one\n  {% else %}\n two\n  {% endif %}\n{% endfor %}\nend\n";
    assert_eq!(prints(template, "0"), " one\n two\nend\n");
    assert_eq!(prints("a\n{# comment #}\n  {{- 'b' }}\n", "0"), "a\nb\n");
}

#[test]
fn methods_of_python_strings_are_there() {
    let x = "\"  <think>a</think>b \"";
    let template = "[{{ x.strip() }}][{{ x.split('</think>')[-1] }}][{{ x.rsplit('>', 1)[0] }}][{{ x.strip().removeprefix('<') }}]\
        [{{ x.partition('<')[2] }}][{{ x.upper().find('B') }}][{{ x.replace('think', 't').lstrip() }}][{{ x.strip().startswith('<think>') }}]\
        [{{ 'a-b'.title() }}][{{ '7'.zfill(3) }}][{{ ', '.join(['a', 'b']) }}]";
    assert_eq!(
        prints(template, x),
        "[<think>a</think>b][b ][  <think>a</think][think>a</think>b][think>a</think>b ][18][<t>a</t>b ][True][A-B][007][a, b]"
    );
}

#[test]
fn what_chat_templates_use_is_there() {
    let template = "{%- set ns = namespace(n=0) %}{%- for m in messages[::-1] %}{%- if m.role == 'user' %}{%- set ns.n = loop.index0 %}\
        {%- break %}{%- endif %}{%- endfor %}{{- ns.n }} {% for k, v in x.items() %}{{ k }}={{ v }};{% endfor %}\
        {%- for k in x %}{% if k == 'a' %}{% continue %}{% endif %}{{ k }}{% endfor %} {{ x is mapping }} {{ x.a is string }} {{ x.b is iterable and x.b is not string }}\
        {{- ' ' ~ x.b | length }} {{ x.get('c', 'no') }} {{ x.c is defined }} {{ x.b | join('+') }} {{ x.b | map('string') | list }}\
        {%- macro f(a, b=2) %} {{ a }}{{ b }}{% endmacro %}{{ f(1) }}{{ strftime_now('%Y') | length }}";
    assert_eq!(
        prints(template, r#"{"a": "s", "b": [1, 2]}"#),
        "1 a=s;b=[1, 2];b True True True 2 no False 1+2 ['1', '2'] 124"
    );
}
