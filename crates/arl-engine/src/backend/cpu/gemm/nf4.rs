//! Weights in NF4 as the right operand of a product: what is packed is decoded a tile at a time, so that nowhere is there a whole
//! matrix of it. Knows codes and scales, nothing of buffers, pools or models.

use arl_model::{NF4_BLOCK, NF4_NESTED_BLOCK, NF4_VALUES};
use half::{bf16, f16};

use super::super::element::Element;
#[cfg(target_arch = "x86_64")]
#[cfg(target_arch = "x86_64")]
use super::super::simd::{Level, level};
use super::kernel::Kernel;
use super::pack::Panels;
use super::workspace::Workspace;
use crate::backend::DType;

/// Columns of a product that are decoded at a time, where rows run across the sums: two blocks.
const DECODED: usize = 128;

/// The scales of blocks.
#[derive(Clone, Copy, Debug)]
pub enum Nf4Scales<'a> {
    /// As they are.
    Plain(&'a [f32]),
    /// In 8 bits: `values[code] * largest + offset`.
    Nested {
        /// A byte each.
        codes: &'a [u8],
        /// The offset, then the largest of each 256 scales.
        largest: &'a [f32],
        /// Of the 256 codes.
        values: &'a [f32],
    },
}

impl Nf4Scales<'_> {
    #[inline(always)]
    fn of(&self, block: usize) -> f32 {
        match *self {
            Nf4Scales::Plain(scales) => scales[block],
            Nf4Scales::Nested { codes, largest, values } => {
                values[usize::from(codes[block])] * largest[1 + block / NF4_NESTED_BLOCK] + largest[0]
            }
        }
    }
}

/// A tensor in NF4.
#[derive(Clone, Copy, Debug)]
pub struct Nf4Tensor<'a> {
    /// Weights.
    pub len: usize,
    /// Two a byte, the first in the high half.
    pub codes: &'a [u8],
    /// Of each 64 weights.
    pub scales: Nf4Scales<'a>,
}

impl Nf4Tensor<'_> {
    /// The weights from `start` on: values times scales, rounded once.
    pub(in super::super) fn decode<T: Element>(&self, start: usize, out: &mut [T]) {
        let (mut start, mut out) = (start, out);
        while !out.is_empty() {
            let count = (NF4_BLOCK - start % NF4_BLOCK).min(out.len());
            let (piece, rest) = out.split_at_mut(count);
            let scale = self.scales.of(start / NF4_BLOCK);
            // The block's sixteen values, each of which is then one reading.
            let table: [T; 16] = std::array::from_fn(|code| T::store(NF4_VALUES[code] * scale));
            self.look_up(&table, start, piece);
            (start, out) = (start + count, rest);
        }
    }

    /// Weights of one block.
    #[inline(always)]
    fn look_up<T: Element>(&self, table: &[T; 16], start: usize, out: &mut [T]) {
        let odd = start % 2;
        if let (1, Some(first)) = (odd, out.first_mut()) {
            *first = table[usize::from(self.codes[start / 2] & 15)];
        }
        let out = out.get_mut(odd..).unwrap_or_default();
        let codes = &self.codes[(start + odd) / 2..][..out.len().div_ceil(2)];
        let done = vectors(table, codes, out);
        for (out, byte) in out[done..].chunks_mut(2).zip(&codes[done / 2..]) {
            out[0] = table[usize::from(byte >> 4)];
            if let Some(second) = out.get_mut(1) {
                *second = table[usize::from(byte & 15)];
            }
        }
    }
}

