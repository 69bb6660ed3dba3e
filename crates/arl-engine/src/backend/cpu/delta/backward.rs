//! The backward pass: the state before each chunk is computed again, then chunks go from last to first with the gradient `dS` of
//! the state after each. Notation as in [`super`]; with `B = V - diag(e) K S`, so that `N = A diag(beta) B`:
//!
//! ```text
//! dN = P^T dO + diag(r) K dS        X = A^T dN           dV = diag(beta) X
//! dP = lower(dO N^T)                dM = -strictly lower(X N^T)
//! Z = dO S^T        Y = X S^T       W = N dS^T
//! dQ = (dP . D) K + diag(e) Z
//! dK = (dP . D)^T Q + diag(r) W - diag(beta e) Y + (F + F^T) K         F = diag(beta) (dM . D)
//! dbeta = rowsum(X . B) + rowsum(dM . D . K K^T)
//! dG = rowsum(C) - colsum(C) + e rowsum(Q . Z) - r rowsum(K . W) - beta e rowsum(X . K S)      C = dP . P + dM . M
//! dG_n += e_n sum(S . dS) + sum(r rowsum(K . W))
//! dS = e_n dS + (diag(e) Q)^T dO - (diag(beta e) K)^T X
//! ```
//!
//! and `dg` is the reversed cumulative sum of `dG`. What is multiplied by `K` and `Q` last is added over the value heads before.

use std::ops::Range;

use rayon::prelude::*;

use super::decay::Gates;
use super::forward::{Before, states_before};
use super::head::{Columns, Head, Input, Keys, query_scale, read, scale_rows};
use super::sums::sums;
use super::tiles::{Target, Tiles};
use super::{Shape, Task};
use crate::backend::DeltaHeads;
use crate::backend::cpu::element::Element;
use crate::backend::cpu::gemm::{Workspace, carve};
use crate::backend::cpu::memory::Shared;
use crate::backend::cpu::vector::{dot, vectorise};

/// What tasks share.
#[derive(Clone, Copy)]
struct Arrays<'a, T> {
    /// `[T, channels]`: becomes its own gradient.
    qkv: Shared<'a, T>,
    /// `[T, value heads * V]`.
    d_out: &'a [T],
    /// `[value heads, T]` each.
    d_g: Shared<'a, f32>,
    d_beta: Shared<'a, f32>,
    before: Before<'a>,
}

/// `qkv` becomes its own gradient; those of the gates are assigned. `states` is memory for the states before chunks.
pub(super) fn backward<T: Element>(
    shape: &Shape<'_>,
    qkv: &mut [T],
    gates: Gates<'_>,
    d_out: &[T],
    (d_g, d_beta): (&mut [f32], &mut [f32]),
    states: &mut [f32],
) {
    let heads = shape.heads;
    assert_eq!(qkv.len(), shape.tokens * heads.channels(), "queries, keys and values of {} tokens", shape.tokens);
    assert_eq!(d_out.len(), shape.tokens * heads.value_columns(), "gated_delta_backward of {} tokens", shape.tokens);
    let tiles = Tiles::new();
    let arrays = Arrays {
        qkv: Shared::new(qkv),
        d_out,
        d_g: Shared::new(d_g),
        d_beta: Shared::new(d_beta),
        before: Before { data: Shared::new(states), size: tiles.words(heads.key_dim, heads.value_dim) },
    };
    shape.tasks().into_par_iter().with_max_len(1).for_each(|task| run(shape, tiles, gates, arrays, &task));
}

