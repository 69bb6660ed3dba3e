//! Matrix products on the CPU: `c = a b` in three layouts, f32, bf16 or f16 operands, sums in f32.
//! Knows slices and strides, nothing of buffers, pools or models.

mod kernel;
mod lanes;
mod nf4;
mod operand;
mod pack;
mod panels;
mod product;
#[cfg(test)]
mod tests;
mod workspace;

pub use nf4::{Nf4Matrix, Nf4Scales, Nf4Tensor};
pub use operand::{Elements, ElementsMut, MatMut, MatRef};
pub use panels::{Left, Products, Right};
pub(super) use workspace::{Workspace, carve};

use self::kernel::Kernel;
use self::pack::Source;
use self::product::{Operand, Product, RightOperand, Target};
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
    assert!(layout != Layout::Tn, "weights in NF4 are no rows of tokens");
    let along_k = layout == Layout::Nt;
    assert_eq!(b.width, if along_k { k } else { n }, "columns of weights in NF4");
    check(layout, m, n, k, (a.data.len(), a.stride), (b.len(), b.width), (c.data.len(), c.stride));
    let kernel = kernel_for([dtype_of(a.data), b.dtype]);
    multiply(kernel, layout, m, n, k, a, RightOperand::Nf4 { matrix: b, along_k }, c, accumulate, bias);
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
    multiply(kernel, layout, m, n, k, a, b, c, accumulate, bias);
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
    c: MatMut<'_>,
    accumulate: bool,
    bias: Option<Elements<'_>>,
) {
    if let Some(bias) = bias {
        operand::check("bias", bias.len(), 1, n, n);
    }
    if m == 0 || n == 0 {
        return;
    }
    let bias = bias.map(|bias| move |j| bias.get(j));
    let product = Product {
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
    };
    // SAFETY: the shapes were checked against the slices; `c` is borrowed mutably, so it overlaps nothing and no other
    // thread has it. The kernel is one that this CPU can run.
    unsafe { product.run(true) }
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
