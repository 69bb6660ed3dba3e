//! The forms that other programs write rows in become the conversation that they mean, or are refused by name.
use crate::common;

use common::{CHATML, encoder, encoder_with, problem, sample, trained};

/// A template that writes tools, reasoning, calls as JSON (texts as they are) and the name of a result's tool.
const FULL: &str = "{%- if tools %}{{- '<|im_start|>system\\n' }}{%- for t in tools %}{{- t | tojson + '\\n' }}{%- endfor %}\
    {{- '<|im_end|>\\n' }}{%- endif %}{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}\
    {%- if m.role == 'tool' and m.name %}{{- m.name + ': ' }}{%- endif %}\
    {%- if m.reasoning_content %}{{- '<think>' + m.reasoning_content + '</think>' }}{%- endif %}\
    {%- if m.content %}{{- m.content }}{%- endif %}\
    {%- for c in m.tool_calls or [] %}{{- '<call>' + c.function.name + ' ' }}\
    {%- if c.function.arguments is string %}{{- c.function.arguments }}{%- else %}{{- c.function.arguments | tojson }}{%- endif %}\
    {{- '</call>' }}{%- endfor %}{{- '<|im_end|>\\n' }}{%- endfor %}\
    {%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}";

fn talk(reply: &str, more: &str) -> String {
    format!(r#"{{"messages": [{{"role": "user", "content": "q"}}, {{"role": "assistant", {reply}}}]{more}}}"#)
}

/// Both rows give the same tokens, targets and weights.
fn same(left: &str, right: &str) {
    let encoder = encoder(FULL);
    let (one, other) = (sample(&encoder, left), sample(&encoder, right));
    assert_eq!(one.text, other.text, "{left}");
    assert_eq!((one.ids, one.runs, one.spans), (other.ids, other.runs, other.spans), "{left}");
}

#[test]
fn a_function_call_is_one_tool_call_whose_arguments_stay_as_they_are() {
    let call = r#"{"name": "f", "arguments": "{\"a\" : 1.50,\n\"b\":[]}"}"#;
    let now = format!(r#""tool_calls": [{{"type": "function", "function": {call}}}]"#);
    for content in [r#""content": """#, r#""content": "Let me look.""#] {
        same(&talk(&format!(r#"{content}, "function_call": {call}"#), ""), &talk(&format!("{content}, {now}"), ""));
    }
    let encoder = encoder(FULL);
    let row = talk(&format!(r#""content": null, "function_call": {call}"#), "");
    assert_eq!(trained(&encoder, &sample(&encoder, &row)), ["<call>f {\"a\" : 1.50,\n\"b\":[]}</call><|im_end|>"]);
    // As answers of the API have it.
    same(
        &talk(&format!(r#""content": "", {now}, "function_call": null"#), ""),
        &talk(&format!(r#""content": "", {now}"#), ""),
    );
    same(&talk(r#""content": "a", "function_call": null"#, r#", "functions": null"#), &talk(r#""content": "a""#, ""));
}

#[test]
fn a_message_of_role_function_is_the_result_of_a_tool() {
    let row = |role: &str| {
        format!(
            r#"{{"messages": [{{"role": "user", "content": "q"}}, {{"role": "assistant", "content": null, "tool_calls": [{{"type": "function", "function": {{"name": "f", "arguments": "{{}}"}}}}]}}, {{"role": "{role}", "name": "f", "content": "r"}}, {{"role": "assistant", "content": "a"}}]}}"#
        )
    };
    same(&row("function"), &row("tool"));
    assert!(sample(&encoder(FULL), &row("function")).text.contains("<|im_start|>tool\nf: r<|im_end|>"));
}

#[test]
fn functions_are_tools() {
    let f = r#"{"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}"#;
    let tools = format!(r#", "tools": [{{"type": "function", "function": {f}}}]"#);
    let row = |more: &str| talk(r#""content": "a""#, more);
    let text = serde_json::to_string(&format!("[{f}]")).unwrap();
    for functions in [
        format!(r#", "functions": [{f}]"#),
        format!(r#", "functions": {text}"#),
        format!(r#"{tools}, "functions": [{f}]"#),
    ] {
        same(&row(&functions), &row(&tools));
    }
    let both = format!(r#"{tools}, "functions": [{{"name": "g"}}]"#);
    let refused = problem(&encoder(FULL), row(&both).as_bytes());
    assert_eq!(refused.reason, "bad field");
    assert!(refused.message.contains("both `tools` and `functions`"), "{}", refused.message);
}

#[test]
fn a_list_of_tools_may_be_texts_and_so_may_each() {
    let tool = r#"{"type": "function", "function": {"name": "f", "n": 1.0, "big": 18446744073709551617}}"#;
    let quoted = |text: &str| serde_json::to_string(text).unwrap();
    let row = |tools: &str| talk(r#""content": "a""#, &format!(r#", "tools": {tools}"#));
    let given = row(&format!("[{tool}]"));
    for tools in [
        format!("[{}]", quoted(tool)),
        quoted(&format!("[{tool}]")),
        quoted(&format!("[{}]", quoted(tool))),
        quoted(tool),
    ] {
        same(&row(&tools), &given);
    }
    // A schema without a type around it is the template's business.
    assert!(sample(&encoder(FULL), &row(r#"[{"name": "f"}]"#)).text.contains("{\"name\": \"f\"}\n"));
    for (tools, named) in [
        (r#"["f"]"#, "`tools[0]`"),
        (r#"[{}, "[1]"]"#, "`tools[1]`"),
        (r#"[1]"#, "`tools[0]`"),
        (r#"[null]"#, "`tools[0]`"),
        (r#"["{'name': 'f'}"]"#, "json.dumps"),
        (r#""[{'name': 'f'}]""#, "json.dumps"),
    ] {
        let refused = problem(&encoder(FULL), row(tools).as_bytes());
        assert_eq!(refused.reason, "bad field", "{tools}");
        assert!(refused.message.contains(named), "{tools}: {}", refused.message);
    }
}

#[test]
fn a_call_in_the_older_form_that_is_none_names_itself() {
    for (reply, named) in [
        (r#""content": "a", "function_call": "auto""#, "`function_call` is a string"),
        (r#""content": "a", "function_call": []"#, "`function_call` is an array"),
        (r#""content": "a", "function_call": {"arguments": "{}"}"#, "the name in `function_call` is missing"),
        (r#""content": "a", "function_call": {"name": "f"}"#, "`arguments` in `function_call` is missing"),
        (r#""content": "a", "function_call": {"name": "f", "arguments": "{}"}, "tool_calls": [{}]"#, "both"),
    ] {
        let refused = problem(&encoder(FULL), talk(reply, "").as_bytes());
        assert_eq!(refused.reason, "bad message", "{reply}");
        assert!(refused.message.starts_with("messages[1]: ") && refused.message.contains(named), "{}", refused.message);
    }
    let row = r#"{"messages": [{"role": "user", "content": "q", "function_call": {"name": "f", "arguments": "{}"}}, {"role": "assistant", "content": "a"}]}"#;
    assert!(problem(&encoder(FULL), row.as_bytes()).message.contains("messages[0]: `function_call`"));
}

#[test]
fn parts_of_llama_factorys_v1_rows_are_text_reasoning_and_calls() {
    let part = |kind: &str, value: &str| {
        format!(r#"{{"type": "{kind}", "value": {}}}"#, serde_json::to_string(value).unwrap())
    };
    let v1 = |parts: &[String], more: &str| {
        format!(
            r#"{{"messages": [{{"role": "system", "content": [{}], "loss_weight": 0.0}}, {{"role": "user", "content": [{}], "loss_weight": 0.0}}, {{"role": "assistant", "content": [{}]{more}}}], "tools": "[{{\"name\": \"f\"}}]", "_dataset_name": "x"}}"#,
            part("text", "s"),
            part("text", "q"),
            parts.join(", ")
        )
    };
    let openai = |reply: &str| {
        format!(
            r#"{{"messages": [{{"role": "system", "content": "s"}}, {{"role": "user", "content": "q"}}, {{"role": "assistant", {reply}}}], "tools": [{{"name": "f"}}]}}"#
        )
    };
    let call = part("tool_call", r#"{"name": "f", "arguments": {"z": 1.0, "a": 2}}"#);
    let called = r#"{"type": "function", "function": {"name": "f", "arguments": {"z": 1.0, "a": 2}}}"#;
    same(
        &v1(
            &[
                part("reasoning", "Hm"),
                part("reasoning", "m"),
                part("text", "a"),
                part("text", "b"),
                call.clone(),
                call.clone(),
            ],
            "",
        ),
        &openai(&format!(r#""reasoning_content": "Hmm", "content": "ab", "tool_calls": [{called}, {called}]"#)),
    );
    same(
        &v1(std::slice::from_ref(&call), r#", "loss_weight": 0.5"#),
        &openai(&format!(r#""content": "", "tool_calls": [{called}], "weight": 0.5"#)),
    );
    let encoder = encoder(FULL);
    assert_eq!(sample(&encoder, &v1(&[part("text", "a")], "")).notes.iter().count(), 0);
    for (parts, named) in [
        (vec![call.clone(), part("text", "later")], "messages[2].content[1]: text after a call"),
        (vec![part("text", "a"), part("reasoning", "late")], "messages[2].content[1]: reasoning after text"),
        (vec![part("tool_call", "f()")], "messages[2].content[0]: the call in `value` is not JSON"),
        (vec![part("tool_call", r#"{"name": "f"}"#)], "`arguments`"),
        (vec![part("tool_call", "{'name': 'f'}")], "json.dumps"),
        (vec![r#"{"type": "text", "value": 1}"#.to_owned()], "`value` is a number"),
        (vec![part("thought", "x")], "unknown type `thought`"),
    ] {
        let refused = problem(&encoder, v1(&parts, "").as_bytes());
        assert_eq!(refused.reason, "bad message", "{parts:?}");
        assert!(refused.message.contains(named), "{}", refused.message);
    }
    let user = r#"{"messages": [{"role": "user", "content": [{"type": "reasoning", "value": "x"}]}, {"role": "assistant", "content": "a"}]}"#;
    assert!(problem(&encoder, user.as_bytes()).message.contains("messages[0].content[0]: a part of type reasoning"));
    let differ = talk(r#""content": "a", "weight": 1, "loss_weight": 0.5"#, "");
    assert!(problem(&encoder, differ.as_bytes()).message.contains("`weight` and `loss_weight` differ"));
}

#[test]
fn text_and_the_calls_after_it_are_one_turn_of_sharegpt() {
    let turn = |from: &str, value: &str| {
        format!(r#"{{"from": "{from}", "value": {}}}"#, serde_json::to_string(value).unwrap())
    };
    let row = |turns: &[String]| format!(r#"{{"conversations": [{}]}}"#, turns.join(", "));
    let call = |n: u32| turn("function_call", &format!(r#"{{"name": "f{n}", "arguments": {{"x": {n}}}}}"#));
    let encoder = encoder(FULL);
    let turns = row(&[
        turn("human", "q"),
        turn("gpt", "Let me look."),
        call(1),
        call(2),
        turn("observation", "r1"),
        turn("observation", "r2"),
        call(3),
        turn("observation", "r3"),
        turn("gpt", "a"),
    ]);
    let encoded = sample(&encoder, &turns);
    assert_eq!(
        trained(&encoder, &encoded),
        [
            "Let me look.<call>f1 {\"x\": 1}</call><call>f2 {\"x\": 2}</call><|im_end|>",
            "<call>f3 {\"x\": 3}</call><|im_end|>",
            "a<|im_end|>"
        ]
    );
    assert_eq!(encoded.notes.iter().count(), 0);
    // One turn with a list of calls says the same.
    let list =
        turn("function_call", r#"[{"name": "f1", "arguments": {"x": 1}}, {"name": "f2", "arguments": {"x": 2}}]"#);
    same(&row(&[turn("human", "q"), list]), &row(&[turn("human", "q"), call(1), call(2)]));
    for (value, named) in [
        ("{'name': 'f', 'arguments': {}}", "conversations[1]: the function call in `value` is Python's text"),
        ("f(x=1)", "conversations[1]: the function call in `value` is not JSON"),
        ("[]", "conversations[1]: the function call in `value` is an empty list"),
        ("[1]", "is a number, not an object"),
        (r#"{"arguments": {}}"#, "the name in"),
    ] {
        let refused = problem(&encoder, row(&[turn("human", "q"), turn("function_call", value)]).as_bytes());
        assert_eq!(refused.reason, "bad message", "{value}");
        assert!(refused.message.contains(named), "{}", refused.message);
    }
    let halves = r#"{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "t", "train": false}, {"from": "function_call", "value": "{\"name\": \"f\", \"arguments\": {}}"}]}"#;
    assert!(problem(&encoder, halves.as_bytes()).message.contains("conversations[2]: a call is one turn"));
}

#[test]
fn advantages_name_entries_of_the_rows_own_list() {
    let encoder = encoder(FULL);
    let turns = |n: u32| {
        format!(
            r#"{{"system": "s", "conversations": [{{"from": "human", "value": "q"}}, {{"from": "gpt", "value": "t"}}, {{"from": "function_call", "value": "{{\"name\": \"f\", \"arguments\": {{}}}}"}}, {{"from": "observation", "value": "r"}}, {{"from": "gpt", "value": "a"}}], "advantages": {{"{n}": 1}}}}"#
        )
    };
    for (n, reply) in [(1, "t<call>f {}</call><|im_end|>"), (2, "t<call>f {}</call><|im_end|>"), (4, "a<|im_end|>")] {
        assert_eq!(trained(&encoder, &sample(&encoder, &turns(n))), [reply], "{n}");
    }
    for (n, named) in [(0, "is of role user"), (3, "is of role tool"), (5, "does not exist: there are 5")] {
        assert!(problem(&encoder, turns(n).as_bytes()).message.contains(named), "{n}");
    }
}

#[test]
fn a_system_column_begins_the_messages() {
    let row = |messages: &str| format!(r#"{{"system": "s", "messages": [{messages}], "advantages": {{"1": 1}}}}"#);
    let rest = r#"{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}"#;
    let text = sample(&encoder(CHATML), &row(rest)).text;
    assert!(text.starts_with("<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq"), "{text}");
    let both = |content: &str| {
        format!(r#"{{"system": "s", "messages": [{{"role": "system", "content": "{content}"}}, {rest}]}}"#)
    };
    assert_eq!(sample(&encoder(CHATML), &both("s")).text, text);
    assert!(problem(&encoder(CHATML), both("t").as_bytes()).message.contains("`system` and the first message"));
}

#[test]
fn history_of_llama_factory_is_read_and_trained() {
    let encoder = encoder(CHATML);
    let row = r#"{"instruction": "q3", "input": "", "output": "a3", "history": [["q1", "a1"], ["q2", "a2"]]}"#;
    let encoded = sample(&encoder, row);
    assert_eq!(trained(&encoder, &encoded), ["a1<|im_end|>", "a2<|im_end|>", "a3<|im_end|>"]);
    assert!(encoded.text.starts_with("<|im_start|>user\nq1<|im_end|>"), "{}", encoded.text);
    let other = r#"{"instruction": "q", "output": "a", "history": [{"q": "a"}]}"#;
    assert_eq!(sample(&encoder, other).notes.iter().next().unwrap().subject, "history");
}

#[test]
fn a_blank_reply_is_refused_where_it_is_trained() {
    let encoder = encoder(FULL);
    for reply in [
        r#""content": """#,
        r#""content": " \n\t""#,
        r#""content": []"#,
        r#""content": [{"type": "text", "text": " "}]"#,
    ] {
        let refused = problem(&encoder, talk(reply, "").as_bytes());
        assert_eq!(
            (refused.reason.as_str(), refused.message.as_str()),
            ("blank reply", "messages[1]: the reply is blank")
        );
        assert_eq!(
            encoder.prompt(talk(reply, "").as_bytes(), None).unwrap(),
            encoder.prompt(talk(r#""content": "a""#, "").as_bytes(), None).unwrap()
        );
    }
    for reply in [r#""content": "", "reasoning_content": "Hm""#, r#""content": "<think>\nHm\n</think>\n\n""#] {
        let refused = problem(&encoder, talk(reply, "").as_bytes());
        assert!(refused.message.contains("reasoning and neither text nor calls"), "{}", refused.message);
    }
    sample(&encoder, &talk(r#""content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]"#, ""));
    // As history a blank reply is what was said.
    for untrained in [r#""train": false"#, r#""weight": 0"#, r#""loss_weight": 0.0"#] {
        let row = format!(
            r#"{{"messages": [{{"role": "user", "content": "q"}}, {{"role": "assistant", "content": "", {untrained}}}, {{"role": "user", "content": "q"}}, {{"role": "assistant", "content": "a"}}]}}"#
        );
        assert_eq!(trained(&encoder, &sample(&encoder, &row)), ["a<|im_end|>"]);
    }
    let prompt = r#"{"prompt": [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}, {"role": "user", "content": "q"}], "completion": "a"}"#;
    assert_eq!(trained(&encoder, &sample(&encoder, prompt)), ["a<|im_end|>"]);
}

#[test]
fn cases_of_real_files_are_read() {
    let Some(cases) = common::shared("cases") else { return };
    let encoder = encoder(FULL);
    let rows = |name: &str| std::fs::read_to_string(cases.join(name)).unwrap();
    let texts: Vec<String> =
        rows("legacy-function-call/rows.jsonl").lines().map(|row| sample(&encoder, row).text).collect();
    let call = "<call>find_train {\"from\": \"Gouda\"}</call><|im_end|>";
    assert!(texts[0].contains(&format!("<|im_start|>assistant\n{call}")), "{}", texts[0]);
    assert!(texts[1].contains(&format!("<|im_start|>assistant\nLet me look.{call}")), "{}", texts[1]);
    let tool = "<|im_start|>system\n{\"type\": \"function\", \"function\": {\"name\": \"find_train\"";
    assert!(texts.iter().all(|text| text.starts_with(tool)), "{texts:?}");
    assert!(sample(&encoder, &rows("tools-as-texts/rows.jsonl")).text.starts_with(tool));
    let called = sample(&encoder, &rows("telling-messages/called.jsonl"));
    assert_eq!(trained(&encoder, &called), [call, "Yes, at 09:04.<|im_end|>"]);
    let media = rows("images-column/rows.jsonl");
    for row in media.lines() {
        assert_eq!(problem(&encoder, row.as_bytes()).reason, "image");
    }
    let dropping = encoder_with(FULL, |options| options.images = arl_text::Images::Drop);
    let mut media = media.lines();
    assert!(sample(&dropping, media.next().unwrap()).text.starts_with("<|im_start|>user\nWhat is this?<|im_end|>"));
    assert_eq!(problem(&dropping, media.next().unwrap().as_bytes()).reason, "image");
}

#[test]
fn a_row_of_no_known_shape_says_what_it_lacks() {
    let encoder = encoder(CHATML);
    let message = |row: &str| encoder.detect(&[row.as_bytes()]).unwrap_err().message;
    assert!(message(r#"{"instruction": "q", "reply": "a"}"#).contains("`instruction` and no completion with it"));
    assert!(message(r#"{"input": "q", "output": "a"}"#).contains("`output` and no prompt with it"));
    let chat = message(r#"{"id": 1, "chat": [{"role": "user", "content": "q"}]}"#);
    assert!(chat.contains("`chat` looks like messages: name it with --columns messages=chat"), "{chat}");
    assert!(message(r#"{"turns": [{"from": "human", "value": "q"}]}"#).contains("--columns conversations=turns"));
    let named = encoder_with(CHATML, |options| {
        options.columns = [("completion", "answer")].map(|(a, b)| (a.into(), b.into())).into();
    });
    let error = named.detect(&[br#"{"prompt": "q", "output": "a"}"#]).unwrap_err();
    assert!(error.message.contains("`prompt` and no `answer`, which is named for `completion`"), "{error}");
    let python = problem(&encoder, br#"{"messages": "[{'role': 'user', 'content': 'q'}]"}"#);
    assert!(python.message.contains("`messages` is Python's text of a list"), "{}", python.message);
    let turns = r#"{"messages": [{"from": "human", "value": "q"}]}"#;
    assert!(problem(&encoder, turns.as_bytes()).message.contains("--columns conversations=messages"));
}
