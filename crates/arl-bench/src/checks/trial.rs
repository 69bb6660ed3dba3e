//! One call of a leaf with all that it reads and writes as an image of memory, so that the same call can be made on any
//! backend and what it left be compared byte by byte. Knows no leaf.

use std::ops::Range;

use arl_engine::backend::{Backend, Buffer, DType, Pool, Rows, join_master};
use arl_model::{Error, ErrorCode, Result};
use half::{bf16, f16};

use super::draw::Draw;

/// Least cosine, and most that the norms may differ, of results that went through a type of 16 bits.
pub(crate) const COSINE: f64 = 0.999;
/// See [`COSINE`].
pub(crate) const NORM_ERROR: f64 = 0.01;
/// Most of `|a - b| / |b|` of results that are f32 throughout.
pub(crate) const F32_ERROR: f64 = 1e-4;

/// What is between buffers; no leaf may change it.
const BETWEEN: u8 = 0xa5;
const ALIGNMENT: usize = 64;

/// Where a result is and how near it must be.
#[derive(Clone, Debug)]
struct Output {
    name: &'static str,
    dtype: DType,
    /// Bytes, row by row.
    place: Vec<Range<usize>>,
    exact: bool,
    /// The lower halves that make a bf16 weight an exact f32.
    low: Option<Range<usize>>,
    /// The type and place instead, on backends that narrow the gradient of logits.
    narrowed: Option<(DType, Vec<Range<usize>>)>,
}

/// The makings of a [`Trial`].
pub(crate) struct Scene {
    pub(crate) draw: Draw,
    /// Of activations and weights.
    pub(crate) dtype: DType,
    image: Vec<u8>,
    outputs: Vec<Output>,
    free: Vec<Range<usize>>,
}

type Call = Box<dyn Fn(&mut dyn Backend)>;

/// One call of a leaf.
pub(crate) struct Trial {
    /// Its shapes, for messages.
    pub(crate) what: String,
    /// Whether anything in it is of 16 bits.
    narrow: bool,
    image: Vec<u8>,
    outputs: Vec<Output>,
    /// What a leaf may leave as it likes.
    free: Vec<Range<usize>>,
    /// In place of [`F32_ERROR`].
    f32_error: f64,
    call: Call,
}

/// How far results were apart at worst.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Figures {
    /// Least cosine, where a type of 16 bits is involved.
    pub(crate) cosine: f64,
    /// Most that norms differed, where a type of 16 bits is involved.
    pub(crate) norm_error: f64,
    /// Most of `|a - b| / |b|`, where all is f32.
    pub(crate) f32_error: f64,
}

impl Default for Figures {
    fn default() -> Self {
        Figures { cosine: 1.0, norm_error: 0.0, f32_error: 0.0 }
    }
}

fn bytes_of(values: &[f64], dtype: DType) -> Vec<u8> {
    match dtype {
        DType::F32 => values.iter().flat_map(|x| (*x as f32).to_le_bytes()).collect(),
        DType::F64 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        DType::I32 => values.iter().flat_map(|x| (*x as i32).to_le_bytes()).collect(),
        DType::U16 => values.iter().flat_map(|x| (*x as u16).to_le_bytes()).collect(),
        DType::U8 => values.iter().map(|x| *x as u8).collect(),
        DType::F16 => values.iter().flat_map(|x| f16::from_f64(*x).to_le_bytes()).collect(),
        DType::Bf16 => values.iter().flat_map(|x| bf16::from_f32(*x as f32).to_le_bytes()).collect(),
    }
}

