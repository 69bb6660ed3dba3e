//! Matrix products on the CPU: `c = a b` in three layouts, f32 or bf16 operands, sums in f32.
//! Knows slices and strides, nothing of buffers, pools or models.

mod operand;
#[cfg(test)]
mod tests;

pub use operand::{Elements, ElementsMut, MatMut, MatRef};

use super::super::Layout;
use half::bf16;

/// `c[m, n] = a b` (plus `c` where `accumulate`, plus `bias[n]` in each row), `a` and `b` as `layout` says. Runs on
/// rayon's current pool; the bits of the result do not depend on its number of threads.
///
/// # Panics
/// If an operand is smaller than its shape.
#[allow(clippy::too_many_arguments, reason = "the arguments of BLAS")]
pub fn matmul(
    layout: Layout,
    m: usize,
    n: usize,
    k: usize,
    a: MatRef<'_>,
    b: MatRef<'_>,
    mut c: MatMut<'_>,
    accumulate: bool,
    bias: Option<Elements<'_>>,
) {
    let (a_shape, b_shape) = match layout {
        Layout::Nt => ((m, k), (n, k)),
        Layout::Nn => ((m, k), (k, n)),
        Layout::Tn => ((k, m), (k, n)),
    };
    operand::check("a", a.data.len(), a_shape.0, a_shape.1, a.stride);
    operand::check("b", b.data.len(), b_shape.0, b_shape.1, b.stride);
    operand::check("c", c.data.len(), m, n, c.stride);
    if let Some(bias) = bias {
        operand::check("bias", bias.len(), 1, n, n);
    }
    if m == 0 || n == 0 {
        return;
    }
    let mut sums = vec![0f32; if matches!(c.data, ElementsMut::F32(_)) { 0 } else { m * n }];
    let a_wide = widen(&a);
    let b_wide = widen(&b);
    let a_data = a_wide.as_deref().unwrap_or(match a.data {
        Elements::F32(x) => x,
        Elements::Bf16(_) => &[],
    });
    let b_data = b_wide.as_deref().unwrap_or(match b.data {
        Elements::F32(x) => x,
        Elements::Bf16(_) => &[],
    });
    let (target, stride, direct) = match &mut c.data {
        ElementsMut::F32(x) => (&mut **x, c.stride, true),
        ElementsMut::Bf16(_) => (&mut sums[..], n, false),
    };
    let (a_row, a_column) = if layout == Layout::Tn { (1, a.stride) } else { (a.stride, 1) };
    let (b_row, b_column) = if layout == Layout::Nt { (1, b.stride) } else { (b.stride, 1) };
    let read = accumulate && direct;
    // SAFETY: the shapes were checked against the slices; `target` is borrowed mutably and overlaps nothing.
    unsafe {
        ::gemm::gemm(
            m,
            n,
            k,
            target.as_mut_ptr(),
            1,
            stride as isize,
            read,
            a_data.as_ptr(),
            a_column as isize,
            a_row as isize,
            b_data.as_ptr(),
            b_column as isize,
            b_row as isize,
            if read { 1.0 } else { 0.0 },
            1.0,
            false,
            false,
            false,
            ::gemm::Parallelism::Rayon(0),
        );
    }
    let bias = |j: usize| bias.map_or(0.0, |bias| bias.get(j));
    if direct {
        for row in target.chunks_mut(stride).take(m) {
            for (j, x) in row.iter_mut().take(n).enumerate() {
                *x += bias(j);
            }
        }
    } else {
        let sums = target.to_vec();
        if let ElementsMut::Bf16(x) = c.data {
            for i in 0..m {
                for j in 0..n {
                    let old = if accumulate { x[i * c.stride + j].to_f32() } else { 0.0 };
                    x[i * c.stride + j] = bf16::from_f32(sums[i * n + j] + old + bias(j));
                }
            }
        }
    }
}

fn widen(x: &MatRef<'_>) -> Option<Vec<f32>> {
    match x.data {
        Elements::F32(_) => None,
        Elements::Bf16(x) => Some(x.iter().map(|x| x.to_f32()).collect()),
    }
}

/// [`matmul`] of f32 on the calling thread alone, for use inside leaves that are parallel themselves.
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
    let (a_shape, b_shape) = match layout {
        Layout::Nt => ((m, k), (n, k)),
        Layout::Nn => ((m, k), (k, n)),
        Layout::Tn => ((k, m), (k, n)),
    };
    operand::check("a", a.0.len(), a_shape.0, a_shape.1, a.1);
    operand::check("b", b.0.len(), b_shape.0, b_shape.1, b.1);
    operand::check("c", c.0.len(), m, n, c.1);
    // SAFETY: just checked; `c` is borrowed mutably and overlaps nothing.
    unsafe {
        tile_pointers(layout, m, n, k, (a.0.as_ptr(), a.1), (b.0.as_ptr(), b.1), (c.0.as_mut_ptr(), c.1), accumulate)
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
    let (a_row, a_column) = if layout == Layout::Tn { (1, a.1) } else { (a.1, 1) };
    let (b_row, b_column) = if layout == Layout::Nt { (1, b.1) } else { (b.1, 1) };
    // SAFETY: the caller's promise.
    unsafe {
        ::gemm::gemm(
            m,
            n,
            k,
            c.0,
            1,
            c.1 as isize,
            accumulate,
            a.0,
            a_column as isize,
            a_row as isize,
            b.0,
            b_column as isize,
            b_row as isize,
            if accumulate { 1.0 } else { 0.0 },
            1.0,
            false,
            false,
            false,
            ::gemm::Parallelism::None,
        );
    }
}
