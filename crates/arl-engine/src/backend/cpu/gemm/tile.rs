//! Small f32 products on the calling thread. `b` is packed, and `a` where its rows run across `k`: where rows lie a power
//! of two apart, as those of attention do, neighbours would evict each other from the first-level cache.

use super::super::super::Layout;
use super::super::simd;
use super::kernel::{Block, Kernel};
use super::pack::Source;
use super::product::{Operand, STEPS};
use super::workspace::Workspace;

/// `c = a b` (plus `c` where `accumulate`) of f32 on the calling thread alone, for use inside leaves that are parallel
/// themselves. Each operand is given with its stride.
///
/// # Panics
/// If an operand is smaller than its shape.
#[allow(clippy::too_many_arguments, reason = "the arguments of BLAS")]
pub fn tile(
    layout: Layout,
    m: usize,
    n: usize,
    k: usize,
    a: (&[f32], usize),
    b: (&[f32], usize),
    c: (&mut [f32], usize),
    accumulate: bool,
) {
    super::check(layout, m, n, k, (a.0.len(), a.1), (b.0.len(), b.1), (c.0.len(), c.1));
    // SAFETY: just checked; `c` is borrowed mutably, so it overlaps nothing and no other thread has it.
    unsafe {
        tile_pointers(layout, m, n, k, (a.0.as_ptr(), a.1), (b.0.as_ptr(), b.1), (c.0.as_mut_ptr(), c.1), accumulate);
    }
}

/// [`tile`] on pointers to the first elements, for leaves whose threads write disjoint columns of one matrix.
///
/// # Safety
/// `a` and `b` must be readable and `c` readable and writable over their shapes with their strides; no other thread may
/// touch the elements of `c` meanwhile, and `c` overlaps neither `a` nor `b`.
#[allow(clippy::too_many_arguments, reason = "the arguments of BLAS")]
pub unsafe fn tile_pointers(
    layout: Layout,
    m: usize,
    n: usize,
    k: usize,
    a: (*const f32, usize),
    b: (*const f32, usize),
    c: (*mut f32, usize),
    accumulate: bool,
) {
    if m == 0 || n == 0 {
        return;
    }
    let kernel = Kernel::choose(simd::level(), false);
    let Kernel { mr, nr, .. } = *kernel;
    let a_operand = Operand { source: Source::F32(a.0), stride: a.1, along_k: layout != Layout::Tn };
    let b_operand = Operand { source: Source::F32(b.0), stride: b.1, along_k: layout == Layout::Nt };
    let length = k.div_ceil(k.div_ceil(STEPS).max(1)).next_multiple_of(2);
    let a_words = if a_operand.along_k { 0 } else { m.next_multiple_of(mr) * length };
    let mut workspace = Workspace::take(a_words.next_multiple_of(16) + n.next_multiple_of(nr) * length);
    let packed_a = workspace.words();
    let packed_b = packed_a.wrapping_add(a_words.next_multiple_of(16));
    let mut start = 0;
    loop {
        let steps = length.min(k - start);
        // SAFETY: the workspace has `nr * steps` words for each panel of `b`.
        unsafe { (kernel.pack_b)(&b_operand.panels(0, n, start, steps), packed_b) };
        let (a, a_panel, a_row, a_step) = if a_operand.along_k {
            (a.0.wrapping_add(start).cast(), mr * a.1, a.1, 1)
        } else {
            // SAFETY: the workspace has `mr * steps` words for each panel of `a`.
            unsafe { (kernel.pack_a)(&a_operand.panels(0, m, start, steps), packed_a) };
            (packed_a.cast_const(), mr * steps, 1, mr)
        };
        let block = Block {
            rows: m,
            columns: n,
            steps,
            a,
            a_panel,
            a_row,
            a_step,
            b: packed_b,
            b_panel: nr * steps,
            c: c.0,
            c_stride: c.1,
            add: accumulate || start > 0,
        };
        // SAFETY: the caller's promise; the packed panels.
        unsafe { (kernel.block)(&block) }
        start += steps;
        if start >= k {
            return;
        }
    }
}
