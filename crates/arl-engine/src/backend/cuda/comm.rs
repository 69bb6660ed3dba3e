//! Ranks on CUDA devices: buffers go from device to device, and sums are a kernel's, all of it on a stream of its own. Kernels:
//! `cuda/ranks.cu`.

use arl_comm::{Collective, Group, ID_BYTES};
use arl_kernels::constants::ranks::{BLOCK, THREADS};
use arl_model::Result;

use super::CudaBackend;
use super::device::{Arg, Device, Launch, int, long, scratch_of};
use crate::backend::comm::{self, Collectives, EXCHANGED, Part};
use crate::backend::{Buffer, DType, Pool, Stream};
use crate::events::IN_LINE;

/// Bytes of what each rank gives at most.
const ROW: usize = EXCHANGED * size_of::<f32>();

/// Elements that a block of the sum over ranks takes.
const STEP: usize = 4 * THREADS;

/// Bytes of [`Pool::Exchange`] on each of so many ranks: the parts of all of them.
pub(crate) fn exchange_bytes(ranks: usize) -> usize {
    if ranks > 1 { ranks * ROW } else { 0 }
}

/// Bytes from `offset` on of the memory that other ranks' parts come to.
fn staged(offset: usize, bytes: usize) -> Buffer {
    Buffer { pool: Pool::Exchange, offset, len: bytes, dtype: DType::U8 }
}

/// Whether ranks have no way from device to device.
fn by_host(group: &dyn Group) -> bool {
    group.size() > 1 && group.gpus().is_none()
}

impl<D: Device> Collectives for CudaBackend<D> {
    fn join_ranks(&mut self, group: &dyn Group) -> Result<()> {
        let Some(gpus) = group.gpus() else { return Ok(()) };
        self.device.reserve(Pool::Exchange, exchange_bytes(group.size()))?;
        self.device.join_ranks(gpus.clone(), group.rank(), group.size())
    }

    fn join_groups(&mut self, group: &dyn Group, groups: &[Vec<usize>]) -> Result<()> {
        let Some(gpus) = group.gpus() else { return Ok(()) };
        for members in groups {
            let first = members.first().copied().unwrap_or_default();
            // Each group's first rank makes its id; what the others give is of no use.
            let own = if group.rank() == first { gpus.nccl.unique_id()? } else { [0; ID_BYTES] };
            let mut ids = vec![0; group.size() * ID_BYTES];
            group.all_gather(&own, &mut ids)?;
            let mut of_group = gpus.clone();
            of_group.id.copy_from_slice(&ids[first * ID_BYTES..][..ID_BYTES]);
            self.device.join_group(of_group, members, group.rank())?;
        }
        Ok(())
    }

    fn exchange_sum(&mut self, group: &dyn Group, parts: &[Buffer], sum: Buffer) -> Result<()> {
        if by_host(group) {
            return comm::exchange_sum(self, group, parts, sum);
        }
        self.in_line(|backend| backend.queue_sum(group, parts, sum))
    }

    fn start_exchange_sum(&mut self, group: &dyn Group, parts: &[Buffer], sum: Buffer) -> Result<()> {
        if by_host(group) {
            return comm::exchange_sum(self, group, parts, sum);
        }
        self.queue_sum(group, parts, sum)
    }

    fn all_gather(&mut self, group: &dyn Group, bytes: usize, own: &[Part], all: &[Vec<Part>]) -> Result<()> {
        if by_host(group) {
            return comm::all_gather(self, group, bytes, own, all);
        }
        self.in_line(|backend| backend.queue_all_gather(group, bytes, own, all))
    }

    fn start_all_gather(&mut self, group: &dyn Group, bytes: usize, own: &[Part], all: &[Vec<Part>]) -> Result<()> {
        if by_host(group) {
            return comm::all_gather(self, group, bytes, own, all);
        }
        self.queue_all_gather(group, bytes, own, all)
    }

    fn gather(&mut self, group: &dyn Group, own: Buffer, all: Buffer) -> Result<()> {
        if by_host(group) {
            return comm::gather(self, group, own, all);
        }
        self.in_line(|backend| backend.queue_gather(group, own, all))
    }

