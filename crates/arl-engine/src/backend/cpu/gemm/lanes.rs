//! Vectors of f32 sums, as a trait that the micro-kernel is generic over, so that the code that runs on one width is the
//! code that runs on all. A word is 32 bits of a packed operand: an f32, or a pair of bf16 (the earlier of the two
//! along `k` in the low half).

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// A vector of f32 sums and the one step that extends them.
///
/// # Safety
/// The methods may only be called where the CPU has the instructions that the type is named after; `load`, `store` and
/// `splat` take pointers valid for `N`, `N` and 1 words.
pub(super) trait Lanes: Copy {
    /// Sums in a vector.
    const N: usize;
    unsafe fn zero() -> Self;
    unsafe fn load(words: *const u32) -> Self;
    unsafe fn store(self, words: *mut u32);
    unsafe fn splat(word: *const u32) -> Self;
    unsafe fn add(self, other: Self) -> Self;
    /// `self + a * b`; with words of pairs, `self + a.low * b.low + a.high * b.high`.
    unsafe fn step(self, a: Self, b: Self) -> Self;
}

/// Plain Rust, for CPUs without the instructions below.
#[derive(Clone, Copy)]
pub(super) struct Portable([f32; 8]);

impl Lanes for Portable {
    const N: usize = 8;
    #[inline(always)]
    unsafe fn zero() -> Self {
        Portable([0.0; 8])
    }
    #[inline(always)]
    unsafe fn load(words: *const u32) -> Self {
        // SAFETY: the trait's contract.
        Portable(unsafe { words.cast::<[f32; 8]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store(self, words: *mut u32) {
        // SAFETY: the trait's contract.
        unsafe { words.cast::<[f32; 8]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn splat(word: *const u32) -> Self {
        // SAFETY: the trait's contract.
        Portable([unsafe { word.cast::<f32>().read_unaligned() }; 8])
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        Portable(std::array::from_fn(|i| self.0[i] + other.0[i]))
    }
    #[inline(always)]
    unsafe fn step(self, a: Self, b: Self) -> Self {
        // Fused where the instruction is always there; elsewhere a fused product would be a library call.
        Portable(std::array::from_fn(|i| {
            if cfg!(target_arch = "aarch64") { a.0[i].mul_add(b.0[i], self.0[i]) } else { self.0[i] + a.0[i] * b.0[i] }
        }))
    }
}

/// Words of pairs in plain Rust; only to prove the packing of pairs on any CPU. Never inlined: speed is nothing here.
#[cfg(test)]
#[derive(Clone, Copy)]
pub(super) struct PortablePairs([f32; 32]);

#[cfg(test)]
impl Lanes for PortablePairs {
    const N: usize = 32;
    unsafe fn zero() -> Self {
        PortablePairs([0.0; 32])
    }
    #[inline(never)]
    unsafe fn load(words: *const u32) -> Self {
        // SAFETY: the trait's contract.
        PortablePairs(unsafe { words.cast::<[f32; 32]>().read_unaligned() })
    }
    #[inline(never)]
    unsafe fn store(self, words: *mut u32) {
        // SAFETY: the trait's contract.
        unsafe { words.cast::<[f32; 32]>().write_unaligned(self.0) }
    }
    #[inline(never)]
    unsafe fn splat(word: *const u32) -> Self {
        // SAFETY: the trait's contract.
        PortablePairs([unsafe { word.cast::<f32>().read_unaligned() }; 32])
    }
    #[inline(never)]
    unsafe fn add(self, other: Self) -> Self {
        PortablePairs(std::array::from_fn(|i| self.0[i] + other.0[i]))
    }
    #[inline(never)]
    unsafe fn step(self, a: Self, b: Self) -> Self {
        let halves = |x: f32| (f32::from_bits(x.to_bits() << 16), f32::from_bits(x.to_bits() & 0xffff_0000));
        PortablePairs(std::array::from_fn(|i| {
            let ((a_low, a_high), (b_low, b_high)) = (halves(a.0[i]), halves(b.0[i]));
            self.0[i] + a_high * b_high + a_low * b_low
        }))
    }
}

/// 256 bits, fused.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(super) struct Avx2(__m256);

#[cfg(target_arch = "x86_64")]
impl Lanes for Avx2 {
    const N: usize = 8;
    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the trait's contract, here and below.
        Avx2(unsafe { _mm256_setzero_ps() })
    }
    #[inline(always)]
    unsafe fn load(words: *const u32) -> Self {
        // SAFETY: see `zero`.
        Avx2(unsafe { _mm256_loadu_ps(words.cast()) })
    }
    #[inline(always)]
    unsafe fn store(self, words: *mut u32) {
        // SAFETY: see `zero`.
        unsafe { _mm256_storeu_ps(words.cast(), self.0) }
    }
    #[inline(always)]
    unsafe fn splat(word: *const u32) -> Self {
        // SAFETY: see `zero`.
        Avx2(unsafe { _mm256_broadcast_ss(&*word.cast()) })
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: see `zero`.
        Avx2(unsafe { _mm256_add_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn step(self, a: Self, b: Self) -> Self {
        // SAFETY: see `zero`.
        Avx2(unsafe { _mm256_fmadd_ps(a.0, b.0, self.0) })
    }
}

/// 512 bits, fused; with `PAIRS`, dot products of bf16 pairs.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(super) struct Avx512<const PAIRS: bool>(__m512);

#[cfg(target_arch = "x86_64")]
impl<const PAIRS: bool> Lanes for Avx512<PAIRS> {
    const N: usize = 16;
    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the trait's contract, here and below.
        Avx512(unsafe { _mm512_setzero_ps() })
    }
    #[inline(always)]
    unsafe fn load(words: *const u32) -> Self {
        // SAFETY: see `zero`.
        Avx512(unsafe { _mm512_loadu_ps(words.cast()) })
    }
    #[inline(always)]
    unsafe fn store(self, words: *mut u32) {
        // SAFETY: see `zero`.
        unsafe { _mm512_storeu_ps(words.cast(), self.0) }
    }
    #[inline(always)]
    unsafe fn splat(word: *const u32) -> Self {
        // SAFETY: see `zero`. An integer broadcast, so that the bits of a pair are never taken for a number.
        Avx512(unsafe { _mm512_castsi512_ps(_mm512_set1_epi32(word.cast::<i32>().read_unaligned())) })
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: see `zero`.
        Avx512(unsafe { _mm512_add_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn step(self, a: Self, b: Self) -> Self {
        // SAFETY: see `zero`; the types of the two transmutes are 512 plain bits each.
        unsafe {
            if PAIRS {
                Avx512(_mm512_dpbf16_ps(
                    self.0,
                    std::mem::transmute::<__m512, __m512bh>(a.0),
                    std::mem::transmute::<__m512, __m512bh>(b.0),
                ))
            } else {
                Avx512(_mm512_fmadd_ps(a.0, b.0, self.0))
            }
        }
    }
}
