//! Where the replies of a conversation lie in its rendered text.
//! The places come from the renderer: text that the author of a row wrote can neither open nor close a reply.

use crate::options::Thinking;
use crate::problem::{Refusal, reason};
use crate::row::{Json, REASONING, Record, is_reply, role};
use crate::template::{Conversation, Template};

const HEADER: &str = "<|im_start|>assistant";
const CLOSE: &str = "<|im_end|>";

/// One reply: `text[start..end]`, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reply {
    pub(crate) message: usize,
    pub(crate) start: usize,
    pub(crate) end: usize,
}

/// A conversation's text and the places of its replies, in order.
#[derive(Clone, Debug)]
pub(crate) struct Rendered {
    pub(crate) text: String,
    pub(crate) replies: Vec<Reply>,
}

/// Characters of the private-use area that neither the row nor the template has.
struct Signs {
    /// Stands for `|` of the row, without which no special token can be spelt.
    bar: char,
    /// Stands for `<` of reasoning that must pass the template unseen.
    angle: char,
    open: char,
    close: char,
}

impl Signs {
    fn unused(record: &Record, template: &Template) -> Option<Self> {
        let private = |c: &char| ('\u{E000}'..='\u{F8FF}').contains(c);
        let mut used: std::collections::HashSet<char> = template.source.chars().filter(private).collect();
        each_string(record, &mut |text| {
            // Their UTF-8 begins with EE or EF; nearly no text has any.
            if text.bytes().any(|byte| byte == 0xEE || byte == 0xEF) {
                used.extend(text.chars().filter(private));
            }
        });
        let mut free = ('\u{E000}'..='\u{F8FF}').filter(|c| !used.contains(c));
        Some(Self { bar: free.next()?, angle: free.next()?, open: free.next()?, close: free.next()? })
    }
}

fn each_string(record: &Record, see: &mut impl FnMut(&str)) {
    record.messages.iter().for_each(|message| message.strings(see));
    record.tools.iter().chain(&record.variables).for_each(|value| value.strings(see));
}

/// Renders a record's first `until` messages. `add_generation_prompt`: with the header of a reply at the end.
pub(crate) fn render(
    template: &Template,
    record: &Record,
    thinking: Option<Thinking>,
    add_generation_prompt: bool,
) -> Result<Rendered, Refusal> {
    let Some(signs) = Signs::unused(record, template) else {
        return Err(Refusal::new(reason::TEMPLATE, "the row uses every private-use character"));
    };
    let mut messages = record.messages.clone();
    match thinking {
        None | Some(Thinking::Keep) => {}
        Some(Thinking::Strip) => messages.iter_mut().filter(|m| is_reply(m)).for_each(strip_reasoning),
        Some(Thinking::Last) => {
            let last = last_query(&messages);
            messages.iter_mut().take(last).filter(|m| is_reply(m)).for_each(strip_reasoning);
        }
    }
    let job = Job { template, record, signs, add_generation_prompt };
    let rendered = job.render(&messages)?;
    if thinking != Some(Thinking::Keep) {
        return Ok(rendered);
    }
    let lost = job.lost_reasoning(&messages, &rendered);
    if lost.is_empty() {
        return Ok(rendered);
    }
    for &i in &lost {
        job.inline_reasoning(&mut messages[i]);
    }
    let rendered = job.render(&messages)?;
    match job.lost_reasoning(&record.messages, &rendered).first() {
        Some(i) => Err(Refusal::new(
            reason::TEMPLATE,
            format!("thinking: keep: the template leaves out the reasoning of messages[{i}]"),
        )),
        None => Ok(rendered),
    }
}

struct Job<'a> {
    template: &'a Template,
    record: &'a Record,
    signs: Signs,
    add_generation_prompt: bool,
}

