//! What a stage holds of its neighbours' work, and how it goes from one to the other: the residual stream `[T, H]` at the border of
//! two stages, and its gradient. Of a model whose routers are balanced also the choices and probabilities of each expert, f32
//! `[2, experts]`, because the balance loss is one over all layers: forward those of the layers so far, back those of all.

use arl_model::Result;

use crate::backend::{Backend, Buffer, DType};
use crate::mesh::Axis;
use crate::model::Model;
use crate::placement::arena::{Arena, Category};
use crate::step::Step;

/// A residual stream, or its gradient, and what belongs to it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Border {
    /// `[T, H]`.
    pub(crate) stream: Buffer,
    /// f32 `[2, experts]`.
    pub(crate) balance: Option<Buffer>,
}

impl Border {
    fn take(arena: &mut Arena, model: &Model, tokens: usize) -> Self {
        let mut take = |dtype, len| arena.take(Category::Activations, dtype, len);
        Border {
            stream: take(model.dtype, tokens * model.shape.hidden),
            balance: model.shape.balance.map(|_| take(DType::F32, 2 * model.shape.experts)),
        }
    }

    /// Of a micro-batch whose streams have so many elements.
    fn of(self, len: usize) -> Self {
        Border { stream: self.stream.slice(0, len), ..self }
    }
}

/// What the stages around this one pass of one micro-batch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Passed {
    /// What the stage before has passed; the first stage has none.
    pub(crate) input: Option<Border>,
    /// What this stage passes on; then the gradient of that, which becomes the gradient of its input.
    pub(crate) link: Border,
}

/// The memory for what is passed.
#[derive(Clone, Debug)]
pub(crate) struct Passing {
    /// Inputs of the micro-batches that went forward and not yet backward, in turns; none of the first stage.
    inputs: Vec<Border>,
    link: Border,
}

impl Passing {
    /// For micro-batches of at most so many tokens.
    pub(crate) fn take(arena: &mut Arena, model: &Model, tokens: usize) -> Self {
        let (stages, stage) = (model.place.size(Axis::Pipeline), model.place.index(Axis::Pipeline));
        let held = if stage == 0 { 0 } else { stages - stage };
        Passing {
            inputs: (0..held).map(|_| Border::take(arena, model, tokens)).collect(),
            link: Border::take(arena, model, tokens),
        }
    }

    /// What is passed of the micro-batch of a round.
    pub(crate) fn of(&self, model: &Model, round: usize, tokens: usize) -> Passed {
        let len = tokens * model.shape.hidden;
        let input = (!self.inputs.is_empty()).then(|| self.inputs[round % self.inputs.len()].of(len));
        Passed { input, link: self.link.of(len) }
    }
}

impl<B: Backend + ?Sized> Step<'_, B> {
    /// Gives the stage of number `stage` one border and takes another from it, where there are any.
    pub(super) fn pass(&mut self, stage: usize, gives: Option<Border>, takes: Option<Border>) -> Result<()> {
        let parts = |border: Option<Border>| [border.map(|border| border.stream), border.and_then(|one| one.balance)];
        for (gives, takes) in parts(gives).into_iter().zip(parts(takes)) {
            let Some(any) = gives.or(takes) else { continue };
            let to_it = |buffer: Option<Buffer>| {
                let nothing = any.slice(0, 0);
                let mut of_stages = vec![nothing; self.model.place.size(Axis::Pipeline)];
                of_stages[stage] = buffer.unwrap_or(nothing);
                of_stages
            };
            let (sends, receives) = (to_it(gives), to_it(takes));
            self.context().exchange(Axis::Pipeline, &sends, &receives);
        }
        self.check_exchanges()
    }
}
