//! The leaves of vision towers: LayerNorm, GELU, interpolated positions, rows by number.

use arl_engine::backend::{Buffer, DType, Gelu, LayerNorm};

use super::super::draw::TOKENS;
use super::super::trial::{Scene, Trial};

const EPSILON: f32 = 1e-6;

/// Rows, and columns of a tower or of its mergers.
fn shape(s: &mut Scene) -> (usize, usize) {
    let (rows, width) = (s.draw.scaled(100, 600, TOKENS), s.draw.scaled(600, 5200, 1152));
    (s.draw.extent(1, rows), s.draw.extent(32, width))
}

/// The operation without its outputs.
fn norm(s: &mut Scene, rows: usize, width: usize) -> LayerNorm {
    LayerNorm {
        x: s.anywhere(rows * width),
        weight: s.anywhere(width),
        bias: s.anywhere(width),
        width,
        epsilon: EPSILON,
        out: s.scratch(rows * width, s.dtype),
        statistics: s.scratch(2 * rows, DType::F32),
    }
}

pub(super) fn layer_norm(mut s: Scene) -> Trial {
    let (rows, width) = shape(&mut s);
    let mut op = norm(&mut s, rows, width);
    op.out = s.output("out", rows * width, s.dtype);
    op.statistics = s.output("statistics", 2 * rows, DType::F32);
    s.trial(format!("{rows} rows of {width}"), move |backend| backend.layer_norm(&op))
}

/// From the forward pass of the same backend, as in a step.
pub(super) fn layer_norm_backward(mut s: Scene) -> Trial {
    let (rows, width) = shape(&mut s);
    let op = norm(&mut s, rows, width);
    let (d_out, before) = (s.anywhere(rows * width), s.anywhere(rows * width));
    let (weight, bias) = (s.random_of(width, DType::F32), s.random_of(width, DType::F32));
    let d_x = s.updated("d_x", before);
    let (d_weight, d_bias) = (s.updated("d_weight", weight), s.updated("d_bias", bias));
    s.trial(format!("{rows} rows of {width}"), move |backend| {
        backend.layer_norm(&op);
        backend.layer_norm_backward(&op, d_out, d_x, d_weight, d_bias);
    })
}

/// A form of GELU, a number of elements, and so many of them.
fn elements(s: &mut Scene) -> (Gelu, usize, Buffer) {
    let most = s.draw.scaled(20_000, 300_000, TOKENS * 4304);
    let len = s.draw.extent(1, most);
    let kind = s.draw.pick(&[Gelu::Tanh, Gelu::Erf]);
    (kind, len, s.anywhere(len))
}

pub(super) fn gelu(mut s: Scene) -> Trial {
    let (kind, len, x) = elements(&mut s);
    let out = s.output("out", len, s.dtype);
    s.trial(format!("{len} elements, {kind:?}"), move |backend| backend.gelu(kind, x, out))
}

pub(super) fn gelu_backward(mut s: Scene) -> Trial {
    let (kind, len, x) = elements(&mut s);
    let before = s.anywhere(len);
    let d_x = s.updated("d_x", before);
    s.trial(format!("{len} elements, {kind:?}"), move |backend| backend.gelu_backward(kind, x, d_x))
}

/// What positions are interpolated from: rows of a table, of so many elements, by taps and weights.
struct Positions {
    rows: usize,
    width: usize,
    count: usize,
    taps: Buffer,
    weights: Buffer,
}

impl Positions {
    fn draw(s: &mut Scene) -> Self {
        let (most_rows, most_width) = (s.draw.scaled(50, 300, 48 * 48), s.draw.scaled(300, 1200, 1152));
        let (rows, width) = (s.draw.extent(1, most_rows), s.draw.extent(8, most_width));
        let most = s.draw.scaled(60, 500, TOKENS);
        let count = s.draw.extent(1, most);
        let taps: Vec<usize> = (0..4 * count).map(|_| s.draw.below(rows)).collect();
        let (taps, weights) = (s.ints(&taps), s.random_of(4 * count, DType::F32));
        Positions { rows, width, count, taps, weights }
    }

    fn described(&self) -> String {
        format!("{} rows from {} of {}", self.count, self.rows, self.width)
    }
}

pub(super) fn interpolate(mut s: Scene) -> Trial {
    let at = Positions::draw(&mut s);
    let (table, before) = (s.anywhere(at.rows * at.width), s.anywhere(at.count * at.width));
    let out = s.updated("out", before);
    s.trial(at.described(), move |backend| backend.interpolate(table, at.taps, at.weights, at.width, out))
}

pub(super) fn interpolate_backward(mut s: Scene) -> Trial {
    let at = Positions::draw(&mut s);
    let (d_out, before) = (s.anywhere(at.count * at.width), s.random_of(at.rows * at.width, DType::F32));
    let d_table = s.updated("d_table", before);
    s.trial(at.described(), move |backend| {
        backend.interpolate_backward(d_out, at.taps, at.weights, at.width, d_table);
    })
}

/// Rows of a matrix, their width, and the numbers of some of them.
fn numbered(s: &mut Scene) -> (usize, usize, Buffer) {
    let (rows, width) = (s.draw.scaled(100, 600, TOKENS), s.draw.scaled(300, 4200, 4096));
    let (rows, width) = (s.draw.extent(1, rows), s.draw.extent(8, width));
    let (count, order) = (s.draw.between(1, rows), s.draw.order(rows));
    (rows, width, s.ints(&order[..count]))
}

pub(super) fn add_rows(mut s: Scene) -> Trial {
    let (rows, width, numbers) = numbered(&mut s);
    let (x, before) = (s.anywhere(numbers.len * width), s.anywhere(rows * width));
    let out = s.updated_exactly("out", before);
    let what = format!("{} of {rows} rows of {width}", numbers.len);
    s.trial(what, move |backend| backend.add_rows(x, numbers, width, out))
}

pub(super) fn zero_rows(mut s: Scene) -> Trial {
    let (rows, width, numbers) = numbered(&mut s);
    let before = s.anywhere(rows * width);
    let x = s.updated_exactly("x", before);
    let what = format!("{} of {rows} rows of {width}", numbers.len);
    s.trial(what, move |backend| backend.zero_rows(numbers, width, x))
}
