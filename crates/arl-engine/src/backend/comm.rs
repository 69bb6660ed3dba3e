//! What ranks do with buffers of their devices. Bytes are moved by whatever the device has for it; every sum is made here, in the
//! order of the ranks. May import what leaves work on.

use arl_comm::{Group, add_parts};
use arl_model::Result;

use super::{Backend, Buffer};

/// Elements of each rank's part that [`Collectives::exchange_sum`] takes at a time, and of four bytes each the most that
/// [`Collectives::all_gather`] does.
pub const EXCHANGED: usize = 1 << 20;

/// A buffer whose bytes are some of what a rank gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Where they are on this device.
    pub buffer: Buffer,
    /// The first one's place in what is given.
    pub at: usize,
}

/// Exchange between the devices of ranks. All ranks call the same, in the same order.
pub trait Collectives {
    /// Has the devices of the ranks of `group` exchange buffers with this one from here on, if they can; else they go through
    /// host memory. Reserves what is needed for it.
    fn join_ranks(&mut self, group: &dyn Group) -> Result<()>;

    /// Has the devices of the ranks of each of `groups` exchange buffers without the rest of `group`, which was joined before. This
    /// rank is one of each, by its number in `group`; every rank names as many, and those of one place in the list divide all ranks.
    fn join_groups(&mut self, group: &dyn Group, groups: &[Vec<usize>]) -> Result<()>;

    /// `sum = ((sum + part of rank 0) + part of rank 1) + ...`, element by element, all f32. `parts[r]` is what this rank has for
    /// rank `r`, at most [`EXCHANGED`] elements; what all have for this one is as long as `sum`.
    fn exchange_sum(&mut self, group: &dyn Group, parts: &[Buffer], sum: Buffer) -> Result<()>;

    /// Each rank gives `bytes` bytes, at most four times [`EXCHANGED`], of which `own` are this one's; bytes that are in no part
    /// are of no use. `all[r]` become what rank `r` gives; a buffer that this rank gives from may be among its own there.
    fn all_gather(&mut self, group: &dyn Group, bytes: usize, own: &[Part], all: &[Vec<Part>]) -> Result<()>;

    /// `all` becomes the `own` of every rank, in their order; these are equally long, and `own` may be its place there.
    fn gather(&mut self, group: &dyn Group, own: Buffer, all: Buffer) -> Result<()>;

    /// Sends `sends[r]` to each rank `r`, and fills `receives[r]` by what rank `r` sends to this one. Those of two ranks are as many
    /// and as long on both sides, one by one. What a rank has for itself is copied.
    fn exchange(&mut self, group: &dyn Group, sends: &[Vec<Buffer>], receives: &[Vec<Buffer>]) -> Result<()>;

    /// [`Collectives::exchange_sum`], of which a device with [`Stream::Comm`](super::Stream::Comm) queues all on that stream, in the order
    /// of the calls: what it is to come behind, and what behind it, is for the caller to say by [`Backend::record`] and
    /// [`Backend::wait`]. On other devices it is done on return.
    fn start_exchange_sum(&mut self, group: &dyn Group, parts: &[Buffer], sum: Buffer) -> Result<()> {
        self.exchange_sum(group, parts, sum)
    }

    /// [`Collectives::all_gather`], ordered as [`Collectives::start_exchange_sum`] is.
    fn start_all_gather(&mut self, group: &dyn Group, bytes: usize, own: &[Part], all: &[Vec<Part>]) -> Result<()> {
        self.all_gather(group, bytes, own, all)
    }

    /// [`Collectives::gather`], ordered as [`Collectives::start_exchange_sum`] is.
    fn start_gather(&mut self, group: &dyn Group, own: Buffer, all: Buffer) -> Result<()> {
        self.gather(group, own, all)
    }

    /// The sums of squares, in f64, of each 16,384 elements of f32 `a` with `tail` behind it, which is not longer than the block
    /// that it begins in. Those of a block depend on its elements alone. Waits for the device.
    fn block_squares(&mut self, a: Buffer, tail: &[f32]) -> Result<Vec<f64>>;
}

