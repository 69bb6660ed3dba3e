//! The tower's walk, forward and back, as a part of a micro-batch's step. Its stream is kept before every block that the
//! backward pass enters; what else of a block is kept depends on the level of recomputation, as in the decoder.

use arl_model::Result;
use half::{bf16, f16};

use super::inputs::ImageInputs;
use super::merger::Merger;
use super::{Tower, block, merger};
use crate::backend::{Backend, Buffer, DType};
use crate::batch::{Inputs, MicroBatch};
use crate::blocks::Run;
use crate::options::Recompute;
use crate::placement::arena::{Category, higher};
use crate::step::Step;

/// What the tower leaves of a micro-batch, in memory that lasts as long.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seen {
    /// `[1 + DeepStack mergers, M, H]`: what the mergers give; in the backward pass the gradients of that.
    features: Buffer,
    /// `[streams, N, vision hidden]`: the stream before the blocks that the backward pass enters, and after the last one.
    streams: Buffer,
}

impl Seen {
    /// The rows `[M, H]` of merger `number`: 0 the merger, then those of DeepStack.
    pub(crate) fn features(&self, images: &ImageInputs, number: usize, hidden: usize) -> Buffer {
        let len = images.tokens * hidden;
        self.features.slice(number * len, len)
    }
}

/// The parts' buffers: of blocks; of the merger and DeepStack's.
struct Parts {
    blocks: Vec<block::Buffers>,
    mergers: Vec<merger::Buffers>,
}

/// Takes a buffer: the number of its part, the stream that this reads, the last level at which it is kept, type and length.
type TakeOf<'a> = dyn FnMut(usize, usize, Recompute, DType, usize) -> Buffer + 'a;

impl Tower {
    /// The first stream that is kept: block `s` reads stream `s`, and the merger the last one.
    fn first_kept(&self) -> usize {
        self.lowest.map_or(self.blocks.len() + 1, |lowest| lowest.saturating_sub(1))
    }

    /// Streams that are kept.
    fn kept_streams(&self) -> usize {
        self.blocks.len() + 1 - self.first_kept()
    }

    /// The mergers: the merger itself, then those of DeepStack, each with the stream that it reads.
    fn mergers(&self) -> impl Iterator<Item = (usize, &Merger)> {
        let deepstack = self.deepstack.iter().map(|(after, merger)| (after + 1, merger));
        std::iter::once((self.blocks.len(), &self.merger)).chain(deepstack)
    }

    /// The buffers of all parts.
    fn parts(&self, images: &ImageInputs, dtype: DType, take: &mut TakeOf<'_>) -> Parts {
        let depth = self.blocks.len();
        let blocks = self.blocks.iter().enumerate().map(|(b, block)| {
            block.buffers(dtype, images.patches, &mut |level, dtype, len| take(b, b, level, dtype, len))
        });
        let blocks = blocks.collect();
        let mergers = self.mergers().enumerate().map(|(i, (stream, merger))| {
            merger.buffers(dtype, images.tokens, &mut |level, dtype, len| take(depth + i, stream, level, dtype, len))
        });
        Parts { blocks, mergers: mergers.collect() }
    }

    /// Whether a part that reads `stream` keeps for the backward pass what is last kept at `level`.
    fn keeps(&self, keep: Option<Recompute>, stream: usize, level: Recompute) -> bool {
        stream >= self.first_kept() && keep.is_some_and(|keep| keep <= level)
    }
}

impl<'a, B: Backend + ?Sized> Step<'a, B> {
    /// The tower, and the images of a micro-batch that has any.
    fn seeing(&self, run: &Run) -> Option<(&'a Tower, ImageInputs, Seen)> {
        Some((self.model.tower.as_ref()?, run.inputs.images?, run.seen?))
    }

    /// Takes the memory of what the tower leaves of a micro-batch that has images.
    pub(crate) fn begin_seeing(&mut self, inputs: &Inputs, keep: Option<Recompute>) -> Option<Seen> {
        self.stages.seen.clear();
        let model = self.model;
        let (tower, images) = (model.tower.as_ref()?, inputs.images?);
        let streams = keep.map_or(0, |_| tower.kept_streams()) * images.patches * tower.config.hidden_size;
        let features = (1 + tower.deepstack.len()) * images.tokens * model.shape.hidden;
        let seen = Seen {
            features: self.take(Category::Activations, model.dtype, features),
            streams: self.take(Category::Activations, model.dtype, streams),
        };
        let mut kept = Vec::new();
        tower.parts(&images, model.dtype, &mut |_, stream, level, dtype, len| {
            if tower.keeps(keep, stream, level) {
                kept.push(self.take(Category::Activations, dtype, len));
            }
            seen.features.slice(0, 0)
        });
        self.stages.seen = kept;
        Some(seen)
    }

