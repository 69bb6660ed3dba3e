//! A device that is the host: kernels run as fibers, memory and matrix products are those of the CPU backend.

use std::cell::Cell;
use std::collections::BTreeSet;

use arl_comm::{Collective, Communicator, Gpus, Groups, Place};
use arl_kernels::emulation::{self, Element, Shape, Value};
use arl_model::{Error, ErrorCode, Result};

use super::device::{Arg, Device, Launch};
use super::emulated_library;
use super::packed::{PackedAttention, PackedShape};
use crate::backend::cpu::CpuBackend;
use crate::backend::{Backend, Buffer, DType, Event, Matmul, MatmulAlgorithms, Pool, Stream};

thread_local! {
    static DEVICES: Cell<u32> = const { Cell::new(0) };
}

/// Runs kernels as soon as they are queued. For tests and rehearsals: it is thousands of times slower than a GPU.
pub struct EmulatedDevice {
    memory: CpuBackend,
    launches: u32,
    /// The kernels that ran.
    pub(super) ran: BTreeSet<&'static str>,
    /// Whether there is a library for attention, and what it has a plan for.
    pub(super) library: Option<fn(&PackedShape) -> bool>,
    /// Passes that the library computed.
    pub(super) packed_passes: usize,
    /// A choice of algorithms, which changes no number here.
    pub(super) algorithms: Option<Box<dyn MatmulAlgorithms + Send>>,
    /// The other ranks' devices.
    communicator: Option<Communicator>,
    groups: Groups,
}

impl Default for EmulatedDevice {
    /// Each device of a test begins with another order of threads, so that a kernel meets them all.
    fn default() -> Self {
        EmulatedDevice {
            memory: CpuBackend::default(),
            launches: DEVICES.replace(DEVICES.get() + 1),
            ran: BTreeSet::new(),
            library: None,
            packed_passes: 0,
            algorithms: None,
            communicator: None,
            groups: Groups::default(),
        }
    }
}

impl EmulatedDevice {
    /// A device with a library for attention, in plain loops, which has a plan for every shape.
    pub fn with_library() -> Self {
        EmulatedDevice { library: Some(|_| true), ..EmulatedDevice::default() }
    }

    fn places(&mut self, collective: &Collective<Buffer>) -> Collective {
        let memory = std::cell::RefCell::new(&mut self.memory);
        collective.map(|buffer| Place {
            address: memory.borrow_mut().address(buffer).expose_provenance() as u64,
            bytes: buffer.bytes(),
        })
    }

    fn value(&mut self, arg: Arg) -> Value {
        let (buffer, written) = match arg {
            Arg::Int(value) => return Value::I32(value),
            Arg::Long(value) => return Value::I64(value),
            Arg::Float(value) => return Value::F32(value),
            Arg::Null => return Value::Pointer { address: std::ptr::null_mut(), element: None, written: false },
            Arg::Read(buffer) => (buffer, false),
            Arg::Write(buffer) | Arg::Update(buffer) | Arg::Columns(buffer) => (buffer, true),
        };
        let element = match buffer.dtype {
            DType::F32 => Element::F32,
            DType::Bf16 => Element::Bf16,
            DType::F16 => Element::F16,
            DType::F64 => Element::F64,
            DType::I32 => Element::I32,
            DType::U16 => Element::U16,
            DType::U8 => Element::U8,
        };
        Value::Pointer { address: self.memory.address(buffer), element: Some(element), written }
    }
}

impl Device for EmulatedDevice {
    fn name(&self) -> String {
        "kernels on the host".into()
    }

    fn multiprocessors(&self) -> usize {
        3
    }

    fn matmul_algorithms(&mut self) -> Option<&mut dyn MatmulAlgorithms> {
        self.algorithms.as_deref_mut().map(|algorithms| algorithms as _)
    }

    fn reserve(&mut self, pool: Pool, bytes: usize) -> Result<()> {
        self.memory.reserve(pool, bytes)
    }