/// Memory of a chunk, f32. Matrices `[n, n]` have rows of a chunk apart.
pub(super) struct Chunk<'w> {
    /// Panels `[n, V]`: what is written (first part), `dN` (second part).
    panels: &'w mut [f32],
    /// `[n, V]`: what is written.
    written: &'w mut [f32],
    /// `[n, V]`: `X`.
    pub(super) x: &'w mut [f32],
    /// `[n, V]`, and as panels.
    d_out: &'w mut [f32],
    d_out_panels: &'w mut [f32],
    /// Panels `[V, n]`.
    written_columns: &'w mut [f32],
    /// Panels `[V, K]`: a transposed state.
    state_columns: &'w mut [f32],
    /// `[n, K]` each.
    pub(super) z: &'w mut [f32],
    pub(super) y: &'w mut [f32],
    pub(super) w: &'w mut [f32],
    /// `[n, n]` each: of one head.
    pub(super) d_p: &'w mut [f32],
    pub(super) d_m: &'w mut [f32],
    /// `[n, n]` each, of all heads: `dP . D` and `F + F^T`.
    pub(super) of_queries: &'w mut [f32],
    pub(super) of_keys: &'w mut [f32],
    /// `[n, K]` each.
    pub(super) d_q: &'w mut [f32],
    pub(super) d_k: &'w mut [f32],
    /// Panels `[n, K]`.
    key_panels: &'w mut [f32],
    /// `[n]`: `dG`, and its column sums.
    pub(super) d_sums: &'w mut [f32],
    pub(super) columns: &'w mut [f32],
}

impl<'w> Chunk<'w> {
    fn words(shape: &Shape<'_>, tiles: Tiles) -> usize {
        let (n, DeltaHeads { key_dim: k, value_dim: v, .. }) = (shape.chunk, shape.heads);
        let panels = 2 * tiles.words(n, v) + tiles.words(v, n) + tiles.words(v, k) + tiles.words(n, k);
        panels + 3 * n * v + 5 * n * k + 4 * n * n + 2 * n
    }

    fn new(shape: &Shape<'_>, tiles: Tiles, memory: &mut &'w mut [f32]) -> Self {
        let (n, DeltaHeads { key_dim: k, value_dim: v, .. }) = (shape.chunk, shape.heads);
        let mut take = |words| carve(memory, words);
        Chunk {
            panels: take(tiles.words(n, v)),
            written: take(n * v),
            x: take(n * v),
            d_out: take(n * v),
            d_out_panels: take(tiles.words(n, v)),
            written_columns: take(tiles.words(v, n)),
            state_columns: take(tiles.words(v, k)),
            z: take(n * k),
            y: take(n * k),
            w: take(n * k),
            d_p: take(n * n),
            d_m: take(n * n),
            of_queries: take(n * n),
            of_keys: take(n * n),
            d_q: take(n * k),
            d_k: take(n * k),
            key_panels: take(tiles.words(n, k)),
            d_sums: take(n),
            columns: take(n),
        }
    }
}

fn run<T: Element>(shape: &Shape<'_>, tiles: Tiles, gates: Gates<'_>, arrays: Arrays<'_, T>, task: &Task) {
    let DeltaHeads { key_dim, value_dim: width, .. } = shape.heads;
    let (group, size) = (shape.group(), tiles.words(key_dim, width));
    let words = Keys::words(shape, tiles) + Head::words(shape, tiles) + Chunk::words(shape, tiles) + group * size;
    let mut workspace = Workspace::take(words);
    let mut memory = workspace.floats();
    let (mut keys, mut head) = (Keys::new(shape, tiles, &mut memory), Head::new(shape, tiles, &mut memory));
    let mut chunk = Chunk::new(shape, tiles, &mut memory);
    let d_states = carve(&mut memory, group * size);
    // SAFETY: the columns and states of a key head and its value heads belong to one task of a sequence.
    unsafe {
        let pieces = (&mut keys, &mut head, &mut *chunk.panels);
        states_before(shape, tiles, arrays.qkv, gates, pieces, arrays.before, task);
    }
    let count = shape.chunks(task).len();
    let columns = |first| Columns { data: arrays.qkv, stride: shape.heads.channels(), first };
    for (number, tokens) in shape.chunks(task).enumerate().rev() {
        let [q, k, _] = shape.columns(task.key_head, 0);
        // SAFETY: as above.
        unsafe {
            keys.read_keys(shape, tiles, columns(k), &tokens);
            keys.read_queries(shape, tiles, columns(q), &tokens);
        }
        for zeroed in [&mut *chunk.of_queries, &mut *chunk.of_keys, &mut *chunk.d_q, &mut *chunk.d_k] {
            zeroed.fill(0.0);
        }
        for (member, d_state) in d_states.chunks_exact_mut(size).enumerate() {
            let number_of_head = task.key_head * group + member;
            let place = Place { tokens: &tokens, first: number == 0, last: number + 1 == count, head: number_of_head };
            // SAFETY: as above.
            let before = unsafe {
                let v = Columns { first: shape.columns(task.key_head, number_of_head)[2], ..columns(0) };
                read(v, &tokens, width, head.v);
                (!place.first).then(|| &*arrays.before.state(shape, task, number, member))
            };
            let gates = shape.gates(gates, number_of_head, &tokens);
            one_head(shape, tiles, (&keys, &mut head, &mut chunk), gates, arrays, &place, (before, d_state));
        }
        together(shape, tiles, &keys, &mut chunk, tokens.len());
        // SAFETY: as above.
        unsafe {
            let of_q = (&*chunk.d_q, &*keys.q, &*keys.q_factor);
            columns(q).write_unit_backward(&tokens, key_dim, query_scale(key_dim), of_q);
            columns(k).write_unit_backward(&tokens, key_dim, 1.0, (chunk.d_k, keys.k, keys.k_factor));
        }
    }
}