impl Job<'_> {
    fn render(&self, messages: &[Json]) -> Result<Rendered, Refusal> {
        match self.render_once(messages) {
            Err(refusal) => {
                // OpenAI writes `content: null` beside tool calls; templates that need a string get an empty one.
                let mut filled = messages.to_vec();
                let mut changed = false;
                for message in filled.iter_mut().filter(|m| is_reply(m)) {
                    if message.get("content").is_none_or(Json::is_null) {
                        message.set("content", Json::Str(String::new()));
                        changed = true;
                    }
                }
                if changed { self.render_once(&filled).map_err(|_| refusal) } else { Err(refusal) }
            }
            rendered => rendered,
        }
    }

    fn render_once(&self, messages: &[Json]) -> Result<Rendered, Refusal> {
        let Signs { bar, open, close, .. } = self.signs;
        let conversation = Conversation {
            messages,
            tools: self.record.tools.as_ref(),
            variables: self.record.variables.as_ref(),
            add_generation_prompt: self.add_generation_prompt,
        };
        let failed = |message| Refusal::new(reason::TEMPLATE, format!("the chat template: {message}"));
        let bar = bar.to_string();
        let hide = |text: &str| if text.contains('|') { text.replace('|', &bar) } else { text.to_owned() };
        let mut has_bar = false;
        each_string(self.record, &mut |text| has_bar |= text.contains('|'));
        let marks = (open.to_string(), close.to_string());
        let marked = if has_bar {
            self.template.render(&conversation, &hide, (&marks.0, &marks.1))
        } else {
            self.template.render(&conversation, &str::to_owned, (&marks.0, &marks.1))
        }
        .map_err(failed)?;
        let rendered = self.places(&marked, messages)?;
        if has_bar {
            // The escape must not have changed what the template does.
            let plain = self.template.render(&conversation, &str::to_owned, ("", "")).map_err(failed)?;
            if plain.replace(self.signs.angle, "<") != rendered.text {
                return Err(Refusal::new(
                    reason::TEMPLATE,
                    "the template looks at `|` in the text of messages, so the replies cannot be told apart safely; \
                     mark them in the template by {% generation %}",
                ));
            }
        }
        Ok(rendered)
    }

    /// Takes marks and escapes out of rendered text, and finds the replies.
    fn places(&self, marked: &str, messages: &[Json]) -> Result<Rendered, Refusal> {
        let Signs { bar, angle, open, close } = self.signs;
        let mut text = String::with_capacity(marked.len());
        let mut spans: Vec<(usize, usize)> = Vec::new();
        let mut headers: Vec<usize> = Vec::new();
        let mut opened: Option<usize> = None;
        let mut copied = 0;
        let mut at = 0;
        let bytes = marked.as_bytes();
        let mut header_opened = None;
        while at < bytes.len() {
            let Some(step) = bytes[at..].iter().position(|&b| b == b'<' || b == 0xEE || b == 0xEF) else { break };
            at += step;
            if bytes[at] == b'<' {
                let rest = &marked[at..];
                if rest.starts_with(HEADER) {
                    text.push_str(&marked[copied..at + HEADER.len()]);
                    at += HEADER.len();
                    copied = at;
                    headers.push(text.len());
                    header_opened = Some(text.len());
                } else if rest.starts_with(CLOSE) {
                    text.push_str(&marked[copied..at + CLOSE.len()]);
                    at += CLOSE.len();
                    copied = at;
                    if let (Some(start), false) = (header_opened.take(), self.template.marks_replies) {
                        spans.push((start, text.len()));
                    }
                } else {
                    at += 1;
                }
                continue;
            }
            let Some(c) = marked[at..].chars().next() else { break };
            let replacement = match c {
                c if c == bar => "|",
                c if c == angle => "<",
                c if c == open || c == close => "",
                _ => {
                    at += c.len_utf8();
                    continue;
                }
            };
            text.push_str(&marked[copied..at]);
            text.push_str(replacement);
            at += c.len_utf8();
            copied = at;
            if c == open {
                opened = Some(text.len());
            } else if c == close
                && let Some(start) = opened.take()
            {
                spans.push((start, text.len()));
            }
        }
        text.push_str(&marked[copied..]);
        if self.template.marks_replies {
            self.by_marks(text, &spans, &headers, messages)
        } else {
            self.by_headers(text, &spans, &headers, messages)
        }
    }

    /// Spans between generation tags: one a reply, or several of which each lies in its reply's block.
    fn by_marks(
        &self,
        text: String,
        spans: &[(usize, usize)],
        headers: &[usize],
        messages: &[Json],
    ) -> Result<Rendered, Refusal> {
        let indexes = reply_indexes(messages);
        let place = |n: usize, &(start, end): &(usize, usize)| -> Option<Reply> {
            let nth =
                if spans.len() == indexes.len() { n } else { headers.iter().filter(|&&h| h <= start).count() - 1 };
            Some(Reply { message: *indexes.get(nth)?, start, end })
        };
        let in_blocks = headers.len() == indexes.len() + usize::from(self.add_generation_prompt)
            && spans.iter().all(|span| headers.first().is_some_and(|&first| first <= span.0));
        if spans.len() != indexes.len() && !in_blocks {
            return Err(self.miscounted(spans.len(), indexes.len()));
        }
        let replies: Option<Vec<Reply>> = spans.iter().enumerate().map(|(n, span)| place(n, span)).collect();
        match replies {
            Some(replies) => Ok(Rendered { text, replies }),
            None => Err(self.miscounted(spans.len(), indexes.len())),
        }
    }

    /// ChatML without tags: from the line after the header to the closing token.
    fn by_headers(
        &self,
        text: String,
        spans: &[(usize, usize)],
        headers: &[usize],
        messages: &[Json],
    ) -> Result<Rendered, Refusal> {
        let indexes = reply_indexes(messages);
        let expected = indexes.len() + usize::from(self.add_generation_prompt);
        if headers.len() != expected || spans.len() != indexes.len() {
            return Err(self.miscounted(spans.len(), indexes.len()));
        }
        let mut replies = Vec::with_capacity(spans.len());
        for (&message, &(start, end)) in indexes.iter().zip(spans) {
            if text.as_bytes().get(start) != Some(&b'\n') {
                return Err(Refusal::new(
                    reason::TEMPLATE,
                    "the template does not end the header of a reply with a newline; mark replies by {% generation %}",
                ));
            }
            replies.push(Reply { message, start: start + 1, end });
        }
        Ok(Rendered { text, replies })
    }

    fn miscounted(&self, found: usize, expected: usize) -> Refusal {
        let how = if self.template.marks_replies { "{% generation %}" } else { "<|im_start|>assistant ... <|im_end|>" };
        Refusal::new(
            reason::TEMPLATE,
            format!("the template wrote {found} replies ({how}) for {expected} messages of the assistant"),
        )
    }

    /// Replies whose reasoning is not in their text.
    fn lost_reasoning(&self, messages: &[Json], rendered: &Rendered) -> Vec<usize> {
        let kept = |i: usize, reasoning: &str| {
            let mut own = rendered.replies.iter().filter(|reply| reply.message == i);
            own.any(|reply| rendered.text[reply.start..reply.end].contains(reasoning))
        };
        let lost = |&i: &usize| {
            reasoning_of(&messages[i]).is_some_and(|(reasoning, _)| {
                let reasoning = reasoning.trim_matches('\n');
                !reasoning.is_empty() && !kept(i, reasoning)
            })
        };
        reply_indexes(messages).into_iter().filter(lost).collect()
    }

    /// Writes reasoning into the content in a form that the template does not recognise.
    fn inline_reasoning(&self, message: &mut Json) {
        let Some((reasoning, content)) = reasoning_of(message) else { return };
        let angle = self.signs.angle;
        let text = format!(
            "{angle}think>\n{}\n{angle}/think>\n\n{}",
            reasoning.trim_matches('\n'),
            content.trim_start_matches('\n')
        );
        remove_reasoning(message);
        message.set("content", Json::Str(text));
    }
}