/// Looks up as many of the first weights as whole vectors hold; how many these are.
#[inline(always)]
fn vectors<T: Element>(table: &[T; 16], codes: &[u8], out: &mut [T]) -> usize {
    #[cfg(target_arch = "x86_64")]
    if level() >= Level::Avx512 {
        // SAFETY: the CPU has the instructions.
        return unsafe {
            if size_of::<T>() == 2 {
                look_up_words(bytemuck::cast_slice(table), codes, bytemuck::cast_slice_mut(out))
            } else {
                look_up_doubles(bytemuck::cast_slice(table), codes, bytemuck::cast_slice_mut(out))
            }
        };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (table, codes, out);
    0
}

/// [`vectors`] of 32 elements of 16 bits.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl")]
fn look_up_words(table: &[u16], codes: &[u8], out: &mut [u16]) -> usize {
    use std::arch::x86_64::*;
    let whole = out.len() / 32;
    let (Some(table), true) = (table.first_chunk::<16>(), codes.len() >= 16 * whole) else { return 0 };
    // SAFETY: both are 256 bits.
    let table = _mm512_castsi256_si512(unsafe { std::mem::transmute::<[u16; 16], __m256i>(*table) });
    let (low, fifteen) = (_mm512_set1_epi32(0x0000_ffff), _mm512_set1_epi32(15));
    for (codes, out) in codes.chunks_exact(16).zip(out.chunks_exact_mut(32)) {
        // SAFETY: 16 bytes are read and 64 written, of slices that have as many.
        unsafe {
            // A byte in each 32 bits becomes two numbers of 16 bits: its high half, then its low half.
            let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.as_ptr().cast()));
            let first = _mm512_and_si512(_mm512_srli_epi32::<4>(bytes), low);
            let second = _mm512_slli_epi32::<16>(_mm512_and_si512(bytes, fifteen));
            let values = _mm512_permutexvar_epi16(_mm512_or_si512(first, second), table);
            _mm512_storeu_si512(out.as_mut_ptr().cast(), values);
        }
    }
    32 * whole
}

/// [`vectors`] of 16 elements of 32 bits.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,avx512f")]
fn look_up_doubles(table: &[u32], codes: &[u8], out: &mut [u32]) -> usize {
    use std::arch::x86_64::*;
    let whole = out.len() / 16;
    let (Some(table), true) = (table.first_chunk::<16>(), codes.len() >= 8 * whole) else { return 0 };
    // SAFETY: both are 512 bits.
    let table = unsafe { std::mem::transmute::<[u32; 16], __m512i>(*table) };
    let fifteen = _mm512_set1_epi64(15);
    for (codes, out) in codes.chunks_exact(8).zip(out.chunks_exact_mut(16)) {
        // SAFETY: 8 bytes are read and 64 written, of slices that have as many.
        unsafe {
            // A byte in each 64 bits becomes two numbers of 32 bits: its high half, then its low half.
            let bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64(codes.as_ptr().cast()));
            let first = _mm512_srli_epi64::<4>(bytes);
            let second = _mm512_slli_epi64::<32>(_mm512_and_si512(bytes, fifteen));
            let values = _mm512_permutexvar_epi32(_mm512_or_si512(first, second), table);
            _mm512_storeu_si512(out.as_mut_ptr().cast(), values);
        }
    }
    16 * whole
}

/// A matrix whose rows are those of tensors one below the other, each of whole rows.
#[derive(Clone, Copy, Debug)]
pub struct Nf4Matrix<'a> {
    /// The tensors.
    pub tensors: &'a [Nf4Tensor<'a>],
    /// Columns.
    pub width: usize,
    /// What weights are rounded to before they are multiplied: f32, bf16 or f16.
    pub dtype: DType,
}

