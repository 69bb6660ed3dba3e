//! A micro-batch: what a caller hands in, what is demanded of it, and its way into the step's memory.

use std::ops::Range;

use arl_model::{Error, ErrorCode, Result};

use crate::backend::{Angles, Backend, Buffer, DType, Sequences};
use crate::placement::arena::{Arena, Category};
use crate::rotary::{Span, Tables};
use crate::token_slice::Slicing;
use crate::vision::{ImageInputs, Images, Tower};

/// Target of a position that is not trained.
pub const IGNORED: i32 = -100;

/// Sequences side by side, without padding.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MicroBatch {
    /// `[T]`: token ids.
    pub input_ids: Vec<i32>,
    /// `[T]`: already shifted: the logits at `t` are scored against `targets[t]`; [`IGNORED`]: not trained.
    pub targets: Vec<i32>,
    /// `[T]`: position of each token in its sequence, from 0. Or, for a model whose positions have three axes, `[3, T]`: time,
    /// height and width.
    pub positions: Vec<i32>,
    /// `[sequences + 1]`: sequence `s` is tokens `cu_seqlens[s] .. cu_seqlens[s + 1]`.
    pub cu_seqlens: Vec<i32>,
    /// `[T]`: weight of each target, finite and not negative; `None`: 1. A target of weight 0 is not trained.
    pub weights: Option<Vec<f32>>,
    /// Images, for a model that sees: each has as many tokens of its own, one behind the other, as it has merge blocks.
    pub images: Option<Images>,
}

/// How much a micro-batch has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BatchSize {
    /// Tokens, all sequences together.
    pub tokens: usize,
    /// Sequences.
    pub sequences: usize,
    /// Patches of all images together.
    pub patches: usize,
    /// Images.
    pub images: usize,
}

fn invalid(index: usize, what: impl std::fmt::Display) -> Error {
    Error::new(ErrorCode::Data, format!("micro-batch {index}: {what}"))
}

impl MicroBatch {
    /// Its size.
    pub fn size(&self) -> BatchSize {
        let grids = self.images.as_ref().map_or(0, |images| images.grids.len());
        BatchSize {
            tokens: self.input_ids.len(),
            sequences: self.cu_seqlens.len().saturating_sub(1),
            patches: self.images.as_ref().map_or(0, Images::patches),
            images: grids,
        }
    }

    /// Tokens of its longest sequence.
    pub(crate) fn max_len(&self) -> usize {
        self.cu_seqlens.windows(2).map(|sequence| (sequence[1] - sequence[0]) as usize).max().unwrap_or(0)
    }

    /// The weight of the target at `t`; 0 where it is not trained.
    pub fn weight(&self, t: usize) -> f32 {
        if self.targets[t] == IGNORED {
            return 0.0;
        }
        self.weights.as_ref().map_or(1.0, |w| w[t])
    }

