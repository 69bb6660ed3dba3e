//! Every leaf against a plain reference in f64: forward passes by value, backward passes against finite differences of
//! that reference. Inputs are rounded to the leaf's type before the reference sees them.

mod attention;
mod autograd;
pub(super) mod delta;
mod delta_rule;
mod dual;
mod elementwise;
mod embedding;
mod gates;
mod guard;
mod layer_norm;
mod loss;
mod magnitude;
mod matmul;
mod moe;
mod nf4;
mod norm;
mod optimizer;
pub(super) mod recurrence;
mod repeat;
mod rope;
mod swiglu;
mod threads;
pub(super) mod vision;

use half::{bf16, f16};

use super::test_backend;
use crate::backend::{Angles, Backend, Buffer, DType, Pool, Rows};

/// All types of activations.
pub(super) const TYPES: [DType; 3] = [DType::F32, DType::Bf16, DType::F16];

/// Those of 16 bits.
const NARROW: [DType; 2] = [DType::Bf16, DType::F16];

/// Whether a model may have all of these: f32 and one of the others.
fn meet(types: &[DType]) -> bool {
    !NARROW.iter().all(|narrow| types.contains(narrow))
}

/// A backend, and a place to put arrays in.
pub(super) struct Fixture {
    pub(super) backend: Box<dyn Backend>,
    next: usize,
}

impl Fixture {
    pub(super) fn new() -> Self {
        let mut backend: Box<dyn Backend> = Box::new(test_backend());
        backend.reserve(Pool::Step, 1 << 28).unwrap();
        let scratch = backend.scratch_bytes(1 << 13, 1 << 13);
        backend.reserve(Pool::Scratch, scratch).unwrap();
        // NaN, so that a partial sum that is read but not written shows.
        backend.upload(
            &vec![0xff; scratch],
            Buffer { pool: Pool::Scratch, offset: 0, len: scratch / 4, dtype: DType::F32 },
        );
        Fixture { backend, next: 0 }
    }

    fn place(&mut self, len: usize, dtype: DType) -> Buffer {
        let buffer = Buffer { pool: Pool::Step, offset: self.next, len, dtype };
        self.next = (self.next + buffer.bytes()).next_multiple_of(64) + 64;
        buffer
    }

    /// Uploads values, rounded to `dtype`.
    pub(super) fn put(&mut self, values: &[f64], dtype: DType) -> Buffer {
        let buffer = self.place(values.len(), dtype);
        let bytes: Vec<u8> = match dtype {
            DType::F32 => values.iter().flat_map(|x| (*x as f32).to_le_bytes()).collect(),
            DType::F64 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            DType::Bf16 => values.iter().flat_map(|x| bf16::from_f32(*x as f32).to_le_bytes()).collect(),
            DType::F16 => values.iter().flat_map(|x| f16::from_f32(*x as f32).to_le_bytes()).collect(),
            DType::I32 => values.iter().flat_map(|x| (*x as i32).to_le_bytes()).collect(),
            DType::U16 => values.iter().flat_map(|x| (*x as u16).to_le_bytes()).collect(),
            DType::U8 => values.iter().map(|x| *x as u8).collect(),
        };
        self.backend.upload(&bytes, buffer);
        buffer
    }

    /// As `put`, one element after an aligned address.
    fn put_unaligned(&mut self, values: &[f64], dtype: DType) -> Buffer {
        let padded: Vec<f64> = std::iter::once(0.0).chain(values.iter().copied()).collect();
        self.put(&padded, dtype).slice(1, values.len())
    }

    /// Uploads whole numbers.
    pub(super) fn ints(&mut self, values: &[usize]) -> Buffer {
        self.put(&values.iter().map(|x| *x as f64).collect::<Vec<_>>(), DType::I32)
    }

    /// Tables with a row for each of `tokens`, in their order.
    fn angles(&mut self, cos: Buffer, sin: Buffer, tokens: usize) -> Angles {
        Angles { cos, sin, rows: self.ints(&(0..tokens).collect::<Vec<_>>()), axes: None }
    }

    /// An output that holds NaN (or -1) until a leaf writes it.
    pub(super) fn poisoned(&mut self, len: usize, dtype: DType) -> Buffer {
        let buffer = self.place(len, dtype);
        self.backend.upload(&vec![0xff; buffer.bytes()], buffer);
        buffer
    }

