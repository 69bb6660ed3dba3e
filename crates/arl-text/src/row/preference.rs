//! Rows of preference data: two answers to one prompt, or an answer with a verdict. One side of a pair can be trained where
//! the caller says so; an answer that is not wanted never is.

use super::message::is_reply;
use super::shape::{Columns, PROMPTS};
use super::{Checked, Json, is_nothing};
use crate::problem::{Refusal, reason};

/// The sides of a pair: TRL's and LLaMA-Factory's names, and those of LLaMA-Factory's v1 rows.
const PAIRS: [(&str, &str); 2] = [("chosen", "rejected"), ("chosen_messages", "rejected_messages")];

/// What a row of two answers is and what to do with it; nothing where it is none.
pub(super) fn of_pair(row: &Json, columns: &Columns) -> Option<Refusal> {
    let has = |name: &str| row.get(name).filter(|value| !is_nothing(value));
    let (chosen, rejected) = PAIRS.iter().find(|(_, rejected)| has(rejected).is_some())?;
    let known = ["messages", "conversations"].map(|name| columns.of(name));
    let prompt = known.into_iter().chain(PROMPTS).find(|name| has(name).is_some());
    let flag = match (has(chosen)?, prompt) {
        (Json::Array(messages), _) if messages.iter().any(|message| !is_answer(message)) => {
            let turns = messages.iter().any(|message| message.get("from").is_some());
            format!("{}={chosen}", if turns { "conversations" } else { "messages" })
        }
        (_, Some(prompt)) if PROMPTS.contains(&prompt) => format!("completion={chosen}"),
        (_, Some(prompt)) => format!("prompt={prompt} completion={chosen}"),
        (Json::Str(_), None) => format!("text={chosen}"),
        (_, None) => format!("messages={chosen}"),
    };
    Some(Refusal::new(
        reason::PREFERENCE,
        format!(
            "a preference row: `{chosen}` and `{rejected}` are two answers, and one is trained at most; \
             --columns {flag} trains `{chosen}` and does not read `{rejected}`"
        ),
    ))
}

/// A message of the assistant, in either spelling.
fn is_answer(message: &Json) -> bool {
    let from = message.get("from").and_then(Json::as_str);
    is_reply(message) || matches!(from, Some("gpt" | "assistant" | "function_call"))
}

/// Takes the verdicts of TRL's and LLaMA-Factory's KTO rows out of a row: an answer that is not wanted is not trained.
pub(super) fn check_verdict(row: &mut Json) -> Checked<()> {
    for name in ["label", "kto_tag"] {
        match row.get(name) {
            Some(Json::Bool(true)) => drop(row.remove(name)),
            Some(Json::Bool(false)) => {
                return Err(Refusal::new(
                    reason::PREFERENCE,
                    format!(
                        "`{name}` is false: an answer that is not wanted, as KTO's rows have it; leave such rows out with \
                         --on_bad_row skip, or the column where it means something else"
                    ),
                ));
            }
            _ => {}
        }
    }
    Ok(())
}
