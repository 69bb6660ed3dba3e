//! What the CUDA leaves need of a device: memory, kernels by name, matrix products, streams. The GPU is one; the host,
//! running the same kernels, is another, and one that only checks the order of things is a third.

use arl_comm::{Collective, Gpus};
use arl_model::{Error, ErrorCode, Result};

use super::packed::{PackedAttention, PackedShape};
use crate::backend::{Buffer, DType, Event, Matmul, MatmulAlgorithms, Pool, Stream};

/// An argument of a kernel. Buffers say how the kernel uses them, so that a device can check it.
#[derive(Clone, Copy, Debug)]
pub enum Arg {
    /// A buffer that is read.
    Read(Buffer),
    /// A buffer that is written, all of it, and not read.
    Write(Buffer),
    /// A buffer that is read and written, or written in part.
    Update(Buffer),
    /// A buffer of which some columns are written, and nothing is read. What is between these counts as written too.
    Columns(Buffer),
    /// A buffer that is left out.
    Null,
    /// `int`.
    Int(i32),
    /// `long long`.
    Long(i64),
    /// `float`.
    Float(f32),
}

/// A kernel on its way to the device.
#[derive(Clone, Copy, Debug)]
pub struct Launch<'a> {
    /// Its name in `crates/arl-kernels/cuda`.
    pub kernel: &'static str,
    /// Blocks.
    pub grid: [usize; 3],
    /// Threads of a block; a multiple of 32.
    pub threads: usize,
    /// Bytes of dynamic shared memory.
    pub shared_bytes: usize,
    /// In the order of the kernel's parameters.
    pub args: &'a [Arg],
}

/// A device that runs what is queued in order. Errors are kept, and reported when something is read.
pub trait Device: Send {
    /// A name for messages.
    fn name(&self) -> String;

    /// Multiprocessors, for the sizes of grids that loop over their work. Results do not depend on it.
    fn multiprocessors(&self) -> usize;

    /// As [`crate::backend::Backend::reserve`].
    fn reserve(&mut self, pool: Pool, bytes: usize) -> Result<()>;

    /// As [`crate::backend::Backend::upload`].
    fn upload(&mut self, source: &[u8], target: Buffer);

    /// As [`crate::backend::Backend::read_back`].
    fn read_back(&mut self, source: Buffer, target: &mut [u8]) -> Result<()>;

    /// As [`crate::backend::Backend::queue_read`].
    fn queue_read(&mut self, sources: &[Buffer]);

    /// As [`crate::backend::Backend::read_arrived`].
    fn read_arrived(&mut self) -> bool {
        true
    }

    /// As [`crate::backend::Backend::finish_read`].
    fn finish_read(&mut self, target: &mut [u8]) -> Result<()>;

    /// As [`crate::backend::Backend::transfer`]; both buffers have the same length in bytes.
    fn transfer(&mut self, stream: Stream, source: Buffer, target: Buffer);

    /// As [`crate::backend::Backend::record`].
    fn record(&mut self, stream: Stream, event: Event);

    /// As [`crate::backend::Backend::wait`].
    fn wait(&mut self, stream: Stream, event: Event);

    /// As [`crate::backend::Backend::discard`].
    fn discard(&mut self, buffer: Buffer) {
        let _ = buffer;
    }

    /// As [`crate::backend::Backend::timestamp`].
    fn timestamp(&mut self) -> bool {
        false
    }

    /// As [`crate::backend::Backend::timestamps`].
    fn timestamps(&mut self) -> Result<Vec<f64>> {
        Ok(Vec::new())
    }

    /// As [`crate::backend::Backend::memory`].
    fn memory(&self) -> Result<Option<(usize, usize)>> {
        Ok(None)
    }

    /// As [`crate::backend::Backend::matmul_algorithms`].
    fn matmul_algorithms(&mut self) -> Option<&mut dyn MatmulAlgorithms> {
        None
    }

    /// Sets every byte to zero.
    fn zero(&mut self, target: Buffer);

    /// Copies bytes within the device; as many as the target has.
    fn copy(&mut self, source: Buffer, target: Buffer);

