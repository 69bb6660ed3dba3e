//! The GPUs of other ranks; and waiting for this one, which may wait for them, without being stuck where one of them has failed.

use std::sync::Arc;
use std::time::Duration;

use arl_comm::{Collective, Communicator, Gpus, Place};
use arl_model::{Error, ErrorCode, Result};
use candle_core::cuda_backend::cudarc;
use cudarc::driver::sys::{CUresult, cuStreamQuery};

use super::{GpuDevice, failed};
use crate::backend::{Buffer, Stream};

/// Looks without a pause between them, and the pause of those that follow.
const EAGER_LOOKS: usize = 2_000;
const PAUSE: Duration = Duration::from_micros(50);

impl GpuDevice {
    /// As [`super::Device::join_ranks`].
    pub(super) fn communicate(&mut self, gpus: Gpus, rank: usize, size: usize) -> Result<()> {
        // NCCL takes the device that is the current one of this thread.
        self.context.bind_to_thread().map_err(|error| failed("the device cannot be used", error))?;
        self.communicator = Some(Communicator::new(gpus, rank, size)?);
        Ok(())
    }

    /// As [`super::Device::start_collective`].
    pub(super) fn queue_collective(&mut self, collective: &Collective<Buffer>) -> Result<()> {
        if let Some(error) = self.failure.take() {
            return Err(error);
        }
        self.context.bind_to_thread().map_err(|error| failed("the device cannot be used", error))?;
        let places = collective.map(|buffer| Place { address: self.address(buffer), bytes: buffer.bytes() });
        let stream = self.stream(Stream::Comm).cu_stream().cast();
        let joined = self.communicator.as_mut();
        let joined = joined.ok_or_else(|| Error::new(ErrorCode::Internal, "no rank was joined"))?;
        // SAFETY: the places are within pools, which are replaced only after the device was waited for; the stream is this
        // device's.
        unsafe { joined.queue(&places, stream) }
    }

    /// As [`super::Device::join_group`].
    pub(super) fn communicate_among(&mut self, gpus: Gpus, members: &[usize], rank: usize) -> Result<()> {
        self.context.bind_to_thread().map_err(|error| failed("the device cannot be used", error))?;
        self.groups.join(gpus, members, rank)
    }

    /// As [`super::Device::start_collective_among`].
    pub(super) fn queue_among(&mut self, members: &[usize], collective: &Collective<Buffer>) -> Result<()> {
        if let Some(error) = self.failure.take() {
            return Err(error);
        }
        self.context.bind_to_thread().map_err(|error| failed("the device cannot be used", error))?;
        let places = collective.map(|buffer| Place { address: self.address(buffer), bytes: buffer.bytes() });
        let stream = self.stream(Stream::Comm).cu_stream().cast();
        // SAFETY: as of all ranks.
        unsafe { self.groups.of(members)?.queue(&places, stream) }
    }

    /// Waits for all streams.
    pub(super) fn synchronize(&mut self) -> Result<()> {
        for i in 0..self.streams.len() {
            let stream = Arc::clone(&self.streams[i]);
            if self.communicator.is_some() {
                self.context.bind_to_thread().map_err(|error| failed("the device cannot be used", error))?;
                // SAFETY: the stream lives as long as this reference to it; its context is current.
                self.look(|_| match unsafe { cuStreamQuery(stream.cu_stream()) }.result() {
                    Ok(()) => Ok(true),
                    Err(error) if error.0 == CUresult::CUDA_ERROR_NOT_READY => Ok(false),
                    Err(error) => Err(failed("the device stopped", error)),
                })?;
            }
            stream.synchronize().map_err(|error| failed("the device stopped", error))?;
        }
        Ok(())
    }

    /// Waits for what was queued to be read, where other ranks may hold it up.
    pub(super) fn await_outgoing(&mut self) -> Result<()> {
        if self.communicator.is_some() { self.look(|device| Ok(device.outgoing.arrived())) } else { Ok(()) }
    }

    /// Looks until something is done; gives up where another rank has failed, or NCCL: then nothing of it is queued any more.
    fn look(&mut self, done: impl Fn(&Self) -> Result<bool>) -> Result<()> {
        let Some(watch) = self.communicator.as_ref().map(|joined| Arc::clone(joined.watch())) else { return Ok(()) };
        watch.during(|| {
            let mut looks = 0;
            while !done(self)? {
                if let Some(joined) = &mut self.communicator
                    && let Err(error) = joined.poll().and_then(|()| self.groups.poll())
                {
                    // What waits for other ranks in any communicator would keep the stream from its end.
                    joined.abort();
                    self.groups.abort();
                    return Err(error);
                }
                looks += 1;
                if looks < EAGER_LOOKS { std::thread::yield_now() } else { std::thread::sleep(PAUSE) }
            }
            Ok(())
        })
    }
}
