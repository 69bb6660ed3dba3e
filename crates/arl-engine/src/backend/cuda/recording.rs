//! A device that checks the order of things: that nothing is read before it was written, and that no two streams touch
//! the same bytes, one of them writing, without an event between. It computes what the device that it wraps computes.
//!
//! Each stream has a clock that counts what was queued on it, and knows of the others' clocks what it learned from events. A write
//! is visible on a stream whose knowledge of the writer's clock has reached it.

#[path = "no_device.rs"]
mod no_device;

use std::collections::{BTreeMap, HashMap};

use arl_comm::{Collective, Gpus};
use arl_model::Result;

pub(super) use self::no_device::NoDevice;
use super::device::{Arg, Device, Launch};
use super::packed::{PackedAttention, PackedShape};
use crate::backend::{Buffer, Event, Matmul, Pool, Stream};

/// What one stream knows of all streams' clocks.
type Clocks = [u64; Stream::ALL.len()];

/// What happened last to a run of bytes.
#[derive(Clone, Debug, Default, PartialEq)]
struct Bytes {
    /// The stream that wrote them and its clock then; `None`: they hold nothing.
    written: Option<(usize, u64)>,
    /// The last read by each stream since then.
    read: Clocks,
}

/// The bytes of a pool as runs that share their past: first byte, and what is true up to the next entry.
type Runs = BTreeMap<usize, Bytes>;

/// Wraps a device.
pub(super) struct RecordingDevice<D> {
    inner: D,
    clocks: [Clocks; Stream::ALL.len()],
    events: HashMap<u32, Clocks>,
    pools: HashMap<Pool, Runs>,
    /// Bytes that came from the host's own memory.
    pub(super) uploaded: usize,
    /// Copies that were queued on streams besides that of the leaves.
    pub(super) transfers: usize,
    /// Waits that were queued for events that had been recorded.
    pub(super) waits: usize,
    /// The numbers of those from which a stream learned something, counted from 1.
    pub(super) telling: Vec<usize>,
    /// Exchanges with other ranks' devices.
    pub(super) collectives: usize,
    /// The kernels, in the order in which they were queued.
    pub(super) kernels: Vec<&'static str>,
    /// Blocks of each kernel.
    pub(super) blocks: HashMap<&'static str, usize>,
    /// Shapes of attention that were announced, each with the number of kernels before it.
    pub(super) expected: Vec<(usize, PackedShape)>,
    /// Those that were asked for, likewise.
    pub(super) planned: Vec<(usize, PackedShape)>,
    /// Times that the host waited for the device, or a device would have made it wait.
    pub(super) host_waits: usize,
    /// Whether something is on its way to the host.
    reading: bool,
    /// Free memory that it reports.
    pub(super) free: Option<usize>,
    /// The number of a wait to leave out, counted from 1: what is then wrong must be found.
    pub(super) forgotten: usize,
    /// What is wrong, in the order in which it was queued.
    pub(super) faults: Vec<String>,
}

impl<D: Device> RecordingDevice<D> {
    pub(super) fn new(inner: D) -> Self {
        RecordingDevice {
            inner,
            clocks: [[1; Stream::ALL.len()]; Stream::ALL.len()],
            events: HashMap::new(),
            pools: HashMap::new(),
            uploaded: 0,
            transfers: 0,
            waits: 0,
            telling: Vec::new(),
            collectives: 0,
            kernels: Vec::new(),
            blocks: HashMap::new(),
            expected: Vec::new(),
            planned: Vec::new(),
            host_waits: 0,
            reading: false,
            free: None,
            forgotten: 0,
            faults: Vec::new(),
        }
    }

    /// The runs of a pool that `buffer` covers, cut at its ends.
    fn cut(&mut self, buffer: Buffer) -> (std::ops::Range<usize>, &mut Runs) {
        let runs = self.pools.entry(buffer.pool).or_default();
        let range = buffer.offset..buffer.offset + buffer.bytes();
        for at in [range.start, range.end] {
            let before = runs.range(..=at).next_back().map(|(_, bytes)| bytes.clone()).unwrap_or_default();
            runs.entry(at).or_insert(before);
        }
        (range, runs)
    }

    fn fault(&mut self, what: &str, operation: &str, stream: Stream, buffer: Buffer) {
        if self.faults.len() < 20 {
            self.faults.push(format!("{operation} on {stream:?} {what}: {buffer:?}"));
        }
    }

