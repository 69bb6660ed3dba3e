//! The events of offloading and of what ranks exchange, each with a number of its own. Activations and the optimizer may be offloaded
//! at once, and a backend knows events by their numbers alone.

use crate::backend::Event;

/// Inputs of layers on the device at a time.
pub(crate) const ACTIVATION_SLOTS: usize = 3;

/// Pieces of the optimizer's arrays on the device at a time: one comes, one is updated, one goes.
pub(crate) const OPTIMIZER_SLOTS: usize = 3;

/// What happens to the input of a layer.
#[derive(Clone, Copy)]
pub(crate) enum ActivationPoint {
    /// The input was computed.
    Ready,
    /// It is in host memory.
    Saved,
    /// The backward pass of the layer that had the slot is done.
    Freed,
    /// The next input is back.
    Fetched,
}

impl ActivationPoint {
    const COUNT: u32 = 4;

    /// The event of layer `l`'s slot.
    pub(crate) fn event(self, l: usize) -> Event {
        Event(Self::COUNT * (l % ACTIVATION_SLOTS) as u32 + self as u32)
    }
}

/// What happens to a piece of the optimizer's arrays.
#[derive(Clone, Copy)]
pub(crate) enum OptimizerPoint {
    /// The piece is on the device.
    Fetched,
    /// It is updated.
    Updated,
    /// It is in host memory again.
    Saved,
}

impl OptimizerPoint {
    const COUNT: u32 = 3;

    const FIRST: u32 = ActivationPoint::COUNT * ACTIVATION_SLOTS as u32;

    /// The event of a piece's slot.
    pub(crate) fn event(self, piece: usize) -> Event {
        Event(Self::FIRST + Self::COUNT * (piece % OPTIMIZER_SLOTS) as u32 + self as u32)
    }
}

/// What happens to the pieces of the optimizer's arrays that stay on the device, all at once.
#[derive(Clone, Copy)]
pub(crate) enum KeptPoint {
    /// Nothing that was queued before uses them.
    Free,
    /// They are copied.
    Copied,
}

impl KeptPoint {
    const COUNT: u32 = 2;

    const FIRST: u32 = OptimizerPoint::FIRST + OptimizerPoint::COUNT * OPTIMIZER_SLOTS as u32;

    pub(crate) fn event(self) -> Event {
        Event(Self::FIRST + self as u32)
    }
}

const FIRST_IN_LINE: u32 = KeptPoint::FIRST + KeptPoint::COUNT;

/// Of an exchange between ranks that comes behind all leaves so far and in front of all that follow: when it may begin, and when it is done.
pub(crate) const IN_LINE: [Event; 2] = [Event(FIRST_IN_LINE), Event(FIRST_IN_LINE + 1)];

/// What happens to a place that leaves and exchanges between ranks use in turns.
#[derive(Clone, Copy)]
pub(crate) enum ExchangePoint {
    /// The leaves that used it are done.
    Given,
    /// The exchange that used it is done.
    Exchanged,
}

impl ExchangePoint {
    const COUNT: u32 = 2;

    const FIRST: u32 = FIRST_IN_LINE + IN_LINE.len() as u32;

    /// The event of a place.
    pub(crate) fn event(self, place: u32) -> Event {
        Event(Self::FIRST + Self::COUNT * place + self as u32)
    }
}
