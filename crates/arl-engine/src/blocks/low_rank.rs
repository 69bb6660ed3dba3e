//! Adapters of low rank (LoRA; Hu et al., 2021) of one matrix product: `out += factor drop(x) A^T B^T`, and their gradients.
//! `t = factor drop(x) A^T`, of `rank` columns, is kept from the forward pass for the backward pass.

use super::Context;
use crate::backend::{Backend, Buffer, Dropout, Layout, Matmul, Rows};
use crate::mesh::Axis;
use crate::placement::{AdapterPlace, Param};

/// Most layers that one product computes: the four of the delta rule's input.
const PARTS: usize = 4;

/// Dropout of the input of A, in training.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LowRankDropout {
    pub(crate) probability: f32,
    /// Seed, step and micro-batch.
    pub(crate) words: [u64; 3],
    /// In the micro-batch, the first token that this rank has, and the first that ranks along [`Axis::Tensor`] have.
    pub(crate) first: [usize; 2],
}

impl LowRankDropout {
    /// Of an adapter's input with so many columns: where ranks divide tokens or columns, the mask of what this one has.
    fn of(self, adapter: &Adapter, own: usize, (ranks, rank): (usize, usize)) -> Dropout {
        let [seed, step, micro_batch] = self.words;
        let AdapterPlace { a, b, number, .. } = adapter.place;
        let [cuts_columns, cuts_rows] = [a, b].map(|param| param.axis == Axis::SameTensor);
        let whole = if cuts_columns { ranks * own } else { own };
        // What ranks divide between products has the tokens of all of them.
        let token = self.first[usize::from(cuts_columns || cuts_rows)];
        let first = token * whole + if cuts_columns { rank * own } else { 0 };
        let mask = Dropout::new(self.probability, &[seed, step, micro_batch, u64::from(number)]);
        Dropout { first, columns: [own, whole], ..mask }
    }

    /// What is left is as large on average.
    fn factor(self) -> f32 {
        1.0 / (1.0 - self.probability)
    }
}

/// The adapter of a layer whose output is a part of a product's columns.
#[derive(Clone, Copy, Debug)]
struct Adapter {
    place: AdapterPlace,
    first: usize,
    columns: usize,
}

/// The adapters of the layers that one product computes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Adapters([Option<Adapter>; PARTS]);

/// Adapters whose products with the input are one: they have the same factor, and the same mask, which is none.
struct Group {
    adapters: Vec<Adapter>,
    /// `[rank, k]`: of all of them.
    a: Param,
    rank: usize,
    /// Ranks of the groups before it.
    first: usize,
}

impl Adapters {
    /// Of layers side by side: each one's adapter, if it has one, and columns.
    pub(crate) fn new(parts: &[(Option<AdapterPlace>, usize)]) -> Self {
        let mut adapters = [None; PARTS];
        let mut first = 0;
        for (slot, &(place, columns)) in adapters.iter_mut().zip(parts) {
            *slot = place.map(|place| Adapter { place, first, columns });
            first += columns;
        }
        Adapters(adapters)
    }

    /// The place of each, and its first column and columns.
    pub(super) fn places(&self) -> impl Iterator<Item = (AdapterPlace, usize, usize)> + use<> {
        self.0.into_iter().flatten().map(|adapter| (adapter.place, adapter.first, adapter.columns))
    }

    /// A and B of all of them.
    pub(crate) fn params(&self) -> impl Iterator<Item = Param> + use<> {
        self.0.into_iter().flatten().flat_map(|adapter| [adapter.place.a, adapter.place.b])
    }

    fn groups(&self, dropout: bool) -> Vec<Group> {
        let mut groups: Vec<Group> = Vec::new();
        for adapter in self.0.into_iter().flatten() {
            let AdapterPlace { a, rank, factor, .. } = adapter.place;
            match groups.last_mut() {
                Some(group) if !dropout && group.adapters[0].place.factor == factor => {
                    group.adapters.push(adapter);
                    group.rank += rank;
                    group.a.len += a.len;
                }
                _ => {
                    let first = groups.last().map_or(0, |group| group.first + group.rank);
                    groups.push(Group { adapters: vec![adapter], a, rank, first });
                }
            }
        }
        groups
    }