/// Which chunk, and which value head.
pub(super) struct Place<'a> {
    pub(super) tokens: &'a Range<usize>,
    /// Of its sequence: the state before it is zeros, ...
    pub(super) first: bool,
    /// ... or the one behind it has no gradient.
    pub(super) last: bool,
    head: usize,
}

/// A value head's part of a chunk: the gradients of its values and gates; `d_state` becomes that of the state before the chunk.
fn one_head<T: Element>(
    shape: &Shape<'_>,
    tiles: Tiles,
    (keys, head, chunk): (&Keys<'_>, &mut Head<'_>, &mut Chunk<'_>),
    gates: Gates<'_>,
    arrays: Arrays<'_, T>,
    place: &Place<'_>,
    (before, d_state): (Option<&[f32]>, &mut [f32]),
) {
    let DeltaHeads { key_dim, value_dim: width, .. } = shape.heads;
    let (n, stride) = (place.tokens.len(), shape.chunk);
    head.depend(shape, keys, gates, true);
    head.remember(shape, tiles, keys, gates, before);
    tiles.lower((n, width), (head.a, stride), head.rest, Target::Rows(chunk.written, width), false);
    let outputs = Input { data: arrays.d_out, stride: shape.heads.value_columns(), first: place.head * width };
    // SAFETY: nobody writes it.
    unsafe { read(outputs, place.tokens, width, chunk.d_out) }
    tiles.pack(chunk.d_out, width, (n, width), chunk.d_out_panels);

    let to_end = &head.d[(n - 1) * stride..][..n];
    if !place.last {
        let left = tiles.left(keys.k, key_dim);
        tiles.multiply((n, width, key_dim), left, d_state, Target::Panels(chunk.panels, n), false);
        vectorise!(scale_rows(tiles, (n, width), chunk.panels, |i| to_end[i]));
    }
    let d_written = Target::Panels(chunk.panels, n);
    tiles.lower_transposed((n, width), (head.p, stride), chunk.d_out_panels, d_written, !place.last);
    tiles.lower_transposed((n, width), (head.a, stride), chunk.panels, Target::Rows(chunk.x, width), false);

    tiles.pack_transposed(chunk.written, width, (width, n), chunk.written_columns);
    tiles.scores((n, width), chunk.d_out, chunk.written_columns, (chunk.d_p, stride));
    tiles.scores((n, width), chunk.x, chunk.written_columns, (chunk.d_m, stride));
    let shape_of_keys = (n, key_dim, width);
    if let Some(before) = before {
        tiles.transpose(before, (key_dim, width), chunk.state_columns);
        let left = tiles.left(chunk.d_out, width);
        tiles.multiply(shape_of_keys, left, chunk.state_columns, Target::Rows(chunk.z, key_dim), false);
        let left = tiles.left(chunk.x, width);
        tiles.multiply(shape_of_keys, left, chunk.state_columns, Target::Rows(chunk.y, key_dim), false);
    }
    if !place.last {
        tiles.transpose(d_state, (key_dim, width), chunk.state_columns);
        let left = tiles.left(chunk.written, width);
        tiles.multiply(shape_of_keys, left, chunk.state_columns, Target::Rows(chunk.w, key_dim), false);
    }

    let range = place.head * shape.tokens + place.tokens.start;
    // SAFETY: each (head, token) belongs to one task.
    let (d_g, d_beta) = unsafe { (arrays.d_g.part(range, n), arrays.d_beta.part(range, n)) };
    vectorise!(sums(shape, (keys, head, chunk), gates, place, d_beta));
    if let (Some(before), false) = (before, place.last) {
        // What leaves the state through its own decay; padding of panels is left out.
        let mut total = 0.0;
        vectorise!({
            for (first, columns) in tiles.panels(width) {
                let range = first * key_dim..(first + tiles.panel()) * key_dim;
                let rows =
                    before[range.clone()].chunks_exact(tiles.panel()).zip(d_state[range].chunks_exact(tiles.panel()));
                for (before, d_state) in rows {
                    total += f64::from(dot(&before[..columns], &d_state[..columns]));
                }
            }
        });
        chunk.d_sums[n - 1] += head.e[n - 1] * total as f32;
    }
    let mut behind = 0.0;
    for (d_g, d_sum) in d_g.iter_mut().zip(&*chunk.d_sums).rev() {
        behind += f64::from(*d_sum);
        *d_g = behind as f32;
    }

    let values = Columns {
        data: arrays.qkv,
        stride: shape.heads.channels(),
        first: 2 * shape.heads.key_columns() + place.head * width,
    };
    // SAFETY: the columns of a value head belong to one task.
    unsafe { values.write(place.tokens, width, chunk.x, |i| gates.beta[i]) }
    if !place.first {
        let (e, decay) = (&*head.e, head.e[n - 1]);
        vectorise!({
            for ((row, beta), e) in chunk.x.chunks_exact_mut(width).zip(gates.beta).zip(e) {
                let factor = -beta * e;
                row.iter_mut().for_each(|x| *x *= factor);
            }
            scale_rows(tiles, (n, width), chunk.d_out_panels, |i| e[i]);
            if !place.last {
                d_state.iter_mut().for_each(|x| *x *= decay);
            }
        });
        tiles.pack(chunk.x, width, (n, width), chunk.panels);
        let (of_q, of_k) = (tiles.left_transposed(keys.q, key_dim), tiles.left_transposed(keys.k, key_dim));
        let product = (key_dim, width, n);
        tiles.multiply(product, of_q, chunk.d_out_panels, Target::Panels(d_state, key_dim), !place.last);
        tiles.multiply(product, of_k, chunk.panels, Target::Panels(d_state, key_dim), true);
    }
}

/// What the value heads' sums give queries and keys: `dQ += E K`, `dK += E^T Q + (F + F^T) K`.
fn together(shape: &Shape<'_>, tiles: Tiles, keys: &Keys<'_>, chunk: &mut Chunk<'_>, n: usize) {
    let (dim, stride) = (shape.heads.key_dim, shape.chunk);
    tiles.pack(keys.k, dim, (n, dim), chunk.key_panels);
    let of_queries = (&*chunk.of_queries, stride);
    tiles.lower((n, dim), of_queries, chunk.key_panels, Target::Rows(chunk.d_q, dim), true);
    let of_keys = (&*chunk.of_keys, stride);
    tiles.lower((n, dim), of_keys, chunk.key_panels, Target::Rows(chunk.d_k, dim), true);
    tiles.lower_transposed((n, dim), of_keys, chunk.key_panels, Target::Rows(chunk.d_k, dim), true);
    tiles.pack(keys.q, dim, (n, dim), chunk.key_panels);
    tiles.lower_transposed((n, dim), of_queries, chunk.key_panels, Target::Rows(chunk.d_k, dim), true);
}
