//! The innermost loops: tiles of `c` that stay in registers over a block of `k`, and the kernels there are, each a set of
//! function pointers compiled for its instructions.

use super::super::simd::{Level, prefetch};
#[cfg(target_arch = "x86_64")]
use super::lanes::{Avx2, Avx512};
use super::lanes::{Lanes, Portable};
use super::pack::{Panels, pack};

/// Rows and columns of the largest tile.
const LARGEST_TILE: usize = 12 * 32;
/// Steps that are written out one after the other.
const UNROLLED: usize = 4;
/// Steps that rows of memory are asked for in advance.
const AHEAD: usize = 32;

/// `c[rows, columns] (+)= a b` over `steps` words of `k`.
pub(super) struct Block {
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) steps: usize,
    /// Word of row `i`, step `p`: `a + (i / MR) a_panel + (i % MR) a_row + p a_step`.
    pub(super) a: *const u32,
    pub(super) a_panel: usize,
    pub(super) a_row: usize,
    pub(super) a_step: usize,
    /// Word of column `j`, step `p`: `b + (j / NR) b_panel + j % NR + p NR`; columns that are missing in the last panel are
    /// there, and ignored.
    pub(super) b: *const u32,
    pub(super) b_panel: usize,
    pub(super) c: *mut f32,
    pub(super) c_stride: usize,
    /// Add to `c`, or assign it.
    pub(super) add: bool,
    pub(super) tail: Tail,
}

/// More steps of the same sums, from operands of their own; both are packed.
#[derive(Clone, Copy)]
pub(super) struct Tail {
    pub(super) steps: usize,
    /// Word of row `i`, step `p`: `a + (i / MR) MR steps + i % MR + p MR`.
    pub(super) a: *const u32,
    /// Word of column `j`, step `p`: `b + (j / NR) NR steps + j % NR + p NR`.
    pub(super) b: *const u32,
}

impl Tail {
    pub(super) const NONE: Tail = Tail { steps: 0, a: std::ptr::null(), b: std::ptr::null() };
}

/// What computes, for one set of instructions.
pub(super) struct Kernel {
    /// Rows of a tile.
    pub(super) mr: usize,
    /// Columns of a tile.
    pub(super) nr: usize,
    /// Whether a word holds two bf16 (or one f32).
    pub(super) pairs: bool,
    /// Computes a [`Block`].
    ///
    /// Safety: the CPU has the instructions; the pointers of the block are valid over its shape, `c` for one thread alone.
    pub(super) block: unsafe fn(&Block),
    /// Packs panels of `mr` rows of `a`. Safety: as [`pack`], and the CPU has the instructions.
    pub(super) pack_a: unsafe fn(&Panels, *mut u32),
    /// Packs panels of `nr` columns of `b`. Safety: as `pack_a`.
    pub(super) pack_b: unsafe fn(&Panels, *mut u32),
}

impl Kernel {
    /// The kernel for operands that are to be multiplied as bf16 (`narrow`), or not.
    pub(super) fn choose(level: Level, narrow: bool) -> &'static Kernel {
        match (level, narrow) {
            #[cfg(target_arch = "x86_64")]
            (Level::Avx512Bf16, true) => &AVX512_PAIRS,
            #[cfg(target_arch = "x86_64")]
            (Level::Avx512Bf16 | Level::Avx512, _) => &AVX512,
            #[cfg(target_arch = "x86_64")]
            (Level::Avx2, _) => &AVX2,
            _ => &PORTABLE,
        }
    }
}