fn reply_indexes(messages: &[Json]) -> Vec<usize> {
    (0..messages.len()).filter(|&i| is_reply(&messages[i])).collect()
}

/// The last question of the user; tool results that are written as one do not count.
fn last_query(messages: &[Json]) -> usize {
    let is_query = |message: &Json| {
        let content = message.get("content").and_then(Json::as_str).unwrap_or_default();
        role(message) == "user" && !(content.starts_with("<tool_response>") && content.ends_with("</tool_response>"))
    };
    messages.iter().rposition(is_query).unwrap_or(0)
}

/// Reasoning and the rest of a reply, from `reasoning_content` or from think tags in the content.
fn reasoning_of(message: &Json) -> Option<(String, String)> {
    let content = message.get("content").and_then(Json::as_str).unwrap_or_default();
    if let Some(Json::Str(reasoning)) = message.get("reasoning_content") {
        return Some((reasoning.clone(), content.to_owned()));
    }
    let (before, after) = content.rsplit_once("</think>")?;
    let reasoning = before.split("<think>").last().unwrap_or(before);
    Some((reasoning.to_owned(), after.to_owned()))
}

fn remove_reasoning(message: &mut Json) {
    for name in REASONING {
        message.remove(name);
    }
}

fn strip_reasoning(message: &mut Json) {
    remove_reasoning(message);
    let content = message.get("content").and_then(Json::as_str).and_then(|text| text.rsplit_once("</think>"));
    if let Some((_, answer)) = content {
        let answer = answer.trim_start_matches('\n').to_owned();
        message.set("content", Json::Str(answer));
    }
}
