//! Where the replies of a conversation are in its rendered text, and whether that text has all of the row.
//! The places come from the renderer: text that the author of a row wrote can neither open nor close a reply.

mod calls;
mod check;
mod images;
mod probe;
mod prompt;
mod sentinels;
mod thinking;

use crate::note::{NoteKind, Notes};
use crate::options::Thinking;
use crate::problem::{Refusal, reason};
use crate::row::{Json, Record, is_reply, role};
use crate::template::Conversation;

use check::{Found, Lost, Tracked, What};
use probe::{Replies, Tools};
use prompt::PromptRule;
use sentinels::{Scan, Seen, Sentinels, scan};

pub(crate) use images::suspect;
pub(crate) use probe::Probed;

const ADVICE: &str = "give a template with {% generation %} around each reply with --chat_template";

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
    /// What rendering left out or changed.
    pub(crate) notes: Notes,
}

/// Renders a record's messages. `add_generation_prompt`: with the header of a reply at the end.
pub(crate) fn render(
    probed: &Probed,
    record: &Record,
    thinking: Option<Thinking>,
    add_generation_prompt: bool,
) -> Result<Rendered, Refusal> {
    let seen = Seen::in_record(record);
    let Some(sentinels) = Sentinels::unused(&seen, &probed.private) else {
        return Err(Refusal::new(reason::TEMPLATE, "the row uses too many private-use characters"));
    };
    let mut messages = record.messages.clone();
    if !record.images.is_empty() {
        images::fold(&mut messages, sentinels.image());
    }
    match thinking {
        None | Some(Thinking::Keep) => {}
        Some(Thinking::Strip) => thinking::strip(&mut messages),
        Some(Thinking::Last) => {
            let last = thinking::last_query(&messages);
            thinking::strip(&mut messages[..last]);
        }
    }
    let mut notes = Notes::default();
    probed.calls.apply(&mut messages, &mut notes)?;
    let mut job = Job { probed, record, sentinels, has_bar: seen.bar, inlined: None, add_generation_prompt };
    let (mut rendered, mut unthought) = job.render(&messages)?;
    if thinking == Some(Thinking::Keep) && !unthought.is_empty() {
        // Where only the generation prompt shows how the template writes a reply, nothing shows how it would write reasoning.
        if !matches!(probed.replies, Replies::Prompt(_)) {
            unthought.iter().for_each(|&i| thinking::inline(&mut messages[i], sentinels));
            job.inlined = Some(sentinels);
            (rendered, unthought) = job.render(&messages)?;
        }
        if let Some(i) = unthought.first() {
            let what = format!("thinking: keep: the chat template leaves out the reasoning of messages[{i}]");
            return Err(Refusal::new(reason::TEMPLATE, what));
        }
    }
    let last = thinking::last_query(&messages);
    let earlier = unthought.iter().filter(|&&i| i < last).count();
    notes.add(NoteKind::EarlierReasoning, "", earlier as u32);
    notes.add(NoteKind::LostReasoning, "", (unthought.len() - earlier) as u32);
    job.note_the_rest(&messages, &rendered.text, &mut notes);
    Ok(Rendered { notes, ..rendered })
}

struct Job<'a> {
    probed: &'a Probed,
    record: &'a Record,
    sentinels: Sentinels,
    has_bar: bool,
    /// The sentinels, where reasoning was written into contents.
    inlined: Option<Sentinels>,
    add_generation_prompt: bool,
}