    /// Checks that the lengths agree and that every value is in range, for a vocabulary, and positions of three `axes` or
    /// one; `index` names the micro-batch in errors.
    pub fn validate(&self, index: usize, vocab: usize, axes: bool) -> Result<()> {
        let tokens = self.input_ids.len();
        if tokens == 0 {
            return Err(invalid(index, "it has no tokens"));
        }
        let three = axes && self.positions.len() == 3 * tokens;
        let positions = if three { tokens } else { self.positions.len() };
        let lengths = [("targets", self.targets.len()), ("positions", positions)];
        let weights = self.weights.iter().map(|w| ("weights", w.len()));
        for (name, len) in lengths.into_iter().chain(weights) {
            if len != tokens {
                return Err(invalid(index, format_args!("{name} has {len} elements, input_ids has {tokens}")));
            }
        }
        if self.cu_seqlens.first() != Some(&0) || self.cu_seqlens.last().map(|&n| n as usize) != Some(tokens) {
            return Err(invalid(index, format_args!("cu_seqlens does not run from 0 to the {tokens} tokens")));
        }
        if let Some(pair) = self.cu_seqlens.windows(2).find(|pair| pair[0] >= pair[1]) {
            return Err(invalid(
                index,
                format_args!("cu_seqlens does not ascend: {} is followed by {}", pair[0], pair[1]),
            ));
        }
        for (t, &id) in self.input_ids.iter().enumerate() {
            if id < 0 || id as usize >= vocab {
                return Err(invalid(index, format_args!("token {t} has id {id}, the vocabulary has {vocab}"))
                    .hint("the tokenizer does not belong to this model, or its vocabulary was extended"));
            }
        }
        for (t, &target) in self.targets.iter().enumerate() {
            if target != IGNORED && (target < 0 || target as usize >= vocab) {
                return Err(invalid(index, format_args!("target {t} is {target}, the vocabulary has {vocab}")));
            }
        }
        if three && let Some(at) = self.positions.iter().position(|position| *position < 0) {
            return Err(invalid(index, format_args!("position {at} is {}", self.positions[at])));
        }
        for sequence in self.cu_seqlens.windows(2).filter(|_| !three) {
            let positions = &self.positions[sequence[0] as usize..sequence[1] as usize];
            if let Some(t) = (0..positions.len()).find(|&t| positions[t] as usize != t) {
                let token = sequence[0] as usize + t;
                return Err(invalid(
                    index,
                    format_args!("token {token} is at place {t} of its sequence, but its position is {}", positions[t]),
                ));
            }
        }
        if let Some(t) = self.weights.iter().flatten().position(|w| !w.is_finite() || *w < 0.0) {
            let weight = self.weights.as_ref().map_or(0.0, |w| w[t]);
            return Err(invalid(index, format_args!("weight {t} is {weight}; weights are finite and not negative")));
        }
        Ok(())
    }
}

impl MicroBatch {
    /// Positions on every axis of each token of a valid micro-batch, for each sequence.
    pub(crate) fn spans(&self) -> impl Iterator<Item = Span> + '_ {
        let tokens = self.input_ids.len();
        self.cu_seqlens.windows(2).map(move |sequence| {
            let (start, end) = (sequence[0] as usize, sequence[1] as usize);
            let axes = self.positions.chunks_exact(tokens).map(|axis| &axis[start..end]);
            // Those of one axis are 0 .. len.
            let last = if self.positions.len() == tokens { None } else { axes.flatten().max() };
            let positions = 0..last.map_or(end - start, |last| *last as usize + 1);
            Span { sequence_len: end - start, positions }
        })
    }

    /// Each token's row of the rotary embedding's tables, axis by axis; `offsets` are those of the sequences' spans.
    pub(crate) fn angle_rows(&self, offsets: &[isize], rows: &mut Vec<i32>) {
        rows.clear();
        for axis in self.positions.chunks_exact(self.input_ids.len()) {
            for (sequence, offset) in self.cu_seqlens.windows(2).zip(offsets) {
                let positions = &axis[sequence[0] as usize..sequence[1] as usize];
                rows.extend(positions.iter().map(|position| (*position as isize + offset) as i32));
            }
        }
    }

    /// Positions of all sequences of a valid micro-batch, or its tokens, where they are more: the size of the rotary
    /// embedding's tables.
    pub(crate) fn positions(&self) -> usize {
        self.spans().map(|span| span.positions.end).sum::<usize>().max(self.input_ids.len())
    }
}

/// The micro-batch of which an [`Inputs`] is this rank's slice.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shared {
    /// Tokens that the ranks along [`Axis::Tensor`](crate::mesh::Axis) have together.
    pub(crate) tensor_tokens: usize,
    /// Of those tokens.
    pub(crate) angles: Angles,
    /// Tokens of the whole micro-batch, which the ranks along [`Axis::Tokens`](crate::mesh::Axis) have together.
    pub(crate) tokens: usize,
    /// Without those that fill the last slices up, which are behind them.
    pub(crate) counted: usize,
    /// Those of the whole micro-batch.
    pub(crate) sequences: Sequences,
}

