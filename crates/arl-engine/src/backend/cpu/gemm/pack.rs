//! Copies panels of an operand into the order in which the kernel reads it: `R` rows side by side, word after word along
//! `k`. Formats are converted on the way: bf16 and f16 to f32, or any to pairs of bf16.

use half::{bf16, f16};

use super::super::element::widen_f16;
use super::super::simd::prefetch;

/// Where an operand is.
#[derive(Clone, Copy)]
pub(super) enum Source {
    F32(*const f32),
    Bf16(*const bf16),
    F16(*const f16),
}

/// Steps of one panel that are packed before the next panel's, where memory runs across `k`: few enough for their rows
/// to stay in the cache and in the address translation buffer, so that each page of the source is visited once.
const TOGETHER: usize = 16;
/// Elements of a row of memory that are asked for in advance: too many rows are read side by side for the processor to
/// see that each of them goes on.
const AHEAD: usize = 64;

/// `rows` rows (of `a`; columns of `b`) over `length` elements of `k`, packed to panels of `R` rows.
pub(super) struct Panels {
    /// The element of the first row at the first `k`.
    pub(super) source: Source,
    /// Elements from one row of memory to the next.
    pub(super) stride: usize,
    /// Whether a row of memory runs along `k`, or across it.
    pub(super) along_k: bool,
    /// What is missing in the last panel is filled with zeros.
    pub(super) rows: usize,
    pub(super) length: usize,
}

impl Panels {
    /// Words a row takes when packed.
    pub(super) fn steps(length: usize, pairs: bool) -> usize {
        if pairs { length.div_ceil(2) } else { length }
    }
}

/// An element of an operand; both conversions are exact or round to nearest, ties to even.
trait Element: Copy {
    fn wide(self) -> u32;
    fn narrow(self) -> u32;
}

