//! Small f32 products on the calling thread. Operands are read where they lie, except for columns of `b` that do not lie
//! side by side: only those are packed.

use super::super::super::Layout;
use super::super::simd;
use super::kernel::{Block, Kernel};
use super::pack::Source;
use super::product::Operand;
use super::workspace::Workspace;

/// Steps of `k` at a time, as in [`super::matmul`].
const STEPS: usize = 256;

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
    let (a_row, a_step) = if layout == Layout::Tn { (1, a.1) } else { (a.1, 1) };
    let b_operand = Operand { source: Source::F32(b.0), stride: b.1, along_k: layout == Layout::Nt };
    // Columns that are packed: all of them, or the last few, which fill no panel.
    let packed_from = if layout == Layout::Nt { 0 } else { n / nr * nr };
    let block_length = k.div_ceil(k.div_ceil(STEPS).max(1)).next_multiple_of(2);
    let mut packed = Workspace::take((n - packed_from).next_multiple_of(nr) * block_length.max(1));
    let mut start = 0;
    loop {
        let steps = block_length.min(k - start);
        let columns = b_operand.panels(packed_from, n - packed_from, start, steps);
        // SAFETY: the workspace has `nr * steps` words for each packed panel.
        unsafe { (kernel.pack_b)(&columns, packed.words()) }
        let (b, b_panel, b_step) = if layout == Layout::Nt {
            (packed.words().cast_const(), nr * steps, nr)
        } else {
            (b.0.wrapping_add(start * b.1).cast(), nr, b.1)
        };
        let block = Block {
            rows: m,
            columns: n,
            steps,
            a: a.0.wrapping_add(start * a_step).cast(),
            a_panel: mr * a_row,
            a_row,
            a_step,
            b,
            b_panel,
            b_step,
            b_last: packed.words().wrapping_add((n / nr * nr - packed_from) * steps),
            c: c.0,
            c_stride: c.1,
            add: accumulate || start > 0,
        };
        // SAFETY: the caller's promise; the packed columns.
        unsafe { (kernel.block)(&block) }
        start += steps;
        if start >= k {
            return;
        }
    }
}