    /// Columns of `t`: the ranks of all of them.
    pub(crate) fn rank(&self) -> usize {
        self.0.iter().flatten().map(|adapter| adapter.place.rank).sum()
    }

    /// Adds to `out[m, n]` what the adapters make of `x[m, k]`, and leaves `t` in `low`, of `m * rank` elements.
    pub(crate) fn forward<B: Backend + ?Sized>(
        self,
        cx: &mut Context<'_, B>,
        x: Buffer,
        out: Buffer,
        low: Buffer,
        m: usize,
    ) {
        for group in self.groups(cx.dropout.is_some()) {
            let top = cx.arena.mark();
            let input = group.input(cx, x, m);
            let low = group.project(cx, input, low, m);
            group.add(cx, low, out, m);
            cx.arena.release(top);
        }
    }

    /// Adds to `out[m, n]` what the adapters made in the forward pass, which left `t` in `low`.
    pub(super) fn add<B: Backend + ?Sized>(self, cx: &mut Context<'_, B>, low: Buffer, out: Buffer, m: usize) {
        for group in self.groups(cx.dropout.is_some()) {
            group.add(cx, group.low(low, m), out, m);
        }
    }

    /// From `d_out[m, n]`, the input `x[m, k]` and `t` the gradients of A and B, assigned or added to, and `d_x[m, k]`, which
    /// is added to; empty: not wanted.
    #[allow(clippy::too_many_arguments, reason = "a layer's backward pass has as many, and what the forward pass left")]
    pub(crate) fn backward<B: Backend + ?Sized>(
        self,
        cx: &mut Context<'_, B>,
        d_out: Rows,
        x: Buffer,
        low: Buffer,
        d_x: Buffer,
        m: usize,
        accumulate: bool,
    ) {
        for group in self.groups(cx.dropout.is_some()) {
            let top = cx.arena.mark();
            let input = group.input(cx, x, m);
            let low = group.low(low, m);
            let d_product = cx.workspace(cx.dtype, m * group.rank);
            for (adapter, from) in group.parts() {
                let AdapterPlace { b, rank, .. } = adapter.place;
                let d_out = part(d_out, adapter.first);
                if let Some(d_b) = cx.store.gradient(b) {
                    let d_b = Rows { buffer: d_b, stride: rank };
                    let low = part(low, from);
                    matmul(cx, Layout::Tn, [adapter.columns, rank, m], d_out, low, d_b, accumulate);
                }
                let d_product = part(Rows { buffer: d_product, stride: group.rank }, from);
                let weight = cx.store.weight(b);
                product(cx, Layout::Nn, [m, rank, adapter.columns], d_out, weight, d_product, false);
            }
            let d_low = group.scaled(cx, d_product);
            let k = x.len / m;
            if let Some(d_a) = cx.store.gradient(group.a) {
                let (input, d_a) = (Rows { buffer: input, stride: k }, Rows { buffer: d_a, stride: k });
                matmul(cx, Layout::Tn, [group.rank, k, m], d_low, input, d_a, accumulate);
            }
            if d_x.len > 0 {
                group.input_gradient(cx, d_low, d_x, m);
            }
            cx.arena.release(top);
        }
    }
}

impl Group {
    /// Each adapter and where its columns begin among those of `t`.
    fn parts(&self) -> impl Iterator<Item = (&Adapter, usize)> {
        self.adapters.iter().scan(0, |next, adapter| {
            let from = *next;
            *next += adapter.place.rank;
            Some((adapter, from))
        })
    }

    /// What A takes: `x`, or in workspace what dropout leaves of it.
    fn input<B: Backend + ?Sized>(&self, cx: &mut Context<'_, B>, x: Buffer, m: usize) -> Buffer {
        let Some(dropout) = cx.dropout else { return x };
        let dropped = cx.workspace(x.dtype, x.len);
        let mask = dropout.of(&self.adapters[0], x.len / m, cx.along(Axis::Tensor));
        cx.backend.scale(x, dropout.factor(), Some(mask), dropped);
        dropped
    }