impl Element for f32 {
    #[inline(always)]
    fn wide(self) -> u32 {
        self.to_bits()
    }
    #[inline(always)]
    fn narrow(self) -> u32 {
        let bits = self.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        // Rounding could carry a NaN's payload into infinity.
        if self.is_nan() { (bits >> 16) | 0x40 } else { rounded }
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn wide(self) -> u32 {
        u32::from(self.to_bits()) << 16
    }
    #[inline(always)]
    fn narrow(self) -> u32 {
        u32::from(self.to_bits())
    }
}

impl Element for f16 {
    #[inline(always)]
    fn wide(self) -> u32 {
        widen_f16(self.to_bits()).to_bits()
    }
    #[inline(always)]
    fn narrow(self) -> u32 {
        Element::narrow(widen_f16(self.to_bits()))
    }
}

/// A value as the packing of pairs rounds it.
#[cfg(test)]
pub(super) fn narrow(x: f32) -> u16 {
    Element::narrow(x) as u16
}

/// Packs panels to `target` one after the other, `R` words a step.
///
/// # Safety
/// The source is readable over its shape, `target` is writable for `R * steps` words a panel. With `AVX2`, the CPU has it.
#[inline(always)]
pub(super) unsafe fn pack<const R: usize, const PAIRS: bool, const AVX2: bool>(panels: &Panels, target: *mut u32) {
    // SAFETY: the caller's promise.
    unsafe {
        match panels.source {
            Source::F32(source) => pack_from::<f32, R, PAIRS, AVX2>(source, panels, target),
            Source::Bf16(source) => pack_from::<bf16, R, PAIRS, AVX2>(source, panels, target),
            Source::F16(source) => pack_from::<f16, R, PAIRS, AVX2>(source, panels, target),
        }
    }
}

/// # Safety
/// As [`pack`].
#[inline(always)]
unsafe fn pack_from<T: Element, const R: usize, const PAIRS: bool, const AVX2: bool>(
    source: *const T,
    panels: &Panels,
    target: *mut u32,
) {
    // SAFETY: the caller's promise.
    unsafe {
        if panels.along_k {
            let words = R * Panels::steps(panels.length, PAIRS);
            for first in (0..panels.rows).step_by(R) {
                let rows = R.min(panels.rows - first);
                let source = source.add(first * panels.stride);
                let target = target.add(first / R * words);
                // Twice, so that the rows of a whole panel are known when compiled.
                if rows == R {
                    along::<T, R, PAIRS, AVX2>(source, panels.stride, R, panels.length, target);
                } else {
                    along::<T, R, PAIRS, AVX2>(source, panels.stride, rows, panels.length, target);
                }
            }
        } else {
            across::<T, R, PAIRS>(source, panels, target);
        }
    }
}

/// Memory rows run across `k`: each step is a stretch of one row (of two rows, with pairs).
///
/// # Safety
/// As [`pack`].
#[inline(always)]
unsafe fn across<T: Element, const R: usize, const PAIRS: bool>(source: *const T, panels: &Panels, target: *mut u32) {
    let &Panels { stride, rows, length, .. } = panels;
    let steps = Panels::steps(length, PAIRS);
    for first in (0..steps).step_by(TOGETHER) {
        for panel in 0..rows.div_ceil(R) {
            let rows = R.min(rows - panel * R);
            for step in first..(first + TOGETHER).min(steps) {
                let p = if PAIRS { 2 * step } else { step };
                // SAFETY: row `p` of memory has `rows` elements; `target` has `R` words a step and panel.
                unsafe {
                    let out = &mut *target.add((panel * steps + step) * R).cast::<[u32; R]>();
                    let low = source.add(p * stride + panel * R);
                    prefetch(low.wrapping_add(AHEAD));
                    if PAIRS && p + 1 < length {
                        let high = low.add(stride);
                        fill(out, rows, low, |r, low| low.narrow() | ((*high.add(r)).narrow() << 16));
                    } else if PAIRS {
                        fill(out, rows, low, |_, low| low.narrow());
                    } else {
                        fill(out, rows, low, |_, low| low.wide());
                    }
                }
            }
        }
    }
}

/// A step of `rows` elements that lie side by side, and zeros.
///
/// # Safety
/// `row` is readable for `rows` elements; `word` may rely on being called for these alone.
#[inline(always)]
unsafe fn fill<T: Element, const R: usize>(
    out: &mut [u32; R],
    rows: usize,
    row: *const T,
    word: impl Fn(usize, T) -> u32,
) {
    // SAFETY: the caller's promise.
    unsafe {
        if rows == R {
            // Read as one piece: a compiler cannot tell that reads and writes one by one do not overlap.
            let row = row.cast::<[T; R]>().read_unaligned();
            *out = std::array::from_fn(|r| word(r, row[r]));
        } else {
            *out = std::array::from_fn(|r| if r < rows { word(r, *row.add(r)) } else { 0 });
        }
    }
}

/// One panel whose memory rows run along `k`: a transposition, eight words of eight rows at a time.
///
/// # Safety
/// As [`pack`].
#[inline(always)]
unsafe fn along<T: Element, const R: usize, const PAIRS: bool, const AVX2: bool>(
    source: *const T,
    stride: usize,
    rows: usize,
    length: usize,
    target: *mut u32,
) {
    let per_word = if PAIRS { 2 } else { 1 };
    let whole = length / per_word / 8 * 8;
    // SAFETY: row `r` of memory has `length` elements, of which `8 * per_word` are read at a time; `target` has `R`
    // words a step.
    unsafe {
        for step in (0..whole).step_by(8) {
            for first in (0..R).step_by(8) {
                let block: [[u32; 8]; 8] = std::array::from_fn(|r| {
                    if first + r < rows {
                        prefetch(source.wrapping_add((first + r) * stride + step * per_word + AHEAD));
                        words::<T, PAIRS>(source.add((first + r) * stride + step * per_word))
                    } else {
                        [0; 8]
                    }
                });
                let block = transpose::<AVX2>(block);
                for (s, words) in block.iter().enumerate() {
                    let out = target.add((step + s) * R + first);
                    if first + 8 <= R {
                        out.cast::<[u32; 8]>().write_unaligned(*words);
                    } else {
                        // `R % 8` words; known when compiled.
                        std::ptr::copy_nonoverlapping(words.as_ptr(), out, R % 8);
                    }
                }
            }
        }
        for step in whole..Panels::steps(length, PAIRS) {
            for r in 0..R {
                let at = |p: usize| *source.add(r * stride + p);
                let p = step * per_word;
                *target.add(step * R + r) = match (r < rows, PAIRS) {
                    (false, _) => 0,
                    (true, false) => at(p).wide(),
                    (true, true) if p + 1 < length => at(p).narrow() | (at(p + 1).narrow() << 16),
                    (true, true) => at(p).narrow(),
                };
            }
        }
    }
}

/// Eight words of one row.
///
/// # Safety
/// `source` is readable for eight words' elements.
#[inline(always)]
unsafe fn words<T: Element, const PAIRS: bool>(source: *const T) -> [u32; 8] {
    // SAFETY: the caller's promise.
    std::array::from_fn(|i| unsafe {
        if PAIRS {
            (*source.add(2 * i)).narrow() | ((*source.add(2 * i + 1)).narrow() << 16)
        } else {
            (*source.add(i)).wide()
        }
    })
}

/// Rows become columns.
///
/// # Safety
/// With `AVX2`, the CPU has it.
#[inline(always)]
unsafe fn transpose<const AVX2: bool>(block: [[u32; 8]; 8]) -> [[u32; 8]; 8] {
    #[cfg(target_arch = "x86_64")]
    if AVX2 {
        use std::arch::x86_64::*;
        // SAFETY: the caller's promise; both types of the transmutes are 2,048 plain bits.
        return unsafe {
            let rows = std::mem::transmute::<[[u32; 8]; 8], [__m256; 8]>(block);
            let pairs: [__m256; 8] = std::array::from_fn(|i| {
                let (x, y) = (rows[i / 2 * 2], rows[i / 2 * 2 + 1]);
                if i % 2 == 0 { _mm256_unpacklo_ps(x, y) } else { _mm256_unpackhi_ps(x, y) }
            });
            let fours: [__m256; 8] = std::array::from_fn(|i| {
                let (x, y) = (pairs[i / 4 * 4 + i % 4 / 2], pairs[i / 4 * 4 + i % 4 / 2 + 2]);
                if i % 2 == 0 { _mm256_shuffle_ps::<0x44>(x, y) } else { _mm256_shuffle_ps::<0xee>(x, y) }
            });
            let eights: [__m256; 8] = std::array::from_fn(|i| {
                let (x, y) = (fours[i % 4], fours[i % 4 + 4]);
                if i < 4 { _mm256_permute2f128_ps::<0x20>(x, y) } else { _mm256_permute2f128_ps::<0x31>(x, y) }
            });
            std::mem::transmute::<[__m256; 8], [[u32; 8]; 8]>(eights)
        };
    }
    std::array::from_fn(|i| std::array::from_fn(|j| block[j][i]))
}
