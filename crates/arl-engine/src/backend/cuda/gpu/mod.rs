//! The GPU as a [`Device`]: candle's CUDA device with this project's kernels as a module of their own on it. One thread
//! owns it. What fails in the background is kept, and reported when something is read back; with `ARL_CUDA_SYNC=1` the device
//! is waited for after each operation, and the report names the one that failed.

mod attention;
mod clock;
mod comm;
mod cublaslt;
mod failure;
mod kernels;
mod memory;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use arl_comm::{Collective, Communicator, Gpus, Groups};
use arl_model::{Error, ErrorCode, Result};
use candle_core::cuda_backend::cudarc;
use candle_core::{CudaDevice as CandleDevice, Device as Candle};
use cudarc::driver::sys::CUdevice_attribute;
use cudarc::driver::{CudaContext, CudaEvent, CudaStream, result};

use self::attention::Library;
use self::clock::Clock;
use self::cublaslt::{Addresses, CublasLt};
use self::failure::failed;
use self::kernels::Kernels;
use self::memory::{Allocation, Outgoing, Staging};
use super::device::{Device, Launch};
use super::packed::{PackedAttention, PackedShape};
use crate::backend::{Buffer, Event, Matmul, MatmulAlgorithms, Pool, Stream};

/// The lowest compute capability that the kernels are compiled for.
const LEAST_CAPABILITY: (i32, i32) = (8, 0);

/// Waits for the device after each operation.
const SYNC: &str = "ARL_CUDA_SYNC";

/// One context of each device that was opened, for the life of the process. Without it, closing the last `GpuDevice` would
/// destroy the primary context under the libraries, which keep state in it.
static CONTEXTS: Mutex<Vec<Arc<CudaContext>>> = Mutex::new(Vec::new());

/// A GPU.
pub struct GpuDevice {
    /// The other ranks' GPUs; goes first.
    communicator: Option<Communicator>,
    /// Some of them, and this one.
    groups: Groups,
    name: String,
    multiprocessors: usize,
    context: Arc<CudaContext>,
    /// In the order of [`Stream::ALL`].
    streams: [Arc<CudaStream>; Stream::ALL.len()],
    events: Vec<CudaEvent>,
    kernels: Kernels,
    pools: HashMap<Pool, Allocation>,
    staging: Staging,
    outgoing: Outgoing,
    /// What had failed when `outgoing` was queued.
    outgoing_failure: Option<Error>,
    cublaslt: CublasLt,
    attention: Library,
    clock: Clock,
    /// The first thing that failed since something was read back.
    failure: Option<Error>,
    /// Whether the device is waited for after each operation.
    synchronous: bool,
    /// Keeps what candle holds of the device alive; dropped last.
    _candle: CandleDevice,
}

fn address_in(pools: &HashMap<Pool, Allocation>, buffer: Buffer) -> u64 {
    let base = pools.get(&buffer.pool).map_or(0, |pool| {
        assert!(buffer.offset + buffer.bytes() <= pool.bytes(), "{buffer:?} is outside its pool");
        pool.address()
    });
    base + buffer.offset as u64
}

impl GpuDevice {
    /// Opens device `ordinal`, and loads the kernels. Fails with `Device` where there is none, or one that is too old.
    pub fn open(ordinal: usize) -> Result<Self> {
        let candle = Candle::new_cuda_with_stream(ordinal)
            .and_then(|device| device.as_cuda_device().cloned())
            .map_err(|error| {
                Error::new(ErrorCode::Device, format!("cuda:{ordinal} cannot be opened: {error}"))
                    .hint("run `arl doctor`, which lists driver, libraries and devices")
            })?;
        let compute = candle.cuda_stream();
        let context = Arc::clone(compute.context());
        let mut contexts = CONTEXTS.lock().unwrap_or_else(PoisonError::into_inner);
        if contexts.iter().all(|kept| kept.ordinal() != ordinal) {
            contexts.push(Arc::clone(&context));
        }
        drop(contexts);
        // SAFETY: nothing is freed while the device is in use but by `reserve`, which waits for all streams; and streams are
        // ordered by `record` and `wait` alone.
        unsafe { candle.disable_event_tracking() };
        let opening = |error| failed(&format!("cuda:{ordinal} cannot be used"), error);
        let name = context.name().map_err(opening)?;
        let capability = context.compute_capability().map_err(opening)?;
        if capability < LEAST_CAPABILITY {
            let (major, minor) = capability;
            return Err(Error::new(
                ErrorCode::Device,
                format!("cuda:{ordinal} ({name}) has compute capability {major}.{minor}; 8.0 or newer is needed"),
            )
            .hint("use device cpu, or a GPU of the generations since Ampere"));
        }
        let count = context.attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT).map_err(opening)?;
        let stream = || context.new_stream().map_err(opening);
        let streams = [Arc::clone(&compute), stream()?, stream()?, stream()?];
        let kernels = Kernels::load(&context)?;
        Ok(GpuDevice {
            communicator: None,
            groups: Groups::default(),
            staging: Staging::new(&context)?,
            outgoing: Outgoing::new(&context)?,
            outgoing_failure: None,
            cublaslt: CublasLt::new(&context, &name)?,
            attention: Library::new(capability, Arc::clone(&context)),
            clock: Clock::default(),
            multiprocessors: count.max(1) as usize,
            name,
            context,
            streams,
            events: Vec::new(),
            kernels,
            pools: HashMap::new(),
            failure: None,
            synchronous: std::env::var_os(SYNC).is_some_and(|value| value == "1"),
            _candle: candle,
        })
    }

    fn stream(&self, stream: Stream) -> &Arc<CudaStream> {
        &self.streams[stream as usize]
    }

    /// Keeps the first failure. What is queued after one is skipped.
    fn keep(&mut self, result: Result<()>) {
        if let Err(error) = result
            && self.failure.is_none()
        {
            self.failure = Some(error);
        }
    }

    /// Keeps the failure of `operation`, which was queued on the compute stream; with `ARL_CUDA_SYNC=1` also what it fails
    /// with while it runs.
    fn queued(&mut self, result: Result<()>, operation: &dyn std::fmt::Debug) {
        let result = match result {
            Ok(()) if self.synchronous => {
                self.stream(Stream::Compute).synchronize().map_err(|error| failed(&format!("{operation:?}"), error))
            }
            result => result,
        };
        self.keep(result);
    }

    /// The address of a buffer, of the device or of pinned host memory.
    fn address(&self, buffer: Buffer) -> u64 {
        address_in(&self.pools, buffer)
    }

    fn event(&mut self, event: Event) -> Result<usize> {
        let wanted = event.0 as usize;
        while self.events.len() <= wanted {
            let new = self.context.new_event(None).map_err(|error| failed("an event", error))?;
            self.events.push(new);
        }
        Ok(wanted)
    }
}

