//! Places in a device's memory, and the queues of work on it: plain data, which no device is needed for.

/// The type of a buffer's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// 32-bit float.
    F32,
    /// bfloat16: the upper half of an f32.
    Bf16,
    /// IEEE 754's 16-bit float.
    F16,
    /// 64-bit float; for sums that the host reads.
    F64,
    /// 32-bit integer; ids, positions, row numbers.
    I32,
    /// 16-bit integer; the lower half of a split master weight.
    U16,
    /// A byte: two weights in 4 bits, or a scale of such weights.
    U8,
}

impl DType {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            DType::F64 => 8,
            DType::F32 | DType::I32 => 4,
            DType::Bf16 | DType::F16 | DType::U16 => 2,
            DType::U8 => 1,
        }
    }
}

/// Memory that is reserved as one piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pool {
    /// Weights, gradients and optimizer moments: as long as the engine lives.
    State,
    /// Inputs, activations and scratch of one micro-batch.
    Step,
    /// Pieces of masters and moments in host memory that stay on the device as well, from step to step.
    Kept,
    /// The rotary embedding's tables: until a longer sequence needs larger ones.
    Angles,
    /// A leaf's own, while it runs: partial sums. See [`Backend::scratch_bytes`].
    Scratch,
    /// What other ranks' devices give, until it is used; [`Stream::Comm`] alone uses it. See [`super::comm`].
    Exchange,
    /// Host memory that lasts as long as the engine: masters and moments that are not on the device. Only
    /// [`Backend::transfer`], [`Backend::upload`] and [`Backend::read_back`] reach it, as [`Pool::HostStep`].
    HostState,
    /// Host memory of one micro-batch: activations that are not on the device.
    HostStep,
}

/// A queue of work. Leaves run in order on [`Stream::Compute`]; copies to and from host memory, and what ranks exchange, run
/// concurrently.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// All leaves.
    Compute,
    /// Copies to host memory.
    ToHost,
    /// Copies from host memory.
    FromHost,
    /// What the devices of ranks exchange, and the sums of it.
    Comm,
}

impl Stream {
    /// All of them, in the order of their numbers.
    pub const ALL: [Stream; 4] = [Stream::Compute, Stream::ToHost, Stream::FromHost, Stream::Comm];
}

/// A point in a stream's work that another stream waits for. It may be recorded again; who waits, waits for the last
/// record that was queued before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event(pub u32);

/// `len` elements of `dtype`, from byte `offset` of `pool` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Its pool.
    pub pool: Pool,
    /// First byte within the pool; a multiple of the element's size.
    pub offset: usize,
    /// Elements.
    pub len: usize,
    /// Type of the elements.
    pub dtype: DType,
}

impl Buffer {
    /// The part `[start, start + len)`, counted in elements. The caller's indices come from shapes, never from data.
    #[must_use]
    pub fn slice(self, start: usize, len: usize) -> Buffer {
        assert!(start + len <= self.len, "slice [{start}, {start} + {len}) of a buffer of {}", self.len);
        Buffer { offset: self.offset + start * self.dtype.bytes(), len, ..self }
    }

    /// Size in bytes.
    pub fn bytes(self) -> usize {
        self.len * self.dtype.bytes()
    }

    /// The same bytes as elements of another type, which must fill them.
    #[must_use]
    pub fn view(self, dtype: DType) -> Buffer {
        assert!(self.bytes().is_multiple_of(dtype.bytes()), "{self:?} as {dtype:?}");
        Buffer { len: self.bytes() / dtype.bytes(), dtype, ..self }
    }
}

/// Rows of a matrix, `stride` elements apart; `buffer` begins at the first element of row 0 and ends with, or
/// after, the last element of the last row.
#[derive(Clone, Copy, Debug)]
pub struct Rows {
    /// From the first element of the first row on.
    pub buffer: Buffer,
    /// Elements from one row's start to the next one's.
    pub stride: usize,
}