fn values_of(bytes: &[u8], dtype: DType) -> Vec<f64> {
    match dtype {
        DType::F32 => bytes.as_chunks().0.iter().map(|x| f64::from(f32::from_le_bytes(*x))).collect(),
        DType::F64 => bytes.as_chunks().0.iter().map(|x| f64::from_le_bytes(*x)).collect(),
        DType::I32 => bytes.as_chunks().0.iter().map(|x| f64::from(i32::from_le_bytes(*x))).collect(),
        DType::U16 => bytes.as_chunks().0.iter().map(|x| f64::from(u16::from_le_bytes(*x))).collect(),
        DType::U8 => bytes.iter().map(|x| f64::from(*x)).collect(),
        DType::F16 => bytes.as_chunks().0.iter().map(|x| f16::from_le_bytes(*x).to_f64()).collect(),
        DType::Bf16 => bytes.as_chunks().0.iter().map(|x| bf16::from_le_bytes(*x).to_f64()).collect(),
    }
}

fn range_of(buffer: Buffer) -> Range<usize> {
    buffer.offset..buffer.offset + buffer.bytes()
}

impl Scene {
    pub(crate) fn new(draw: Draw, dtype: DType) -> Self {
        Scene { draw, dtype, image: vec![BETWEEN; ALIGNMENT], outputs: Vec::new(), free: Vec::new() }
    }

    /// `lead`: elements after an aligned address.
    fn place(&mut self, bytes: &[u8], dtype: DType, lead: usize) -> Buffer {
        self.image.resize(self.image.len() + lead * dtype.bytes(), BETWEEN);
        let offset = self.image.len();
        self.image.extend_from_slice(bytes);
        let end = self.image.len().next_multiple_of(ALIGNMENT) + ALIGNMENT;
        self.image.resize(end, BETWEEN);
        Buffer { pool: Pool::Step, offset, len: bytes.len() / dtype.bytes(), dtype }
    }

    pub(crate) fn put(&mut self, values: &[f64], dtype: DType) -> Buffer {
        self.place(&bytes_of(values, dtype), dtype, 0)
    }

    /// Random values of the scene's type.
    pub(crate) fn random(&mut self, len: usize) -> Buffer {
        self.random_of(len, self.dtype)
    }

    pub(crate) fn random_of(&mut self, len: usize, dtype: DType) -> Buffer {
        let values = self.draw.values(len);
        self.put(&values, dtype)
    }

    /// As [`Scene::random`]; one in four begins an element after an aligned address.
    pub(crate) fn anywhere(&mut self, len: usize) -> Buffer {
        let values = self.draw.values(len);
        let lead = usize::from(self.draw.below(4) == 0);
        self.place(&bytes_of(&values, self.dtype), self.dtype, lead)
    }

    pub(crate) fn ints(&mut self, values: &[usize]) -> Buffer {
        self.put(&values.iter().map(|x| *x as f64).collect::<Vec<_>>(), DType::I32)
    }

    fn note(&mut self, name: &'static str, buffer: Buffer, exact: bool) {
        let place = vec![range_of(buffer)];
        self.outputs.push(Output { name, dtype: buffer.dtype, place, exact, low: None, narrowed: None });
    }

    /// A result that is not read before it is written: NaN, or -1, until then.
    pub(crate) fn output(&mut self, name: &'static str, len: usize, dtype: DType) -> Buffer {
        let buffer = self.place(&vec![0xff; len * dtype.bytes()], dtype, 0);
        self.note(name, buffer, false);
        buffer
    }

    /// As [`Scene::output`]; equal in bits on all backends.
    pub(crate) fn exact(&mut self, name: &'static str, len: usize, dtype: DType) -> Buffer {
        let buffer = self.place(&vec![0xff; len * dtype.bytes()], dtype, 0);
        self.note(name, buffer, true);
        buffer
    }

    /// What was put before is a result too: it is added to, or changed in place.
    pub(crate) fn updated(&mut self, name: &'static str, buffer: Buffer) -> Buffer {
        self.note(name, buffer, false);
        buffer
    }

    /// As [`Scene::updated`]; equal in bits on all backends.
    pub(crate) fn updated_exactly(&mut self, name: &'static str, buffer: Buffer) -> Buffer {
        self.note(name, buffer, true);
        buffer
    }