    fn start_gather(&mut self, group: &dyn Group, own: Buffer, all: Buffer) -> Result<()> {
        if by_host(group) {
            return comm::gather(self, group, own, all);
        }
        self.queue_gather(group, own, all)
    }

    fn exchange(&mut self, group: &dyn Group, sends: &[Vec<Buffer>], receives: &[Vec<Buffer>]) -> Result<()> {
        if by_host(group) {
            return comm::exchange(self, group, sends, receives);
        }
        self.in_line(|backend| backend.queue_exchange(group, sends, receives))
    }

    fn block_squares(&mut self, a: Buffer, tail: &[f32]) -> Result<Vec<f64>> {
        // The block that `tail` completes is put together in front of the sums.
        let block = scratch_of(self.scratch, DType::F32, BLOCK);
        let sums = self.scratch.slice(BLOCK, (self.scratch.len - BLOCK) / 2 * 2).view(DType::F64);
        let whole = if tail.is_empty() { a.len } else { a.len / BLOCK * BLOCK };
        let mut squares = Vec::with_capacity(whole.div_ceil(BLOCK) + 1);
        for start in (0..whole).step_by(sums.len * BLOCK) {
            let part = a.slice(start, (sums.len * BLOCK).min(whole - start));
            squares.extend(self.squares_of(part, sums)?);
        }
        if !tail.is_empty() {
            let rest = a.len - whole;
            if rest > 0 {
                self.device.copy(a.slice(whole, rest), block.slice(0, rest));
            }
            self.device.upload(bytemuck::cast_slice(tail), block.slice(rest, tail.len()));
            squares.extend(self.squares_of(block.slice(0, rest + tail.len()), sums)?);
        }
        Ok(squares)
    }
}

impl<D: Device> CudaBackend<D> {
    /// Has what `work` queues on [`Stream::Comm`] come behind the leaves so far, and in front of those that follow.
    fn in_line(&mut self, work: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        let [begun, done] = IN_LINE;
        self.device.record(Stream::Compute, begun);
        self.device.wait(Stream::Comm, begun);
        work(self)?;
        self.device.record(Stream::Comm, done);
        self.device.wait(Stream::Compute, done);
        Ok(())
    }

    /// Queues what the ranks of a group do on [`Stream::Comm`], who may be some of those that were joined.
    fn among(&mut self, group: &dyn Group, collective: &Collective<Buffer>) -> Result<()> {
        match group.members() {
            None => self.device.start_collective(collective),
            Some(members) => self.device.start_collective_among(members, collective),
        }
    }

    /// [`Collectives::exchange_sum`] on [`Stream::Comm`], the sum too: the memory that parts come to is of use again without a wait
    /// of either stream for the other.
    fn queue_sum(&mut self, group: &dyn Group, parts: &[Buffer], sum: Buffer) -> Result<()> {
        let (rank, size) = (group.rank(), group.size());
        assert!(parts.iter().all(|part| part.len <= EXCHANGED) && sum.len == parts[rank].len, "parts of a sum");
        let others = || (0..size).filter(|&other| other != rank);
        let came = |from: usize| staged(from * sum.bytes(), sum.bytes()).view(DType::F32);
        if size > 1 {
            let sends = others().map(|to| (to, parts[to])).collect();
            let receives = others().map(|from| (from, came(from))).collect();
            self.among(group, &Collective::Exchange { sends, receives })?;
        }
        if sum.len > 0 {
            // Every rank's, this one's place not written: the kernel reads it where it is.
            let all = Buffer { len: size * sum.len, ..staged(0, 0).view(DType::F32) };
            let [before, behind] =
                [all.slice(0, rank * sum.len), all.slice((rank + 1) * sum.len, (size - rank - 1) * sum.len)];
            let read = |buffer: Buffer| if buffer.len == 0 { Arg::Null } else { Arg::Read(buffer) };
            let launch = Launch {
                kernel: "sum_ranks",
                grid: [sum.len.div_ceil(STEP), 1, 1],
                threads: THREADS,
                shared_bytes: 0,
                args: &[
                    Arg::Update(sum),
                    read(before),
                    Arg::Read(parts[rank]),
                    read(behind),
                    int(rank),
                    int(size - rank - 1),
                    long(sum.len),
                ],
            };
            self.device.launch_on(Stream::Comm, &launch);
        }
        Ok(())
    }