    /// `out += low B^T`, each adapter's columns.
    fn add<B: Backend + ?Sized>(&self, cx: &mut Context<'_, B>, low: Rows, out: Buffer, m: usize) {
        let out = Rows { buffer: out, stride: out.len / m };
        for (adapter, from) in self.parts() {
            let b = cx.store.weight(adapter.place.b);
            let (a, c) = (part(low, from), part(out, adapter.first));
            product(cx, Layout::Nt, [m, adapter.columns, adapter.place.rank], a, b, c, true);
        }
    }

    /// Its part of `t`.
    fn low(&self, low: Buffer, m: usize) -> Rows {
        Rows { buffer: low.slice(m * self.first, m * self.rank), stride: self.rank }
    }

    /// `factor input A^T`, `[m, rank]`, into its part of `low`.
    fn project<B: Backend + ?Sized>(&self, cx: &mut Context<'_, B>, input: Buffer, low: Buffer, m: usize) -> Rows {
        let low = self.low(low, m);
        let (k, factor) = (input.len / m, self.adapters[0].place.factor);
        let plain = if factor == 1.0 { low.buffer } else { cx.workspace(cx.dtype, m * self.rank) };
        let (a, c) = (Rows { buffer: input, stride: k }, Rows { buffer: plain, stride: self.rank });
        let weight = cx.store.weight(self.a);
        product(cx, Layout::Nt, [m, self.rank, k], a, weight, c, false);
        if factor != 1.0 {
            cx.backend.scale(plain, factor, None, low.buffer);
        }
        low
    }

    /// `factor x`, `[m, rank]`.
    fn scaled<B: Backend + ?Sized>(&self, cx: &mut Context<'_, B>, x: Buffer) -> Rows {
        let factor = self.adapters[0].place.factor;
        if factor == 1.0 {
            return Rows { buffer: x, stride: self.rank };
        }
        let scaled = cx.workspace(x.dtype, x.len);
        cx.backend.scale(x, factor, None, scaled);
        Rows { buffer: scaled, stride: self.rank }
    }

    /// `d_x += drop(d_low A)`.
    fn input_gradient<B: Backend + ?Sized>(&self, cx: &mut Context<'_, B>, d_low: Rows, d_x: Buffer, m: usize) {
        let (k, weight) = (d_x.len / m, cx.store.weight(self.a));
        let Some(dropout) = cx.dropout else {
            let d_x = Rows { buffer: d_x, stride: k };
            return product(cx, Layout::Nn, [m, k, self.rank], d_low, weight, d_x, true);
        };
        let d_input = cx.workspace(d_x.dtype, d_x.len);
        let out = Rows { buffer: d_input, stride: k };
        product(cx, Layout::Nn, [m, k, self.rank], d_low, weight, out, false);
        let dropped = cx.workspace(d_x.dtype, d_x.len);
        let mask = dropout.of(&self.adapters[0], k, cx.along(Axis::Tensor));
        cx.backend.scale(d_input, dropout.factor(), Some(mask), dropped);
        cx.backend.add(d_x, dropped);
    }
}

/// The columns of a matrix from `first` on.
fn part(rows: Rows, first: usize) -> Rows {
    Rows { buffer: rows.buffer.slice(first, rows.buffer.len - first), stride: rows.stride }
}

/// A product whose right operand is a whole weight.
fn product<B: Backend + ?Sized>(
    cx: &mut Context<'_, B>,
    layout: Layout,
    [m, n, k]: [usize; 3],
    a: Rows,
    weight: Buffer,
    c: Rows,
    accumulate: bool,
) {
    let stride = if layout == Layout::Nt { k } else { n };
    matmul(cx, layout, [m, n, k], a, Rows { buffer: weight, stride }, c, accumulate);
}

fn matmul<B: Backend + ?Sized>(
    cx: &mut Context<'_, B>,
    layout: Layout,
    [m, n, k]: [usize; 3],
    a: Rows,
    b: Rows,
    c: Rows,
    accumulate: bool,
) {
    cx.backend.matmul(&Matmul { layout, m, n, k, a, b, c, accumulate, bias: None });
}