    /// Split masters: `high` bf16 and `low` u16 are compared as the f32 that they make.
    pub(crate) fn updated_master(&mut self, name: &'static str, high: Buffer, low: Buffer) {
        let (place, low) = (vec![range_of(high)], Some(range_of(low)));
        self.outputs.push(Output { name, dtype: high.dtype, place, exact: false, low, narrowed: None });
    }

    /// Rows of `columns` of a matrix of random values, which are written (poisoned) or added to. What is between them
    /// stays.
    pub(crate) fn matrix(
        &mut self,
        name: &'static str,
        rows: usize,
        columns: usize,
        gap: usize,
        dtype: DType,
        poisoned: bool,
    ) -> Rows {
        let stride = columns + gap;
        let len = rows * stride - gap;
        let buffer =
            if poisoned { self.place(&vec![0xff; len * dtype.bytes()], dtype, 0) } else { self.random_of(len, dtype) };
        let row = |r: usize| range_of(buffer.slice(r * stride, columns));
        let place = (0..rows).map(row).collect();
        self.outputs.push(Output { name, dtype, place, exact: false, low: None, narrowed: None });
        Rows { buffer, stride }
    }

    /// f32 logits that become their own gradient: f32 in place, or the scene's type at the beginning of each row, as
    /// the backend has it.
    pub(crate) fn logits(&mut self, logits: Buffer, rows: usize, vocab: usize) {
        let row = |r: usize, dtype: DType| {
            let start = logits.offset + r * vocab * logits.dtype.bytes();
            start..start + vocab * dtype.bytes()
        };
        let place = (0..rows).map(|r| row(r, DType::F32)).collect();
        let dtype = self.dtype;
        let narrowed = (dtype != DType::F32).then(|| (dtype, (0..rows).map(|r| row(r, dtype)).collect()));
        let output = Output { name: "gradient", dtype: DType::F32, place, exact: false, low: None, narrowed };
        self.outputs.push(output);
        self.free.push(range_of(logits));
    }

    /// Room that the leaf may leave as it likes.
    pub(crate) fn scratch(&mut self, len: usize, dtype: DType) -> Buffer {
        let buffer = self.place(&vec![0xff; len * dtype.bytes()], dtype, 0);
        self.free.push(range_of(buffer));
        buffer
    }

    pub(crate) fn trial(self, what: String, call: impl Fn(&mut dyn Backend) + 'static) -> Trial {
        let narrow = self.dtype != DType::F32;
        let what = format!("{:?} {what}", self.dtype);
        let call = Box::new(call);
        Trial { what, narrow, image: self.image, outputs: self.outputs, free: self.free, f32_error: F32_ERROR, call }
    }
}

impl Trial {
    /// The same, where results that are f32 throughout must be nearer than [`F32_ERROR`].
    pub(crate) fn within(self, f32_error: f64) -> Self {
        Trial { f32_error, ..self }
    }

    /// Bytes of [`Pool::Step`] that the call needs.
    pub(crate) fn bytes(&self) -> usize {
        self.image.len()
    }

    /// Makes the call; the image of memory after it.
    pub(crate) fn run(&self, backend: &mut dyn Backend) -> Result<Vec<u8>> {
        let len = self.image.len() / DType::F32.bytes();
        let all = Buffer { pool: Pool::Step, offset: 0, len, dtype: DType::F32 };
        backend.upload(&self.image, all);
        (self.call)(backend);
        let mut after = vec![0; self.image.len()];
        backend.read_back(all, &mut after)?;
        Ok(after)
    }