macro_rules! kernel {
    ($name:ident, $lanes:ty, $mr:literal, $vectors:literal, $nr:literal, $pairs:literal, $avx2:literal $(, $features:literal)?) => {
        pub(super) static $name: Kernel = {
            $(#[target_feature(enable = $features)])?
            unsafe fn block_(block: &Block) {
                // SAFETY: the contract of the field that this function is called through.
                unsafe { block_of::<$lanes, $mr, $vectors>(block) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn pack_a(panels: &Panels, target: *mut u32) {
                // SAFETY: as above.
                unsafe { pack::<$mr, $pairs, $avx2>(panels, target) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn pack_b(panels: &Panels, target: *mut u32) {
                // SAFETY: as above.
                unsafe { pack::<$nr, $pairs, $avx2>(panels, target) }
            }
            Kernel { mr: $mr, nr: $nr, pairs: $pairs, block: block_, pack_a, pack_b }
        };
    };
}

// 6 x 2 vectors: 12 sums, 2 columns of b and one of a fill the 16 registers of AVX2. AVX-512 has 32.
kernel!(PORTABLE, Portable, 6, 2, 16, false, false);
#[cfg(target_arch = "x86_64")]
kernel!(AVX2, Avx2, 6, 2, 16, false, true, "avx2,fma");
#[cfg(target_arch = "x86_64")]
kernel!(AVX512, Avx512<false>, 12, 2, 32, false, true, "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl");
#[cfg(target_arch = "x86_64")]
kernel!(AVX512_PAIRS, Avx512<true>, 12, 2, 32, true, true, "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16");
#[cfg(test)]
kernel!(PORTABLE_PAIRS, super::lanes::PortablePairs, 12, 1, 32, true, false);
#[cfg(all(test, target_arch = "x86_64"))]
kernel!(AVX2_PAIRS, super::lanes::PortablePairs, 12, 1, 32, true, true, "avx2,fma");

/// # Safety
/// As [`Kernel::block`].
#[inline(always)]
unsafe fn block_of<L: Lanes, const MR: usize, const VECTORS: usize>(block: &Block) {
    let nr = VECTORS * L::N;
    // SAFETY: all offsets stay within the shapes that the caller vouches for.
    unsafe {
        for column in (0..block.columns).step_by(nr) {
            let columns = nr.min(block.columns - column);
            let b = block.b.add(column / nr * block.b_panel);
            for row in (0..block.rows).step_by(MR) {
                let rows = MR.min(block.rows - row);
                let a = block.a.add(row / MR * block.a_panel);
                let tail = Tail {
                    steps: block.tail.steps,
                    a: block.tail.a.wrapping_add(row * block.tail.steps),
                    b: block.tail.b.wrapping_add(column * block.tail.steps),
                };
                let c = block.c.add(row * block.c_stride + column);
                if columns == nr {
                    tile_of_rows::<L, MR, VECTORS, VECTORS>(rows, (block, tail), a, b, c, block.c_stride, block.add);
                } else if columns == L::N {
                    // Adapters of rank 16 have no more: half of a wide tile would be zeros.
                    tile_of_rows::<L, MR, 1, VECTORS>(rows, (block, tail), a, b, c, block.c_stride, block.add);
                } else {
                    let mut tile = [0f32; LARGEST_TILE];
                    if columns < L::N {
                        tile_of_rows::<L, MR, 1, VECTORS>(rows, (block, tail), a, b, tile.as_mut_ptr(), nr, false);
                    } else {
                        tile_of_rows::<L, MR, VECTORS, VECTORS>(
                            rows,
                            (block, tail),
                            a,
                            b,
                            tile.as_mut_ptr(),
                            nr,
                            false,
                        );
                    }
                    for i in 0..rows {
                        for j in 0..columns {
                            let target = c.add(i * block.c_stride + j);
                            *target = if block.add { *target + tile[i * nr + j] } else { tile[i * nr + j] };
                        }
                    }
                }
            }
        }
    }
}

/// # Safety
/// As [`Kernel::block`]; `c` is valid for `rows` rows of `VECTORS` vectors, of the `PANEL` that a step of `b` has.
#[allow(clippy::too_many_arguments, reason = "one caller; inlined")]
#[inline(always)]
unsafe fn tile_of_rows<L: Lanes, const MR: usize, const VECTORS: usize, const PANEL: usize>(
    rows: usize,
    block: (&Block, Tail),
    a: *const u32,
    b: *const u32,
    c: *mut f32,
    c_stride: usize,
    add: bool,
) {
    macro_rules! dispatch {
        ($($count:literal)*) => {
            match rows {
                // SAFETY: the caller's promise.
                $($count if $count < MR => unsafe { tile::<L, $count, MR, VECTORS, PANEL>(block, a, b, c, c_stride, add) },)*
                // SAFETY: as above.
                _ => unsafe { tile::<L, MR, MR, VECTORS, PANEL>(block, a, b, c, c_stride, add) },
            }
        };
    }
    dispatch!(1 2 3 4 5 6 7 8 9 10 11)
}

/// # Safety
/// As [`tile_of_rows`], of `R` rows.
#[inline(always)]
unsafe fn tile<L: Lanes, const R: usize, const MR: usize, const VECTORS: usize, const PANEL: usize>(
    (block, tail): (&Block, Tail),
    a: *const u32,
    mut b: *const u32,
    c: *mut f32,
    c_stride: usize,
    add: bool,
) {
    // SAFETY: within the shapes that the caller vouches for; the last step's advance is never read from.
    unsafe {
        for i in 0..R {
            prefetch(c.wrapping_add(i * c_stride));
            prefetch(c.wrapping_add(i * c_stride + VECTORS * L::N - 1));
        }
        let mut sums = [[L::zero(); VECTORS]; R];
        if block.a_row == 1 && block.a_step == MR {
            // Packed: every address is a constant away from one of two pointers.
            let mut a = a;
            for _ in 0..block.steps / UNROLLED {
                for p in 0..UNROLLED {
                    step::<L, R, VECTORS>(&mut sums, |i| a.add(p * MR + i), b.add(p * PANEL * L::N));
                }
                a = a.wrapping_add(UNROLLED * MR);
                b = b.wrapping_add(UNROLLED * PANEL * L::N);
            }
            for p in 0..block.steps % UNROLLED {
                step::<L, R, VECTORS>(&mut sums, |i| a.add(p * MR + i), b.add(p * PANEL * L::N));
            }
        } else {
            // A pointer for every three rows, which the compiler may not derive from each other: one after the other
            // they would be a chain of additions longer than the arithmetic.
            let (a_row, a_step) = (block.a_row, block.a_step);
            let mut rows: [*const u32; 4] = std::array::from_fn(|i| opaque(a.wrapping_add(3 * i * a_row)));
            // Steps that ask for a later one. None asks for what is behind the last: where that is no memory of this process, the
            // processor walks the page tables for each request, which takes longer than the step.
            let asking = if a_row == 1 { block.steps.saturating_sub(AHEAD) } else { 0 };
            for p in 0..block.steps {
                if p < asking {
                    // Each step is a row of memory of its own, whose place the processor does not foresee.
                    let later = rows[0].wrapping_add(AHEAD * a_step);
                    prefetch(later);
                    prefetch(later.wrapping_add(R - 1));
                }
                step::<L, R, VECTORS>(&mut sums, |i| rows[i / 3].add(i % 3 * a_row), b);
                rows = rows.map(|row| row.wrapping_add(a_step));
                b = b.wrapping_add(PANEL * L::N);
            }
        }
        let (mut a, mut b) = (tail.a, tail.b);
        for _ in 0..tail.steps {
            step::<L, R, VECTORS>(&mut sums, |i| a.add(i), b);
            a = a.wrapping_add(MR);
            b = b.wrapping_add(PANEL * L::N);
        }
        for (i, sums) in sums.iter().enumerate() {
            for (v, &sum) in sums.iter().enumerate() {
                let target = c.add(i * c_stride + v * L::N).cast::<u32>();
                let sum = if add { L::load(target).add(sum) } else { sum };
                sum.store(target);
            }
        }
    }
}

/// One word of `k`: the outer product of a column of `a` and a row of `b`.
///
/// # Safety
/// As [`tile`]; `a` gives the address of a row's word.
#[allow(clippy::needless_range_loop, reason = "iterators are functions without the instructions of their caller")]
#[inline(always)]
unsafe fn step<L: Lanes, const R: usize, const VECTORS: usize>(
    sums: &mut [[L; VECTORS]; R],
    a: impl Fn(usize) -> *const u32,
    b: *const u32,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut columns = [L::zero(); VECTORS];
        for v in 0..VECTORS {
            columns[v] = L::load(b.add(v * L::N));
        }
        for i in 0..R {
            let x = L::splat(a(i));
            for v in 0..VECTORS {
                sums[i][v] = sums[i][v].step(x, columns[v]);
            }
        }
    }
}

/// The same pointer, of which the compiler knows nothing.
#[inline(always)]
fn opaque(pointer: *const u32) -> *const u32 {
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    {
        let mut pointer = pointer;
        // SAFETY: no instruction at all. (That it may touch memory is not denied, for it holds a pointer.)
        unsafe { std::arch::asm!("/* {0} */", inout(reg) pointer, options(nostack, preserves_flags)) };
        pointer
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    pointer
}