/// [`Collectives::exchange_sum`] through host memory.
pub(crate) fn exchange_sum<B: Backend + ?Sized>(
    backend: &mut B,
    group: &dyn Group,
    parts: &[Buffer],
    sum: Buffer,
) -> Result<()> {
    let parts = parts.iter().map(|part| read(backend, *part)).collect::<Result<Vec<_>>>()?;
    let mut received = vec![vec![0; sum.bytes()]; group.size()];
    group.exchange(&parts.iter().map(Vec::as_slice).collect::<Vec<_>>(), &mut received)?;
    let floats = |bytes: &Vec<u8>| bytes.chunks_exact(4).map(bytemuck::pod_read_unaligned::<f32>).collect();
    let received: Vec<Vec<f32>> = received.iter().map(floats).collect();
    let mut total: Vec<f32> = floats(&read(backend, sum)?);
    add_parts(&mut total, &received.iter().map(Vec::as_slice).collect::<Vec<_>>());
    backend.upload(bytemuck::cast_slice(&total), sum);
    Ok(())
}

/// [`Collectives::all_gather`] through host memory.
pub(crate) fn all_gather<B: Backend + ?Sized>(
    backend: &mut B,
    group: &dyn Group,
    bytes: usize,
    own: &[Part],
    all: &[Vec<Part>],
) -> Result<()> {
    let mut given = vec![0; bytes];
    for Part { buffer, at } in own {
        backend.read_back(*buffer, &mut given[*at..at + buffer.bytes()])?;
    }
    let mut gathered = vec![0; bytes * group.size()];
    group.all_gather(&given, &mut gathered)?;
    for (given, parts) in gathered.chunks_exact(bytes.max(1)).zip(all) {
        for Part { buffer, at } in parts.iter().filter(|part| !own.contains(part)) {
            backend.upload(&given[*at..at + buffer.bytes()], *buffer);
        }
    }
    Ok(())
}

/// [`Collectives::gather`] through host memory, some at a time.
pub(crate) fn gather<B: Backend + ?Sized>(backend: &mut B, group: &dyn Group, own: Buffer, all: Buffer) -> Result<()> {
    let step = EXCHANGED * size_of::<f32>() / own.dtype.bytes();
    for start in (0..own.len).step_by(step) {
        let len = step.min(own.len - start);
        let part = |buffer| Part { buffer, at: 0 };
        let places: Vec<_> = (0..group.size()).map(|rank| vec![part(all.slice(rank * own.len + start, len))]).collect();
        let own = own.slice(start, len);
        backend.all_gather(group, own.bytes(), &[part(own)], &places)?;
    }
    Ok(())
}

/// [`Collectives::exchange`] through host memory.
pub(crate) fn exchange<B: Backend + ?Sized>(
    backend: &mut B,
    group: &dyn Group,
    sends: &[Vec<Buffer>],
    receives: &[Vec<Buffer>],
) -> Result<()> {
    let mut message = |parts: &Vec<Buffer>| -> Result<Vec<u8>> {
        Ok(joined(parts).iter().map(|part| read(backend, *part)).collect::<Result<Vec<_>>>()?.concat())
    };
    let sends = sends.iter().map(&mut message).collect::<Result<Vec<_>>>()?;
    let bytes = |parts: &Vec<Buffer>| parts.iter().map(|part| part.bytes()).sum::<usize>();
    let mut received: Vec<Vec<u8>> = receives.iter().map(|parts| vec![0; bytes(parts)]).collect();
    group.exchange(&sends.iter().map(Vec::as_slice).collect::<Vec<_>>(), &mut received)?;
    for (message, parts) in received.iter().zip(receives) {
        let mut rest = message.as_slice();
        for part in joined(parts) {
            let (bytes, behind) = rest.split_at(part.bytes());
            backend.upload(bytes, part);
            rest = behind;
        }
    }
    Ok(())
}

/// Buffers of which each that follows the one before it in memory is a part of that one.
fn joined(parts: &[Buffer]) -> Vec<Buffer> {
    let mut all: Vec<Buffer> = Vec::with_capacity(parts.len());
    for part in parts {
        let follows = |last: &Buffer| Buffer { offset: last.offset + last.bytes(), len: part.len, ..*last } == *part;
        match all.last_mut().filter(|last| follows(last)) {
            Some(last) => last.len += part.len,
            None => all.push(*part),
        }
    }
    all
}

fn read<B: Backend + ?Sized>(backend: &mut B, buffer: Buffer) -> Result<Vec<u8>> {
    let mut bytes = vec![0; buffer.bytes()];
    backend.read_back(buffer, &mut bytes)?;
    Ok(bytes)
}
