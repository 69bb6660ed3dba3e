//! The reasoning of replies: under a key of its own or between think tags in the content.

use crate::row::{Json, REASONING, is_reply, role};

use super::sentinels::Sentinels;

/// The last question of the user; tool results that are written as one do not count.
pub(super) fn last_query(messages: &[Json]) -> usize {
    let is_query = |message: &Json| {
        let content = message.get("content").and_then(Json::as_str).unwrap_or_default();
        role(message) == "user" && !(content.starts_with("<tool_response>") && content.ends_with("</tool_response>"))
    };
    messages.iter().rposition(is_query).unwrap_or(0)
}

/// Takes the reasoning out of the replies among these messages.
pub(super) fn strip(messages: &mut [Json]) {
    for message in messages.iter_mut().filter(|message| is_reply(message)) {
        remove(message);
        let content = message.get("content").and_then(Json::as_str).and_then(|text| text.rsplit_once("</think>"));
        if let Some((_, answer)) = content {
            let answer = answer.trim_start_matches('\n').to_owned();
            message.set("content", Json::Str(answer));
        }
    }
}

/// Writes a reply's reasoning into its content in a form that the template does not recognise.
pub(super) fn inline(message: &mut Json, sentinels: Sentinels) {
    let Some((reasoning, content)) = of(message) else { return };
    let angle = sentinels.angle();
    let text = format!(
        "{angle}think>\n{}\n{angle}/think>\n\n{}",
        reasoning.trim_matches('\n'),
        content.trim_start_matches('\n')
    );
    remove(message);
    message.set("content", Json::Str(text));
}

/// Reasoning and the rest of a reply.
fn of(message: &Json) -> Option<(String, String)> {
    let content = message.get("content").and_then(Json::as_str).unwrap_or_default();
    if let Some(Json::Str(reasoning)) = message.get(REASONING[0]) {
        return Some((reasoning.clone(), content.to_owned()));
    }
    let (before, after) = content.rsplit_once("</think>")?;
    let reasoning = before.split("<think>").last().unwrap_or(before);
    Some((reasoning.to_owned(), after.to_owned()))
}

fn remove(message: &mut Json) {
    for name in REASONING {
        message.remove(name);
    }
}

/// A part of a reply's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// What the user reads.
    Said,
    /// What comes before the last `</think>`.
    Thought,
    /// A think tag.
    Tag,
}

/// A reply's content, cut at its think tags where it has a closing one. The parts together are the content. `angle` is
/// what `inline` wrote for `<`, where it did.
pub(super) fn parts(content: &str, angle: Option<Sentinels>) -> Vec<(Part, &str)> {
    let hidden = angle.map(Sentinels::angle).filter(|&angle| content.contains(angle));
    match hidden {
        Some(angle) => cut(content, &format!("{angle}think>"), &format!("{angle}/think>")),
        None => cut(content, "<think>", "</think>"),
    }
}

fn cut<'a>(content: &'a str, open: &str, close: &str) -> Vec<(Part, &'a str)> {
    let Some(last) = content.rfind(close) else { return vec![(Part::Said, content)] };
    let (mut parts, mut rest, mut thinks) = (Vec::new(), &content[..last], false);
    loop {
        let next = [open, close].into_iter().filter_map(|tag| rest.find(tag).map(|at| (at, tag)));
        let Some((at, tag)) = next.min() else { break };
        // Text before the first opening tag is said; without one, all that the closing tag ends is thought.
        let part = if tag == open && !thinks { Part::Said } else { Part::Thought };
        parts.push((part, &rest[..at]));
        parts.push((Part::Tag, &rest[at..at + tag.len()]));
        rest = &rest[at + tag.len()..];
        thinks = true;
    }
    parts.push((Part::Thought, rest));
    let answer = last + close.len();
    parts.push((Part::Tag, &content[last..answer]));
    parts.push((Part::Said, &content[answer..]));
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_the_whole_content_and_name_what_is_said() {
        for (content, said) in [
            ("a", vec!["a"]),
            ("<think>r</think>a", vec!["", "a"]),
            ("r</think>a", vec!["a"]),
            ("b<think>r</think>s</think>a", vec!["b", "a"]),
            ("<think>a", vec!["<think>a"]),
            ("b<think>r<think>s</think>", vec!["b", ""]),
        ] {
            let parts = parts(content, None);
            assert_eq!(parts.iter().map(|part| part.1).collect::<String>(), content);
            let of_kind: Vec<&str> = parts.iter().filter(|part| part.0 == Part::Said).map(|part| part.1).collect();
            assert_eq!(of_kind, said, "{content}");
        }
    }
}