/// A micro-batch, or this rank's slice of one, in the step's memory. `R` is the number of positions that have a target.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Inputs {
    pub(crate) size: BatchSize,
    /// Tokens without those that fill a slice up, which are behind them.
    pub(crate) counted: usize,
    /// `R`.
    pub(crate) target_rows: usize,
    /// Those of the whole micro-batch.
    pub(crate) sequences: Sequences,
    /// i32 `[T]`.
    pub(crate) ids: Buffer,
    pub(crate) angles: Angles,
    /// What ranks of which each has a slice of the micro-batch have together; without slices the same as above.
    pub(crate) shared: Shared,
    /// i32 `[R]`: the positions that have a target, ascending.
    pub(crate) rows: Buffer,
    /// i32 `[R]`.
    pub(crate) targets: Buffer,
    /// f32 `[R]`.
    pub(crate) weights: Buffer,
    /// f32 `[R]`: ones, to sum with.
    pub(crate) ones: Buffer,
    /// f32 `[R]` each: what the classifier pass finds for every target.
    pub(crate) nll: Buffer,
    pub(crate) correct: Buffer,
    pub(crate) entropy: Buffer,
    /// Of a micro-batch that has any.
    pub(crate) images: Option<ImageInputs>,
}

impl Inputs {
    /// Takes the memory for a micro-batch of `size` of which `target_rows` positions have a target, whose tokens are rotated
    /// by angles of `tables`.
    pub(crate) fn take(
        arena: &mut Arena,
        tower: Option<&Tower>,
        size: BatchSize,
        target_rows: usize,
        max_len: usize,
        tables: Tables,
    ) -> Self {
        Inputs::take_slice(arena, tower, (size, Slicing::WHOLE), target_rows, max_len, tables)
    }

    /// As [`Inputs::take`], for one slice of a micro-batch of `size`.
    pub(crate) fn take_slice(
        arena: &mut Arena,
        tower: Option<&Tower>,
        (size, slicing): (BatchSize, Slicing),
        target_rows: usize,
        max_len: usize,
        tables: Tables,
    ) -> Self {
        let images = tower.and_then(|tower| ImageInputs::take(arena, tower, size, slicing));
        let mut take = |dtype, len| arena.take(Category::Inputs, dtype, len);
        let (t, r) = (slicing.own(size.tokens), target_rows);
        let (tensor_tokens, tokens) = slicing.shared(size.tokens);
        let count = size.sequences + usize::from(tokens > size.tokens);
        // One more may fill the slices up, of some micro-batches of no more tokens and sequences than these.
        let room = size.sequences + 1 + usize::from(slicing.divides());
        let cu_seqlens = take(DType::I32, room).slice(0, count + 1);
        let sequences = Sequences { cu_seqlens, count, max_len };
        let ids = take(DType::I32, t);
        let mut angles = |tokens: usize| tables.with_rows(take(DType::I32, tables.rows_a_token() * tokens));
        let shared = Shared { tensor_tokens, angles: angles(tensor_tokens), tokens, counted: size.tokens, sequences };
        Inputs {
            size: BatchSize { tokens: t, ..size },
            counted: t,
            target_rows,
            sequences,
            ids,
            angles: if tensor_tokens == t { shared.angles } else { angles(t) },
            shared,
            rows: take(DType::I32, r),
            targets: take(DType::I32, r),
            weights: take(DType::F32, r),
            ones: take(DType::F32, r),
            nll: take(DType::F32, r),
            correct: take(DType::F32, r),
            entropy: take(DType::F32, r),
            images,
        }
    }

    /// Whether other ranks have other tokens of the micro-batch.
    pub(crate) fn is_slice(&self) -> bool {
        self.shared.tokens > self.size.tokens
    }

    /// Sequences of the whole micro-batch, with one that fills slices up even where it has none: another one of its size may.
    pub(crate) fn most_sequences(&self) -> usize {
        let Shared { tokens, counted, sequences, .. } = self.shared;
        sequences.count + usize::from(self.is_slice() && tokens == counted)
    }

