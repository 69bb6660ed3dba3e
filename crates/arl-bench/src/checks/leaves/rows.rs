//! Zero, copy, weights in 4 bits, add, scale; rows by index; the gated activation.

use arl_engine::backend::{DType, Dropout, Nf4Nested, Nf4Weights, Rows};
use arl_model::{NF4_BLOCK, NF4_NESTED_BLOCK, nf4_scale_values};

use super::super::draw::TOKENS;
use super::super::trial::{Scene, Trial};

fn len(s: &mut Scene) -> usize {
    let most = s.draw.scaled(20_000, 300_000, 1 << 26);
    s.draw.extent(1, most)
}

pub(super) fn zero(mut s: Scene) -> Trial {
    let len = len(&mut s);
    let before = s.anywhere(len);
    let target = s.updated_exactly("target", before);
    s.trial(format!("{len} elements"), move |backend| backend.zero(target))
}

pub(super) fn copy(mut s: Scene) -> Trial {
    let len = len(&mut s);
    let source = s.anywhere(len);
    let to = s.draw.pick(&[DType::F32, s.dtype]);
    let target = s.exact("target", len, to);
    s.trial(format!("{len} elements to {to:?}"), move |backend| backend.copy(source, target))
}

/// So many weights in 4 bits, with scales of either kind.
pub(super) fn nf4(s: &mut Scene, len: usize) -> Nf4Weights {
    let blocks = len.div_ceil(NF4_BLOCK);
    let bytes = |s: &mut Scene, count: usize| {
        let values: Vec<f64> = (0..count).map(|_| s.draw.below(256) as f64).collect();
        s.put(&values, DType::U8)
    };
    let codes = bytes(s, len.div_ceil(2));
    let is_nested = s.draw.below(2) == 0;
    let (scales, nested) = if is_nested {
        let scales = bytes(s, blocks);
        let largest = s.random_of(1 + blocks.div_ceil(NF4_NESTED_BLOCK), DType::F32);
        let values: Vec<f64> = nf4_scale_values().iter().map(|x| f64::from(*x)).collect();
        (scales, Some(Nf4Nested { largest, values: s.put(&values, DType::F32) }))
    } else {
        (s.random_of(blocks, DType::F32), None)
    };
    Nf4Weights { len, codes, scales, nested }
}

pub(super) fn dequantize(mut s: Scene) -> Trial {
    let len = len(&mut s);
    let weights = nf4(&mut s, len);
    let first = s.draw.below(len);
    let out = s.exact("out", len - first, s.dtype);
    let kind = if weights.nested.is_some() { " with scales in 8 bits" } else { "" };
    s.trial(format!("{len} elements from {first} on{kind}"), move |backend| backend.dequantize(&weights, first, out))
}

pub(super) fn add(mut s: Scene) -> Trial {
    let len = len(&mut s);
    let before = s.anywhere(len);
    let (x, delta) = (s.updated_exactly("x", before), s.anywhere(len));
    s.trial(format!("{len} elements"), move |backend| backend.add(x, delta))
}

pub(super) fn scale(mut s: Scene) -> Trial {
    let len = len(&mut s);
    let dropout = (s.draw.below(2) == 0).then(|| Dropout::new(0.1, &[s.draw.below(1000) as u64]));
    let x = s.anywhere(len);
    let out = s.exact("out", len, s.dtype);
    let what = format!("{len} elements{}", if dropout.is_some() { " with dropout" } else { "" });
    s.trial(what, move |backend| backend.scale(x, 0.75, dropout, out))
}

/// Rows of a table, their width, and ids of it.
fn table(s: &mut Scene) -> (usize, usize, Vec<usize>) {
    let most = s.draw.scaled(300, 4200, 1024);
    let width = s.draw.extent(8, most);
    // Wide or long, so that what is copied and compared stays small.
    let most = s.draw.scaled(100, 3000.min(800_000 / width), 151_936);
    let rows = s.draw.extent(1, most);
    let most = s.draw.scaled(150, 400, TOKENS);
    let count = s.draw.extent(4, most);
    // Some ids many times.
    let often = s.draw.below(rows);
    let ids = (0..count).map(|_| if s.draw.below(4) == 0 { often } else { s.draw.below(rows) }).collect();
    (rows, width, ids)
}

