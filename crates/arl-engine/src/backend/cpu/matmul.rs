//! From buffers to the slices that the GEMM takes; and the matrix products of a mixture of experts.

use half::{bf16, f16};
use rayon::prelude::*;

use super::embedding::index;
use super::gemm::{
    self, Addition, Elements, ElementsMut, Factor, LowRank, MatMut, MatRef, Matrix, Nf4Matrix, Nf4Tensor, Projection,
};
use super::memory::Lease;
use super::nf4;
use crate::backend::{
    Buffer, DType, GroupedMatmul, Layout, LowRankFactor, LowRankMatmul, Matmul, Nf4Matmul, Product, Rows,
};

fn elements<'m>(lease: &mut Lease<'m>, buffer: Buffer) -> Elements<'m> {
    match buffer.dtype {
        DType::Bf16 => Elements::Bf16(lease.read(buffer)),
        DType::F16 => Elements::F16(lease.read(buffer)),
        _ => Elements::F32(lease.read(buffer)),
    }
}

fn elements_mut<'m>(lease: &mut Lease<'m>, buffer: Buffer) -> ElementsMut<'m> {
    match buffer.dtype {
        DType::Bf16 => ElementsMut::Bf16(lease.write(buffer)),
        DType::F16 => ElementsMut::F16(lease.write(buffer)),
        _ => ElementsMut::F32(lease.write(buffer)),
    }
}

/// One matrix product.
pub(super) fn matmul(lease: &mut Lease<'_>, op: &Matmul) {
    multiply(lease, op, None);
}

fn multiply(lease: &mut Lease<'_>, op: &Matmul, low_rank: Option<&mut LowRank<'_>>) {
    let a = MatRef { data: elements(lease, op.a.buffer), stride: op.a.stride };
    let b = MatRef { data: elements(lease, op.b.buffer), stride: op.b.stride };
    let bias = op.bias.map(|bias| elements(lease, bias));
    let c = MatMut { data: elements_mut(lease, op.c.buffer), stride: op.c.stride };
    gemm::matmul_low_rank(op.layout, op.m, op.n, op.k, a, Matrix::Plain(b), c, op.accumulate, bias, low_rank);
}

/// One with weights in NF4.
pub(super) fn matmul_nf4(lease: &mut Lease<'_>, op: &Nf4Matmul<'_>) {
    multiply_nf4(lease, op, None);
}

fn multiply_nf4(lease: &mut Lease<'_>, op: &Nf4Matmul<'_>, low_rank: Option<&mut LowRank<'_>>) {
    let a = MatRef { data: elements(lease, op.a.buffer), stride: op.a.stride };
    let tensors: Vec<Nf4Tensor<'_>> = op.weights.iter().map(|weights| nf4::tensor(lease, weights)).collect();
    let bias = op.bias.map(|bias| elements(lease, bias));
    let c = MatMut { data: elements_mut(lease, op.c.buffer), stride: op.c.stride };
    let (_, width) = op.shape();
    let matrix = Nf4Matrix { tensors: &tensors, width, dtype: op.dtype };
    gemm::matmul_low_rank(op.layout, op.m, op.n, op.k, a, Matrix::Nf4(&matrix), c, op.accumulate, bias, low_rank);
}

/// One with weights, and what adapters add to it, at once; false, and nothing computed, where they do not go together.
pub(super) fn low_rank(lease: &mut Lease<'_>, op: &LowRankMatmul<'_>) -> bool {
    let whole = op.product.shape();
    let factors = || op.projections.iter().chain(op.additions);
    let mut operands = [whole.a.buffer, whole.c.buffer, op.low].into_iter().chain(factors().map(|part| part.weight));
    let additions = op.additions.iter().map(|part| part.columns.clone());
    if operands.any(|buffer| buffer.dtype != DType::F32) || !gemm::takes_low_rank(whole.n, whole.k, additions) {
        return false;
    }
    let along = whole.layout == Layout::Nt;
    let mut factor = |part: &LowRankFactor, [n, k]: [usize; 2]| Factor {
        matrix: MatRef { data: elements(lease, part.weight), stride: if along { k } else { n } },
        along,
    };
    let projections = op.projections.iter().map(|part| {
        let (columns, k) = (part.low.len(), part.columns.clone());
        Projection { at: part.low.start, columns, b: factor(part, [columns, k.len()]), k }
    });
    let projections: Vec<_> = projections.collect();
    let additions = op.additions.iter().map(|part| Addition {
        columns: part.columns.clone(),
        low: part.low.clone(),
        b: factor(part, [part.columns.len(), part.low.len()]),
    });
    let additions: Vec<_> = additions.collect();
    let low = lease.write(op.low);
    let mut low_rank =
        LowRank { low, rank: op.rank, factor: op.factor, projections: &projections, additions: &additions };
    match &op.product {
        Product::Plain(product) => multiply(lease, product, Some(&mut low_rank)),
        Product::Nf4(product) => multiply_nf4(lease, product, Some(&mut low_rank)),
    }
    true
}

