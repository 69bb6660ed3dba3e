//! The pools, and the only place where a [`Buffer`] becomes a slice. A [`Lease`] hands out slices for one leaf and
//! proves, before it does, that types and bounds fit and that no output overlaps anything else the leaf holds.

use std::marker::PhantomData;
use std::ops::Range;
use std::ptr::NonNull;

use arl_model::{Error, ErrorCode, Result};
use half::{bf16, f16};

use crate::backend::{Buffer, DType, Pool, Rows};

/// A type that any bytes are a value of, and the `DType` that it is.
pub(super) trait Plain: Copy + Send + Sync + bytemuck::Pod {
    /// The buffer type whose elements are `Self`.
    const DTYPE: DType;
}

impl Plain for f32 {
    const DTYPE: DType = DType::F32;
}
impl Plain for bf16 {
    const DTYPE: DType = DType::Bf16;
}
impl Plain for f16 {
    const DTYPE: DType = DType::F16;
}
impl Plain for f64 {
    const DTYPE: DType = DType::F64;
}
impl Plain for i32 {
    const DTYPE: DType = DType::I32;
}
impl Plain for u8 {
    const DTYPE: DType = DType::U8;
}
impl Plain for u16 {
    const DTYPE: DType = DType::U16;
}

/// Zeroed memory, page-aligned, whose pages are taken from the system when they are first touched.
struct Mapping {
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: a mapping owns its memory as a `Vec` would; it has no tie to the thread that made it.
unsafe impl Send for Mapping {}
// SAFETY: through `&Mapping` nothing is read or written but by way of a `Lease`, which needs `&mut Memory`.
unsafe impl Sync for Mapping {}

impl Mapping {
    const EMPTY: Mapping = Mapping { base: NonNull::<u128>::dangling().cast(), bytes: 0 };

    #[cfg(unix)]
    fn new(bytes: usize) -> Option<Mapping> {
        if bytes == 0 {
            return Some(Mapping::EMPTY);
        }
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: an anonymous mapping at an address of the system's choice touches no memory in use.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return None;
        }
        #[cfg(target_os = "linux")]
        // SAFETY: the range was mapped just now. Large pages are a wish; whether it is granted does not matter.
        unsafe {
            libc::madvise(base, bytes, libc::MADV_HUGEPAGE);
        }
        NonNull::new(base.cast()).map(|base| Mapping { base, bytes })
    }

    #[cfg(not(unix))]
    fn new(bytes: usize) -> Option<Mapping> {
        if bytes == 0 {
            return Some(Mapping::EMPTY);
        }
        let layout = std::alloc::Layout::from_size_align(bytes, 4096).ok()?;
        // SAFETY: the layout's size is not zero.
        let base = unsafe { std::alloc::alloc_zeroed(layout) };
        NonNull::new(base).map(|base| Mapping { base, bytes })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.bytes == 0 {
            return;
        }
        #[cfg(unix)]
        // SAFETY: base and length are those that `mmap` returned, and no slice outlives the mapping.
        unsafe {
            libc::munmap(self.base.as_ptr().cast(), self.bytes);
        }
        #[cfg(not(unix))]
        if let Ok(layout) = std::alloc::Layout::from_size_align(self.bytes, 4096) {
            // SAFETY: allocated with this layout in `new`, and no slice outlives the mapping.
            unsafe { std::alloc::dealloc(self.base.as_ptr(), layout) }
        }
    }
}

/// The pools.
pub(super) struct Memory {
    state: Mapping,
    step: Mapping,
    kept: Mapping,
    angles: Mapping,
    scratch: Mapping,
    exchange: Mapping,
    host_state: Mapping,
    host_step: Mapping,
}

impl Memory {
    /// Empty pools.
    pub(super) fn new() -> Memory {
        let empty = || Mapping::EMPTY;
        Memory {
            state: empty(),
            step: empty(),
            kept: empty(),
            angles: empty(),
            scratch: empty(),
            exchange: empty(),
            host_state: empty(),
            host_step: empty(),
        }
    }

    /// Replaces `pool` by `bytes` of zeroes.
    pub(super) fn reserve(&mut self, pool: Pool, bytes: usize) -> Result<()> {
        let place = match pool {
            Pool::State => &mut self.state,
            Pool::Step => &mut self.step,
            Pool::Kept => &mut self.kept,
            Pool::Angles => &mut self.angles,
            Pool::Scratch => &mut self.scratch,
            Pool::Exchange => &mut self.exchange,
            Pool::HostState => &mut self.host_state,
            Pool::HostStep => &mut self.host_step,
        };
        // The old pool goes first: both together may not fit.
        *place = Mapping::EMPTY;
        *place = Mapping::new(bytes).ok_or_else(|| {
            let mib = bytes.div_ceil(1 << 20);
            Error::new(ErrorCode::Oom, format!("the system refused {mib} MiB of memory for the {pool:?} pool"))
                .hint("use a smaller model, fewer tokens a micro-batch or a higher recompute level, or free memory")
        })?;
        Ok(())
    }