    /// [`Collectives::all_gather`] on [`Stream::Comm`].
    fn queue_all_gather(&mut self, group: &dyn Group, bytes: usize, own: &[Part], all: &[Vec<Part>]) -> Result<()> {
        let (rank, size) = (group.rank(), group.size());
        if size == 1 {
            for (given, part) in own.iter().zip(&all[0]).filter(|(given, part)| given != part) {
                assert_eq!(given.at, part.at, "parts of a rank that is alone");
                self.device.transfer(Stream::Comm, given.buffer.slice(0, part.buffer.len), part.buffer);
            }
            return Ok(());
        }
        assert!(bytes <= ROW, "{bytes} bytes of a rank at once");
        let place = |of: usize, part: &Part| staged(of * bytes + part.at, part.buffer.bytes());
        for part in own.iter().filter(|part| part.buffer.len > 0) {
            self.device.transfer(Stream::Comm, part.buffer.view(DType::U8), place(rank, part));
        }
        let (source, target) = (staged(rank * bytes, bytes), staged(0, size * bytes));
        self.among(group, &Collective::AllGather { source, target })?;
        for (of, parts) in all.iter().enumerate() {
            for part in parts.iter().filter(|part| part.buffer.len > 0 && !own.contains(part)) {
                self.device.transfer(Stream::Comm, place(of, part), part.buffer.view(DType::U8));
            }
        }
        Ok(())
    }

    /// [`Collectives::gather`] on [`Stream::Comm`].
    fn queue_gather(&mut self, group: &dyn Group, own: Buffer, all: Buffer) -> Result<()> {
        let size = group.size();
        assert_eq!(all.bytes(), size * own.bytes(), "what {size} ranks gather");
        if own.len == 0 || (size == 1 && own == all) {
            return Ok(());
        }
        if size == 1 {
            self.device.transfer(Stream::Comm, own, all);
            return Ok(());
        }
        self.among(group, &Collective::AllGather { source: own, target: all })
    }

    /// [`Collectives::exchange`] on [`Stream::Comm`].
    fn queue_exchange(&mut self, group: &dyn Group, sends: &[Vec<Buffer>], receives: &[Vec<Buffer>]) -> Result<()> {
        let rank = group.rank();
        for (own, place) in sends[rank].iter().zip(&receives[rank]).filter(|(own, _)| own.len > 0) {
            self.device.transfer(Stream::Comm, *own, *place);
        }
        let of_others = |all: &[Vec<Buffer>]| -> Vec<(usize, Buffer)> {
            let others = all.iter().enumerate().filter(|(other, _)| *other != rank);
            let each = others.flat_map(|(other, parts)| parts.iter().map(move |part| (other, *part)));
            each.filter(|(_, part)| part.len > 0).collect()
        };
        let (sends, receives) = (of_others(sends), of_others(receives));
        if sends.is_empty() && receives.is_empty() {
            return Ok(());
        }
        self.among(group, &Collective::Exchange { sends, receives })
    }

    fn squares_of(&mut self, a: Buffer, sums: Buffer) -> Result<Vec<f64>> {
        let sums = sums.slice(0, a.len.div_ceil(BLOCK));
        self.device.launch(&Launch {
            kernel: "block_squares",
            grid: [sums.len, 1, 1],
            threads: THREADS,
            shared_bytes: 0,
            args: &[Arg::Read(a), Arg::Write(sums), long(a.len)],
        });
        let mut host = vec![0f64; sums.len];
        self.device.read_back(sums, bytemuck::cast_slice_mut(&mut host))?;
        Ok(host)
    }
}
