//! One row as the model sees it: ids, weights, trained replies; and cutting it to a length.

use std::ops::Range;

use crate::note::{NoteKind, Notes};
use crate::problem::{Refusal, reason};

use super::images::SampleImage;

/// Tokens of equal weight side by side.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Run {
    /// Tokens.
    pub length: u32,
    /// Weight of each as a target; 0 where it is not trained.
    pub weight: f32,
}

/// A trained reply: `ids[first..=last]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Index of its message.
    pub message: usize,
    /// First token.
    pub first: usize,
    /// Last token, in the span itself.
    pub last: usize,
}

/// One row as the model sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct Encoded {
    /// The rendered text; before truncation. Empty for rows that came as tokens.
    pub text: String,
    /// Token ids.
    pub ids: Vec<u32>,
    /// The weights of all tokens; the lengths add up to `ids.len()`.
    pub runs: Vec<Run>,
    /// The trained replies, in order; one that was cut in two by truncation is shorter.
    pub spans: Vec<Span>,
    /// The images, in order; of those that truncation cut off nothing is left.
    pub images: Vec<SampleImage>,
    /// The row's own name.
    pub record_id: Option<String>,
    /// Something was cut off.
    pub truncated: bool,
    /// What a user should know of the row all the same.
    pub notes: Notes,
}

impl Encoded {
    /// Tokens that are scored: trained, and with one before them.
    pub fn target_tokens(&self) -> usize {
        targets_in(&self.runs)
    }

    /// The weight of each token, one by one.
    pub fn weights(&self) -> Vec<f32> {
        self.runs.iter().flat_map(|run| std::iter::repeat_n(run.weight, run.length as usize)).collect()
    }
}

/// What became of a row.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// A sample.
    Sample(Encoded),
    /// Left out because it is longer than `max_length`, as `truncation: drop` asks; with its tokens.
    Dropped(usize),
}

/// Adds tokens of one weight.
pub(super) fn push_run(runs: &mut Vec<Run>, length: usize, weight: f32) {
    match runs.last_mut() {
        _ if length == 0 => {}
        Some(run) if run.weight == weight => run.length += length as u32,
        _ => runs.push(Run { length: length as u32, weight }),
    }
}

/// Adds tokens of one weight; those of images are no targets.
pub(super) fn push_tokens(runs: &mut Vec<Run>, tokens: Range<usize>, weight: f32, images: &[SampleImage]) {
    let mut at = tokens.start;
    for image in images.iter().filter(|image| tokens.contains(&image.first)) {
        push_run(runs, image.first - at, weight);
        push_run(runs, image.count, 0.0);
        at = image.first + image.count;
    }
    push_run(runs, tokens.end - at, weight);
}

/// Targets of a sample: trained tokens but the first, which nothing predicts.
pub(crate) fn targets_in(runs: &[Run]) -> usize {
    let trained: usize = runs.iter().filter(|run| run.weight > 0.0).map(|run| run.length as usize).sum();
    trained - usize::from(runs.first().is_some_and(|run| run.weight > 0.0))
}

/// Keeps the tokens `start..end`.
///
/// # Errors
/// Where that cuts through an image.
pub(super) fn cut(encoded: &mut Encoded, start: usize, end: usize) -> Result<(), Refusal> {
    let length = encoded.ids.len();
    let mut images = Vec::new();
    for image in &encoded.images {
        let behind = image.first + image.count;
        if image.first >= start && behind <= end {
            images.push(SampleImage { first: image.first - start, ..*image });
        } else if image.first < end && behind > start {
            return Err(Refusal::new(
                reason::CUT_IMAGE,
                format!(
                    "cutting {length} tokens to {} cuts through image {} of the row, which has {} tokens",
                    end - start,
                    image.place,
                    image.count
                ),
            ));
        }
    }
    encoded.notes.add(NoteKind::CutImages, "", (encoded.images.len() - images.len()) as u32);
    encoded.images = images;
    encoded.ids = encoded.ids[start..end].to_vec();
    let mut runs = Vec::new();
    let mut at = 0;
    for run in &encoded.runs {
        let next = at + run.length as usize;
        push_run(&mut runs, next.min(end).saturating_sub(at.max(start)), run.weight);
        at = next;
    }
    encoded.runs = runs;
    encoded.spans = encoded
        .spans
        .iter()
        .filter(|span| span.last >= start && span.first < end)
        .map(|span| Span {
            message: span.message,
            first: span.first.max(start) - start,
            last: span.last.min(end - 1) - start,
        })
        .collect();
    encoded.truncated = true;
    Ok(())
}
