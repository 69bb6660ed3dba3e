//! What the value heads that share a key head share of a chunk: queries and keys of unit length, and their products; and one
//! value head's own part of both passes: what it writes, and the state behind it.

use std::ops::Range;

use super::Shape;
use super::decay::{self, Gates};
use super::tiles::{Target, Tiles};
use crate::backend::DeltaHeads;
use crate::backend::cpu::element::Element;
use crate::backend::cpu::gemm::carve;
use crate::backend::cpu::memory::Shared;
use crate::backend::cpu::vector::{sum, vectorise};

/// Added to the sum of squares of a query or a key.
const EPSILON: f32 = 1e-6;

/// Queries and keys of a chunk, f32.
pub(super) struct Keys<'w> {
    /// `[n, K]`: of unit length.
    pub(super) k: &'w mut [f32],
    /// `[n, K]`: of unit length, over the root of `K`.
    pub(super) q: &'w mut [f32],
    /// `[n]` each: one over the length of keys and of queries as they came.
    pub(super) k_factor: &'w mut [f32],
    pub(super) q_factor: &'w mut [f32],
    /// Panels `[K, n]`.
    transposed: &'w mut [f32],
    /// `[n, n]`, rows of a chunk apart: `k k^T` at and below the diagonal.
    pub(super) kk: &'w mut [f32],
    /// As `kk`: `q k^T`.
    pub(super) qk: &'w mut [f32],
}

impl<'w> Keys<'w> {
    /// Words of memory.
    pub(super) fn words(shape: &Shape<'_>, tiles: Tiles) -> usize {
        let (n, dim) = (shape.chunk, shape.heads.key_dim);
        2 * n * dim + 2 * n + tiles.words(dim, n) + 2 * n * n
    }

    pub(super) fn new(shape: &Shape<'_>, tiles: Tiles, memory: &mut &'w mut [f32]) -> Self {
        let (n, dim) = (shape.chunk, shape.heads.key_dim);
        Keys {
            k: carve(memory, n * dim),
            q: carve(memory, n * dim),
            k_factor: carve(memory, n),
            q_factor: carve(memory, n),
            transposed: carve(memory, tiles.words(dim, n)),
            kk: carve(memory, n * n),
            qk: carve(memory, n * n),
        }
    }

    /// Reads the chunk's keys; their products with each other follow.
    ///
    /// # Safety
    /// No other thread writes them.
    pub(super) unsafe fn read_keys<'a, T: Element>(
        &mut self,
        shape: &Shape<'_>,
        tiles: Tiles,
        source: impl Source<'a, T>,
        tokens: &Range<usize>,
    ) {
        let (n, dim) = (tokens.len(), shape.heads.key_dim);
        // SAFETY: the caller's promise.
        unsafe { unit(source, tokens, (dim, 1.0), self.k, self.k_factor) }
        tiles.pack_transposed(self.k, dim, (dim, n), self.transposed);
        tiles.scores((n, dim), self.k, self.transposed, (self.kk, shape.chunk));
    }

    /// Reads the chunk's queries, behind [`Keys::read_keys`]; their products with the keys follow.
    ///
    /// # Safety
    /// No other thread writes them.
    pub(super) unsafe fn read_queries<'a, T: Element>(
        &mut self,
        shape: &Shape<'_>,
        tiles: Tiles,
        source: impl Source<'a, T>,
        tokens: &Range<usize>,
    ) {
        let (n, dim) = (tokens.len(), shape.heads.key_dim);
        // SAFETY: the caller's promise.
        unsafe { unit(source, tokens, (dim, query_scale(dim)), self.q, self.q_factor) }
        tiles.scores((n, dim), self.q, self.transposed, (self.qk, shape.chunk));
    }
}

/// The factor on a query of unit length.
pub(super) fn query_scale(dim: usize) -> f32 {
    1.0 / (dim as f32).sqrt()
}

/// One over the length of a query or a key.
#[inline(always)]
pub(super) fn unit_factor<T: Element>(x: &[T]) -> f32 {
    1.0 / (sum(x.len(), |i| x[i].load() * x[i].load()) + EPSILON).sqrt()
}

/// Where rows of a matrix are read.
pub(super) trait Source<'a, T: Element>: Copy {
    /// A token's elements.
    ///
    /// # Safety
    /// Nothing else writes them while the result lives.
    unsafe fn row(&self, token: usize, width: usize) -> &'a [T];
}

/// Some columns of a matrix that nobody writes.
#[derive(Clone, Copy)]
pub(super) struct Input<'a, T> {
    pub(super) data: &'a [T],
    pub(super) stride: usize,
    pub(super) first: usize,
}

impl<'a, T: Element> Source<'a, T> for Input<'a, T> {
    #[inline(always)]
    unsafe fn row(&self, token: usize, width: usize) -> &'a [T] {
        &self.data[token * self.stride + self.first..][..width]
    }
}