    fn read(&mut self, operation: &str, stream: Stream, buffer: Buffer) {
        let number = stream as usize;
        let known = self.clocks[number];
        let (range, runs) = self.cut(buffer);
        let (mut unwritten, mut unordered) = (false, false);
        for (_, bytes) in runs.range_mut(range) {
            match bytes.written {
                None => unwritten = true,
                Some((writer, clock)) => unordered |= known[writer] < clock,
            }
            bytes.read[number] = known[number];
        }
        if unwritten {
            self.fault("reads what was not written", operation, stream, buffer);
        }
        if unordered {
            self.fault("reads what another stream may not have written yet", operation, stream, buffer);
        }
    }

    fn write(&mut self, operation: &str, stream: Stream, buffer: Buffer) {
        let number = stream as usize;
        let known = self.clocks[number];
        let (range, runs) = self.cut(buffer);
        let (mut before_write, mut before_read) = (false, false);
        for (_, bytes) in runs.range_mut(range) {
            before_write |= bytes.written.is_some_and(|(writer, clock)| known[writer] < clock);
            before_read |= bytes.read.iter().zip(known).any(|(read, known)| *read > known);
            *bytes = Bytes { written: Some((number, known[number])), read: Clocks::default() };
        }
        if before_write {
            self.fault("writes what another stream may still write", operation, stream, buffer);
        }
        if before_read {
            self.fault("overwrites what another stream may still read", operation, stream, buffer);
        }
    }

    /// Notes an exchange with other ranks' devices.
    fn exchanges(&mut self, collective: &Collective<Buffer>) {
        self.queue(Stream::Comm);
        let (read, written) = collective.uses();
        read.into_iter().for_each(|buffer| self.read("collective", Stream::Comm, buffer));
        written.into_iter().for_each(|buffer| self.write("collective", Stream::Comm, buffer));
        self.collectives += 1;
    }

    fn queue(&mut self, stream: Stream) {
        self.clocks[stream as usize][stream as usize] += 1;
    }

    /// All that was queued is done, and known to all.
    fn wait_for_all(&mut self) {
        self.host_waits += 1;
        let now = std::array::from_fn(|i| self.clocks[i][i]);
        self.clocks = [now; Stream::ALL.len()];
    }
}

impl<D: Device> Device for RecordingDevice<D> {
    fn name(&self) -> String {
        self.inner.name()
    }

    fn multiprocessors(&self) -> usize {
        self.inner.multiprocessors()
    }

    fn reserve(&mut self, pool: Pool, bytes: usize) -> Result<()> {
        self.wait_for_all();
        // Memory comes zeroed; of a run's state every byte is one that was written.
        let written = matches!(pool, Pool::State | Pool::HostState | Pool::Exchange).then_some((0, 0));
        self.pools.insert(pool, BTreeMap::from([(0, Bytes { written, read: Clocks::default() })]));
        self.inner.reserve(pool, bytes)
    }

    fn upload(&mut self, source: &[u8], target: Buffer) {
        self.uploaded += source.len();
        let host = matches!(target.pool, Pool::HostState | Pool::HostStep);
        if host {
            self.wait_for_all();
        }
        self.queue(Stream::Compute);
        self.write("upload", Stream::Compute, target);
        if host {
            // The host has written it before it queues anything else.
            self.wait_for_all();
        }
        self.inner.upload(source, target);
    }

    fn read_back(&mut self, source: Buffer, target: &mut [u8]) -> Result<()> {
        self.wait_for_all();
        self.read("read_back", Stream::Compute, source);
        self.inner.read_back(source, target)
    }

    fn queue_read(&mut self, sources: &[Buffer]) {
        if std::mem::replace(&mut self.reading, true) {
            self.faults.push("queue_read overwrites what the host has not read yet".into());
        }
        self.queue(Stream::Compute);
        for source in sources {
            self.read("queue_read", Stream::Compute, *source);
        }
        self.inner.queue_read(sources);
    }

    fn read_arrived(&mut self) -> bool {
        self.inner.read_arrived()
    }

    fn finish_read(&mut self, target: &mut [u8]) -> Result<()> {
        // What the host learns of the device, no stream learns.
        self.host_waits += 1;
        if !std::mem::replace(&mut self.reading, false) {
            self.faults.push("finish_read without a queue_read".into());
        }
        self.inner.finish_read(target)
    }

    fn transfer(&mut self, stream: Stream, source: Buffer, target: Buffer) {
        self.transfers += 1;
        self.queue(stream);
        self.read("transfer", stream, source);
        self.write("transfer", stream, target);
        self.inner.transfer(stream, source, target);
    }

