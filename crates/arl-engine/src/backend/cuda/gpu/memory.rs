//! Memory of the device and pinned memory of the host, and the way of small uploads through the latter. Knows nothing of
//! what is in it.

use std::sync::Arc;

use arl_model::Result;
use candle_core::cuda_backend::cudarc;
use cudarc::driver::{CudaContext, CudaEvent, CudaStream, DriverError, result};

use super::failed;

/// One piece of memory.
pub(super) struct Allocation {
    context: Arc<CudaContext>,
    address: u64,
    bytes: usize,
    host: bool,
}

impl Allocation {
    /// Zeroed memory of the device.
    pub(super) fn device(context: &Arc<CudaContext>, bytes: usize) -> std::result::Result<Self, DriverError> {
        context.bind_to_thread()?;
        let mut address = 0;
        if bytes > 0 {
            // SAFETY: the memory is zeroed before anything reads it.
            unsafe {
                address = result::malloc_sync(bytes)?;
                result::memset_d8_sync(address, 0, bytes)?;
            }
            // The memory is cleared on a stream that ours do not wait for.
            context.synchronize()?;
        }
        Ok(Allocation { context: Arc::clone(context), address, bytes, host: false })
    }

    /// Zeroed host memory that copies reach without the processor. Not write-combined: the processor reads it too.
    pub(super) fn host(context: &Arc<CudaContext>, bytes: usize) -> std::result::Result<Self, DriverError> {
        context.bind_to_thread()?;
        let mut address = 0;
        if bytes > 0 {
            // SAFETY: the memory is zeroed before anything reads it.
            unsafe {
                let base = result::malloc_host(bytes, 0)?;
                std::ptr::write_bytes(base.cast::<u8>(), 0, bytes);
                address = base.expose_provenance() as u64;
            }
        }
        Ok(Allocation { context: Arc::clone(context), address, bytes, host: true })
    }

    pub(super) fn address(&self) -> u64 {
        self.address
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The bytes of host memory; none of the device's. No copy may be queued on them.
    pub(super) fn host_bytes_mut(&mut self) -> &mut [u8] {
        if !self.host || self.bytes == 0 {
            return &mut [];
        }
        // SAFETY: the memory is this allocation's, initialised, and borrowed as `self` is.
        unsafe {
            std::slice::from_raw_parts_mut(std::ptr::with_exposed_provenance_mut(self.address as usize), self.bytes)
        }
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        if self.bytes == 0 || self.context.bind_to_thread().is_err() {
            return;
        }
        // SAFETY: allocated by the call that goes with it, and freed once. No caller is left to report a failure to.
        let _ = unsafe {
            if self.host {
                result::free_host(std::ptr::with_exposed_provenance_mut(self.address as usize))
            } else {
                result::free_sync(self.address)
            }
        };
    }
}

/// Bytes of a chunk of the staging memory.
const CHUNK: usize = 8 << 20;

/// Most chunks. Beyond them an upload waits for the device: an evaluation may upload without end.
const MOST_CHUNKS: usize = 32;

/// A part of the staging memory, and the event behind the last copy from it.
struct Chunk {
    memory: Allocation,
    behind: CudaEvent,
}

impl Chunk {
    fn new(context: &Arc<CudaContext>) -> std::result::Result<Self, DriverError> {
        Ok(Chunk { memory: Allocation::host(context, CHUNK)?, behind: context.new_event(None)? })
    }
}

/// Pinned memory through which uploads go, so that the caller's bytes are free at once and nothing waits for the device:
/// chunks by turns, and one more where the next one is still being copied from.
pub(super) struct Staging {
    chunks: Vec<Chunk>,
    /// The chunk in use, and how much of it is.
    current: usize,
    used: usize,
}

impl Staging {
    pub(super) fn new(context: &Arc<CudaContext>) -> Result<Self> {
        let first = Chunk::new(context).map_err(|error| failed("memory for uploads", error))?;
        Ok(Staging { chunks: vec![first], current: 0, used: 0 })
    }