impl Nf4Matrix<'_> {
    pub(super) fn len(&self) -> usize {
        self.tensors.iter().map(|tensor| tensor.len).sum()
    }

    /// Elements of a row from `column` on.
    fn read<T: Element>(&self, row: usize, column: usize, out: &mut [T]) {
        let mut at = row * self.width + column;
        for tensor in self.tensors {
            if at < tensor.len {
                return tensor.decode(at, out);
            }
            at -= tensor.len;
        }
    }

    /// Packs panels of `kernel.nr` columns of a product: `columns` of them from `column` on, over `length` elements of the sums from
    /// `start` on, which a row of the matrix runs along or across.
    ///
    /// # Safety
    /// As [`Kernel::pack_b`].
    pub(super) unsafe fn pack(
        &self,
        kernel: &Kernel,
        along_k: bool,
        (column, columns): (usize, usize),
        (start, length): (usize, usize),
        target: *mut u32,
    ) {
        let pack = match self.dtype {
            DType::Bf16 => Self::pack_as::<bf16>,
            DType::F16 => Self::pack_as::<f16>,
            _ => Self::pack_as::<f32>,
        };
        // SAFETY: the caller's promise.
        unsafe { pack(self, kernel, along_k, (column, columns), (start, length), target) }
    }

    /// # Safety
    /// As [`Self::pack`].
    unsafe fn pack_as<T: Element>(
        &self,
        kernel: &Kernel,
        along_k: bool,
        (column, columns): (usize, usize),
        (start, length): (usize, usize),
        target: *mut u32,
    ) {
        let steps = Panels::steps(length, kernel.pairs);
        // A tile that stays in the cache until it is packed; of whole panels.
        let together = if along_k { kernel.nr } else { DECODED.next_multiple_of(kernel.nr) };
        let mut memory = Workspace::take((together * length * size_of::<T>()).div_ceil(size_of::<f32>()));
        let tile: &mut [T] = bytemuck::cast_slice_mut(memory.floats());
        for first in (0..columns).step_by(together) {
            let rows = together.min(columns - first);
            let (height, stride) = if along_k { (rows, length) } else { (length, rows) };
            let (top, left) = if along_k { (column + first, start) } else { (start, column + first) };
            for row in 0..height {
                self.read(top + row, left, &mut tile[row * stride..][..stride]);
            }
            let panels = Panels { source: super::source(T::elements(tile)), stride, along_k, rows, length };
            // SAFETY: the tile has these rows, and what was packed before takes a step's word of each column.
            unsafe { (kernel.pack_b)(&panels, target.add(first * steps)) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::Random;
    use super::super::{Elements, ElementsMut, MatMut, MatRef, matmul, matmul_nf4};
    use super::*;
    use crate::backend::Layout;
    use arl_model::Nf4Builder;

    /// Tensors of these rows, and what they stand for.
    fn quantized(random: &mut Random, rows: &[usize], width: usize) -> (Vec<arl_model::Nf4>, Vec<f32>) {
        let mut values = Vec::new();
        let tensors = rows.iter().map(|rows| {
            let mut builder = Nf4Builder::default();
            builder.push(&random.vector(rows * width));
            let nf4 = builder.finish(false);
            let mut decoded = vec![0f32; rows * width];
            nf4.read(0, &mut decoded);
            values.extend(decoded);
            nf4
        });
        (tensors.collect(), values)
    }

    fn tensor(nf4: &arl_model::Nf4, len: usize) -> Nf4Tensor<'_> {
        let arl_model::Nf4Scales::Plain(scales) = &nf4.scales else { panic!("plain scales") };
        Nf4Tensor { len, codes: &nf4.codes, scales: Nf4Scales::Plain(scales) }
    }

    #[test]
    fn a_product_is_that_of_the_decoded_matrix_to_the_bit() {
        let mut random = Random(41);
        // Rows that begin within blocks, and at odd codes; several blocks of k, and several stages.
        for (m, rows, width) in
            [(3, vec![5], 7), (1, vec![40, 3, 8], 97), (70, vec![130, 66], 192), (9, vec![700], 1100)]
        {
            let (stored, values) = quantized(&mut random, &rows, width);
            let tensors: Vec<Nf4Tensor<'_>> =
                stored.iter().zip(&rows).map(|(nf4, rows)| tensor(nf4, rows * width)).collect();
            let height: usize = rows.iter().sum();
            let (as_bf16, as_f16): (Vec<bf16>, Vec<f16>) =
                values.iter().map(|&x| (bf16::from_f32(x), f16::from_f32(x))).unzip();
            for (layout, n, k) in [(Layout::Nt, height, width), (Layout::Nn, width, height)] {
                let a = random.vector(m * k);
                let a_narrow: Vec<bf16> = a.iter().map(|&x| bf16::from_f32(x)).collect();
                let all = [
                    (DType::F32, Elements::F32(&values), Elements::F32(&a)),
                    (DType::Bf16, Elements::Bf16(&as_bf16), Elements::Bf16(&a_narrow)),
                    (DType::F16, Elements::F16(&as_f16), Elements::F32(&a)),
                ];
                for (dtype, whole, a) in all {
                    let a = MatRef { data: a, stride: k };
                    let run = |of: &dyn Fn(MatMut<'_>)| {
                        let mut c = vec![bf16::ONE; m * n];
                        of(MatMut { data: ElementsMut::Bf16(&mut c), stride: n });
                        let mut wide = vec![1f32; m * n];
                        of(MatMut { data: ElementsMut::F32(&mut wide), stride: n });
                        (c.iter().map(|x| x.to_bits()).collect::<Vec<_>>(), wide.iter().map(|x| x.to_bits()).collect())
                    };
                    let b = MatRef { data: whole, stride: width };
                    let expected: (Vec<u16>, Vec<u32>) = run(&|c| matmul(layout, m, n, k, a, b, c, true, None));
                    let matrix = Nf4Matrix { tensors: &tensors, width, dtype };
                    let actual = run(&|c| matmul_nf4(layout, m, n, k, a, &matrix, c, true, None));
                    assert!(actual == expected, "{layout:?} {m}x{n}x{k} {dtype:?}");
                }
            }
        }
    }
}