    /// The buffers of all parts: those that are kept, and scratch that all parts share, on top of the stack.
    fn seeing_parts(&mut self, tower: &Tower, images: &ImageInputs, keep: Option<Recompute>) -> Parts {
        let kept = std::mem::take(&mut self.stages.seen);
        let base = self.arena.mark();
        let (mut top, mut at, mut next) = (base, 0, 0);
        let parts = tower.parts(images, self.model.dtype, &mut |part, stream, level, dtype, len| {
            if part != at {
                (at, top) = (part, higher(top, self.arena.mark()));
                self.arena.release(base);
            }
            if !tower.keeps(keep, stream, level) {
                return self.take(Category::Workspace, dtype, len);
            }
            next += 1;
            kept[next - 1]
        });
        let top = higher(top, self.arena.mark());
        self.arena.release(top);
        self.stages.seen = kept;
        parts
    }

    /// From the pixels to the rows that take the place of the image tokens' embeddings, and to DeepStack's.
    pub(crate) fn see(&mut self, run: &Run) -> Result<()> {
        self.need_tower(run)?;
        let Some((tower, images, seen)) = self.seeing(run) else { return Ok(()) };
        self.update_to(tower.end);
        let bottom = self.arena.mark();
        let len = images.patches * tower.config.hidden_size;
        let passing = self.take(Category::Workspace, self.model.dtype, len);
        let parts = self.seeing_parts(tower, &images, run.keep);
        let stream = |s: usize| match s.checked_sub(tower.first_kept()) {
            Some(kept) if run.keep.is_some() => seen.streams.slice(kept * len, len),
            _ => passing,
        };
        tower.embed.forward(&mut self.context(), &images, stream(0));
        for (b, (block, at)) in tower.blocks.iter().zip(&parts.blocks).enumerate() {
            self.check_interrupt()?;
            block.forward(&mut self.context(), at, &images, stream(b), stream(b + 1));
            for (number, (read, merger)) in tower.mergers().enumerate().filter(|(_, (read, _))| *read == b + 1) {
                let out = seen.features(&images, number, self.model.shape.hidden);
                merger.forward(&mut self.context(), &parts.mergers[number], stream(read), out, images.tokens);
            }
        }
        self.arena.release(bottom);
        Ok(())
    }

    /// What the mergers gave of a micro-batch's images, in the order of the images.
    pub(crate) fn read_features(&mut self, run: &Run, batch: &MicroBatch) -> Result<Vec<Vec<f32>>> {
        let Some((tower, images, seen)) = self.seeing(run) else { return Ok(Vec::new()) };
        let (h, grids) = (self.model.shape.hidden, batch.images.as_ref().map_or(&[][..], |images| &images.grids));
        let order = tower.geometry.places(grids).order;
        let mut all = Vec::new();
        for number in 0..=tower.deepstack.len() {
            let features = seen.features(&images, number, h);
            let mut bytes = vec![0; features.bytes()];
            self.backend.read_back(features, &mut bytes)?;
            let host: Vec<f32> = match features.dtype {
                DType::F32 => bytes.chunks_exact(4).map(bytemuck::pod_read_unaligned).collect(),
                DType::F16 => {
                    bytes.chunks_exact(2).map(|two| bytemuck::pod_read_unaligned::<f16>(two).to_f32()).collect()
                }
                _ => bytes.chunks_exact(2).map(|two| bytemuck::pod_read_unaligned::<bf16>(two).to_f32()).collect(),
            };
            let mut rows = vec![0f32; host.len()];
            for (row, &block) in host.chunks_exact(h).zip(&order) {
                rows[block * h..(block + 1) * h].copy_from_slice(row);
            }
            all.push(rows);
        }
        Ok(all)
    }

    /// The merger's rows take the place of the embeddings `x` `[T, H]` of the image tokens.
    pub(crate) fn embed_images(&mut self, run: &Run, x: Buffer) {
        let Some((_, images, seen)) = self.seeing(run) else { return };
        let (top, h) = (self.arena.mark(), self.model.shape.hidden);
        let own = self.own_rows(&images, seen.features(&images, 0, h));
        self.backend.scatter_rows(own, images.rows, h, x);
        self.arena.release(top);
    }

