//! What blocks exchange with other ranks between their products: tokens for heads or columns, sums of partial products, rows for
//! experts. All ranks of an axis call the same in the same order. A failure is kept until the step asks for it
//! ([`Step::check_exchanges`](crate::step::Step)), and what follows it exchanges nothing.

use arl_model::Result;

use super::Ranks;
use crate::backend::comm::EXCHANGED;
use crate::backend::{Backend, Buffer, DType};
use crate::blocks::Context;
use crate::mesh::Axis;

impl<B: Backend + ?Sized> Context<'_, B> {
    /// Ranks along an axis, and the place of this one.
    pub(crate) fn along(&self, axis: Axis) -> (usize, usize) {
        (self.place.size(axis), self.place.index(axis))
    }

    /// `all` becomes the `own` of every rank along an axis, in their order; all are equally long.
    pub(crate) fn all_gather(&mut self, axis: Axis, own: Buffer, all: Buffer) {
        let others = self.place.size(axis) - 1;
        self.exchanging(others * own.bytes(), |backend, ranks| backend.gather(&ranks.part_of(axis)?, own, all));
    }

    /// `sum`, f32, becomes the sum over the ranks along an axis, in their order, of what each has for this one: `partial`, f32, has
    /// this rank's for all of them, one behind the other.
    pub(crate) fn sum_scattered(&mut self, axis: Axis, partial: Buffer, sum: Buffer) {
        self.backend.zero(sum);
        let others = self.place.size(axis) - 1;
        self.exchanging(others * sum.bytes(), |backend, ranks| ranks.sum_along(backend, axis, partial, sum));
    }

    /// `values`, f32, become their sums over the ranks along an axis, in the order of these.
    pub(crate) fn sum_over(&mut self, axis: Axis, values: Buffer) {
        let top = self.arena.mark();
        let all = self.workspace(DType::F32, self.place.size(axis) * values.len);
        self.all_gather(axis, values, all);
        self.backend.zero(values);
        for start in (0..all.len).step_by(values.len.max(1)) {
            self.backend.add(values, all.slice(start, values.len));
        }
        self.arena.release(top);
    }

    /// `receives[r]` becomes what rank `r` along an axis has for this one: its `sends` of that number, which is as long.
    pub(crate) fn exchange(&mut self, axis: Axis, sends: &[Buffer], receives: &[Buffer]) {
        let each = |buffers: &[Buffer]| buffers.iter().map(|&buffer| vec![buffer]).collect::<Vec<_>>();
        self.exchange_parts(axis, &each(sends), &each(receives));
    }

    /// Counts the bytes that this rank sends; in a dry run it sends none.
    pub(super) fn exchanging(&mut self, bytes: usize, call: impl FnOnce(&mut B, &mut Ranks) -> Result<()>) {
        let Some(ranks) = self.ranks.as_deref_mut() else {
            *self.planned += bytes as u64;
            return;
        };
        if self.failure.is_none() {
            ranks.sent.tokens += bytes as u64;
            *self.failure = call(self.backend, ranks).err();
        }
    }
}

impl Ranks {
    fn sum_along<B: Backend + ?Sized>(
        &mut self,
        backend: &mut B,
        axis: Axis,
        partial: Buffer,
        sum: Buffer,
    ) -> Result<()> {
        let size = self.place.size(axis);
        let group = self.part_of(axis)?;
        for start in (0..sum.len).step_by(EXCHANGED) {
            let len = EXCHANGED.min(sum.len - start);
            let parts: Vec<Buffer> = (0..size).map(|rank| partial.slice(rank * sum.len + start, len)).collect();
            backend.exchange_sum(&group, &parts, sum.slice(start, len))?;
        }
        Ok(())
    }
}