impl Job<'_> {
    /// The text, and the replies whose reasoning is not in it.
    fn render(&self, messages: &[Json]) -> Result<(Rendered, Vec<usize>), Refusal> {
        let (text, replies, lost) = match &self.probed.replies {
            Replies::Prompt(rule) => {
                let text = self.plain(messages)?;
                let replies = self.by_prompt(rule, &text, messages)?;
                let lost = self.lost(messages, &text, &replies)?;
                (text, replies, lost)
            }
            _ if self.has_bar => self.with_bars_hidden(messages)?,
            _ => {
                let scan = self.scan(messages, false)?;
                let replies = self.replies(&scan, messages)?;
                let lost = self.lost(messages, &scan.text, &replies)?;
                (scan.text, replies, lost)
            }
        };
        let mut unthought = Vec::new();
        for (what, i) in lost {
            let left_out = match what {
                What::Reasoning => {
                    if !unthought.contains(&i) {
                        unthought.push(i);
                    }
                    continue;
                }
                What::Content => format!("the content of messages[{i}], of role {}", role(&messages[i])),
                What::Call => format!("the tool calls of messages[{i}]"),
                What::Arguments(j) => format!("the arguments of messages[{i}].tool_calls[{j}]"),
            };
            let advice = "--chat_template FILE gives another";
            return Err(Refusal::new(reason::TEMPLATE, format!("the chat template leaves out {left_out}; {advice}")));
        }
        Ok((Rendered { text, replies, notes: Notes::default() }, unthought))
    }

    /// The text as the template writes it.
    fn plain(&self, messages: &[Json]) -> Result<String, Refusal> {
        let text = self.template_text(messages, self.add_generation_prompt, &str::to_owned, ("", ""))?;
        Ok(text.replace(self.sentinels.angle(), "<"))
    }

    fn template_text(
        &self,
        messages: &[Json],
        add_generation_prompt: bool,
        text: &impl Fn(&str) -> String,
        marks: (&str, &str),
    ) -> Result<String, Refusal> {
        let unfolded;
        let messages = if self.record.images.is_empty() {
            messages
        } else {
            unfolded = self.probed.image_form.unfold(messages, self.sentinels.image());
            &unfolded
        };
        let (tools, variables) = (self.record.tools.as_ref(), self.record.variables.as_ref());
        let conversation = Conversation { messages, tools, variables, add_generation_prompt };
        let failed = |message| Refusal::new(reason::TEMPLATE, format!("the chat template: {message}"));
        self.probed.template.render(&conversation, text, marks).map_err(failed)
    }

    /// The text with what sentinels show of it. `hide`: no text of the row can spell a special token.
    fn scan(&self, messages: &[Json], hide: bool) -> Result<Scan, Refusal> {
        let mut open = [0; 4];
        let mut close = [0; 4];
        let marks = (&*self.sentinels.open().encode_utf8(&mut open), &*self.sentinels.close().encode_utf8(&mut close));
        let marked = if hide {
            let bar = self.sentinels.bar().to_string();
            let hidden = |text: &str| if text.contains('|') { text.replace('|', &bar) } else { text.to_owned() };
            self.template_text(messages, self.add_generation_prompt, &hidden, marks)?
        } else {
            self.template_text(messages, self.add_generation_prompt, &str::to_owned, marks)?
        };
        Ok(scan(&marked, self.sentinels))
    }

    /// Renders a row that could spell special tokens: the escape must not change what the template does.
    fn with_bars_hidden(&self, messages: &[Json]) -> Result<(String, Vec<Reply>, Lost), Refusal> {
        let plain = self.plain(messages)?;
        let tracked = Tracked::new(messages, self.sentinels);
        if let Ok(scan) = self.scan(&tracked.messages, true)
            && scan.text == plain
        {
            let replies = self.replies(&scan, messages)?;
            return Ok((plain, replies, tracked.lost(&scan.pieces)));
        }
        let scan = self.scan(messages, true)?;
        if scan.text != plain {
            return Err(Refusal::new(
                reason::TEMPLATE,
                format!(
                    "the template looks at `|` in the text of messages, so arl cannot separate the replies; {ADVICE}"
                ),
            ));
        }
        let replies = self.replies(&scan, messages)?;
        let found = self.search(messages, &plain, &replies);
        Ok((plain, replies, found.lost_or_doubtful()))
    }

    /// What the text does not have of the messages.
    fn lost(&self, messages: &[Json], text: &str, replies: &[Reply]) -> Result<Lost, Refusal> {
        let found = self.search(messages, text, replies);
        if found.doubtful.is_empty() && found.lost.iter().all(|(what, _)| *what == What::Reasoning) {
            return Ok(found.lost);
        }
        let tracked = Tracked::new(messages, self.sentinels);
        match self.scan(&tracked.messages, false) {
            Ok(scan) if scan.text == text => Ok(tracked.lost(&scan.pieces)),
            // The template looks at the very text: a row whose loss cannot be ruled out is not trained silently.
            _ => Ok(found.lost_or_doubtful()),
        }
    }

    fn search(&self, messages: &[Json], text: &str, replies: &[Reply]) -> Found {
        check::search(self.probed, messages, (self.sentinels, self.inlined), text, replies)
    }

    fn replies(&self, scan: &Scan, messages: &[Json]) -> Result<Vec<Reply>, Refusal> {
        match &self.probed.replies {
            Replies::Marked => self.by_marks(scan, messages),
            Replies::ChatMl => self.by_headers(scan, messages),
            Replies::Prompt(rule) => self.by_prompt(rule, &scan.text, messages),
            Replies::Unknown(why) => Err(Refusal::new(
                reason::TEMPLATE,
                format!(
                    "the chat template is neither ChatML nor marks replies by {{% generation %}}, and {why}; {ADVICE}"
                ),
            )),
        }
    }

    /// Spans between generation tags: one a reply, or several, each within its reply's block.
    fn by_marks(&self, scan: &Scan, messages: &[Json]) -> Result<Vec<Reply>, Refusal> {
        let indexes = reply_indexes(messages);
        let Scan { marks, headers, .. } = scan;
        let one_each = marks.len() == indexes.len();
        let in_blocks = headers.len() == indexes.len() + usize::from(self.add_generation_prompt)
            && marks.iter().all(|mark| headers.first().is_some_and(|&first| first <= mark.0));
        let place = |n: usize, &(start, end): &(usize, usize)| -> Option<Reply> {
            let nth = if one_each { n } else { headers.iter().filter(|&&header| header <= start).count() - 1 };
            Some(Reply { message: *indexes.get(nth)?, start, end })
        };
        let replies: Option<Vec<Reply>> = match one_each || in_blocks {
            true => marks.iter().enumerate().map(|(n, mark)| place(n, mark)).collect(),
            false => None,
        };
        replies.ok_or_else(|| miscounted(marks.len(), "{% generation %}", indexes.len()))
    }

    /// ChatML without tags: from the line after the header to the closing token.
    fn by_headers(&self, scan: &Scan, messages: &[Json]) -> Result<Vec<Reply>, Refusal> {
        let indexes = reply_indexes(messages);
        let expected = indexes.len() + usize::from(self.add_generation_prompt);
        if scan.headers.len() != expected || scan.blocks.len() != indexes.len() {
            return Err(miscounted(scan.blocks.len(), "<|im_start|>assistant ... <|im_end|>", indexes.len()));
        }
        let mut replies = Vec::with_capacity(indexes.len());
        for (&message, &(start, end)) in indexes.iter().zip(&scan.blocks) {
            if scan.text.as_bytes().get(start) != Some(&b'\n') {
                return Err(Refusal::new(
                    reason::TEMPLATE,
                    format!("the template does not end the header of a reply with a newline; {ADVICE}"),
                ));
            }
            replies.push(Reply { message, start: start + 1, end });
        }
        Ok(replies)
    }

    /// Behind the generation prompt: renders the messages up to each reply, and with it.
    fn by_prompt(&self, rule: &PromptRule, whole: &str, messages: &[Json]) -> Result<Vec<Reply>, Refusal> {
        let mut replies: Vec<Reply> = Vec::new();
        for message in reply_indexes(messages) {
            let part =
                |end: usize, prompt: bool| self.template_text(&messages[..end], prompt, &str::to_owned, ("", ""));
            let before = part(message, true)?;
            let is_all = message + 1 == messages.len() && !self.add_generation_prompt;
            let with = if is_all { whole.to_owned() } else { part(message + 1, false)? };
            let behind = replies.last().map_or(0, |reply| reply.end);
            let place = match rule.place(whole, &before, &with) {
                Ok(place) if place.start < behind => Err("it overlaps with the reply before".to_owned()),
                place => place,
            };
            let place = place.map_err(|why| {
                let what = format!("messages[{message}]: the reply cannot be located in the template's text: {why}");
                Refusal::new(reason::TEMPLATE, format!("{what}; {ADVICE}"))
            })?;
            replies.push(Reply { message, start: place.start, end: place.end });
        }
        Ok(replies)
    }

    /// Tools and names, without which a row is trained all the same.
    fn note_the_rest(&self, messages: &[Json], text: &str, notes: &mut Notes) {
        if let Some(tools) = &self.record.tools {
            let lost = match self.probed.tools {
                Tools::Left => *tools != Json::Array(Vec::new()),
                Tools::Written => !check::has_tools(text, tools),
                Tools::Changed => false,
            };
            notes.add(NoteKind::LostTools, "", u32::from(lost));
        }
        let unnamed = |message: &&Json| {
            self.probed.unnamed_roles.contains(&role(message))
                && message.get("name").and_then(Json::as_str).is_some_and(|name| !name.is_empty())
        };
        notes.add(NoteKind::LostName, "", messages.iter().filter(unnamed).count() as u32);
    }
}

fn miscounted(found: usize, how: &str, expected: usize) -> Refusal {
    Refusal::new(
        reason::TEMPLATE,
        format!("the template wrote {found} replies ({how}) for {expected} messages of the assistant"),
    )
}

fn reply_indexes(messages: &[Json]) -> Vec<usize> {
    (0..messages.len()).filter(|&i| is_reply(&messages[i])).collect()
}