/// Some columns of a matrix that tasks share, each its own columns.
#[derive(Clone, Copy)]
pub(super) struct Columns<'a, T> {
    pub(super) data: Shared<'a, T>,
    pub(super) stride: usize,
    pub(super) first: usize,
}

impl<'a, T: Element> Source<'a, T> for Columns<'a, T> {
    #[inline(always)]
    unsafe fn row(&self, token: usize, width: usize) -> &'a [T] {
        // SAFETY: the caller's promise.
        unsafe { self.data.part(token * self.stride + self.first, width) }
    }
}

/// Reads rows of `width`.
///
/// # Safety
/// No other thread writes them.
pub(super) unsafe fn read<'a, T: Element>(
    source: impl Source<'a, T>,
    tokens: &Range<usize>,
    width: usize,
    out: &mut [f32],
) {
    vectorise!({
        for (token, out) in tokens.clone().zip(out.chunks_exact_mut(width)) {
            // SAFETY: the caller's promise.
            let row = unsafe { source.row(token, width) };
            for (out, x) in out.iter_mut().zip(row) {
                *out = x.load();
            }
        }
    });
}

/// Reads rows of `width`, brings them to unit length and multiplies them by `scale`; `factors` keeps one over the lengths.
///
/// # Safety
/// No other thread writes them.
unsafe fn unit<'a, T: Element>(
    source: impl Source<'a, T>,
    tokens: &Range<usize>,
    (width, scale): (usize, f32),
    out: &mut [f32],
    factors: &mut [f32],
) {
    vectorise!({
        for ((token, out), kept) in tokens.clone().zip(out.chunks_exact_mut(width)).zip(factors) {
            // SAFETY: the caller's promise.
            let row = unsafe { source.row(token, width) };
            *kept = unit_factor(row);
            let factor = *kept * scale;
            for (out, x) in out.iter_mut().zip(row) {
                *out = x.load() * factor;
            }
        }
    });
}

impl<T: Element> Columns<'_, T> {
    /// Writes rows of `width`, each times its factor.
    ///
    /// # Safety
    /// No other thread touches them.
    pub(super) unsafe fn write(
        &self,
        tokens: &Range<usize>,
        width: usize,
        source: &[f32],
        factor: impl Fn(usize) -> f32,
    ) {
        vectorise!({
            for (i, (token, source)) in tokens.clone().zip(source.chunks_exact(width)).enumerate() {
                let factor = factor(i);
                // SAFETY: the caller's promise.
                let row = unsafe { self.data.part(token * self.stride + self.first, width) };
                for (out, x) in row.iter_mut().zip(source) {
                    *out = T::store(factor * x);
                }
            }
        });
    }

    /// The gradient of rows as they came, from `d`, that of what [`Columns::unit`] made of them (`y`, by `factors` and `scale`).
    ///
    /// # Safety
    /// No other thread touches them.
    pub(super) unsafe fn write_unit_backward(
        &self,
        tokens: &Range<usize>,
        width: usize,
        scale: f32,
        (d, y, factors): (&[f32], &[f32], &[f32]),
    ) {
        vectorise!({
            let rows = d.chunks_exact(width).zip(y.chunks_exact(width)).zip(factors);
            for (token, ((d, y), factor)) in tokens.clone().zip(rows) {
                // With x of unit length y / scale: scale (d - x (x . d)).
                let along = sum(width, |i| d[i] * y[i]) / (scale * scale);
                // SAFETY: the caller's promise.
                let row = unsafe { self.data.part(token * self.stride + self.first, width) };
                for ((out, d), y) in row.iter_mut().zip(d).zip(y) {
                    *out = T::store(factor * scale * (d - y * along));
                }
            }
        });
    }
}

/// One value head's part of a chunk, f32. Matrices `[n, n]` have rows of a chunk apart.
pub(super) struct Head<'w> {
    /// `[n, n]`: the decay between two tokens.
    pub(super) d: &'w mut [f32],
    /// `[n]`: the decay from before the chunk.
    pub(super) e: &'w mut [f32],
    /// `[n, n]`: how writes depend on each other.
    pub(super) m: &'w mut [f32],
    /// `[n, n]`: the inverse of `I + m`.
    pub(super) a: &'w mut [f32],
    /// `[n, n]`: products of queries and keys, decayed.
    pub(super) p: &'w mut [f32],
    /// `[n, V]`: values.
    pub(super) v: &'w mut [f32],
    /// `[n, V]`: what the state before the chunk has for each key.
    pub(super) ks: &'w mut [f32],
    /// Panels `[n, V]`: what would be written but for the chunk's own tokens.
    pub(super) rest: &'w mut [f32],
}