    /// Uploads the images of a valid micro-batch, of whose tokens this rank has `own`.
    pub(crate) fn upload_images<B: Backend + ?Sized>(
        &mut self,
        backend: &mut B,
        batch: &MicroBatch,
        tower: Option<&Tower>,
        own: &Range<usize>,
    ) {
        let images = batch.images.as_ref().zip(self.images.as_mut());
        if let (Some((images, place)), Some(tower)) = (images, tower) {
            place.upload(backend, tower, images, &batch.image_tokens(tower.config.image_token_id), own);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch() -> MicroBatch {
        MicroBatch {
            input_ids: vec![1, 2, 3, 4, 5],
            targets: vec![2, IGNORED, 4, 5, IGNORED],
            positions: vec![0, 1, 0, 1, 2],
            cu_seqlens: vec![0, 2, 5],
            weights: Some(vec![1.0, 1.0, 0.5, 0.0, 2.0]),
            images: None,
        }
    }

    #[test]
    fn a_valid_batch_passes_and_weights_follow_targets() {
        let batch = batch();
        batch.validate(0, 6, false).unwrap();
        let weights: Vec<f32> = (0..5).map(|t| batch.weight(t)).collect();
        assert_eq!(weights, [1.0, 0.0, 0.5, 0.0, 0.0]);
    }

    #[test]
    fn positions_of_three_axes_are_for_models_that_have_them() {
        let three = MicroBatch { positions: vec![0, 1, 5, 5, 7, 0, 1, 5, 6, 7, 0, 1, 5, 5, 8], ..batch() };
        three.validate(0, 6, true).unwrap();
        let span = |sequence_len, end| Span { sequence_len, positions: 0..end };
        assert_eq!(three.spans().collect::<Vec<_>>(), [span(2, 2), span(3, 9)]);
        assert_eq!(three.positions(), 11);
        assert_eq!(batch().spans().collect::<Vec<_>>(), [span(2, 2), span(3, 3)]);
        assert_eq!(batch().positions(), 5);
        batch().validate(0, 6, true).unwrap();
        let message = |batch: &MicroBatch, axes| batch.validate(0, 6, axes).unwrap_err().message;
        assert!(message(&three, false).contains("positions has 15 elements"));
        let negative = MicroBatch { positions: vec![-1; 15], ..batch() };
        assert!(message(&negative, true).contains("position 0 is -1"));
    }

    #[test]
    fn every_defect_is_named() {
        type Damage = fn(&mut MicroBatch);
        let cases: [(Damage, &str); 11] = [
            (|b| b.targets.truncate(4), "targets has 4 elements, input_ids has 5"),
            (|b| b.positions.push(0), "positions has 6 elements"),
            (|b| b.weights = Some(vec![1.0]), "weights has 1 elements"),
            (|b| b.cu_seqlens = vec![0, 2, 4], "does not run from 0 to the 5 tokens"),
            (|b| b.cu_seqlens = vec![], "does not run from 0"),
            (|b| b.cu_seqlens = vec![0, 2, 2, 5], "2 is followed by 2"),
            (|b| b.input_ids[3] = 6, "token 3 has id 6"),
            (|b| b.targets[0] = -1, "target 0 is -1"),
            (|b| b.positions[2] = 2, "token 2 is at place 0"),
            (|b| b.weights = Some(vec![1.0, 1.0, f32::NAN, 1.0, 1.0]), "weight 2 is NaN"),
            (|b| *b = MicroBatch::default(), "no tokens"),
        ];
        for (damage, message) in cases {
            let mut batch = batch();
            damage(&mut batch);
            let error = batch.validate(7, 6, false).unwrap_err();
            assert_eq!(error.code, ErrorCode::Data);
            assert!(
                error.message.starts_with("micro-batch 7: ") && error.message.contains(message),
                "{}",
                error.message
            );
        }
    }
}
