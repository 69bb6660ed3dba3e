//! When each stream of a device would be done with what was queued on it, if every leaf took the time of its operations or its
//! bytes, whichever is longer, and every copy that of the link: a model of what overlaps. Nothing is measured.

use std::collections::HashMap;

use super::{Event, Stream};

/// What a device does in a second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// Floating-point operations.
    pub flops: f64,
    /// Bytes of its memory.
    pub memory: f64,
    /// Bytes over the link to the host, each way at once.
    pub link: f64,
}

/// The streams' ends, in seconds from the beginning.
#[derive(Clone, Debug)]
pub struct Timeline {
    rates: Rates,
    ends: [f64; Stream::ALL.len()],
    events: HashMap<u32, f64>,
    /// Seconds that leaves waited for copies.
    waited: f64,
}

impl Timeline {
    /// All streams are empty.
    pub fn new(rates: Rates) -> Self {
        Timeline { rates, ends: [0.0; Stream::ALL.len()], events: HashMap::new(), waited: 0.0 }
    }

    /// The end of the leaves so far.
    pub fn end(&self) -> f64 {
        self.ends[Stream::Compute as usize]
    }

    /// How long of that the leaves waited for copies.
    pub fn waited(&self) -> f64 {
        self.waited
    }

    pub(super) fn leaf(&mut self, flops: f64, bytes: f64) {
        self.ends[Stream::Compute as usize] += (flops / self.rates.flops).max(bytes / self.rates.memory);
    }

    pub(super) fn transfer(&mut self, stream: Stream, bytes: f64) {
        self.ends[stream as usize] += bytes / self.rates.link;
    }

    pub(super) fn record(&mut self, stream: Stream, event: Event) {
        self.events.insert(event.0, self.ends[stream as usize]);
    }

    pub(super) fn wait(&mut self, stream: Stream, event: Event) {
        let end = &mut self.ends[stream as usize];
        let reached = self.events.get(&event.0).map_or(*end, |at| end.max(*at));
        if stream == Stream::Compute {
            self.waited += reached - *end;
        }
        *end = reached;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_run_next_to_leaves_until_an_event_is_waited_for() {
        let mut line = Timeline::new(Rates { flops: 10.0, memory: 5.0, link: 2.0 });
        let (ready, copied) = (Event(0), Event(1));
        line.leaf(30.0, 5.0);
        line.record(Stream::Compute, ready);
        // Nobody recorded it yet.
        line.wait(Stream::Compute, copied);
        line.wait(Stream::ToHost, ready);
        line.transfer(Stream::ToHost, 8.0);
        line.record(Stream::ToHost, copied);
        line.leaf(10.0, 15.0);
        assert_eq!((line.end(), line.waited()), (6.0, 0.0));
        line.wait(Stream::Compute, copied);
        assert_eq!((line.end(), line.waited()), (7.0, 1.0));
        line.transfer(Stream::FromHost, 2.0);
        assert_eq!(line.end(), 7.0);
    }
}
