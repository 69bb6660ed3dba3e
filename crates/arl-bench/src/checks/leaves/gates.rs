//! The gates of the hybrid families: of each element, of each row, and next to queries.

use arl_engine::backend::{Buffer, DType, Heads};

use super::super::draw::TOKENS;
use super::super::trial::{Scene, Trial};

/// Heads, tokens, and the columns of a token with gates, without them, and of the gates.
fn joined(s: &mut Scene) -> (Heads, usize, [usize; 3]) {
    let heads = s.draw.heads();
    let most = s.draw.scaled(60, 400, TOKENS);
    let tokens = s.draw.extent(1, most);
    let columns = [heads.qkv_columns() + heads.query_columns(), heads.qkv_columns(), heads.query_columns()];
    (heads, tokens, columns)
}

fn described(heads: Heads, tokens: usize) -> String {
    format!("{tokens} tokens, heads {}/{} of {}", heads.query, heads.key_value, heads.dim)
}

pub(super) fn split_gates(mut s: Scene) -> Trial {
    let (heads, tokens, [all, without, queries]) = joined(&mut s);
    let from = s.anywhere(tokens * all);
    let qkv = s.exact("qkv", tokens * without, s.dtype);
    let gates = s.exact("gates", tokens * queries, s.dtype);
    s.trial(described(heads, tokens), move |backend| backend.split_gates(heads, from, qkv, gates))
}

pub(super) fn join_gates(mut s: Scene) -> Trial {
    let (heads, tokens, [all, without, queries]) = joined(&mut s);
    let (qkv, gates) = (s.anywhere(tokens * without), s.anywhere(tokens * queries));
    let to = s.exact("joined", tokens * all, s.dtype);
    s.trial(described(heads, tokens), move |backend| backend.join_gates(heads, qkv, gates, to))
}

fn elements(s: &mut Scene) -> usize {
    let most = s.draw.scaled(20_000, 300_000, TOKENS * 4096);
    s.draw.extent(1, most)
}

pub(super) fn gate(mut s: Scene) -> Trial {
    let len = elements(&mut s);
    let (x, gates) = (s.anywhere(len), s.anywhere(len));
    let out = s.output("out", len, s.dtype);
    s.trial(format!("{len} elements"), move |backend| backend.gate(x, gates, out))
}

pub(super) fn gate_backward(mut s: Scene) -> Trial {
    let len = elements(&mut s);
    let (before, x, of_gates) = (s.anywhere(len), s.anywhere(len), s.anywhere(len));
    let (d_out, gates) = (s.updated("d_x", before), s.updated("d_gates", of_gates));
    s.trial(format!("{len} elements"), move |backend| backend.gate_backward(d_out, x, gates))
}

/// Rows, their width, and the logits of their gates.
fn gated(s: &mut Scene) -> (usize, usize, Buffer) {
    let (rows, width) = (s.draw.scaled(60, 400, TOKENS), s.draw.scaled(600, 4200, 2048));
    let (rows, width) = (s.draw.extent(1, rows), s.draw.extent(8, width));
    (rows, width, s.random_of(rows, DType::F32))
}

pub(super) fn add_gated_rows(mut s: Scene) -> Trial {
    let (rows, width, logits) = gated(&mut s);
    let (x, before) = (s.anywhere(rows * width), s.anywhere(rows * width));
    let out = s.updated("out", before);
    s.trial(format!("{rows} rows of {width}"), move |backend| backend.add_gated_rows(x, logits, width, out))
}

pub(super) fn gated_rows_backward(mut s: Scene) -> Trial {
    let (rows, width, before) = gated(&mut s);
    let (d_out, x) = (s.anywhere(rows * width), s.anywhere(rows * width));
    let logits = s.updated("d_logits", before);
    let d_x = s.output("d_x", rows * width, s.dtype);
    s.trial(format!("{rows} rows of {width}"), move |backend| {
        backend.gated_rows_backward(d_out, x, logits, width, d_x);
    })
}