    /// Begins the accesses of one leaf. All slices end before the next leaf can begin.
    pub(super) fn lease(&mut self) -> Lease<'_> {
        Lease { memory: self, taken: Vec::with_capacity(12) }
    }

    fn mapping(&self, pool: Pool) -> &Mapping {
        match pool {
            Pool::State => &self.state,
            Pool::Step => &self.step,
            Pool::Kept => &self.kept,
            Pool::Angles => &self.angles,
            Pool::Scratch => &self.scratch,
            Pool::Exchange => &self.exchange,
            Pool::HostState => &self.host_state,
            Pool::HostStep => &self.host_step,
        }
    }
}

struct Taken {
    pool: Pool,
    bytes: Range<usize>,
    written: bool,
}

/// The accesses of one leaf.
pub(super) struct Lease<'m> {
    memory: &'m Memory,
    taken: Vec<Taken>,
}

impl<'m> Lease<'m> {
    /// The elements of an input.
    pub(super) fn read<T: Plain>(&mut self, buffer: Buffer) -> &'m [T] {
        let base = self.take::<T>(buffer, false);
        // SAFETY: `take` proved that the range is within its pool, is aligned and initialised (zeroed, or written as
        // some plain type), and that no `&mut` slice of this lease overlaps it; the lease has the only borrow of the pools.
        unsafe { std::slice::from_raw_parts(base, buffer.len) }
    }

    /// The elements of an output, or of what is updated in place.
    pub(super) fn write<T: Plain>(&mut self, buffer: Buffer) -> &'m mut [T] {
        let base = self.take::<T>(buffer, true);
        // SAFETY: as in `read`, and `take` proved that no other slice of this lease overlaps the range.
        unsafe { std::slice::from_raw_parts_mut(base, buffer.len) }
    }

    /// An input's rows of `width` elements.
    pub(super) fn read_rows<T: Plain>(&mut self, rows: Rows, count: usize, width: usize) -> &'m [T] {
        assert_rows(rows, count, width);
        self.read(rows.buffer)
    }

    /// An output's rows of `width` elements.
    pub(super) fn write_rows<T: Plain>(&mut self, rows: Rows, count: usize, width: usize) -> &'m mut [T] {
        assert_rows(rows, count, width);
        self.write(rows.buffer)
    }

    /// An input's bytes, whatever their type.
    pub(super) fn read_bytes(&mut self, buffer: Buffer) -> &'m [u8] {
        let base = self.take_bytes(buffer, false);
        // SAFETY: as in `read`; bytes have no alignment.
        unsafe { std::slice::from_raw_parts(base, buffer.bytes()) }
    }

    /// An output's bytes, whatever their type.
    pub(super) fn write_bytes(&mut self, buffer: Buffer) -> &'m mut [u8] {
        let base = self.take_bytes(buffer, true);
        // SAFETY: as in `write`; bytes have no alignment.
        unsafe { std::slice::from_raw_parts_mut(base, buffer.bytes()) }
    }

    fn take<T: Plain>(&mut self, buffer: Buffer, written: bool) -> *mut T {
        assert_eq!(buffer.dtype, T::DTYPE, "a buffer of {:?} was taken as {:?}", buffer.dtype, T::DTYPE);
        let base = self.take_bytes(buffer, written);
        assert!(buffer.len == 0 || base.addr().is_multiple_of(align_of::<T>()), "{buffer:?} is not aligned");
        if buffer.len == 0 { NonNull::dangling().as_ptr() } else { base.cast() }
    }

    fn take_bytes(&mut self, buffer: Buffer, written: bool) -> *mut u8 {
        let mapping = self.memory.mapping(buffer.pool);
        let end = buffer.offset.checked_add(buffer.bytes());
        assert!(
            end.is_some_and(|end| end <= mapping.bytes),
            "{buffer:?} is outside its pool of {} bytes",
            mapping.bytes
        );
        let bytes = buffer.offset..buffer.offset + buffer.bytes();
        for other in &self.taken {
            let apart = other.pool != buffer.pool || bytes.end <= other.bytes.start || other.bytes.end <= bytes.start;
            assert!(
                apart || !(written || other.written),
                "{buffer:?} overlaps bytes {:?} of the same leaf",
                other.bytes
            );
        }
        if !bytes.is_empty() {
            self.taken.push(Taken { pool: buffer.pool, bytes, written });
        }
        // SAFETY: the offset is at most the mapping's length.
        unsafe { mapping.base.as_ptr().add(buffer.offset) }
    }
}

