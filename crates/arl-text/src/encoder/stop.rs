//! The tokens that end a reply, and replies that are nothing but those.

use crate::row::{Reader, Row, Shape};

use super::{Encoded, Span, TextEncoder};

/// A reply with more tokens than this has text: the token that ends it, empty think tags and line breaks are fewer.
const FEW: usize = 24;

/// What templates write where a reply has no reasoning and no text.
const BLANKS: [&str; 5] = ["<think>\n\n</think>\n\n", "<think>\n</think>\n", "<think></think>", "\n", " "];

impl TextEncoder {
    /// What the templates write at the end of a reply, and what the tokenizer says ends a text.
    pub(super) fn find_stop_ids(&self) -> Vec<u32> {
        let talk = r#""messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]"#;
        let mut stop = Vec::new();
        // With tools, `tool_use` renders the row where there is such a template.
        for row in [format!("{{{talk}}}"), format!("{{{talk},\"tools\":[]}}")] {
            if let Ok(Row::Chat(record)) = Reader::default().read(row.as_bytes(), Some(&Shape::Messages))
                && let Ok(sample) = self.chat(record, &[])
            {
                // The reply's last special token; what may follow it is a newline.
                let special = |id: &&u32| self.decode(&[**id], true).is_ok_and(|text| text.is_empty());
                let span = sample.spans.last().map_or(0..0, |span| span.first..span.last + 1);
                stop.extend(sample.ids[span].iter().rev().find(special));
            }
        }
        stop.extend(self.eos.as_ref().map(|(_, eos)| *eos));
        let mut seen = Vec::new();
        stop.retain(|id| {
            !seen.contains(id) && {
                seen.push(*id);
                true
            }
        });
        stop
    }

    /// The tokens of `BLANKS`: a reply with any other token has text.
    pub(super) fn find_blank_ids(&self) -> Vec<u32> {
        let mut ids = Vec::new();
        // A text that the tokenizer refuses has no tokens.
        let _ = BLANKS.iter().try_for_each(|text| self.append(text, false, &mut ids));
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    /// How many replies have nothing that is trained but the token that ends them, with what the template writes where
    /// there is no reasoning.
    pub(super) fn replies_without_text(&self, encoded: &Encoded) -> u32 {
        let of_one_message = encoded.spans.chunk_by(|one, next| one.message == next.message);
        of_one_message.filter(|spans| self.is_only_end(encoded, spans)).count() as u32
    }

    fn is_only_end(&self, encoded: &Encoded, spans: &[Span]) -> bool {
        // The first token of a sample is no target: nothing predicts it.
        let trained = spans.iter().flat_map(|span| span.first.max(1)..=span.last);
        let ids: Vec<u32> = trained.take(FEW + 1).map(|i| encoded.ids[i]).collect();
        let ends = |id: &u32| self.info.stop_ids.contains(id);
        let may_be_blank = |id: &u32| ends(id) || self.blank_ids.binary_search(id).is_ok();
        if ids.len() > FEW || !ids.iter().all(may_be_blank) || !ids.iter().any(ends) {
            return false;
        }
        let text: Vec<u32> = ids.into_iter().filter(|id| !ends(id)).collect();
        let is_blank = |text: String| text.replace("<think>", "").replace("</think>", "").trim().is_empty();
        text.is_empty() || self.decode(&text, false).is_ok_and(is_blank)
    }
}
