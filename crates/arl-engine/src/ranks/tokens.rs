//! What blocks exchange with other ranks between their products: tokens for heads or columns, sums of partial products, rows for
//! experts. All ranks of an axis call the same in the same order. A failure is kept until the step asks for it
//! ([`Step::check_exchanges`](crate::step::Step)), and what follows it exchanges nothing.

use arl_model::Result;

use super::Ranks;
use crate::backend::comm::{EXCHANGED, Part};
use crate::backend::{Backend, Buffer, comm};
use crate::blocks::Context;
use crate::mesh::Axis;

impl<B: Backend + ?Sized> Context<'_, B> {
    /// Ranks along an axis, and the place of this one.
    pub(crate) fn along(&self, axis: Axis) -> (usize, usize) {
        (self.place.size(axis), self.place.index(axis))
    }

    /// `all` becomes the `own` of every rank along an axis, in their order; all are equally long.
    pub(crate) fn all_gather(&mut self, axis: Axis, own: Buffer, all: Buffer) {
        self.exchanging(|backend, ranks| ranks.gather_along(backend, axis, own, all));
    }

    /// `sum`, f32, becomes the sum over the ranks along an axis, in their order, of what each has for this one: `partial`, f32, has
    /// this rank's for all of them, one behind the other.
    pub(crate) fn sum_scattered(&mut self, axis: Axis, partial: Buffer, sum: Buffer) {
        self.backend.zero(sum);
        self.exchanging(|backend, ranks| ranks.sum_along(backend, axis, partial, sum));
    }

    /// `receives[r]` becomes what rank `r` along an axis has for this one: its `sends` of that number, which is as long.
    pub(crate) fn exchange(&mut self, axis: Axis, sends: &[Buffer], receives: &[Buffer]) {
        self.exchanging(|backend, ranks| ranks.exchange_along(backend, axis, sends, receives));
    }

    /// Nothing is exchanged in a dry run, and by a rank that computes alone.
    pub(super) fn exchanging(&mut self, call: impl FnOnce(&mut B, &mut Ranks) -> Result<()>) {
        let Some(ranks) = self.ranks.as_deref_mut().filter(|_| self.failure.is_none()) else { return };
        *self.failure = call(self.backend, ranks).err();
    }
}

impl Ranks {
    fn gather_along<B: Backend + ?Sized>(
        &mut self,
        backend: &mut B,
        axis: Axis,
        own: Buffer,
        all: Buffer,
    ) -> Result<()> {
        let (size, step) = (self.place.size(axis), EXCHANGED * 4 / own.dtype.bytes());
        let group = self.part_of(axis)?;
        for start in (0..own.len).step_by(step) {
            let len = step.min(own.len - start);
            let part = |buffer| Part { buffer, at: 0 };
            let places: Vec<_> = (0..size).map(|rank| vec![part(all.slice(rank * own.len + start, len))]).collect();
            let own = own.slice(start, len);
            backend.all_gather(&group, own.bytes(), &[part(own)], &places)?;
        }
        self.sent.tokens += ((size - 1) * own.bytes()) as u64;
        Ok(())
    }

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
        self.sent.tokens += ((size - 1) * sum.bytes()) as u64;
        Ok(())
    }

    fn exchange_along<B: Backend + ?Sized>(
        &mut self,
        backend: &mut B,
        axis: Axis,
        sends: &[Buffer],
        receives: &[Buffer],
    ) -> Result<()> {
        let own = self.place.index(axis);
        comm::exchange(backend, &self.part_of(axis)?, sends, receives)?;
        let others = sends.iter().enumerate().filter(|(rank, _)| *rank != own);
        self.sent.tokens += others.map(|(_, buffer)| buffer.bytes() as u64).sum::<u64>();
        Ok(())
    }
}