fn assert_rows(rows: Rows, count: usize, width: usize) {
    assert!(rows.stride >= width, "rows of {width} elements lie {} apart", rows.stride);
    let needed = if count == 0 { 0 } else { (count - 1) * rows.stride + width };
    assert!(needed <= rows.buffer.len, "{count} rows of {width}, {} apart, in {}", rows.stride, rows.buffer.len);
}

/// An output that parallel tasks share, each writing elements that no other task touches.
#[derive(Clone, Copy)]
pub(super) struct Shared<'a, T> {
    base: *mut T,
    len: usize,
    slice: PhantomData<&'a mut [T]>,
}

// SAFETY: the pointer stands for a `&mut [T]`; `part` makes its caller answer for tasks not touching the same elements.
unsafe impl<T: Send> Send for Shared<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    /// Takes the output over for as long as tasks run.
    pub(super) fn new(slice: &'a mut [T]) -> Self {
        Shared { base: slice.as_mut_ptr(), len: slice.len(), slice: PhantomData }
    }

    /// Elements `start .. start + len`.
    ///
    /// # Safety
    /// While the result lives, no other part that overlaps it may exist, on this thread or another.
    pub(super) unsafe fn part(&self, start: usize, len: usize) -> &'a mut [T] {
        assert!(start <= self.len && len <= self.len - start, "part [{start}, {start} + {len}) of {}", self.len);
        // SAFETY: in bounds by the assertion, not aliased by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.base.add(start), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn buffer(offset: usize, len: usize, dtype: DType) -> Buffer {
        Buffer { pool: Pool::Step, offset, len, dtype }
    }

    fn memory(bytes: usize) -> Memory {
        let mut memory = Memory::new();
        memory.reserve(Pool::Step, bytes).unwrap();
        memory
    }

    #[test]
    fn a_pool_is_zeroed_and_keeps_what_is_written() {
        let mut memory = memory(64);
        assert_eq!(memory.lease().read::<f32>(buffer(0, 16, DType::F32)), [0.0; 16]);
        memory.lease().write::<f32>(buffer(8, 2, DType::F32)).copy_from_slice(&[1.0, 2.0]);
        assert_eq!(memory.lease().read::<f32>(buffer(4, 4, DType::F32)), [0.0, 1.0, 2.0, 0.0]);
        memory.reserve(Pool::Step, 64).unwrap();
        assert_eq!(memory.lease().read::<f32>(buffer(0, 16, DType::F32)), [0.0; 16]);
    }

    #[test]
    fn inputs_may_overlap_each_other() {
        let mut memory = memory(64);
        let mut lease = memory.lease();
        assert_eq!(
            lease.read::<f32>(buffer(0, 16, DType::F32)).len(),
            lease.read::<u16>(buffer(0, 16, DType::U16)).len()
        );
    }

    #[test]
    #[should_panic(expected = "overlaps")]
    fn an_output_may_not_overlap_an_input() {
        let mut memory = memory(64);
        let mut lease = memory.lease();
        lease.read::<f32>(buffer(0, 8, DType::F32));
        lease.write::<f32>(buffer(28, 2, DType::F32));
    }

    #[test]
    #[should_panic(expected = "overlaps")]
    fn an_input_may_not_overlap_an_output() {
        let mut memory = memory(64);
        let mut lease = memory.lease();
        lease.write::<f32>(buffer(28, 2, DType::F32));
        lease.read::<f32>(buffer(0, 8, DType::F32));
    }

    #[test]
    #[should_panic(expected = "outside its pool")]
    fn a_buffer_ends_within_its_pool() {
        memory(64).lease().read::<f32>(buffer(4, 16, DType::F32));
    }

    #[test]
    #[should_panic(expected = "not aligned")]
    fn a_buffer_is_aligned() {
        memory(64).lease().read::<f32>(buffer(2, 4, DType::F32));
    }

    #[test]
    #[should_panic(expected = "was taken as")]
    fn a_buffer_has_the_type_it_is_taken_as() {
        memory(64).lease().read::<i32>(buffer(0, 4, DType::F32));
    }

    #[test]
    fn more_memory_than_there_is_is_an_error() {
        let error = Memory::new().reserve(Pool::State, usize::MAX / 4).unwrap_err();
        assert_eq!(error.code, ErrorCode::Oom);
    }
}
