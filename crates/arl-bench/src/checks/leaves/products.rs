//! Matrix products, alone and by experts; sums and scalar products.

use std::ops::Range;

use arl_engine::backend::{
    Buffer, DType, DeviceKind, GroupedMatmul, Layout, LowRankFactor, LowRankMatmul, Magnitude, Matmul, Nf4Matmul,
    Product, Rows,
};

use super::super::draw::{Size, TOKENS};
use super::super::trial::{Scene, Trial};
use super::rows;

const LAYOUTS: [Layout; 3] = [Layout::Nt, Layout::Nn, Layout::Tn];

pub(super) fn matmul(mut s: Scene) -> Trial {
    let layout = s.draw.pick(&LAYOUTS);
    let most = s.draw.scaled(200, 700, 0);
    let (m, n, k) = match layout {
        _ if !s.draw.as_in_a_step() => (s.draw.extent(6, most), s.draw.extent(6, most), s.draw.extent(1, 2 * most)),
        Layout::Nt | Layout::Nn => (TOKENS, 3072, 1024),
        Layout::Tn => (3072, 1024, TOKENS),
    };
    let low = s.dtype;
    let [a_type, b_type, c_type] = match s.draw.below(8) {
        0 => [DType::F32, low, low],
        1 => [DType::F32, low, DType::F32],
        2 | 3 => [low, low, DType::F32],
        _ => [low; 3],
    };
    let gap = s.draw.pick(&[0, 0, 0, 8, 3]);
    let accumulate = s.draw.coin();
    let (a_rows, a_width) = if layout == Layout::Tn { (k, m) } else { (m, k) };
    let (b_rows, b_width) = if layout == Layout::Nt { (n, k) } else { (k, n) };
    let mut operand = |rows: usize, width: usize, dtype: DType| {
        let stride = width + gap;
        Rows { buffer: s.random_of(rows * stride - gap, dtype), stride }
    };
    let (a, b) = (operand(a_rows, a_width, a_type), operand(b_rows, b_width, b_type));
    let c = s.matrix("c", m, n, gap, c_type, !accumulate);
    // As layers have it: in the type of their output, which is assigned.
    let biased = layout == Layout::Nt && !accumulate && c_type == low && s.draw.coin();
    let bias = biased.then(|| s.random(n));
    let op = Matmul { layout, m, n, k, a, b, c, accumulate, bias };
    let what =
        format!("{layout:?} m={m} n={n} k={k} gap={gap} {a_type:?} {b_type:?} {c_type:?} +={accumulate} {biased}");
    s.trial(what, move |backend| backend.matmul(&op))
}

/// Weights in 4 bits of two tensors, one below the other; rows of whole blocks half of the time.
pub(super) fn matmul_nf4(mut s: Scene) -> Trial {
    let layout = s.draw.pick(&LAYOUTS[..2]);
    let most = s.draw.scaled(120, 700, 3072);
    let (above, below) = (s.draw.extent(1, most), s.draw.extent(1, most));
    let width = s.draw.extent(6, most);
    let width = if s.draw.coin() { width.next_multiple_of(64) } else { width };
    let m = if s.draw.coin() { s.draw.between(1, 4) } else { s.draw.scaled(40, 300, TOKENS) };
    let weights = [above, below].map(|rows| rows::nf4(&mut s, rows * width));
    let (n, k) = if layout == Layout::Nt { (above + below, width) } else { (width, above + below) };
    let stride = k + s.draw.pick(&[0, 8, 3]);
    let a = Rows { buffer: s.random(m * stride), stride };
    let accumulate = layout == Layout::Nn && s.draw.coin();
    let gap = s.draw.pick(&[0, 8]);
    let c = s.matrix("c", m, n, gap, s.dtype, !accumulate);
    let bias = (layout == Layout::Nt && s.draw.coin()).then(|| s.random(n));
    let dtype = s.dtype;
    let tile = s.scratch(DeviceKind::Cuda.nf4_tile(dtype, above + below, width), dtype);
    let what = format!("{layout:?} m={m} rows={above}+{below} width={width} +={accumulate} {}", bias.is_some());
    s.trial(what, move |backend| {
        let weights = weights.as_slice();
        backend.matmul_nf4(&Nf4Matmul { layout, m, n, k, a, weights, dtype, c, accumulate, bias, tile });
    })
}

