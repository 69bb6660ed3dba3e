//! Which samples share a micro-batch.

use std::collections::BTreeSet;

use arl_model::{Error, ErrorCode, Result};

/// Groups of positions into `lengths` whose tokens together are at most `max_tokens`: best fit, longest first.
/// Positions rise within a group, groups rise by their first; the same input always gives the same groups.
///
/// # Errors
/// `ARL_DATA` names a sample that is longer than `max_tokens`, or that has no tokens.
pub fn pack(lengths: &[u32], max_tokens: usize) -> Result<Vec<Vec<u32>>> {
    for (i, &length) in lengths.iter().enumerate() {
        if length as usize > max_tokens {
            return Err(Error::new(
                ErrorCode::Data,
                format!("sample {i} has {length} tokens; a micro-batch may have {max_tokens}"),
            )
            .hint("raise max_tokens_per_micro_batch, or set max_length and truncation"));
        }
        if length == 0 {
            return Err(Error::new(ErrorCode::Data, format!("sample {i} has no tokens")));
        }
    }
    let mut order: Vec<u32> = (0..lengths.len() as u32).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(lengths[i as usize]), i));
    let mut groups: Vec<Vec<u32>> = Vec::new();
    // (room left, group): the first with enough room is the best fit.
    let mut room: BTreeSet<(usize, usize)> = BTreeSet::new();
    for i in order {
        let length = lengths[i as usize] as usize;
        let (left, group) = match room.range((length, 0)..).next().copied() {
            Some(place) => {
                room.remove(&place);
                place
            }
            None => {
                groups.push(Vec::new());
                (max_tokens, groups.len() - 1)
            }
        };
        groups[group].push(i);
        if left > length {
            room.insert((left - length, group));
        }
    }
    groups.iter_mut().for_each(|group| group.sort_unstable());
    groups.sort_unstable_by_key(|group| group.first().copied());
    Ok(groups)
}