    /// Fails with a sentence on the first result of `device` that is not near enough to the CPU's, or on a byte that was no
    /// result and was changed.
    pub(crate) fn compare(&self, device: &[u8], narrows: bool, cpu: &[u8], worst: &mut Figures) -> Result<()> {
        let wrong = |what: String| Err(Error::new(ErrorCode::Internal, format!("{}: {what}", self.what)));
        for output in &self.outputs {
            let expected = output.read(cpu, false);
            let actual = output.read(device, narrows);
            if let Some(i) = (0..expected.len()).find(|&i| !actual[i].is_finite() && expected[i].is_finite()) {
                return wrong(format!("{}[{i}] is {}, on the CPU {}", output.name, actual[i], expected[i]));
            }
            if output.exact {
                let differ = |a: f64, b: f64| a != b && !(a.is_nan() && b.is_nan());
                if let Some(i) = (0..expected.len()).find(|&i| differ(actual[i], expected[i])) {
                    return wrong(format!("{}[{i}] is {}, on the CPU {}", output.name, actual[i], expected[i]));
                }
                continue;
            }
            let near = Near::of(&actual, &expected);
            let figures = format!("{}: cosine {:.6}, norms {:.2e}, ", output.name, near.cosine, near.norm_error);
            if self.narrow {
                worst.cosine = worst.cosine.min(near.cosine);
                worst.norm_error = worst.norm_error.max(near.norm_error);
                if near.cosine < COSINE || near.norm_error > NORM_ERROR {
                    return wrong(format!("{figures}allowed are {COSINE} and {NORM_ERROR}"));
                }
            } else {
                worst.f32_error = worst.f32_error.max(near.error);
                if near.error > self.f32_error {
                    return wrong(format!("{figures}all {:.2e} apart, allowed are {}", near.error, self.f32_error));
                }
            }
        }
        let written = self.outputs.iter().flat_map(|output| output.place.iter().chain(&output.low));
        let mut kept = vec![true; self.image.len()];
        written.chain(&self.free).for_each(|range| kept[range.clone()].fill(false));
        match (0..kept.len()).find(|&i| kept[i] && device[i] != self.image[i]) {
            Some(i) => wrong(format!("byte {i} of its memory is no result and was changed")),
            None => Ok(()),
        }
    }
}

impl Output {
    fn read(&self, image: &[u8], narrows: bool) -> Vec<f64> {
        let (place, dtype) = match &self.narrowed {
            Some((dtype, narrowed)) if narrows => (narrowed, *dtype),
            _ => (&self.place, self.dtype),
        };
        let Some(low) = &self.low else {
            return place.iter().flat_map(|range| values_of(&image[range.clone()], dtype)).collect();
        };
        let halves = |range: &Range<usize>| image[range.clone()].as_chunks().0.to_vec();
        let pairs = place.iter().flat_map(halves).zip(halves(low));
        pairs.map(|(h, l)| f64::from(join_master(u16::from_le_bytes(h), u16::from_le_bytes(l)))).collect()
    }
}

/// How near two vectors are.
pub(crate) struct Near {
    pub(crate) cosine: f64,
    /// `| |a| - |b| | / |b|`.
    pub(crate) norm_error: f64,
    /// `|a - b| / |b|`.
    pub(crate) error: f64,
}

impl Near {
    pub(crate) fn of(a: &[f64], b: &[f64]) -> Self {
        let sum = |f: &dyn Fn(f64, f64) -> f64| a.iter().zip(b).map(|(a, b)| f(*a, *b)).sum::<f64>();
        let (of_a, of_b) = (sum(&|a, _| a * a).sqrt(), sum(&|_, b| b * b).sqrt());
        let apart = sum(&|a, b| (a - b) * (a - b)).sqrt();
        if apart == 0.0 && a.len() == b.len() {
            return Near { cosine: 1.0, norm_error: 0.0, error: 0.0 };
        }
        // A NaN in either, or no norm at all, is near to nothing.
        let or_far = |value: f64, far: f64| if value.is_finite() { value } else { far };
        Near {
            cosine: or_far(sum(&|a, b| a * b) / (of_a * of_b), -1.0),
            norm_error: or_far((of_a - of_b).abs() / of_b, f64::INFINITY),
            error: or_far(apart / of_b, f64::INFINITY),
        }
    }
}
