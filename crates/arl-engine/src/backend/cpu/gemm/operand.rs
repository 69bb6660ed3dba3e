//! Matrices as slices with a row stride, their bounds checked once, so that the code behind may use pointers.

use half::{bf16, f16};

/// Elements of an operand that is read.
#[derive(Clone, Copy, Debug)]
pub enum Elements<'a> {
    /// 32-bit floats.
    F32(&'a [f32]),
    /// bfloat16.
    Bf16(&'a [bf16]),
    /// IEEE 754's 16-bit floats.
    F16(&'a [f16]),
}

impl Elements<'_> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Elements::F32(x) => x.len(),
            Elements::Bf16(x) => x.len(),
            Elements::F16(x) => x.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Element `i`, widened.
    #[inline]
    pub(super) fn get(&self, i: usize) -> f32 {
        match self {
            Elements::F32(x) => x[i],
            Elements::Bf16(x) => x[i].to_f32(),
            Elements::F16(x) => x[i].to_f32(),
        }
    }
}

/// Elements of the result.
#[derive(Debug)]
pub enum ElementsMut<'a> {
    /// 32-bit floats.
    F32(&'a mut [f32]),
    /// bfloat16.
    Bf16(&'a mut [bf16]),
    /// IEEE 754's 16-bit floats.
    F16(&'a mut [f16]),
}

impl ElementsMut<'_> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            ElementsMut::F32(x) => x.len(),
            ElementsMut::Bf16(x) => x.len(),
            ElementsMut::F16(x) => x.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A matrix that is read: row `r` begins at element `r * stride`.
#[derive(Clone, Copy, Debug)]
pub struct MatRef<'a> {
    /// From the first element of row 0 to, at least, the last one of the last row.
    pub data: Elements<'a>,
    /// Elements from one row's start to the next one's; at least the width.
    pub stride: usize,
}

/// A matrix that is written.
#[derive(Debug)]
pub struct MatMut<'a> {
    /// From the first element of row 0 to, at least, the last one of the last row.
    pub data: ElementsMut<'a>,
    /// Elements from one row's start to the next one's; at least the width.
    pub stride: usize,
}

/// Panics unless `rows` rows of `columns`, `stride` apart, lie within `len` elements.
pub(super) fn check(what: &str, len: usize, rows: usize, columns: usize, stride: usize) {
    if rows == 0 || columns == 0 {
        return;
    }
    let last = (rows - 1).checked_mul(stride).and_then(|start| start.checked_add(columns));
    assert!(
        (rows == 1 || stride >= columns) && last.is_some_and(|last| last <= len),
        "{what}: [{rows}, {columns}] with stride {stride} does not lie in {len} elements"
    );
}
