//! The GPU's own clock: events in a stream that keep the time at which they were reached. Knows nothing of what is measured.

use arl_model::Result;
use candle_core::cuda_backend::cudarc;
use cudarc::driver::sys::CUevent_flags;
use cudarc::driver::{CudaEvent, CudaStream};

use super::failed;

/// Timestamps by turns in the same events.
#[derive(Default)]
pub(super) struct Clock {
    events: Vec<CudaEvent>,
    used: usize,
}

impl Clock {
    /// Queues a timestamp.
    pub(super) fn stamp(&mut self, stream: &CudaStream) -> Result<()> {
        if self.used == self.events.len() {
            let event = stream.context().new_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
            self.events.push(event.map_err(|error| failed("an event with a time", error))?);
        }
        self.events[self.used].record(stream).map_err(|error| failed("a timestamp", error))?;
        self.used += 1;
        Ok(())
    }

    /// Waits for the timestamps since the last call; seconds after the first.
    pub(super) fn take(&mut self) -> Result<Vec<f64>> {
        let events = &self.events[..std::mem::take(&mut self.used)];
        let mut times = Vec::with_capacity(events.len());
        let mut seconds = 0.0;
        times.extend(events.first().map(|_| seconds));
        // From each to the next: the driver reports a time as f32, which holds long ones too coarsely.
        for pair in events.windows(2) {
            let apart = pair[0].elapsed_ms(&pair[1]).map_err(|error| failed("the time between two leaves", error))?;
            seconds += f64::from(apart) / 1e3;
            times.push(seconds);
        }
        Ok(times)
    }
}