    /// Those of a merger's rows that this rank has the tokens of.
    fn own_rows(&mut self, images: &ImageInputs, features: Buffer) -> Buffer {
        let (Some(picks), h) = (images.picks, self.model.shape.hidden) else { return features };
        let own = self.take(Category::Workspace, features.dtype, picks.len * h);
        self.backend.gather_rows(features, picks, 1, h, own);
        own
    }

    /// From the gradient `d_x` `[T, H]` of the stream to that of a merger's rows. Other ranks have that of the rest: what the tower makes
    /// of all of them is the sum of what it makes of each.
    fn own_rows_backward(&mut self, images: &ImageInputs, d_x: Buffer, d_features: Buffer) {
        let h = self.model.shape.hidden;
        let Some(picks) = images.picks else { return self.backend.gather_rows(d_x, images.rows, 1, h, d_features) };
        let top = self.arena.mark();
        let own = self.take(Category::Workspace, d_features.dtype, picks.len * h);
        self.backend.gather_rows(d_x, images.rows, 1, h, own);
        self.backend.zero(d_features);
        self.backend.scatter_rows(own, picks, h, d_features);
        self.arena.release(top);
    }

    /// Adds DeepStack's rows to `delta` `[T, H]`, what the last block of layer `l` adds to the residual stream.
    pub(crate) fn add_seen(&mut self, l: usize, run: &Run, delta: Buffer) {
        let Some((tower, images, seen)) = self.seeing(run) else { return };
        if l < tower.deepstack.len() {
            let (top, h) = (self.arena.mark(), self.model.shape.hidden);
            let own = self.own_rows(&images, seen.features(&images, 1 + l, h));
            self.backend.add_rows(own, images.rows, h, delta);
            self.arena.release(top);
        }
    }

    /// From the gradient `d_x` `[T, H]` of the residual stream after layer `l` to that of the rows that were added there.
    pub(crate) fn add_seen_backward(&mut self, l: usize, run: &Run, d_x: Buffer) {
        let Some((tower, images, seen)) = self.seeing(run).filter(|(tower, ..)| tower.is_trained()) else { return };
        let h = self.model.shape.hidden;
        if l < tower.deepstack.len() {
            self.own_rows_backward(&images, d_x, seen.features(&images, 1 + l, h));
        }
    }

    /// From the gradient `d_x` `[T, H]` of the decoder's input to that of the merger's rows; the look-up of the tokens that they
    /// replaced gets none.
    pub(crate) fn embed_images_backward(&mut self, run: &Run, d_x: Buffer) {
        let Some((tower, images, seen)) = self.seeing(run) else { return };
        let h = self.model.shape.hidden;
        if tower.is_trained() {
            self.own_rows_backward(&images, d_x, seen.features(&images, 0, h));
        }
        self.backend.zero_rows(images.rows, h, d_x);
    }

    /// From the gradients of the mergers' rows to those of the tower's parameters, down to the lowest part that is trained.
    pub(crate) fn see_backward(&mut self, run: &Run) -> Result<()> {
        if self.model.tower.as_ref().is_none_or(|tower| !tower.is_trained()) {
            return Ok(());
        }
        self.need_tower(run)?;
        let Some((tower, images, seen)) = self.seeing(run) else { return Ok(()) };
        let bottom = self.arena.mark();
        let (first, depth, level) = (tower.first_kept(), tower.blocks.len(), self.model.recompute);
        let len = images.patches * tower.config.hidden_size;
        let d_x = self.take(Category::Workspace, self.model.dtype, len);
        let parts = self.seeing_parts(tower, &images, run.keep);
        let stream = |s: usize| seen.streams.slice((s - first) * len, len);
        self.backend.zero(d_x);
        for s in (first..=depth).rev() {
            self.check_interrupt()?;
            // Below the first stream that is kept nothing is trained.
            let d_stream = (s > first).then_some(d_x);
            for (number, (_, merger)) in tower.mergers().enumerate().filter(|(_, (read, _))| *read == s) {
                let (at, d_out) = (&parts.mergers[number], seen.features(&images, number, self.model.shape.hidden));
                let cx = &mut self.context();
                merger.recompute(cx, at, stream(s), images.tokens, level);
                merger.backward(cx, at, stream(s), d_out, d_stream, images.tokens);
            }
            if s > first {
                let (block, at, x) = (&tower.blocks[s - 1], &parts.blocks[s - 1], stream(s - 1));
                let cx = &mut self.context();
                block.recompute(cx, at, &images, x, level);
                block.backward(cx, at, &images, x, d_x);
            }
        }
        if tower.lowest == Some(0) {
            tower.embed.backward(&mut self.context(), &images, d_x);
        }
        self.arena.release(bottom);
        Ok(())
    }
}