/// The matrix products of all experts, side by side: the pool's threads share each product and all of them.
pub(super) fn grouped_matmul(lease: &mut Lease<'_>, op: &GroupedMatmul) {
    let offsets: &[i32] = lease.read(op.offsets);
    assert_eq!(offsets.len(), op.experts + 1, "grouped_matmul has an offset more than experts");
    assert!(offsets.is_sorted() && offsets[0] == 0, "grouped_matmul's offsets ascend from 0");
    assert_eq!(index(offsets[op.experts]), op.rows, "grouped_matmul's offsets end with its rows");
    let a = elements(lease, op.a.buffer);
    let b = elements(lease, op.b.buffer);
    let c = elements_mut(lease, op.c.buffer);
    // Elements of one expert's matrix on the side that is not the tokens'.
    let expert = match op.layout {
        Layout::Nt => op.n * op.b.stride,
        Layout::Nn => op.k * op.b.stride,
        Layout::Tn => op.k * op.c.stride,
    };
    let lengths = offsets.windows(2).map(|pair| match op.layout {
        Layout::Tn => expert,
        Layout::Nt | Layout::Nn => index(pair[1] - pair[0]) * op.c.stride,
    });
    let parts: Vec<ElementsMut<'_>> = match c {
        ElementsMut::F32(c) => split(c, lengths).into_iter().map(ElementsMut::F32).collect(),
        ElementsMut::Bf16(c) => split(c, lengths).into_iter().map(ElementsMut::Bf16).collect(),
        ElementsMut::F16(c) => split(c, lengths).into_iter().map(ElementsMut::F16).collect(),
    };
    parts.into_par_iter().zip(offsets.par_windows(2)).enumerate().for_each(|(e, (c, pair))| {
        let (start, end) = (index(pair[0]), index(pair[1]));
        if start == end {
            // No tokens: no rows to write, and nothing to add to a gradient.
            return;
        }
        let rows_a = MatRef { data: from(a, start, op.a), stride: op.a.stride };
        let c = MatMut { data: c, stride: op.c.stride };
        if op.layout == Layout::Tn {
            let rows_b = MatRef { data: from(b, start, op.b), stride: op.b.stride };
            gemm::matmul(op.layout, op.k, op.n, end - start, rows_a, rows_b, c, true, None);
        } else {
            let weight = MatRef { data: skip(b, e * expert), stride: op.b.stride };
            gemm::matmul(op.layout, end - start, op.n, op.k, rows_a, weight, c, false, None);
        }
    });
}

fn from(elements: Elements<'_>, row: usize, rows: Rows) -> Elements<'_> {
    skip(elements, row * rows.stride)
}

fn skip(elements: Elements<'_>, count: usize) -> Elements<'_> {
    match elements {
        Elements::F32(x) => Elements::F32(&x[count..]),
        Elements::Bf16(x) => Elements::Bf16(&x[count..]),
        Elements::F16(x) => Elements::F16(&x[count..]),
    }
}

/// Consecutive parts of the given lengths; the last may be shorter, as the last row of a matrix ends with its width.
fn split<T: Send>(mut data: &mut [T], lengths: impl Iterator<Item = usize>) -> Vec<&mut [T]> {
    lengths
        .map(|length| {
            let length = length.min(data.len());
            let (part, rest) = std::mem::take(&mut data).split_at_mut(length);
            data = rest;
            part
        })
        .collect()
}

/// A vector of weights in f32, whatever it is kept in.
pub(super) fn widened<'m>(lease: &mut Lease<'m>, buffer: Buffer) -> std::borrow::Cow<'m, [f32]> {
    match buffer.dtype {
        DType::Bf16 => lease.read::<bf16>(buffer).iter().map(|x| x.to_f32()).collect(),
        DType::F16 => lease.read::<f16>(buffer).iter().map(|x| x.to_f32()).collect(),
        _ => lease.read::<f32>(buffer).into(),
    }
}
