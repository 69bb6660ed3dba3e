//! The GPU as a [`Device`]: candle's CUDA device with this project's kernels as a module of their own on it. One thread
//! owns it. What fails in the background is kept, and reported when something is read back.

mod attention;
mod clock;
mod memory;
mod products;

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::Arc;

use arl_model::{Error, ErrorCode, Result};
use candle_core::cuda_backend::cudarc;
use candle_core::{CudaDevice as CandleDevice, Device as Candle};
use cudarc::driver::sys::{CUdevice_attribute, CUfunction_attribute};
use cudarc::driver::{CudaContext, CudaEvent, CudaFunction, CudaModule, CudaStream, DriverError, result};
use cudarc::nvrtc::Ptx;

use self::attention::Library;
use self::clock::Clock;
use self::memory::{Allocation, Outgoing, Staging};
use self::products::Products;
use super::device::{Arg, Device, Launch};
use super::packed::{PackedAttention, PackedShape};
use crate::backend::{Buffer, Event, Matmul, Pool, Stream};

/// The lowest compute capability that the kernels are compiled for.
const LEAST_CAPABILITY: (i32, i32) = (8, 0);

/// Dynamic shared memory that a kernel may use without asking for it.
const USUAL_SHARED_BYTES: usize = 48 << 10;

/// A GPU.
pub struct GpuDevice {
    name: String,
    multiprocessors: usize,
    context: Arc<CudaContext>,
    /// In the order of [`Stream::ALL`].
    streams: [Arc<CudaStream>; 3],
    events: Vec<CudaEvent>,
    module: Arc<CudaModule>,
    /// With the dynamic shared memory that each was allowed so far.
    functions: HashMap<&'static str, (CudaFunction, usize)>,
    pools: HashMap<Pool, Allocation>,
    staging: Staging,
    outgoing: Outgoing,
    /// What had failed when `outgoing` was queued.
    outgoing_failure: Option<Error>,
    products: Products,
    attention: Library,
    clock: Clock,
    /// The first thing that failed since something was read back.
    failure: Option<Error>,
    /// Keeps what candle holds of the device alive; dropped last.
    _candle: CandleDevice,
}