    fn upload(&mut self, source: &[u8], target: Buffer) {
        self.memory.upload(source, target);
    }

    fn read_back(&mut self, source: Buffer, target: &mut [u8]) -> Result<()> {
        self.memory.read_back(source, target)
    }

    fn queue_read(&mut self, sources: &[Buffer]) {
        self.memory.queue_read(sources);
    }

    fn finish_read(&mut self, target: &mut [u8]) -> Result<()> {
        self.memory.finish_read(target)
    }

    fn transfer(&mut self, stream: Stream, source: Buffer, target: Buffer) {
        self.memory.transfer(stream, source, target);
    }

    fn record(&mut self, _stream: Stream, _event: Event) {}

    fn wait(&mut self, _stream: Stream, _event: Event) {}

    fn discard(&mut self, buffer: Buffer) {
        // What reads it all the same gets NaN, or -1.
        self.memory.upload(&vec![0xff; buffer.bytes()], buffer);
    }

    fn zero(&mut self, target: Buffer) {
        self.memory.zero(target);
    }

    fn copy(&mut self, source: Buffer, target: Buffer) {
        self.memory.copy(source, target);
    }

    fn launch(&mut self, launch: &Launch<'_>) {
        let grid = launch.grid.map(|blocks| blocks as u32);
        if grid.contains(&0) {
            return;
        }
        assert!(grid[1] <= 65_535 && grid[2] <= 65_535, "{}: a grid of {grid:?}", launch.kernel);
        // What a GPU since 8.0 has for one block (8.6 and 8.9 have the least).
        assert!(launch.shared_bytes <= 99 << 10, "{}: {} bytes of shared memory", launch.kernel, launch.shared_bytes);
        self.launches += 1;
        self.ran.insert(launch.kernel);
        let args: Vec<Value> = launch.args.iter().map(|arg| self.value(*arg)).collect();
        let threads = [launch.threads as u32, 1, 1];
        let shape = Shape { grid, threads, shared_bytes: launch.shared_bytes };
        // SAFETY: every address was just checked to be, with its length, within a pool that lives as long as `self`, and
        // `&mut self` is the only way to it; kernels stay within what the launch says, which their tests are about.
        let result = unsafe { emulation::launch(launch.kernel, shape, &args, self.launches % 4) };
        assert_eq!(result, Ok(()));
    }

    fn matmul(&mut self, op: &Matmul) {
        self.memory.matmul(op);
    }

    fn join_ranks(&mut self, gpus: Gpus, rank: usize, size: usize) -> Result<()> {
        self.communicator = Some(Communicator::new(gpus, rank, size)?);
        Ok(())
    }

    fn start_collective(&mut self, collective: &Collective<Buffer>) -> Result<()> {
        let places = self.places(collective);
        let joined = self.communicator.as_mut();
        let joined = joined.ok_or_else(|| Error::new(ErrorCode::Internal, "no rank was joined"))?;
        // SAFETY: the places are within pools that live as long as `self`; the library of tests moves the bytes before it returns.
        unsafe { joined.queue(&places, std::ptr::null_mut()) }
    }

    fn join_group(&mut self, gpus: Gpus, members: &[usize], rank: usize) -> Result<()> {
        self.groups.join(gpus, members, rank)
    }

    fn start_collective_among(&mut self, members: &[usize], collective: &Collective<Buffer>) -> Result<()> {
        let places = self.places(collective);
        // SAFETY: as of all ranks.
        unsafe { self.groups.of(members)?.queue(&places, std::ptr::null_mut()) }
    }

    fn plan_attention(&mut self, shape: &PackedShape) -> std::result::Result<(), String> {
        match self.library {
            None => Err("no library".into()),
            Some(has_plan) if has_plan(shape) => Ok(()),
            Some(_) => Err("no plan".into()),
        }
    }

    fn packed_attention(&mut self, pass: &PackedAttention) {
        self.packed_passes += 1;
        emulated_library::run(&mut self.memory, pass);
    }
}
