//! Matrix products on the CPU: `c = a b` in three layouts, f32, bf16 or f16 operands, sums in f32.
//! Knows slices and strides, nothing of buffers, pools or models.

mod kernel;
mod lanes;
mod operand;
mod pack;
mod panels;
mod product;
#[cfg(test)]
mod tests;
mod workspace;

pub use operand::{Elements, ElementsMut, MatMut, MatRef};
pub use panels::{Left, Products, Right};
pub(super) use workspace::{Workspace, carve};

use self::kernel::Kernel;
use self::pack::Source;
use self::product::{Operand, Product, Target};
use super::super::Layout;
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
    let data = [a.data, b.data];
    let is_bf16 = |data: &Elements<'_>| matches!(data, Elements::Bf16(_));
    let narrow = data.iter().any(is_bf16) && !data.iter().any(|data| matches!(data, Elements::F16(_)));
    matmul_with(Kernel::choose(simd::level(), narrow), layout, m, n, k, a, b, c, accumulate, bias);
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
    if let Some(bias) = bias {
        operand::check("bias", bias.len(), 1, n, n);
    }
    if m == 0 || n == 0 {
        return;
    }
    let source = |data: Elements<'_>| match data {
        Elements::F32(x) => Source::F32(x.as_ptr()),
        Elements::Bf16(x) => Source::Bf16(x.as_ptr()),
        Elements::F16(x) => Source::F16(x.as_ptr()),
    };
    let bias = bias.map(|bias| move |j| bias.get(j));
    let product = Product {
        kernel,
        m,
        n,
        k,
        a: Operand { source: source(a.data), stride: a.stride, along_k: layout != Layout::Tn },
        b: Operand { source: source(b.data), stride: b.stride, along_k: layout == Layout::Nt },
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
