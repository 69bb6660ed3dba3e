//! What a template does, found out once by rendering conversations of its own when it is opened.

use crate::row::{Json, parse};
use crate::template::{Conversation, Template};

use super::calls::CallRule;
use super::images::ImageForm;
use super::prompt::PromptRule;
use super::sentinels::{CLOSE, HEADER, private_characters};

/// A template with what is known of it.
pub(crate) struct Probed {
    pub(crate) template: Template,
    pub(super) calls: CallRule,
    pub(super) replies: Replies,
    pub(super) tools: Tools,
    pub(super) image_form: ImageForm,
    /// Roles whose messages it leaves out.
    pub(crate) ignored_roles: Vec<&'static str>,
    /// Roles whose `name` it leaves out.
    pub(super) unnamed_roles: Vec<&'static str>,
    /// The private-use characters in it.
    pub(super) private: Vec<u32>,
}

/// How the replies in its text are found.
#[derive(Debug)]
pub(super) enum Replies {
    /// Between generation tags.
    Marked,
    /// Between `<|im_start|>assistant` and `<|im_end|>`.
    ChatMl,
    /// Behind the generation prompt.
    Prompt(PromptRule),
    /// Not at all; with the reason.
    Unknown(String),
}

/// What it does with the tools of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tools {
    Left,
    /// With their names as they are.
    Written,
    /// In a form of its own.
    Changed,
}

/// The texts of the probes occur in no template.
const WORD: &str = "qzwordqz";
const TOOLS: &str = r#"[{"type": "function", "function": {"name": "qzfunctionqz", "description": "qzdescriptionqz",
    "parameters": {"type": "object", "properties": {"qzkeyqz": {"type": "string", "description": "d"}}, "required": []}}}]"#;

impl Probed {
    /// `special`: the texts of the tokenizer's special tokens.
    pub(crate) fn new(template: Template, special: &[String]) -> Self {
        let probe = Probe { template: &template };
        let calls = CallRule::of(&probe);
        let replies = replies(&probe, special);
        let tools = tools(&probe);
        let image_form = ImageForm::of(&probe);
        let ignored_roles = probe.roles_without(&["system", "developer", "tool"], "content");
        let unnamed_roles = probe.roles_without(&["system", "developer", "user", "assistant", "tool"], "name");
        let private = private_characters(&template.source).collect();
        Self { template, calls, replies, tools, image_form, ignored_roles, unnamed_roles, private }
    }
}

fn replies(probe: &Probe<'_>, special: &[String]) -> Replies {
    if probe.template.marks_replies {
        return Replies::Marked;
    }
    let talk = [message("user", "qzuserqz"), message("assistant", WORD)];
    match probe.render(&talk, None, false) {
        Ok(text) => {
            if text.split_once(HEADER).is_some_and(|(_, rest)| rest.contains(CLOSE)) {
                return Replies::ChatMl;
            }
            match PromptRule::of(probe, &talk, WORD, special) {
                Ok(rule) => Replies::Prompt(rule),
                Err(why) => Replies::Unknown(why),
            }
        }
        Err(_) if probe.template.source.contains("<|im_start|>") => Replies::ChatMl,
        Err(error) => Replies::Unknown(format!("it cannot render a question and its answer ({error})")),
    }
}

fn tools(probe: &Probe<'_>) -> Tools {
    let talk = [message("user", "qzuserqz"), message("assistant", "b")];
    let tools = parse(TOOLS.as_bytes()).ok();
    let Ok(text) = probe.render(&talk, tools.as_ref(), false) else { return Tools::Changed };
    if text.contains("qzfunctionqz") {
        return Tools::Written;
    }
    match probe.render(&talk, None, false) {
        Ok(without) if without == text => Tools::Left,
        _ => Tools::Changed,
    }
}

/// A message of a probe.
pub(super) fn message(role: &str, content: &str) -> Json {
    let entry = |key: &str, value: &str| (key.to_owned(), Json::Str(value.to_owned()));
    Json::Object(vec![entry("role", role), entry("content", content)])
}

/// Renders what no row has.
pub(super) struct Probe<'a> {
    pub(super) template: &'a Template,
}

impl Probe<'_> {
    pub(super) fn render(
        &self,
        messages: &[Json],
        tools: Option<&Json>,
        add_generation_prompt: bool,
    ) -> Result<String, String> {
        let conversation = Conversation { messages, tools, variables: None, add_generation_prompt };
        self.template.render(&conversation, &str::to_owned, ("", ""))
    }

    /// The texts of a call of `qzfunctionqz`, with tools and without, with a result and without: some templates take
    /// only some of these.
    pub(super) fn calls(&self, set_content: impl Fn(&mut Json), arguments: &Json) -> Vec<String> {
        let string = |text: &str| Json::Str(text.to_owned());
        let object = |entries: Vec<(&str, Json)>| {
            Json::Object(entries.into_iter().map(|(key, value)| (key.to_owned(), value)).collect())
        };
        let function = object(vec![("name", string("qzfunctionqz")), ("arguments", arguments.clone())]);
        // Mistral's templates want ids of nine letters and digits.
        let call = object(vec![("id", string("qzcallqz1")), ("type", string("function")), ("function", function)]);
        let mut calls = message("assistant", "");
        set_content(&mut calls);
        calls.set("tool_calls", Json::Array(vec![call]));
        let mut result = message("tool", "qzresultqz");
        result.set("tool_call_id", string("qzcallqz1"));
        result.set("name", string("qzfunctionqz"));
        let talk = [message("user", "qzuserqz"), calls, result, message("assistant", "b")];
        let tools = parse(TOOLS.as_bytes()).ok();
        [(4, tools.as_ref()), (2, tools.as_ref()), (4, None), (2, None)]
            .into_iter()
            .filter_map(|(count, tools)| {
                let text = self.render(&talk[..count], tools, false).ok()?;
                // The tools' own text must not pass for that of the call.
                let tools = self.render(&talk[..1], tools, false).unwrap_or_default();
                Some(text.strip_prefix(tools.as_str()).map_or(text.clone(), str::to_owned))
            })
            .collect()
    }

    /// Of these roles, those of which a message is rendered without a trace of its `key`.
    fn roles_without(&self, roles: &[&'static str], key: &str) -> Vec<&'static str> {
        let left = |role: &&&'static str| {
            let mut probed = message(role, "qzcontentqz");
            probed.set(key, Json::Str(WORD.to_owned()));
            let (user, reply) = (message("user", "qzuserqz"), message("assistant", "b"));
            let talk = match **role {
                "system" | "developer" => vec![probed, user, reply],
                "user" => vec![probed, reply],
                "assistant" => vec![user, probed],
                _ => vec![user, reply.clone(), probed, reply],
            };
            self.render(&talk, None, false).is_ok_and(|text| !text.to_lowercase().contains(WORD))
        };
        roles.iter().filter(left).copied().collect()
    }
}
