//! Activation offloading: the input of each layer waits in host memory between the passes. A few slots on the device
//! take turns; copies run on streams of their own while the layers between are computed.
//!
//! The last layers' inputs stay in their slots, because the backward pass begins with them. In the backward pass a slot is
//! filled again as soon as its layer is done, which is `ACTIVATION_SLOTS - 1` layers before the next one that it is for.
//! Layers that the backward pass does not enter keep no input.

use super::Step;
use crate::backend::{Backend, Buffer, Pool, Stream};
use crate::events::{ACTIVATION_SLOTS, ActivationPoint};
use crate::placement::arena::ALIGNMENT;

/// Bytes of host memory for the inputs, `bytes` each, of so many layers.
pub(crate) fn host_bytes(layers: usize, bytes: usize) -> usize {
    layers.saturating_sub(ACTIVATION_SLOTS) * bytes.next_multiple_of(ALIGNMENT)
}

impl<B: Backend + ?Sized> Step<'_, B> {
    /// Layer `l`'s input on the device.
    fn input(&self, l: usize) -> Buffer {
        self.stages.streams[self.model.layers[l].start]
    }

    /// Where layer `l`'s input waits in host memory; `None` for those that stay.
    fn waiting_place(&self, l: usize) -> Option<Buffer> {
        let leaves = self.model.activation_offloading && l + ACTIVATION_SLOTS < self.model.own_layers.end;
        let place = l.checked_sub(self.model.lowest_layer).filter(|_| leaves)?;
        let x = self.input(l);
        Some(Buffer { pool: Pool::HostStep, offset: place * x.bytes().next_multiple_of(ALIGNMENT), ..x })
    }

    /// To be called before layer `l`'s input is computed: the copy of what its slot held may still run.
    pub(super) fn claim_input(&mut self, l: usize) {
        if let Some(before) = l.checked_sub(ACTIVATION_SLOTS)
            && self.waiting_place(before).is_some()
        {
            self.backend.wait(Stream::Compute, ActivationPoint::Saved.event(l));
        }
    }

    /// To be called when layer `l`'s input is computed: sends it to host memory.
    pub(super) fn save_input(&mut self, l: usize) {
        let Some(place) = self.waiting_place(l) else { return };
        self.backend.record(Stream::Compute, ActivationPoint::Ready.event(l));
        self.backend.wait(Stream::ToHost, ActivationPoint::Ready.event(l));
        self.backend.transfer(Stream::ToHost, self.input(l), place);
        self.backend.record(Stream::ToHost, ActivationPoint::Saved.event(l));
    }

    /// To be called before the backward pass of layer `l`: the copy of its input may still run.
    pub(super) fn await_input(&mut self, l: usize) {
        if self.waiting_place(l).is_some() {
            self.backend.wait(Stream::Compute, ActivationPoint::Fetched.event(l));
        }
    }

    /// To be called after the backward pass of layer `l`: its slot takes the next input that waits for it.
    pub(super) fn fetch_input(&mut self, l: usize) {
        let Some(next) = l.checked_sub(ACTIVATION_SLOTS) else { return };
        let Some(place) = self.waiting_place(next) else { return };
        self.backend.record(Stream::Compute, ActivationPoint::Freed.event(l));
        self.backend.wait(Stream::FromHost, ActivationPoint::Freed.event(l));
        self.backend.wait(Stream::FromHost, ActivationPoint::Saved.event(l));
        self.backend.transfer(Stream::FromHost, place, self.input(next));
        self.backend.record(Stream::FromHost, ActivationPoint::Fetched.event(l));
    }
}
