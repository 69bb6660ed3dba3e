//! Replies in the text of a template that marks them neither by tags nor by ChatML: what follows the generation prompt, up
//! to the token that ends it. Only lengths of rendered texts decide, so the text of a row can move nothing.

use std::ops::Range;

use crate::row::Json;

use super::probe::Probe;

/// How such a template begins and ends a reply.
#[derive(Debug)]
pub(super) struct PromptRule {
    /// What the generation prompt has behind the header that a reply in history has, `<think>\n` for example.
    extra: String,
    /// What follows a reply's own text where the conversation ends.
    tail: String,
    /// Bytes of the tail up to the end of the token that ends a reply.
    tail_end: usize,
}

impl PromptRule {
    /// `talk` is a question and its answer `word`.
    ///
    /// # Errors
    /// Why its replies cannot be located.
    pub(super) fn of(probe: &Probe<'_>, talk: &[Json], word: &str, special: &[String]) -> Result<Self, String> {
        let failed = |error| format!("it cannot render a question and its answer ({error})");
        let whole = probe.render(talk, None, false).map_err(failed)?;
        let prompt = probe.render(&talk[..1], None, true).map_err(failed)?;
        let Some((header, tail)) = whole.split_once(word) else {
            return Err("it does not write an answer as it is".to_owned());
        };
        let extra = match (header.strip_prefix(prompt.as_str()), prompt.strip_prefix(header)) {
            (Some(space), _) if space.trim().is_empty() => "",
            (None, Some(extra)) => extra,
            _ => return Err("a reply does not begin with what it writes for add_generation_prompt".to_owned()),
        };
        let first = special.iter().filter_map(|token| tail.find(token.as_str()).map(|at| (at, token.len())));
        // Of tokens that begin at the same place the longest counts.
        let Some((at, length)) = first.min_by_key(|&(at, length)| (at, std::cmp::Reverse(length))) else {
            return Err("it writes no special token behind a reply".to_owned());
        };
        Ok(Self { extra: extra.to_owned(), tail: tail.to_owned(), tail_end: at + length })
    }

    /// The place of a reply. `whole`: all of the conversation; `before`: the messages before the reply with the generation
    /// prompt; `with`: those with the reply, without a prompt.
    ///
    /// # Errors
    /// Why it cannot be located.
    pub(super) fn place(&self, whole: &str, before: &str, with: &str) -> Result<Range<usize>, String> {
        let header = before.strip_suffix(self.extra.as_str()).filter(|_| !self.extra.is_empty());
        let start = match (whole.starts_with(before), header) {
            (true, _) => before.len(),
            (false, Some(header)) if whole.starts_with(header) => header.len(),
            _ => return Err("what it writes before the reply is another text when the reply follows".to_owned()),
        };
        let Some(body) = with.strip_suffix(self.tail.as_str()).filter(|body| body.len() >= start) else {
            return Err("the reply does not end as others do".to_owned());
        };
        let end = body.len() + self.tail_end;
        if whole.as_bytes().get(..end) != Some(&with.as_bytes()[..end]) {
            return Err("the reply is another text when messages follow it".to_owned());
        }
        Ok(start..end)
    }
}