    fn record(&mut self, stream: Stream, event: Event) {
        self.events.insert(event.0, self.clocks[stream as usize]);
        self.inner.record(stream, event);
    }

    fn wait(&mut self, stream: Stream, event: Event) {
        // As on a GPU, an event that was never recorded is not waited for.
        if let Some(told) = self.events.get(&event.0) {
            self.waits += 1;
            if self.waits == self.forgotten {
                return;
            }
            let known = &mut self.clocks[stream as usize];
            if known.iter().zip(told).any(|(known, told)| known < told) {
                self.telling.push(self.waits);
            }
            for (known, told) in known.iter_mut().zip(told) {
                *known = (*known).max(*told);
            }
        }
        self.inner.wait(stream, event);
    }

    fn discard(&mut self, buffer: Buffer) {
        let (range, runs) = self.cut(buffer);
        for (_, bytes) in runs.range_mut(range) {
            // Who reads or writes it still is to be waited for by the next writer.
            if let Some((writer, clock)) = bytes.written.take() {
                bytes.read[writer] = bytes.read[writer].max(clock);
            }
        }
    }

    fn memory(&self) -> Result<Option<(usize, usize)>> {
        Ok(self.free.map(|free| (free, free)))
    }

    fn zero(&mut self, target: Buffer) {
        self.queue(Stream::Compute);
        self.write("zero", Stream::Compute, target);
        self.inner.zero(target);
    }

    fn copy(&mut self, source: Buffer, target: Buffer) {
        self.queue(Stream::Compute);
        self.read("copy", Stream::Compute, source);
        self.write("copy", Stream::Compute, target);
        self.inner.copy(source, target);
    }

    fn launch(&mut self, launch: &Launch<'_>) {
        self.launch_on(Stream::Compute, launch);
    }

    fn launch_on(&mut self, stream: Stream, launch: &Launch<'_>) {
        if launch.grid.contains(&0) {
            return;
        }
        self.queue(stream);
        self.kernels.push(launch.kernel);
        *self.blocks.entry(launch.kernel).or_default() += launch.grid.iter().product::<usize>();
        for arg in launch.args {
            if let Arg::Read(buffer) | Arg::Update(buffer) = *arg {
                self.read(launch.kernel, stream, buffer);
            }
        }
        for arg in launch.args {
            if let Arg::Write(buffer) | Arg::Update(buffer) | Arg::Columns(buffer) = *arg {
                self.write(launch.kernel, stream, buffer);
            }
        }
        self.inner.launch_on(stream, launch);
    }

    fn matmul(&mut self, op: &Matmul) {
        self.queue(Stream::Compute);
        let read = [Some(op.a.buffer), Some(op.b.buffer), op.bias, op.accumulate.then_some(op.c.buffer)];
        for buffer in read.into_iter().flatten() {
            self.read("matmul", Stream::Compute, buffer);
        }
        self.write("matmul", Stream::Compute, op.c.buffer);
        self.inner.matmul(op);
    }

    fn join_ranks(&mut self, gpus: Gpus, rank: usize, size: usize) -> Result<()> {
        self.inner.join_ranks(gpus, rank, size)
    }

    fn start_collective(&mut self, collective: &Collective<Buffer>) -> Result<()> {
        self.exchanges(collective);
        self.inner.start_collective(collective)
    }

    fn join_group(&mut self, gpus: Gpus, members: &[usize], rank: usize) -> Result<()> {
        self.inner.join_group(gpus, members, rank)
    }

    fn start_collective_among(&mut self, members: &[usize], collective: &Collective<Buffer>) -> Result<()> {
        self.exchanges(collective);
        self.inner.start_collective_among(members, collective)
    }

    fn expect_attention(&mut self, shape: &PackedShape) {
        self.expected.push((self.kernels.len(), *shape));
        self.inner.expect_attention(shape);
    }

    fn plan_attention(&mut self, shape: &PackedShape) -> std::result::Result<(), String> {
        self.planned.push((self.kernels.len(), *shape));
        self.inner.plan_attention(shape)
    }

    fn packed_attention(&mut self, pass: &PackedAttention) {
        self.queue(Stream::Compute);
        let (read, written) = pass.uses();
        for buffer in read {
            self.read("packed_attention", Stream::Compute, buffer);
        }
        for buffer in written {
            self.write("packed_attention", Stream::Compute, buffer);
        }
        self.inner.packed_attention(pass);
    }
}

#[cfg(test)]
#[path = "recording_tests.rs"]
mod tests;