    /// Queues a copy of `source` to the device's `address`.
    pub(super) fn upload(&mut self, source: &[u8], address: u64, stream: &Arc<CudaStream>) -> Result<()> {
        let uploading = |error| failed("an upload", error);
        for (i, piece) in source.chunks(CHUNK).enumerate() {
            if self.used + piece.len() > CHUNK {
                self.next_chunk(stream).map_err(uploading)?;
            }
            let staged = &mut self.chunks[self.current].memory.host_bytes_mut()[self.used..][..piece.len()];
            staged.copy_from_slice(piece);
            // SAFETY: the staged bytes are not written again before the event behind this copy has been reached; the
            // caller vouches for the address.
            unsafe { result::memcpy_htod_async(address + (i * CHUNK) as u64, staged, stream.cu_stream()) }
                .map_err(uploading)?;
            self.used += piece.len().next_multiple_of(16);
        }
        Ok(())
    }

    /// Goes on to a chunk that nothing is copied from any more.
    fn next_chunk(&mut self, stream: &Arc<CudaStream>) -> std::result::Result<(), DriverError> {
        self.chunks[self.current].behind.record(stream)?;
        let next = (self.current + 1) % self.chunks.len();
        // Of one chunk alone the next one is itself, which was just recorded.
        if !self.chunks[next].behind.try_is_complete()? {
            if self.chunks.len() < MOST_CHUNKS {
                self.chunks.insert(self.current + 1, Chunk::new(stream.context())?);
                (self.current, self.used) = (self.current + 1, 0);
                return Ok(());
            }
            self.chunks[next].behind.synchronize()?;
        }
        (self.current, self.used) = (next, 0);
        Ok(())
    }
}

/// Pinned memory on the way of what is read without waiting for all that is queued.
pub(super) struct Outgoing {
    memory: Allocation,
    behind: CudaEvent,
}

impl Outgoing {
    pub(super) fn new(context: &Arc<CudaContext>) -> Result<Self> {
        let setting_up = |error| failed("memory for statistics", error);
        Ok(Outgoing {
            memory: Allocation::host(context, 1 << 16).map_err(setting_up)?,
            behind: context.new_event(None).map_err(setting_up)?,
        })
    }

    /// Queues copies of the device's memory, given as addresses and lengths in bytes, one behind the other.
    pub(super) fn queue(&mut self, sources: &[(u64, usize)], stream: &Arc<CudaStream>) -> Result<()> {
        let reading = |error| failed("reading from the device", error);
        let bytes: usize = sources.iter().map(|(_, bytes)| bytes).sum();
        if bytes > self.memory.bytes() {
            // The last read is over: its copies are done.
            self.memory = Allocation::host(stream.context(), bytes).map_err(reading)?;
        }
        let mut start = 0;
        for &(address, bytes) in sources {
            let target = &mut self.memory.host_bytes_mut()[start..start + bytes];
            // SAFETY: the target is pinned memory that lives as long as `self`, and is neither read, written nor given back
            // before the event behind this copy has been reached; the caller vouches for the address.
            unsafe { result::memcpy_dtoh_async(target, address, stream.cu_stream()) }.map_err(reading)?;
            start += bytes;
        }
        self.behind.record(stream).map_err(reading)
    }

    /// Whether [`Outgoing::finish`] would not wait; also where the device has failed.
    pub(super) fn arrived(&self) -> bool {
        self.behind.try_is_complete().unwrap_or(true)
    }

    /// Waits for the copies.
    pub(super) fn finish(&mut self, target: &mut [u8]) -> Result<()> {
        self.behind.synchronize().map_err(|error| failed("the device stopped", error))?;
        target.copy_from_slice(&self.memory.host_bytes_mut()[..target.len()]);
        Ok(())
    }
}
