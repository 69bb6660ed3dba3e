//! Which replies are trained by the maps from message index to a value that AgentRL's rows have.

use super::message::{is_reply, role};
use super::record::{Reader, Talk};
use super::{Checked, Json, wrong_kind};
use crate::options::TextOptions;
use crate::problem::{Refusal, reason};

/// The options that decide which replies are trained.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct AdvantageFilter {
    minimal: Option<f64>,
    drop_zero: bool,
    skip_non_positive: bool,
}

impl From<&TextOptions> for AdvantageFilter {
    fn from(options: &TextOptions) -> Self {
        Self {
            minimal: options.minimal_advantage,
            drop_zero: options.drop_zero_advantage,
            skip_non_positive: options.skip_non_positive_advantage,
        }
    }
}

impl AdvantageFilter {
    fn removes(self, advantage: f64) -> bool {
        self.minimal.is_some_and(|minimal| advantage < minimal)
            || (self.drop_zero && advantage == 0.0)
            || (self.skip_non_positive && advantage <= 0.0)
    }
}

/// `advantages` names the replies to train; the other maps must at least name replies.
pub(super) fn apply(row: &mut Json, talk: &Talk, reader: &Reader, weights: &mut [f32]) -> Checked<()> {
    let mut chosen: Option<Vec<bool>> = None;
    for field in ["advantages", "scores", "created_at_step", "logprobs"] {
        let entries = match row.remove(reader.columns.of(field)) {
            None | Some(Json::Null) => continue,
            Some(Json::Object(entries)) => entries,
            other => return Err(wrong_kind(field, other.as_ref(), "a map from message index to a value")),
        };
        for (key, value) in &entries {
            let named = key.trim().parse::<usize>().ok().and_then(|index| talk.find(index));
            let Some(index) = named.filter(|&i| is_reply(&talk.messages[i])) else {
                let what = match named {
                    Some(i) => format!("is of role {}", role(&talk.messages[i])),
                    None => format!("does not exist: there are {}", talk.own_count()),
                };
                return Err(Refusal::new(
                    reason::BAD_INDEX,
                    format!("`{field}` names message {key}, which {what}; only replies of the assistant can be named"),
                ));
            };
            if field != "advantages" {
                continue;
            }
            let Some(advantage) = value.as_f64() else {
                return Err(wrong_kind(&format!("advantages[{key}]"), Some(value), "a number"));
            };
            let trained = !reader.advantage_filter.removes(advantage);
            chosen.get_or_insert_with(|| vec![false; weights.len()])[index] = trained;
        }
    }
    for (weight, chosen) in weights.iter_mut().zip(chosen.unwrap_or_default()) {
        if !chosen {
            *weight = 0.0;
        }
    }
    Ok(())
}
