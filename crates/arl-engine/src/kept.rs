//! Pieces of an offloaded optimizer that stay on the device from step to step, as many as its memory holds next to the plan: the
//! fewer pass over the link to the host, the more of their way the next forward pass hides. Host memory has a place for each of
//! them all the same, so that the device gives them up whenever something else needs its memory.

use arl_model::{ErrorCode, Result};

use crate::backend::{Backend, Buffer, Pool, Stream};
use crate::engine::Engine;
use crate::events::KeptPoint;
use crate::model::Model;
use crate::placement::Run;
use crate::placement::store::{Slot, Slots};

/// Left for what a plan does not know: the driver's context, kernels and libraries that load when they are first used.
pub(crate) const MARGIN: usize = 2 << 30;

/// What the device keeps.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Kept {
    /// Pieces.
    pub(crate) count: usize,
    /// The device has their values.
    pub(crate) loaded: bool,
    /// The host has others, which are older.
    pub(crate) changed: bool,
}

impl Kept {
    /// Reserves memory for as many pieces as there is room for next to all that was reserved before; for none where the device's
    /// memory is the host's.
    pub(crate) fn reserve<B: Backend + ?Sized>(backend: &mut B, model: &Model) -> Result<Self> {
        let (Some(slots), Some((free, _))) = (model.store.slots, backend.memory()?) else { return Ok(Kept::default()) };
        let pieces = pieces(&model.runs, slots.piece).len();
        let count = (free.saturating_sub(MARGIN) / slots.kept_bytes()).min(pieces);
        match backend.reserve(Pool::Kept, count * slots.kept_bytes()) {
            Ok(()) => Ok(Kept { count, ..Kept::default() }),
            // Free memory may be in parts.
            Err(error) if error.code == ErrorCode::Oom => {
                backend.reserve(Pool::Kept, 0)?;
                Ok(Kept::default())
            }
            Err(error) => Err(error),
        }
    }

    /// What the device has is of no use any more, because the host's values were replaced.
    pub(crate) fn forget(&mut self) {
        (self.loaded, self.changed) = (false, false);
    }
}

/// Parts of runs of at most `piece` parameters, in the order in which a forward pass uses them.
pub(crate) fn pieces(runs: &[Run], piece: usize) -> Vec<Run> {
    // Norms and biases are few, and each layer has some: they come first.
    let (decayed, others): (Vec<&Run>, Vec<&Run>) = runs.iter().partition(|run| run.decay && !run.wide);
    let parts = others
        .into_iter()
        .chain(decayed)
        .flat_map(|run| (0..run.len).step_by(piece).map(move |start| run.part(start, piece.min(run.len - start))));
    parts.collect()
}

/// Where a piece is when it is updated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// It stays: its number in [`Pool::Kept`].
    Kept(usize),
    /// It comes and goes: its number among those that do, which take turns in the slots.
    Passing(usize),
}

/// The pieces of an optimizer's arrays in host memory, and their places on the device.
#[derive(Clone, Debug)]
pub(crate) struct Pieces {
    /// The whole arrays.
    host: Slot,
    slots: Slots,
    all: Vec<Run>,
    kept: usize,
    /// Numbers of those that come and go.
    passing: Vec<usize>,
}

impl Pieces {
    /// Those of the arrays `host`, of which the device keeps so many.
    pub(crate) fn new(host: Slot, runs: &[Run], slots: Slots, kept: usize) -> Self {
        let all = pieces(runs, slots.piece);
        let mut pieces = Pieces { host, slots, all, kept, passing: Vec::new() };
        let passes = |i: &usize| matches!(pieces.place(*i), Place::Passing(_));
        pieces.passing = (0..pieces.all.len()).filter(passes).collect();
        pieces
    }

    pub(crate) fn get(&self, i: usize) -> Option<&Run> {
        self.all.get(i)
    }

    /// The number of a piece by its number among those that come and go.
    pub(crate) fn passing(&self, number: usize) -> Option<usize> {
        self.passing.get(number).copied()
    }

    /// Those that stay are spread evenly over the forward pass, so that the link always has work.
    pub(crate) fn place(&self, i: usize) -> Place {
        let kept_before = |i: usize| i * self.kept / self.all.len();
        let before = kept_before(i);
        if kept_before(i + 1) > before { Place::Kept(before) } else { Place::Passing(i - before) }
    }

    /// The place of piece `i` on the device, as long as the piece.
    pub(crate) fn slot(&self, i: usize) -> Slot {
        let Slot { moment1, moment2, masters } = match self.place(i) {
            Place::Kept(number) => self.slots.kept(number),
            Place::Passing(number) => self.slots.places[number % self.slots.places.len()],
        };
        let part = |buffer: Buffer| buffer.slice(0, self.all[i].len);
        Slot { moment1: part(moment1), moment2: part(moment2), masters: masters.map(part) }
    }

    /// The parts of piece `i` in host memory, and their places on the device.
    pub(crate) fn pairs(&self, i: usize) -> impl Iterator<Item = (Buffer, Buffer)> + use<> {
        let (Run { own, len, .. }, slot) = (self.all[i], self.slot(i));
        let host = move |array: Buffer| array.slice(own, len);
        let masters = self.host.masters.map(host).zip(slot.masters);
        [(host(self.host.moment1), slot.moment1), (host(self.host.moment2), slot.moment2)].into_iter().chain(masters)
    }

    /// Copies all pieces that stay, from the host or to it, between what is queued before and behind.
    pub(crate) fn copy_kept<B: Backend + ?Sized>(&self, backend: &mut B, stream: Stream) {
        backend.record(Stream::Compute, KeptPoint::Free.event());
        backend.wait(stream, KeptPoint::Free.event());
        for i in (0..self.all.len()).filter(|i| matches!(self.place(*i), Place::Kept(_))) {
            for (host, device) in self.pairs(i) {
                let (source, target) = if stream == Stream::ToHost { (device, host) } else { (host, device) };
                backend.transfer(stream, source, target);
            }
        }
        backend.record(stream, KeptPoint::Copied.event());
        backend.wait(Stream::Compute, KeptPoint::Copied.event());
    }
}

impl<B: Backend + ?Sized> Engine<B> {
    /// As [`Engine::complete_update`], for callers that read moments or masters: host memory has all of them.
    pub(crate) fn complete_update_in_host(&mut self) {
        self.complete_update();
        let model = self.model.trained();
        let store = &model.store;
        let (true, Some(slots), Some(training)) = (self.kept.changed, store.slots, store.training) else { return };
        let host = Slot { moment1: training.moment1, moment2: training.moment2, masters: store.masters };
        let pieces = Pieces::new(host, &model.runs, slots, self.kept.count);
        pieces.copy_kept(&mut *self.backend, Stream::ToHost);
        self.kept.changed = false;
    }

    /// Gives up what is kept, for something else to be reserved in its memory.
    pub(crate) fn give_up_kept(&mut self) -> Result<()> {
        if self.kept.count == 0 {
            return Ok(());
        }
        self.complete_update_in_host();
        self.kept = Kept::default();
        self.backend.reserve(Pool::Kept, 0)
    }
}
