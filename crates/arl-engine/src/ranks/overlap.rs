//! What ranks exchange while leaves compute: the places that both use in turns, and which weights come next. Exchanges are queued on
//! [`Stream::Comm`] in one order, the same on every rank; that stream and the one of the leaves wait for each other only where one
//! needs a place that the other has used. On processors an exchange is done when it returns, and nothing waits.

use super::Ranks;
use super::gather::Turn;
use crate::backend::{Backend, DeviceKind, Stream};
use crate::events::ExchangePoint;
use crate::model::Model;
use crate::placement::cut::{Complete, GRADIENT_PLACES};
use crate::placement::shards::{Part, WEIGHT_PLACES};

/// A place, or several, that leaves and exchanges use in turns.
#[derive(Clone, Copy, Debug)]
pub(super) struct Handover {
    /// The number of its events.
    place: u32,
    /// Leaves have used it, and no exchange waits for them yet.
    given: bool,
    /// An exchange uses it, and no leaf waits for that yet.
    exchanging: bool,
}

impl Handover {
    fn new(place: usize) -> Self {
        Handover { place: place as u32, given: false, exchanging: false }
    }

    /// Called when all leaves that use the place are queued.
    pub(super) fn give<B: Backend + ?Sized>(&mut self, backend: &mut B) {
        backend.record(Stream::Compute, ExchangePoint::Given.event(self.place));
        self.given = true;
    }

    /// Called before an exchange that uses it.
    pub(super) fn begin<B: Backend + ?Sized>(&mut self, backend: &mut B) {
        if std::mem::take(&mut self.given) {
            backend.wait(Stream::Comm, ExchangePoint::Given.event(self.place));
        }
    }

    /// Called behind that exchange.
    pub(super) fn end<B: Backend + ?Sized>(&mut self, backend: &mut B) {
        backend.record(Stream::Comm, ExchangePoint::Exchanged.event(self.place));
        self.exchanging = true;
    }

    /// Called before a leaf that uses it.
    pub(super) fn claim<B: Backend + ?Sized>(&mut self, backend: &mut B) {
        if std::mem::take(&mut self.exchanging) {
            backend.wait(Stream::Compute, ExchangePoint::Exchanged.event(self.place));
        }
    }
}

/// What is on its way between ranks.
#[derive(Debug)]
pub(super) struct Overlap {
    /// All places at once.
    pub(super) all: Handover,
    /// Those of gathered weights.
    pub(super) weights: [Handover; WEIGHT_PLACES],
    /// Those of gradients.
    pub(super) gradients: [Handover; GRADIENT_PLACES],
    /// The parts that a round's passes need, in their order; none where they are gathered when they are needed.
    coming: Vec<Part>,
    /// Weights that others have updated, in the order in which they come.
    updated: Vec<(Part, Handover)>,
    /// How many of those that come in the round have been needed.
    needed: usize,
    /// The place of what was needed last.
    last: Option<usize>,
}

impl Overlap {
    pub(super) fn new() -> Self {
        let weights = std::array::from_fn(|place| Handover::new(1 + place));
        let gradients = std::array::from_fn(|place| Handover::new(1 + WEIGHT_PLACES + place));
        Overlap {
            all: Handover::new(0),
            weights,
            gradients,
            coming: Vec::new(),
            updated: Vec::new(),
            needed: 0,
            last: None,
        }
    }

    /// From here on a part is needed that has this place: the leaves that use the one before are queued.
    pub(super) fn need<B: Backend + ?Sized>(&mut self, backend: &mut B, place: usize) {
        if let Some(last) = self.last.replace(place) {
            self.weights[last].give(backend);
        }
    }

    /// The part that comes behind one that is needed now.
    pub(super) fn next(&mut self, part: Part) -> Option<Part> {
        let at = self.coming.get(self.needed..)?.iter().position(|coming| *coming == part)?;
        self.needed += at + 1;
        self.coming.get(self.needed).copied()
    }

    /// What is exchanged from here on comes behind all leaves so far.
    pub(super) fn begin<B: Backend + ?Sized>(&mut self, backend: &mut B) {
        self.all.give(backend);
        self.all.begin(backend);
        self.last = None;
        self.weights.iter_mut().chain(&mut self.gradients).for_each(|place| place.given = false);
    }

    /// Leaves from here on come behind all exchanges so far.
    pub(super) fn end<B: Backend + ?Sized>(&mut self, backend: &mut B) {
        let mut places = self.weights.iter().chain(&self.gradients);
        if places.any(|place| place.exchanging) || !self.updated.is_empty() {
            self.all.end(backend);
            self.all.claim(backend);
        }
        self.weights.iter_mut().chain(&mut self.gradients).for_each(|place| place.exchanging = false);
        self.updated.clear();
    }

    /// The exchanges so far are those of a part's weights that others have updated.
    pub(super) fn end_updated<B: Backend + ?Sized>(&mut self, backend: &mut B, part: Part) {
        let mut place = Handover::new(1 + WEIGHT_PLACES + GRADIENT_PLACES + self.updated.len());
        place.end(backend);
        self.updated.push((part, place));
    }

    /// Called before leaves that use a part's weights, where these may be on their way from the ranks that have updated them. What
    /// comes before them is there as well.
    pub(super) fn claim_updated<B: Backend + ?Sized>(&mut self, backend: &mut B, part: Part) {
        let coming = |(other, _): &(Part, Handover)| *other == part || *other == Part::Whole;
        if let Some(last) = self.updated.iter().rposition(coming) {
            self.updated[last].1.claim(backend);
            self.updated.drain(..=last);
        }
    }
}

impl Ranks {
    /// Has leaves from here on come behind all that is on its way.
    pub(crate) fn settle_exchanges<B: Backend + ?Sized>(&mut self, backend: &mut B) {
        self.overlap.end(backend);
    }

    /// What is exchanged from here on comes behind all leaves so far.
    pub(super) fn begin_exchanges<B: Backend + ?Sized>(&mut self, backend: &mut B) {
        self.overlap.begin(backend);
    }

    /// As [`Overlap::end_updated`].
    pub(super) fn end_updated<B: Backend + ?Sized>(&mut self, backend: &mut B, part: Part) {
        self.overlap.end_updated(backend, part);
    }

    /// Called before a round: on GPUs the weights that its passes need are gathered one part ahead.
    pub(super) fn expect_gathers(&mut self, model: &Model) {
        let ahead = model.kind == DeviceKind::Cuda && model.shards().is_some();
        let turns = if ahead { model.turns(self.sees(false)) } else { Vec::new() };
        let gathers = turns.into_iter().filter_map(|turn| match turn {
            Turn::Gather(part) => Some(part),
            Turn::Collect(_) => None,
        });
        self.overlap.coming = gathers.collect();
        self.overlap.needed = 0;
    }

    /// Called before gradients are written that only ever are from here on: those of another round may still be on their way from
    /// their places.
    pub(crate) fn claim_gradients<B: Backend + ?Sized>(&mut self, backend: &mut B, model: &Model, before: Complete) {
        match model.cut.as_deref().filter(|cut| cut.gradients) {
            Some(cut) => cut.places(before).for_each(|place| self.overlap.gradients[place].claim(backend)),
            None if before == Complete::Loss => self.overlap.gradients[0].claim(backend),
            None => {}
        }
    }

    /// As [`Ranks::claim_gradients`], of all.
    pub(super) fn claim_all_gradients<B: Backend + ?Sized>(&mut self, backend: &mut B) {
        self.overlap.gradients.iter_mut().for_each(|place| place.claim(backend));
    }
}
