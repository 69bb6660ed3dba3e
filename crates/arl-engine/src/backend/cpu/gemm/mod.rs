//! Matrix products on the CPU: `c = a b` in three layouts, f32, bf16 or f16 operands, sums in f32.
//! Knows slices and strides, nothing of buffers, pools or models.

mod kernel;
mod lanes;
mod low_rank;
#[cfg(test)]
mod low_rank_tests;
mod nf4;
mod operand;
mod pack;
mod panels;
mod product;
#[cfg(test)]
mod tests;
mod workspace;

pub use low_rank::{Addition, Factor, LowRank, Projection};
pub use nf4::{Nf4Matrix, Nf4Scales, Nf4Tensor};
pub use operand::{Elements, ElementsMut, MatMut, MatRef};
pub use panels::{Left, Products, Right};
pub(super) use workspace::{Workspace, carve};

use self::kernel::Kernel;
use self::low_rank::Packed;
use self::pack::Source;
use self::product::{FAR, IN_PLACE_ACROSS, Operand, Product, RightOperand, Target};
use rayon::prelude::*;
use std::ops::Range;

use super::super::{DType, Layout};
use super::simd;

/// `c[m, n] = a b` (plus `c` where `accumulate`, plus `bias[n]` in each row), `a` and `b` as `layout` says. Runs on
/// rayon's current pool; the bits of the result do not depend on its number of threads, nor those of a row of `c` on the
/// other rows.
///
/// Sums are f32. Where the CPU multiplies pairs of bf16 and one operand is bf16, the other one is rounded to it, unless it
/// is f16.
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
    c: MatMut<'_>,
    accumulate: bool,
    bias: Option<Elements<'_>>,
) {
    matmul_with(kernel_for([dtype_of(a.data), dtype_of(b.data)]), layout, m, n, k, a, b, c, accumulate, bias);
}

/// [`matmul`] whose right operand is weights in NF4, `[n, k]` (`Nt`) or `[k, n]` (`Nn`): the bits are those of the product with what
/// they stand for, in the matrix's type.
///
/// # Panics
/// If an operand is smaller than its shape.
#[allow(clippy::too_many_arguments, reason = "the arguments of BLAS")]
pub fn matmul_nf4(
    layout: Layout,
    m: usize,
    n: usize,
    k: usize,
    a: MatRef<'_>,
    b: &Nf4Matrix<'_>,
    c: MatMut<'_>,
    accumulate: bool,
    bias: Option<Elements<'_>>,
) {
    matmul_low_rank(layout, m, n, k, a, Matrix::Nf4(b), c, accumulate, bias, None);
}

/// A right operand of either kind.
#[derive(Clone, Copy, Debug)]
pub enum Matrix<'a> {
    /// As [`matmul`] takes it.
    Plain(MatRef<'a>),
    /// As [`matmul_nf4`] does.
    Nf4(&'a Nf4Matrix<'a>),
}

/// [`matmul`] or [`matmul_nf4`], and what is low-rank next to it, of which [`takes_low_rank`] holds. That is f32, as `a` and `c` are.
///
/// # Panics
/// If an operand is smaller than its shape.
#[allow(clippy::too_many_arguments, reason = "the arguments of BLAS")]
pub fn matmul_low_rank(
    layout: Layout,
    m: usize,
    n: usize,
    k: usize,
    a: MatRef<'_>,
    b: Matrix<'_>,
    c: MatMut<'_>,
    accumulate: bool,
    bias: Option<Elements<'_>>,
    low_rank: Option<&mut LowRank<'_>>,
) {
    let along_k = layout == Layout::Nt;
    let (a_type, a_shape, c_shape) = (dtype_of(a.data), (a.data.len(), a.stride), (c.data.len(), c.stride));
    let (kernel, b) = match b {
        Matrix::Plain(b) => {
            check(layout, m, n, k, a_shape, (b.data.len(), b.stride), c_shape);
            let operand = Operand { source: source(b.data), stride: b.stride, along_k };
            (kernel_for([a_type, dtype_of(b.data)]), RightOperand::Plain(operand))
        }
        Matrix::Nf4(matrix) => {
            assert!(layout != Layout::Tn, "weights in NF4 are no rows of tokens");
            assert_eq!(matrix.width, if along_k { k } else { n }, "columns of weights in NF4");
            check(layout, m, n, k, a_shape, (matrix.len(), matrix.width), c_shape);
            (kernel_for([a_type, matrix.dtype]), RightOperand::Nf4 { matrix, along_k })
        }
    };
    multiply(kernel, layout, m, n, k, a, b, c, accumulate, bias, low_rank);
}

/// Whether a product of `n` columns over `k`, all f32, takes additions to these columns in.
pub fn takes_low_rank(n: usize, k: usize, additions: impl IntoIterator<Item = Range<usize>>) -> bool {
    let nr = kernel_for([DType::F32; 2]).nr;
    let whole = |column: usize| column.is_multiple_of(nr) || column == n;
    k > 0 && additions.into_iter().all(|columns| whole(columns.start) && whole(columns.end))
}

fn dtype_of(data: Elements<'_>) -> DType {
    match data {
        Elements::F32(_) => DType::F32,
        Elements::Bf16(_) => DType::Bf16,
        Elements::F16(_) => DType::F16,
    }
}

/// The kernel for operands of these types.
fn kernel_for(types: [DType; 2]) -> &'static Kernel {
    let narrow = types.contains(&DType::Bf16) && !types.contains(&DType::F16);
    Kernel::choose(simd::level(), narrow)
}

