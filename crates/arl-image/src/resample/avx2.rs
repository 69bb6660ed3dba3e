//! The two passes with AVX2: `madd` multiplies pairs of 16-bit values and adds each pair in 32 bits, so results are those
//! of [`super::scalar`], to the bit.

use std::arch::x86_64::{
    __m128i, __m256i, _mm_cvtsi32_si128, _mm_loadu_si128, _mm_storeu_si128, _mm_unpackhi_epi8, _mm_unpacklo_epi8,
    _mm256_add_epi32, _mm256_castsi128_si256, _mm256_castsi256_si128, _mm256_cvtepu8_epi16, _mm256_extract_epi32,
    _mm256_inserti128_si256, _mm256_madd_epi16, _mm256_packs_epi32, _mm256_packus_epi16, _mm256_permute4x64_epi64,
    _mm256_set1_epi32, _mm256_setr_epi8, _mm256_shuffle_epi8, _mm256_sra_epi32,
};

use super::scalar;
use super::weights::Weights;

/// Bytes that one load takes.
const LOAD: usize = 16;

/// Whether this processor has AVX2.
pub(super) fn available() -> bool {
    is_x86_feature_detected!("avx2")
}

/// Two rows along the width.
pub(super) fn across(weights: &Weights, from: [&[u8]; 2], to: [&mut [u8]; 2]) {
    // Each output pixel before `plain` reads whole loads within its row, and is followed by another.
    let bytes = (weights.taps() / 4 - 1) * 12 + LOAD;
    let row_len = from[0].len().min(from[1].len());
    let plain = match row_len.checked_sub(bytes) {
        Some(last) => weights.starting_by(last / 3).min(weights.len() - 1),
        None => 0,
    };
    let [to_first, to_second] = to;
    assert!(
        to_first.len() == 3 * weights.len() && to_second.len() == to_first.len(),
        "rows of {} pixels",
        weights.len()
    );
    // SAFETY: AVX2 is available, or this kernel is not chosen. Input pixels of x < plain begin at 3 * start with
    // 3 * start + bytes <= row_len for both rows, and are loaded in steps of 12 bytes, 16 at a time, `bytes` in all. Each
    // of these writes 4 bytes at 3 * x with x + 1 < weights.len(), which is inside both output rows.
    unsafe {
        across_vectors(
            weights,
            plain,
            [from[0].as_ptr(), from[1].as_ptr()],
            [to_first.as_mut_ptr(), to_second.as_mut_ptr()],
        );
    }
    scalar::across(weights, plain, from[0], to_first);
    scalar::across(weights, plain, from[1], to_second);
}

/// Output pixels `0..end` of two rows; one half of a register is one row.
///
/// # Safety
///
/// The processor has AVX2. From the first input pixel of each output pixel on, both rows of `from` have
/// `(taps / 4 - 1) * 12 + 16` bytes. Both rows of `to` have `3 * end + 1` bytes.
#[target_feature(enable = "avx2")]
unsafe fn across_vectors(weights: &Weights, end: usize, from: [*const u8; 2], to: [*mut u8; 2]) {
    // Of four pixels, the first two and the last two, as 16 bits: red, red, green, green, blue, blue, none, none.
    let first_two = shuffle([0, 3, 1, 4, 2, 5]);
    let last_two = shuffle([6, 9, 7, 10, 8, 11]);
    let half = _mm256_set1_epi32(1 << weights.bits() >> 1);
    let shift = _mm_cvtsi32_si128(weights.bits() as i32);
    for x in 0..end {
        let mut at = 3 * weights.range(x).start;
        let mut sum = half;
        for four in weights.values(x).chunks_exact(4) {
            // SAFETY: the caller has 16 bytes from here on in both rows.
            let pixels = unsafe { join(load(from[0].add(at)), load(from[1].add(at))) };
            let low = _mm256_madd_epi16(_mm256_shuffle_epi8(pixels, first_two), pair(four[0], four[1]));
            let high = _mm256_madd_epi16(_mm256_shuffle_epi8(pixels, last_two), pair(four[2], four[3]));
            sum = _mm256_add_epi32(sum, _mm256_add_epi32(low, high));
            at += 12;
        }
        let sum = _mm256_sra_epi32(sum, shift);
        let sum = _mm256_packs_epi32(sum, sum);
        let bytes = _mm256_packus_epi16(sum, sum);
        let (first, second) = (_mm256_extract_epi32::<0>(bytes), _mm256_extract_epi32::<4>(bytes));
        // SAFETY: 4 bytes from here on are inside the rows; the last of them belongs to the next pixel, written later.
        unsafe {
            to[0].add(3 * x).cast::<i32>().write_unaligned(first);
            to[1].add(3 * x).cast::<i32>().write_unaligned(second);
        }
    }
}