impl Device for GpuDevice {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn multiprocessors(&self) -> usize {
        self.multiprocessors
    }

    fn reserve(&mut self, pool: Pool, bytes: usize) -> Result<()> {
        self.synchronize()?;
        // The old memory goes first: both together may not fit.
        self.pools.remove(&pool);
        let host = matches!(pool, Pool::HostState | Pool::HostStep);
        let allocation =
            if host { Allocation::host(&self.context, bytes) } else { Allocation::device(&self.context, bytes) };
        let allocation = allocation.map_err(|error| {
            let mib = bytes.div_ceil(1 << 20);
            let place = if host { "pinned host memory".to_string() } else { format!("memory on {}", self.name) };
            let free = self.context.mem_get_info().map_or(0, |(free, _)| free >> 20);
            let available = if host { String::new() } else { format!(" ({free} MiB are free)") };
            let error =
                failed(&format!("cannot allocate {mib} MiB of {place}{available} for the {pool:?} pool"), error);
            let less =
                "leave out optimizer_offload or activation_offloading, or give the machine or container more memory";
            if host && error.code == ErrorCode::Oom { error.hint(less) } else { error }
        })?;
        self.pools.insert(pool, allocation);
        Ok(())
    }

    fn upload(&mut self, source: &[u8], target: Buffer) {
        assert_eq!(source.len(), target.bytes(), "an upload of {} bytes", target.bytes());
        let address = self.address(target);
        let result = if matches!(target.pool, Pool::HostState | Pool::HostStep) {
            self.synchronize().map(|()| {
                if let Some(pool) = self.pools.get_mut(&target.pool) {
                    pool.host_bytes_mut()[target.offset..][..source.len()].copy_from_slice(source);
                }
            })
        } else {
            self.staging.upload(source, address, &self.streams[Stream::Compute as usize])
        };
        self.keep(result);
    }

    fn read_back(&mut self, source: Buffer, target: &mut [u8]) -> Result<()> {
        assert_eq!(target.len(), source.bytes(), "a read of {} bytes", source.bytes());
        let done = self.synchronize();
        if let Some(error) = self.failure.take() {
            return Err(error);
        }
        done?;
        if target.is_empty() {
            return Ok(());
        }
        if let (Pool::HostState | Pool::HostStep, Some(pool)) = (source.pool, self.pools.get_mut(&source.pool)) {
            target.copy_from_slice(&pool.host_bytes_mut()[source.offset..][..target.len()]);
            return Ok(());
        }
        // SAFETY: the address and length are within the pool, and no work is queued.
        unsafe { result::memcpy_dtoh_sync(target, self.address(source)) }
            .map_err(|error| failed("reading from the device", error))
    }

    fn queue_read(&mut self, sources: &[Buffer]) {
        let places: Vec<_> = sources.iter().map(|source| (self.address(*source), source.bytes())).collect();
        let result = self.outgoing.queue(&places, &self.streams[Stream::Compute as usize]);
        self.keep(result);
        self.outgoing_failure.clone_from(&self.failure);
    }

    fn read_arrived(&mut self) -> bool {
        self.outgoing_failure.is_some() || self.outgoing.arrived()
    }

    fn finish_read(&mut self, target: &mut [u8]) -> Result<()> {
        match self.outgoing_failure.take() {
            Some(error) => {
                self.failure = None;
                Err(error)
            }
            None => self.await_outgoing().and_then(|()| self.outgoing.finish(target)),
        }
    }