    /// Queues a kernel. A grid without blocks is nothing to do.
    fn launch(&mut self, launch: &Launch<'_>);

    /// Queues a kernel on a stream. By itself as [`Device::launch`]: for devices that run at once what is queued.
    fn launch_on(&mut self, stream: Stream, launch: &Launch<'_>) {
        let _ = stream;
        self.launch(launch);
    }

    /// Queues a matrix product whose operands `a` and `b` are of one type (`c` is of that type or f32).
    fn matmul(&mut self, op: &Matmul);

    /// Makes a communicator with the devices of the other ranks, which all do the same.
    fn join_ranks(&mut self, gpus: Gpus, rank: usize, size: usize) -> Result<()> {
        let _ = (gpus, rank, size);
        Err(Error::new(ErrorCode::Device, format!("{} exchanges nothing with other devices", self.name())))
    }

    /// Queues an exchange with the devices of the ranks that were joined on [`Stream::Comm`], which has all of them, so that their order
    /// is the same on every rank. What it is to come behind, and what behind it, is for the caller to say by [`Device::record`] and
    /// [`Device::wait`]. Fails where a rank has failed.
    fn start_collective(&mut self, collective: &Collective<Buffer>) -> Result<()> {
        Err(Error::new(ErrorCode::Internal, format!("no rank was joined that {collective:?} is for")))
    }

    /// Makes a communicator with the devices of `members`, some of the ranks that were joined, which all do the same; `rank` is this one.
    fn join_group(&mut self, gpus: Gpus, members: &[usize], rank: usize) -> Result<()> {
        let _ = (gpus, members, rank);
        Err(Error::new(ErrorCode::Device, format!("{} exchanges nothing with other devices", self.name())))
    }

    /// As [`Device::start_collective`], among the ranks of a group, who count by their places in it.
    fn start_collective_among(&mut self, members: &[usize], collective: &Collective<Buffer>) -> Result<()> {
        let message = format!("ranks {members:?} were not joined by themselves that {collective:?} is for");
        Err(Error::new(ErrorCode::Internal, message))
    }

    /// Begins to make the plans that [`Device::plan_attention`] will be asked for, where they take long; does not wait.
    fn expect_attention(&mut self, shape: &PackedShape) {
        let _ = shape;
    }

    /// Whether the device has a library with plans for attention of a shape, in both passes; waits until they are made. Fails
    /// with the reason, in a sentence, and the same for a shape every time.
    fn plan_attention(&mut self, shape: &PackedShape) -> std::result::Result<(), String> {
        let _ = shape;
        Err("this device has no library for attention".into())
    }

    /// Queues one pass of attention by the library, which has a plan for it.
    fn packed_attention(&mut self, pass: &PackedAttention) {
        unreachable!("{pass:?} without a plan");
    }
}

/// The name of a kernel for a type of activations: `kernel!(dtype, "add")` is `add_f32`, `add_bf16` or `add_f16`.
macro_rules! kernel {
    ($dtype:expr, $name:literal) => {
        match $dtype {
            $crate::backend::DType::F32 => concat!($name, "_f32"),
            $crate::backend::DType::Bf16 => concat!($name, "_bf16"),
            $crate::backend::DType::F16 => concat!($name, "_f16"),
            other => unreachable!("activations and weights are f32, bf16 or f16, not {other:?}"),
        }
    };
}
pub(super) use kernel;

/// A size as a kernel's `int`. Sizes come from shapes that were planned; those that may be greater are `long long`.
pub(super) fn int(size: usize) -> Arg {
    assert!(i32::try_from(size).is_ok(), "{size} is no int");
    Arg::Int(size as i32)
}

/// A size as a kernel's `long long`.
pub(super) fn long(size: usize) -> Arg {
    Arg::Long(size as i64)
}

/// A buffer that may be left out, read where it is there.
pub(super) fn read_or_null(buffer: Option<Buffer>) -> Arg {
    buffer.map_or(Arg::Null, Arg::Read)
}

/// The first `len` elements of `dtype` of the leaf's scratch.
pub(super) fn scratch_of(scratch: Buffer, dtype: DType, len: usize) -> Buffer {
    assert!(len * dtype.bytes() <= scratch.bytes(), "{len} of {dtype:?} in a scratch of {} bytes", scratch.bytes());
    Buffer { dtype, len, ..scratch }
}
