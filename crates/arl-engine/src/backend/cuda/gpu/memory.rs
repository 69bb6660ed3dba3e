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
        // SAFETY: allocated by the call that goes with it, and freed once. What fails here has nobody to tell.
        let _ = unsafe {
            if self.host {
                result::free_host(std::ptr::with_exposed_provenance_mut(self.address as usize))
            } else {
                result::free_sync(self.address)
            }
        };
    }
}

/// Bytes of each half of the staging memory.
const HALF: usize = 8 << 20;

/// Pinned memory through which uploads go, so that the caller's bytes are free at once and nothing waits for the device:
/// two halves by turns, each with an event behind its last copy.
pub(super) struct Staging {
    memory: Allocation,
    behind: [CudaEvent; 2],
    half: usize,
    used: usize,
}

impl Staging {
    pub(super) fn new(context: &Arc<CudaContext>) -> Result<Self> {
        let setting_up = |error| failed("memory for uploads", error);
        let event = || context.new_event(None).map_err(setting_up);
        Ok(Staging {
            memory: Allocation::host(context, 2 * HALF).map_err(setting_up)?,
            behind: [event()?, event()?],
            half: 0,
            used: 0,
        })
    }

    /// Queues a copy of `source` to the device's `address`.
    pub(super) fn upload(&mut self, source: &[u8], address: u64, stream: &Arc<CudaStream>) -> Result<()> {
        let uploading = |error| failed("an upload", error);
        for (i, piece) in source.chunks(HALF).enumerate() {
            if self.used + piece.len() > HALF {
                self.behind[self.half].record(stream).map_err(uploading)?;
                self.half = 1 - self.half;
                self.used = 0;
                self.behind[self.half].synchronize().map_err(uploading)?;
            }
            let start = self.half * HALF + self.used;
            let staged = &mut self.memory.host_bytes_mut()[start..start + piece.len()];
            staged.copy_from_slice(piece);
            // SAFETY: the staged bytes are not written again before the event behind this copy has been waited for; the
            // caller vouches for the address.
            unsafe { result::memcpy_htod_async(address + (i * HALF) as u64, staged, stream.cu_stream()) }
                .map_err(uploading)?;
            self.used += piece.len().next_multiple_of(16);
        }
        Ok(())
    }
}
