//! The chat template of a checkpoint, rendered as Python's jinja2 does under transformers.
//! Knows nothing of tokens; `targets` finds where a reply begins and ends.

mod choose;
mod literals;
mod methods;
pub(crate) mod python;
mod time;

use arl_model::{Error, ErrorCode, Result};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value};
use minijinja::{AutoEscape, Environment, ErrorKind, State};

use crate::row::Json;

pub(crate) use choose::Templates;
pub(crate) use time::Moment;

const NAME: &str = "chat_template";

/// A compiled chat template.
pub(crate) struct Template {
    environment: Environment<'static>,
    /// Its text, as the checkpoint has it.
    pub(crate) source: String,
    /// What it can write by itself, without anything of a row.
    pub(crate) literals: String,
    /// The day that `strftime_now` gives, where it names that.
    pub(crate) date: Option<String>,
    /// It marks what a model is to learn by `{% generation %}`.
    pub(crate) marks_replies: bool,
    bos_token: String,
    eos_token: String,
}

/// What is rendered.
pub(crate) struct Conversation<'a> {
    pub(crate) messages: &'a [Json],
    pub(crate) tools: Option<&'a Json>,
    /// More variables for the template.
    pub(crate) variables: Option<&'a Json>,
    pub(crate) add_generation_prompt: bool,
}

impl Template {
    /// Compiles a template's text. `config` is `tokenizer_config.json`; `day` is what `strftime_now` gives: one day for all
    /// rows, because a row must not depend on the hour that it was encoded in.
    pub(crate) fn compile(source: String, origin: &str, config: &Json, day: Moment) -> Result<Self> {
        // As jinja2 does with the newlines of a template.
        let source = source.replace("\r\n", "\n").replace('\r', "\n");
        let (rewritten, marks_replies) = replace_generation_tags(&source);
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| compile_error(origin, &error))?);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_unknown_method_callback(methods::call);
        environment.set_formatter(|out, _state, value| {
            if let Some(text) = value.as_str() {
                out.write_str(text)?;
            } else if !value.is_undefined() {
                out.write_str(&python::str(value)?)?;
            }
            Ok(())
        });
        environment.add_filter("tojson", |value: &Value, options: Kwargs| python::tojson(value, options));
        environment.add_filter("string", |value: &Value| python::str(value));
        environment.add_filter("__reply", mark_reply);
        environment.add_function("raise_exception", |message: String| -> std::result::Result<String, _> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        let date = source.contains("strftime_now").then(|| day.date_text());
        environment.add_function("strftime_now", move |format: String| day.format(&format));
        environment.add_template_owned(NAME, rewritten).map_err(|error| compile_error(origin, &error))?;
        let token = |name: &str| match config.get(name) {
            Some(Json::Str(text)) => text.clone(),
            Some(token) => token.get("content").and_then(Json::as_str).unwrap_or_default().to_owned(),
            None => String::new(),
        };
        let (bos_token, eos_token) = (token("bos_token"), token("eos_token"));
        let literals = [&literals::literals(&source), &bos_token, &eos_token].map(String::as_str).join("\0");
        Ok(Self { environment, source, literals, date, marks_replies, bos_token, eos_token })
    }

    /// Renders a conversation. `text` may change every string of the row; `marks` are written around what is between
    /// generation tags (both may be empty).
    pub(crate) fn render(
        &self,
        conversation: &Conversation<'_>,
        text: &impl Fn(&str) -> String,
        marks: (&str, &str),
    ) -> std::result::Result<String, String> {
        let template = self.environment.get_template(NAME).map_err(|error| describe(&error))?;
        let list = |items: &[Json]| Value::from(items.iter().map(|m| python::value_of(m, text)).collect::<Vec<_>>());
        let mut variables: Vec<(String, Value)> = Vec::new();
        if let Some(Json::Object(entries)) = conversation.variables {
            variables.extend(entries.iter().map(|(k, v)| (k.clone(), python::value_of(v, text))));
        }
        let tools = conversation.tools.map_or(Value::from(()), |tools| python::value_of(tools, text));
        for (name, value) in [
            ("messages", list(conversation.messages)),
            ("tools", tools),
            ("documents", Value::from(())),
            ("add_generation_prompt", Value::from(conversation.add_generation_prompt)),
            ("bos_token", Value::from(self.bos_token.as_str())),
            ("eos_token", Value::from(self.eos_token.as_str())),
            ("__open", Value::from(marks.0)),
            ("__close", Value::from(marks.1)),
        ] {
            variables.push((name.to_owned(), value));
        }
        template.render(python::Dict::value(variables)).map_err(|error| describe(&error))
    }
}

fn compile_error(origin: &str, error: &minijinja::Error) -> Error {
    Error::new(ErrorCode::Text, format!("{origin}: the chat template cannot be read: {}", describe(error)))
}

fn describe(error: &minijinja::Error) -> String {
    let place = error.line().map_or(String::new(), |line| format!(" (line {line} of the template)"));
    match error.detail() {
        Some(detail) => format!("{detail}{place}"),
        None => format!("{}{place}", error.kind()),
    }
}

/// What is between generation tags, with a mark on each side.
fn mark_reply(state: &State<'_, '_>, body: String) -> String {
    let mark = |name: &str| state.lookup(name).and_then(|mark| mark.as_str().map(str::to_owned)).unwrap_or_default();
    format!("{}{body}{}", mark("__open"), mark("__close"))
}

/// `{% generation %}` is transformers' own tag: a filter block has the same effect on space and scope.
fn replace_generation_tags(source: &str) -> (String, bool) {
    let mut out = String::with_capacity(source.len() + 64);
    let mut rest = source;
    let mut found = false;
    while let Some(open) = rest.find("{%") {
        let Some(length) = rest[open..].find("%}") else { break };
        let tag = &rest[open + 2..open + length];
        let word = tag.trim_start_matches(['-', '+']).trim_end_matches(['-', '+']).trim();
        let replacement = match word {
            "generation" => "filter __reply",
            "endgeneration" => "endfilter",
            _ => {
                out.push_str(&rest[..open + 2]);
                rest = &rest[open + 2..];
                continue;
            }
        };
        found = true;
        out.push_str(&rest[..open + 2]);
        out.push_str(&tag.replace(word, replacement));
        out.push_str("%}");
        rest = &rest[open + length + 2..];
    }
    out.push_str(rest);
    (out, found)
}