/// Output row `y` of its input rows.
pub(super) fn down(weights: &Weights, y: usize, rows: &[&[u8]], to: &mut [u8]) {
    assert!(rows.len() <= weights.taps() && rows.iter().all(|row| row.len() >= to.len()), "rows of {} bytes", to.len());
    let end = to.len() / LOAD * LOAD;
    // SAFETY: AVX2 is available, or this kernel is not chosen. All rows have at least `end` bytes, a multiple of 16, and
    // there are no more rows than weights.
    unsafe { down_vectors(weights, y, end, rows, to) };
    scalar::down(weights, y, end, rows, to);
}

/// Bytes `0..end` of a row, 16 at a time.
///
/// # Safety
///
/// The processor has AVX2. `end` is a multiple of 16; all of `rows`, and `to`, have at least as many bytes.
#[target_feature(enable = "avx2")]
unsafe fn down_vectors(weights: &Weights, y: usize, end: usize, rows: &[&[u8]], to: &mut [u8]) {
    let half = _mm256_set1_epi32(1 << weights.bits() >> 1);
    let shift = _mm_cvtsi32_si128(weights.bits() as i32);
    let values = weights.values(y);
    for x in (0..end).step_by(LOAD) {
        let (mut low, mut high) = (half, half);
        for (rows, values) in rows.chunks(2).zip(values.chunks_exact(2)) {
            // A row without a partner is its own, with the weight 0 that follows those of the rows.
            let (first, second) = (rows[0], rows[rows.len() - 1]);
            // SAFETY: x + 16 <= end, and all rows have as many bytes.
            let (first, second) = unsafe { (load(first.as_ptr().add(x)), load(second.as_ptr().add(x))) };
            let weights = pair(values[0], values[1]);
            let left = _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(first, second));
            let right = _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(first, second));
            low = _mm256_add_epi32(low, _mm256_madd_epi16(left, weights));
            high = _mm256_add_epi32(high, _mm256_madd_epi16(right, weights));
        }
        // Packing works on each half by itself: the second and third quarter change places.
        let sums = _mm256_packs_epi32(_mm256_sra_epi32(low, shift), _mm256_sra_epi32(high, shift));
        let sums = _mm256_permute4x64_epi64::<0b11_01_10_00>(sums);
        let bytes = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi16(sums, sums));
        // SAFETY: x + 16 <= end, and `to` has as many bytes.
        unsafe { _mm_storeu_si128(to.as_mut_ptr().add(x).cast::<__m128i>(), _mm256_castsi256_si128(bytes)) };
    }
}

/// # Safety
///
/// 16 bytes from `at` on can be read.
#[target_feature(enable = "avx2")]
unsafe fn load(at: *const u8) -> __m128i {
    // SAFETY: as the caller promises; the load needs no alignment.
    unsafe { _mm_loadu_si128(at.cast::<__m128i>()) }
}

#[target_feature(enable = "avx2")]
fn join(low: __m128i, high: __m128i) -> __m256i {
    _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(low), high)
}

/// Two weights in all pairs of 16 bits.
#[target_feature(enable = "avx2")]
fn pair(first: i16, second: i16) -> __m256i {
    _mm256_set1_epi32(i32::from(first as u16) | i32::from(second) << 16)
}

/// The mask that takes these bytes of each half, widened to 16 bits, and zeros after them.
#[target_feature(enable = "avx2")]
fn shuffle([a, b, c, d, e, f]: [i8; 6]) -> __m256i {
    const ZERO: i8 = -1;
    _mm256_setr_epi8(
        a, ZERO, b, ZERO, c, ZERO, d, ZERO, e, ZERO, f, ZERO, ZERO, ZERO, ZERO, ZERO, //
        a, ZERO, b, ZERO, c, ZERO, d, ZERO, e, ZERO, f, ZERO, ZERO, ZERO, ZERO, ZERO,
    )
}
