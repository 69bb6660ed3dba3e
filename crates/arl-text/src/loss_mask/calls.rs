//! Tool calls as the template takes them: arguments as JSON text or as an object, and what their message has for content.

use crate::note::{NoteKind, Notes};
use crate::problem::{Refusal, reason};
use crate::row::{Json, is_reply, parse};
use crate::template::python;

use super::probe::Probe;

/// What a message with calls has for content where it has no text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    Empty,
    Null,
    Absent,
}

const CONTENTS: [Content; 3] = [Content::Empty, Content::Null, Content::Absent];

impl Content {
    fn of(message: &Json) -> Option<Self> {
        match message.get("content") {
            None => Some(Self::Absent),
            Some(Json::Null) => Some(Self::Null),
            Some(Json::Str(text)) if text.is_empty() => Some(Self::Empty),
            Some(_) => None,
        }
    }

    fn set(self, message: &mut Json) {
        match self {
            Self::Empty => message.set("content", Json::Str(String::new())),
            Self::Null => message.set("content", Json::Null),
            Self::Absent => {
                message.remove("content");
            }
        }
    }
}

/// What a template takes, found out by rendering a call in every form.
#[derive(Clone, Debug)]
pub(super) struct CallRule {
    /// It writes arguments that are a text as they are.
    text: bool,
    /// It writes arguments that are an object so that a model can be understood.
    object: bool,
    /// What it is given for each of `CONTENTS`.
    contents: [Content; 3],
}

/// The arguments of the probe; two spaces show whether the text is written as it is.
const TEXT: &str = r#"{"qzkeyqz":  "qzvalueqz"}"#;

impl CallRule {
    pub(super) fn of(probe: &Probe<'_>) -> Self {
        let render = |content: Content, arguments: Json| {
            let texts = probe.calls(|message| content.set(message), &arguments);
            texts.into_iter().find(|text| text.contains("qzfunctionqz"))
        };
        let text = |content| render(content, Json::Str(TEXT.to_owned())).filter(|text| text.contains(TEXT));
        let object = |content| {
            let arguments = parse(TEXT.as_bytes()).unwrap_or(Json::Null);
            // `{'...` is how Python prints a dict that nothing made JSON of.
            let written = |text: &String| {
                ["qzkeyqz", "qzvalueqz"].iter().all(|word| text.contains(word)) && !text.contains("{'qz")
            };
            render(content, arguments).filter(written)
        };
        let takes_text = CONTENTS.into_iter().any(|content| text(content).is_some());
        let takes_object = CONTENTS.into_iter().any(|content| object(content).is_some());
        let written = CONTENTS.map(|content| if takes_object { object(content) } else { text(content) });
        let best = written.iter().position(Option::is_some).unwrap_or(0);
        let contents = [0, 1, 2].map(|i| {
            // A template may print `None`; what is written must be what an empty text gives.
            let same = written[i].is_some() && written[i] == written[best];
            if same { CONTENTS[i] } else { CONTENTS[best] }
        });
        Self { text: takes_text, object: takes_object, contents }
    }

    /// Brings the calls of all messages into the form that the template takes.
    pub(super) fn apply(&self, messages: &mut [Json], notes: &mut Notes) -> Result<(), Refusal> {
        let (mut parsed, mut empty) = (0, 0);
        for (i, message) in messages.iter_mut().enumerate().filter(|(_, message)| is_reply(message)) {
            let Json::Object(entries) = &mut *message else { continue };
            let calls = entries.iter_mut().find(|(key, _)| key == "tool_calls");
            let Some((_, Json::Array(calls))) = calls.filter(|(_, calls)| *calls != Json::Array(Vec::new())) else {
                continue;
            };
            for (j, call) in calls.iter_mut().enumerate() {
                let Some(arguments) = arguments_of(call) else { continue };
                match arguments {
                    Json::Str(text) if text.trim().is_empty() && (self.object || self.text) => {
                        *arguments = if self.object { Json::Object(Vec::new()) } else { Json::Str("{}".to_owned()) };
                        empty += 1;
                    }
                    Json::Str(text) if self.object && !self.text => {
                        *arguments = object(text).map_err(|why| unusable(i, j, &why))?;
                        parsed += 1;
                    }
                    Json::Object(_) if self.text && !self.object => {
                        let text = python::dumps(arguments).map_err(|error| unusable(i, j, &error.to_string()))?;
                        *arguments = Json::Str(text);
                    }
                    _ => {}
                }
            }
            if let Some(content) = Content::of(message) {
                let given = self.contents[content as usize];
                if given != content {
                    given.set(message);
                }
            }
        }
        notes.add(NoteKind::ParsedArguments, "", parsed);
        notes.add(NoteKind::EmptyArguments, "", empty);
        Ok(())
    }
}

fn object(text: &str) -> Result<Json, String> {
    match parse(text.as_bytes()) {
        Ok(object @ Json::Object(_)) => Ok(object),
        Ok(other) => Err(format!("JSON text of {}", other.kind())),
        Err(refusal) => Err(format!("a text that is no JSON ({})", refusal.message)),
    }
}

fn unusable(message: usize, call: usize, what: &str) -> Refusal {
    Refusal::new(
        reason::BAD_MESSAGE,
        format!(
            "messages[{message}].tool_calls[{call}].function.arguments is {what}; the chat template writes the arguments \
             of an object"
        ),
    )
}

/// The function of a call; some rows have its keys in the call itself.
pub(super) fn function_of(call: &Json) -> &Json {
    call.get("function").filter(|function| matches!(function, Json::Object(_))).unwrap_or(call)
}

fn arguments_of(call: &mut Json) -> Option<&mut Json> {
    let wrapped = matches!(call.get("function"), Some(Json::Object(_)));
    let function = if wrapped { value_of(call, "function")? } else { call };
    value_of(function, "arguments")
}

/// The value of a key of an object, to change it.
pub(super) fn value_of<'a>(object: &'a mut Json, key: &str) -> Option<&'a mut Json> {
    match object {
        Json::Object(entries) => entries.iter_mut().find(|(own, _)| own == key).map(|(_, value)| value),
        _ => None,
    }
}