/// An error of the driver, by what was tried.
fn failed(what: &str, error: DriverError) -> Error {
    use cudarc::driver::sys::CUresult;
    let code = match error.0 {
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => ErrorCode::Oom,
        _ => ErrorCode::Device,
    };
    let hint = match code {
        ErrorCode::Oom => {
            "use fewer tokens a micro-batch, recompute block, activation_offloading or optimizer_offload, or free memory that other programs hold"
        }
        _ => "run `arl doctor`; if the device is in a bad state, `nvidia-smi` shows it",
    };
    Error::new(code, format!("{what}: {error:?}")).hint(hint)
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
        let streams = [Arc::clone(&compute), stream()?, stream()?];
        let module = context.load_module(Ptx::from_binary(arl_kernels::FATBIN.to_vec())).map_err(|error| {
            failed(&format!("the kernels cannot be loaded on {name}"), error)
                .hint("a driver of version 580 or newer is needed; run `arl doctor`")
        })?;
        Ok(GpuDevice {
            staging: Staging::new(&context)?,
            outgoing: Outgoing::new(&context)?,
            outgoing_failure: None,
            products: Products::new(&context)?,
            attention: Library::new(capability),
            clock: Clock::default(),
            multiprocessors: count.max(1) as usize,
            name,
            context,
            streams,
            events: Vec::new(),
            module,
            functions: HashMap::new(),
            pools: HashMap::new(),
            failure: None,
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

    /// The address of a buffer, of the device or of pinned host memory.
    fn address(&self, buffer: Buffer) -> u64 {
        address_in(&self.pools, buffer)
    }

    /// Waits for all streams.
    fn synchronize(&self) -> Result<()> {
        for stream in &self.streams {
            stream.synchronize().map_err(|error| failed("the device stopped", error))?;
        }
        Ok(())
    }

    /// A kernel by its name, allowed the shared memory of this launch.
    fn function(&mut self, launch: &Launch<'_>) -> Result<CudaFunction> {
        let missing = |error| failed(&format!("kernel {}", launch.kernel), error);
        let (function, allowed) = match self.functions.get(launch.kernel) {
            Some((function, allowed)) => (function.clone(), *allowed),
            None => (self.module.load_function(launch.kernel).map_err(missing)?, USUAL_SHARED_BYTES),
        };
        if launch.shared_bytes > allowed {
            let most = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function.set_attribute(most, launch.shared_bytes as i32).map_err(missing)?;
        }
        self.functions.insert(launch.kernel, (function.clone(), allowed.max(launch.shared_bytes)));
        Ok(function)
    }

    fn try_launch(&mut self, launch: &Launch<'_>) -> Result<()> {
        let function = self.function(launch)?;
        let mut words: Vec<[u8; 8]> = launch
            .args
            .iter()
            .map(|arg| match *arg {
                Arg::Read(buffer) | Arg::Write(buffer) | Arg::Update(buffer) => self.address(buffer).to_ne_bytes(),
                Arg::Null => [0; 8],
                Arg::Long(value) => value.to_ne_bytes(),
                Arg::Int(value) => u64::from(value as u32).to_ne_bytes(),
                Arg::Float(value) => u64::from(value.to_bits()).to_ne_bytes(),
            })
            .collect();
        let mut params: Vec<*mut c_void> = words.iter_mut().map(|word| word.as_mut_ptr().cast()).collect();
        let [x, y, z] = launch.grid.map(|blocks| blocks as u32);
        // SAFETY: the function is of a module that lives as long as `self`; the arguments are of the kernel's kinds, and its
        // accesses within the buffers, as the kernels' tests on the host prove of every launch of the leaves; the driver
        // copies the arguments before it returns.
        let queued = unsafe {
            result::launch_kernel(
                function.cu_function(),
                (x, y, z),
                (launch.threads as u32, 1, 1),
                launch.shared_bytes as u32,
                self.stream(Stream::Compute).cu_stream(),
                &mut params,
            )
        };
        queued.map_err(|error| failed(&format!("kernel {}", launch.kernel), error))
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
            failed(&format!("cannot allocate {mib} MiB of {place}{available} for the {pool:?} pool"), error)
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
        // SAFETY: the address and length lie within the pool, and no work is queued.
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
            None => self.outgoing.finish(target),
        }
    }

    fn transfer(&mut self, stream: Stream, source: Buffer, target: Buffer) {
        let (from, to) = (self.address(source), self.address(target));
        let queue = self.stream(stream).cu_stream();
        // SAFETY: both lie within their pools, which outlive what is queued; addresses are unified, so that the driver knows
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

    fn zero(&mut self, target: Buffer) {
        let address = self.address(target);
        // SAFETY: the address and length lie within the pool.
        let queued =
            unsafe { result::memset_d8_async(address, 0, target.bytes(), self.stream(Stream::Compute).cu_stream()) };
        self.keep(queued.map_err(|error| failed("zeroing memory", error)));
    }

    fn copy(&mut self, source: Buffer, target: Buffer) {
        assert_eq!(source.bytes(), target.bytes(), "a copy of unlike buffers");
        self.transfer(Stream::Compute, source, target);
    }

    fn launch(&mut self, launch: &Launch<'_>) {
        if launch.grid.contains(&0) || self.failure.is_some() {
            return;
        }
        let result = self.try_launch(launch);
        self.keep(result);
    }

    fn matmul(&mut self, op: &Matmul) {
        if op.m * op.n == 0 || self.failure.is_some() {
            return;
        }
        let addresses = products::Addresses {
            a: self.address(op.a.buffer),
            b: self.address(op.b.buffer),
            c: self.address(op.c.buffer),
            bias: op.bias.map(|bias| self.address(bias)),
        };
        let stream = Arc::clone(self.stream(Stream::Compute));
        let result = self.products.matmul(op, addresses, &stream);
        self.keep(result);
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
        self.keep(result);
    }
}

impl Drop for GpuDevice {
    fn drop(&mut self) {
        // Memory must not go while work is queued on it; a failure has been reported, or concerns nobody any more.
        let _ = self.synchronize();
    }
}