    /// The bytes of a buffer.
    pub(super) fn bytes(&mut self, buffer: Buffer) -> Vec<u8> {
        let mut bytes = vec![0; buffer.bytes()];
        self.backend.read_back(buffer, &mut bytes).unwrap();
        bytes
    }

    /// The values of a buffer.
    pub(super) fn get(&mut self, buffer: Buffer) -> Vec<f64> {
        let bytes = self.bytes(buffer);
        let chunks = bytes.chunks_exact(buffer.dtype.bytes());
        match buffer.dtype {
            DType::F32 => chunks.map(|x| f64::from(f32::from_le_bytes(x.try_into().unwrap()))).collect(),
            DType::F64 => chunks.map(|x| f64::from_le_bytes(x.try_into().unwrap())).collect(),
            DType::Bf16 => chunks.map(|x| bf16::from_le_bytes(x.try_into().unwrap()).to_f64()).collect(),
            DType::F16 => chunks.map(|x| f16::from_le_bytes(x.try_into().unwrap()).to_f64()).collect(),
            DType::I32 => chunks.map(|x| f64::from(i32::from_le_bytes(x.try_into().unwrap()))).collect(),
            DType::U16 => chunks.map(|x| f64::from(u16::from_le_bytes(x.try_into().unwrap()))).collect(),
            DType::U8 => bytes.iter().map(|x| f64::from(*x)).collect(),
        }
    }
}

/// `buffer` as rows of `stride` elements.
pub(super) fn rows(buffer: Buffer, stride: usize) -> Rows {
    Rows { buffer, stride }
}

/// Repeatable numbers of about unit variance.
pub(super) struct Random(pub(super) u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() >> 11) as usize % bound
    }

    pub(super) fn value(&mut self) -> f64 {
        let uniform = (self.next() >> 11) as f64 / (1_u64 << 53) as f64;
        (uniform - 0.5) * 3.46
    }

    /// Values as `dtype` holds them.
    pub(super) fn values(&mut self, len: usize, dtype: DType) -> Vec<f64> {
        (0..len).map(|_| round(self.value(), dtype)).collect()
    }
}

pub(super) fn round(value: f64, dtype: DType) -> f64 {
    match dtype {
        DType::F32 => f64::from(value as f32),
        // By way of f32, as every value here is one; `half` does not round f64 to nearest.
        DType::Bf16 => bf16::from_f32(value as f32).to_f64(),
        DType::F16 => f16::from_f32(value as f32).to_f64(),
        _ => value,
    }
}

/// What one rounding to `dtype` may change, relatively, with room for `steps` roundings.
pub(super) fn bound(dtype: DType, steps: f64) -> f64 {
    match dtype {
        DType::Bf16 => steps / 256.0,
        DType::F16 => steps / 2048.0,
        _ => steps * 6e-8,
    }
}

/// What rounding to `dtype` may change of the smallest numbers, whose places after the point are limited.
pub(super) fn least(dtype: DType) -> f64 {
    if dtype == DType::F16 { 2f64.powi(-25) } else { 0.0 }
}

/// Asserts `|actual - expected| <= tolerance * (|expected| + the array's root mean square)` for each element.
#[track_caller]
pub(super) fn assert_close(what: &str, actual: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(actual.len(), expected.len(), "{what}");
    let square: f64 = expected.iter().map(|x| x * x).sum();
    let size = (square / expected.len().max(1) as f64).sqrt();
    for (i, (actual, expected)) in actual.iter().zip(expected).enumerate() {
        let error = (actual - expected).abs();
        let allowed = tolerance * (expected.abs() + size);
        assert!(error <= allowed, "{what}[{i}]: {actual} instead of {expected}, {error:e} apart, {allowed:e} allowed");
    }
}

/// The gradient of `f` at `x` by central differences.
fn differences(x: &[f64], f: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    differences_at(x, 0..x.len(), f)
}

/// As [`differences`], for some places of `x` alone.
fn differences_at(x: &[f64], places: impl Iterator<Item = usize>, f: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    const STEP: f64 = 1e-5;
    let mut x = x.to_vec();
    places
        .map(|i| {
            let kept = x[i];
            x[i] = kept + STEP;
            let above = f(&x);
            x[i] = kept - STEP;
            let below = f(&x);
            x[i] = kept;
            (above - below) / (2.0 * STEP)
        })
        .collect()
}

fn inner(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn sum(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}
