//! Several templates of one checkpoint are found and chosen as transformers does.
use crate::common;

use arl_text::{TextEncoder, TextOptions};
use common::{CHATML, options, problem, sample};
use serde_json::json;

const TALK: &str = r#""messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]"#;

fn named(name: &str) -> String {
    format!("{{{{- '{name}:' }}}}{CHATML}")
}

/// Which template rendered a row with these further keys.
fn used(encoder: &TextEncoder, more: &str) -> String {
    sample(encoder, &format!("{{{TALK}{more}}}")).text.split(':').next().unwrap().to_owned()
}

fn config(dir: &tempfile::TempDir, names: &[&str]) {
    let list: Vec<_> = names.iter().map(|name| json!({ "name": name, "template": named(name) })).collect();
    let config = json!({ "eos_token": "<|im_end|>", "chat_template": list });
    std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
}

#[test]
fn a_row_with_tools_is_rendered_by_tool_use() {
    let dir = common::folder(CHATML);
    std::fs::remove_file(dir.path().join("chat_template.jinja")).unwrap();
    config(&dir, &["rag", "tool_use", "default"]);
    let encoder = TextEncoder::open(options(dir.path())).unwrap();
    assert_eq!(encoder.info().template_source, "tokenizer_config.json (default, rag, tool_use)");
    let tools = r#", "tools": [{"type": "function", "function": {"name": "f"}}]"#;
    assert_eq!(used(&encoder, tools), "tool_use");
    // transformers looks at whether there are tools, and an empty list is one.
    assert_eq!(used(&encoder, r#", "tools": []"#), "tool_use");
    assert_eq!(used(&encoder, r#", "tools": null"#), "default");
    assert_eq!(used(&encoder, ""), "default");
    let prompt = encoder.prompt(format!("{{{TALK}{tools}}}").as_bytes(), None).unwrap();
    assert!(encoder.decode(&prompt, false).unwrap().starts_with("tool_use:"));
    config(&dir, &["default", "rag"]);
    assert_eq!(used(&TextEncoder::open(options(dir.path())).unwrap(), tools), "default");
}

#[test]
fn files_win_over_the_configuration_and_a_given_file_over_both() {
    let dir = common::folder(&named("file"));
    config(&dir, &["default", "tool_use"]);
    let tools = r#", "tools": []"#;
    let open = || TextEncoder::open(options(dir.path())).unwrap();
    assert_eq!(used(&open(), tools), "file");
    let more = dir.path().join("additional_chat_templates");
    std::fs::create_dir(&more).unwrap();
    std::fs::write(more.join("tool_use.jinja"), named("folder")).unwrap();
    std::fs::write(more.join("notes.txt"), "not a template").unwrap();
    assert_eq!((used(&open(), tools), used(&open(), "")), ("folder".to_owned(), "file".to_owned()));
    assert_eq!(open().info().template_source, "chat_template.jinja (default, tool_use)");
    let own = dir.path().join("own.jinja");
    std::fs::write(&own, named("own")).unwrap();
    let given = TextEncoder::open(TextOptions { chat_template: Some(own), ..options(dir.path()) }).unwrap();
    assert_eq!(used(&given, tools), "own");
}

#[test]
fn each_template_is_probed_for_itself() {
    let dir = common::folder(&CHATML.replace("c.function | tojson", "c.function.arguments | tojson"));
    let more = dir.path().join("additional_chat_templates");
    std::fs::create_dir(&more).unwrap();
    let texts = "{%- for m in messages if m.role != 'tool' %}{{- '<|im_start|>' + m.role + '\\n' + m.content }}\
        {%- for c in m.tool_calls or [] %}{{- c.function.name + c.function.arguments }}{%- endfor %}{{- '<|endoftext|><|im_end|>\\n' }}{%- endfor %}";
    std::fs::write(more.join("tool_use.jinja"), texts).unwrap();
    let encoder = TextEncoder::open(options(dir.path())).unwrap();
    let row = |tools: &str, role: &str| {
        format!(
            r#"{{"messages": [{{"role": "user", "content": "q"}}, {{"role": "assistant", "content": "x", "tool_calls":
            [{{"function": {{"name": "f", "arguments": {{"a":  1}}}}}}]}}, {{"role": "{role}", "content": "r"}},
            {{"role": "assistant", "content": "b"}}], "tools": {tools}}}"#
        )
    };
    assert!(sample(&encoder, &row("[]", "user")).text.contains("f{\"a\": 1}"));
    assert!(problem(&encoder, row("[]", "tool").as_bytes()).message.contains("role `tool`"));
    assert!(problem(&encoder, row("null", "tool").as_bytes()).message.contains("tool calls of messages[1]"));
}

#[test]
fn without_a_default_the_error_says_what_there_is() {
    let dir = common::folder(CHATML);
    std::fs::remove_file(dir.path().join("chat_template.jinja")).unwrap();
    config(&dir, &["rag", "tool_use"]);
    let Err(error) = TextEncoder::open(options(dir.path())) else { panic!("it opened") };
    assert!(error.message.contains("`default`; there are rag, tool_use"), "{error}");
    assert!(error.hint.contains("--chat_template"), "{error}");
}

#[test]
fn the_fingerprint_has_all_of_them() {
    let dir = common::folder(CHATML);
    let fingerprint = || TextEncoder::open(options(dir.path())).unwrap().info().fingerprint.clone();
    let mut seen = vec![fingerprint()];
    let more = dir.path().join("additional_chat_templates");
    std::fs::create_dir(&more).unwrap();
    for (name, text) in [("tool_use", "a"), ("rag", "a"), ("rag", "b"), ("tool_use", "b")] {
        std::fs::write(more.join(format!("{name}.jinja")), named(text)).unwrap();
        seen.push(fingerprint());
    }
    for (i, one) in seen.iter().enumerate() {
        assert!(!seen[..i].contains(one), "{i}");
    }
}