    fn transfer(&mut self, stream: Stream, source: Buffer, target: Buffer) {
        let (from, to) = (self.address(source), self.address(target));
        let queue = self.stream(stream).cu_stream();
        // SAFETY: both are within their pools, which outlive what is queued; addresses are unified, so that the driver knows
        // pinned host memory by its address.
        let queued = unsafe { cudarc::driver::sys::cuMemcpyAsync(to, from, target.bytes(), queue) }.result();
        self.keep(queued.map_err(|error| failed("a copy between host and device", error)));
    }

    fn record(&mut self, stream: Stream, event: Event) {
        let result = self.event(event).and_then(|i| {
            self.events[i].record(self.stream(stream)).map_err(|error| failed("recording an event", error))
        });
        self.keep(result);
    }

    fn wait(&mut self, stream: Stream, event: Event) {
        let result = self.event(event).and_then(|i| {
            self.stream(stream).wait(&self.events[i]).map_err(|error| failed("waiting for an event", error))
        });
        self.keep(result);
    }

    fn timestamp(&mut self) -> bool {
        let result = self.clock.stamp(&self.streams[Stream::Compute as usize]);
        self.keep(result);
        true
    }

    fn timestamps(&mut self) -> Result<Vec<f64>> {
        let times = self.clock.take();
        match self.failure.take() {
            Some(error) => Err(error),
            None => times,
        }
    }

    fn memory(&self) -> Result<Option<(usize, usize)>> {
        let asked = self.context.mem_get_info();
        asked.map(Some).map_err(|error| failed("the device's memory cannot be asked for", error))
    }

    fn matmul_algorithms(&mut self) -> Option<&mut dyn MatmulAlgorithms> {
        Some(&mut self.cublaslt)
    }

    fn zero(&mut self, target: Buffer) {
        let address = self.address(target);
        // SAFETY: the address and length are within the pool.
        let queued =
            unsafe { result::memset_d8_async(address, 0, target.bytes(), self.stream(Stream::Compute).cu_stream()) };
        self.queued(queued.map_err(|error| failed("zeroing memory", error)), &("zero", target));
    }

    fn copy(&mut self, source: Buffer, target: Buffer) {
        assert_eq!(source.bytes(), target.bytes(), "a copy of unlike buffers");
        self.transfer(Stream::Compute, source, target);
    }

    fn launch(&mut self, launch: &Launch<'_>) {
        self.launch_on(Stream::Compute, launch);
    }

    fn launch_on(&mut self, stream: Stream, launch: &Launch<'_>) {
        if launch.grid.contains(&0) || self.failure.is_some() {
            return;
        }
        let pools = &self.pools;
        let result = self.kernels.launch(launch, |buffer| address_in(pools, buffer), &self.streams[stream as usize]);
        // Other streams may wait for other ranks, which `synchronize` alone does without being stuck.
        if stream == Stream::Compute { self.queued(result, launch) } else { self.keep(result) }
    }

    fn matmul(&mut self, op: &Matmul) {
        if op.m * op.n == 0 || self.failure.is_some() {
            return;
        }
        let addresses = Addresses {
            a: self.address(op.a.buffer),
            b: self.address(op.b.buffer),
            c: self.address(op.c.buffer),
            bias: op.bias.map(|bias| self.address(bias)),
        };
        let stream = Arc::clone(self.stream(Stream::Compute));
        let result = self.cublaslt.matmul(op, addresses, &stream);
        self.queued(result, op);
    }

    fn join_ranks(&mut self, gpus: Gpus, rank: usize, size: usize) -> Result<()> {
        self.communicate(gpus, rank, size)
    }

    fn start_collective(&mut self, collective: &Collective<Buffer>) -> Result<()> {
        self.queue_collective(collective)
    }

    fn join_group(&mut self, gpus: Gpus, members: &[usize], rank: usize) -> Result<()> {
        self.communicate_among(gpus, members, rank)
    }

    fn start_collective_among(&mut self, members: &[usize], collective: &Collective<Buffer>) -> Result<()> {
        self.queue_among(members, collective)
    }

    fn expect_attention(&mut self, shape: &PackedShape) {
        self.attention.expect(shape);
    }

    fn plan_attention(&mut self, shape: &PackedShape) -> std::result::Result<(), String> {
        self.context.bind_to_thread().map_err(|error| format!("the device cannot be used: {error:?}"))?;
        self.attention.plan(shape)
    }

    fn packed_attention(&mut self, pass: &PackedAttention) {
        if self.failure.is_some() {
            return;
        }
        let pools = &self.pools;
        let address = |buffer: Buffer| address_in(pools, buffer);
        let result = self.attention.run(pass, address, &self.streams[Stream::Compute as usize]);
        self.queued(result, pass);
    }
}

impl Drop for GpuDevice {
    fn drop(&mut self) {
        // Memory must not go while work is queued on it; a failure was reported before, or no caller needs it any more.
        let _ = self.synchronize();
    }
}