#[allow(clippy::too_many_arguments, reason = "the arguments of BLAS")]
fn matmul_with(
    kernel: &'static Kernel,
    layout: Layout,
    m: usize,
    n: usize,
    k: usize,
    a: MatRef<'_>,
    b: MatRef<'_>,
    c: MatMut<'_>,
    accumulate: bool,
    bias: Option<Elements<'_>>,
) {
    check(layout, m, n, k, (a.data.len(), a.stride), (b.data.len(), b.stride), (c.data.len(), c.stride));
    let b = RightOperand::Plain(Operand { source: source(b.data), stride: b.stride, along_k: layout == Layout::Nt });
    multiply(kernel, layout, m, n, k, a, b, c, accumulate, bias, None);
}

fn source(data: Elements<'_>) -> Source {
    match data {
        Elements::F32(x) => Source::F32(x.as_ptr()),
        Elements::Bf16(x) => Source::Bf16(x.as_ptr()),
        Elements::F16(x) => Source::F16(x.as_ptr()),
    }
}

/// A product whose operands were checked against their shapes.
#[allow(clippy::too_many_arguments, reason = "the arguments of BLAS")]
fn multiply(
    kernel: &'static Kernel,
    layout: Layout,
    m: usize,
    n: usize,
    k: usize,
    a: MatRef<'_>,
    b: RightOperand<'_>,
    mut c: MatMut<'_>,
    accumulate: bool,
    bias: Option<Elements<'_>>,
    low_rank: Option<&mut LowRank<'_>>,
) {
    if let Some(bias) = bias {
        operand::check("bias", bias.len(), 1, n, n);
    }
    if m == 0 || n == 0 {
        return;
    }
    if let (Layout::Tn, RightOperand::Plain(right), ElementsMut::F32(data), None) = (layout, b, &mut c.data, bias)
        && few_rows(kernel, m, n, right.stride)
        && let (Source::F32(_), left @ Elements::F32(_)) = (right.source, a.data)
    {
        let left = Operand { source: source(left), stride: a.stride, along_k: false };
        return by_columns(kernel, [m, n, k], left, right, (data, c.stride), accumulate);
    }
    let bias = bias.map(|bias| move |j| bias.get(j));
    let mut product = Product {
        kernel,
        m,
        n,
        k,
        a: Operand { source: source(a.data), stride: a.stride, along_k: layout != Layout::Tn },
        b,
        c: match c.data {
            ElementsMut::F32(x) => Target::F32(x.as_mut_ptr()),
            ElementsMut::Bf16(x) => Target::Bf16(x.as_mut_ptr()),
            ElementsMut::F16(x) => Target::F16(x.as_mut_ptr()),
        },
        c_stride: c.stride,
        accumulate,
        bias: bias.as_ref().map(|bias| bias as &(dyn Fn(usize) -> f32 + Sync)),
        low_rank: None,
    };
    let packed = low_rank.map(|low_rank| {
        low_rank.check(m, n, k);
        // SAFETY: the kernel is one that this CPU can run.
        unsafe { Packed::new(kernel, low_rank, product.block()) }
    });
    product.low_rank = packed.as_ref();
    // SAFETY: the shapes were checked against the slices; `c` is borrowed mutably, so it overlaps nothing and no other
    // thread has it. The kernel is one that this CPU can run.
    unsafe { product.run(true) }
}

/// Whether a product over rows of memory (`Tn`) has few rows and many columns: then its right operand, which is the larger one, had
/// better be the left one, which is read where it is.
fn few_rows(kernel: &Kernel, m: usize, n: usize, stride: usize) -> bool {
    stride >= FAR && m.div_ceil(kernel.nr) <= IN_PLACE_ACROSS && n.div_ceil(kernel.nr) > IN_PLACE_ACROSS
}

/// `c[m, n] = a^T b` (plus `c`) from its transpose, `b^T a`.
fn by_columns(
    kernel: &'static Kernel,
    [m, n, k]: [usize; 3],
    a: Operand,
    b: Operand,
    (c, c_stride): (&mut [f32], usize),
    accumulate: bool,
) {
    let mut memory = Workspace::take(n * m);
    let transposed = &mut memory.floats()[..n * m];
    let product = Product {
        kernel,
        m: n,
        n: m,
        k,
        a: b,
        b: RightOperand::Plain(a),
        c: Target::F32(transposed.as_mut_ptr()),
        c_stride: m,
        accumulate: false,
        bias: None,
        low_rank: None,
    };
    // SAFETY: the caller has checked both operands; the result is the workspace's.
    unsafe { product.run(true) }
    let transposed = &*transposed;
    c.par_chunks_mut(c_stride).take(m).enumerate().for_each(|(i, row)| {
        for (x, column) in row.iter_mut().zip(transposed.chunks_exact(m)) {
            *x = if accumulate { *x + column[i] } else { column[i] };
        }
    });
}

/// Panics unless each operand, given as its number of elements and its stride, has its shape.
fn check(layout: Layout, m: usize, n: usize, k: usize, a: (usize, usize), b: (usize, usize), c: (usize, usize)) {
    let (a_shape, b_shape) = match layout {
        Layout::Nt => ((m, k), (n, k)),
        Layout::Nn => ((m, k), (k, n)),
        Layout::Tn => ((k, m), (k, n)),
    };
    operand::check("a", a.0, a_shape.0, a_shape.1, a.1);
    operand::check("b", b.0, b_shape.0, b_shape.1, b.1);
    operand::check("c", c.0, m, n, c.1);
}