/// Adapters next to each other, of ranks of their own, one for each part of the output of a layer.
pub(super) fn matmul_low_rank(mut s: Scene) -> Trial {
    let layout = s.draw.pick(&LAYOUTS[..2]);
    let most = s.draw.scaled(120, 700, 3072);
    let m = s.draw.scaled(40, 700, TOKENS);
    let (inputs, mut outputs, mut rank) = (s.draw.extent(6, most), 0, 0);
    let mut parts: Vec<[Range<usize>; 2]> = Vec::new();
    for _ in 0..s.draw.between(1, 3) {
        let ends = [outputs + s.draw.extent(6, most), rank + s.draw.between(1, 16)];
        parts.push([outputs..ends[0], rank..ends[1]]);
        [outputs, rank] = ends;
    }
    let factor = |[columns, low]: &[Range<usize>; 2]| {
        let (columns, low) = (columns.clone(), low.clone());
        LowRankFactor { weight: s.random(columns.len() * low.len()), columns, low }
    };
    let up: Vec<LowRankFactor> = parts.iter().map(factor).collect();
    let down = vec![LowRankFactor { columns: 0..inputs, low: 0..rank, weight: s.random(rank * inputs) }];
    let (n, k) = if layout == Layout::Nt { (outputs, inputs) } else { (inputs, outputs) };
    let (projections, additions) = if layout == Layout::Nt { (down, up) } else { (up, down) };
    let gap = s.draw.pick(&[0, 0, 8, 3]);
    let accumulate = layout == Layout::Nn && s.draw.coin();
    let a = Rows { buffer: s.random(m * (k + gap)), stride: k + gap };
    let b = Rows { buffer: s.random(n * k), stride: inputs };
    let c = s.matrix("c", m, n, gap, s.dtype, !accumulate);
    let bias = (layout == Layout::Nt && s.draw.coin()).then(|| s.random(n));
    let product = Matmul { layout, m, n, k, a, b, c, accumulate, bias };
    let low = s.output("low", m * rank, s.dtype);
    let factor = s.draw.pick(&[1.0, 0.5, 2.0]);
    let scratch = s.scratch(if factor == 1.0 { 0 } else { m * rank }, s.dtype);
    let what =
        format!("{layout:?} m={m} n={n} k={k} gap={gap} {parts:?} times {factor} +={accumulate} {}", bias.is_some());
    s.trial(what, move |backend| {
        let (product, projections, additions) = (Product::Plain(product), projections.as_slice(), additions.as_slice());
        backend.matmul_low_rank(&LowRankMatmul { product, projections, low, rank, factor, scratch, additions });
    })
}

/// Norms, scaling or gradient.
pub(super) fn magnitude(mut s: Scene) -> Trial {
    let most = s.draw.scaled(100, 700, 4096);
    let (rows, n) = (s.draw.extent(1, most), s.draw.extent(6, most));
    let stride = n + s.draw.pick(&[0, 8, 3]);
    let norms = s.put(&vec![1.5; n], DType::F32);
    match s.draw.below(3) {
        0 => {
            let (k, rank) = (s.draw.extent(6, most), s.draw.between(1, 16));
            let (weight, a, b) = (s.random(n * k), s.random(rank * k), s.random(n * rank));
            let out = s.output("out", n, DType::F32);
            let op = Magnitude::Norms { weight, a, b, factor: 0.5, out };
            s.trial(format!("norms of {n} rows of {k}, rank {rank}"), move |backend| backend.magnitude(&op))
        }
        1 => {
            let magnitude = s.random_of(n, DType::F32);
            let bias = s.draw.coin().then(|| s.random(n));
            let x = s.matrix("x", rows, n, stride - n, s.dtype, false);
            let op = Magnitude::Rescale { x, rows, magnitude, norms, bias };
            s.trial(format!("{rows} rows of {n} of {stride} scaled"), move |backend| backend.magnitude(&op))
        }
        _ => {
            let [d_out, x] = [0, 0].map(|_| Rows { buffer: s.random(rows * stride), stride });
            let before = s.random_of(n, DType::F32);
            let out = s.updated("out", before);
            let op = Magnitude::Gradient { d_out, x, rows, norms, out };
            s.trial(format!("gradient of {rows} rows of {n} of {stride}"), move |backend| backend.magnitude(&op))
        }
    }
}

fn product(a: Buffer, b: Buffer, c: Rows, [m, n, k]: [usize; 3]) -> Matmul {
    let [a, b] = [a, b].map(|buffer| Rows { buffer, stride: k });
    Matmul { layout: Layout::Nt, m, n, k, a, b, c, accumulate: false, bias: None }
}