pub(super) fn embedding(mut s: Scene) -> Trial {
    let (rows, width, ids) = table(&mut s);
    let what = format!("{} of {rows} rows of {width}", ids.len());
    let (ids, table) = (s.ints(&ids), s.anywhere(rows * width));
    let out = s.exact("out", ids.len * width, s.dtype);
    s.trial(what, move |backend| backend.embedding(ids, table, width, out))
}

pub(super) fn embedding_backward(mut s: Scene) -> Trial {
    let (rows, width, ids) = table(&mut s);
    let what = format!("{} of {rows} rows of {width}", ids.len());
    let (ids, d_out) = (s.ints(&ids), s.anywhere(ids.len() * width));
    let before = s.random_of(rows * width, DType::F32);
    let table_gradient = s.updated_exactly("table_gradient", before);
    s.trial(what, move |backend| backend.embedding_backward(ids, d_out, width, table_gradient))
}

pub(super) fn gather_rows(mut s: Scene) -> Trial {
    let (rows, width, mut places) = table(&mut s);
    let divisor = s.draw.between(1, 4);
    places.iter_mut().for_each(|place| *place = *place * divisor + s.draw.below(divisor));
    let what = format!("{} of {rows} rows of {width}, by {divisor}", places.len());
    let (places, x) = (s.ints(&places), s.anywhere(rows * width));
    let out = s.exact("out", places.len * width, s.dtype);
    s.trial(what, move |backend| backend.gather_rows(x, places, divisor, width, out))
}

pub(super) fn scatter_rows(mut s: Scene) -> Trial {
    let (rows, width, _) = table(&mut s);
    let count = s.draw.between(1, rows);
    let places = s.draw.order(rows);
    let (x, places) = (s.anywhere(count * width), s.ints(&places[..count]));
    let before = s.random(rows * width);
    let out = s.updated_exactly("out", before);
    s.trial(format!("{count} of {rows} rows of {width}"), move |backend| backend.scatter_rows(x, places, width, out))
}

pub(super) fn copy_columns(mut s: Scene) -> Trial {
    let (rows, width, _) = table(&mut s);
    let (columns, stride) = (s.draw.between(1, width), width + s.draw.below(9));
    let source = Rows { buffer: s.anywhere(rows * width), stride: width };
    let before = s.random(rows * stride);
    let target = Rows { buffer: s.updated_exactly("out", before), stride };
    let what = format!("{columns} columns of {rows} rows of {width}");
    s.trial(what, move |backend| backend.copy_columns(source, target, rows, columns))
}

/// Rows and columns of what SwiGLU gives.
fn gated(s: &mut Scene) -> (usize, usize) {
    let (rows, width) = (s.draw.scaled(40, 200, TOKENS), s.draw.scaled(700, 4200, 3072));
    (s.draw.extent(1, rows), s.draw.extent(32, width))
}

pub(super) fn swiglu(mut s: Scene) -> Trial {
    let (rows, width) = gated(&mut s);
    let gate_up = s.anywhere(rows * 2 * width);
    let out = s.output("out", rows * width, s.dtype);
    s.trial(format!("{rows} rows of {width}"), move |backend| backend.swiglu(gate_up, width, out))
}

pub(super) fn swiglu_backward(mut s: Scene) -> Trial {
    let (rows, width) = gated(&mut s);
    let before = s.anywhere(rows * 2 * width);
    let (gate_up, d_out) = (s.updated("gate_up", before), s.anywhere(rows * width));
    s.trial(format!("{rows} rows of {width}"), move |backend| backend.swiglu_backward(gate_up, width, d_out))
}