impl<'w> Head<'w> {
    /// Words of memory.
    pub(super) fn words(shape: &Shape<'_>, tiles: Tiles) -> usize {
        let (n, width) = (shape.chunk, shape.heads.value_dim);
        4 * n * n + n + 2 * n * width + tiles.words(n, width)
    }

    pub(super) fn new(shape: &Shape<'_>, tiles: Tiles, memory: &mut &'w mut [f32]) -> Self {
        let (n, width) = (shape.chunk, shape.heads.value_dim);
        Head {
            d: carve(memory, n * n),
            e: carve(memory, n),
            m: carve(memory, n * n),
            a: carve(memory, n * n),
            p: carve(memory, n * n),
            v: carve(memory, n * width),
            ks: carve(memory, n * width),
            rest: carve(memory, tiles.words(n, width)),
        }
    }

    /// The decays, `m`, and its inverse; with `queries`, `p`.
    pub(super) fn depend(&mut self, shape: &Shape<'_>, keys: &Keys<'_>, gates: Gates<'_>, queries: bool) {
        let (n, stride) = (gates.g.len(), shape.chunk);
        let (d, m, a) = (&mut *self.d, &mut *self.m, &mut *self.a);
        vectorise!({
            decay::decay(gates.g, (d, stride), self.e);
            for i in 0..n {
                let row = i * stride..i * stride + i;
                let beta = gates.beta[i];
                for ((m, kk), d) in m[row.clone()].iter_mut().zip(&keys.kk[row.clone()]).zip(&d[row]) {
                    *m = beta * (kk * d);
                }
                m[i * stride + i..(i + 1) * stride].fill(0.0);
            }
            decay::invert(m, a, n, stride);
        });
        if queries {
            let (p, d) = (&mut *self.p, &*self.d);
            vectorise!({
                for i in 0..n {
                    let row = i * stride..i * stride + i + 1;
                    for ((p, qk), d) in p[row.clone()].iter_mut().zip(&keys.qk[row.clone()]).zip(&d[row]) {
                        *p = qk * d;
                    }
                    p[i * stride + i + 1..(i + 1) * stride].fill(0.0);
                }
            });
        }
    }

    /// `ks`, and `rest = beta (v - e ks)`, from the state before the chunk (panels `[K, V]`), which is zeros where there is none.
    pub(super) fn remember(
        &mut self,
        shape: &Shape<'_>,
        tiles: Tiles,
        keys: &Keys<'_>,
        gates: Gates<'_>,
        state: Option<&[f32]>,
    ) {
        let DeltaHeads { key_dim, value_dim: width, .. } = shape.heads;
        let n = gates.g.len();
        match state {
            Some(state) => {
                let left = tiles.left(keys.k, key_dim);
                tiles.multiply((n, width, key_dim), left, state, Target::Rows(self.ks, width), false);
            }
            None => self.ks[..n * width].fill(0.0),
        }
        let (panel, rest) = (tiles.panel(), &mut *self.rest);
        vectorise!({
            for (first, columns) in tiles.panels(width) {
                let rows = rest[first * n..].chunks_exact_mut(panel).zip(gates.beta).zip(&*self.e);
                for (i, ((rest, beta), e)) in rows.enumerate().take(n) {
                    let at = i * width + first..i * width + first + columns;
                    for ((rest, v), ks) in rest.iter_mut().zip(&self.v[at.clone()]).zip(&self.ks[at]) {
                        *rest = beta * (v - e * ks);
                    }
                }
            }
        });
    }

    /// The state behind the chunk: `e_n state + (r k)^T written`; `written` (panels `[n, V]`) is multiplied by `r`.
    pub(super) fn advance(
        &self,
        shape: &Shape<'_>,
        tiles: Tiles,
        keys: &Keys<'_>,
        n: usize,
        written: &mut [f32],
        (state, empty): (&mut [f32], bool),
    ) {
        let DeltaHeads { key_dim, value_dim: width, .. } = shape.heads;
        let decay = self.e[n - 1];
        let to_end = &self.d[(n - 1) * shape.chunk..][..n];
        vectorise!({
            if !empty {
                state.iter_mut().for_each(|x| *x *= decay);
            }
            scale_rows(tiles, (n, width), written, |i| to_end[i]);
        });
        let left = tiles.left_transposed(keys.k, key_dim);
        tiles.multiply((key_dim, width, n), left, written, Target::Panels(state, key_dim), !empty);
    }
}

/// Multiplies the rows of panels `[n, width]`, each by its factor.
#[inline(always)]
pub(super) fn scale_rows(tiles: Tiles, (n, width): (usize, usize), panels: &mut [f32], factor: impl Fn(usize) -> f32) {
    let panel = tiles.panel();
    for (first, _) in tiles.panels(width) {
        for (i, row) in panels[first * n..].chunks_exact_mut(panel).take(n).enumerate() {
            let factor = factor(i);
            row.iter_mut().for_each(|x| *x *= factor);
        }
    }
}