/// Sums as long as those of the head's gradient, whose parts are a hundred times as large as the whole: a library that
/// splits them and rounds each part to the type of the result is far off.
pub(super) fn long_sums(mut s: Scene) -> Trial {
    let (m, k) = if s.draw.size == Size::Host { (24, 8192) } else { (256, 150_000) };
    let mut operand = |sign: f64| {
        // Each row: a part, two columns that count, the part again (of the other sign in one operand), two that count.
        let row = |s: &mut Scene| {
            let part = s.draw.values(k / 2 - 2);
            let [first, second] = [s.draw.values(2), s.draw.values(2)];
            let again = part.clone().into_iter().map(move |x| sign * x);
            part.into_iter().chain(first).chain(again).chain(second)
        };
        let values: Vec<f64> = (0..m).flat_map(|_| row(&mut s)).collect();
        s.put(&values, s.dtype)
    };
    let (a, b) = (operand(1.0), operand(-1.0));
    let op = product(a, b, s.matrix("c", m, m, 0, s.dtype, true), [m, m, k]);
    s.trial(format!("m={m} n={m} k={k}, parts that cancel"), move |backend| backend.matmul(&op))
}

/// Sums so short that f32 has hardly anything to round: in another arithmetic (TF32, emulation) they are farther off.
pub(super) fn exact_products(mut s: Scene) -> Trial {
    let sizes = if s.draw.size == Size::Host { [40, 40, 64] } else { [512, 512, 64] };
    let [m, n, k] = sizes;
    let (a, b) = (s.random_of(m * k, DType::F32), s.random_of(n * k, DType::F32));
    let op = product(a, b, s.matrix("c", m, n, 0, DType::F32, true), sizes);
    s.trial(format!("m={m} n={n} k={k}, in f32 alone"), move |backend| backend.matmul(&op)).within(1e-6)
}

pub(super) fn grouped_matmul(mut s: Scene) -> Trial {
    let layout = s.draw.pick(&LAYOUTS);
    let most = s.draw.scaled(150, 400, 768);
    let (n, k) = (s.draw.extent(6, most), s.draw.extent(6, most));
    let most = s.draw.scaled(12, 64, 128);
    let experts = if s.draw.as_in_a_step() { most } else { s.draw.between(1, most) };
    let rows = if s.draw.as_in_a_step() { 8 * TOKENS } else { s.draw.between(8, 20 * experts + 8) };
    let mut ends: Vec<usize> = (1..experts).map(|_| s.draw.between(0, rows)).collect();
    ends.sort_unstable();
    let offsets: Vec<usize> = std::iter::once(0).chain(ends).chain([rows]).collect();
    let offsets = s.ints(&offsets);
    let a = Rows { buffer: s.random(rows * k), stride: k };
    let b = match layout {
        Layout::Nt => Rows { buffer: s.random(experts * n * k), stride: k },
        Layout::Nn => Rows { buffer: s.random(experts * n * k), stride: n },
        Layout::Tn => Rows { buffer: s.random(rows * n), stride: n },
    };
    let c = match layout {
        Layout::Tn => s.matrix("c", experts * k, n, 0, DType::F32, false),
        Layout::Nt | Layout::Nn => s.matrix("c", rows, n, 0, s.dtype, true),
    };
    let op = GroupedMatmul { layout, experts, offsets, rows, n, k, a, b, c };
    let what = format!("{layout:?} experts={experts} rows={rows} n={n} k={k}");
    s.trial(what, move |backend| backend.grouped_matmul(&op))
}

pub(super) fn sum_rows(mut s: Scene) -> Trial {
    let most = s.draw.scaled(300, 2000, 4096);
    let (rows, columns) = (s.draw.extent(1, most), s.draw.extent(32, most));
    let stride = columns + s.draw.pick(&[0, 7, 64]);
    let x = Rows { buffer: s.random(rows * stride), stride };
    let before = s.random_of(columns, DType::F32);
    let out = s.updated("out", before);
    s.trial(format!("{rows} rows of {columns} of {stride}"), move |backend| backend.sum_rows(x, rows, columns, out))
}

/// f32 in either type.
pub(super) fn dot(mut s: Scene) -> Trial {
    let most = s.draw.scaled(20_000, 1_000_000, 1 << 26);
    let len = s.draw.extent(1, most);
    let a = s.random_of(len, DType::F32);
    // Alike in sign, so that the sum does not cancel.
    let b = if s.draw.coin() { a } else { s.put(&vec![0.75; len], DType::F32) };
    let a = if a == b { a } else { s.put(&vec![1.25; len], DType::F32) };
    let before = s.put(&[1.0], DType::F64);
    let out = s.updated("out", before);
    s.trial(format!("{len} elements"), move |backend| backend.dot(a, b, out))
}
